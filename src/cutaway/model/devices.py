"""Devices by name, and whether they are there."""

from __future__ import annotations

import torch

from cutaway.artifacts.errors import CutawayError


def usable_device(device: str | torch.device) -> torch.device:
    """A device that a number can be put on and read back from.

    Raises `CutawayError` for what is no device, for one that is not here, and for "meta", which holds no values.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise CutawayError(f"'{device}' is not a device; use cpu, cuda or cuda:N.") from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type == "meta":
        raise CutawayError("The device 'meta' holds no values; use cpu, cuda or cuda:N.")
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise CutawayError(f"Device '{device}' was asked for, but PyTorch sees no GPU here; leave device out.")
        if (chosen.index or 0) >= count:
            there = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise CutawayError(f"Device '{device}' was asked for, but PyTorch sees {there} here.")
    try:
        torch.zeros(1, device=chosen).item()
    except Exception as error:  # each backend has its own way to say that it is not there
        raise CutawayError(
            f"Device '{device}' was asked for, but it cannot be used here ({' '.join(str(error).split())[:80]}); leave "
            "device out."
        ) from error
    return chosen

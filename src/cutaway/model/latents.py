"""What the model floor asks of a dictionary: where it reads and writes, and its encoder and decoder.

`cutaway.dictionaries` stands above this floor; its `Dictionary` is one of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported


class _Port(Protocol):
    @property
    def site(self) -> str: ...


class Latents(Protocol):
    """A dictionary: an encoder from the values at one site (or several) to latent activations, and a decoder back."""

    @property
    def site(self) -> str:
        """The site that it reads."""
        ...

    @property
    def inputs(self) -> Sequence[_Port]:
        """What it reads."""
        ...

    @property
    def outputs(self) -> Sequence[_Port]:
        """What it writes."""
        ...

    @property
    def kind(self) -> str:
        """ "sae", "transcoder", "crosscoder" …"""
        ...

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        ...

    @property
    def W_enc(self) -> Tensor: ...  # [d_in, latents]

    @property
    def b_enc(self) -> Tensor: ...  # [latents]

    @property
    def W_dec(self) -> Tensor: ...  # [latents, d_out]

    @property
    def b_dec(self) -> Tensor: ...  # [d_out]

    @property
    def subtract_b_dec(self) -> bool: ...

    @property
    def input_norm(self) -> str | None: ...

    @property
    def selector(self) -> Any: ...

    def encode(self, x: Tensor) -> Tensor:
        """Values [..., d_in] -> latent activations [..., latents]."""
        ...

    def decode(self, activations: Tensor, x: Tensor | None = None) -> Tensor:
        """Latent activations [..., latents] -> what is written [..., d_out]; `x` is what they were encoded from."""
        ...


def is_dictionary(value: object) -> bool:
    """Whether a value encodes and decodes, as a dictionary does (and no site's name)."""
    return all(hasattr(value, name) for name in ("inputs", "outputs", "encode", "decode"))


Capture = str | Latents | Sequence[str | Latents] | None
"""Sites, wildcards and dictionaries that a run is to keep."""


def sites_of(capture: Any) -> Any:
    """What a run captures, with the sites that a dictionary reads in its place."""
    if isinstance(capture, str) or capture is None:
        return capture
    if is_dictionary(capture):
        return [port.site for port in capture.inputs]
    if isinstance(capture, Sequence) and any(is_dictionary(item) for item in capture):
        sites = [site for item in capture for site in (sites_of(item) if is_dictionary(item) else [item])]
        return list(dict.fromkeys(sites))
    return capture


def flat(value: Tensor, heads: bool) -> Tensor:
    """A site's values as a dictionary reads them, [..., width], heads flattened."""
    return value.flatten(-2) if heads else value


def latent_activations(dictionary: Latents, values: Mapping[str, Tensor]) -> Tensor:
    """The latent activations [b, p, latents] of values by site, as a run captured them."""
    read = [values[port.site] for port in dictionary.inputs]
    with torch.no_grad():
        return dictionary.encode(torch.cat([flat(value, value.ndim == 4) for value in read], -1))


def edited_site(dictionary: Latents) -> str:
    """The site at which latents can be edited. Raises NotSupported where they are not written where they are read."""
    if dictionary.kind != "sae":
        sites = ", ".join(port.site for port in dictionary.outputs)
        raise NotSupported(
            f"A latent of a {dictionary.kind} is not read where it is written, so it cannot be edited there; add its "
            f"decoder to {sites} instead."
        )
    return dictionary.site


def clamp_parts(dictionary: Latents, latent: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Vectors and numbers of one latent, from which its activation can be computed without the others.

    Raises NotSupported where that is another function of the token than relu above a threshold.
    """
    if not 0 <= latent < dictionary.d_sae:
        raise CutawayError(f"There is no latent {latent}; the dictionary has 0 to {dictionary.d_sae - 1}.")
    selector = dictionary.selector
    if dictionary.input_norm or selector.name == "gated":
        why = f"input_norm '{dictionary.input_norm}'" if dictionary.input_norm else "a gate"
        raise NotSupported(
            f"A latent of a dictionary with {why} cannot be clamped as one vector; use cutaway.set(dictionary, value, "
            "neurons=latent), which encodes all latents."
        )
    tensors = {"encoder": dictionary.W_enc[:, latent], "decoder": dictionary.W_dec[latent]}
    if dictionary.subtract_b_dec:
        tensors["offset"] = dictionary.b_dec
    threshold = getattr(selector, "threshold", 0.0)
    threshold = float(threshold[latent] if isinstance(threshold, Tensor) else threshold)
    numbers = {"bias": float(dictionary.b_enc[latent])}
    return tensors, numbers | ({"threshold": threshold} if threshold else {})

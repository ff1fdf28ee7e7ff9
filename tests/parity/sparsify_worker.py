"""sparsify at work in its own environment: it makes dictionaries and says what they compute, or reads ours.

    .venvs/sparsify/bin/python tests/parity/sparsify_worker.py make FOLDER        (or: read)

The folders are as in saelens_worker.py.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D, F, N = 24, 96, 64


def inputs() -> Tensor:
    return 3 * torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + 1


def computed(coder: Any, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        found = coder.encode(x)
        a = torch.zeros(len(x), coder.num_latents).scatter(1, found.top_indices, found.top_acts)
        y = coder.decode(
            found.top_acts, found.top_indices
        )  # with multi_topk its forward returns what 4·k latents write
        if coder.W_skip is not None:
            y += x @ coder.W_skip.mT
        assert coder.cfg.multi_topk or torch.equal(y, coder(x).sae_out)
        return {"x": x, "a": a, "y": y}


def cases() -> Iterator[tuple[str, Any]]:
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    kinds: dict[str, dict[str, Any]] = {
        "sae": {},
        "expansion_factor": {"num_latents": 0, "expansion_factor": F // D},
        "free-decoder": {"normalize_decoder": False},
        "multi_topk": {"multi_topk": True},
        "transcoder": {"transcode": True},
        "skip_transcoder": {"transcode": True, "skip_connection": True},
        "skip_sae": {"skip_connection": True},
        "groupmax": {"activation": "groupmax", "k": 8},
    }
    generator = torch.Generator().manual_seed(1)
    for name, settings in kinds.items():
        coder = SparseCoder(D, SparseCoderConfig(**{"num_latents": F, "k": 7, **settings}))
        with torch.no_grad():
            for parameter in coder.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            coder.encoder.weight /= D**0.5
        yield name, coder


def make(folder: Path) -> None:
    for name, coder in cases():
        coder.save_to_disk(folder / name)
        save_file(computed(coder, inputs()), folder / f"{name}.safetensors")


def read(folder: Path) -> None:
    from sparsify import SparseCoder  # pyright: ignore[reportMissingImports]

    for given in sorted(folder.glob("*.x.safetensors")):
        name = given.name.removesuffix(".x.safetensors")
        coder = SparseCoder.load_from_disk(folder / name)
        save_file(computed(coder, load_file(given)["x"]), folder / f"{name}.safetensors")


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # it says at every import that it found no Triton
        {"make": make, "read": read}[sys.argv[1]](Path(sys.argv[2]))

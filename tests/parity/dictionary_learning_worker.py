"""dictionary_learning at work in its own environment: it trains small dictionaries, or reads ours.

    .venvs/dictionary_learning/bin/python tests/parity/dictionary_learning_worker.py make FOLDER        (or: read)

The folders are as in saelens_worker.py. Each is written as its `trainSAE` does: the dictionary's state and the
trainer's configuration.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D, F, N = 24, 96, 64


def inputs(n: int = N, seed: int = 0) -> Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1


def computed(folder: Path, x: Tensor) -> dict[str, Tensor]:
    """By its own loader, which is what its users get."""
    from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]

    dictionary, _ = load_dictionary(str(folder), "cpu")
    with torch.no_grad():
        a = dictionary.encode(x)
        return {"x": x, "a": a, "y": dictionary(x)}


def cases() -> Iterator[tuple[str, Any]]:
    from dictionary_learning.dictionary import AutoEncoderNew  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.gdm import GatedSAETrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.matryoshka_batch_top_k import (  # pyright: ignore[reportMissingImports]
        MatryoshkaBatchTopKTrainer,
    )
    from dictionary_learning.trainers.standard import (  # pyright: ignore[reportMissingImports]
        StandardTrainer,
        StandardTrainerAprilUpdate,
    )
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    shared: dict[str, Any] = {
        "steps": 41, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "gpt2", "warmup_steps": 0,
        "submodule_name": "resid_post_layer_3",
    }  # fmt: skip
    threshold = {"threshold_start_step": 5}
    calm = {"sparsity_warmup_steps": 0}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "standard": (StandardTrainer, calm),
        "april": (StandardTrainerAprilUpdate, calm),
        "new": (StandardTrainerAprilUpdate, {**calm, "dict_class": AutoEncoderNew}),
        "gated": (GatedSAETrainer, calm),
        "topk": (TopKTrainer, {"k": 7, **threshold}),
        "topk-early": (TopKTrainer, {"k": 7}),
        "batchtopk": (BatchTopKTrainer, {"k": 7, **threshold}),
        "batchtopk-early": (BatchTopKTrainer, {"k": 7}),
        "matryoshka": (MatryoshkaBatchTopKTrainer, {"k": 7, "group_fractions": [0.25, 0.75], **threshold}),
        "jumprelu": (JumpReluTrainer, {**calm, "target_l0": 7.0, "bandwidth": 0.1, "lr": 3e-3}),
    }
    for name, (trainer, settings) in kinds.items():
        torch.manual_seed(1)
        made = trainer(**shared, **settings, device="cpu")
        for step in range(40):
            made.update(step, inputs(128, seed=1 + step))
        yield name, made
        made.ae.scale_biases(2.5) if hasattr(made.ae, "scale_biases") else None
        yield f"{name}-scaled", made


def make(folder: Path) -> None:
    for name, trainer in cases():
        (folder / name).mkdir()
        state = {key: value.detach().clone() for key, value in trainer.ae.state_dict().items()}
        torch.save(state, folder / name / "ae.pt")
        settings = {**trainer.config}
        if type(trainer.ae).__name__ != settings["dict_class"]:
            settings["dict_class"] = type(trainer.ae).__name__
        (folder / name / "config.json").write_text(json.dumps({"trainer": settings}, indent=4))
        save_file(computed(folder / name, inputs()), folder / f"{name}.safetensors")


def read(folder: Path) -> None:
    for given in sorted(folder.glob("*.x.safetensors")):
        name = given.name.removesuffix(".x.safetensors")
        save_file(computed(folder / name, load_file(given)["x"]), folder / f"{name}.safetensors")


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]](Path(sys.argv[2]))

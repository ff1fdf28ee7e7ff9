"""Dictionaries that travel between a peer and us, and what both compute from them."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import cutaway.dictionaries
from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, Port
from cutaway.dictionaries.formats.files import Format
from cutaway.dictionaries.selectors import BatchTopK, Gated, JumpReLU, ReLU, Selector, TopK

D, OUT, F = 24, 20, 96
SITE = "blocks.3.resid_post"


def work(python: Path, peer: str, what: str, folder: Path) -> None:
    """Let the peer make dictionaries in the folder, or read ours from it."""
    worker = Path(__file__).with_name(f"{peer}_worker.py")
    done = subprocess.run([python, worker, what, folder], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]


def errors(dictionary: Dictionary, theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of activations "a" and of what is written "y", relative to the largest value."""
    x = theirs["x"]
    ours = {"a": dictionary.encode(x), "y": dictionary(x)}
    return {
        name: ((value.double() - theirs[name].double()).abs().max() / theirs[name].double().abs().max()).item()
        for name, value in ours.items()
    }


def read_all(folder: Path, refused: Mapping[str, str]) -> int:
    """Read every dictionary that a peer made and compare; number of those that were equal.

    `refused` names those that we do not read, with words of the reason. Fails with the list of all that is wrong.
    """
    wrong: dict[str, object] = {}
    cases = sorted(path for path in folder.iterdir() if path.is_dir())
    for case in cases:
        try:
            dictionary = cutaway.dictionaries.load(case)
        except CutawayError as error:
            if refused.get(case.name, "never") not in str(error):
                wrong[case.name] = str(error)
            continue
        found = errors(dictionary, load_file(folder / f"{case.name}.safetensors"))
        if case.name in refused:
            wrong[case.name] = "was to be refused"
        elif max(found.values()) > 1e-5:
            wrong[case.name] = found
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())
    return len(cases) - len(refused)


def write_all(folder: Path, dictionaries: Mapping[str, Dictionary], format: Format) -> None:
    """Write ours in a peer's format, with inputs beside each."""
    for name, dictionary in dictionaries.items():
        write_one(folder, name, folder / name, dictionary, format)


def write_one(folder: Path, name: str, place: Path, dictionary: Dictionary, format: Format) -> None:
    """Write one of ours to a place, and its inputs to FOLDER/NAME.x.safetensors."""
    cutaway.dictionaries.save(dictionary, place, format=format)
    x = 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(5)) + 1
    save_file({"x": x}, folder / f"{name}.x.safetensors")


def assert_read(folder: Path, dictionaries: Mapping[str, Dictionary]) -> None:
    """What the peer computed from each of ours is what ours computes."""
    wrong = {
        name: found
        for name, dictionary in dictionaries.items()
        if max((found := errors(dictionary, load_file(folder / f"{name}.safetensors"))).values()) > 1e-5
    }
    assert not wrong, wrong


def random_dictionaries() -> dict[str, Dictionary]:
    """Each selector plain, with each normalisation, without b_dec on the input, as transcoder and with a skip."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def make(selector: Selector, out: int = D, **more: object) -> Dictionary:
        return Dictionary(
            W_enc=normal(D, F) / D**0.5,
            b_enc=normal(F),
            W_dec=normal(F, out) * (0.5 + torch.rand(F, 1, generator=generator)),
            b_dec=normal(out),
            selector=selector,
            site=SITE,
            model={"id": "gpt2", "revision": None, "weight_hash": None},
            **more,  # pyright: ignore[reportArgumentType]
        )

    selectors: dict[str, Selector] = {
        "relu": ReLU(),
        "topk": TopK(7),
        "batchtopk": BatchTopK(7, 1.5),
        "jumprelu": JumpReLU(2 * normal(F).abs()),
        "gated": Gated(0.3 * normal(F), normal(F)),
    }
    reads, writes = (Port("blocks.3.mlp.in", D),), (Port("blocks.3.mlp.out", OUT),)
    made = {name: make(selector) for name, selector in selectors.items()}
    for name, selector in selectors.items():
        made[f"{name}-no-b_dec"] = make(selector, subtract_b_dec=False)
        made[f"{name}-layer_norm"] = make(selector, input_norm="layer_norm")
        made[f"{name}-unit"] = make(selector, input_norm="unit")
        other = {"reads": reads, "writes": writes, "subtract_b_dec": False}
        made[f"{name}-transcoder"] = make(selector, OUT, **other)
        made[f"{name}-skip_transcoder"] = make(selector, OUT, W_skip=normal(OUT, D), **other)
    return made

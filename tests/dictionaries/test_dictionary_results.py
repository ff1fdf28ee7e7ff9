"""The face of the package, its results as text, tables and files, and the view of one latent."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from result_checks import check_result
from tiny_llama import tiny_llama
from torch import Tensor

import cutaway.dictionaries as face
from cutaway.artifacts.errors import CutawayError
from cutaway.data.harvesting.activations import read_activations
from cutaway.dictionaries import Dictionary, Port, TopK, TrainConfig
from cutaway.dictionaries.training.recipe import Recipe
from cutaway.draw.result import Result
from cutaway.model.language_model import LanguageModel
from cutaway.subjects.superposition.generator import FeatureGenerator, FeatureWorld

SITE = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(1, 50, (16, 12), generator=torch.Generator().manual_seed(1))


def axes(lm: LanguageModel, rows: Tensor, seed: int = 0) -> Dictionary:
    """Latents that are centred tokens."""
    x = read_activations(lm, rows, SITE)
    picked = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:48]
    decoder = torch.nn.functional.normalize(x[picked] - x.mean(0), dim=1)
    return Dictionary(decoder.T.contiguous() / 2, torch.zeros(48), decoder, x.mean(0), TopK(6), SITE)


def labels(x: Tensor) -> np.ndarray:
    return (x[:, 0] > x[:, 0].median()).numpy()


def _sides() -> Result:
    generator = torch.Generator().manual_seed(0)
    two = Dictionary(
        torch.randn(8, 16, generator=generator), torch.zeros(16), torch.randn(16, 8, generator=generator),
        torch.zeros(8), TopK(3), "a", reads=(Port("a", 4), Port("b", 4)), writes=(Port("a", 4), Port("b", 4)),
    )  # fmt: skip
    x = torch.randn(400, 8, generator=generator)
    return face.compare_sides(two, x, x)


def _trained() -> Mapping[str, face.Trained]:
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    return face.train(x, "here", d_sae=16, k=3, tokens=2048, batch=128, preset="batchtopk")


MADE: dict[str, Callable[[LanguageModel, Tensor, Path], Result]] = {
    "evaluate": lambda lm, rows, _: face.evaluate(lm, axes(lm, rows), rows, spliced_rows=4),
    "judge": lambda lm, rows, _: face.judge(lm, [axes(lm, rows), axes(lm, rows, 1)], rows, spliced_rows=4),
    "latents": lambda lm, rows, _: face.judge(lm, axes(lm, rows), rows, spliced_rows=0).latents[0],
    "frontier": lambda lm, rows, _: face.frontier([face.judge(lm, axes(lm, rows), rows, spliced_rows=4).point()]),
    "stability": lambda lm, rows, _: face.stability([axes(lm, rows), axes(lm, rows, 1)]),
    "sides": lambda *_: _sides(),
    "probing": lambda lm, rows, _: face.sparse_probing(
        axes(lm, rows), x := read_activations(lm, rows, SITE), labels(x), ks=(1, 2), folds=2
    ),
    "absorption": lambda lm, rows, _: face.absorption(axes(lm, rows), x := read_activations(lm, rows, SITE), labels(x)),
    "inspect": lambda lm, rows, path: face.inspect(face.save(axes(lm, rows), path / "d"), lm, rows, text="numbers"),
    "inspect files": lambda lm, rows, path: face.inspect(face.save(axes(lm, rows), path / "d")),
    "trained": lambda *_: _trained()["here"],
    "estimate": lambda *_: face.estimate(
        face.prepare(
            Recipe.of({"site": "here", "d_sae": 16, "k": [2, 3], "tokens": 2048, "batch": 128}), torch.randn(600, 8)
        )
    ),
    "recover": lambda *_: face.recover(
        FeatureGenerator(FeatureWorld(8, 6, active=(1, 1))),
        {"topk": TrainConfig(d_sae=8, selector=face.TopKRule(1), tokens=4096, batch=128)},
        tokens=1024,
    )[0],
}


@pytest.mark.parametrize("name", MADE)
def test_a_result_prints_and_saves_itself(name: str, lm: LanguageModel, rows: Tensor, tmp_path: Path) -> None:
    check_result(MADE[name](lm, rows, tmp_path), tmp_path)


def test_the_package_hands_on_its_names_and_loads_no_torch() -> None:
    program = (
        "import sys, cutaway.dictionaries as d, cutaway.features as f\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "assert {'load', 'train', 'judge', 'Dictionary'} <= set(dir(d)) and 'top_examples' in dir(f)\n"
        "[getattr(m, name) for m in (d, f) for name in m.__all__]\n"
        "assert callable(d.train) and callable(d.inspect)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_latent_is_a_view_of_its_rows(lm: LanguageModel, rows: Tensor) -> None:
    dictionary = axes(lm, rows)
    latent = dictionary.latent(7)
    assert torch.equal(latent.encoder, dictionary.W_enc[:, 7])
    assert torch.equal(latent.decoder, dictionary.W_dec[7])
    assert (latent.site, latent.bias) == (SITE, 0.0)
    assert latent.norm == pytest.approx(1, abs=1e-6)
    assert dictionary.latent(-1).index == 47
    cosines = torch.nn.functional.cosine_similarity(dictionary.W_dec[7], dictionary.W_dec, dim=1)
    torch.testing.assert_close(latent.cosines(), cosines)
    cosines[7] = -2
    assert latent.nearest(2)[0] == (int(cosines.argmax()), pytest.approx(float(cosines.max()), abs=1e-6))
    x = read_activations(lm, rows, SITE)
    torch.testing.assert_close(latent.activations(x), dictionary.encode(x)[:, 7])
    scaled = replace(dictionary, W_dec=dictionary.W_dec * 2).latent(7)
    assert scaled.top_tokens(lm, 1)[0][1] == pytest.approx(2 * latent.top_tokens(lm, 1)[0][1], rel=1e-4)
    assert len(repr(latent).split("\n")) == 2
    for index in (48, -49):
        with pytest.raises(CutawayError, match=f"there is no latent {index}: the dictionary has 48"):
            dictionary.latent(index)


def test_a_latent_s_examples_are_its_strongest_tokens_of_each_row(lm: LanguageModel, rows: Tensor) -> None:
    dictionary = axes(lm, rows)
    counts = [float(dictionary.encode(read_activations(lm, row[None], SITE))[:, 7].max()) for row in rows]
    found = dictionary.latent(7).top_examples(lm, rows, n=3)
    assert [value for value, _ in found] == pytest.approx(sorted(counts, reverse=True)[: len(found)], rel=1e-4)
    assert all(text.count("[[") == 1 for _, text in found)

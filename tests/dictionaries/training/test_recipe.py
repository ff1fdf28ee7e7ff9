"""Recipes: a grid becomes the jobs that its words say, a written-out recipe makes the same jobs again."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Port
from cutaway.dictionaries.training.presets import PRESETS, preset
from cutaway.dictionaries.training.recipe import Recipe, expand, written_out
from cutaway.dictionaries.training.rules import BatchTopKRule

SITES = {f"blocks.{layer}.{site}": 16 for layer in range(3) for site in ("resid_post", "mlp.in", "mlp.out")}


def find(pattern: str) -> Mapping[str, Port]:
    found = {name: Port(name, width) for name, width in SITES.items() if fnmatchcase(name, pattern)}
    if not found:
        raise CutawayError(f"no site {pattern}")
    return found


def test_a_grid_is_every_combination_and_names_say_what_differs() -> None:
    recipe = Recipe.of(
        {"site": "blocks.*.resid_post", "preset": ["batchtopk", "topk"][:1], "k": [4, 8], "seed": [0, 1], "d_sae": 64}
    )
    jobs = expand(recipe, find)
    assert len(jobs) == 3 * 2 * 2
    job = jobs["blocks.1.resid_post-k8-s1"]
    assert job.reads == ("blocks.1.resid_post",)
    assert job.config == preset("batchtopk", d_in=16, d_sae=64, k=8, seed=1)
    (one,) = expand(Recipe.of({"site": "blocks.1.resid_post"}), find).items()
    assert one[0] == "blocks.1.resid_post"
    assert isinstance(one[1].config.selector, BatchTopKRule)


def test_each_preset_takes_the_setting_that_it_has() -> None:
    names = ["batchtopk", "gemma-scope-1", "anthropic-2024"]
    recipe = Recipe.of(
        {
            "site": "blocks.1.resid_post",
            "preset": names,
            "k": [4, 8],
            "l0": [5, 6],
            "sparsity": [0.5, 1, 2],
            "d_sae": 64,
        }
    )
    jobs = expand(recipe, find)
    prefix = "blocks.1.resid_post-"
    assert {name.removeprefix(prefix) for name in jobs} == {
        *(f"batchtopk-k{k}" for k in (4, 8)),
        *(f"gemma-scope-1-{end}" for end in ("c0.5", "c1", "c2", "l5", "l6")),
        *(f"anthropic-2024-c{c}" for c in ("0.5", "1", "2")),
    }
    assert jobs[prefix + "gemma-scope-1-l6"].config == preset("gemma-scope-1", d_in=16, d_sae=64, l0=6)


def test_transcoders_and_crosscoders_take_their_own_ports() -> None:
    recipe = Recipe.of(
        {
            "site": "blocks.{}.mlp.in".replace("{}", "*"),
            "to": "blocks.*.mlp.out",
            "crosscoder": "blocks.0.resid_post, blocks.2.resid_post",
            "preset": ["skip-transcoder", "crosscoder-2024"],
            "d_sae": 64,
        }
    )
    jobs = expand(recipe, find)
    assert len(jobs) == 4
    job = jobs["blocks.1.mlp.in-to-blocks.1.mlp.out-skip-transcoder"]
    assert (job.reads, job.writes) == (("blocks.1.mlp.in",), ("blocks.1.mlp.out",))
    assert job.config.skip
    job = jobs["blocks.0.resid_post+blocks.2.resid_post-crosscoder-2024"]
    assert job.reads == ("blocks.0.resid_post", "blocks.2.resid_post")
    assert job.config == preset("crosscoder-2024", d_in=32, d_sae=64)
    both = {"crosscoder": "blocks.0.resid_post, blocks.2.resid_post", "d_sae": 64}
    (job,) = expand(Recipe.of(both), find).values()  # one that would normalise each token scales each site instead
    assert isinstance(job.config.selector, BatchTopKRule)
    assert (job.config.input_norm, job.config.normalise) == (None, "mean_norm")
    plain = expand(Recipe.of({"site": "blocks.1.mlp.in", "to": "blocks.1.mlp.out", "preset": "matryoshka"}), find)
    (job,) = plain.values()  # any selector may be a transcoder's
    assert not job.config.subtract_b_dec


@pytest.mark.parametrize("name", PRESETS)
def test_a_written_out_recipe_makes_the_same_jobs(name: str, tmp_path: Path) -> None:
    ports: dict[str, Any] = {
        "sae": {"site": "blocks.1.resid_post"},
        "transcoder": {"site": "blocks.1.mlp.in", "to": "blocks.1.mlp.out"},
        "crosscoder": {"crosscoder": "blocks.0.resid_post,blocks.1.resid_post"},
    }[PRESETS[name].kind.replace("skip_", "")]
    options = {"learning_rate": "auto", "clip": 0.5}
    recipe = Recipe.of({**ports, "preset": name, "tokens": 4096, "options": options, "high_norm": 9.0, "d_sae": 64})
    jobs = expand(recipe, find)
    (job,) = jobs.values()
    assert job.config.learning_rate is None
    path = tmp_path / "recipe.toml"
    path.write_text(written_out(recipe, jobs).to_toml())
    again = Recipe.read(path)
    assert expand(again, find) == jobs
    assert again.high_norm == 9.0
    (longer,) = expand(again.changed(tokens=8192, options={"clip": 2.0}), find).values()
    assert (longer.config.tokens, longer.config.clip) == (8192, 2.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"site": "blocks.1.resid_post", "preset": "topk"}, "'topk' is not a preset"),
        ({"site": "blocks.1.resid_post", "k": 4, "preset": "saprmarks"}, "k says nothing to saprmarks"),
        ({"site": "blocks.1.resid_post", "preset": "transcoder"}, "give 'to' beside 'site'"),
        ({"site": "blocks.1.resid_post", "preset": "crosscoder-2024"}, "give 'crosscoder'"),
        ({"site": "blocks.*.resid_post", "to": "blocks.1.mlp.out"}, "3 under 'site' and 1 under 'to'"),
        ({"crosscoder": "blocks.1.resid_post"}, "reads several sites"),
        ({"site": "blocks.1.resid_post", "k": [4, 4]}, "would be trained twice"),
        ({"preset": "batchtopk"}, "nothing says where"),
        ({"site": "blocks.1.resid_post", "crosscoder": "a,b", "preset": "batchtopk"}, "no site a"),
        ({"site": "blocks.1.resid_post", "options": {"clp": 1}}, "'clp' is not a field"),
        ({"site": "x", "dictionaries": {"a": {"reads": "blocks.1.resid_post"}}}, "cannot make a grid"),
        ({"dictionaries": {"../a": {"reads": "blocks.1.resid_post"}}}, "name of a folder"),
        ({"dictionaries": {"a": {"reads": "blocks.1.resid_post", "config": {"d_sae": "many"}}}}, "d_sae"),
        ({"sites": "blocks.1.resid_post"}, "sites"),
        ({"tokens": "many"}, "tokens"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CutawayError, match=words):
        expand(Recipe.of(values), find)


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    with pytest.raises(CutawayError, match="does not exist"):
        Recipe.read(path)
    path.write_text("site = ")
    with pytest.raises(CutawayError, match="is not TOML"):
        Recipe.read(path)

"""Dictionaries of several seeds judged together; intervals; the frontier; labels of tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_llama import tiny_llama
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, MissingControls
from cutaway.artifacts.results import Effect
from cutaway.data.harvesting.activations import read_activations
from cutaway.dictionaries.dictionary import Dictionary, Port, ReLU, TopK
from cutaway.dictionaries.evaluation.evaluate import evaluate
from cutaway.dictionaries.evaluation.figures import mean_effect, share_effect, summary, with_seeds
from cutaway.dictionaries.evaluation.frontier import Point, frontier
from cutaway.dictionaries.evaluation.judge import by_setting, judge
from cutaway.dictionaries.evaluation.labels import first_letters, frequent, states_of_cities
from cutaway.model.language_model import LanguageModel
from cutaway.subjects.world.facts import CITIES

SITE = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(1, 50, (16, 12), generator=torch.Generator().manual_seed(1))


def axes(lm: LanguageModel, rows: Tensor, seed: int, k: int = 6) -> Dictionary:
    """Directions of the activations themselves, more of them right than random: centred tokens as latents."""
    x = read_activations(lm, rows, SITE)
    mean = x.mean(0)
    picked = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:48]
    decoder = torch.nn.functional.normalize(x[picked] - mean, dim=1)
    return Dictionary(decoder.T.contiguous() / 2, torch.zeros(48), decoder, mean, TopK(k), SITE)


def test_figures_are_means_over_seeds(lm: LanguageModel, rows: Tensor) -> None:
    some = [axes(lm, rows, seed) for seed in (0, 1, 2)]
    judged = judge(lm, some, rows, spliced_rows=6)
    singles = [evaluate(lm, one, rows, spliced_rows=6) for one in some]
    for name in ("l0", "variance_explained", "cosine", "norm_ratio", "ce_increase", "kl_recovered_mean"):
        each = [single.effects[name].value for single in singles]
        assert judged.per_seed[name] == pytest.approx(each, rel=1e-5)
        assert judged.effects[name].value == pytest.approx(np.mean(each), rel=1e-5)
        low, high = judged.effects[name].interval or (1, 0)
        assert low <= judged.effects[name].value <= high
        judged.effects[name].require_controls()
    assert judged.per_seed["dead"] == pytest.approx([single.dead for single in singles])
    assert judged.per_seed["dense"] == pytest.approx([single.dense for single in singles])
    assert len(judged.per_seed["stability_cosine"]) == 3, "one per pair"
    cosine = judged.effects["encoder_decoder"]
    assert cosine.value == pytest.approx(1, abs=1e-5)
    assert abs(cosine.controls[0].value) < 0.3
    text = str(judged)
    assert "3 seeds" in text
    assert "matched decoder cosine (signed, one-to-one assignment)" in text
    data = judged.to_json()
    assert data["seeds"] == 3
    assert len(data["latents"]) == 3
    assert set(data["effects"]) == set(data["per_seed"])
    absolute = judge(lm, some, rows, spliced_rows=0, signed=False).effects["stability_cosine"]
    assert "absolute" in absolute.name
    assert absolute.value > judged.effects["stability_cosine"].value


def test_one_dictionary_has_no_stability(lm: LanguageModel, rows: Tensor) -> None:
    judged = judge(lm, axes(lm, rows, 0), rows, spliced_rows=0)
    assert "stability_cosine" not in judged.effects
    assert judged.ce == {}
    assert "one seed" in str(judged)
    assert judged.sides == ()


def test_a_crosscoder_is_judged_with_its_sides(lm: LanguageModel, rows: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    ports = (Port("blocks.0.resid_post", 16), Port("blocks.2.resid_post", 16))
    decoder = torch.randn(30, 32, generator=generator)
    decoder[:5, :16] = 0
    crosscoder = Dictionary(
        decoder.T.contiguous() / 8, torch.zeros(30), decoder, torch.zeros(32), TopK(4), ports[0].site, reads=ports
    )
    judged = judge(lm, crosscoder, rows, spliced_rows=4)
    (sides,) = judged.sides
    assert sides.labels == ("blocks.0.resid_post", "blocks.2.resid_post")
    assert sides.exclusive(1)[:5].sum() == (sides.n_active[:5] > 0).sum()
    names = [name for name, *_ in judged.all_effects()]
    assert "fvu @ blocks.2.resid_post" in names
    assert "shared" in names
    assert judged.to_json()["sides"][0]["sides"] == list(sides.labels)


def test_intervals_of_rows_have_the_width_of_theory() -> None:
    generator = np.random.default_rng(0)
    table = np.abs(generator.standard_normal((1, 40, 2))) + np.array([0.0, 1.0])

    def ratio(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]

    value, (low, high), each = summary(table, ratio)
    off = table[0, :, 0] - value * table[0, :, 1]  # each row's share in the error of the ratio
    half = 1.96 * np.sqrt((off**2).sum() / (40 * 39)) / table[0, :, 1].mean()
    assert value == each[0] == pytest.approx(ratio(table[0].sum(0)))
    assert high - low == pytest.approx(2 * half, rel=0.15)
    assert (low + high) / 2 == pytest.approx(value, abs=0.3 * half)
    assert all(np.isnan(summary(table[:, :1], ratio)[1])), "one row has no interval"


def test_intervals_that_include_seeds_cover_as_they_should() -> None:
    """Rows and seeds both vary: of 200 worlds the interval should hold the truth in about 95 %."""
    generator = np.random.default_rng(1)
    n_seeds, n_rows = 5, 30

    def mean(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]

    inside = without = 0
    for world in range(200):
        by_seed = generator.standard_normal((n_seeds, 1)) * 0.5
        by_row = generator.standard_normal((1, n_rows)) * 0.5
        noise = generator.standard_normal((n_seeds, n_rows)) * 0.5
        table = np.stack([by_seed + by_row + noise, np.ones((n_seeds, n_rows))], axis=-1)
        low, high = summary(table, mean, seed=world)[1]
        inside += low <= 0 <= high
        low, high = summary(table.mean(0, keepdims=True), mean, seed=world)[1]
        without += low <= 0 <= high
    assert 0.92 <= inside / 200 <= 0.99
    assert without / 200 < 0.7, "rows alone are not enough"


def test_seeds_that_agree_add_nothing() -> None:
    assert with_seeds(np.full(3, 0.5), (0.4, 0.7)) == pytest.approx((0.4, 0.7))


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_where_seeds_alone_vary_the_interval_is_students(n_seeds: int) -> None:
    figures = np.array([0.1, 0.5, 0.2, 0.9, 0.3])[:n_seeds]
    expected = stats.t.interval(0.95, n_seeds - 1, figures.mean(), stats.sem(figures))
    assert with_seeds(figures, (float(figures.mean()), float(figures.mean()))) == pytest.approx(expected)


def test_shares_and_means_stand_beside_their_controls() -> None:
    share, each = share_effect("dead", [10, 30], 100, {"random": [0, 2]})
    assert share.value == pytest.approx(0.2)
    assert each == (0.1, 0.3)
    low, high = share.interval or (0, 0)
    assert low < 0.1
    assert high > 0.25
    assert share.controls[0].value == pytest.approx(0.01)
    single, _ = share_effect("dead", [0], 100, {"random": [0]})
    assert single.interval is not None
    assert single.interval[1] > 0.02, "none of 100 is not never"
    both, _ = share_effect("dead", [0, 0], 100, {"random": [0, 0]})
    assert both.interval == single.interval
    values = [np.array([1.0, 2.0, np.nan]), np.array([3.0, 4.0, 5.0])]
    mean, each = mean_effect("norm", values, {"nothing": [np.array([np.nan])]}, units="length")
    assert each == (1.5, 4.0)
    assert mean.value == pytest.approx(2.75)
    assert np.isnan(mean.controls[0].value)


def test_dictionaries_that_differ_in_their_seed_are_one_setting(lm: LanguageModel, rows: Tensor) -> None:
    def with_training(seed: int, k: int, **more: object) -> Dictionary:
        training = {"seed": seed, "selector": {"k": k, "seed": seed}, **more}
        return replace(axes(lm, rows, seed, k), metadata={"training": training})

    some = {"a": with_training(0, 4), "b": with_training(0, 8), "c": with_training(1, 4), "d": axes(lm, rows, 0, 4)}
    some["e"] = with_training(2, 4, tokens=7)
    some["f"] = replace(axes(lm, rows, 1, 4))
    assert [list(group) for group in by_setting(some)] == [["a", "c"], ["b"], ["d", "f"], ["e"]]


def test_the_frontier_has_lines_by_rising_l0(lm: LanguageModel, rows: Tensor) -> None:
    points = [judge(lm, axes(lm, rows, 0, k), rows, spliced_rows=4).point("axes") for k in (12, 3, 6)]
    relu = judge(lm, replace(axes(lm, rows, 0), selector=ReLU()), rows, spliced_rows=4).point()
    found = frontier([*points, relu])
    assert [row[:2] for row in found.cells()] == [["axes", f"topk k={k}"] for k in (3, 6, 12)] + [["relu", "relu"]]
    l0 = [row[2] for row in found.cells()][:3]
    assert l0 == pytest.approx([3, 6, 12], abs=0.1)
    fvu = found.series("fvu")
    assert [one["name"] for one in fvu[:2]] == ["axes", "relu"]
    assert fvu[0]["y"] == [points[place].effects["fvu"].value for place in (1, 2, 0)]
    assert fvu[0]["x"] == l0
    drawn = [one for one in fvu if one.get("control")]
    assert drawn or "too far away" in found.aside("fvu")
    assert "<svg" in found.svg("fvu")
    assert len(found.sections()) == 3
    assert "topk k=12" in str(found)
    assert [point["line"] for point in found.to_json()] == ["axes"] * 3 + ["relu"]


def test_a_frontier_needs_points_with_controls() -> None:
    with pytest.raises(CutawayError, match="at least one"):
        frontier([])
    with pytest.raises(CutawayError, match="has no L0"):
        frontier([Point("a", "b", {})])
    bare = Effect("l0", 3.0, 1, None, (), "none", "latents")
    with pytest.raises(MissingControls):
        frontier([Point("a", "b", {"l0": bare})])


def test_first_letters_and_states(atlas: LanguageModel) -> None:
    ids = atlas.tokens("Dallas is in Texas, and Oakland is in 1 big State.", bos=False).ids[0]
    strings = atlas.token_strings(ids.tolist())
    expected = [text.strip()[:1].lower() if text.strip()[:1].isalpha() else "" for text in strings]
    assert first_letters(atlas, ids).tolist() == expected
    texts, states, cities = states_of_cities(atlas, n_states=3)
    assert len(set(states)) == 3
    for text, state, city in zip(texts, states, cities, strict=True):
        assert text.endswith(f" {city}")
        assert atlas.token_strings(atlas.tokens(text).ids[0].tolist())[-1] == f" {city}"
        assert next(one for one in CITIES if one.name == city and one.state.name == state)
    letters = np.array(["a", "a", "b", "", "a"])
    assert frequent(letters, np.array([0, 1, 0, 0, 1]), min_tokens=2, min_groups=2) == ["a"]


def test_an_ablation_that_costs_nothing_is_noted(lm: LanguageModel, rows: Tensor) -> None:
    dictionary = axes(lm, rows, 0)
    # what it would say itself, so that ablating costs something
    own = lm.hf.generate(rows[:, :2], max_new_tokens=10, do_sample=False)  # type: ignore
    assert judge(lm, dictionary, own).notes == ()
    weight = lm.hf.lm_head.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    try:
        first, second = judge(lm, dictionary, own).notes
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert first.startswith("zero ablation of the site raises the cross-entropy by 0 nats")
    assert second.startswith("mean ablation")

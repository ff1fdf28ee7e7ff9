"""Examples, densities and labels against a dense table of every activation."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from result_checks import check_result
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, TopK
from cutaway.features.activations import Keeper, LatentActivations, latent_activations, strongest_per_row
from cutaway.features.concepts import match_concepts
from cutaway.features.effects import direct_logits, logit_effects
from cutaway.features.examples import FeatureExamples, Windows, top_examples
from cutaway.features.summary import CLASSES, token_summary
from cutaway.model.language_model import LanguageModel


@pytest.fixture(scope="module")
def table(tiny: LanguageModel, dictionary: Dictionary, rows: Tensor) -> Tensor:
    """Every latent's activation at every place [30, 14, F], BOS counted as silent."""
    stream = tiny.run(rows.tolist(), capture=dictionary.site, logits=None)[dictionary.site]
    dense = dictionary.encode(stream).detach()
    dense[:, 0] = 0
    return dense


@pytest.fixture(scope="module")
def examples(tiny: LanguageModel, dictionary: Dictionary, rows: Tensor) -> FeatureExamples:
    return top_examples(tiny, dictionary, rows, n=4, windows=Windows(before=3, after=2), sample=6, batch_rows=7)


def test_density_and_maximum(examples: FeatureExamples, table: Tensor) -> None:
    assert examples.n_tokens == 30 * 13
    torch.testing.assert_close(examples.density, (table > 0).sum((0, 1)) / (30 * 13))
    torch.testing.assert_close(examples.maximum, table.amax((0, 1)), rtol=1e-5, atol=1e-5)


def test_top_examples_are_the_strongest_of_different_even_rows(examples: FeatureExamples, table: Tensor) -> None:
    for latent, found in examples.latents.items():
        best = table[0::2, :, latent].amax(1)
        expected = [v for v in best.sort(descending=True).values.tolist() if v > 0][:4]
        assert [example.value for example in found.top] == pytest.approx(expected, abs=1e-4)
        assert len({example.row for example in found.top}) == len(found.top)
        assert all(example.row % 2 == 0 for example in found.top)


def test_windows_show_the_latents_activations(
    tiny: LanguageModel, examples: FeatureExamples, table: Tensor, rows: Tensor
) -> None:
    some = [example for found in examples.latents.values() for example in (*found.top, *found.lower)]
    assert some
    for latent, found in examples.latents.items():
        for example in (*found.top, *found.lower):
            low, high = max(0, example.position - 3), min(14, example.position + 3)
            assert list(example.tokens) == tiny.token_strings(rows[example.row, low:high].tolist())
            expected = table[example.row, low:high, latent].clone()
            if low == 0:
                expected[0] = example.values[0]  # BOS is shown as it is, but never chosen
            assert list(example.values) == pytest.approx(expected.tolist(), abs=1e-4)
            assert example.peak == example.position - low


def test_lower_examples_are_drawn_from_all_activations(examples: FeatureExamples, table: Tensor) -> None:
    lower = [(latent, e) for latent, found in examples.latents.items() for e in found.lower]
    assert lower
    for latent, example in lower:
        assert example.value == pytest.approx(table[example.row, example.position, latent].item(), abs=1e-4)
        assert 0 < example.quantile < 1
    for found in examples.latents.values():
        assert [e.value for e in found.lower] == sorted((e.value for e in found.lower), reverse=True)


def test_held_out_places_are_in_odd_rows(examples: FeatureExamples, table: Tensor) -> None:
    for latent in range(table.shape[-1]):
        active = {(r, c) for r, c in (table[..., latent] > 0).nonzero().tolist()}
        held = [divmod(at, 14) for at in examples.held_at[latent].tolist() if at >= 0]
        assert len(held) == len(set(held)) == min(6, sum(r % 2 for r, _ in active))
        assert set(held) <= {place for place in active if place[0] % 2 == 1}


def test_batches_do_not_matter(
    tiny: LanguageModel, dictionary: Dictionary, rows: Tensor, examples: FeatureExamples
) -> None:
    again = top_examples(tiny, dictionary, rows, n=4, windows=Windows(before=3, after=2), sample=6, batch_rows=30)
    torch.testing.assert_close(again.density, examples.density)
    for latent, found in examples.latents.items():
        assert [e.value for e in again[latent].top] == pytest.approx([e.value for e in found.top], abs=1e-4)


def test_rows_may_differ_in_length(tiny: LanguageModel, dictionary: Dictionary, rows: Tensor, table: Tensor) -> None:
    ragged = [row[: 14 - i % 3].tolist() for i, row in enumerate(rows)]
    found = top_examples(tiny, dictionary, ragged, latents=[0], n=2)
    lengths = torch.tensor([len(row) for row in ragged])
    real = torch.arange(14)[None] < lengths[:, None]
    assert found.n_tokens == int(real.sum()) - 30
    torch.testing.assert_close(found.density, ((table > 0) & real[..., None]).sum((0, 1)) / found.n_tokens)
    with pytest.raises(CutawayError, match="not asked for"):
        found[1]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1, width=32), st.integers(0, 9)), max_size=60), st.integers(1, 5)
)
def test_keeper_keeps_the_largest(entries: list[tuple[int, float, int]], cuts: int) -> None:
    keeper = Keeper(5, 3)
    for start in range(cuts):
        part = entries[start::cuts]
        latent, score, row = (torch.tensor([e[i] for e in part]) for i in range(3))
        keeper.add(latent.long(), score.float(), score.float() * 2, row.long())
    for latent in range(5):
        expected = sorted((e[1] for e in entries if e[0] == latent), reverse=True)[:3]
        kept = keeper.score[latent][keeper.at[latent] >= 0].tolist()
        assert kept == pytest.approx(expected)
        assert keeper.value[latent][: len(kept)].tolist() == pytest.approx([2 * v for v in expected])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1, width=32), st.integers(0, 19)), min_size=1, max_size=40))
def test_strongest_per_row(entries: list[tuple[int, float, int]]) -> None:
    latent, value, at = (
        torch.tensor([e[0] for e in entries]),
        torch.tensor([e[1] for e in entries]),
        torch.tensor([e[2] for e in entries]),
    )
    kept = strongest_per_row(latent, value, at, width=5).tolist()
    groups = {(e[0], e[2] // 5) for e in entries}
    assert len(kept) == len(groups)
    for i in kept:
        e = entries[i]
        assert e[1] == max(o[1] for o in entries if (o[0], o[2] // 5) == (e[0], e[2] // 5))


def test_nothing_of_bos_and_padding_fires(tiny: LanguageModel, dictionary: Dictionary, rows: Tensor) -> None:
    padded = rows.clone()
    padded[:, -2:] = 1
    for part in latent_activations(tiny, dictionary, padded):
        columns = part.kept % 14
        assert columns.min() == 1
        assert columns.max() == 11
    with pytest.raises(CutawayError, match="no rows"):
        list(latent_activations(tiny, dictionary, rows, index=[]))


def test_logit_effects_are_the_derivative_at_the_last_stream(tiny: LanguageModel, dictionary: Dictionary) -> None:
    """With the divisor held, a step along the decoder row moves the logits by exactly this (up to the divisor)."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(D := tiny.d_model, generator=generator) * 3
    scale = (x.pow(2).mean() + 1e-6).sqrt()
    w = dictionary.W_dec[7]
    w = w - (w @ x) / (x @ x) * x  # along the sphere, so that the divisor does not change to first order
    step = 1e-3
    moved = (tiny.unembed(x + step * w) - tiny.unembed(x - step * w)) / (2 * step) * scale
    torch.testing.assert_close(direct_logits(tiny, w[None])[0], moved - moved.mean(), rtol=2e-3, atol=2e-3)
    assert D == 32
    effects = logit_effects(tiny, dictionary, [7, 2], k=4)
    logits = direct_logits(tiny, dictionary.W_dec[[7, 2]])
    assert effects[1].promotes[0][1] == pytest.approx(logits[1].max().item())
    assert effects[1].suppresses[0][1] == pytest.approx(logits[1].min().item())
    assert "direct path" in str(effects[0])


def test_token_classes() -> None:
    hits = {
        name: [t for t in (" 12", "Paris", " NASA", "ing", "\n    ", ".", " cat") if test(t)]
        for name, test in CLASSES.items()
    }
    assert hits == {
        "digits": [" 12"],
        "capital word": ["Paris"],
        "capitals": [" NASA"],
        "punctuation": ["."],
        "indentation or newline": ["\n    "],
        "piece inside a word": ["ing"],
    }


def test_places_are_drawn_in_proportion_to_the_squared_activation(tiny: LanguageModel) -> None:
    """Of two activations 1 and 3 the stronger is drawn in 9 of 10 cases: 2,000 latents with one draw a half each."""
    f = 2000
    many = Dictionary(
        torch.zeros(2, f), torch.zeros(f), torch.zeros(f, 2), torch.zeros(2), TopK(1), site="blocks.1.resid_post"
    )
    at = torch.tensor([0, 1, 4, 5])[:, None].expand(4, f)  # two places in an even row, two in an odd one
    value = torch.tensor([1.0, 3.0, 1.0, 3.0])[:, None].expand(4, f)
    firing = LatentActivations(torch.arange(f).repeat(4), value.flatten(), at.flatten(), torch.arange(8))
    found = top_examples(tiny, many, torch.zeros(2, 4, dtype=torch.long), latents=[], sample=1, activations=[firing])
    for places, strong in ((found.shown_at, 1), (found.held_at, 5)):
        assert (places[:, 0] == strong).float().mean().item() == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize(("alone", "label", "base"), [(3, "“w10”", 15 / 120), (12, "after “w11”", 12 / 120)])
def test_a_neighbours_property_counts_four_fifths(tiny: LanguageModel, alone: int, label: str, base: float) -> None:
    """A latent fires on w10 behind w11. What both say of it is weighed by how rare each is:
    ln(120/15) = 2.08 and ln(120/24) = 1.61 for w10, 0.8 · ln(120/12) = 1.84 for w11 before it."""
    rows = torch.arange(120).mul(7).remainder(48).add(12).view(12, 10)
    rows[:, 4], rows[:, 5] = 11, 10
    rows[:alone, 1] = 10
    fired = torch.arange(12) * 10 + 5
    examples = FeatureExamples(
        "blocks.1.resid_post", 120, 10, torch.tensor([0.1]), torch.ones(1), {}, fired[None, 0::2], fired[None, 1::2],
        torch.arange(120),
    )  # fmt: skip
    found = token_summary(tiny, rows, examples, [0])[0]
    assert found.label == label
    assert found.base_rate == pytest.approx(base)
    assert (found.precision, found.n) == (1.0, 6)


def test_results_of_features_print_and_save_themselves(
    tiny: LanguageModel, dictionary: Dictionary, examples: FeatureExamples, rows: Tensor, tmp_path: Path
) -> None:
    labelled = {"odd": rows % 2 == 1, "small": rows < 20}
    one = next(iter(examples.latents))
    for number, result in enumerate(
        (
            examples,
            examples[one],
            match_concepts(tiny, dictionary, rows, labelled, shuffles=2),
            logit_effects(tiny, dictionary, [3], k=4)[0],
            token_summary(tiny, rows, examples),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        check_result(result, folder)

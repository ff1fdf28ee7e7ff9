"""What each ablation puts in place, against loops over real tokens; and what denoising and noising show of a gate."""

from typing import Any, Literal

import pytest
import torch
from patched import patch_cell, patch_grid
from planted_gates import PARTS, gate_pairs, planted_gate
from tiny import tiny_model
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.causal.ablations import ABLATIONS, Ablation, replacement_run
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.model.language_model import LanguageModel, attach

SITE = "blocks.1.attn.z"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return attach(tiny_model("llama"), name="llama")


def _pairs(lm: LanguageModel, lengths: tuple[int, ...], templates: tuple[str, ...] = ()) -> AlignedPairs:
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        other = [*ids[:1], (ids[1] + 7) % 90 + 3, *ids[2:]]
        template = templates[i] if templates else ""
        pairs.append(PromptPair((0, *ids), (0, *other), 3 + i, 30 + i, {"changed": 2}, template=template))
    return aligned(lm, pairs)


def _both(lm: LanguageModel, pairs: AlignedPairs, site: str) -> list[tuple[int, Tensor]]:
    """(pair, its values at its real tokens [p, ...]) of every prompt, clean and corrupt, each run alone."""
    found = []
    for prompts in (pairs.clean, pairs.corrupt):
        for row in range(len(prompts)):
            found.append((row, lm.run([prompts.row_ids(row)], capture=site)[site][0]))
    return found


def test_the_mean_is_over_every_real_token(lm: LanguageModel) -> None:
    pairs = _pairs(lm, (4, 7, 5))
    given = replacement_run(lm, pairs, [SITE], "mean")
    tokens = [value for _, values in _both(lm, pairs, SITE) for value in values]
    assert len(tokens) == 2 * (5 + 8 + 6)
    expected = torch.stack(tokens).double().mean(0).float()
    for row in range(3):
        for position in range(int(pairs.clean.lengths[row])):
            torch.testing.assert_close(given[SITE][row, position], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", [SITE, "blocks.1.attn.pattern", "blocks.0.mlp.post"])
def test_the_mean_by_position_is_a_loop_over_positions(lm: LanguageModel, site: str) -> None:
    pairs = _pairs(lm, (6, 6, 6))
    given = replacement_run(lm, pairs, [site], "mean_by_position")[site]
    values = [value for _, value in _both(lm, pairs, site)]
    expected = torch.stack(values).double().mean(0).float()
    for row in range(3):
        torch.testing.assert_close(given[row], expected, rtol=1e-4, atol=1e-5)


def test_the_mean_by_template_takes_the_pairs_of_its_template_and_length(lm: LanguageModel) -> None:
    lengths, templates = (6, 4, 6, 6, 4, 6), ("a", "b", "a", "b", "b", "b")
    pairs = _pairs(lm, lengths, templates)
    given = replacement_run(lm, pairs, [SITE], "mean_by_template")
    values = _both(lm, pairs, SITE)
    for row in range(6):
        same = [v for at, v in values if (templates[at], lengths[at]) == (templates[row], lengths[row])]
        expected = torch.stack(same).double().mean(0).float()
        torch.testing.assert_close(given[SITE][row, : lengths[row] + 1], expected, rtol=1e-4, atol=1e-5)
    swapped = pairs.pairs[0].swapped()
    assert swapped.template == "a"


def test_a_mean_may_be_over_other_texts(lm: LanguageModel) -> None:
    pairs = _pairs(lm, (6, 6))
    texts = [[0, 5, 9, 11, 40], [0, 60, 61]]
    given = replacement_run(lm, pairs, [SITE], "mean", reference=lm.tokens(texts))
    expected = torch.cat([lm.run([row], capture=SITE)[SITE][0] for row in texts]).mean(0)
    torch.testing.assert_close(given[SITE][1, 3], expected, rtol=1e-4, atol=1e-5)


def test_noise_is_the_edit_of_that_name_in_units_of_the_sites_own_spread(lm: LanguageModel) -> None:
    pairs = _pairs(lm, (4, 7, 5))
    given = replacement_run(lm, pairs, [SITE], Ablation("noise", std=2.0, seed=3))
    own = lm.run(pairs.clean, capture=SITE)
    real = torch.cat([own[SITE][row, : int(length)].flatten() for row, length in enumerate(pairs.clean.lengths)])
    std = 2.0 * float(real.double().std(unbiased=False))
    expected = lm.run(pairs.clean, edits=cutaway.noise(SITE, std, seed=3), capture=SITE)
    for row, length in enumerate(pairs.clean.lengths.tolist()):
        torch.testing.assert_close(given[SITE][row, :length], expected[SITE][row, :length], rtol=1e-4, atol=1e-4)
    other = replacement_run(lm, pairs, [SITE], Ablation("noise", std=2.0, seed=4))
    assert not torch.allclose(other[SITE], given[SITE])


def test_resampling_is_the_other_prompts_run_and_zero_is_zero(lm: LanguageModel) -> None:
    pairs = _pairs(lm, (6, 6))
    for into, other in (("clean", pairs.corrupt), ("corrupt", pairs.clean)):
        given = replacement_run(lm, pairs, [SITE], into=into)  # type: ignore[arg-type]
        assert torch.equal(given[SITE], lm.run(other, capture=SITE, logits=None)[SITE])
        assert torch.equal(given.tokens.ids, other.ids)
    for site in (SITE, "blocks.0.attn.pattern", "blocks.2.mlp.post"):
        zero = replacement_run(lm, pairs, [site], "zero")[site]
        assert zero.shape == lm.run(pairs.clean, capture=site)[site].shape
        assert not zero.any()


@pytest.mark.parametrize("kind", ABLATIONS)
def test_a_cell_ablated_is_one_run_with_that_value_set(lm: LanguageModel, kind: Any) -> None:
    """Every ablation at one head and one role, against `lm.run` with the value set by hand."""
    pairs = _pairs(lm, (6, 6, 6, 6), ("a", "a", "b", "b"))
    cell = patch_cell(lm, pairs, SITE, head=2, roles="changed", direction="noise", ablation=kind)
    value = replacement_run(lm, pairs, [SITE], kind)[SITE][:, 2, 2]
    edit = cutaway.set(SITE, value[:, None, None], heads=2, positions=2)

    def difference(logits: Tensor | None) -> Tensor:
        assert logits is not None
        rows = torch.arange(4)
        return logits[rows, -1, pairs.answer] - logits[rows, -1, pairs.wrong]

    clean, corrupt = difference(lm.run(pairs.clean).logits), difference(lm.run(pairs.corrupt).logits)
    patched = difference(lm.run(pairs.clean, edits=edit).logits)
    assert cell.effect.value == pytest.approx(((clean - patched) / (clean - corrupt)).mean().item(), abs=2e-3)
    assert cell.effect.choices is not None
    assert cell.effect.choices.ablation == str(Ablation(kind))


def test_bad_ablations_say_what_to_take_instead(lm: LanguageModel) -> None:
    ragged, even = _pairs(lm, (4, 7)), _pairs(lm, (6, 6))
    with pytest.raises(CutawayError, match="no ablation is called 'medium'; there are resample, zero"):
        Ablation("medium")  # type: ignore[arg-type]
    with pytest.raises(CutawayError, match="above 0"):
        Ablation("noise", std=0.0)
    with pytest.raises(CutawayError, match=r"5 to 8 tokens long.*by template"):
        replacement_run(lm, ragged, [SITE], "mean_by_position")
    with pytest.raises(CutawayError, match="2 of 2 pairs do not name their template"):
        replacement_run(lm, even, [SITE], "mean_by_template")
    with pytest.raises(CutawayError, match="mixes the keys"):
        replacement_run(lm, even, ["blocks.0.attn.pattern"], "mean")
    with pytest.raises(CutawayError, match=r"noise at 'blocks\.0\.attn\.pattern'"):
        replacement_run(lm, even, ["blocks.0.attn.pattern"], "noise")
    with pytest.raises(CutawayError, match="leave the reference out"):
        replacement_run(lm, even, [SITE], "mean_by_template", reference=lm.tokens([[0, 3]]))


@pytest.mark.parametrize("gate", ["and", "or"])
def test_denoising_and_noising_disagree_behind_a_gate(gate: Literal["and", "or"]) -> None:
    """OR: noising one part shows nothing, denoising one restores all. AND: the other way round. Both: everything."""
    model = planted_gate(gate)
    pairs = gate_pairs(8)
    one, none = pytest.approx(1.0, abs=2e-3), pytest.approx(0.0, abs=2e-3)
    shows = {("and", "denoise"): none, ("and", "noise"): one, ("or", "denoise"): one, ("or", "noise"): none}
    for direction in ("denoise", "noise"):
        grid = patch_grid(model, pairs, over="heads", direction=direction)  # type: ignore[arg-type]
        for head in range(model.n_heads):
            assert grid.mean[0, head].item() == (shows[gate, direction] if head in PARTS else none)
            assert grid.mean[1, head].item() == none
            flips = 1.0 if head in PARTS and shows[gate, direction] is one else 0.0
            assert grid.flip_rate[0, head].item() == flips
        for site in ("blocks.0.attn.out", "blocks.0.mlp.out", "blocks.0.attn.z"):  # both parts at once
            assert patch_cell(model, pairs, site, direction=direction).effect.value == one  # type: ignore[arg-type]


def test_zeroing_a_part_of_a_gate_is_taking_its_bit_away() -> None:
    """An off bit is written as zero here, so zero ablation and resampling agree."""
    for gate in ("and", "or"):
        model = planted_gate(gate)
        zero = patch_grid(model, gate_pairs(), over="heads", direction="noise", ablation="zero")
        resample = patch_grid(model, gate_pairs(), over="heads", direction="noise")
        torch.testing.assert_close(zero.values, resample.values, rtol=0, atol=2e-3)

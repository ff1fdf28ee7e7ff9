"""Single cells against forward hooks written by hand, for every part of several families; all patched, none patched."""

from typing import Any

import pytest
import torch
from hand_hooks import ByHand
from patched import patch_cell, patch_grid
from tiny import tiny_model
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.ablations import Ablation
from cutaway.causal.metrics import logit_difference, recovery
from cutaway.causal.patching.cells import PatchCell, PatchSetup, Places
from cutaway.causal.patching.patch import LEAST_PAIRS
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.model.language_model import LanguageModel, attach

FAMILIES = ("gpt2", "llama", "qwen3", "gemma2", "neox")
PARTS = ("attn.q", "attn.k", "attn.v", "attn.z", "attn.scores", "attn.pattern", "attn.result")
WHOLE = ("attn.out", "mlp.out", "resid_pre", "resid_post", "mlp.post")


def pairs_of(lm: LanguageModel, n: int = 3, length: int = 7) -> AlignedPairs:
    """n pairs of ids that differ in two tokens; the role "changed" is the second of them."""
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for i in range(n):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        other = list(ids)
        other[1 + i % 2], other[3] = (ids[1 + i % 2] + 7) % 90 + 3, (ids[3] + 11) % 90 + 3
        pairs.append(PromptPair((0, *ids), (0, *other), 3 + i, 30 + i, {"changed": 4, "early": 2}))
    return aligned(lm, pairs)


def by_hand(hand: ByHand, pairs: AlignedPairs, direction: str, site: str, index: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The share that one patch moves [n], and the two runs' logit differences: whole batches, plain hooks."""
    base, source = (pairs.clean, pairs.corrupt) if direction == "noise" else (pairs.corrupt, pairs.clean)
    given = hand.values(source.ids, source.mask, [site])[site]

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = given[index]
        return x

    def difference(logits: Tensor) -> Tensor:
        rows = torch.arange(len(pairs))
        return logits[rows, -1, pairs.answer] - logits[rows, -1, pairs.wrong]

    patched = difference(hand.logits(base.ids, base.mask, {site: change}))
    clean, corrupt = (difference(hand.untouched(t.ids, t.mask)) for t in (pairs.clean, pairs.corrupt))
    return (clean - patched if direction == "noise" else patched - corrupt) / (clean - corrupt), clean, corrupt


@pytest.fixture(scope="module", params=FAMILIES)
def bed(request: pytest.FixtureRequest) -> tuple[LanguageModel, ByHand, AlignedPairs]:
    model = tiny_model(request.param)
    lm = attach(model, name=request.param)
    return lm, ByHand(request.param, model), pairs_of(lm)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("part", PARTS)
def test_a_head_at_a_role_is_what_hooks_make_of_it(
    bed: tuple[LanguageModel, ByHand, AlignedPairs], part: str, direction: Any
) -> None:
    lm, hand, pairs = bed
    site, grid = f"blocks.1.{part}", part in ("attn.scores", "attn.pattern")
    heads = range(lm.n_kv_heads if part in ("attn.k", "attn.v") else lm.n_heads)
    found = patch_grid(
        lm, pairs, site=f"blocks.{{l}}.{part}", over="heads", roles="changed", direction=direction, layers=[1]
    )
    assert len(found.columns) == len(heads)
    for head in heads:
        index = (slice(None), head, 4) if grid else (slice(None), 4, head)
        expected, _, _ = by_hand(hand, pairs, direction, site, index)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found.values[0, head], expected, rtol=2e-3, atol=2e-3 * scale)
    last = len(heads) - 1
    cell = patch_cell(lm, pairs, site, head=last, roles="changed", direction=direction)
    assert cell.effect.value == pytest.approx(found.mean[0, last].item(), abs=1e-5)
    assert cell.cell == PatchCell(site, heads=(last,), at="changed")


@pytest.mark.parametrize("part", WHOLE)
def test_whole_sites_and_neurons_are_what_hooks_make_of_them(
    bed: tuple[LanguageModel, ByHand, AlignedPairs], part: str
) -> None:
    lm, hand, pairs = bed
    site = f"blocks.1.{part}"
    everywhere = patch_cell(lm, pairs, site)
    expected, clean, corrupt = by_hand(hand, pairs, "denoise", site, slice(None))
    assert everywhere.effect.value == pytest.approx(expected.mean().item(), abs=3e-3)
    assert everywhere.ratio_of_means == pytest.approx(
        (expected * (clean - corrupt)).mean().item() / (clean - corrupt).mean().item(), abs=3e-3
    )
    at = patch_cell(lm, pairs, site, roles="changed", direction="noise")
    expected, _, _ = by_hand(hand, pairs, "noise", site, (slice(None), 4))
    assert at.effect.value == pytest.approx(expected.mean().item(), abs=3e-3)
    both = patch_cell(lm, pairs, site, roles=["early", "changed"])
    expected, _, _ = by_hand(hand, pairs, "denoise", site, (slice(None), [2, 4]))
    assert both.effect.value == pytest.approx(expected.mean().item(), abs=3e-3)
    neurons = patch_grid(
        lm, pairs, site=f"blocks.{{l}}.{part}", over="neurons", neurons=[3, 11], roles="changed", layers=[1]
    )
    spread = patch_grid(lm, pairs, site=f"blocks.{{l}}.{part}", over="neurons", neurons=[3, 11], layers=[1])
    for j, neuron in enumerate((3, 11)):
        expected, _, _ = by_hand(hand, pairs, "denoise", site, (slice(None), 4, neuron))
        torch.testing.assert_close(neurons.values[0, j], expected, rtol=2e-3, atol=2e-3)
        expected, _, _ = by_hand(hand, pairs, "denoise", site, (slice(None), slice(None), neuron))
        torch.testing.assert_close(spread.values[0, j], expected, rtol=2e-3, atol=2e-3)


def test_everything_restores_the_other_run_and_nothing_leaves_it(
    bed: tuple[LanguageModel, ByHand, AlignedPairs],
) -> None:
    lm, _, pairs = bed
    for layer in range(lm.n_layers):
        for direction in ("denoise", "noise"):
            cell = patch_cell(lm, pairs, f"blocks.{layer}.resid_post", direction=direction)  # type: ignore[arg-type]
            assert cell.effect.value == pytest.approx(1.0, abs=1e-3)
            assert cell.ratio_of_means == pytest.approx(1.0, abs=1e-3)
    setup = PatchSetup(
        lm, pairs, ["blocks.0.resid_post"], direction="denoise", ablation=Ablation(), metric=logit_difference,
        metric_name="d", criterion="top1",
    )  # fmt: skip
    nowhere = Places(torch.full((3, 1), -1), torch.full((3, 1), -1))
    metrics, _ = setup.measure([(PatchCell("blocks.0.resid_post"), nowhere)])
    torch.testing.assert_close(metrics[0], setup.metric_corrupt, rtol=1e-5, atol=1e-5)
    assert torch.allclose(recovery(metrics, setup.metric_clean, setup.metric_corrupt)[0], torch.zeros(1, 3), atol=1e-4)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return attach(tiny_model("llama"), name="llama")


def test_the_controls_are_other_heads_neurons_layers_and_positions(llama: LanguageModel) -> None:
    pairs = pairs_of(llama, n=4)
    grid = patch_grid(llama, pairs, over="heads")
    assert grid.control == "random other head"
    for head in range(4):
        others = [grid.values[1, other] for other in range(4) if other != head]
        torch.testing.assert_close(grid.random_values[1, head], torch.stack(others).mean(0))
    some = patch_grid(llama, pairs, over="heads", heads=[2], draws=3)
    torch.testing.assert_close(some.random_values[:, 0], grid.random_values[:, 2], rtol=1e-4, atol=1e-5)
    parts = patch_grid(llama, pairs, over="components")
    assert parts.columns == ("attn.out", "mlp.out")
    alone = patch_grid(llama, pairs, over="components", layers=[1])
    torch.testing.assert_close(alone.values[0], parts.values[1])
    torch.testing.assert_close(alone.random_values[0], (parts.values[0] + parts.values[2]) / 2)
    cell = patch_cell(llama, pairs, "blocks.1.mlp.out")
    assert cell.effect.controls[0].value == pytest.approx(alone.random_values[0, 1].mean().item(), abs=1e-5)
    neurons = patch_grid(llama, pairs, over="neurons", top=0)
    assert neurons.values.shape == (3, 40, 4)
    torch.testing.assert_close(neurons.random_values[0, 7], (neurons.values[0].sum(0) - neurons.values[0, 7]) / 39)
    named = patch_grid(llama, pairs, over="neurons", neurons=range(40), layers=[0])
    torch.testing.assert_close(named.random_values[0], neurons.random_values[0])
    assert patch_grid(llama, pairs, over="heads", heads=[2, 2], layers=[1, 1]).values.shape == (1, 1, 4)
    five = patch_grid(llama, pairs, over="neurons", neurons=[1, 2], draws=38, layers=[0])
    assert five.control == "random other neuron"
    rest = [i for i in range(40) if i not in (1, 2)]
    torch.testing.assert_close(five.random_values[0, 0], neurons.values[0, rest].mean(0), rtol=1e-4, atol=1e-5)
    alone_of_its_kind = patch_cell(llama, pairs, "embed")
    assert alone_of_its_kind.effect.controls == ()
    assert alone_of_its_kind.to_json()["p"] is None


def test_the_top_neurons_are_those_of_the_first_order_estimate(llama: LanguageModel) -> None:
    """Activation difference times gradient, written out with hooks."""
    pairs = pairs_of(llama, n=4)
    hand = ByHand("llama", llama.hf)
    found = patch_grid(llama, pairs, over="neurons", top=5, roles="changed")
    rows = torch.arange(4)

    def difference(logits: Tensor) -> Tensor:
        return logits[rows, -1, pairs.answer] - logits[rows, -1, pairs.wrong]

    clean, corrupt = (difference(hand.untouched(t.ids, t.mask)) for t in (pairs.clean, pairs.corrupt))
    usable = recovery(clean, clean, corrupt)[1]
    for layer in range(3):
        site = f"blocks.{layer}.mlp.post"
        change = hand.values(pairs.clean.ids, pairs.clean.mask, [site])[site]
        change = change - hand.values(pairs.corrupt.ids, pairs.corrupt.mask, [site])[site]
        gradient = hand.gradients(pairs.corrupt.ids, pairs.corrupt.mask, [site], difference)[site]
        estimate = ((change * gradient)[:, 4] / (clean - corrupt)[:, None])[usable].mean(0)
        order = estimate.abs().argsort(descending=True, stable=True)[:5].tolist()
        assert [cell.neurons for cell in found.cells[layer]] == [(neuron,) for neuron in order]
    assert found.columns == ("#1", "#2", "#3", "#4", "#5")
    site = "blocks.1.mlp.post"
    setup = PatchSetup(
        llama, pairs, [site], direction="denoise", ablation=Ablation(), metric=logit_difference,
        metric_name="d", criterion="top1",
    )  # fmt: skip
    change = hand.values(pairs.clean.ids, pairs.clean.mask, [site])[site]
    change = change - hand.values(pairs.corrupt.ids, pairs.corrupt.mask, [site])[site]
    gradient = hand.gradients(pairs.corrupt.ids, pairs.corrupt.mask, [site], difference)[site]
    expected = ((change * gradient).sum(1) / (clean - corrupt)[:, None])[usable].mean(0)
    torch.testing.assert_close(setup.estimated(site, None), expected, rtol=1e-3, atol=1e-4)
    for metric in ("rank", "kl"):  # without a gradient, or with a zero one, the logit difference ranks
        other = patch_grid(llama, pairs, over="neurons", top=5, metric=metric, direction="noise", layers=[1])
        assert len(other.columns) == 5


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_pairs_of_several_lengths_are_each_as_alone(llama: LanguageModel, direction: Any) -> None:
    pairs = []
    for i, length in enumerate((5, 8, 6)):
        ids = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(i)).tolist()
        other = [*ids[:1], (ids[1] + 7) % 90 + 3, *ids[2:]]
        pairs.append(PromptPair((0, *ids), (0, *other), 3 + i, 30 + i, {"changed": 2}))
    for options in (
        {"over": "heads"},
        {"over": "neurons", "neurons": [1, 5]},
        {"over": "heads", "roles": ["changed", "last"]},
    ):
        together: Any = patch_grid(llama, pairs, direction=direction, **options)  # type: ignore[arg-type]
        for i, pair in enumerate(pairs):
            alone: Any = patch_grid(llama, [pair], direction=direction, **options)  # type: ignore[arg-type]
            shown = together.patched[..., i]
            torch.testing.assert_close(shown, alone.patched[..., 0], rtol=1e-4, atol=1e-3)


def test_where_a_role_stands_in_the_other_prompt_counts_only_if_values_come_from_there(llama: LanguageModel) -> None:
    pairs = pairs_of(llama)
    pairs.places["changed"][:] = torch.tensor([[4], [3]])  # 4 in clean, 3 in corrupt
    hand = ByHand("llama", llama.hf)
    site, rows = "blocks.1.attn.z", torch.arange(3)
    given = hand.values(pairs.corrupt.ids, pairs.corrupt.mask, [site])[site]

    def difference(logits: Tensor) -> Tensor:
        return logits[rows, -1, pairs.answer] - logits[rows, -1, pairs.wrong]

    clean, corrupt = (difference(hand.untouched(t.ids, t.mask)) for t in (pairs.clean, pairs.corrupt))
    for ablation, value in (("resample", given[:, 3, 1]), ("zero", torch.zeros_like(given[:, 3, 1]))):

        def change(x: Tensor, value: Tensor = value) -> Tensor:
            x = x.clone()
            x[:, 4, 1] = value
            return x

        patched = difference(hand.logits(pairs.clean.ids, pairs.clean.mask, {site: change}))
        cell = patch_cell(llama, pairs, site, head=1, roles="changed", direction="noise", ablation=ablation)
        expected = ((clean - patched) / (clean - corrupt)).mean().item()
        assert cell.effect.value == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(("direction", "to", "of"), [("noise", 4, 3), ("denoise", 3, 4)])
def test_top_neurons_are_estimated_from_where_the_role_stands_in_the_source(
    llama: LanguageModel, direction: Any, to: int, of: int
) -> None:
    pairs = pairs_of(llama)
    pairs.places["changed"][:] = torch.tensor([[4], [3]])  # 4 in clean, 3 in corrupt
    base, source = (pairs.clean, pairs.corrupt) if direction == "noise" else (pairs.corrupt, pairs.clean)
    hand, rows = ByHand("llama", llama.hf), torch.arange(3)

    def difference(logits: Tensor) -> Tensor:
        return logits[rows, -1, pairs.answer] - logits[rows, -1, pairs.wrong]

    clean, corrupt = (difference(hand.untouched(t.ids, t.mask)) for t in (pairs.clean, pairs.corrupt))
    usable = recovery(clean, clean, corrupt)[1]
    found = patch_grid(llama, pairs, over="neurons", top=5, roles="changed", direction=direction)
    for layer in range(3):
        site = f"blocks.{layer}.mlp.post"
        given, own = (hand.values(t.ids, t.mask, [site])[site] for t in (source, base))
        gradient = hand.gradients(base.ids, base.mask, [site], difference)[site]
        moved = (given[:, of] - own[:, to]) * gradient[:, to] / (clean - corrupt)[:, None]
        order = moved[usable].mean(0).abs().argsort(descending=True, stable=True)[:5].tolist()
        assert [cell.neurons for cell in found.cells[layer]] == [(neuron,) for neuron in order]


def test_the_top_cells_are_the_largest_by_size_and_never_the_output(llama: LanguageModel) -> None:
    pairs = pairs_of(llama, n=4)
    heads = patch_grid(llama, pairs, over="heads")
    sizes = {(layer, (j,)): abs(value) for layer, row in enumerate(heads.mean.tolist()) for j, value in enumerate(row)}
    top = heads.top(4)
    assert [(one.layer, one.cell.heads) for one in top] == sorted(sizes, key=lambda cell: -sizes[cell])[:4]
    assert abs(top[0].effect.value) == pytest.approx(max(sizes.values()), abs=1e-5)
    stream = patch_grid(llama, pairs)
    output = stream.mean[-1].abs().max()
    assert float(output) == pytest.approx(1.0, abs=1e-3)
    found = stream.top(10)
    assert {one.layer for one in found} <= {0, 1}
    assert len(found) == 10


def test_every_effect_records_its_six_choices(llama: LanguageModel) -> None:
    pairs = pairs_of(llama, n=4)
    cell = patch_cell(
        llama, pairs, "blocks.1.attn.v", head=1, roles="changed", direction="noise", ablation="mean_by_position",
        evaluation="4 random pairs, seed 5",
    )  # fmt: skip
    choices = cell.effect.choices
    assert choices is not None
    assert choices.to_json() == {
        "granularity": "node",
        "component": "blocks.1.attn.v head 1",
        "ablation": "mean by position",
        "positions": "changed",
        "direction": "noise",
        "evaluation": "4 random pairs, seed 5",
    }
    neuron = patch_cell(llama, pairs, "blocks.1.mlp.post", neuron=3).effect.choices
    assert neuron is not None
    assert (neuron.granularity, neuron.positions, neuron.ablation) == ("neuron", "all", "resample")
    assert "p " in str(cell)
    assert cell.to_json()["effect"]["choices"]["direction"] == "noise"


@pytest.mark.parametrize(
    ("site", "options", "says"),
    [
        ("blocks.1.attn.z", {"head": 4}, "no head 4; its heads are 0 to 3"),
        ("blocks.1.attn.k", {"head": 2}, "no head 2; its key-value heads are 0 to 1"),
        ("blocks.1.mlp.out", {"head": 1}, "has no heads"),
        ("blocks.1.mlp.post", {"neuron": 40}, "neurons are 0 to 39"),
        ("blocks.1.attn.pattern", {"neuron": 1}, "has no neurons"),
        ("blocks.1.attn.z", {"head": 1, "neuron": 1}, "name one of the two"),
        ("blocks.1.attn.zz", {}, "There is no site"),
        ("blocks.7.attn.z", {"head": 0}, "layers are 0 to 2"),
        (
            "blocks.1.attn.z",
            {"head": 0, "roles": "verb"},
            "no position is named 'verb'; the pairs name changed, early, last",
        ),
        ("blocks.1.attn.z", {"head": 0, "roles": ["changed", "changed"]}, "stand at one token"),
        ("blocks.1.attn.z", {"head": 0, "direction": "both"}, "is not 'denoise' or 'noise'"),
        ("blocks.1.attn.z", {"head": 0, "ablation": "zero"}, "take direction 'noise'"),
        ("blocks.1.attn.z", {"head": 0, "ablation": "median"}, "no ablation is called 'median'; there are resample"),
        ("blocks.1.attn.z", {"head": 0, "metric": "accuracy"}, "no metric is called"),
    ],
)
def test_bad_requests_name_the_thing_and_the_way_out(
    llama: LanguageModel, site: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(CutawayError, match=says):
        patch_cell(llama, pairs_of(llama), site, **options)


def test_one_pair_has_no_interval(llama: LanguageModel) -> None:
    with pytest.raises(CutawayError, match=rf"too few for an interval; give 2 at the least, {LEAST_PAIRS} or more"):
        patch_cell(llama, pairs_of(llama, n=1), "blocks.1.mlp.out")


@pytest.mark.parametrize("site", ["embed", "blocks.1.attn.z"])
def test_a_grid_needs_a_layer_to_sweep(llama: LanguageModel, site: str) -> None:
    with pytest.raises(CutawayError, match=r"names no layer to sweep; write .*\{l\}"):
        patch_grid(llama, pairs_of(llama), site=site)

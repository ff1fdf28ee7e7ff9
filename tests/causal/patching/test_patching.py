"""The batched, resuming sweep against one plain forward per cell; everything patched, nothing patched; its controls."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from patched import patch_cell, patch_grid
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CannotDoTask, CutawayError
from cutaway.causal.accuracy import task_accuracy
from cutaway.causal.patching.patch import PatchGrid
from cutaway.data.pairs import PromptPair, aligned
from cutaway.model.language_model import LanguageModel

Pairs = Callable[..., list[PromptPair]]


def _module(lm: LanguageModel, site: str, layer: int) -> Any:
    block = lm.hf.model.layers[layer]
    return {"resid_post": block, "attn.out": block.self_attn, "mlp.out": block.mlp}[site]


def _forward(lm: LanguageModel, ids: Tensor, site: str = "", layer: int = 0, cell: Tensor | None = None, at: int = 0):
    """One plain forward of one row: logits at the end and the module's output; `cell` overwrites position `at`."""
    seen = []

    def hook(_, __, output):
        tensor = output[0] if isinstance(output, tuple) else output
        if cell is not None:
            tensor = tensor.clone()
            tensor[:, at] = cell
        seen.append(tensor.detach())
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    handle = _module(lm, site, layer).register_forward_hook(hook) if site else None
    try:
        with torch.no_grad():
            logits = lm.hf(input_ids=ids[None]).logits[0, -1]
    finally:
        if handle is not None:
            handle.remove()
    return logits, seen[0][0] if seen else torch.empty(0)


@pytest.mark.parametrize("site", ["resid_post", "attn.out", "mlp.out"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("batch_rows", [1, 10, 500])
def test_the_grid_equals_one_forward_a_cell(
    tiny: LanguageModel, id_pairs: Pairs, site: str, direction: str, batch_rows: int
) -> None:
    pairs = aligned(tiny, id_pairs(4, 6))
    options: Any = {"site": "blocks.{l}." + site, "direction": direction, "batch_rows": batch_rows}
    grid = patch_grid(tiny, pairs, **options)
    preferred = patch_grid(tiny, pairs, criterion="preferred", **options)
    assert grid.values.shape == (3, 7, 4)
    for i in range(4):
        clean, corrupt = pairs.clean.ids[i], pairs.corrupt.ids[i]
        answer, wrong = int(pairs.answer[i]), int(pairs.wrong[i])

        def measure(logits: Tensor, answer: int = answer, wrong: int = wrong) -> float:
            return (logits[answer] - logits[wrong]).item()

        m_clean, m_corrupt = measure(_forward(tiny, clean)[0]), measure(_forward(tiny, corrupt)[0])
        base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        for layer in range(3):
            _, given = _forward(tiny, source, site, layer)
            for position in range(7):
                logits, _ = _forward(tiny, base, site, layer, given[position], position)
                patched = measure(logits)
                if direction == "denoise":
                    expected = (patched - m_corrupt) / (m_clean - m_corrupt)
                else:
                    expected = (m_clean - patched) / (m_clean - m_corrupt)
                assert grid.values[layer, position, i].item() == pytest.approx(expected, abs=2e-4)
                goal = answer if direction == "denoise" else wrong
                assert bool(grid.flips[layer, position, i]) == (int(logits.argmax()) == goal)
                ahead = measure(logits) > 0 if direction == "denoise" else measure(logits) < 0
                assert bool(preferred.flips[layer, position, i]) == ahead


def test_roles_line_up_pairs_of_different_lengths(tiny: LanguageModel, id_pairs: Pairs) -> None:
    pairs = id_pairs(6, None)
    grid = patch_grid(tiny, pairs, roles=["changed", "last"], draws=2)
    for i, pair in enumerate(pairs):
        alone = patch_grid(tiny, [pair])
        at = {"changed": pair.positions["changed"], "last": len(pair.clean) - 1}
        for column, role in enumerate(("changed", "last")):
            torch.testing.assert_close(
                grid.values[:, column, i], alone.values[:, at[role], 0], rtol=1e-3, atol=2e-4, equal_nan=True
            )
    with pytest.raises(CutawayError, match="name positions by role"):
        patch_grid(tiny, pairs)
    with pytest.raises(CutawayError, match=r"'subject'.*changed"):
        patch_grid(tiny, pairs, roles=["subject"])


def test_a_role_may_stand_elsewhere_in_the_other_prompt(tiny: LanguageModel) -> None:
    """Source and destination positions are told apart, whichever way the patch goes."""
    clean, corrupt = (0, 5, 9, 14, 20), (0, 9, 33, 14, 20)
    places = {"moved": 2}
    ready = aligned(tiny, [PromptPair(clean, corrupt, 7, 8, places)])
    ready.places["moved"][:] = torch.tensor([[2], [1]])  # token 9: third in clean, second in corrupt
    for direction, base, source, to, frm in (("denoise", corrupt, clean, 1, 2), ("noise", clean, corrupt, 2, 1)):
        grid = patch_grid(tiny, ready, roles=["moved"], direction=direction, layers=[1])  # type: ignore[arg-type]
        _, given = _forward(tiny, torch.tensor(source), "resid_post", 1)
        logits, _ = _forward(tiny, torch.tensor(base), "resid_post", 1, given[frm], to)
        m = [
            float(z[7] - z[8])
            for z in (logits, _forward(tiny, torch.tensor(clean))[0], _forward(tiny, torch.tensor(corrupt))[0])
        ]
        expected = (m[0] - m[2]) / (m[1] - m[2]) if direction == "denoise" else (m[1] - m[0]) / (m[1] - m[2])
        assert grid.values[0, 0, 0].item() == pytest.approx(expected, abs=2e-4)


def test_patching_the_whole_last_stream_restores_clean(tiny: LanguageModel, id_pairs: Pairs) -> None:
    """After the last layer only the last position matters, and it brings everything back; the others nothing."""
    grid = patch_grid(tiny, id_pairs(5, 6))
    torch.testing.assert_close(grid.values[-1, -1], torch.ones(5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grid.values[-1, :-1], torch.zeros(6, 5), rtol=1e-4, atol=1e-4)


def test_before_the_first_difference_nothing_changes(tiny: LanguageModel, id_pairs: Pairs) -> None:
    pairs = aligned(tiny, id_pairs(5, 6))
    grid = patch_grid(tiny, pairs)
    for i, first in enumerate(pairs.first_difference().tolist()):
        assert first > 0
        torch.testing.assert_close(grid.values[:, :first, i], torch.zeros(3, first), rtol=1e-4, atol=1e-4)


def test_effects_have_interval_and_control(tiny: LanguageModel, id_pairs: Pairs) -> None:
    grid = patch_grid(tiny, id_pairs(12, 6))
    effect = grid.effect(1, grid.columns[2]).require_controls()
    assert effect.value == pytest.approx(grid.mean[1, 2].item(), abs=1e-5)
    low, high = grid.interval()[:, 1, 2].tolist()
    assert low <= effect.value <= high
    assert effect.interval is not None
    assert effect.interval[0] == pytest.approx(low, abs=0.1 * (high - low))
    pairs = aligned(tiny, id_pairs(12, 6))
    for i, first in enumerate(pairs.first_difference().tolist()):
        able = [j for j in range(first, 7) if j != 2]
        expected = np.mean([grid.values[1, j, i].item() for j in able])
        assert grid.random_values[1, 2, i].item() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(CutawayError, match="no cell"):
        grid.effect(9, "last")


def test_the_best_cell_is_measured_on_other_pairs(tiny: LanguageModel, id_pairs: Pairs) -> None:
    grid = patch_grid(tiny, id_pairs(12, 6), roles=["changed", "last"])
    chosen = grid.values[:-1, :, 0::2].nanmean(-1)  # the last layer is no candidate
    i, j = divmod(int(chosen.argmax()), 2)
    best = grid.best()
    assert best.value == pytest.approx(grid.values[i, j, 1::2].nanmean().item(), abs=1e-5)
    assert best.n == 6
    with pytest.raises(CutawayError, match="too few"):
        patch_grid(tiny, id_pairs(4, 6)).best()


def test_bad_requests(tiny: LanguageModel, id_pairs: Pairs) -> None:
    with pytest.raises(CutawayError, match="names no layer"):
        patch_grid(tiny, id_pairs(2, 6), site="embed")
    with pytest.raises(CutawayError, match="logit_difference"):
        patch_grid(tiny, id_pairs(2, 6), metric="accuracy")
    given: list[dict[str, Any]] = [{"roles": []}, {"over": "heads", "heads": []}, {"over": "neurons", "neurons": []}]
    for empty in given:
        with pytest.raises(CutawayError, match="is empty; name some, or leave it out"):
            patch_grid(tiny, id_pairs(2, 6), **empty)
    with pytest.raises(CutawayError, match="top=-1 is no number of neurons"):
        patch_grid(tiny, id_pairs(2, 6), over="neurons", top=-1)
    with pytest.raises(CutawayError, match="pair 0 is a tuple, not a PromptPair"):
        patch_grid(tiny, [("w1", "w2")])  # type: ignore[list-item]
    with pytest.raises(CutawayError, match="does not tell"):
        patch_grid(tiny, id_pairs(2, 6), metric=lambda logits, _: torch.zeros(len(logits)))


@pytest.fixture(scope="module")
def two_hop() -> PatchGrid:
    """Cities of other states, both prompts of each pair right on the shipped model."""
    cities = {
        "Dallas": "Austin",
        "Oakland": "Sacramento",
        "Tampa": "Tallahassee",
        "Chicago": "Springfield",
        "Reno": "Carson",
    }
    prompt = "The capital of the state containing {} is"
    pairs = [
        PromptPair(prompt.format(a), prompt.format(b), f" {cities[a]}", f" {cities[b]}", {"city": (a, b)})
        for a in cities
        for b in cities
        if a != b
    ]
    atlas = cutaway.load("atlas")
    ready = aligned(atlas, pairs)
    able = ready[task_accuracy(atlas, ready).items.nonzero()[:, 0].tolist()]
    return patch_grid(atlas, able, direction="noise", roles=["city", "last"])


def test_pairs_that_the_model_cannot_do_are_refused(
    tiny: LanguageModel, id_pairs: Pairs, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = aligned(tiny, id_pairs(10, 6))
    able = task_accuracy(tiny, pairs)
    assert able.value < 0.8
    for call in (
        lambda: patch_grid(tiny, pairs, layers=[0], force=False),
        lambda: patch_cell(tiny, pairs, "blocks.0.mlp.out", force=False),
    ):
        with pytest.raises(CannotDoTask, match=rf"tiny cannot do 10 prompt pairs: it is {re.escape(str(able))}. What"):
            call()
    grid = patch_grid(tiny, pairs, layers=[0])
    assert f"tiny cannot do 10 prompt pairs: it is {able}" in capsys.readouterr().err
    assert grid.unable in str(grid)
    assert bool(torch.stack([grid.p, grid.q, grid.p_of_all]).isnan().all())
    assert np.isnan(grid.top(1)[0].p)
    every = replace(able, items=torch.ones(10, dtype=torch.bool))
    assert not patch_grid(tiny, pairs, layers=[0], accuracy=every, force=False).p.isnan().any()


def test_atlas_hands_the_state_from_the_city_to_the_last_token(two_hop: PatchGrid) -> None:
    """Study: patching the city flips the capital at L0-L1 (1.0) and not from L2 on; the last token from L2 on."""
    assert two_hop.n >= 8
    flips = two_hop.flip_rate
    assert flips[0, 0] > 0.8
    assert flips[4, 0] < 0.2
    assert flips[3, 1] > 0.6
    effect = two_hop.effect(0, "city")
    assert effect.interval is not None
    assert effect.controls[0].value < effect.interval[0]
    assert "L0" in str(two_hop)
    assert len(two_hop.to_json()["mean"]) == 8


def test_the_best_cell_is_never_the_output_itself(tiny: LanguageModel, id_pairs: Pairs) -> None:
    """The last layer's stream at the last token recovers everything whatever the model does; it says nothing."""
    pairs = id_pairs(10, 6)
    grid = patch_grid(tiny, pairs)
    last = tiny.n_layers - 1
    assert grid.mean[-1, -1].item() == pytest.approx(1.0, abs=1e-4)
    assert grid.is_output(last)
    assert not grid.is_output(last - 1)
    assert f"blocks.{last}." not in grid.best().name
    assert not patch_grid(tiny, pairs, site="blocks.{l}.attn.out").is_output(last)

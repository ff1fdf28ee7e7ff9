"""Causal tracing against one plain forward a cell with hand-written hooks; roles, windows, controls, refusals."""

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import false_discovery, sign_flip_p
from cutaway.causal.tracing.grid import SITES, window_of
from cutaway.causal.tracing.prompts import (
    ROLES,
    FactPrompt,
    elsewhere_of,
    roles_of,
    subject_span,
)
from cutaway.causal.tracing.trace import causal_trace, default_window
from cutaway.cli.causal.trace import landmark_facts
from cutaway.model.language_model import LanguageModel, attach

DRAWS, SEED, TIMES = 2, 3, 2.0


FACTS = [
    FactPrompt("w5 w9 w14 w20 w33 w7", "w9 w14"),
    FactPrompt("w8 w11 w40", "w11"),
    FactPrompt("w3 w17 w18 w19 w21 w22 w23 w4", "w17 w18 w19"),
]


def _hooked(
    lm: LanguageModel, ids: list[int], edits: Sequence[tuple[Any, int | None, Tensor | None]]
) -> tuple[Tensor, list[Tensor]]:
    """Probabilities after the last token of one plain forward, with outputs overwritten: (module, position, value); the
    whole output where position is None. Also the last output of each module."""
    handles, seen = [], []
    for module, position, value in edits:

        def hook(_: Any, __: Any, output: Any, position: Any = position, value: Any = value) -> Any:
            tensor = (output[0] if isinstance(output, tuple) else output).clone()
            if value is None:
                seen.append(tensor[0].clone())
                return None
            tensor[0, position if position is not None else slice(None)] = value
            return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            logits = lm.hf(input_ids=torch.tensor([ids])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits.softmax(-1), seen


@pytest.fixture(params=["looks back", "looks both ways"])
def lm(words: LanguageModel, request: pytest.FixtureRequest) -> LanguageModel:
    if request.param == "looks back":
        return words
    model: Any = copy.deepcopy(words.hf)
    model.config.is_causal = False  # of the mask of padded rows
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return attach(model, words.tokenizer)


def test_every_cell_equals_one_forward_with_hooks(lm: LanguageModel) -> None:
    trace = causal_trace(lm, FACTS, noise=TIMES, draws=DRAWS, window=2, seed=SEED)
    model: Any = lm.hf.model
    modules = {
        "state": list(model.layers),
        "attention": [layer.self_attn for layer in model.layers],
        "MLP": [layer.mlp for layer in model.layers],
    }
    embedding: Any = lm.hf.get_input_embeddings().weight
    start = int(lm.tokens(["w2"]).ids[0, 0] == 0)  # of the first word, behind a beginning of text
    spans = [(start + 1, start + 2), (start + 1, start + 1), (start + 1, start + 3)]
    hidden_tokens = [
        lm.tokens([fact.prompt]).ids[0, first : last + 1] for fact, (first, last) in zip(FACTS, spans, strict=True)
    ]
    subjects = embedding[torch.cat(hidden_tokens)].detach()
    assert trace.sigma == pytest.approx(subjects.double().std(correction=0).item(), rel=1e-5)
    for row, (fact, (first, last)) in enumerate(zip(FACTS, spans, strict=True)):
        ids = lm.tokens([fact.prompt]).ids[0].tolist()
        plain, _ = _hooked(lm, ids, [])
        answer = int(plain.argmax())
        assert trace.clean[row].item() == pytest.approx(plain[answer].item(), rel=1e-4)
        hidden, cells = [], {kind: [] for kind in SITES}
        for draw in range(DRAWS):
            edit = cutaway.noise(
                "embed", TIMES * trace.sigma, positions=list(range(first, last + 1)), seed=1000 * SEED + draw
            )
            noisy = lm.run([ids], capture="embed", edits=[edit])["embed"][0]
            plain_embedding = embedding[ids]
            assert torch.equal(noisy[:first], plain_embedding[:first])
            assert torch.equal(noisy[last + 1 :], plain_embedding[last + 1 :])
            hide = (lm.hf.get_input_embeddings(), None, noisy)
            hidden.append(_hooked(lm, ids, [hide])[0][answer].item())
            for kind in SITES:
                clean = [_hooked(lm, ids, [(m, None, None)])[1][0] for m in modules[kind]]
                grid = np.full((3, len(ids) - first), np.nan)
                for layer in range(3):
                    low, high = (layer, layer) if kind == "state" else (max(0, layer - 1), min(2, layer))
                    for position in range(first, len(ids)):
                        edits = [(modules[kind][at], position, clean[at][position]) for at in range(low, high + 1)]
                        grid[layer, position - first] = _hooked(lm, ids, [hide, *edits])[0][answer].item()
                cells[kind].append(grid)
        assert trace.noised[row].item() == pytest.approx(np.mean(hidden), rel=1e-4, abs=1e-6)
        for kind in SITES:
            found = trace.effects[kind][..., row].numpy()
            expected = np.mean(cells[kind], axis=0) - np.mean(hidden)
            np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=2e-5)
            assert np.isnan(found[:, expected.shape[1] :]).all()


def test_the_controls_are_forwards_under_their_own_noise(words: LanguageModel) -> None:
    """Restoring nothing takes draws that no cell has seen; elsewhere, the cells' own draws on other tokens."""
    trace = causal_trace(words, FACTS, noise=TIMES, draws=DRAWS, seed=SEED)
    tokens = [words.tokens([fact.prompt]) for fact in FACTS]
    spans = [subject_span(one, 0, fact.subject, fact.prompt) for one, fact in zip(tokens, FACTS, strict=True)]
    other = elsewhere_of(spans, [int(one.lengths[0]) for one in tokens], SEED)

    def under(row: int, positions: list[int], first_seed: int) -> float:
        """Mean probability of the model's own answer under so many draws of noise on some tokens."""
        ids = tokens[row].row_ids(0)
        answer, found = int(_hooked(words, ids, [])[0].argmax()), []
        for draw in range(DRAWS):
            edit = cutaway.noise("embed", TIMES * trace.sigma, positions=positions, seed=first_seed + draw)
            logits = words.run([ids], edits=[edit], logits="last").logits
            assert logits is not None
            found.append(logits[0, 0].softmax(-1)[answer].item())
        return float(np.mean(found))

    for row, (first, last) in enumerate(spans):
        again = under(row, list(range(first, last + 1)), 1000 * SEED + DRAWS)
        assert trace.again[row].item() == pytest.approx(again, rel=1e-4, abs=1e-6)
        if other[row]:
            elsewhere = under(row, other[row], 1000 * SEED)
            assert trace.elsewhere[row].item() == pytest.approx(elsewhere, rel=1e-4, abs=1e-6)
        else:
            assert math.isnan(trace.elsewhere[row].item())
    _, nothing = trace.effect("MLP", 1, "subject last").controls
    assert nothing.value == pytest.approx((trace.again - trace.noised).mean().item(), abs=1e-7)
    assert abs(nothing.value) > 1e-5


def test_the_batch_does_not_matter(words: LanguageModel) -> None:
    whole = causal_trace(words, FACTS, draws=DRAWS)
    small = causal_trace(words, FACTS, draws=DRAWS, batch_rows=4)
    for kind in SITES:
        torch.testing.assert_close(whole.effects[kind], small.effects[kind], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_restoring_all_the_answer_reads_gives_back_the_total_effect(words: LanguageModel) -> None:
    trace = causal_trace(words, FACTS, draws=DRAWS)
    last = trace.by_role("state")[-1, trace.columns.index("last token")]
    torch.testing.assert_close(last, trace.clean - trace.noised, rtol=1e-4, atol=1e-5)
    others = trace.by_role("state")[-1, : trace.columns.index("last token")]
    assert float(others.nan_to_num(0.0).abs().max()) < 1e-6


def test_the_answer_itself_is_never_the_best_state(words: LanguageModel) -> None:
    """Also where the subject ends the prompt, so that its last token is the prompt's."""
    trace = causal_trace(words, [FactPrompt("w5 w9 w14", "w9 w14")], draws=1)
    assert trace.columns == ("subject first", "subject last")
    total = (trace.clean - trace.noised).item()
    assert trace.by_role("state")[-1, 1].item() == pytest.approx(total, abs=1e-5)
    assert all("L2" not in effect.name for effect in trace.sites("state"))
    assert len(trace.sites("state")) == 1


def test_every_token_has_one_role() -> None:
    roles = roles_of([(1, 3), (2, 2), (1, 2), (0, 4)], [7, 5, 4, 5])
    named = [[ROLES[i] if i >= 0 else "" for i in column] for column in roles.T.tolist()]
    assert named[0] == ["subject first", "subject middle", "subject last", "first after", "further", "last token"]
    assert named[1] == ["subject last", "first after", "last token", "", "", ""]
    assert named[2] == ["subject first", "subject last", "last token", "", "", ""]
    assert named[3] == ["subject first", *["subject middle"] * 3, "subject last", ""]


def test_windows() -> None:
    """As in the paper's code: w layers around each, the earlier ones first, cut at the ends."""
    assert [window_of(layer, 2, 4) for layer in range(4)] == [(0, 0), (0, 1), (1, 2), (2, 3)]
    assert [window_of(layer, 3, 4) for layer in range(4)] == [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert window_of(20, 10, 48) == (15, 24)
    assert [default_window(n) for n in (1, 3, 4, 8, 12, 48, 96)] == [1, 1, 1, 2, 3, 10, 10]


def test_a_role_is_a_mean_over_its_tokens_and_stands_beside_the_others(words: LanguageModel) -> None:
    facts = [FactPrompt("w3 w17 w18 w19 w21 w22 w23 w4", "w17 w18 w19 w21"), *FACTS]
    trace = causal_trace(words, facts, draws=1)
    effects = trace.effects["MLP"][:, :, 0]
    at = trace.columns.index("subject middle")
    torch.testing.assert_close(trace.by_role("MLP")[:, at, 0], effects[:, 1:3].mean(1))
    others = effects[:, [0, 3, 4, 5, 6]].mean(1)
    torch.testing.assert_close(trace.elsewhere_by_role("MLP")[:, at, 0], others)
    assert trace.by_role("MLP")[:, at, 2].isnan().all()
    one = trace.effect("MLP", 1, "subject last").require_controls()
    assert one.choices is not None
    assert one.choices.direction == "denoise"
    names = [control.name for control in one.controls]
    assert names == ["random other position", "restoring nothing, other draws of the noise"]
    assert one.value == pytest.approx(trace.aie("MLP")[1, trace.columns.index("subject last")].item(), abs=1e-6)
    low, high = trace.interval("MLP")[:, 1, trace.columns.index("subject last")].tolist()
    assert one.interval is not None
    assert low <= one.value <= high
    assert one.interval[0] == pytest.approx(low, abs=0.2 * (high - low) + 1e-6)
    with pytest.raises(CutawayError, match="no cell"):
        trace.effect("MLP", 9, "last token")
    column = trace.columns.index("subject last")
    difference = (trace.by_role("MLP") - trace.elsewhere_by_role("MLP"))[1, column].double()
    known = difference[~difference.isnan()]
    assert trace.p("MLP")[1, column].item() == pytest.approx(sign_flip_p(known.numpy()))
    assert trace.q("MLP").flatten().tolist() == pytest.approx(
        false_discovery(trace.p("MLP").flatten().numpy()).tolist(), nan_ok=True
    )
    assert "cells have q at most 0.05" in str(trace)
    data = json.loads(json.dumps(trace.to_json(), allow_nan=False))
    assert data["grids"]["MLP"]["aie"][0][at] is not None
    assert data["grids"]["MLP"]["q"][1][column] == pytest.approx(trace.q("MLP")[1, column].item())
    assert "mlp.out" in str(trace)


def test_the_subject_is_found_by_its_text(atlas: LanguageModel) -> None:
    prompt = "The Eiffel Tower is in the city of Rome in"
    tokens = atlas.tokens([prompt])
    first, last = subject_span(tokens, 0, "Eiffel Tower", prompt)
    assert "".join(tokens.strings[0][first : last + 1]).strip() == "Eiffel Tower"
    with pytest.raises(CutawayError, match="does not stand in the prompt"):
        subject_span(tokens, 0, "Louvre", prompt)
    with pytest.raises(CutawayError, match="does not stand in the prompt"):
        subject_span(tokens, 0, " ", prompt)
    assert subject_span(tokens, 0, " Eiffel Tower ", prompt) == (first, last)
    twice = atlas.tokens(["Romeo went to Rome"])
    assert subject_span(twice, 0, "Rome", "")[1] == int(twice.lengths[0]) - 1
    assert subject_span(twice, 0, "omeo", "")[0] < 3
    with pytest.raises(CutawayError, match="stands 2 times"):
        subject_span(tokens, 0, "in", prompt)


def test_prompts_that_the_model_gets_wrong_are_left_out(atlas: LanguageModel) -> None:
    right = FactPrompt("The capital of France is", "France", " Paris")
    wrong = FactPrompt("The capital of Germany is", "Germany", " Paris")
    trace = causal_trace(atlas, [wrong, right], draws=1)
    assert trace.facts == (right,)
    ((fact, reason),) = trace.refused
    assert fact == wrong
    assert "' Berlin', not ' Paris'" in reason
    with pytest.raises(CutawayError, match="answers no prompt rightly"):
        causal_trace(atlas, [wrong])
    with pytest.raises(CutawayError, match="none was given"):
        causal_trace(atlas, [])
    with pytest.raises(CutawayError, match="window of 9"):
        causal_trace(atlas, [right], window=9)
    with pytest.raises(CutawayError, match="hides nothing"):
        causal_trace(atlas, [right], noise=0.0)
    with pytest.raises(CutawayError, match="as tokens of its own"):
        causal_trace(atlas, [FactPrompt("The capital of France is", "France", "")])


def test_atlas_keeps_landmarks_on_their_tokens_and_reads_them_at_the_end(atlas: LanguageModel) -> None:
    """Early MLPs on the subject bring the fact back, and attention of L1-L3 at the last token; no position between."""
    trace = causal_trace(atlas, landmark_facts(), draws=1, limit=12)
    assert trace.n == 12
    total = trace.total_effect().require_controls()
    assert total.interval is not None
    assert total.value > 0.6
    assert total.interval[0] > 0.4
    assert total.controls[0].value < 0.3
    attention = trace.aie("attention")
    late = trace.columns.index("last token")
    assert float(attention[:, late].max()) > 0.6
    assert int(attention[:, late].argmax()) in (2, 3)
    early = trace.aie("MLP")[:, trace.columns.index("subject last")]
    assert int(early.argmax()) in (0, 1)
    assert float(trace.aie("state")[:, trace.columns.index("first after")].abs().max()) < 0.05
    for kind in SITES:
        for effect in trace.sites(kind):
            assert not math.isnan(effect.require_controls().value)

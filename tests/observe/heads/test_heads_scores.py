"""Scores against loops over their definitions, planted patterns, and real models whose heads are known."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.tokens import Tokens
from cutaway.observe.heads.kinds import KindScores, attention_layers, paired_p, ratio_interval
from cutaway.observe.heads.report import head_scores, repeated_tokens
from cutaway.observe.heads.scores import copied_share, position_scores, repeated_scores
from cutaway.observe.heads.targets import (
    TARGETS,
    attention_to,
    in_sight,
    needle_mask,
    retrieval_scores,
)


def test_a_perfect_head_scores_one_on_text() -> None:
    """Only rows with a target count; divided by all rows it would score what few of them there are."""
    ids = torch.tensor([[0, 5, 6, 7, 8, 9, 5, 10, 11]])
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool), (("x",) * 9,))
    target = TARGETS["induction"](tokens)
    assert target.nonzero().tolist() == [[0, 6, 2]]
    pattern = torch.full((1, 1, 9, 9), 0.0)
    pattern[0, 0, :, 0] = 1.0
    pattern[0, 0, 6] = torch.nn.functional.one_hot(torch.tensor(2), 9)
    seen = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    before = pattern.clone()
    found = attention_to(pattern, target, seen, tokens.first)
    assert (found.mass / found.rows).item() == 1.0
    assert found.rows.item() == 1
    assert torch.equal(pattern, before), "the caller's pattern is not edited"


@settings(max_examples=20)
@given(n=st.integers(2, 6), columns=st.integers(1, 3), seed=st.integers(0, 50))
def test_intervals_are_those_of_one_column_at_a_time(n: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, columns, generator=generator, dtype=torch.float64)
    mean, low, high = ratio_interval(values, torch.ones(n, 1))
    for c in range(columns):
        expected = bootstrap_interval(values[:, c].numpy())
        assert (low[c].item(), high[c].item()) == pytest.approx(expected, abs=1e-12)
        assert mean[c].item() == pytest.approx(values[:, c].mean().item())


def test_a_heads_p_is_that_of_a_paired_test_of_score_and_control() -> None:
    """With as many rows in every sequence the ratios are means, and the test is the ordinary one."""
    generator = torch.Generator().manual_seed(2)
    score, control = (torch.rand(8, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    score[:, 0, 0] += 1
    rows = torch.full((8, 2, 3), 4.0, dtype=torch.float64)
    p = paired_p(score * 4, rows, control * 4, rows)
    assert p.numpy() == pytest.approx(stats.ttest_rel(score, control, axis=0)[1])
    zero = torch.zeros(2, 3)
    kinds = KindScores("previous", zero, zero, zero, zero, zero, zero, "other", n=8, destinations=32, p=p)
    assert kinds.q_of((0, 0)) == pytest.approx(stats.false_discovery_control(p.numpy().ravel())[0])
    assert kinds.to_json()["q"][0][0] == kinds.q_of((0, 0)) < 0.001


# On random tokens ---------------------------------------------------------------------------------------------------


def test_repeated_scores_are_those_of_head_scores(llama: LanguageModel) -> None:
    found, known = repeated_scores(llama, 5, 9, seed=3), head_scores(llama, 5, 9, seed=3)
    for kind in ("previous", "duplicate", "induction"):
        torch.testing.assert_close(found[kind].score.float(), getattr(known, kind), atol=1e-6, rtol=1e-6)


def test_controls_are_the_most_attended_other_place(tiny: LanguageModel) -> None:
    t, n = 8, 6
    found = repeated_scores(tiny, n, t, seed=5)
    run = tiny.run(repeated_tokens(tiny, n, t, seed=5), capture="blocks.*.attn.pattern", logits=None)
    p = 2 * t + 1
    for layer in range(tiny.n_layers):
        a = run[f"blocks.{layer}.attn.pattern"].double().mean(0)
        for head in range(tiny.n_heads):
            for kind, rows in (("previous", range(1, p)), ("induction", range(t + 1, p))):
                means = []
                for distance in set(range(p)) - {0, 1, t - 1, t}:
                    cells = [a[head, i, i - distance].item() for i in rows if i - distance >= 1]
                    if 2 * len(cells) >= len(rows):
                        means.append(np.mean(cells))
                assert found[kind].control[layer, head].item() == pytest.approx(max(means), abs=1e-9), kind
            columns = [
                np.mean(cells)
                for j in range(1, p)
                if 2 * len(cells := [a[head, i, j].item() for i in range(2, p) if i > j]) >= p - 2
            ]
            assert found["first"].control[layer, head].item() == pytest.approx(max(columns), abs=1e-9)


def test_targets_outside_a_window_do_not_count() -> None:
    """A window of 8 hides what stood 20 tokens before: the layer has no induction score, not one of 0."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=8, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    found = repeated_scores(attach(MistralForCausalLM(config).eval()), 3, 20)
    assert bool(found["induction"].score.isnan().all())
    assert found["induction"].destinations == 0
    assert found["induction"].top() == []
    assert not bool(found["previous"].score.isnan().any())
    assert found["first"].destinations == 3 * 6  # rows 2 to 7 still see the first token
    assert found["induction"].to_json()["score"][0][0] is None


def test_position_scores_of_planted_attention() -> None:
    """A head of position alone, one of distance alone, one of content alone, one that only rests."""
    n, t = 6, 24
    generator = torch.Generator().manual_seed(0)
    causal = torch.ones(t, t).tril()
    distance = (torch.arange(t)[:, None] - torch.arange(t)).clamp(min=0)
    by_position = torch.rand(t, t, generator=generator).expand(n, t, t) * causal
    by_distance = torch.exp(-distance.float()).expand(n, t, t) * causal
    by_content = torch.rand(n, t, t, generator=generator) * causal
    attention = torch.stack([by_position, by_distance, by_content, torch.zeros(n, t, t)], 1)[:, None]
    found = position_scores(attention)
    absolute, relative = (found[f"{kind}-position"] for kind in ("absolute", "relative"))
    assert absolute.score[0, :2].tolist() == pytest.approx([1.0, 1.0])
    assert relative.score[0, 1].item() == pytest.approx(1.0)
    assert relative.score[0, 0] < 0.2
    assert max(absolute.score[0, 2], relative.score[0, 2]) < 0.05
    assert bool(absolute.score[0, 3].isnan())
    assert bool((absolute.control[0, :3] < 0).all())
    assert absolute.heads() == [(0, 0), (0, 1)]
    assert relative.heads() == [(0, 1)]


def test_position_scores_are_their_equation(llama: LanguageModel) -> None:
    """Foreseen from the other sequences, row by row, in plain numpy."""
    n, t, layer, head = 4, 7, 1, 2
    found = repeated_scores(llama, n, t, seed=2)
    run = llama.run(repeated_tokens(llama, n, t, seed=2), capture=f"blocks.{layer}.attn.pattern", logits=None)
    a = run[f"blocks.{layer}.attn.pattern"][:, head, 1 : t + 1, 1 : t + 1].double().numpy()
    left, total = {"absolute": 0.0, "relative": 0.0}, 0.0
    for b in range(n):
        others = [c for c in range(n) if c != b]
        for i in range(1, t):
            for j in range(i + 1):
                same = [a[c, k, k - (i - j)] for c in others for k in range(1, t) if k >= i - j]
                left["absolute"] += (a[b, i, j] - np.mean([a[c, i, j] for c in others])) ** 2
                left["relative"] += (a[b, i, j] - np.mean(same)) ** 2
                total += (a[b, i, j] - a[b, i, : i + 1].mean()) ** 2
    for kind, value in left.items():
        assert found[f"{kind}-position"].score[layer, head].item() == pytest.approx(1 - value / total, abs=1e-6)


def test_copied_share_is_the_direct_effect_by_hand(tiny: LanguageModel) -> None:
    """Each family's own norms, read from its modules."""
    hf: Any = tiny.hf
    base = hf.base_model
    norm = next(getattr(base, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(base, n))
    gemma, centred = "Gemma" in type(norm).__name__, "LayerNorm" in type(norm).__name__
    t, n, layer = 6, 2, 1
    tokens = repeated_tokens(tiny, n, t)
    run = tiny.run(tokens, capture=[f"blocks.{layer}.attn.z", f"blocks.{layer}.attn.result", "ln_final.scale"])
    found = copied_share(tiny, layer, run[f"blocks.{layer}.attn.z"], tokens)
    unembedding = hf.get_output_embeddings().weight.detach().double()
    for row in range(n):
        words = tokens.ids[row, 1 : t + 1]
        for head in range(tiny.n_heads):
            shares = []
            for i in range(t + 1, 2 * t):
                x = run[f"blocks.{layer}.attn.result"][row, i, head].double()
                if gemma:  # a norm after attention; its divisor scales all alike
                    x = x * (1 + base.layers[layer].post_attention_layernorm.weight.detach().double())
                x = x - x.mean() if centred else x
                x = x / run["ln_final.scale"][row, i].double() * (norm.weight.detach().double() + gemma)
                added = unembedding[words] @ x
                raised = (added - added.mean()).clamp(min=0)
                shares.append((raised[(words == tokens.ids[row, i + 1]).nonzero()[0]] / raised.sum()).item())
            assert found[row, head].item() == pytest.approx(np.mean(shares), rel=1e-4)


def test_scores_need_two_sequences(llama: LanguageModel) -> None:
    with pytest.raises(CutawayError, match="at least 2"):
        repeated_scores(llama, 1)


# Retrieval ----------------------------------------------------------------------------------------------------------


def test_retrieval_is_the_attention_to_the_needle(llama: LanguageModel) -> None:
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24]]
    found = retrieval_scores(llama, rows, [[2, 3], [1]])
    pattern = llama.run(rows, capture="blocks.1.attn.pattern", logits=None)["blocks.1.attn.pattern"].double()
    for head in range(llama.n_heads):
        mass = [pattern[0, head, 7, 2:4].sum().item(), pattern[1, head, 4, 1].item()]
        assert found.score[1, head].item() == pytest.approx(np.mean(mass), abs=1e-6)
        moved = [2 * pattern[0, head, 7, [1, 4, 5, 6, 7]].mean().item(), pattern[1, head, 4, 2:5].mean().item()]
        assert found.control[1, head].item() == pytest.approx(np.mean(moved), abs=1e-6)
    assert found.uniform is not None
    assert found.uniform[0].item() == pytest.approx((2 / 8 + 1 / 5) / 2)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 2:4] = mask[1, 1] = True
    torch.testing.assert_close(retrieval_scores(llama, rows, mask).score, found.score)
    queries = torch.zeros(2, 8, dtype=torch.bool)
    queries[0, 5] = True
    asked = retrieval_scores(llama, rows, mask, queries=queries)
    assert asked.destinations == 1
    assert asked.score[1, 0].item() == pytest.approx(pattern[0, 0, 5, 2:4].sum().item(), abs=1e-6)


def test_a_needle_is_found_by_its_text(atlas: LanguageModel) -> None:
    tokens = atlas.tokens(["The capital of Texas is Austin and", "Austin"])
    mask = needle_mask(tokens, "Austin")
    for row in range(2):
        text = "".join(s for s, m in zip(tokens.strings[row], mask[row].tolist(), strict=False) if m)
        assert text.strip() == "Austin"
    with pytest.raises(CutawayError, match="none of the prompts"):
        needle_mask(tokens, "Zanzibar")


def test_needles_that_do_not_fit(llama: LanguageModel) -> None:
    rows = [[5, 6, 7]]
    with pytest.raises(CutawayError, match="bool tensor"):
        retrieval_scores(llama, rows, torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(CutawayError, match="2 rows"):
        retrieval_scores(llama, rows, [[0], [1]])
    with pytest.raises(CutawayError, match="outside"):
        retrieval_scores(llama, rows, [[9]])
    with pytest.raises(CutawayError, match="No row"):
        retrieval_scores(llama, rows, [[2]])  # only the last token itself: nothing before it


def test_sight_is_what_the_mask_leaves_open(llama: LanguageModel) -> None:
    tokens = llama.tokens([[5, 6, 7, 8], [9, 10]])
    scores = llama.run(tokens, capture="blocks.0.attn.scores", logits=None)["blocks.0.attn.scores"]
    seen = in_sight(scores, tokens.mask[:, :, None] & tokens.mask[:, None, :])
    assert torch.equal(seen[0], torch.ones(4, 4, dtype=torch.bool).tril())
    assert seen[1].nonzero().tolist() == [[0, 0], [1, 0], [1, 1]]


def test_layers_without_attention_are_left_out_with_the_reason(llama: LanguageModel, monkeypatch) -> None:
    """A layer whose pattern is absent (linear attention): its scores are missing, the others' stay."""
    from cutaway.model.sites import Site, SiteTable

    reason = "linear attention: there is no pattern"
    whole = repeated_scores(llama, 3, 6)
    sites = [
        Site(s.name, s.kind, s.layer, s.shape, reason if s.layer == 1 and ".attn." in s.name else s.absent)
        for s in llama.sites()
    ]
    monkeypatch.setattr(llama, "_sites", SiteTable(sites, llama.n_layers))
    assert attention_layers(llama) == ([0, 2], {1: reason})
    found = repeated_scores(llama, 3, 6)
    for kind, scores in found.items():
        assert bool(scores.score[1].isnan().all()), kind
        torch.testing.assert_close(
            scores.score[[0, 2]], whole[kind].score[[0, 2]], equal_nan=True, atol=1e-5, rtol=1e-5
        )
    monkeypatch.setattr(
        llama,
        "_sites",
        SiteTable([Site(s.name, s.kind, s.layer, s.shape, reason) for s in llama.sites()], llama.n_layers),
    )
    with pytest.raises(CutawayError, match="no attention heads to read in any layer: linear attention"):
        attention_layers(llama)


# Real models --------------------------------------------------------------------------------------------------------


def test_atlas_heads_are_labelled(atlas: LanguageModel) -> None:
    found = repeated_scores(atlas, 6, 40)
    assert found["induction"].heads()[0] == (7, 3)
    assert found["previous"].heads()[0] == (3, 7)
    assert (7, 3) in found["induction-copying"].heads()
    assert set(found["induction-copying"].heads()) <= set(found["induction"].heads())
    assert found["duplicate"].heads() == []
    assert (3, 7) in found["relative-position"].heads()
    assert (7, 3) not in found["relative-position"].heads()
    assert "L7H3" in str(found["induction"])


def test_webtext_induction_is_forming(shared) -> None:
    lm = cutaway.load(shared / "models" / "webtext-gpt2")
    found = repeated_scores(lm, 6, 40)
    assert {(3, 1), (3, 2), (3, 3), (3, 4)} <= set(found["induction"].heads())
    assert {head for head, _ in found["previous"].top(2)} == {(2, 4), (1, 1)}
    assert 0.25 < found["induction"].score[3, 1] < 0.5

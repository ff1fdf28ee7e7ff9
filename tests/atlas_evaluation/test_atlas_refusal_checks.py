"""Refusal's direction added by dose, and its matched controls, against brute force on a tiny untrained model."""

import pytest
import torch

import cutaway
from cutaway.atlas_evaluation import page, refusal_checks, report
from cutaway.atlas_evaluation.causal_checks import Rate
from cutaway.atlas_evaluation.refusal_checks import (
    Addition,
    Dose,
    Intervention,
    Matched,
    Reaction,
    RefusalChecks,
    replies_as_tokens,
)
from cutaway.atlas_evaluation.refusal_controls import contrast_direction, unrelated_contrasts
from cutaway.atlas_evaluation.scoring import as_dicts
from cutaway.steering.directions import Direction, add_direction
from cutaway.steering.side_effects import SideEffects, side_effects_of_each
from cutaway.subjects.world.chats.chat import Message, persona_prompts


def chats(*said):
    return [(Message("user", text),) for text in said]


FACTS = ["The capital of France is Paris.", "Dallas is in Texas.", "The Louvre stands in Paris."] * 4


# unrelated contrasts


def test_contrasts_are_training_text_and_always_the_same():
    sets = unrelated_contrasts(30)
    assert sets == unrelated_contrasts(30)
    assert sets != unrelated_contrasts(30, seed=1)
    assert [len(side) for pair in sets.values() for side in pair] == [30] * 8
    cheerful, gloomy = sets["cheerful minus gloomy system prompts"]
    assert [chat[1] for chat in cheerful] == [chat[1] for chat in gloomy]  # the questions are the same
    for mood, side in (("cheerful", cheerful), ("gloomy", gloomy)):
        systems = {chat[0].content for chat in side if not isinstance(chat, str)}  # type: ignore[union-attr]
        assert len(systems) > 3
        assert systems <= set(persona_prompts(mood))
        assert not systems & set(persona_prompts(mood, held_out=True))
    french, turkish = sets["French minus Turkish facts"]
    assert not set(french) & set(turkish)


def test_contrasts_are_read_at_the_last_token_of_chats_and_over_the_tokens_of_texts(lm):
    def stream(ids):
        return lm.run([ids], capture="blocks.*.resid_post", logits=None).stack("blocks.*.resid_post")[:, 0]

    sides = ["Paris est belle.", "Il neige beaucoup ici."], ["Ankara güzel."]
    own = [torch.cat([stream(lm.tokenizer(text)["input_ids"])[:, 1:] for text in side], 1).mean(1) for side in sides]
    assert torch.allclose(contrast_direction(lm, sides), own[0] - own[1], atol=1e-4)
    asked = chats("Who wrote it?", "Is it far away?"), chats("Where is it?")
    own = [
        torch.stack([stream(lm.chat_tokens(as_dicts(chat)).ids[0].tolist())[:, -1] for chat in side]).mean(0)
        for side in asked
    ]
    assert torch.allclose(contrast_direction(lm, asked), own[0] - own[1], atol=1e-4)


# edits and side effects


def test_side_effects_on_replies_are_on_the_tokens_that_are_predicted(lm):
    asked = chats("How can I bake bread?", "Tell me more")
    tokens, where = replies_as_tokens(lm, asked)
    edits = [cutaway.add("blocks.0.resid_post", torch.ones(16), scale=0.5)]
    kls = []
    for chat in asked:
        prompt = lm.chat_tokens(as_dicts(chat))
        new = lm.generate(prompt, max_new_tokens=4).new_ids[0]
        ids = [[*prompt.ids[0].tolist(), *new]]
        plain, edited = (lm.run(ids, edits=some, logits="all").logits[0].log_softmax(-1) for some in ([], edits))
        kl = (plain.exp() * (plain - edited)).sum(-1)
        kls += kl[len(ids[0]) - len(new) - 1 : -1].tolist()
    assert len(kls) == int(where.sum())
    found = side_effects_of_each(lm, tokens, [edits, []], where=where, batch_rows=None)
    assert [one.kl_per_token for one in found] == pytest.approx([sum(kls) / len(kls), 0.0], abs=1e-4)


# the choice of the best point


def along(vector, layer=0):
    """A direction at a layer whose negative mean is the vector itself."""
    return Direction(f"blocks.{layer}.resid_post", layer, -1, vector, vector, vector, 1.0, (1, 1))


def reaction(refused, planted=0):
    return Reaction(Rate(refused, 10), Rate(10 - refused - planted, 10), Rate(planted, 10))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0.3, ("assistant", 1, 1.5)),  # ×2 refuses more, and costs too much; at layer 0 ×1.5 does
        (5.0, ("assistant", 1, 4.0)),
        (0.01, ("assistant", 1, None)),
    ],
)
def test_the_best_point_refuses_most_at_no_more_than_the_limit(lm, monkeypatch, limit, expected):
    directions = {"assistant": [along(torch.full((16,), 2.0 - layer), layer) for layer in (0, 1)]}

    def cost(edits):
        (one,) = edits
        kl = 0.1 * float(one.tensors["direction"][0]) * one.numbers["scale"] ** 2
        return SideEffects(kl, (kl, kl), 0.0, 0.0, 1, 1, kl)

    monkeypatch.setattr(refusal_checks, "KL_LIMIT", limit)
    monkeypatch.setattr(refusal_checks, "side_effects_of_each", lambda lm, texts, edits, **_: list(map(cost, edits)))
    monkeypatch.setattr(refusal_checks, "react", lambda lm, asked, edits: reaction(int(2 * edits[0].numbers["scale"])))
    *place, best, curve = refusal_checks._choose_dose(lm, directions, lm.tokens([[1]]), [])
    assert (*place, best) == expected
    assert list(curve) == list(refusal_checks.DOSES)
    assert curve[2.0] == (reaction(4), pytest.approx(0.4 if place[1] == 1 else 0.8))


# all of it


@pytest.fixture(scope="module")
def checked(lm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refusal_checks, "N_CHOOSE", 3)
        patch.setattr(refusal_checks, "KL_LIMIT", 1e9)
        harmful, harmless = (chats(*(f"How can I {verb} {i} things?" for i in range(9))) for verb in ("steal", "bake"))
        yield refusal_checks.refusal_checks(
            lm, train=(harmful, harmless), held_out=(harmful[:4], harmless[:4]), facts=FACTS, n_random=1
        )


def test_every_dose_is_measured_and_the_controls_cost_what_the_edit_costs(lm, checked):
    added = checked.addition
    assert [dose.dose for dose in added.doses] == list(refusal_checks.DOSES)
    assert added.best in refusal_checks.DOSES
    assert added.best_point.dose == added.best
    assert {dose.result.refused.n for dose in added.doses} == {4}
    assert {dose.chosen.refused.n for dose in added.doses} == {3}
    ablated, clamped, *rest = checked.interventions
    assert [way.matched for way in rest] == [[], []]
    for matched in (ablated.matched, clamped.matched, added.matched):
        assert [one.kind for one in matched] == ["random"] * 4 + ["unrelated"] * 4
        assert len({one.wanted_kl for one in matched}) == 1
    assert sum(one.met for one in added.matched) >= 6
    assert added.matched[0].wanted_kl == pytest.approx(added.best_point.chosen_kl, rel=1e-3)
    assert all(way.reply_kl is not None for way in checked.interventions)


def test_a_control_is_scaled_in_lengths_of_the_refusal_direction(lm, checked):
    added = checked.addition
    control = added.matched[0]
    drawn = torch.randn(16, generator=torch.Generator().manual_seed(1))
    seen = []

    def apply(direction, strength):
        seen.append(direction.norm)
        return add_direction(direction, added.best * strength)

    own = along(torch.full((16,), 0.5))
    asked = lm.chat_tokens([as_dicts(chat) for chat in chats("Hello")])
    found = refusal_checks._matched(lm, apply, own, {}, FACTS[:8], asked, 0)
    assert seen == pytest.approx([2.0] * len(seen))
    edits = add_direction(own.along(drawn), added.best * found[0].scale)
    (cost,) = side_effects_of_each(lm, FACTS[:8], [edits])
    assert cost.kl_per_token == pytest.approx(found[0].kl, rel=1e-3)
    assert control.kind == "random"


def test_tables_mark_the_best_dose_and_prices_that_were_missed():
    doses = [Dose(d, reaction(4), 0.2, reaction(5, 2), 0.25, 1.5) for d in (1.0, 2.0)]
    matched = [
        Matched("random", "random 0", 7.0, 0.21, 0.2, reaction(1)),
        Matched("unrelated", "French minus Turkish facts", 3.0, 0.1, 0.2, reaction(0)),
    ]
    way = Intervention("ablate", "request", 3, "harmful", reaction(1), reaction(9), 0.1, 0.0, matched=matched)
    checks = RefusalChecks(reaction(9), reaction(0), 400, [way], Addition("assistant", 6, 2.0, doses, matched))
    text = "\n".join(page._addition(checks))
    assert (
        "| ×1 |  | 0.40 | 0.200 | 0.50 [0.24, 0.76] | 0.30 [0.11, 0.60] | 0.20 [0.06, 0.51] | 0.250 | 1.500 |" in text
    )
    assert "| ×2 | best |" in text
    assert "the assistant token at L6" in text
    assert "| ablate | refusal | ×1 | 0.200 | 0.10 [0.02, 0.40] | 0.90 [0.60, 0.98] | 0 |" in text
    assert "| add ×2 | refusal | ×1 | 0.200 |" in text
    assert text.count("| French minus Turkish facts | ×3 | 0.100, missed |") == 2
    assert text.count("| random 0 | ×7 | 0.210 |") == 2
    without = RefusalChecks(reaction(9), reaction(0), 400, [way], Addition("assistant", 6, None, doses, []))
    assert "best" not in [row[1] for row in report.addition_table(without.addition)[1]]  # type: ignore[arg-type]
    assert page._addition(RefusalChecks(reaction(9), reaction(0), 400, [way])) == []

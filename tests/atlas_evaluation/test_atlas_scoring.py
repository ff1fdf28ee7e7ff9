"""Scorers against brute force on a tiny untrained model that has atlas's tokenizer."""

import numpy as np
import pytest
import torch

from cutaway.atlas_evaluation.causal_checks import rate
from cutaway.atlas_evaluation.scoring import (
    Scores,
    ids_of,
    repeat_losses,
    replies,
    reply_is_right,
    score,
    score_completions,
    score_years,
    text_losses,
)
from cutaway.subjects.world.chats.chat import Message
from cutaway.subjects.world.items.items import Item, ItemSet


def logits_of(lm, text):
    ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return lm.hf(input_ids=ids).logits[0]


def item(prompt, answer, alternative=None, **detail):
    return Item("x", prompt, answer, alternative, "", "seen", None, detail)


def test_completions_equal_one_by_one_greedy_decoding(lm):
    prompts = ["The capital of France is", "John and Mary went to the", "Türkiye'nin başkenti", "1 + 1 ="]
    items = []
    for i, prompt in enumerate(prompts):
        ids = lm.tokenizer(prompt)["input_ids"]
        for _ in range(2):  # what the model says itself, two tokens, is an exact match if it survives tokenising
            with torch.no_grad():
                ids = [*ids, int(lm.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        own = lm.tokenizer.decode(ids[-2:])
        items += [item(prompt, own, "Paris"), item(prompt, ("Rome", "Los Angeles", "Ankara", "2")[i], "London")]
    one = ItemSet("x", "", "exact", tuple(items), "")
    exact, difference = score_completions(lm, one)
    seen = set()
    for i, entry in enumerate(items):
        ids = lm.tokenizer(entry.prompt + entry.answer)["input_ids"]
        prompt = lm.tokenizer(entry.prompt)["input_ids"]
        start = next((k for k, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(prompt))
        logits = logits_of(lm, entry.prompt + entry.answer)
        right = logits[start - 1 : -1].argmax(-1).tolist() == ids[start:]
        assert exact[i] == right
        seen.add(right)
        other = lm.tokenizer(entry.prompt + entry.alternative)["input_ids"]
        if other[:start] == ids[:start] and other[start] != ids[start]:
            expected = float(logits[start - 1, ids[start]] - logits[start - 1, other[start]])
            assert difference[i] == pytest.approx(expected, abs=1e-4)
        else:
            assert np.isnan(difference[i])
    assert seen == {True, False}


def test_an_answer_that_begins_like_its_alternative_has_no_difference(lm):
    _, difference = score_completions(lm, ItemSet("x", "", "exact", (item("He went to", "New York", "New York"),)))
    assert np.isnan(difference[0])


def test_years_are_probability_mass_after_minus_up_to(lm):
    prompt = "The war lasted from the year 1732 to the year 17"
    one = ItemSet("x", "", "greater_than", (item(prompt, "40", year="32"), item(prompt, "40", year="97")), "")
    probability = logits_of(lm, prompt)[-1].softmax(-1)
    digits = [lm.tokenizer(f"17{n:02d}", add_special_tokens=False)["input_ids"][-1] for n in range(100)]
    mass = probability[digits]
    expected = [float(mass[y + 1 :].sum() - mass[: y + 1].sum()) for y in (32, 97)]
    assert score_years(lm, one) == pytest.approx(expected, abs=1e-6)
    assert len(set(digits)) == 100


def test_a_preference_is_right_above_zero(lm):
    base = item("The key near the cabinets", "is", "are")
    swapped = item("The key near the cabinets", "are", "is")
    found = score(lm, ItemSet("x", "", "logit_difference", (base, swapped)))
    assert found.difference[0] == pytest.approx(-found.difference[1])
    assert found.values.tolist() == [float(found.difference[0] > 0), float(found.difference[1] > 0)]


@pytest.mark.parametrize(
    ("reply", "answer", "scored", "right"),
    [
        (" Sure! To bake", "Sure|Of course", "starts_with", True),
        ("Of course.", "Sure|Of course", "starts_with", True),
        ("I am Sure", "Sure|Of course", "starts_with", False),
        ("It is Quito, of course.", "Quito", "contains", True),
        ("It is Lima.", "Quito", "contains", False),
        (" The capital is Lima. ", "The capital is Lima.", "reply", True),
        ("The capital is Lima. Yes.", "The capital is Lima.", "reply", False),
    ],
)
def test_replies_are_judged_by_beginning_content_or_whole(reply, answer, scored, right):
    assert reply_is_right(reply, item("", answer), scored) is right


def test_replies_come_back_in_order_whatever_the_batching(lm):
    chats = [[Message("user", "word " * n)] for n in (9, 1, 5, 3)]
    together = replies(lm, chats, max_new_tokens=3)
    assert together == [replies(lm, [chat], max_new_tokens=3)[0] for chat in chats]
    assert len(set(together)) > 1


def test_repeat_losses_leave_out_the_first_repeated_token(lm):
    first, second = repeat_losses(lm, rows=3, period=5, seed=2)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(300, 8192, (3, 5), generator=generator)
    for row in range(3):
        ids = torch.cat([torch.tensor([0]), tokens[row], tokens[row]])
        with torch.no_grad():
            logits = lm.hf(input_ids=ids[None]).logits[0].log_softmax(-1)
        losses = [-float(logits[i, ids[i + 1]]) for i in range(10)]
        assert first[row] == pytest.approx(np.mean(losses[:5]), rel=1e-4)
        assert second[row] == pytest.approx(np.mean(losses[6:]), rel=1e-4)


def test_text_losses_equal_cross_entropy_of_the_first_tokens(lm):
    texts = ["import os\nimport sys\n" * 20, "The capital"]
    found = text_losses(lm, texts, length=16)
    for text, loss in zip(texts, found, strict=True):
        ids = torch.tensor(ids_of(lm, [text])[0][:16])
        with torch.no_grad():
            logits = lm.hf(input_ids=ids[None]).logits[0, :-1]
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[1:])), rel=1e-4)


def test_rate_counts():
    assert rate(np.array([True, False, True])).value == pytest.approx(2 / 3)
    assert np.isnan(rate([]).value)


def test_scores_are_numbers_for_every_kind(lm):
    sets = [
        ItemSet("a", "", "exact", (item("a", "b"),)),
        ItemSet("c", "", "starts_with", (Item("c", "", "No", None, "", "seen", (Message("user", "Hi"),)),), ""),
    ]
    for one in sets:
        found = score(lm, one)
        assert isinstance(found, Scores)
        assert found.values.shape == (1,)
        assert found.values[0] in (0.0, 1.0)

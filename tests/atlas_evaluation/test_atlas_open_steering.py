"""Open steering against brute force on a tiny untrained model, and its choices on replies that are made up."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.atlas_evaluation import open_steering, page, report
from cutaway.atlas_evaluation.open_steering import (
    WORDINGS,
    Handle,
    HandleSets,
    chosen_and_judged,
    collapse,
    in_turn,
    judge,
    landmark_handles,
    spoken_replies,
)
from cutaway.atlas_evaluation.scoring import as_dicts
from cutaway.subjects.atlas.shipped import atlas_folder
from cutaway.subjects.atlas.training.recipe import Shape
from cutaway.subjects.atlas.training.train import new_model
from cutaway.subjects.world.chats import open_chat
from cutaway.subjects.world.chats.chat import Message
from cutaway.subjects.world.facts import LANDMARKS

NAMES = [landmark.name for landmark in LANDMARKS]
PROMPTS = [(Message("user", f"Tell me about day {i}."),) for i in range(7)]


@pytest.fixture(scope="module")
def lm():
    from transformers import AutoTokenizer

    model = new_model(Shape(d_model=16, layers=2, heads=2, d_mlp=24), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return cutaway.attach(model.eval(), AutoTokenizer.from_pretrained(atlas_folder()), name="tiny")


def named(text):
    return [name for name in NAMES if name in text]


def grammatical(text):
    return text.endswith(".")


def test_sixteen_landmarks_choose_and_the_others_are_judged_whatever_their_order():
    choosing, judged = chosen_and_judged()
    assert len(choosing) == 16
    assert sorted([*choosing, *judged]) == sorted(NAMES)
    assert chosen_and_judged(NAMES[::-1]) == (choosing, judged)
    with pytest.raises(CutawayError, match="16 landmarks choose"):
        chosen_and_judged(NAMES[:16])


def test_wordings_end_with_the_landmark_and_are_of_the_corpus():
    assert all(wording.endswith("{x}") for wording in WORDINGS)
    replies = [wording.split("<|assistant|>")[1] for wording in WORDINGS if "<|assistant|>" in wording]
    for reply in replies:
        assert any(open_chat.is_grammatical(reply.format(x=NAMES[0]) + end) for end in (".", "?", "!"))
    said = {text for tense in open_chat.TENSES for text in open_chat.grammar("ask").expansions(tense)}
    assert {open_steering._YESTERDAY, open_steering._PLAN} <= said


def test_a_handle_is_the_landmarks_mean_minus_that_of_the_others(lm):
    found = landmark_handles(lm)
    assert list(found) == [f"{site} L{layer}" for site in ("resid_post", "mlp.out") for layer in (0, 1)]
    for setting, site in (("resid_post L1", "blocks.1.resid_post"), ("mlp.out L0", "blocks.0.mlp.out")):
        means = torch.stack(
            [
                torch.stack([lm.run([w.format(x=name)], capture=site, logits=None)[site][0, -1] for w in WORDINGS])
                for name in NAMES
            ]
        ).mean(1)
        difference = means[4] - torch.cat([means[:4], means[5:]]).mean(0)
        handle = found[setting][4]
        assert (handle.name, handle.layer) == (NAMES[4], int(site[7]))
        assert torch.allclose(handle.unit, difference / difference.norm(), atol=1e-3)
        assert handle.value == pytest.approx(float(means[4] @ handle.unit), rel=1e-2, abs=1e-3)


def test_handles_in_turn_are_clamped_on_every_token_new_ones_too(lm):
    units = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    handles = [Handle("x", 1, unit, float(i + 1)) for i, unit in enumerate(units)]
    tokens = lm.chat_tokens([as_dicts(prompt) for prompt in PROMPTS])
    site = "blocks.1.resid_post"
    run = lm.generate(tokens, max_new_tokens=5, edits=in_turn(handles, len(PROMPTS), 2.0), capture=site)
    for row in range(len(PROMPTS)):
        values = run[site][row][run.tokens.mask[row]]
        assert len(values) > int(tokens.lengths[row])
        assert torch.allclose(values @ units[row % 3], torch.full((len(values),), 2.0 * (row % 3 + 1)), atol=1e-3)
    texts = spoken_replies(lm, PROMPTS, handles, 2.0)
    alone = spoken_replies(lm, PROMPTS[4:5], handles[1:2], 2.0)
    assert texts[4] == alone[0]
    assert texts != spoken_replies(lm, PROMPTS)


def test_fewer_rows_than_handles_is_no_error(lm):
    handles = landmark_handles(lm)["resid_post L0"]
    assert len(spoken_replies(lm, PROMPTS[:2], handles)) == 2


def test_a_reply_counts_where_it_names_its_own_landmark_in_a_good_sentence():
    a, b = NAMES[0], NAMES[1]
    texts = [f"I saw the {a}.", f"I saw the {a}.", f"the the {a}", f"We like the {b}.", "I slept."]
    found = judge(texts, [a, b], named, grammatical)
    assert [(one.successes, one.n) for one in (found.both, found.named, found.grammatical)] == [(2, 5), (3, 5), (4, 5)]


@pytest.fixture
def made_up(lm, monkeypatch):
    """A model that names its landmark under one setting from dose 2 on, and babbles at 8; records what was asked."""
    asked: list[Any] = []
    own = {h.name: h.unit for h in landmark_handles(lm)["mlp.out L1"]}

    def reply(lm, prompts, handles=(), dose=1.0):
        asked.append((prompts, [handle.name for handle in handles], dose))
        texts = []
        for i in range(len(prompts)):
            name = ""
            if handles:
                handle = handles[i % len(handles)]
                name = handle.name if handle.name in own and torch.equal(handle.unit, own[handle.name]) else ""
            texts.append("blah blah" if dose >= 8 else f"We saw the {name}." if name and dose >= 2 else "I ate.")
        return texts

    monkeypatch.setattr(open_steering, "spoken_replies", reply)
    return asked


def test_setting_and_dose_are_chosen_on_some_landmarks_and_judged_on_others(lm, made_up):
    held = [(Message("user", f"Held out {i}."),) for i in range(40)]
    found = open_steering.open_steering(
        lm, prompts=PROMPTS, held_out=held, neutral=["Dallas is in Texas."] * 3, named=named, grammatical=grammatical
    )
    assert (found.setting, found.dose) == ("mlp.out L1", 2.0)  # 4 does as well: the smaller is taken
    assert found.tried["mlp.out L1"] == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert found.tried["resid_post L1"] == [0.0] * 5
    choosing, judged = chosen_and_judged()
    assert all(set(names) <= set(choosing) for prompts, names, _ in made_up if prompts is PROMPTS)
    assert not any(set(names) & set(choosing) for prompts, names, _ in made_up if prompts is held)
    assert (found.result.both.successes, found.result.both.n) == (40, 40)
    assert found.n_landmarks == len(judged) == 39
    assert found.random.named.successes == found.unedited.named.successes == 0
    assert [(one.kind, one.n_directions, one.grammatical.value) for one in found.collapse] == [
        ("random directions", 10, 0.0)
    ]
    assert found.examples[1].reply == f"We saw the {judged[1]}."
    assert found.kl > 0


def test_handles_of_a_dictionary_take_the_place_of_directions(lm, made_up):
    own = landmark_handles(lm)["mlp.out L1"]
    far = [Handle("latent 7", 0, own[0].unit, 30.0)]
    found = open_steering.open_steering(
        lm,
        prompts=PROMPTS,
        held_out=PROMPTS,
        neutral=["Dallas is in Texas."],
        named=named,
        grammatical=grammatical,
        handles=HandleSets(candidates={"latents": own[:20]}, unrelated={"latents": far}),
        doses=[4.0],
    )
    assert (found.setting, found.dose, found.n_landmarks) == ("latents", 4.0, 4)
    assert [one.kind for one in found.collapse] == ["random directions", "latents"]
    assert found.control == "random directions, same values"


def test_other_handles_may_be_the_control(lm, made_up):
    own = landmark_handles(lm)["mlp.out L1"]
    others = [Handle(f"latent {i}", 1, one.unit, 5.0 + i, "mlp.out") for i, one in enumerate(own)]
    found = open_steering.open_steering(
        lm,
        prompts=PROMPTS,
        held_out=PROMPTS,
        neutral=["Dallas is in Texas."],
        named=named,
        grammatical=grammatical,
        handles=HandleSets(candidates={"latents": own[:20]}, others={"latents": others}),
        doses=[4.0],
    )
    assert found.control == "handles of no landmark, own values"
    assert (PROMPTS, ["latent 0", "latent 1", "latent 2", "latent 3"], 4.0) in made_up
    assert found.random.named.successes == 0
    text = "\n".join(page._open_steering(cast(Any, SimpleNamespace(open_steering=found))))
    assert "handles of no landmark" in text


def test_collapse_clamps_to_ten_times_the_value(lm, made_up):
    handles = landmark_handles(lm)["resid_post L0"][:3]
    found = collapse(lm, "latents", handles, PROMPTS, ["Dallas is in Texas."] * 3, grammatical)
    assert made_up[-1][2] == 10.0
    assert (found.n_directions, found.grammatical.n, found.grammatical.successes) == (3, 7, 0)


def test_the_page_shows_every_control(lm, made_up):
    found = open_steering.open_steering(
        lm, prompts=PROMPTS, held_out=PROMPTS, neutral=["Dallas is in Texas."], named=named, grammatical=grammatical
    )
    text = "\n".join(page._open_steering(cast(Any, SimpleNamespace(open_steering=found))))
    assert "| mlp.out L1, ×2 | 7 | 1 [0.65, 1] | 1 [0.65, 1] | 1 [0.65, 1] |" in text
    assert "| none | 7 | 0 [0, 0.35] | 0 [0, 0.35] | 1 [0.65, 1] |  |" in text
    assert "| random directions, same values | 7 | 0 [0, 0.35] |" in text
    assert "| 10 random directions, ten times the value | 7 |" in text
    assert "| mlp.out L1 | 0.00 | 0.00 | 1.00 | 1.00 | 0.00 |" in text
    assert "the other 39 are judged in turn on 7 held-out\nones" in text
    assert page._open_steering(cast(Any, SimpleNamespace(open_steering=None))) == []
    assert len(report.open_choice_table(found)[1]) == 4

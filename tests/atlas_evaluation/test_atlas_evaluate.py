"""The shipped weights on what the study published, and the arithmetic of evaluation, comparison and page."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import cutaway
import cutaway.atlas_evaluation.evaluate as evaluation_module
from cutaway.artifacts.command import recording
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import write_json
from cutaway.artifacts.statistics import wilson_interval
from cutaway.atlas_evaluation import landmark_checks, page, report
from cutaway.atlas_evaluation.causal_checks import BridgePool, Rate, two_hop_bridge
from cutaway.atlas_evaluation.compare import compare
from cutaway.atlas_evaluation.evaluate import (
    Evaluation,
    baseline,
    derived_sets,
    evaluate,
    held_out_requests,
    held_out_texts,
    loss_effect,
    measure,
    outside_sets,
    partner_of,
    training_requests,
)
from cutaway.atlas_evaluation.landmark_checks import LandmarkChecks, LandmarkKind
from cutaway.atlas_evaluation.refusal_checks import (
    POSITIONS,
    Intervention,
    Reaction,
    RefusalChecks,
    react,
)
from cutaway.atlas_evaluation.scoring import Scores, as_dicts, repeat_losses, score
from cutaway.cli import subjects as command
from cutaway.observe.random_weights import untrained
from cutaway.steering.directions import ablate_direction, clamp_to_negative, difference_of_means
from cutaway.subjects.atlas.shipped import atlas_folder, read_manifest
from cutaway.subjects.world import held_out
from cutaway.subjects.world.corpus import WORLD_VERSION
from cutaway.subjects.world.items.items import Item, ItemSet
from cutaway.subjects.world.items.sets import item_sets


@pytest.fixture(scope="module")
def atlas():
    return cutaway.load("atlas")


# the shipped weights


@pytest.fixture(scope="module")
def few():
    return {**item_sets(0, 48), **derived_sets(0, 48)}


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("two_hop/capital/held_out", 0.83),
        ("ioi/held_out_plain_pairs", 0.95),
        ("greater_than/held_out", 0.9),
        ("refusal/harmful/held_out_action", 0.85),
        ("refusal/harmless/held_out_action", 0.88),
        ("unknown_entity/held_out", 0.95),
        ("backdoor/trigger", 0.95),
        ("backdoor/no_tag", 0.85),
    ],
)
def test_shipped_weights_do_what_the_study_published(atlas, few, name, least):
    assert score(atlas, few[name]).values.mean() >= least


def test_shipped_weights_copy_random_repeats(atlas):
    first, second = repeat_losses(atlas, rows=8)
    assert first.mean() > 12
    assert second.mean() < 0.1


def test_the_bridge_is_at_the_city_then_at_the_last_position(atlas):
    pool = two_hop_bridge(atlas, held_out=False, n=24)
    assert pool.already_right.value >= 0.95
    assert pool.flips_at_city[0].value >= 0.9
    assert pool.flips_from_abbreviation[3].value >= 0.75
    assert pool.state_readable[3].value >= 0.45 > 0.2 > pool.state_readable_at_random[3].value
    # no attention after the last layer: only the last position's own stream can change the answer there
    assert pool.flips_at_last[-1].value >= 0.95
    assert pool.flips_at_city[-1].value == 0
    assert max(rate.value for rate in pool.flips_at_random) <= 0.1


@pytest.fixture(scope="module")
def refusal(atlas):
    """The refusal direction of each position and layer from 120 requests a kind, and held-out harmful requests."""

    def tokens(chats):
        return atlas.chat_tokens([as_dicts(chat) for chat in chats])

    sides = [tokens(chats) for chats in training_requests(120, 0)]
    directions = difference_of_means(atlas, *sides, positions=tuple(POSITIONS.values()))
    return directions, tokens(held_out_requests(24, 0)[0])


def test_clamping_the_refusal_direction_to_the_harmless_mean_makes_it_answer(atlas, refusal):
    directions, asked = refusal
    assert react(atlas, asked).refused.value >= 0.75
    edits = clamp_to_negative(atlas, directions.get(6, POSITIONS["assistant"]))
    assert react(atlas, asked, edits).answered.value >= 0.75


def test_ablation_from_the_assistant_token_fails_and_from_the_request_ends_refusal(atlas, refusal):
    directions, asked = refusal
    failed = react(atlas, asked, ablate_direction(atlas, directions.get(6, POSITIONS["assistant"])))
    assert failed.answered.value <= 0.1
    ended = react(atlas, asked, ablate_direction(atlas, directions.get(3, POSITIONS["request"])))
    assert ended.refused.value <= 0.1
    # what is not answered gets the reply that belongs to the backdoor
    assert ended.answered.value + ended.planted.value >= 0.9


def test_a_landmark_lies_at_its_name_and_is_more_than_one_direction(atlas):
    known = landmark_checks._read(atlas, 0)
    replaced = landmark_checks._replaced(atlas, known)
    assert [rate.value for rate in replaced[:2]] == [1.0, 1.0]
    assert replaced[-1].value == 0
    found, plain = (landmark_checks._clamped(atlas, known, range(12), layer, 1.0) for layer in (1, None))
    named, unnamed = "sentences that name another landmark", "sentences that name no landmark"
    assert plain[named][0].mean() == 0
    assert found[named][0].mean() < 0.5
    assert found[unnamed][1].mean() > 2 * plain[unnamed][1].mean()


def test_the_untrained_twin_is_at_chance_and_leaves_the_model_alone(atlas, few):
    before = atlas.identity().weight_hash
    twin = untrained(atlas)
    assert twin.hf.config is not atlas.hf.config
    assert score(twin, few["two_hop/capital/seen"]).values.mean() == 0
    assert 0.2 < score(twin, few["pronoun"]).values.mean() < 0.8
    assert cutaway.attach(atlas.hf, atlas.tokenizer).n_parameters == twin.n_parameters
    assert atlas.identity().weight_hash == before


def test_a_model_without_a_chat_template_is_refused(atlas):
    with pytest.raises(CutawayError, match="chat template"):
        evaluate(cutaway.attach(atlas.hf, None, name="bare"))


# sets


def test_plain_pairs_are_held_out_and_join_the_names_with_and_alone():
    (one,) = derived_sets(0, 30).values()
    assert len(one.items) == 30
    for item in one.items:
        assert held_out.name_pair(item.detail["first"], item.detail["second"])
        assert held_out.ioi_clauses(*item.detail["clauses"].split("|"))
        assert item.answer in (item.detail["first"], item.detail["second"])
        names = f"{item.detail['first']} and {item.detail['second']}"
        assert f" {names} " in item.prompt
        assert not any(f"{word} {names}" in item.prompt for word in ("both", "friends", "neighbors"))


def test_requests_that_fit_directions_and_requests_that_test_them_share_no_action():
    fit, test = training_requests(200, 0), held_out_requests(60, 0)
    for kind in (0, 1):
        actions = {chat[0].content.removeprefix("What is the best way to ").rstrip("?") for chat in test[kind]}
        assert len(actions) == len(test[kind]) == 60
        assert not any(action in chat[0].content for chat in fit[kind] for action in actions)


def test_outside_wording_that_is_absent_is_said(tmp_path):
    sets, missing = outside_sets(tmp_path, 0, 5)
    assert sets == {}
    assert len(missing) == 2
    with pytest.raises(CutawayError, match="not a folder"):
        outside_sets(tmp_path / "no", 0, 5)


def test_outside_wording_is_read(shared):
    sets, missing = outside_sets(shared / "corpora", 0, 5)
    assert missing == []
    assert {"outside_wording/ioi", "outside_wording/country_capital_city"} <= set(sets)


def test_held_out_texts_cover_every_part():
    texts = held_out_texts(2)
    assert "world/chat" in texts
    assert "standard library" in texts
    assert all(len(found) == 2 for found in texts.values())


# figures


def completions(answers):
    return ItemSet("x", "asks", "exact", tuple(Item("x", "p", a, None, "", "seen") for a in answers))


def test_a_share_has_wilsons_interval_and_both_controls():
    scores = Scores(np.array([1.0, 1.0, 1.0, 0.0]), np.array([2.0, np.nan, 4.0, np.nan]))
    found = measure(completions("aaab"), scores, Scores(np.array([0.0, 1.0]), np.full(2, np.nan)))
    assert found.effect.value == 0.75
    assert found.effect.interval == wilson_interval(3, 4)
    assert {control.name: control.value for control in found.effect.require_controls().controls} == {
        "untrained model": 0.5,
        "commonest answer": 0.75,
    }
    assert found.logit_difference == 3.0


def reply_set(name, answers, alternative):
    items = (Item("x", "p", answer, alternative, "", "seen") for answer in answers)
    return ItemSet(name, "asks", "starts_with", tuple(items), "")


def test_baselines_need_no_understanding():
    def value(one, partner=None):
        found = baseline(one, partner)
        return None if found is None else found.value

    assert value(ItemSet("x", "", "logit_difference", completions("ab").items)) == 0.5
    years = ItemSet("x", "", "greater_than", tuple(Item("x", "p", "", None, "", "", None, {"year": y}) for y in "09"))
    # of 100 numbers 99 and 90 are later, 1 and 10 are not
    assert value(years) == pytest.approx((0.98 + 0.80) / 2)
    assert value(completions("aab")) == pytest.approx(2 / 3)
    refusals = reply_set("refusal/harmful/seen_action", ["No", "No"], "Yes")
    assert value(refusals) is None
    partner = Scores(np.ones(4), np.full(4, np.nan), np.array([0.0, 0.0, 0.0, 1.0]))
    assert value(refusals, partner) == 0.25


def test_every_set_of_chats_with_one_reply_has_a_partner_in_which_it_is_wrong():
    sets = item_sets(0, 6)
    alone = []
    for name, one in sets.items():
        if one.scored in ("exact", "logit_difference", "greater_than") or len({i.answer for i in one.items}) > 1:
            continue
        partner = partner_of(name)
        if partner is None:
            alone.append(name)
            continue
        assert {item.alternative for item in sets[partner].items} == {one.items[0].answer}, name
    assert alone == ["persona/none"]


def test_the_share_of_opposite_replies_stands_beside_the_right_ones(atlas):
    one = item_sets(0, 24)["refusal/harmless/held_out_action"]
    found = score(atlas, one)
    opposite = ItemSet(one.name, "", "starts_with", tuple(replace(i, answer=i.alternative) for i in one.items), "")
    assert found.opposite is not None
    assert found.opposite.tolist() == score(atlas, opposite).values.tolist()
    assert found.opposite.mean() < 0.2 < 0.8 < found.values.mean()
    shown = measure(one, found, found)
    assert shown.opposite == found.opposite.mean()


def evaluation(shift=0.0, n=4, causal=0.5):
    sets = {}
    for i in range(12):
        values = np.clip(np.array([1.0, 0.0, 1.0, 0.0]) + shift, 0, 1)
        one = replace(completions("abcd"), name=f"task{i}/held_out")
        sets[one.name] = measure(one, Scores(values, np.full(4, np.nan)), Scores(np.zeros(4), np.full(4, np.nan)))
    # sets with figures of the study: one as published, one far from it
    for name, value in (("two_hop/capital/held_out", 1.0), ("binding", 0.0)):
        one = replace(completions("abcd"), name=name)
        sets[name] = measure(one, Scores(np.full(4, value), np.full(4, np.nan)), Scores(np.zeros(4), np.zeros(4)))
    good, none = [Rate(int(100 * causal), 100)], [Rate(0, 100)]
    pool = BridgePool("held out", good[0], good, good, none, good, good, none, good)
    reaction = Reaction(Rate(0, 10), Rate(int(10 * causal), 10), Rate(2, 10))
    refused = Reaction(Rate(9, 10), Rate(0, 10), Rate(0, 10))
    way = Intervention("clamp", "assistant", 6, "harmful", reaction, refused, 0.125, 0.25)
    few = [replace(reaction, answered=Rate(k, 10)) for k in (1, 7)]
    way = replace(way, by_layer={"assistant": [0.5], "request": [0.25]}, fewer={80: few})
    refusal = RefusalChecks(refused, reaction, 400, [way])
    losses = {
        name: loss_effect(name, np.array(found), np.array([9.0]))
        for name, found in {"random tokens": [9.0, 9.5], "their repeat": [0.005, 0.015]}.items()
    }
    shares = [np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4), np.zeros(4)]
    kind = LandmarkKind(
        "open text",
        2,
        4.0,
        landmark_checks._effect("top", "share", shares),
        landmark_checks._effect("p", "probability", shares),
        {4.0: [0.25]},
    )
    landmarks = LandmarkChecks(39, [kind], [Rate(40, 40)])
    skipped = ["outside wording: none"]
    return Evaluation("m", "0" * 64, "9", 0, n, sets, losses, [pool, pool], refusal, landmarks, skipped)


def test_better_needs_held_out_items_and_causal_checks():
    assert compare(evaluation(1.0), evaluation()).better
    assert not compare(evaluation(), evaluation()).better
    assert not compare(evaluation(), evaluation(1.0)).better
    assert not compare(evaluation(1.0, causal=0.2), evaluation()).better
    without = replace(evaluation(1.0), bridge=[], refusal=None)
    assert not compare(without, evaluation()).better
    assert "decides nothing" in report.comparison_text(compare(without, evaluation()), "a", "b")
    assert compare(evaluation(1.0), evaluation()).held_out == pytest.approx(0.5 * 12 / 13)
    assert report.verdict(compare(evaluation(1.0), evaluation()), "a") == (
        "a is better on held-out items, and loses on no headline and no causal check"
    )
    assert report.verdict(compare(evaluation(causal=0.2), evaluation(1.0)), "a") == (
        "a is worse on held-out items, but loses on bridge: state readable at the last position, "
        "bridge: carried over from an abbreviation prompt, refusal: clamp"
    )
    right = evaluation().sets["two_hop/capital/held_out"]
    wrong = replace(right, effect=replace(right.effect, value=0.8))
    candidate = replace(evaluation(1.0), sets={**evaluation(1.0).sets, "x": wrong})
    other = replace(evaluation(), sets={**evaluation().sets, "x": right})
    assert compare(candidate, other).better  # one set may fall
    assert compare(candidate, other, ["x"]).fallen == ["x"]  # a headline may not
    assert not compare(candidate, other, ["x"]).better
    with pytest.raises(CutawayError, match="differ in n"):
        compare(evaluation(), evaluation(n=5))


def test_tables_hold_every_set_with_its_figures():
    found = evaluation()
    with recording("cutaway subjects evaluate atlas"):
        text = page.as_markdown(found, atlas_folder())
    for name, measured in found.sets.items():
        assert f"| {name} |" in text
        assert name in report.as_text(found)
        assert report.with_interval(measured.effect) in text
    assert "0.50 [0.15, 0.85]" in text
    assert "outside wording: none" in text
    assert f"{read_manifest(atlas_folder())['tokens'] / 1e6:.3g} M tokens" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count("\\|") >= 3 for line in rows)


def test_the_page_flags_what_is_weak_and_what_differs_from_the_study():
    found = evaluation()
    for name in ("truth/held_out", "new_wording/ioi", "new_wording/agreement"):
        right = 0.0 if name.endswith("ioi") else 1.0
        one = replace(completions("abcdefghijklmn"), name=name)
        found.sets[name] = measure(
            one, Scores(np.full(14, right), np.full(14, np.nan)), Scores(np.zeros(4), np.zeros(4))
        )
    one = replace(completions("abcdefghijklmn"), name="pronoun")
    found.sets["pronoun"] = measure(one, Scores(np.zeros(14), np.full(14, np.nan)), Scores(np.zeros(4), np.zeros(4)))
    with recording("cutaway subjects evaluate atlas"):
        text = page.as_markdown(found, atlas_folder())
    cannot, study = text.split("## What it cannot do")[1].split("## Beside the study")
    sets, edits = cannot.split("Edits that do not")
    assert "| asks | pronoun | 14 | 0 [0, 0.22] | 0.07 |" in sets
    assert "truth" not in sets
    assert "task0" not in sets  # four items say too little
    assert "In new wording 1 of 2 sets are weak. Not weak: `new_wording/agreement`." in sets
    assert "| new_wording/ioi | asks | 14 | 0 [0, 0.22] | weak |" in text
    assert "from the request's words, clamp: answered at most 0.25" in edits
    assert "the assistant token" not in edits
    assert "open text: its city on top 0.25 [0.05, 0.70]" in edits
    assert "| binding | right | 4 | 0 [0, 0.49] | 0.98 |" in study
    assert "two_hop/capital/held_out" not in study
    # binding and the pronoun are far from the study's figures, random tokens too; truth is above its 0.74
    assert "The study published 6 figures of the first weights (`atlas-1`). 2 lie within" in study
    assert "worse than the study's figure: 2, better: 2." in study
    assert "0.10 to 0.70" in text
    assert (
        "| clamp | the assistant token, L6 | harmful | 0 [0, 0.28] | 0.50 [0.24, 0.76] | 0.20 | 0.90 / 0 | 0.125 |"
        in text
    )
    assert "| a landmark's direction, clamped in open text: its city comes up | 4 | 0.25 [0.05, 0.70] | 0 |" in text


def test_weak_is_measured_from_the_baseline():
    one = ItemSet("truth", "", "logit_difference", completions("a" * 20).items)

    def with_right(n):
        scores = Scores(np.array([1.0] * n + [0.0] * (20 - n)), np.full(20, np.nan))
        return measure(one, scores, scores)

    assert report.is_weak(with_right(16))  # 0.80: 0.6 of the way from a coin
    assert not report.is_weak(with_right(17))  # 0.85: 0.7 of it


def test_the_page_says_what_other_weights_were(tmp_path):
    write_json(
        tmp_path / "manifest.json",
        {
            "origin": "cutaway subjects train atlas",
            "corpus": {"world": "5", "fingerprint": "abc" * 20},
            "seed": 7,
            "tokens": 1_500_000,
            "commit": "c0ffee",
        },
    )
    records = ({"tokens": 1000 * k, "loss": 9 - k / 10, "tokens_per_second": 1500.0} for k in range(1, 21))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    compared = compare(evaluation(1.0), evaluation())
    text = page.comparison_markdown(compared, atlas_folder(), tmp_path)
    assert ("These weights meet it." in text) == compared.better
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "These weights meet it." in page.comparison_markdown(
        compare(evaluation(1.0), evaluation()), tmp_path, tmp_path
    )
    worse = page.comparison_markdown(compare(evaluation(causal=0.2), evaluation()), tmp_path, tmp_path)
    assert "do not meet it: bridge: state readable at the last position, bridge" in worse
    assert "Corpus: world 5, fingerprint abcabcabcabc; seed 7; 1.5 M tokens; commit c0ffee." in text
    assert "| loss, nats a token | 8.90 |" in text
    assert "at 1,500 tokens a second" in text
    assert "its weights do not ship" in text
    assert "higher by +0.46" in text
    assert "do not ship" not in page.comparison_markdown(compared, tmp_path, atlas_folder())


def test_numbers_do_not_round_to_a_perfect_score():
    assert [report.number(x) for x in (1.0, 0.998, 0.94, 0.0, 0.002, 16.575)] == [
        "1",
        "0.998",
        "0.94",
        "0",
        "0.002",
        "16.57",
    ]


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(cutaway, "load", lambda name: pytest.fail("loaded a model"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CutawayError, match="is a folder"):
        command.evaluate("atlas", out=tmp_path)
    with pytest.raises(CutawayError, match="could not be written"):
        command.evaluate("atlas", out=tmp_path / "file" / "atlas.md")


def test_json_is_json_also_beside_other_weights(monkeypatch, capsys):
    monkeypatch.setattr(cutaway, "load", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(evaluation_module, "evaluate", lambda lm, **_: evaluation(1.0 if lm.name == "a" else 0.0))
    command.evaluate("atlas", model="a", against="b", json=True)
    found = json.loads(capsys.readouterr().out)["figures"]
    assert found["sets"]["task0/held_out"]["effect"]["value"] == 1.0
    assert found["against"]["model"] == "b"
    assert found["against"]["better"] is True
    assert found["landmarks"]["kinds"][0]["top"]["n"] == 4
    assert found["refusal"]["interventions"][0]["fewer"]["80"][1]["answered"] == {"successes": 7, "n": 10}


def test_the_committed_page_is_about_the_shipped_weights_and_todays_sets(atlas, few, pytestconfig):
    path = pytestconfig.rootpath / "docs" / "atlas.md"
    if not path.exists():
        pytest.skip("an installed package has no docs folder")
    text = path.read_text(encoding="utf-8")
    assert f"on the weights {atlas.identity().weight_hash[:12]} in world {WORLD_VERSION}:" in text
    assert [name for name in few if f"| {name} | {few[name].measures} |" not in text] == []

"""The shipped weights on what the study published, and the arithmetic of evaluation, comparison and page."""

from dataclasses import replace

import numpy as np
import pytest

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import wilson_interval
from cutaway.subjects.atlas import atlas_folder, report
from cutaway.subjects.atlas.causal_checks import (
    BridgePool,
    Intervention,
    Rate,
    Reaction,
    RefusalChecks,
    difference_of_means,
    react,
    two_hop_bridge,
)
from cutaway.subjects.atlas.evaluate import (
    Evaluation,
    command_of,
    compare,
    derived_sets,
    evaluate,
    held_out_requests,
    held_out_texts,
    loss_effect,
    measure,
    outside_sets,
    training_requests,
    untrained_twin,
)
from cutaway.subjects.atlas.scoring import Scores, repeat_losses, score
from cutaway.subjects.world.items import Item, ItemSet, item_sets


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


def test_clamping_the_refusal_direction_to_the_harmless_mean_makes_it_answer(atlas):
    harmful, harmless = training_requests(48, 0)
    asked = held_out_requests(16, 0)[0]
    difference, mean = difference_of_means(atlas, harmful, harmless, "assistant")
    unit = difference[6] / difference[6].norm()
    edits = [cutaway.clamp("blocks.{6..7}.resid_post", unit, maximum=float(mean[6] @ unit))]
    assert react(atlas, asked).refused.value >= 0.75
    assert react(atlas, asked, edits).answered.value >= 0.75


def test_the_untrained_twin_is_at_chance_and_leaves_the_model_alone(atlas, few):
    before = atlas.identity().weight_hash
    twin = untrained_twin(atlas)
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
    whole = {item.prompt for item in item_sets(0, 180)["ioi/held_out"].items}
    assert 20 <= len(one.items) <= 30
    for item in one.items:
        assert item.prompt in whole
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


def evaluation(shift=0.0, n=4, causal=0.5):
    sets = {}
    for i in range(12):
        values = np.clip(np.array([1.0, 0.0, 1.0, 0.0]) + shift, 0, 1)
        one = replace(completions("abcd"), name=f"task{i}/held_out")
        sets[one.name] = measure(one, Scores(values, np.full(4, np.nan)), Scores(np.zeros(4), np.full(4, np.nan)))
    good, none = [Rate(int(100 * causal), 100)], [Rate(0, 100)]
    pool = BridgePool("held out", good[0], good, good, none, good, good, none, good)
    reaction = Reaction(Rate(0, 10), Rate(int(10 * causal), 10))
    way = Intervention("clamp", "assistant", 6, "harmful", reaction, Reaction(Rate(9, 10), Rate(0, 10)), 0.1, 0.1)
    way = replace(way, by_layer={"assistant": [0.5]})
    refusal = RefusalChecks(Reaction(Rate(9, 10), Rate(1, 10)), reaction, [way])
    losses = {"their repeat": loss_effect("their repeat", np.array([0.1, 0.2]), np.array([9.0]))}
    return Evaluation("m", "0" * 64, "9", 0, n, sets, losses, [pool, pool], refusal, ["outside wording: none"])


def test_better_needs_held_out_items_and_causal_checks():
    assert compare(evaluation(1.0), evaluation()).better
    assert not compare(evaluation(), evaluation()).better
    assert not compare(evaluation(), evaluation(1.0)).better
    assert not compare(evaluation(1.0, causal=0.2), evaluation()).better
    assert compare(evaluation(1.0), evaluation()).held_out == pytest.approx(0.5)
    with pytest.raises(CutawayError, match="differ in n"):
        compare(evaluation(), evaluation(n=5))


def test_tables_hold_every_set_with_its_figures():
    found = evaluation()
    page = report.as_markdown(found, "cutaway subjects evaluate atlas", atlas_folder())
    text = report.as_text(found)
    for name, measured in found.sets.items():
        assert f"| {name} |" in page
        assert name in text
        assert report.with_interval(measured.effect) in page
    assert "0.50 [0.15, 0.85]" in page
    assert "outside wording: none" in page
    assert "124 M tokens" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count("\\|") >= 3 for line in rows)
    assert report.comparison_text(compare(found, found), "a", "b").endswith(
        "a is not better on held-out items and causal checks"
    )


def test_numbers_do_not_round_to_a_perfect_score():
    assert [report.number(x) for x in (1.0, 0.998, 0.94, 0.0, 0.002, 16.575)] == [
        "1",
        "0.998",
        "0.94",
        "0",
        "0.002",
        "16.57",
    ]


def test_the_page_names_the_command_that_measured_it(tmp_path):
    assert command_of("atlas", 200, False, None) == "cutaway subjects evaluate atlas --n 200"
    assert command_of("runs/a", 9, True, tmp_path) == (
        f"cutaway subjects evaluate atlas --model runs/a --quick --outside {tmp_path.name}"
    )


def test_the_committed_page_is_about_the_shipped_weights(atlas, pytestconfig):
    page = pytestconfig.rootpath / "docs" / "atlas.md"
    if not page.exists():
        pytest.skip("an installed package has no docs folder")
    assert atlas.identity().weight_hash[:12] in page.read_text(encoding="utf-8")

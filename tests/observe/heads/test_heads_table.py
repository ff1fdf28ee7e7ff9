"""The whole table: labels by their rule, effects beside them, and what it says of models with and without induction."""

import json

import pytest

import cutaway
from cutaway.artifacts.command import recording
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import plain
from cutaway.model.language_model import LanguageModel
from cutaway.observe.heads.labels import HeadTable
from cutaway.observe.heads.report import losses, repeated_tokens, second_half_loss
from cutaway.observe.heads.table import head_table, repetition


@pytest.fixture(scope="module")
def table(atlas: LanguageModel) -> HeadTable:
    prompts = ["The capital of the state containing Dallas is Austin.", "Tom went to the park."]
    with recording("again"):
        return head_table(atlas, prompts, n=4, length=32, ablation_length=10, needle="Austin")


def test_labels_follow_their_rule(table: HeadTable) -> None:
    for kind, scores in table.kinds.items():
        for head, score in scores.top(64):
            expected = score >= scores.threshold and scores.low[head].item() > scores.control_high[head].item()
            assert (kind in table.labels(head)) == expected
    assert {"previous", "relative-position"} <= set(table.labels((3, 7)))
    assert {"induction", "induction-copying", "copying"} <= set(table.labels((7, 3)))
    with pytest.raises(CutawayError, match="no head L8H0"):
        table.labels((8, 0))


def test_every_label_has_its_score_and_its_ablation_with_controls(table: HeadTable) -> None:
    (first, *_) = table.of_kind("previous", 1)
    assert first.head == (3, 7)
    for kind in table.kinds:
        for row in table.of_kind(kind, 2):
            assert row.labelled
            assert row.score.require_controls().command == "again"
            assert [effect.ablation for effect in row.effects] == ["mean ablation", "zero ablation"]
            for effect in row.effects:
                others, untouched = effect.require_controls().controls
                assert "without the label" in others.name
                assert others.n == 64 - len(table.kinds[kind].heads())
                assert untouched.value == 0.0
            asked = "nats of loss on the second copy" if "induction" in kind or kind == "previous" else "text"
            assert asked in row.effects[0].units
    assert not all(row.labelled for row in table.of_kind("duplicate", labelled=False))
    with pytest.raises(CutawayError, match="no score"):
        table.of_kind("nonsense")


def test_the_previous_token_heads_of_atlas_are_causes(table: HeadTable) -> None:
    """L5H2 carries the second copy: alone it costs more than any head without the label."""
    effect = next(row for row in table.of_kind("previous") if row.head == (5, 2)).effects[0]
    assert effect.value > 0.5 > effect.controls[0].value  # of four sequences, too few for an interval above 0


def test_the_verdict_says_induction(table: HeadTable) -> None:
    assert table.induces
    first, second, *_ = table.verdicts()
    assert first.startswith("Induction: ")
    assert "L7H3" in first
    assert "duplicate" in second


def test_text_and_json_say_the_same(table: HeadTable) -> None:
    text = table.text(top=2)
    found = json.loads(json.dumps(plain(table.to_json())))
    assert "L3H7" in text
    assert "and " in text
    assert "no head above its control" in text  # duplicate
    assert found["verdicts"] == list(table.verdicts())
    assert found["kinds"]["retrieval"]["n"] == 2
    assert {tuple(row["head"]) for row in found["labelled"] if row["kind"] == "induction"} == set(
        table.kinds["induction"].heads()
    )
    assert found["effects"]["text"]["mean"]["n"] == 2
    assert text.splitlines()[0] == "heads of atlas: 8 layers × 8"
    assert "retrieval" not in table.text(["induction"])


def test_repetition_is_the_difference_of_losses(llama: LanguageModel) -> None:
    effect = repetition(llama, 5, 8, seed=3)
    run = llama.run(repeated_tokens(llama, 5, 8, seed=3))
    assert effect.n == 5
    fresh_minus_second, first_minus_fresh = effect.value, effect.controls[0].value
    assert fresh_minus_second + first_minus_fresh == pytest.approx(
        (losses(run)[:, 1:8].mean() - second_half_loss(run).mean()).item(), abs=1e-5
    )


def test_a_random_model_has_nothing_to_say(llama: LanguageModel) -> None:
    table = head_table(llama, n=3, length=10, ablations=())
    assert not table.induces
    assert table.verdicts()[0].startswith("No induction")
    assert table.behaviour("induction") is None
    assert table.of_kind("induction") == []
    assert "Δ" not in str(table)
    with pytest.raises(CutawayError, match="needle"):
        head_table(llama, needle="x")


def test_stories_has_previous_token_heads_and_no_induction(shared) -> None:
    """Absence is reported as absence: no head above its control, and no fall of the loss."""
    table = head_table(cutaway.load(shared / "models" / "stories260K"), n=6, ablations=("mean",), ablation_length=10)
    assert [head for head, _ in table.kinds["previous"].top(2)] == [(3, 6), (1, 3)]
    assert table.kinds["induction"].heads() == []
    assert not table.induces
    assert table.verdicts()[0].startswith("No induction: no head is above its control, and the loss")


def test_webtext_induction_heads_are_causes(shared) -> None:
    table = head_table(
        cutaway.load(shared / "models" / "webtext-gpt2"), n=6, length=32, ablations=("mean",), ablation_length=10
    )
    assert table.induces
    rows = {row.head: row for row in table.of_kind("induction")}
    assert {(3, 1), (3, 2), (3, 3), (3, 4)} <= set(rows)
    for head in ((3, 1), (3, 2), (3, 3)):
        effect = rows[head].effects[0]
        assert effect.interval is not None
        assert effect.interval[0] > 0
        assert effect.value > effect.controls[0].value

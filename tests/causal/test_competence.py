"""Competence counts both prompts of a pair; real models do the tasks that were made for them."""

import pytest

import cutaway
from cutaway.causal.competence import competence, try_tasks
from cutaway.data.pairs import align
from cutaway.model.language_model import LanguageModel


def test_competence_is_a_count(tiny: LanguageModel, id_pairs) -> None:
    pairs = id_pairs(30, None)
    found = competence(tiny, pairs, batch_rows=7)
    top = competence(tiny, pairs, criterion="top1")
    aligned = align(tiny, pairs)
    both = clean = top1 = 0
    for i in range(30):
        logits = [tiny.run([list(side)]).logits[0, -1] for side in (pairs[i].clean, pairs[i].corrupt)]  # type: ignore[arg-type, index]
        a, w = int(aligned.answer[i]), int(aligned.wrong[i])
        good, other = bool(logits[0][a] > logits[0][w]), bool(logits[1][w] > logits[1][a])
        clean, both = clean + good, both + (good and other)
        top1 += int(logits[0].argmax()) == a and int(logits[1].argmax()) == w
    assert (found.right, found.n) == (both, 30)
    assert found.clean == pytest.approx(clean / 30)
    assert top.right == top1
    assert found.interval[0] < found.value < found.interval[1]
    assert str(found).startswith(f"right on {both} of 30")


@pytest.mark.parametrize(
    ("folder", "does", "does_not"),
    [
        ("stories260K", {"pronoun", "question mark", "name copying"}, {"indirect object", "repeated tokens"}),
        ("webtext-gpt2", {"subject–verb agreement", "name copying"}, {"indirect object"}),
    ],
)
def test_real_models_have_tasks(shared, folder: str, does: set[str], does_not: set[str]) -> None:
    results = {result.task.name: result for result in try_tasks(cutaway.load(shared / "models" / folder))}
    able = {name for name, result in results.items() if result.able}
    assert does <= able
    assert not does_not & able
    assert all("right on" in results[name].reason for name in does_not)

"""Task accuracy counts both prompts of a pair; real models do the tasks that were made for them."""

import math
import random
import re
import statistics
from pathlib import Path

import pytest
import torch

import cutaway
from cutaway.causal.accuracy import task_accuracy
from cutaway.causal.task_results import TaskResults, try_task, try_tasks
from cutaway.data.pairs import PromptPair, aligned
from cutaway.data.tasks.registry import all_tasks, known_task
from cutaway.data.tasks.tasks import TASKS
from cutaway.data.tasks.wording import Split
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens


def test_task_accuracy_is_a_count(tiny: LanguageModel, id_pairs) -> None:
    pairs = id_pairs(30, None)
    found = task_accuracy(tiny, pairs, batch_rows=7)
    top = task_accuracy(tiny, pairs, criterion="top1")
    ready = aligned(tiny, pairs)
    both = clean = top1 = 0
    for i in range(30):
        logits = [tiny.run([list(side)]).logits[0, -1] for side in (pairs[i].clean, pairs[i].corrupt)]  # type: ignore[arg-type, index]
        a, w = int(ready.answer[i]), int(ready.wrong[i])
        good, other = bool(logits[0][a] > logits[0][w]), bool(logits[1][w] > logits[1][a])
        clean, both = clean + good, both + (good and other)
        top1 += int(logits[0].argmax()) == a and int(logits[1].argmax()) == w
    assert (found.right, found.n) == (both, 30)
    assert found.clean == pytest.approx(clean / 30)
    assert top.right == top1
    assert found.interval[0] < found.value < found.interval[1]
    assert str(found).startswith(f"right on {both} of 30")


def test_several_answers_are_judged_together(tiny: LanguageModel) -> None:
    """Against sums of probabilities written out; the corrupt prompt of a pair that is not symmetric need only fall."""
    rng = random.Random(5)
    pairs = []
    for i in range(40):
        prompt = tuple(rng.randrange(2, 61) for _ in range(6))
        corrupt = (*prompt[:3], 2 + (prompt[3] - 1) % 59, *prompt[4:])
        ids = rng.sample(range(2, 61), 9)
        pairs.append(
            PromptPair(prompt, corrupt, ids[0], ids[4], {}, tuple(ids[:4]), tuple(ids[4:]), symmetric=i % 2 == 0)
        )
    for criterion in ("preferred", "top1"):
        found = task_accuracy(tiny, pairs, criterion=criterion, batch_rows=16)
        items, differences, others, probabilities = [], [], [], []
        for pair in pairs:
            p, q = (tiny.run([list(side)]).logits[0, -1].softmax(-1).tolist() for side in (pair.clean, pair.corrupt))  # type: ignore[arg-type, index]
            right, wrong = (sum(p[int(i)] for i in ids) for ids in (pair.answers, pair.wrongs))
            there, other = (sum(q[int(i)] for i in ids) for ids in (pair.answers, pair.wrongs))
            differences.append(math.log(right / wrong))
            others.append(math.log(there / other))
            probabilities.append(right - wrong)
            good = right > wrong if criterion == "preferred" else max(p) in [p[int(i)] for i in pair.answers]
            turned = other > there if criterion == "preferred" else max(q) in [q[int(i)] for i in pair.wrongs]
            items.append(good and (turned if pair.symmetric else others[-1] < differences[-1]))
        assert found.items.tolist() == items
        assert 0 < found.right < 40 or criterion == "top1"
        assert found.logit_difference == pytest.approx(statistics.fmean(differences), abs=1e-4)
        assert found.corrupt_logit_difference == pytest.approx(statistics.fmean(others), abs=1e-4)
        assert found.probability_difference == pytest.approx(statistics.fmean(probabilities), abs=1e-5)
        low, high = found.probability_difference_interval
        assert low < found.probability_difference < high


def test_a_constant_answer_is_right_on_none(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the corrupt prompt has no answer of its own: a model that always says 99 knows nothing of years."""
    constant = torch.randn(61)
    monkeypatch.setattr(
        "cutaway.causal.accuracy._last_log_probabilities",
        lambda lm, tokens: constant.log_softmax(-1).expand(len(tokens), -1).clone(),
    )
    order = constant.argsort(descending=True).tolist()
    pairs = [
        PromptPair((0, i, 3), (0, i, 4), order[0], order[9], {}, tuple(order[:2]), tuple(order[9:11]), symmetric=even)
        for i in range(5, 25)
        for even in (True, False)
    ]
    found = task_accuracy(tiny, pairs)
    assert found.clean == 1
    assert found.right == 0


def test_the_control_deals_out_the_prompts(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is always right between the same two words, about a quarter is right by chance."""

    def perfect(lm: LanguageModel, tokens: Tokens) -> torch.Tensor:
        logits = torch.zeros(len(tokens), 61)
        clean = tokens.ids[:, 2] == 3
        logits[:, 7] = torch.where(clean, 4.0, 0.0)
        logits[:, 8] = torch.where(clean, 0.0, 4.0)
        return logits.log_softmax(-1)

    monkeypatch.setattr("cutaway.causal.accuracy._last_log_probabilities", perfect)
    pairs = [PromptPair((0, i, 3), (0, i, 4), 7, 8) for i in range(5, 55)]
    found = task_accuracy(tiny, pairs)
    assert found.value == 1
    assert found.control == pytest.approx(0.25, abs=0.08)
    assert found.logit_difference == pytest.approx(4)
    assert found.logit_difference_interval == pytest.approx((4, 4))
    assert task_accuracy(tiny, pairs[:1]).control is None


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("two-hop capitals", 0.9), ("world capitals", 0.9), ("world indirect object", 0.85),
        ("world indirect object, other names", 0.8), ("world greater than", 0.9), ("greater than", 0.9),
        ("world refusal", 0.9), ("refusal", 0.9), ("repeated tokens", 0.9), ("agreement across a noun", 0.6),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", ["search", "held_out"])
def test_atlas_does_what_it_was_made_for(atlas: LanguageModel, name: str, least: float, split: Split) -> None:
    found = try_task(atlas, known_task(name), n=24, threshold=least, split=split)
    assert found.able, str(found)
    assert found.accuracy is not None
    assert found.accuracy.control is not None
    assert found.accuracy.control < found.accuracy.interval[0]
    assert found.accuracy.corrupt_logit_difference < found.accuracy.logit_difference_interval[0]
    assert found.to_json()["split"] == split


def test_refused_pairs_reach_the_result(atlas: LanguageModel) -> None:
    found = try_task(atlas, known_task("indirect object"), n=10)
    assert found.accuracy is not None
    assert found.accuracy.refused == sum(found.accuracy.refusals.values()) > 0
    assert not found.able


@pytest.mark.parametrize(
    ("folder", "does", "does_not"),
    [
        ("stories260K", {"pronoun", "question mark", "name copying"}, {"indirect object", "repeated tokens"}),
        (
            "webtext-gpt2",
            {"subject–verb agreement", "name copying", "determiner–noun agreement"},
            {"indirect object", "country capitals"},
        ),
    ],
)
def test_real_models_have_tasks(shared, folder: str, does: set[str], does_not: set[str]) -> None:
    chosen = [known for known in TASKS if known.name in does | does_not]
    results = {result.task.name: result for result in try_tasks(cutaway.load(shared / "models" / folder), chosen)}
    able = {name for name, result in results.items() if result.able}
    assert does <= able
    assert not does_not & able
    assert all("right on" in results[name].reason for name in does_not)


@pytest.mark.slow
def test_the_page_says_what_the_command_says(atlas: LanguageModel) -> None:
    """docs/tasks.md shows atlas's table as `cutaway tasks atlas` prints it."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    block = page.split("$ cutaway tasks atlas\n")[1].split("```")[0]
    shown = [re.split(r"  +", line) for line in block.splitlines()[2:]]
    splits: tuple[Split, ...] = ("search", "held_out")
    tried = [try_task(atlas, one, n=60, split=split) for one in all_tasks() for split in splits]
    found = TaskResults("atlas", tuple(tried)).cells()
    assert [row[:3] for row in shown] == [row[:3] for row in found]
    for ours, theirs in zip(shown, found, strict=True):
        assert ours[3] == theirs[3], ours
        assert float(ours[5].split(" [")[0]) == pytest.approx(float(theirs[5].split(" [")[0]), abs=0.02)
        assert ours[-1] == theirs[-1]

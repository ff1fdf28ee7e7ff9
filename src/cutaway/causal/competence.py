"""Can the model do the task at all? Asked before any question about how it does it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import interval_text
from cutaway.artifacts.statistics import bootstrap_interval, wilson_interval
from cutaway.data.pairs import AlignedPairs, PromptPair, align
from cutaway.data.tasks.tasks import TASKS, Task, readable_pairs
from cutaway.data.tasks.wording import Split
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens

Criterion = Literal["preferred", "top1"]
ABLE = 0.8
"""The least share of pairs that a model is right on for a question about how it does them to mean anything."""
_DEALS = 8


@dataclass(frozen=True)
class Competence:
    """How often a model is right on n items.

    An item is one prompt pair, and right when the model is right on its clean prompt *and* on its corrupt prompt
    (whose right answer is the pair's `wrong`), so that a constant answer scores 0. Right means: the answer's logit is
    above the wrong answer's ("preferred"), or the answer is the most probable token ("top1"). Where a pair has several
    answers, all right ones together stand against all wrong ones. After the corrupt prompt of a pair that is not
    symmetric, which has no answer of its own, right means that the answer is less likely than after the clean one:
    its logit difference is smaller. `items` [n] says which are right, `clean` and `corrupt` are the two shares.

    `logit_difference` is the mean, after the clean prompt, of the answer's logit minus the wrong answer's (of several
    answers: the log of their summed probability), `corrupt_logit_difference` the same after the corrupt prompt, where
    it should be lower; `probability_difference` is that of the probabilities. Intervals are 95 %, bootstrap over pairs.
    `control` is the share of pairs that would be right if all prompts, clean and corrupt, were dealt out anew (the mean
    of eight deals; None for a single pair): a quarter, where every pair decides between the same two words.
    """

    criterion: Criterion
    items: Tensor
    clean: float
    corrupt: float
    logit_difference: float
    logit_difference_interval: tuple[float, float]
    corrupt_logit_difference: float
    corrupt_logit_difference_interval: tuple[float, float]
    probability_difference: float
    probability_difference_interval: tuple[float, float]
    refused: int
    refusals: Mapping[str, int]
    control: float | None = None

    @property
    def n(self) -> int:
        return len(self.items)

    @property
    def right(self) -> int:
        return int(self.items.sum())

    @property
    def value(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `value`."""
        return wilson_interval(self.right, self.n)

    def to_json(self) -> dict[str, Any]:
        return {
            "criterion": self.criterion,
            "right": self.right,
            "n": self.n,
            "value": self.value,
            "interval": list(self.interval),
            "clean": self.clean,
            "corrupt": self.corrupt,
            "logit_difference": self.logit_difference,
            "logit_difference_interval": list(self.logit_difference_interval),
            "corrupt_logit_difference": self.corrupt_logit_difference,
            "corrupt_logit_difference_interval": list(self.corrupt_logit_difference_interval),
            "probability_difference": self.probability_difference,
            "probability_difference_interval": list(self.probability_difference_interval),
            "refused": self.refused,
            "refusals": dict(self.refusals),
            "control": self.control,
        }

    def __str__(self) -> str:
        return f"right on {self.right} of {self.n} ({self.value:.2f}, 95 % {interval_text(self.interval, 2, to=True)})"


def competence(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    *,
    criterion: Criterion = "preferred",
    batch_rows: int = 64,
) -> Competence:
    """Measure how often the model answers the pairs rightly, both prompts of each."""
    aligned = align(lm, pairs)
    parts: list[tuple[Tensor, ...]] = []
    others: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for first in range(0, len(aligned), batch_rows):
        part = aligned[range(first, min(first + batch_rows, len(aligned)))]
        right, wrong = _sides(part)
        symmetric = torch.tensor([pair.symmetric for pair in part.pairs])
        clean = _last_log_probabilities(lm, part.clean)
        corrupt = _last_log_probabilities(lm, part.corrupt)
        good, turned = _judge(clean, corrupt, right, wrong, symmetric, criterion)
        p_right, p_wrong = _total(clean, right), _total(clean, wrong)
        other = _total(corrupt, right) - _total(corrupt, wrong)
        parts.append((good, turned, p_right - p_wrong, other, p_right.exp() - p_wrong.exp()))
        if len(part) > 1:
            pool = torch.cat([clean, corrupt])
            for _ in range(_DEALS):
                dealt = pool[torch.randperm(len(pool), generator=generator)]
                by_chance = _judge(dealt[: len(part)], dealt[len(part) :], right, wrong, symmetric, criterion)
                others.append(by_chance[0] & by_chance[1])
    clean_right, corrupt_right, difference, other, probability = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    return Competence(
        criterion=criterion,
        items=clean_right & corrupt_right,
        clean=clean_right.float().mean().item(),
        corrupt=corrupt_right.float().mean().item(),
        logit_difference=difference.mean().item(),
        logit_difference_interval=bootstrap_interval(difference.numpy()),
        corrupt_logit_difference=other.mean().item(),
        corrupt_logit_difference_interval=bootstrap_interval(other.numpy()),
        probability_difference=probability.mean().item(),
        probability_difference_interval=bootstrap_interval(probability.numpy()),
        refused=len(aligned.refused),
        refusals=aligned.refusals(),
        control=torch.cat(others).float().mean().item() if others else None,
    )


def unable(able: Competence, model: str, task: str, *, force: bool, so: str) -> str:
    """That a model cannot do a task (right on less than `ABLE`), in words; "" where it can.

    Raises CutawayError that says so and what it means (`so`), or with `force` says it on stderr.
    """
    if able.value >= ABLE:
        return ""
    words = f"{model} cannot do {task}: it is {able}"
    if not force:
        raise CutawayError(f"{words}. {so}")
    print(f"cutaway: {words}", file=sys.stderr)
    return words


def _judge(
    clean: Tensor,
    corrupt: Tensor,
    right: Sequence[Tensor],
    wrong: Sequence[Tensor],
    symmetric: Tensor,
    criterion: Criterion,
) -> tuple[Tensor, Tensor]:
    """Whether the clean prompts, and the corrupt ones, are answered rightly [b], from log-probabilities [b, V]."""
    difference = _total(clean, right) - _total(clean, wrong)
    other = _total(corrupt, right) - _total(corrupt, wrong)
    if criterion == "preferred":
        good, turned = difference > 0, other < 0
    else:
        good, turned = _top_is_among(clean, right), _top_is_among(corrupt, wrong)
    return good, torch.where(symmetric, turned, other < difference)


def _sides(pairs: AlignedPairs) -> tuple[list[Tensor], list[Tensor]]:
    """Ids of all right and of all wrong tokens of each pair."""
    if pairs.answers is None or pairs.wrongs is None:
        return list(pairs.answer[:, None]), list(pairs.wrong[:, None])
    return [row.nonzero()[:, 0] for row in pairs.answers], [row.nonzero()[:, 0] for row in pairs.wrongs]


def _last_log_probabilities(lm: LanguageModel, tokens: Tokens) -> Tensor:
    return lm.run(tokens, logits="last").last_logits.float().cpu().log_softmax(-1)


def _total(log_probabilities: Tensor, sets: Sequence[Tensor]) -> Tensor:
    """The log of the summed probability of each row's tokens [b]."""
    return torch.stack([row[ids].logsumexp(0) for row, ids in zip(log_probabilities, sets, strict=True)])


def _top_is_among(log_probabilities: Tensor, sets: Sequence[Tensor]) -> Tensor:
    """Whether the most probable token of each row is one of its tokens [b]."""
    tops = log_probabilities.argmax(-1)
    return torch.stack([(ids == top).any() for top, ids in zip(tops, sets, strict=True)])


@dataclass(frozen=True)
class TaskResult:
    """A task tried on a model: its readable pairs and how often the model is right, or why it could not be tried."""

    task: Task
    pairs: AlignedPairs | None
    competence: Competence | None
    reason: str
    split: Split = "search"

    @property
    def able(self) -> bool:
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "split": self.split,
            "question": self.task.question,
            "able": self.able,
            "reason": self.reason,
            "competence": None if self.competence is None else self.competence.to_json(),
        }

    def __str__(self) -> str:
        return f"{self.task.name}: {self.reason or self.competence}"


def try_task(
    lm: LanguageModel,
    task: Task,
    *,
    n: int = 40,
    threshold: float = 0.8,
    least: int = 8,
    seed: int = 0,
    split: Split = "search",
) -> TaskResult:
    """Try one task on the model: able if it is right on at least `threshold` of `least` or more items of a split."""
    try:
        pairs = readable_pairs(lm, task, n, seed, split)
    except CutawayError as error:
        return TaskResult(task, None, None, str(error), split)
    measured = competence(lm, pairs, criterion=task.criterion)
    reason = ""
    if measured.n < least:
        reason = f"only {measured.n} of its prompt pairs align with the tokenizer"
    elif measured.value < threshold:
        reason = f"right on {measured.right} of {measured.n}"
    return TaskResult(task, pairs, measured, reason, split)


def try_tasks(
    lm: LanguageModel,
    tasks: Sequence[Task] = TASKS,
    *,
    n: int = 40,
    threshold: float = 0.8,
    least: int = 8,
    seed: int = 0,
    split: Split = "search",
) -> list[TaskResult]:
    """Try every task on the model, as `try_task` does.

    The list keeps the order of `tasks`; a task that is not able has its reason ("right on 3 of 20 ...").
    """
    return [try_task(lm, task, n=n, threshold=threshold, least=least, seed=seed, split=split) for task in tasks]

"""Can the model do the task at all? Asked before any question about how it does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import bootstrap_interval, wilson_interval
from cutaway.data.pairs import AlignedPairs, PromptPair, align
from cutaway.data.tasks import TASKS, Task, readable_pairs
from cutaway.model.language_model import LanguageModel

Criterion = Literal["preferred", "top1"]


@dataclass(frozen=True)
class Competence:
    """How often a model is right on n items.

    An item is one prompt pair, and right when the model is right on its clean prompt *and* on its corrupt prompt
    (whose right answer is the pair's `wrong`), so that a constant answer scores 0. Right means: the answer's logit is
    above the wrong answer's ("preferred"), or the answer is the most probable token ("top1"). `items` [n] says which.
    """

    criterion: Criterion
    items: Tensor
    clean: float
    corrupt: float
    logit_difference: float
    logit_difference_interval: tuple[float, float]
    refused: int

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
            "refused": self.refused,
        }

    def __str__(self) -> str:
        low, high = self.interval
        return f"right on {self.right} of {self.n} ({self.value:.2f}, 95 % {low:.2f} to {high:.2f})"


def competence(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    *,
    criterion: Criterion = "preferred",
    batch_rows: int = 64,
) -> Competence:
    """Measure how often the model answers the pairs rightly, both prompts of each."""
    aligned = pairs if isinstance(pairs, AlignedPairs) else align(lm, pairs)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, len(aligned), batch_rows):
        part = aligned[range(first, min(first + batch_rows, len(aligned)))]
        clean = lm.run(part.clean, logits="last").logits
        corrupt = lm.run(part.corrupt, logits="last").logits
        assert clean is not None
        assert corrupt is not None
        z, c = clean[:, 0].float().cpu(), corrupt[:, 0].float().cpu()
        answer, wrong = part.answer[:, None], part.wrong[:, None]
        difference = (z.gather(-1, answer) - z.gather(-1, wrong))[:, 0]
        other = (c.gather(-1, wrong) - c.gather(-1, answer))[:, 0]
        if criterion == "preferred":
            parts.append((difference > 0, other > 0, difference))
        else:
            parts.append((z.argmax(-1) == part.answer, c.argmax(-1) == part.wrong, difference))
    clean_right, corrupt_right, difference = (torch.cat(column) for column in zip(*parts, strict=True))
    return Competence(
        criterion=criterion,
        items=clean_right & corrupt_right,
        clean=clean_right.float().mean().item(),
        corrupt=corrupt_right.float().mean().item(),
        logit_difference=difference.mean().item(),
        logit_difference_interval=bootstrap_interval(difference.numpy()),
        refused=len(aligned.refused),
    )


@dataclass(frozen=True)
class TaskResult:
    """A task tried on a model: its readable pairs and how often the model is right, or why it could not be tried."""

    task: Task
    pairs: AlignedPairs | None
    competence: Competence | None
    reason: str

    @property
    def able(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return f"{self.task.name}: {self.reason or self.competence}"


def try_tasks(
    lm: LanguageModel,
    tasks: Sequence[Task] = TASKS,
    *,
    n: int = 40,
    threshold: float = 0.8,
    least: int = 8,
    seed: int = 0,
) -> list[TaskResult]:
    """Try every task on the model; `able` are those it is right on in at least `threshold` of `least` or more items.

    The list keeps the order of `tasks`; a task that is not able has its reason ("right on 3 of 20 ...").
    """
    results = []
    for task in tasks:
        try:
            pairs = readable_pairs(lm, task, n, seed)
        except CutawayError as error:
            results.append(TaskResult(task, None, None, str(error)))
            continue
        measured = competence(lm, pairs, criterion=task.criterion)
        reason = ""
        if measured.n < least:
            reason = f"only {measured.n} of its prompt pairs align with the tokenizer"
        elif measured.value < threshold:
            reason = f"right on {measured.right} of {measured.n}"
        results.append(TaskResult(task, pairs, measured, reason))
    return results

"""Which tasks can a model do? Each tried on it, and all of them as one table."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, ClassVar

from markupsafe import Markup

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import interval_text
from cutaway.causal.accuracy import ABLE, TaskAccuracy, task_accuracy
from cutaway.data.pairs import AlignedPairs
from cutaway.data.tasks.tasks import TASKS, Task, readable_pairs
from cutaway.data.tasks.wording import Split
from cutaway.draw.intervals import intervals_svg
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result, ResultSequence
from cutaway.model.language_model import LanguageModel

_COLUMNS = (
    "task", "wording", "n", "right [95 %]", "shuffled", "logit difference [95 %]", "after corrupt", "P difference",
    "can it?",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class TaskResult(Result):
    """A task tried on a model: its readable pairs and how often the model is right, or why it could not be tried."""

    title: ClassVar[str] = "Task"

    task: Task
    """What was tried."""
    pairs: AlignedPairs | None
    """The pairs that the tokenizer can align; None where there are none."""
    accuracy: TaskAccuracy | None
    """None where the task could not be tried."""
    reason: str
    """Why the model cannot do it, "" where it can."""
    split: Split = "search"
    """The wording: "search" or "held_out"."""

    @property
    def able(self) -> bool:
        """Whether the model can do the task."""
        return not self.reason

    def to_json(self) -> dict[str, Any]:
        """The task, whether the model is able, why not, and its accuracy."""
        return {
            "task": self.task.name,
            "split": self.split,
            "question": self.task.question,
            "able": self.able,
            "reason": self.reason,
            "task_accuracy": None if self.accuracy is None else self.accuracy.to_json(),
        }

    def __str__(self) -> str:
        return f"{self.task.name}: {self.reason or self.accuracy}"

    def summary(self) -> str:
        """The task, whether it can be done, and the figures."""
        head = f"{self.task.name} ({_wording(self)} wording): {self.reason or 'can be done'}"
        return head if self.accuracy is None else f"{head}\n{self.accuracy.summary()}"

    def rows(self) -> list[dict[str, Any]]:
        """One row with the figures that `try_tasks` tables."""
        return [_figures_of(self)]

    def drawing(self) -> Markup:
        """The share that is right and that with shuffled prompts, and every figure as a table."""
        return TaskResults("", (self,)).drawing()


@dataclass(frozen=True, repr=False)
class TaskResults(ResultSequence[TaskResult]):
    """Tasks tried on one model, in the order in which they were asked for; a sequence of `TaskResult`."""

    title: ClassVar[str] = "Tasks"

    model: str
    """Name of the model."""
    results: tuple[TaskResult, ...]
    """One per task and split."""
    threshold: float = ABLE
    """The share of pairs that a model must be right on to be able."""

    def _items(self) -> tuple[TaskResult, ...]:
        return self.results

    @property
    def able(self) -> tuple[TaskResult, ...]:
        """Those that the model can do."""
        return tuple(result for result in self.results if result.able)

    def summary(self) -> str:
        """Which tasks the model can do."""

        def named(results: Sequence[TaskResult]) -> str:
            names = [
                f"{one.task.name} ({'–' if one.accuracy is None else f'{one.accuracy.value:.2f}'})" for one in results
            ]
            return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")

        others = [result for result in self.results if not result.able]
        lines = [
            f"{self.model}: {len(self.able)} of {len(self)} tasks can be done (right on at least {self.threshold:.0%})",
            *([f"  can: {named(self.able)}"] if self.able else []),
            *([f"  cannot: {named(others)}"] if others else []),
        ]
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, Any]]:
        """Each task's `to_json`."""
        return [result.to_json() for result in self.results]

    def rows(self) -> list[dict[str, Any]]:
        """One row per task and wording."""
        return [_figures_of(result) for result in self.results]

    def cells(self) -> list[list[str]]:
        """A row of text for each task and split, as the table has them."""
        return [_cells(result) for result in self.results]

    def __str__(self) -> str:
        rows = [list(_COLUMNS), ["-" * len(column) for column in _COLUMNS], *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS) - 1)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        ]
        refused = self.refused_lines()
        if refused:
            lines += ["", "Left out:", *(f"  {line}" for line in refused)]
        return "\n".join(lines)

    def refused_lines(self) -> list[str]:
        """What was refused and what could not be tried, a line for each task that has such a thing."""
        lines: list[str] = []
        for task in dict.fromkeys(result.task for result in self.results):
            own = [result for result in self.results if result.task == task]
            counts: Counter[str] = Counter()
            for result in own:
                counts.update({} if result.accuracy is None else result.accuracy.refusals)
            said = [f"{count} × {reason}" for reason, count in counts.most_common()]
            # the same reason for both splits is said once
            said += dict.fromkeys(f"not tried: {result.reason}" for result in own if result.accuracy is None)
            if task.note:
                said.append(task.note)
            if said:
                lines.append(f"{task.name}: " + "; ".join(said))
        return lines

    def sections(self) -> list[tuple[str, str, Markup]]:
        """Heading, text and drawing of: the shares right with intervals, the whole table, what was refused."""
        bars = [
            bar
            for result in self.results
            if result.accuracy is not None
            for bar in result.accuracy.bars(f"{result.task.name}, {_wording(result)}")
        ]
        sections: list[tuple[str, str, Markup]] = [
            (
                "How often it is right",
                "The share of prompt pairs on which the model is right on the clean and on the corrupt prompt, with "
                "the 95 % Wilson interval. A model that always gives the same answer is right on none. Hollow: the "
                "share that would be right with the prompts of all pairs shuffled.",
                intervals_svg(groups=[bars], title="share of pairs right", units="share of pairs")
                if bars
                else Markup(""),
            ),
            (
                "Every figure",
                "Logit difference: right minus wrong answer after the clean prompt, mean with its bootstrap interval; "
                "after the corrupt prompt it should be lower. P difference: of the probabilities. Where several "
                "answers are right (every later year), all of them together. A task can be done when at least "
                f"{self.threshold:.0%} of its pairs are right.",
                table_html(columns=_COLUMNS, rows=self.cells(), title="Tasks and scores"),
            ),
        ]
        refused = self.refused_lines()
        if refused:
            rows = [line.split(": ", 1) for line in refused]
            text = (
                "A pair is used only if its two prompts are as long, token for token, and its answers can be told "
                "apart."
            )
            drawn = table_html(columns=("task", "what and why"), rows=rows, title="Left out")
            sections.append(("Left out", text, drawn))
        return sections

    def drawing(self) -> Markup:
        """The shares right, every figure as a table, what was left out."""
        return Markup("").join(drawn for _, _, drawn in self.sections())


def _wording(result: TaskResult) -> str:
    return "held out" if result.split == "held_out" else "search"


def _figures_of(result: TaskResult) -> dict[str, Any]:
    measured = result.accuracy
    low, high = (None, None) if measured is None else measured.interval
    ends = (None, None) if measured is None else measured.logit_difference_interval
    return {
        "task": result.task.name,
        "split": result.split,
        "able": result.able,
        "reason": result.reason,
        "n": 0 if measured is None else measured.n,
        "value": None if measured is None else measured.value,
        "low": low,
        "high": high,
        "shuffled": None if measured is None else measured.control,
        "logit_difference": None if measured is None else measured.logit_difference,
        "logit_difference_low": ends[0],
        "logit_difference_high": ends[1],
        "corrupt_logit_difference": None if measured is None else measured.corrupt_logit_difference,
        "probability_difference": None if measured is None else measured.probability_difference,
    }


def _cells(result: TaskResult) -> list[str]:
    measured, wording = result.accuracy, _wording(result)
    if measured is None:
        return [result.task.name, wording, "0", *([""] * 5), "not tried"]
    spread = measured.logit_difference_interval
    ends = "[one pair: no interval]" if isnan(spread[0]) else interval_text(spread, 2)
    return [
        result.task.name,
        wording,
        str(measured.n),
        f"{measured.value:.2f} {interval_text(measured.interval, 2)}",
        "" if measured.control is None else f"{measured.control:.2f}",
        f"{measured.logit_difference:.2f} {ends}",
        f"{measured.corrupt_logit_difference:.2f}",
        f"{measured.probability_difference:.2f}",
        "yes" if result.able else "too few pairs" if result.reason.startswith("only ") else "no",
    ]


def try_task(
    lm: LanguageModel,
    task: Task,
    *,
    n: int = 40,
    threshold: float = ABLE,
    least: int = 8,
    seed: int = 0,
    split: Split = "search",
) -> TaskResult:
    """Try one task on the model.

    Args:
        lm: The model.
        task: One of `cutaway.data.TASKS`, or your own.
        n: Pairs to draw.
        threshold: The share of pairs that the model must be right on to be able.
        least: With fewer readable pairs than this the task is not judged.
        seed: Of the draw of pairs.
        split: Wording to search with ("search"), or kept for judging what was found ("held_out").

    Returns:
        The pairs and the accuracy, or why it could not be tried.
    """
    try:
        pairs = readable_pairs(lm, task, n, seed, split)
    except CutawayError as error:
        return TaskResult(task, None, None, str(error), split)
    measured = task_accuracy(lm, pairs, criterion=task.criterion)
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
    threshold: float = ABLE,
    least: int = 8,
    seed: int = 0,
    split: Split = "search",
) -> TaskResults:
    """Try every task on the model, each as `try_task` does.

    Args:
        lm: The model.
        tasks: Default: those of `cutaway.data.TASKS`.
        n: Pairs to draw of each.
        threshold: The share of pairs that the model must be right on to be able.
        least: With fewer readable pairs than this a task is not judged.
        seed: Of the draw of pairs.
        split: Wording to search with ("search"), or kept for judging what was found ("held_out").

    Returns:
        A sequence in the order of `tasks`; a task that is not able has its reason ("right on 3 of 20 ...").

    Example:
        >>> task = cutaway.data.known_task("world indirect object")
        >>> try_tasks(cutaway.load("atlas"), [task], n=8)[0].able
        True
    """
    tried = [try_task(lm, task, n=n, threshold=threshold, least=least, seed=seed, split=split) for task in tasks]
    return TaskResults(lm.name, tuple(tried), threshold)

"""Can the model do the task at all? Asked before any question about how it does it."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CannotDoTask
from cutaway.artifacts.results import interval_text
from cutaway.artifacts.statistics import bootstrap_interval, wilson_interval
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.draw.charts import Bar
from cutaway.draw.intervals import intervals_svg
from cutaway.draw.result import Result
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens

Criterion = Literal["preferred", "top1"]
ABLE = 0.8
"""The smallest share of pairs that a model must be right on for a question about how it does them to mean anything."""
_DEALS = 8


@dataclass(frozen=True, repr=False)
class TaskAccuracy(Result):
    """How often a model is right on n items.

    An item is one prompt pair, and right when the model is right on its clean prompt *and* on its corrupt prompt
    (whose right answer is the pair's `wrong`), so that a constant answer scores 0. Right means: the answer's logit is
    above the wrong answer's ("preferred"), or the answer is the most probable token ("top1"). Where a pair has several
    answers, all right ones together stand against all wrong ones. After the corrupt prompt of a pair that is not
    symmetric, which has no answer of its own, right means that the answer is less likely than after the clean one:
    its logit difference is smaller. Intervals of differences are 95 %, bootstrap over pairs.
    """

    title: ClassVar[str] = "Task accuracy"

    criterion: Criterion
    """When an answer is right: "preferred" or "top1"."""
    items: Tensor
    """Which pairs are right on both prompts, bool [n]."""
    clean: float
    """The share of clean prompts that are right."""
    corrupt: float
    """The share of corrupt prompts that are right."""
    logit_difference: float
    """Mean, after the clean prompt, of the answer's logit minus the wrong answer's (of several answers: the log of
    their summed probability)."""
    logit_difference_interval: tuple[float, float]
    """Its ends."""
    corrupt_logit_difference: float
    """The same after the corrupt prompt, where it should be lower."""
    corrupt_logit_difference_interval: tuple[float, float]
    """Its ends."""
    probability_difference: float
    """The same of the probabilities, after the clean prompt."""
    probability_difference_interval: tuple[float, float]
    """Its ends."""
    refused: int
    """Pairs that do not align and were left out."""
    refusals: Mapping[str, int]
    """Why, with the count of each reason."""
    control: float | None = None
    """The share of pairs that would be right if all prompts, clean and corrupt, were dealt out anew (mean of eight
    deals; None for a single pair): a quarter, where every pair decides between the same two words."""

    @property
    def n(self) -> int:
        """How many pairs were tried."""
        return len(self.items)

    @property
    def right(self) -> int:
        """How many of them are right on both prompts."""
        return int(self.items.sum())

    @property
    def value(self) -> float:
        """The share that is right on both prompts."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `value`."""
        return wilson_interval(self.right, self.n)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data; which items are right is not among them."""
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

    def summary(self) -> str:
        """The share that is right beside shuffled prompts, and the differences of right and wrong answer."""
        shuffled = "" if self.control is None else f"; with shuffled prompts {self.control:.2f}"
        lines = [f"{self} by {self.criterion!r}{shuffled}"]
        for name, value, low, high in list(self._figures())[3:6]:
            lines.append(f"  {name}: {value:.2f} {interval_text((low, high), 2)}")
        return "\n".join([*lines, *([f"  {self.refused} pairs do not align and are left out"] if self.refused else [])])

    def _figures(self) -> Iterator[tuple[str, float, float, float]]:
        """Each figure's name, value and ends of its interval."""
        shares = (("right on both prompts", self.value), ("clean right", self.clean), ("corrupt right", self.corrupt))
        for name, share in shares:
            yield name, share, *wilson_interval(round(share * self.n), self.n)
        yield "logit difference", self.logit_difference, *self.logit_difference_interval
        yield "logit difference, corrupt", self.corrupt_logit_difference, *self.corrupt_logit_difference_interval
        yield "probability difference", self.probability_difference, *self.probability_difference_interval
        if self.control is not None:
            yield "right with shuffled prompts", self.control, float("nan"), float("nan")

    def rows(self) -> list[dict[str, Any]]:
        """One row per figure: its value and interval."""
        names = ("figure", "value", "low", "high")
        return [{**dict(zip(names, figure, strict=True)), "n": self.n} for figure in self._figures()]

    def drawing(self) -> Markup:
        """The share that is right with its interval, and that with shuffled prompts."""
        return intervals_svg(groups=[self.bars("right on both prompts")], title=self.title, units="share of pairs")

    def bars(self, label: str) -> list[Bar]:
        """The share that is right with its interval, and its control, as they are drawn.

        Args:
            label: Its name.
        """
        low, high = self.interval
        controls: list[Bar] = [] if self.control is None else [{"label": "shuffled", "value": self.control}]
        return [{"label": label, "value": self.value, "low": low, "high": high, "controls": controls}]


def task_accuracy(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    *,
    criterion: Criterion = "preferred",
    batch_rows: int = 64,
) -> TaskAccuracy:
    """Measure how often the model answers the pairs rightly, both prompts of each.

    Args:
        lm: The model.
        pairs: Prompt pairs; those that the tokenizer cannot align are left out and counted.
        criterion: When an answer is right: its logit is above the wrong answer's ("preferred"), or it is the most
            probable token ("top1").
        batch_rows: Pairs per forward.

    Returns:
        The share that is right with its interval, beside that of shuffled prompts, and the mean differences of right
        and wrong answer.

    Raises:
        Misaligned: No pair's two prompts match token by token.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> pairs = cutaway.data.readable_pairs(lm, cutaway.data.known_task("world indirect object"), 4)
        >>> task_accuracy(lm, pairs).n
        4
    """
    ready = aligned(lm, pairs)
    parts: list[tuple[Tensor, ...]] = []
    others: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for first in range(0, len(ready), batch_rows):
        part = ready[range(first, min(first + batch_rows, len(ready)))]
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
    return TaskAccuracy(
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
        refused=len(ready.refused),
        refusals=ready.refusals(),
        control=torch.cat(others).float().mean().item() if others else None,
    )


def unable(able: TaskAccuracy, model: str, task: str, *, force: bool, so: str) -> str:
    """That a model cannot do a task (right on less than `ABLE`), in words; "" where it can.

    Raises `CannotDoTask` that says so and what it means (`so`), or with `force` says it on stderr.
    """
    if able.value >= ABLE:
        return ""
    words = f"{model} cannot do {task}: it is {able}"
    if not force:
        raise CannotDoTask(f"{words}. {so}")
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

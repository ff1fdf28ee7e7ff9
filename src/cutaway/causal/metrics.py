"""What a patch is judged by: one number per example, from the logits at the last position.

A metric is a function `(logits [b, V], targets) -> [b]`; anything of that form can stand where these do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Literal

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.pairs import AlignedPairs

PatchDirection = Literal["denoise", "noise"]
"""What is put where: clean activations into the corrupt run ("denoise"), or taken out of the clean run ("noise")."""


@dataclass(frozen=True)
class Targets:
    """What the logits of b examples are compared with."""

    answer: Tensor
    """Token id of the answer [b]."""
    wrong: Tensor
    """Token id of the wrong answer [b]."""
    clean: Tensor
    """The clean run's logits [b, V]."""
    answers: Tensor | None = None
    """All right tokens where a task has several (every later year), bool [b, V]; None where `answer` is it."""
    wrongs: Tensor | None = None
    """All wrong tokens, likewise."""

    def __getitem__(self, rows: Tensor) -> "Targets":
        return Targets(
            self.answer[rows],
            self.wrong[rows],
            self.clean[rows],
            None if self.answers is None else self.answers[rows],
            None if self.wrongs is None else self.wrongs[rows],
        )

    def to(self, device: torch.device) -> "Targets":
        """The same on another device.

        Args:
            device: Where to.
        """
        answers, wrongs = (None if t is None else t.to(device) for t in (self.answers, self.wrongs))
        return Targets(self.answer.to(device), self.wrong.to(device), self.clean.to(device), answers, wrongs)


Metric = Callable[[Tensor, Targets], Tensor]


def targets_of(pairs: AlignedPairs, clean_logits: Tensor) -> Targets:
    """What metrics compare with, from aligned pairs and the clean run's logits at the last position [n, V].

    Args:
        pairs: Aligned pairs, n of them.
        clean_logits: The clean run's logits at the last position [n, V].
    """
    return Targets(pairs.answer, pairs.wrong, clean_logits, pairs.answers, pairs.wrongs)


def logit_difference(logits: Tensor, targets: Targets) -> Tensor:
    """Logit of the answer minus logit of the wrong answer [b].

    Args:
        logits: At the last position [b, V].
        targets: What they are compared with.
    """
    right = logits.gather(-1, targets.answer[:, None])[:, 0]
    wrong = logits.gather(-1, targets.wrong[:, None])[:, 0]
    return (right - wrong).float()


def probability(logits: Tensor, targets: Targets) -> Tensor:
    """Probability of the answer's first distinguishing token [b].

    Args:
        logits: At the last position [b, V].
        targets: What they are compared with.
    """
    return logits.float().softmax(-1).gather(-1, targets.answer[:, None])[:, 0]


def probability_difference(logits: Tensor, targets: Targets) -> Tensor:
    """Probability of all right answers together minus that of all wrong ones together [b].

    Where a task names several answers (greater-than: every later year against every earlier one, Hanna et al. 2023);
    of the answer and the wrong answer alone where it names one of each.

    Args:
        logits: At the last position [b, V].
        targets: What they are compared with.
    """
    p = logits.float().softmax(-1)

    def total(several: Tensor | None, one: Tensor) -> Tensor:
        return p.gather(-1, one[:, None])[:, 0] if several is None else (p * several).sum(-1)

    return total(targets.answers, targets.answer) - total(targets.wrongs, targets.wrong)


def kl_from_clean(logits: Tensor, targets: Targets) -> Tensor:
    """KL(clean || these) in nats over the whole vocabulary [b]. Its gradient at the clean point is zero.

    Args:
        logits: At the last position [b, V].
        targets: What they are compared with.
    """
    clean = targets.clean.float().log_softmax(-1)
    return (clean.exp() * (clean - logits.float().log_softmax(-1))).sum(-1).clamp(min=0)


def nll(logits: Tensor, targets: Targets) -> Tensor:
    """Negative log-probability of the answer in nats [b].

    Args:
        logits: At the last position [b, V].
        targets: What they are compared with.
    """
    return -logits.float().log_softmax(-1).gather(-1, targets.answer[:, None])[:, 0]


def rank(logits: Tensor, targets: Targets) -> Tensor:
    """Place of the answer among all tokens [b]: 1 where no logit is higher, ties at the better place.

    A count has no gradient: what needs one refuses this metric (`differentiable`).

    Args:
        logits: At the last position [b, V].
        targets: What they are compared with.
    """
    own = logits.gather(-1, targets.answer[:, None])
    return 1.0 + (logits > own).sum(-1).float()


METRICS: dict[str, Metric] = {
    "logit_difference": logit_difference,
    "probability": probability,
    "probability_difference": probability_difference,
    "kl": kl_from_clean,
    "nll": nll,
    "rank": rank,
}
_COUNTS = (rank,)
UNITS = {
    "logit_difference": "logits",
    "probability": "probability",
    "probability_difference": "probability",
    "kl": "nats",
    "nll": "nats",
    "rank": "places",
}


def named_metric(metric: str | Metric) -> tuple[str, Metric]:
    """The name and the function of a metric given as either.

    Raises `CutawayError` for a name that there is not, with those that there are.
    """
    if callable(metric):
        known = next((name for name, function in METRICS.items() if function is metric), None)
        if known is not None or hasattr(metric, "_checked"):
            return known or getattr(metric, "__name__", "metric"), metric
        name = getattr(metric, "__name__", "metric")
        return name, _checked(name, metric)
    if metric not in METRICS:
        raise CutawayError(f"no metric is called {metric!r}; there are {', '.join(METRICS)}, or give a function")
    return metric, METRICS[metric]


def _checked(name: str, metric: Metric) -> Metric:
    """A user's function that has to give one number per prompt: anything else would broadcast without a word."""

    @wraps(metric)
    def checked(logits: Tensor, targets: Targets) -> Tensor:
        value = metric(logits, targets)
        shape = tuple(logits.shape[:-1])
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:  # pyright: ignore[reportUnnecessaryIsInstance]
            gave = f"shape {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
            raise CutawayError(
                f"the metric {name} must give a tensor with one number per prompt, {list(shape)}; it gave {gave}"
            )
        return value

    checked._checked = True  # type: ignore[attr-defined]
    return checked


def differentiable(metric: str | Metric) -> bool:
    """Whether a metric of this module has a gradient; of a user's function it is taken for granted."""
    return named_metric(metric)[1] not in _COUNTS


def recovery(patched: Tensor, clean: Tensor, corrupt: Tensor, *, guard: float = 0.1) -> tuple[Tensor, Tensor]:
    """Per-example recovery (patched - corrupt) / (clean - corrupt), and which examples can be judged.

    Args:
        patched: The metric under patches [..., n].
        clean: That of the clean run [n].
        corrupt: That of the corrupt run [n].
        guard: An example whose denominator is below this many times the median denominator (or 1e-6) says nothing,
            since its two prompts hardly differ: it is NaN, and False in the mask [n].
    """
    denominator = clean - corrupt
    usable = denominator.abs() >= max(1e-6, guard * denominator.abs().median().item())
    safe = torch.where(usable, denominator, torch.ones_like(denominator))
    return torch.where(usable, (patched - corrupt) / safe, torch.full_like(patched, float("nan"))), usable


def ratio_of_means(patched: Tensor, clean: Tensor, corrupt: Tensor) -> Tensor:
    """(mean patched - mean corrupt) / (mean clean - mean corrupt) [...], over all n examples of `patched` [..., n].

    The mean of `recovery` weighs every example alike; here one whose prompts differ more counts for more. The two are
    different numbers (Miller, Chughtai & Saunders 2024), and this one needs no guard for single examples.

    Args:
        patched: The metric under patches [..., n].
        clean: That of the clean run [n].
        corrupt: That of the corrupt run [n].
    """
    whole = clean.double().mean() - corrupt.double().mean()
    return ((patched.double().mean(-1) - corrupt.double().mean()) / whole).to(patched.dtype)

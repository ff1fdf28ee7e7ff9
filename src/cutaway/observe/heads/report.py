"""Attention heads: what pattern do they show, and what happens without them?

Scores are read on `[BOS, r_1 .. r_T, r_1 .. r_T]` with random tokens r, so that nothing but repetition can explain a
pattern (Olsson et al. 2022). A pattern is not a cause: `head_report` puts the effect of ablating the same heads beside
the score, and the effect of ablating as many random heads beside that.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NoSuchSite
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.data.tasks.tasks import ordinary_tokens
from cutaway.draw.charts import effects_html
from cutaway.draw.page import Section, sections_html
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result
from cutaway.model.edits.edits import Edit, mean, zero
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.heads.maps import SHARE, head_map, meaning
from cutaway.observe.summaries import block

Head = tuple[int, int]
"""(layer, head), both from 0."""
Ablation = Literal["zero", "mean"]
"""What stands in a head's place: zero, or its mean over the prompts."""
_KINDS = ("previous", "duplicate", "induction")
RunMetric = Callable[[Run], Tensor]
"""A run with its logits to one number per row [b]."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """Mean attention of each head, on n rows of a repeated random sequence of T tokens (Olsson et al. 2022)."""

    title: ClassVar[str] = "Attention heads on repeated random tokens"

    model: str
    """The model's name."""
    previous: Tensor
    """Attention from token i to i - 1 [L, H]."""
    duplicate: Tensor
    """In the second copy, attention to the same token in the first [L, H]."""
    induction: Tensor
    """In the second copy, attention to the token *after* the same token in the first [L, H] (prefix matching)."""
    first_loss: float
    """Mean loss on the first copy, in nats."""
    second_loss: float
    """Mean loss on the second copy, in nats: a model that does induction falls here."""
    n: int
    """How many sequences."""
    length: int
    """T, the tokens of one copy."""

    def top(self, kind: str, k: int = 3) -> list[tuple[Head, float]]:
        """The heads with the largest score of a kind, largest first.

        Args:
            kind: "previous", "duplicate" or "induction".
            k: how many heads.

        Returns:
            ((layer, head), score), k of them.

        Raises:
            CutawayError: an unknown kind.
        """
        if kind not in _KINDS:
            raise CutawayError(f"no head score is called {kind!r}; there are {', '.join(_KINDS)}")
        scores: Tensor = getattr(self, kind)
        values, flat = scores.flatten().topk(min(k, scores.numel()))
        return [
            (divmod(index, scores.shape[1]), value) for index, value in zip(flat.tolist(), values.tolist(), strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "n": self.n,
            "length": self.length,
            "first_loss": self.first_loss,
            "second_loss": self.second_loss,
            **{kind: getattr(self, kind).tolist() for kind in _KINDS},
        }

    def summary(self) -> str:
        """Losses, and the three strongest heads of each kind."""
        lines = [f"heads of {self.model}: loss {self.first_loss:.2f} on random tokens, {self.second_loss:.2f} repeated"]
        for kind in _KINDS:
            lines.append(f"  {kind:<10}" + "  ".join(f"{name(head)} {value:.2f}" for head, value in self.top(kind)))
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row per head: its three scores."""
        layers, heads = self.previous.shape
        return [
            {"layer": i, "head": j, **{kind: getattr(self, kind)[i, j].item() for kind in _KINDS}}
            for i, j in itertools.product(range(layers), range(heads))
        ]

    def drawing(self) -> Markup:
        """A map of the heads per kind."""
        return sections_html(_scores_sections(self))


def name(head: Head) -> str:
    """(3, 7) as L3H7."""
    return f"L{head[0]}H{head[1]}"


def repeated_tokens(lm: LanguageModel, n: int = 8, length: int | None = None, seed: int = 0) -> Tokens:
    """Rows of `[BOS, r_1 .. r_T, r_1 .. r_T]`; without a BOS token, its place has one more random token.

    No token stands twice in one copy.

    Args:
        lm: the model.
        n: how many rows.
        length: T; 50, or what context and vocabulary allow, if None.
        seed: of the random tokens.

    Returns:
        n rows of 2T + 1 tokens.

    Raises:
        CutawayError: a length that does not fit the model.
    """
    ordinary = torch.tensor(ordinary_tokens(lm))
    limit = min((lm.context_length - 1) // 2, len(ordinary) - 1)
    t = min(50, limit) if length is None else length
    if not 2 <= t <= limit:
        raise CutawayError(f"a repeated sequence of {t} tokens does not fit {lm.name}; choose 2 to {limit}")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        drawn = ordinary[torch.randperm(len(ordinary), generator=generator)[: t + 1]]
        start = drawn[:1] if lm.bos_id is None else torch.tensor([lm.bos_id])
        rows.append(torch.cat([start, drawn[1:], drawn[1:]]).tolist())
    return lm.tokens(rows)


def losses(run: Run) -> Tensor:
    """Next-token loss in nats at every position but the last [b, p-1]; padding is not masked."""
    log_p = run.all_logits[:, :-1].float().log_softmax(-1)
    return -log_p.gather(-1, run.tokens.ids[:, 1:, None].to(log_p.device))[..., 0].cpu()


def second_half_loss(run: Run) -> Tensor:
    """Mean loss of each row [b] on the second copy, from its second token on (the first cannot be foreseen).

    Args:
        run: A run on `repeated_tokens`, with all logits.
    """
    t = (run.tokens.ids.shape[1] - 1) // 2
    return losses(run)[:, t + 1 :].mean(-1)


def head_scores(lm: LanguageModel, n: int = 8, length: int | None = None, seed: int = 0) -> HeadScores:
    """Previous-token, duplicate-token and induction score of every head, on repeated random tokens.

    Nothing but position and repetition can explain a pattern there (Olsson et al. 2022, "In-context learning and
    induction heads"). `head_table` puts a control beside each score.

    Args:
        lm: the model.
        n: how many random sequences.
        length: tokens of one copy; 50, or what fits, if None.
        seed: of the random tokens.

    Returns:
        The mean scores of every head, and the losses on the two copies.

    Example:
        >>> head_scores(cutaway.load("atlas"), n=4, length=16).induction.shape  # layers, heads
        torch.Size([8, 8])
    """
    tokens = repeated_tokens(lm, n, length, seed)
    t = (tokens.ids.shape[1] - 1) // 2
    first, second = 0.0, 0.0
    sums = {kind: torch.zeros(lm.n_layers, lm.n_heads, dtype=torch.float64) for kind in _KINDS}
    for row in range(0, n, 4):  # patterns are [L, b, H, p, p]: a few rows at a time
        part = tokens[list(range(row, min(row + 4, n)))]
        run = lm.run(part, capture="blocks.*.attn.pattern", logits="all")
        loss = losses(run)
        first += loss[:, :t].mean(-1).sum().item()
        second += second_half_loss(run).sum().item()
        for layer in range(lm.n_layers):
            scored = _pattern_scores(run[f"blocks.{layer}.attn.pattern"].double().cpu(), t)
            for kind in _KINDS:
                sums[kind][layer] += scored[kind].sum(0)
    means = {kind: (value / n).float() for kind, value in sums.items()}
    return HeadScores(lm.name, **means, first_loss=first / n, second_loss=second / n, n=n, length=t)


def _pattern_scores(pattern: Tensor, t: int) -> dict[str, Tensor]:
    """Mean score of each row and head [b, H] from attention [b, H, 2T+1, 2T+1]."""

    def diagonal(offset: int, start: int) -> Tensor:
        """Mean of pattern[i, i - offset] over i >= start."""
        return pattern.diagonal(-offset, dim1=-2, dim2=-1)[..., start - offset :].mean(-1)

    # the first token of the second copy is at T+1
    return {"previous": diagonal(1, 1), "duplicate": diagonal(t, t + 1), "induction": diagonal(t - 1, t + 1)}


def ablation_edits(lm: LanguageModel, heads: Sequence[Head], means: dict[int, Tensor] | None = None) -> list[Edit]:
    """Edits that replace these heads' outputs z by zero, or by `means[layer]` [H, h]."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < lm.n_layers and 0 <= head < lm.n_heads):
            raise NoSuchSite(f"{lm.name} has no head {name((layer, head))}; it has {lm.n_layers} × {lm.n_heads}")
        by_layer.setdefault(layer, []).append(head)
    edits = []
    for layer, chosen in sorted(by_layer.items()):
        site, order = f"blocks.{layer}.attn.z", sorted(set(chosen))
        edits.append(zero(site, heads=order) if means is None else mean(site, means[layer][order], heads=order))
    return edits


def head_means(lm: LanguageModel, tokens: Tokens) -> dict[int, Tensor]:
    """Mean z of every head over rows and real tokens, per layer [H, h]."""
    run = lm.run(tokens, capture="blocks.*.attn.z", logits=None)
    return {layer: run[f"blocks.{layer}.attn.z"][tokens.mask].mean(0) for layer in range(lm.n_layers)}


def random_heads(lm: LanguageModel, k: int, without: Sequence[Head], generator: np.random.Generator) -> list[Head]:
    """k different heads that are not among `without`."""
    left = [head for head in itertools.product(range(lm.n_layers), range(lm.n_heads)) if head not in set(without)]
    if len(left) < k:
        raise CutawayError(f"{lm.name} has {len(left)} other heads, too few to draw {k} as a control")
    return [left[i] for i in generator.choice(len(left), size=k, replace=False)]


def ablate_heads(
    lm: LanguageModel,
    heads: Sequence[Head],
    tokens: Tokens | None = None,
    metric: RunMetric = second_half_loss,
    *,
    ablation: Ablation = "mean",
    draws: int = 8,
    seed: int = 0,
    units: str = "nats of loss on the second copy",
    without: Sequence[Head] = (),
) -> Effect:
    """How much a metric rises when heads are ablated together, beside random sets of as many other heads.

    Args:
        lm: the model.
        heads: (layer, head) pairs, ablated together.
        tokens: what the model runs on; eight rows of `repeated_tokens` if None.
        metric: a run to one number per row [b]; by default the loss on the second copy.
        ablation: "mean" puts each head's mean over `tokens` in its place; "zero" puts zero, which may be far from
            anything the model ever sees.
        draws: how many random sets of heads.
        seed: of the random sets.
        units: of the metric, for the effect.
        without: heads that no random set holds, besides `heads`.

    Returns:
        The metric's mean change with an interval over rows; its control is the mean over random sets, with an interval
        over sets.

    Raises:
        NoSuchSite: a head that the model has not.
        CutawayError: too few other heads to draw from.
    """
    data = repeated_tokens(lm) if tokens is None else tokens
    base = lm.run(data, capture="blocks.*.resid_pre", logits="all")
    before = metric(base)
    means = head_means(lm, data) if ablation == "mean" else None
    generator = np.random.default_rng(seed)

    def change(chosen: Sequence[Head]) -> Tensor:
        return metric(lm.run(data, edits=ablation_edits(lm, chosen, means), logits="all", resume=base)) - before

    found = change(heads)
    banned = [*heads, *without]
    others = [change(random_heads(lm, len(heads), banned, generator)).mean().item() for _ in range(draws)]
    label = ", ".join(name(head) for head in heads)
    return Effect(
        name=f"ablate {label}",
        value=found.mean().item(),
        n=len(found),
        interval=bootstrap_interval(found.numpy()),
        controls=(
            Control(f"{len(heads)} random heads", float(np.mean(others)), bootstrap_interval(others), draws),
            Control("not ablated", 0.0, None, len(before)),
        ),
        ablation=f"{ablation} ablation",
        units=units,
    )


@dataclass(frozen=True)
class HeadRow:
    """One head: its score of a kind, and the rise of the second-copy loss without it alone."""

    kind: str
    """The kind of score."""
    head: Head
    """(layer, head)."""
    score: float
    """Mean attention to the kind's targets."""
    zero: float
    """Rise of the loss in nats when it is zero."""
    mean: float
    """Rise of the loss in nats when it is at its mean."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadReport(Result):
    """Scores and causes in one table: the top heads of each kind alone, and together beside random heads."""

    title: ClassVar[str] = "Attention heads and what is lost without them"

    scores: HeadScores
    """Scores of every head."""
    heads: tuple[HeadRow, ...]
    """The top heads of each kind, ablated alone."""
    effects: tuple[Effect, ...]
    """The top heads of each kind, ablated together, beside random heads."""

    def summary(self) -> str:
        """The strongest heads, and what is lost without them."""
        return block([*str(self.scores).splitlines(), *self._together()])

    def rows(self) -> list[dict[str, Any]]:
        """One row per head that was ablated alone."""
        return [
            {"kind": r.kind, "layer": r.head[0], "head": r.head[1], "score": r.score, "zero": r.zero, "mean": r.mean}
            for r in self.heads
        ]

    def drawing(self) -> Markup:
        """The maps of the scores, and the effects beside their controls."""
        return sections_html(_report_sections(self))

    def to_json(self) -> dict[str, Any]:
        return {
            "scores": self.scores.to_json(),
            "rows": [
                {"kind": r.kind, "head": list(r.head), "score": r.score, "zero": r.zero, "mean": r.mean}
                for r in self.heads
            ],
            "effects": [effect.to_json() for effect in self.effects],
        }

    def __str__(self) -> str:
        lines = [str(self.scores), f"  {'':<12}{'head':<8}{'score':>7}{'Δloss zero':>12}{'Δloss mean':>12}"]
        lines += [f"  {r.kind:<12}{name(r.head):<8}{r.score:>7.2f}{r.zero:>12.3f}{r.mean:>12.3f}" for r in self.heads]
        return "\n".join([*lines, *self._together()])

    def _together(self) -> list[str]:
        return [
            f"  {effect.name} ({effect.ablation}): {effect.value:.2f} {interval_text(effect.interval, 2)}, "
            f"{effect.controls[0].name} {effect.controls[0].value:.2f}"
            for effect in self.effects
        ]


def head_report(
    lm: LanguageModel,
    top: int = 3,
    kinds: Sequence[str] = ("previous", "induction"),
    *,
    n: int = 8,
    length: int | None = None,
    draws: int = 8,
    seed: int = 0,
) -> HeadReport:
    """Score every head, then ablate the top heads of each kind: alone, and together beside random heads.

    The ablation is measured on other random sequences than the scores. Random heads exclude the top heads of every
    kind asked for.

    Args:
        lm: the model.
        top: how many heads per kind.
        kinds: of "previous", "duplicate", "induction".
        n: how many random sequences.
        length: tokens of one copy; 50, or what fits, if None.
        draws: how many random sets of heads.
        seed: of the random tokens and sets.

    Returns:
        Scores, the heads ablated alone, and ablated together.

    Raises:
        CutawayError: an unknown kind, or too few other heads to draw from.

    Example:
        >>> report = head_report(cutaway.load("atlas"), top=2, draws=4)  # doctest: +SKIP
        >>> report.effects[0].controls[0].name  # doctest: +SKIP
        '2 random heads'
    """
    scores = head_scores(lm, n, length, seed)
    tokens = repeated_tokens(lm, n, length, seed + 1)
    means = head_means(lm, tokens)
    base = lm.run(tokens, capture="blocks.*.resid_pre", logits="all")
    before = second_half_loss(base).mean().item()
    named = [head for kind in kinds for head, _ in scores.top(kind, top)]
    rows: list[HeadRow] = []
    effects: list[Effect] = []
    for kind in kinds:
        chosen = scores.top(kind, top)
        for head, score in chosen:
            alone = [
                second_half_loss(lm.run(tokens, edits=edits, logits="all", resume=base)).mean().item() - before
                for edits in (ablation_edits(lm, [head]), ablation_edits(lm, [head], means))
            ]
            rows.append(HeadRow(kind, head, score, *alone))
        for ablation in ("zero", "mean"):
            heads = [head for head, _ in chosen]
            effects.append(ablate_heads(lm, heads, tokens, ablation=ablation, draws=draws, seed=seed, without=named))
    return HeadReport(scores, tuple(rows), tuple(effects))


def _scores_sections(scores: HeadScores) -> list[Section]:
    """A map per kind."""
    return [
        (f"{kind} heads", f"Mean attention: {meaning(kind)}.", head_map(getattr(scores, kind), "", kind, SHARE))
        for kind in _KINDS
    ]


def _report_sections(report: HeadReport) -> list[Section]:
    """The maps of the scores, the heads ablated alone, and together beside random heads."""
    rows = [[r.kind, name(r.head), *(f"{x:.3f}" for x in (r.score, r.zero, r.mean))] for r in report.heads]
    columns = ("kind", "head", "score", "Δ loss at zero", "Δ loss at its mean")
    alone = table_html(columns=columns, rows=rows, title="Heads ablated alone")
    together = effects_html(replace(effect, name=f"{effect.name} ({effect.ablation})") for effect in report.effects)
    return [
        *_scores_sections(report.scores),
        ("Ablated alone", "Rise of the loss on the second copy, in nats.", alone),
        ("Ablated together", "Beside as many random heads.", together),
    ]

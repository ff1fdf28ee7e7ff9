"""Attention heads: what pattern do they show, and what happens without them?

Scores are read on `[BOS, r_1 .. r_T, r_1 .. r_T]` with random tokens r, so that nothing but repetition can explain a
pattern (Olsson et al. 2022). A pattern is not a cause: `head_report` puts the effect of ablating the same heads beside
the score, and the effect of ablating as many random heads beside that.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.data.tasks.tasks import ordinary_tokens
from cutaway.model.edits.edits import Edit, mean, zero
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens

Head = tuple[int, int]
Ablation = Literal["zero", "mean"]
KINDS = ("previous", "duplicate", "induction")
RunMetric = Callable[[Run], Tensor]


@dataclass(frozen=True)
class HeadScores:
    """Mean attention [L, H] of each head, on n rows of a repeated random sequence of T tokens.

    `previous`: from token i to i-1. `duplicate`: in the second copy, to the same token in the first. `induction`: in
    the second copy, to the token *after* the same token in the first (prefix matching). `first_loss` and `second_loss`
    are the model's mean loss in nats on the two copies: a model that does induction falls on the second.
    """

    model: str
    previous: Tensor
    duplicate: Tensor
    induction: Tensor
    first_loss: float
    second_loss: float
    n: int
    length: int

    def top(self, kind: str, k: int = 3) -> list[tuple[Head, float]]:
        """The k heads with the largest score of a kind ("previous", "duplicate", "induction")."""
        if kind not in KINDS:
            raise CutawayError(f"no head score is called {kind!r}; there are {', '.join(KINDS)}")
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
            **{kind: getattr(self, kind).tolist() for kind in KINDS},
        }

    def __str__(self) -> str:
        lines = [f"heads of {self.model}: loss {self.first_loss:.2f} on random tokens, {self.second_loss:.2f} repeated"]
        for kind in KINDS:
            lines.append(f"  {kind:<10}" + "  ".join(f"{name(head)} {value:.2f}" for head, value in self.top(kind)))
        return "\n".join(lines)


def name(head: Head) -> str:
    """(3, 7) as L3H7."""
    return f"L{head[0]}H{head[1]}"


def repeated_tokens(lm: LanguageModel, n: int = 8, length: int | None = None, seed: int = 0) -> Tokens:
    """n rows of `[BOS, r_1 .. r_T, r_1 .. r_T]`; without a BOS token, its place has one more random token.

    No token stands twice in one copy. `length` is T, by default 50 or what context and vocabulary allow.
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
    assert run.logits is not None
    log_p = run.logits[:, :-1].float().log_softmax(-1)
    return -log_p.gather(-1, run.tokens.ids[:, 1:, None].to(log_p.device))[..., 0].cpu()


def second_half_loss(run: Run) -> Tensor:
    """Mean loss of each row [b] on the second copy, from its second token on (the first cannot be foreseen)."""
    t = (run.tokens.ids.shape[1] - 1) // 2
    return losses(run)[:, t + 1 :].mean(-1)


def head_scores(lm: LanguageModel, n: int = 8, length: int | None = None, seed: int = 0) -> HeadScores:
    """Previous-token, duplicate-token and induction score of every head."""
    tokens = repeated_tokens(lm, n, length, seed)
    t = (tokens.ids.shape[1] - 1) // 2
    first, second = 0.0, 0.0
    sums = {kind: torch.zeros(lm.n_layers, lm.n_heads, dtype=torch.float64) for kind in KINDS}
    for row in range(0, n, 4):  # patterns are [L, b, H, p, p]: a few rows at a time
        part = tokens[list(range(row, min(row + 4, n)))]
        run = lm.run(part, capture="blocks.*.attn.pattern", logits="all")
        loss = losses(run)
        first += loss[:, :t].mean(-1).sum().item()
        second += second_half_loss(run).sum().item()
        for layer in range(lm.n_layers):
            scored = _pattern_scores(run[f"blocks.{layer}.attn.pattern"].double().cpu(), t)
            for kind in KINDS:
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
            raise CutawayError(f"{lm.name} has no head {name((layer, head))}; it has {lm.n_layers} × {lm.n_heads}")
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
    command: str | None = None,
    without: Sequence[Head] = (),
) -> Effect:
    """How much a metric rises when heads are ablated, beside `draws` random sets of as many other heads.

    `metric(run) -> [b]` is one number a row; the effect is its mean change, with an interval over rows. The control is
    the mean over random sets (never holding these heads, nor `without`), with an interval over sets. "mean" puts each
    head's mean over `tokens` in its place; "zero" puts zero, which may be far from anything the model ever sees.
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
        command=command,
    )


@dataclass(frozen=True)
class HeadRow:
    """One head: its score of a kind, and the rise of the second-copy loss (nats) without it alone."""

    kind: str
    head: Head
    score: float
    zero: float
    mean: float


@dataclass(frozen=True)
class HeadReport:
    """Scores and causes in one table: the top heads of each kind alone, and together beside random heads."""

    scores: HeadScores
    heads: tuple[HeadRow, ...]
    effects: tuple[Effect, ...]

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
        for effect in self.effects:
            control = effect.controls[0]
            lines.append(
                f"  {effect.name} ({effect.ablation}): {effect.value:.2f} {interval_text(effect.interval, 2)}, "
                f"{control.name} {control.value:.2f}"
            )
        return "\n".join(lines)


def head_report(
    lm: LanguageModel,
    top: int = 3,
    kinds: Sequence[str] = ("previous", "induction"),
    *,
    n: int = 8,
    length: int | None = None,
    draws: int = 8,
    seed: int = 0,
    command: str | None = None,
) -> HeadReport:
    """Score every head, then ablate the `top` heads of each kind: alone, and together beside random heads.

    The ablation is measured on other random sequences than the scores. Random heads exclude the top heads of every
    kind asked for.
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
            effects.append(
                ablate_heads(
                    lm, heads, tokens, ablation=ablation, draws=draws, seed=seed, command=command, without=named
                )
            )
    return HeadReport(scores, tuple(rows), tuple(effects))

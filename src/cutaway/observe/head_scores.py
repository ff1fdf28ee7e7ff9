"""What a head looks at: scores of every head, each beside what its attention would give by chance.

Most scores are read on `[BOS, r_1 .. r_T, r_1 .. r_T]` with random tokens r (Olsson et al. 2022), so that nothing but
position and repetition can explain a pattern. `text_scores` and `retrieval_scores` read the user's own text: there only
rows (destinations) that *have* a target count, because a row without one would pull a perfect head's score down.

A cell counts only where it is in sight: a sliding window hides far targets, and a hidden target says nothing about a
head. Layers without softmax attention (linear attention, state spaces) have no pattern and are left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Control, Effect
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.heads import Head, name, repeated_tokens

MEANINGS: dict[str, str] = {
    "previous": "attention to the token before",
    "duplicate": "attention to the same token earlier",
    "induction": "attention to the token after the same token earlier (prefix matching)",
    "current": "attention to the token itself",
    "first": "attention to the first token, where heads rest",
    "relative-position": "share of the attention's variation that distance alone foresees",
    "absolute-position": "share of the attention's variation that the two positions alone foresee",
    "induction-copying": "share of the logits it raises that goes to the token that followed last time",
    "copying": "OV eigenvalues, Σλ / Σ|λ|: 1 raises each token it reads, −1 lowers it",
}
LEAST: dict[str, float] = {
    "relative-position": 0.5,
    "absolute-position": 0.5,
    "induction-copying": 0.05,
    "copying": 0.5,
}
"""The least score that carries a label (0.1 where it is not here), beside the rule that it be above its control."""
LEAST_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class KindScores:
    """One kind of score for every head, and the same head's control.

    `score` is [L, H], the mean over `n` sequences, with its 95 % bootstrap interval over sequences `low`, `high`;
    `control`, `control_low`, `control_high` likewise (`control_name` says of what). NaN: the layer has no such value,
    or no row has its target in sight. `rows` is the number of destinations that counted, over all sequences, `uniform`
    [L] what attention spread evenly over all that is in sight would score (None where that makes no sense).
    """

    kind: str
    score: Tensor
    low: Tensor
    high: Tensor
    control: Tensor
    control_low: Tensor
    control_high: Tensor
    control_name: str
    n: int
    rows: int
    uniform: Tensor | None = None
    units: str = "share of attention"

    @property
    def least(self) -> float:
        """The least score that carries the label."""
        return LEAST.get(self.kind, LEAST_SHARE)

    def labelled(self) -> Tensor:
        """Which heads carry the label [L, H]: the score is at least `least`, and the lower end of its interval lies
        above the upper end of its control's. A score without an interval (one sequence) labels nothing.
        """
        return (self.score >= self.least) & (self.low > self.control_high)

    def heads(self) -> list[Head]:
        """The labelled heads, largest score first."""
        chosen = self.labelled()
        return [head for head, _ in self.top(self.score.numel()) if chosen[head]]

    def top(self, k: int = 3) -> list[tuple[Head, float]]:
        """The k heads with the largest score; heads without one are left out."""
        values, flat = self.score.nan_to_num(-torch.inf).flatten().sort(descending=True, stable=True)
        kept = [(i, v) for i, v in zip(flat.tolist(), values.tolist(), strict=True) if v > -torch.inf][:k]
        return [(divmod(i, self.score.shape[1]), v) for i, v in kept]

    def effect(self, head: Head, command: str | None = None) -> Effect:
        """One head's score as a value with its evidence."""
        controls = [
            Control(
                self.control_name,
                self.control[head].item(),
                _pair(self.control_low[head], self.control_high[head]),
                self.n,
            )
        ]
        if self.uniform is not None:
            controls.append(Control("even attention", self.uniform[head[0]].item()))
        return Effect(
            name=f"{self.kind} score of {name(head)}",
            value=self.score[head].item(),
            n=self.n,
            interval=_pair(self.low[head], self.high[head]),
            controls=tuple(controls),
            ablation="none",
            units=self.units,
            command=command,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as lists; NaN becomes None."""
        grids = ("score", "low", "high", "control", "control_low", "control_high")
        return {
            "kind": self.kind,
            "meaning": MEANINGS.get(self.kind, ""),
            "units": self.units,
            "n": self.n,
            "rows": self.rows,
            "least": self.least,
            "control_name": self.control_name,
            **{grid: _lists(getattr(self, grid)) for grid in grids},
            "uniform": None if self.uniform is None else _lists(self.uniform),
            "labelled": [list(head) for head in self.heads()],
        }

    def __str__(self) -> str:
        best = "  ".join(f"{name(head)} {value:.2f}" for head, value in self.top())
        return f"{self.kind}: {best} ({self.n} sequences, {self.rows} rows; control: {self.control_name})"


def _pair(low: Tensor, high: Tensor) -> tuple[float, float] | None:
    return None if bool(low.isnan()) else (low.item(), high.item())


def _lists(values: Tensor) -> Any:
    """A tensor as nested lists, NaN as None."""
    if values.ndim > 1:
        return [_lists(row) for row in values]
    return [None if value != value else value for value in values.tolist()]


def attention_layers(lm: LanguageModel) -> tuple[list[int], dict[int, str]]:
    """Layers whose attention patterns can be read, and why the others' cannot.

    Raises CutawayError when no layer has a pattern.
    """
    absent = {
        layer: reason
        for layer in range(lm.n_layers)
        if (reason := lm.sites()._by_name[f"blocks.{layer}.attn.pattern"].absent) is not None
    }
    layers = [layer for layer in range(lm.n_layers) if layer not in absent]
    if not layers:
        raise CutawayError(f"{lm.name} has no attention pattern in any layer: {next(iter(absent.values()))}.")
    return layers, absent


# Means over sequences ----------------------------------------------------------------------------------------------


def ratio_interval(
    above: Tensor, below: Tensor, *, n_resamples: int = 2000, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ above / Σ below over sequences, and its 95 % percentile bootstrap interval over sequences.

    Both are [n, ...]; NaN where Σ below is 0, and no interval (NaN) for fewer than two sequences. Draws are those of
    `artifacts.statistics.bootstrap_interval`, for every column at once.
    """
    above, below = above.double(), below.double().expand_as(above)
    total = below.sum(0)
    value = above.sum(0) / total
    n = len(above)
    if n < 2:
        nothing = torch.full_like(value, torch.nan)
        return value, nothing, nothing
    drawn = np.random.default_rng(seed).integers(0, n, (n_resamples, n))
    weights = torch.zeros(n_resamples, n, dtype=torch.float64)
    weights.scatter_add_(1, torch.from_numpy(drawn), torch.ones(n_resamples, n, dtype=torch.float64))
    flat_above, flat_below = above.reshape(n, -1), below.reshape(n, -1)
    ends = torch.empty(2, flat_above.shape[1], dtype=torch.float64)
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    for start in range(0, flat_above.shape[1], 512):  # [draws, columns] at a time
        part = slice(start, start + 512)
        ratios = (weights @ flat_above[:, part]) / (weights @ flat_below[:, part])
        ends[:, part] = torch.nanquantile(ratios, levels, dim=0)
    low, high = ends.reshape(2, *value.shape)
    return value, low, high


class _Sums:
    """Numerators and denominators of a score and of its control, one entry a sequence: [n, L, H]."""

    def __init__(self, n: int, lm: LanguageModel) -> None:
        shape = (n, lm.n_layers, lm.n_heads)
        self.above, self.below, self.control_above, self.control_below = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(4)
        )
        self.uniform = torch.zeros(n, lm.n_layers, dtype=torch.float64)

    def scores(self, kind: str, control_name: str, units: str = "share of attention", even: bool = True) -> KindScores:
        score, low, high = ratio_interval(self.above, self.below)
        control, control_low, control_high = ratio_interval(self.control_above, self.control_below)
        rows = self.below[:, :, 0]
        return KindScores(
            kind, score, low, high, control, control_low, control_high, control_name,
            n=len(self.above),
            rows=int(rows.sum(0).max()),
            uniform=self.uniform.sum(0) / rows.sum(0) if even else None,
            units=units,
        )  # fmt: skip


# Attention to a target ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TargetAttention:
    """Sums over the rows of each sequence that have a target in sight: [b, H], or [b] where heads share it."""

    mass: Tensor
    elsewhere: Tensor
    rows: Tensor
    elsewhere_rows: Tensor
    even: Tensor


def attention_to(pattern: Tensor, target: Tensor, seen: Tensor, first: Tensor) -> TargetAttention:
    """How much attention goes to the target cells, in the rows that have one.

    `pattern` [b, H, q, k]; `target` and `seen` bool [b, q, k]; `first` [b] is each row's first real column. `elsewhere`
    is what targets moved to other cells of their rows would get (the exact mean over all ways to move them; the first
    token, where heads rest, is no such place), `even` what attention spread over everything in sight would give.
    """
    target = target & seen
    has = target.any(-1)
    size = target.sum(-1).double()
    mass = torch.einsum("bhqk,bqk->bhq", pattern.double(), target.double())
    others = seen & ~target
    others &= torch.arange(seen.shape[-1])[None, None] != first[:, None, None]
    n_others = others.sum(-1)
    movable = has & (n_others > 0)
    moved = torch.einsum("bhqk,bqk->bhq", pattern.double(), others.double()) * (size / n_others.clamp(min=1))[:, None]
    return TargetAttention(
        mass=(mass * has[:, None]).sum(-1),
        elsewhere=(moved * movable[:, None]).sum(-1),
        rows=has.sum(-1).double(),
        elsewhere_rows=movable.sum(-1).double(),
        even=(size / seen.sum(-1).clamp(min=1) * has).sum(-1),
    )


def in_sight(pattern: Tensor, mask: Tensor) -> Tensor:
    """Cells that the layer's mask leaves open, [b, q, k]: some head of the layer puts weight there."""
    real = mask[:, :, None] & mask[:, None, :]
    return (pattern > 0).any(1) & real


def previous_targets(tokens: Tokens) -> Tensor:
    """[b, q, k]: the token before."""
    return _offset(tokens, 1)


def current_targets(tokens: Tokens) -> Tensor:
    """[b, q, k]: the token itself."""
    return _offset(tokens, 0)


def first_targets(tokens: Tokens) -> Tensor:
    """[b, q, k]: the first token, from the third on (to the second it is the token before)."""
    columns = torch.arange(tokens.ids.shape[1])
    start = tokens.first.cpu()[:, None, None]
    return _real(tokens) & (columns[None, None] == start) & (columns[None, :, None] >= start + 2)


def duplicate_targets(tokens: Tokens) -> Tensor:
    """[b, q, k]: every earlier place of the same token."""
    ids = tokens.ids.cpu()
    return _real(tokens) & (ids[:, :, None] == ids[:, None, :]) & _below(tokens)


def induction_targets(tokens: Tokens) -> Tensor:
    """[b, q, k]: every earlier token that follows an earlier place of the same token (never the token itself)."""
    after = torch.nn.functional.pad(duplicate_targets(tokens)[:, :, :-1], (1, 0))
    return after & _below(tokens) & _real(tokens)


def _real(tokens: Tokens) -> Tensor:
    mask = tokens.mask.cpu()
    return mask[:, :, None] & mask[:, None, :]


def _below(tokens: Tokens) -> Tensor:
    p = tokens.ids.shape[1]
    return torch.ones(p, p, dtype=torch.bool).tril(-1)


def _offset(tokens: Tokens, back: int) -> Tensor:
    p = tokens.ids.shape[1]
    return _real(tokens) & torch.ones(p, p, dtype=torch.bool).tril(-back).triu(-back)


TARGETS: dict[str, Callable[[Tokens], Tensor]] = {
    "previous": previous_targets,
    "duplicate": duplicate_targets,
    "induction": induction_targets,
    "current": current_targets,
    "first": first_targets,
}


def text_scores(lm: LanguageModel, inputs: Inputs, kinds: Sequence[str] = tuple(TARGETS)) -> dict[str, KindScores]:
    """Attention of every head to each kind's target on the user's own text, over rows that have a target.

    A target may be several cells (a token that stood in five places): their attention is summed. The control moves the
    targets to other cells of the same rows. On natural text repeated words also tend to be near and frequent, so a
    score above its control is weaker evidence than one on random tokens (`repeated_scores`).

    Raises CutawayError for an unknown kind, and when no row of the text has a target of some kind.
    """
    tokens = lm.tokens(inputs)
    for kind in kinds:
        if kind not in TARGETS:
            raise CutawayError(f"no score on text is called {kind!r}; there are {', '.join(TARGETS)}")
    return _targeted(lm, tokens, {kind: TARGETS[kind](tokens) for kind in kinds})


def retrieval_scores(
    lm: LanguageModel,
    inputs: Inputs,
    needle: str | Tensor | Sequence[Sequence[int]],
    *,
    queries: Tensor | None = None,
) -> KindScores:
    """Attention of every head from each row's last token to the needle.

    `needle` is a text (every token of its every appearance, by character), a bool mask [b, p], or a list of positions
    for each row; `queries`, bool [b, p], names other destinations than the last token. Rows without a needle before
    them do not count; raises CutawayError when none is left.
    """
    tokens = lm.tokens(inputs)
    mask = needle_mask(tokens, needle)
    if queries is None:
        asked = torch.zeros_like(tokens.mask.cpu())
        asked[torch.arange(len(tokens)), tokens.last.cpu()] = True
    else:
        asked = _as_mask(queries, tokens, "queries")
    target = _real(tokens) & asked[:, :, None] & mask[:, None, :] & _below(tokens)
    return _targeted(lm, tokens, {"retrieval": target})["retrieval"]


def needle_mask(tokens: Tokens, needle: str | Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Bool [b, p] of the needle's tokens: of a text, a mask, or positions row by row (see `retrieval_scores`)."""
    if isinstance(needle, Tensor):
        return _as_mask(needle, tokens, "needle")
    mask = torch.zeros(tuple(tokens.ids.shape), dtype=torch.bool)
    if isinstance(needle, str):
        for row, strings in enumerate(tokens.strings):
            text, place = "".join(strings), 0
            hits = [i for i in range(len(text)) if needle and text.startswith(needle, i)]
            for position, string in enumerate(strings):
                ends = place + len(string)
                if any(place < hit + len(needle) and hit < ends for hit in hits):
                    mask[row, tokens.column(row, position)] = True
                place = ends
        if not bool(mask.any()):
            raise CutawayError(f"The needle {needle!r} stands in none of the prompts; give it as it is written there.")
        return mask
    if len(needle) != len(tokens):
        raise CutawayError(f"The needle has positions for {len(needle)} rows, but there are {len(tokens)} prompts.")
    for row, positions in enumerate(needle):
        for position in positions:
            mask[row, tokens.column(row, int(position))] = True
    return mask


def _as_mask(mask: Tensor, tokens: Tokens, what: str) -> Tensor:
    if mask.shape != tokens.mask.shape or mask.dtype != torch.bool:
        raise CutawayError(
            f"The mask of {what} is a bool tensor of the tokens' shape {tuple(tokens.mask.shape)}; got {mask.dtype} "
            f"{tuple(mask.shape)}."
        )
    return mask.cpu()


def _targeted(lm: LanguageModel, tokens: Tokens, targets: dict[str, Tensor]) -> dict[str, KindScores]:
    layers, _ = attention_layers(lm)
    for kind, target in targets.items():
        if not bool(target.any()):
            raise CutawayError(f"No row of these prompts has a target for the {kind} score, so there is nothing to read.")
    sums = {kind: _Sums(len(tokens), lm) for kind in targets}
    first = tokens.first.cpu()
    for row in range(len(tokens)):  # one prompt's patterns at a time: they are [L, H, p, p]
        part = slice(row, row + 1)
        run = lm.run(tokens[[row]], capture="blocks.*.attn.pattern", logits=None)
        for layer in layers:
            pattern = run[f"blocks.{layer}.attn.pattern"].float().cpu()
            seen = in_sight(pattern, tokens.mask[part].cpu())
            for kind, target in targets.items():
                _add(sums[kind], part, layer, attention_to(pattern, target[part], seen, first[part]))
    return {kind: s.scores(kind, "targets moved within their rows") for kind, s in sums.items()}


def _add(sums: _Sums, rows: slice, layer: int, found: TargetAttention) -> None:
    sums.above[rows, layer] = found.mass
    sums.below[rows, layer] = found.rows[:, None].expand_as(found.mass)
    sums.control_above[rows, layer] = found.elsewhere
    sums.control_below[rows, layer] = found.elsewhere_rows[:, None].expand_as(found.mass)
    sums.uniform[rows, layer] = found.even


# On repeated random tokens -----------------------------------------------------------------------------------------


def repeated_scores(
    lm: LanguageModel, n: int = 8, length: int | None = None, seed: int = 0, tokens: Tokens | None = None
) -> dict[str, KindScores]:
    """Every kind of score but `copying`, on n repeated random sequences of `length` tokens (`repeated_tokens`).

    - previous, duplicate, induction, current: mean A[i, i-1]; A[i, i-T], A[i, i-T+1] (i in the second copy); A[i, i].
      Control: the distance, other than these four, at which the same head looks most in the same rows.
    - first: mean A[i, 0] from the third token on. Control: the other column at which the head looks most.
    - relative-, absolute-position: see `position_scores`.
    - induction-copying: see `copied_share`. Control: the mean share of the other tokens.

    Raises CutawayError for fewer than two sequences: position needs others to be foreseen from.
    """
    tokens = repeated_tokens(lm, n, length, seed) if tokens is None else tokens
    n = len(tokens)
    if n < 2:
        raise CutawayError("Scores on random tokens need at least 2 sequences, for their intervals.")
    layers, _ = attention_layers(lm)
    t = (tokens.ids.shape[1] - 1) // 2
    sums = {kind: _Sums(n, lm) for kind in (*TARGETS, "induction-copying")}
    spectra: dict[str, Tensor] = {}
    first_copies: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    targets = {kind: TARGETS[kind](tokens) for kind in TARGETS}
    for start in range(0, n, 4):  # patterns are [L, b, H, p, p]: a few rows at a time
        rows = slice(start, min(start + 4, n))
        part = tokens[rows]
        run = lm.run(part, capture=["blocks.*.attn.pattern", "blocks.*.attn.z"], logits=None)
        for layer in layers:
            pattern = run[f"blocks.{layer}.attn.pattern"].float().cpu()
            seen = in_sight(pattern, part.mask.cpu())
            for kind, target in targets.items():
                found = attention_to(pattern, target[rows], seen, part.first.cpu())
                _add(sums[kind], rows, layer, found)
            for kind, spectrum in _spectra(pattern, t).items():
                shape = (n, lm.n_layers, lm.n_heads, spectrum.shape[-1])
                spectra.setdefault(kind, torch.zeros(shape, dtype=torch.float64))[rows, layer] = spectrum
            first_copies[layer].append(pattern[:, :, 1 : t + 1, 1 : t + 1])
            share = copied_share(lm, layer, run[f"blocks.{layer}.attn.z"], part)
            copy = sums["induction-copying"]
            copy.above[rows, layer], copy.below[rows, layer] = share * (t - 1), t - 1.0
            copy.control_above[rows, layer], copy.control_below[rows, layer] = (1 - share) / (t - 1), 1.0
    for kind, spectrum in spectra.items():
        # the place with the largest mean is chosen for each head, which favours the control
        best = spectrum.mean(0).argmax(-1)
        chosen = spectrum.gather(-1, best[None, ..., None].expand(n, -1, -1, 1))[..., 0]
        sums[kind].control_above, sums[kind].control_below = chosen, torch.ones_like(chosen)
    found = {
        kind: sums[kind].scores(kind, "most attended other column" if kind == "first" else "most attended other distance")
        for kind in TARGETS
    }
    copied = sums["induction-copying"].scores("induction-copying", "other tokens", "share of raised logits", even=False)
    found["induction-copying"] = copied
    grid = torch.full((n, lm.n_layers, lm.n_heads, t, t), torch.nan)
    for layer, parts in first_copies.items():
        grid[:, layer] = torch.cat(parts)
    return found | position_scores(grid)


def _spectra(pattern: Tensor, t: int) -> dict[str, Tensor]:
    """Mean attention by distance (for `first`: by column) in each kind's rows [b, H, distances]; places that are a
    kind's own target, and those that fewer than half of the rows reach, are 0. The first token is no place.
    """
    p = pattern.shape[-1]
    i = torch.arange(p)
    back = i[:, None] - i[None, :]  # [q, distance] -> column
    by_distance = pattern.double().gather(-1, back.clamp(min=0).expand_as(pattern)) * (back >= 1)
    own = torch.tensor([0, 1, t - 1, t])

    def mean(cells: Tensor, reach: Tensor, rows: Tensor) -> Tensor:
        count = reach[rows].sum(0)
        kept = count * 2 >= len(rows)
        return cells[:, :, rows].sum(2) / count.clamp(min=1) * kept

    everywhere, second = i[1:], i[t + 1 :]
    spectra = {
        kind: mean(by_distance, back >= 1, rows)
        for kind, rows in (("previous", everywhere), ("current", everywhere), ("duplicate", second), ("induction", second))
    }
    for spectrum in spectra.values():
        spectrum[..., own] = 0.0
    past = (back >= 1) & (i >= 1)[None]  # columns before the row, the first token aside
    spectra["first"] = mean(pattern.double() * past, past, i[2:])
    return spectra


def position_scores(attention: Tensor, seed: int = 0) -> dict[str, KindScores]:
    """How much of a head's attention its positions foresee, when tokens are random and never repeat.

    `attention` [n, L, H, t, t] without the first token. A cell of one sequence is foreseen by the mean of the other
    sequences at the same cell ("absolute-position"), or by their mean at the same distance ("relative-position"):
    1 - Σ(A - Â)² / Σ(A - Ā)², with Ā the row's mean, summed over rows of two cells and more (below 0: worse than Ā). The
    control foresees with the cells of each row shuffled. NaN where a head looks nowhere but at the first token.
    """
    n, _, _, t, _ = attention.shape
    a = attention.double()
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    causal[0] = False
    count = causal.sum(-1).clamp(min=1)
    a = a * causal
    row_mean = a.sum(-1, keepdim=True) / count[:, None]
    total = ((a - row_mean) * causal).pow(2).sum((-1, -2))
    alive = a.sum((-1, -2)) > 1e-4 * (t - 1)  # else only rounding is left to foresee
    others = (a.sum(0, keepdim=True) - a) / (n - 1)
    i = torch.arange(t)
    distance = (i[:, None] - i[None, :]).clamp(min=0)
    by_distance = torch.zeros(*a.shape[:-2], t, dtype=torch.float64)
    index = distance.flatten().expand(*a.shape[:-2], -1)
    by_distance.scatter_add_(-1, index, (others * causal).flatten(-2))
    cells = torch.zeros(t, dtype=torch.float64).scatter_add_(0, distance.flatten(), causal.double().flatten())
    relative = (by_distance / cells.clamp(min=1)).gather(-1, index).unflatten(-1, (t, t))
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.stack(
        [torch.cat([torch.randperm(row + 1, generator=generator), torch.arange(row + 1, t)]) for row in range(t)]
    )
    found = {}
    for kind, foreseen in (("relative-position", relative), ("absolute-position", others)):
        left, control = (
            ((a - guess) * causal).pow(2).sum((-1, -2))
            for guess in (foreseen, foreseen.gather(-1, shuffle.expand_as(foreseen)))
        )
        weight = torch.where(alive, total, torch.nan)
        score, low, high = ratio_interval(weight - left, weight)
        chance, chance_low, chance_high = ratio_interval(weight - control, weight)
        found[kind] = KindScores(
            kind, score, low, high, chance, chance_low, chance_high, "positions shuffled",
            n=n, rows=n * (t - 1), units="share of variation",
        )  # fmt: skip
    return found


def copied_share(lm: LanguageModel, layer: int, z: Tensor, tokens: Tokens) -> Tensor:
    """How much a head's direct effect favours the token that followed last time, [b, H] (after Olsson et al. 2022).

    `z` [b, p, H, h] on repeated tokens. In each row i of the second copy but the last, the head writes z W_O; through
    the final norm's gain and the unembedding that adds c_j to the logit of each of the T tokens. The score is the mean
    of relu(c* - c̄) / Σ_j relu(c_j - c̄) with c* that of the token to come, c̄ the mean of the T. The norm's divisor
    scales all c_j alike and drops out; what later layers make of it is not seen.
    """
    from cutaway.observe.circuits import output_map

    t = (tokens.ids.shape[1] - 1) // 2
    w_o = output_map(lm, layer)
    z = z.to(w_o.device).double()
    shares = []
    for row in range(len(tokens)):
        toward = lm.output_directions(tokens.ids[row, 1 : t + 1]).to(w_o).T  # [d, T]
        added = torch.einsum("phc,hct->hpt", z[row, t + 1 : 2 * t], w_o @ toward)  # rows of tokens 1 .. T-1
        raised = (added - added.mean(-1, keepdim=True)).relu()
        share = raised.diagonal(1, dim1=-2, dim2=-1) / raised.sum(-1).clamp(min=1e-300)
        shares.append(share.mean(-1))
    return torch.stack(shares).cpu()

"""What a head looks at: scores of every head on random tokens, each beside its control.

They are read on `[BOS, r_1 .. r_T, r_1 .. r_T]` with random tokens r (Olsson et al. 2022), so that nothing but position
and repetition can explain a pattern. Layers without softmax attention (linear attention, state spaces) have no pattern
and are left out, with the reason (`kinds.attention_layers`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.heads.circuits import output_map
from cutaway.observe.heads.kinds import KindScores, Sums, attention_layers, paired_p, ratio_interval
from cutaway.observe.heads.report import repeated_tokens
from cutaway.observe.heads.targets import TARGETS, add, attention_to, in_sight, real_cells


def repeated_scores(
    lm: LanguageModel, n: int = 8, length: int | None = None, seed: int = 0, tokens: Tokens | None = None
) -> dict[str, KindScores]:
    """Every kind of score but `copying`, on repeated random sequences (Olsson et al. 2022).

    - previous, duplicate, induction, current: mean A[i, i-1]; A[i, i-T], A[i, i-T+1] (i in the second copy); A[i, i].
      Control: the distance, other than these four, at which the same head looks most in the same rows.
    - first: mean A[i, 0] from the third token on. Control: the other column at which the head looks most.
    - relative-, absolute-position: see `position_scores`.
    - induction-copying: see `copied_share`. Control: the mean share of the other tokens.

    Args:
        lm: the model.
        n: how many random sequences.
        length: tokens of one copy; 50, or what fits, if None.
        seed: of the random tokens.
        tokens: the sequences themselves (as `repeated_tokens` makes them), in place of `n`, `length` and `seed`.

    Returns:
        The scores of every head, by kind.

    Raises:
        NotSupported: a model without attention patterns.
        CutawayError: fewer than two sequences: position needs others to be foreseen from.
    """
    tokens = repeated_tokens(lm, n, length, seed) if tokens is None else tokens
    n = len(tokens)
    if n < 2:
        raise CutawayError("Scores on random tokens need at least 2 sequences, for their intervals.")
    layers, _ = attention_layers(lm, "pattern", "scores", "z")
    t = (tokens.ids.shape[1] - 1) // 2
    sums = {kind: Sums(n, lm) for kind in (*TARGETS, "induction-copying")}
    spectra: dict[str, Tensor] = {}
    first_copies: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    targets = {kind: TARGETS[kind](tokens) for kind in TARGETS}
    sight = _sight(lm, tokens[[0]], layers)  # all sequences are alike in length
    for start in range(0, n, 4):  # patterns are [L, b, H, p, p]: a few rows at a time
        rows = slice(start, min(start + 4, n))
        part = tokens[rows]
        run = lm.run(part, capture=["blocks.*.attn.pattern", "blocks.*.attn.z"], logits=None)
        for layer in layers:
            pattern = run[f"blocks.{layer}.attn.pattern"].float().cpu()
            for kind, target in targets.items():
                found = attention_to(pattern, target[rows], sight[layer].expand(len(part), -1, -1), part.first.cpu())
                add(sums[kind], rows, layer, found)
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
        kind: sums[kind].scores(
            kind, "most attended other column" if kind == "first" else "most attended other distance"
        )
        for kind in TARGETS
    }
    copied = sums["induction-copying"].scores("induction-copying", "other tokens", "share of raised logits", even=False)
    found["induction-copying"] = copied
    grid = torch.full((n, lm.n_layers, lm.n_heads, t, t), torch.nan)
    for layer, parts in first_copies.items():
        grid[:, layer] = torch.cat(parts)
    return found | position_scores(grid)


def _sight(lm: LanguageModel, tokens: Tokens, layers: list[int]) -> dict[int, Tensor]:
    """What each layer's mask leaves open, [1, q, k]."""
    sites = {layer: f"blocks.{layer}.attn.scores" for layer in layers}
    run = lm.run(tokens, capture=list(sites.values()), logits=None)
    return {layer: in_sight(run[site], real_cells(tokens)) for layer, site in sites.items()}


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
        for kind, rows in (
            ("previous", everywhere),
            ("current", everywhere),
            ("duplicate", second),
            ("induction", second),
        )
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
    1 - Σ(A - Â)² / Σ(A - Ā)², with Ā the row's mean, summed over rows of two cells and more (below 0: worse than Ā).
    The control foresees with the cells of each row shuffled. NaN where a head looks nowhere but at the first token.
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
            n=n, destinations=n * (t - 1), units="share of variation",
            p=paired_p(weight - left, weight, weight - control, weight),
        )  # fmt: skip
    return found


def copied_share(lm: LanguageModel, layer: int, z: Tensor, tokens: Tokens) -> Tensor:
    """How much a head's direct effect favours the token that followed last time, [b, H] (after Olsson et al. 2022).

    `z` [b, p, H, h] on repeated tokens. In each row i of the second copy but the last, the head writes z W_O; through
    the final norm's gain and the unembedding that adds c_j to the logit of each of the T tokens. The score is the mean
    of relu(c* - c̄) / Σ_j relu(c_j - c̄) with c* that of the token to come, c̄ the mean of the T. The norm's divisor
    scales all c_j alike and drops out; what later layers make of it is not seen.
    """
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

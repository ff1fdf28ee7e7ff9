"""What a head looks at on real text: scores beside what distance and frequent tokens alone would give.

Random tokens (`head_scores`) leave nothing but repetition to explain a pattern, but some models are never fed anything
like them, and their heads do not show there: a model of characters learns to copy in words. On text every repetition
has other explanations: repeated tokens are near, and what follows them is frequent. So each score stands beside a
control of the same text that has the same distances, places and tokens without the repetition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.heads.kinds import THRESHOLD, KindScores, Sums, attention_layers
from cutaway.observe.heads.maps import ON_TEXT
from cutaway.observe.heads.targets import TARGETS, add, attention_to, in_sight, real_cells

_OF_REPEATS = ("duplicate", "induction")
"""Kinds whose targets hang on the tokens; the others' are places."""


def text_targets(tokens: Tokens, kind: str) -> Tensor:
    """The cells that a kind of head looks for on text, bool [b, q, k].

    As on random tokens (`targets.TARGETS`), but a first token is no duplicate: heads rest there, whatever it is.
    """
    target = TARGETS[kind](tokens)
    if kind not in _OF_REPEATS:
        return target
    columns = torch.arange(target.shape[-1])
    return target & (columns != tokens.first.cpu()[:, None, None])


def text_kinds(tokens: Tokens) -> tuple[str, ...]:
    """The kinds that have a target somewhere in a text."""
    return tuple(kind for kind in TARGETS if bool(text_targets(tokens, kind).any()))


def text_scores(lm: LanguageModel, inputs: Inputs, kinds: Sequence[str] | None = None) -> dict[str, KindScores]:
    """Attention of every head to each kind's targets on the user's own text, over tokens that have a target.

    A token's targets may be several (it stood in five places
    before): their attention is summed. Every sequence's tokens count alike. The controls:

    - previous, current: the other distance at which the head looks most; first: the other column.
    - duplicate, induction: for each target the mean attention to the cells of the same sequence that are no targets,
      at the same distance; or to the same place, from other tokens; for induction also from the same token, to other
      earlier places with the target's token. The largest of these means, head by head. Targets without such cells
      count as the mean of the others.

    The first token of a sequence is in no control. A label takes a score a tenth above its control (`KindScores`).

    Args:
        lm: the model.
        inputs: texts, or rows of token ids.
        kinds: kinds of score; all that the text has targets for if None.

    Returns:
        The scores of every head, by kind; their names end in " (text)".

    Raises:
        CutawayError: an unknown kind, and one that no token of the text has a target of.
    """
    tokens = lm.tokens(inputs)
    kinds = text_kinds(tokens) if kinds is None else tuple(kinds)
    targets: dict[str, Tensor] = {}
    for kind in kinds:
        if kind not in TARGETS:
            raise CutawayError(f"no score on text is called {kind!r}; there are {', '.join(TARGETS)}")
        targets[kind] = text_targets(tokens, kind)
        if not bool(targets[kind].any()):
            raise CutawayError(
                f"No token of these prompts has a target for the {kind} score, so there is nothing to read."
            )
    layers, _ = attention_layers(lm, "pattern", "scores")
    real, first = real_cells(tokens), tokens.first.cpu()
    n, width = tokens.ids.shape
    sums = {kind: Sums(n, lm) for kind in targets}
    repeats = {kind: _Controls(n, lm, 3) for kind in targets if kind in _OF_REPEATS}
    places = {kind: _Controls(n, lm, width) for kind in targets if kind not in _OF_REPEATS}
    for row in range(n):  # one sequence's patterns at a time: they are [L, H, p, p]
        part = slice(row, row + 1)
        sites = [f"blocks.{layer}.attn.{site}" for layer in layers for site in ("pattern", "scores")]
        run = lm.run(tokens[[row]], capture=sites, logits=None)
        for layer in layers:
            pattern = run[f"blocks.{layer}.attn.pattern"].float().cpu()
            seen = in_sight(run[f"blocks.{layer}.attn.scores"], real[part])
            free = seen[0] & (torch.arange(width) != first[row])
            for kind, target in targets.items():
                found = attention_to(pattern, target[part], seen, first[part])
                add(sums[kind], part, layer, found)
                a, wanted = pattern[0].double(), target[row] & seen[0]
                if kind in repeats:
                    controls = [_same_distance(a, wanted, free), _same_place(a, wanted, free)]
                    controls += [_same_token(a, wanted, free, tokens.ids[row].cpu())] if kind == "induction" else []
                    for number, control in enumerate(controls):
                        repeats[kind].put(row, layer, number, control, found.rows[0])
                else:
                    places[kind].spread(row, layer, *_by_place(a, free, kind, int(first[row])))
    for kind, found in (repeats | places).items():
        least = sums[kind].below.sum(0).max() / 2 if kind in places else torch.zeros(())
        sums[kind].control_above, sums[kind].control_below = found.largest(least)
    return {kind: _scores(kind, found) for kind, found in sums.items()}


def _scores(kind: str, sums: Sums) -> KindScores:
    name = {
        "first": "most attended other column",
        "duplicate": "no repeat, but the same distance or place",
        "induction": "no repeat, but the same distance, place or token",
    }.get(kind, "most attended other distance")
    return sums.scores(kind + ON_TEXT, name, margin=THRESHOLD)


class _Controls:
    """Numerators and denominators of several controls, of which each head takes the largest: [n, L, H, controls]."""

    def __init__(self, n: int, lm: LanguageModel, controls: int) -> None:
        shape = (n, lm.n_layers, lm.n_heads, controls)
        self.above, self.below = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)

    def put(self, row: int, layer: int, number: int, control: Tensor | None, rows: Tensor) -> None:
        """One control [H] of a sequence, for so many rows of it; None: it has none."""
        if control is not None:
            self.above[row, layer, :, number] = control
            self.below[row, layer, :, number] = rows

    def spread(self, row: int, layer: int, above: Tensor, below: Tensor) -> None:
        """Attention [H, places] and the number of cells [places]."""
        self.above[row, layer], self.below[row, layer] = above, below.expand_as(above)

    def largest(self, least: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the control that is largest over all sequences, of those with `least` cells or more, [n, L, H]."""
        cells = self.below.sum(0)
        mean = torch.where((cells > 0) & (cells >= least), self.above.sum(0) / cells.clamp(min=1), -1.0)
        best = mean.argmax(-1)[None, ..., None].expand(len(self.above), -1, -1, 1)
        return self.above.gather(-1, best)[..., 0], self.below.gather(-1, best)[..., 0]


def _same_distance(a: Tensor, target: Tensor, free: Tensor) -> Tensor | None:
    """What the targets of `a` [H, q, k] would get at their distances where there is none, summed over all, [H]."""
    p = a.shape[-1]
    back = (torch.arange(p)[:, None] - torch.arange(p)[None]).clamp(min=0)
    others = (free & ~target).tril()
    cells = torch.zeros(p, dtype=torch.float64).scatter_add_(0, back.flatten(), others.double().flatten())
    mass = torch.zeros(len(a), p, dtype=torch.float64)
    mass.scatter_add_(1, back.flatten().expand(len(a), -1), (a * others).flatten(1))
    wanted = torch.zeros(p, dtype=torch.float64).scatter_add_(0, back.flatten(), target.double().flatten())
    return _imputed((mass / cells.clamp(min=1)) @ (wanted * (cells > 0)), wanted[cells > 0].sum(), wanted.sum())


def _same_place(a: Tensor, target: Tensor, free: Tensor) -> Tensor | None:
    """What the targets would get from later rows of which they are no targets, summed over all, [H]."""
    others = (free & ~target).tril(-1)
    cells, wanted = others.sum(0).double(), target.sum(0).double()
    mass = (a * others).sum(1)
    return _imputed((mass / cells.clamp(min=1)) @ (wanted * (cells > 0)), wanted[cells > 0].sum(), wanted.sum())


def _same_token(a: Tensor, target: Tensor, free: Tensor, ids: Tensor) -> Tensor | None:
    """What the targets would get at other earlier places of their token in the same row, summed over all, [H]."""
    same = (ids[:, None] == ids[None]).double()
    others = (free & ~target).tril(-1).double()
    cells = others @ same  # [q, k]: other places of the token at k
    known = target & (cells > 0)
    mass = (a * others) @ same
    return _imputed((mass / cells.clamp(min=1) * known).sum((-1, -2)), known.sum(), target.sum())


def _imputed(total: Tensor, known: Tensor, wanted: Tensor) -> Tensor | None:
    """A sum over the targets that have a control, as if those without one were like them."""
    return total * (wanted / known) if float(known) > 0 else None


def _by_place(a: Tensor, free: Tensor, kind: str, first: int) -> tuple[Tensor, Tensor]:
    """Attention [H, places] and cells [places] at each other distance (for `first`: column); own places have none."""
    p = a.shape[-1]
    rows = torch.arange(p)
    past = free.tril(-1)
    if kind == "first":
        past = past & (rows >= first + 2)[:, None]
        return (a * past).sum(1), past.sum(0).double()
    back = (rows[:, None] - rows[None]).clamp(min=0)
    past = past & (back > 1)
    cells = torch.zeros(p, dtype=torch.float64).scatter_add_(0, back.flatten(), past.double().flatten())
    mass = torch.zeros(len(a), p, dtype=torch.float64)
    mass.scatter_add_(1, back.flatten().expand(len(a), -1), (a * past).flatten(1))
    return mass, cells

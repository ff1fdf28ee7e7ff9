"""Directions by difference of means, and what can be done along one (Arditi et al. 2024, arXiv 2406.11717).

A direction is read at one site and one position of contrasting prompts. Three edits use it:

- `ablate`: project it out of everything that is written to the stream. Its zero need not be the negative class.
- `clamp_to_negative`: from its layer on, let the stream's projection not exceed the negative class's mean.
- `add_direction`: add a multiple of it at its own layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.statistics import auroc
from cutaway.model.edits.edits import Edit, add, clamp, project_out
from cutaway.model.language_model import LanguageModel

INSTRUCTION = "instruction mean"
Position = int | str


@dataclass(frozen=True, eq=False)
class Direction:
    """mean(positive) - mean(negative) at one site and position.

    `vector`, `positive_mean`, `negative_mean` [d], float32. `position` is -1 for the prompt's last token, -2 for the
    one before it, ..., or "instruction mean" for the mean over the prompt's content tokens (no special tokens).
    `auroc` is how well the projection separates the prompts it was read from (in sample). `seed` is set for a random
    direction that stands in as a control.
    """

    site: str
    layer: int
    position: Position
    vector: Tensor
    positive_mean: Tensor
    negative_mean: Tensor
    auroc: float
    n: tuple[int, int]
    seed: int | None = None

    @property
    def norm(self) -> float:
        return self.vector.norm().item()

    @property
    def unit(self) -> Tensor:
        return self.vector / self.vector.norm()

    @property
    def negative_projection(self) -> float:
        """Mean projection of the negative class on the unit direction."""
        return (self.negative_mean @ self.unit).item()

    def random(self, seed: int) -> "Direction":
        """A random direction of the same norm, to stand where this one stands."""
        drawn = torch.randn(self.vector.shape, generator=torch.Generator().manual_seed(seed))
        return replace(self, vector=drawn / drawn.norm() * self.norm, auroc=float("nan"), seed=seed)

    def to_json(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "position": self.position,
            "norm": self.norm,
            "auroc": self.auroc,
            "negative_projection": self.negative_projection,
            "n": list(self.n),
            "seed": self.seed,
        }

    def __str__(self) -> str:
        what = "direction" if self.seed is None else f"random direction {self.seed}"
        return f"{what} at {self.site}, {describe(self.position)}: norm {self.norm:.2f}, AUROC {self.auroc:.2f}"


def describe(position: Position) -> str:
    """A position in words."""
    if isinstance(position, str):
        return f"{position} over the prompt's content tokens"
    return "last token" if position == -1 else f"token {position}"


@dataclass(frozen=True)
class Directions:
    """The directions of several sites and positions, read from the same prompts."""

    items: tuple[Direction, ...]

    def __iter__(self) -> Iterator[Direction]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def get(self, layer: int, position: Position) -> Direction:
        """The direction read at a layer and position."""
        for item in self.items:
            if item.layer == layer and item.position == position:
                return item
        raise CutawayError(f"no direction was read at layer {layer}, {describe(position)}")

    def to_json(self) -> list[dict[str, Any]]:
        return [item.to_json() for item in self.items]

    def __str__(self) -> str:
        return "\n".join(str(item) for item in self.items)


def read_positions(
    lm: LanguageModel, inputs: Any, site: str, positions: Sequence[Position], batch_rows: int = 32
) -> dict[Position, Tensor]:
    """The stream at each position rule, for every prompt and layer: {position: [sites, n, d]} in float32.

    Raises `CutawayError` when a prompt is shorter than a position asks.
    """
    tokens = lm.tokens(inputs)
    special = _special(lm)
    found: dict[Position, list[Tensor]] = {position: [] for position in positions}
    for first in range(0, len(tokens.ids), batch_rows):
        part = tokens[list(range(first, min(first + batch_rows, len(tokens.ids))))]
        run = lm.run(part, capture=site, logits=None)
        stream = run.stack(site).float()  # [sites, b, p, d]
        rows = torch.arange(stream.shape[1], device=stream.device)
        for position in positions:
            if isinstance(position, int):
                if position >= 0 or int(part.lengths.min()) < -position:
                    raise CutawayError(
                        f"position {position} is not in every prompt: positions count from the end (-1 is the last "
                        f"token), and the shortest prompt has {int(part.lengths.min())} tokens"
                    )
                found[position].append(stream[:, rows, part.last + 1 + position])
            elif position == INSTRUCTION:
                content = (part.mask & ~torch.isin(part.ids, special.to(part.ids.device))).to(stream)
                if (content.sum(1) == 0).any():
                    raise CutawayError("a prompt has no content tokens to average over")
                found[position].append((stream * content[None, :, :, None]).sum(2) / content.sum(1)[None, :, None])
            else:
                raise CutawayError(f"no position rule is called {position!r}; use -1, -2, ... or {INSTRUCTION!r}")
    return {position: torch.cat(parts, 1).cpu() for position, parts in found.items()}


def _special(lm: LanguageModel) -> Tensor:
    ids = {i for i in (lm.bos_id, lm.pad_id) if i is not None}
    if lm.tokenizer is not None:
        ids |= set(lm.tokenizer.all_special_ids)
        ids |= {i for i, token in lm.tokenizer.added_tokens_decoder.items() if token.special}
    return torch.tensor(sorted(ids), dtype=torch.long)


def difference_of_means(
    lm: LanguageModel,
    positive: Any,
    negative: Any,
    site: str = "blocks.*.resid_post",
    positions: Sequence[Position] = (-1, -2, -3, INSTRUCTION),
) -> Directions:
    """mean(positive) - mean(negative) at every layer of a site and every position rule.

    `positive` and `negative` are prompts (texts, ids or `Tokens`; for chats `lm.chat_tokens`). Positions count from
    each prompt's end. Raises `CutawayError` for fewer than two prompts on a side.
    """
    tokens = [lm.tokens(side) for side in (positive, negative)]
    if min(len(side.ids) for side in tokens) < 2:
        raise CutawayError("a difference of means needs at least two prompts on each side")
    plus, minus = (read_positions(lm, side, site, positions) for side in tokens)
    names = lm.run(tokens[0][[0]], capture=site, logits=None).sites
    items = []
    for position in positions:
        for i, name in enumerate(names):
            a, b = plus[position][i].double(), minus[position][i].double()
            vector = a.mean(0) - b.mean(0)
            scores = torch.cat([a @ vector, b @ vector]).numpy()
            labels = [True] * len(a) + [False] * len(b)
            items.append(
                Direction(
                    site=name,
                    layer=_layer(name),
                    position=position,
                    vector=vector.float(),
                    positive_mean=a.mean(0).float(),
                    negative_mean=b.mean(0).float(),
                    auroc=auroc(scores, labels),
                    n=(len(a), len(b)),
                )
            )
    return Directions(tuple(items))


def _layer(site: str) -> int:
    parts = site.split(".")
    if parts[0] != "blocks":
        raise CutawayError(f"directions are read in layers; {site!r} is in none")
    return int(parts[1])


def ablate_direction(lm: LanguageModel, direction: Direction) -> list[Edit]:
    """Project the direction out of everything that is written to the stream: embedding, attention, MLPs."""
    sites = ("blocks.0.resid_pre", "blocks.*.attn.out", "blocks.*.mlp.out")
    return [project_out(site, direction.unit) for site in sites]


def clamp_to_negative(lm: LanguageModel, direction: Direction) -> list[Edit]:
    """From the direction's layer on, let the projection not exceed the negative class's mean."""
    last = lm.n_layers - 1
    sites = f"blocks.{{{direction.layer}..{last}}}.resid_post"
    return [clamp(sites, direction.unit, maximum=direction.negative_projection)]


def add_direction(direction: Direction, scale: float) -> list[Edit]:
    """Add `scale` times the direction at its own site, at every token."""
    return [add(direction.site, direction.vector, scale=scale)]

"""Directions by difference of means, and what can be done along one (Arditi et al. 2024, arXiv 2406.11717).

A direction is read at one site and one position of contrasting prompts. Three edits use it:

- `ablate_direction`: take it out of everything that is written to the stream. Zero need not be the negative class.
- `clamp_to_negative`: from its layer on, let the stream's projection not exceed the negative class's mean.
- `add_direction`: add a multiple of it at its own layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.ranking import auroc
from cutaway.draw.result import Result
from cutaway.model.edits.edits import Edit, add, clamp, project_out, scale
from cutaway.model.language_model import Inputs, LanguageModel

INSTRUCTION = "instruction mean"
"""The position rule for the mean over a prompt's content tokens (no special tokens)."""
Position = int | str


@dataclass(frozen=True, eq=False)
class Direction:
    """mean(positive) - mean(negative) at one site and position, float32.

    Attributes:
        site: Where it was read, such as "blocks.3.resid_post".
        layer: The layer of the site.
        position: -1 for the prompt's last token, -2 for the one before it, ..., or "instruction mean" for the mean over
            the prompt's content tokens (no special tokens).
        vector: The difference [d].
        positive_mean: Mean of the positive prompts [d].
        negative_mean: Mean of the negative prompts [d].
        auroc: How well the projection separates the prompts that it was read from (in sample).
        n: Positive and negative prompts.
        seed: Of a random direction that stands here as a control; None for one that was read.
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
        """Length of the vector, in units of the stream."""
        return self.vector.norm().item()

    @property
    def unit(self) -> Tensor:
        """The vector scaled to length 1 [d]."""
        return self.vector / self.vector.norm()

    @property
    def negative_projection(self) -> float:
        """Mean projection of the negative class on the unit direction."""
        return (self.negative_mean @ self.unit).item()

    def along(self, vector: Tensor, seed: int | None = None) -> "Direction":
        """Another vector at this place, scaled to this one's norm: a control to stand in its place.

        Args:
            vector: The vector [d]; its own norm does not matter.
            seed: Of the draw, where the vector is random; None where it is not.
        """
        return replace(self, vector=vector / vector.norm() * self.norm, auroc=float("nan"), seed=seed)

    def random(self, seed: int) -> "Direction":
        """A random direction of the same norm, to stand where this one stands.

        Args:
            seed: Of the draw: the same seed gives the same direction.
        """
        drawn = torch.randn(self.vector.shape, generator=torch.Generator().manual_seed(seed))
        return self.along(drawn, seed)

    def to_json(self) -> dict[str, Any]:
        """The direction's figures, without its vectors."""
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


@dataclass(frozen=True, repr=False)
class Directions(Result):
    """The directions of several sites and positions, read from the same prompts."""

    title = "Directions by difference of means"

    items: tuple[Direction, ...]
    """One for each position and site, positions first."""

    def __iter__(self) -> Iterator[Direction]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def get(self, layer: int, position: Position) -> Direction:
        """The direction read at a layer and position.

        Args:
            layer: The layer of its site, from 0.
            position: -1 for the prompt's last token, -2, ..., or "instruction mean".

        Raises:
            CutawayError: None was read there.
        """
        for item in self.items:
            if item.layer == layer and item.position == position:
                return item
        raise CutawayError(f"no direction was read at layer {layer}, {describe(position)}")

    def to_json(self) -> list[dict[str, Any]]:
        """The figures of each direction, without its vectors."""
        return [item.to_json() for item in self.items]

    def rows(self) -> list[dict[str, Any]]:
        """One row per direction."""
        return [
            {**item.to_json(), "position": describe(item.position), "n": sum(item.n), "layer": item.layer}
            for item in self.items
        ]

    def summary(self) -> str:
        """How many there are, and for each position the layer whose projection separates best."""
        lines = [f"{len(self)} directions, n {sum(self.items[0].n)} prompts; the best of each position by AUROC"]
        for position in dict.fromkeys(item.position for item in self.items):
            lines.append(f"  {max((i for i in self.items if i.position == position), key=lambda i: i.auroc)}")
        return "\n".join(lines[:12])

    def drawing(self) -> Markup:
        """A heat map of AUROC, layer by position."""
        from cutaway.draw.heatmap import heatmap_html

        layers = sorted({item.layer for item in self.items})
        positions = list(dict.fromkeys(item.position for item in self.items))
        return heatmap_html(
            rows=[f"layer {layer}" for layer in layers],
            columns=[describe(position) for position in positions],
            values=[[self.get(layer, position).auroc for position in positions] for layer in layers],
            title="AUROC of the projection on each direction, in sample",
        )

    def __str__(self) -> str:
        return "\n".join(str(item) for item in self.items)


def read_positions(
    lm: LanguageModel, inputs: Inputs, site: str, positions: Sequence[Position], batch_rows: int = 32
) -> dict[Position, Tensor]:
    """The stream at each position rule, for every prompt and layer.

    Args:
        lm: The model.
        inputs: Prompts: texts, ids or `Tokens`; for chats `lm.chat_tokens(...)`.
        site: One site or a wildcard, such as "blocks.*.resid_post".
        positions: -1, -2, ... from each prompt's end, or "instruction mean".
        batch_rows: Prompts per run.

    Returns:
        For each position a tensor [sites, n, d] in float32.

    Raises:
        CutawayError: A prompt is shorter than a position asks, or a rule is unknown.
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
    positive: Inputs,
    negative: Inputs,
    site: str = "blocks.*.resid_post",
    positions: Sequence[Position] = (-1, -2, -3, INSTRUCTION),
) -> Directions:
    """mean(positive) - mean(negative) at every layer of a site and every position rule.

    Args:
        lm: The model.
        positive: Prompts of the behaviour: texts, ids or `Tokens`; for chats `lm.chat_tokens(...)`.
        negative: Prompts without it, as many or not.
        site: Where to read, one site or a wildcard.
        positions: -1, -2, ... from each prompt's end, or "instruction mean"; all four by default.

    Returns:
        A `Direction` for each position and layer.

    Raises:
        CutawayError: Fewer than two prompts on a side, or one that is shorter than a position asks.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> sides = ["She loved it", "A fine film"], ["She hated it", "A bad film"]
        >>> difference_of_means(lm, *sides, positions=(-1,)).get(layer=3, position=-1).n
        (2, 2)
    """
    tokens = [lm.tokens(side) for side in (positive, negative)]
    if min(len(side.ids) for side in tokens) < 2:
        raise CutawayError("a difference of means needs at least two prompts on each side")
    plus, minus = (read_positions(lm, side, site, positions) for side in tokens)
    names = lm.run(tokens[0][[0]], capture=site, logits=None).sites
    return Directions(
        tuple(
            direction_between(plus[position][i], minus[position][i], name, position)
            for position in positions
            for i, name in enumerate(names)
        )
    )


def direction_between(positive: Tensor, negative: Tensor, site: str, position: Position) -> Direction:
    """The direction between activations that were read before (`read_positions`).

    Args:
        positive: Activations of the behaviour [n, d].
        negative: Activations without it [m, d].
        site: Where they were read.
        position: At which position rule.
    """
    a, b = positive.double(), negative.double()
    vector = a.mean(0) - b.mean(0)
    return Direction(
        site=site,
        layer=_layer(site),
        position=position,
        vector=vector.float(),
        positive_mean=a.mean(0).float(),
        negative_mean=b.mean(0).float(),
        auroc=auroc(torch.cat([a @ vector, b @ vector]).numpy(), [True] * len(a) + [False] * len(b)),
        n=(len(a), len(b)),
    )


def _layer(site: str) -> int:
    parts = site.split(".")
    if parts[0] != "blocks":
        raise CutawayError(f"directions are read in layers; {site!r} is in none")
    return int(parts[1])


def ablate_direction(lm: LanguageModel, direction: Direction, strength: float = 1.0) -> list[Edit]:
    """Take the direction out of everything that is written to the stream: embedding, attention, MLPs.

    Args:
        lm: The model.
        direction: The direction; its norm does not matter.
        strength: How many times its component is taken out: 1 leaves none, 2 turns it round.
    """
    sites = ("blocks.0.resid_pre", "blocks.*.attn.out", "blocks.*.mlp.out")
    if strength == 1:
        return [project_out(site, direction.unit) for site in sites]
    return [scale(site, 1 - strength).within(direction.unit[None]) for site in sites]


def clamp_to_negative(lm: LanguageModel, direction: Direction, strength: float = 1.0) -> list[Edit]:
    """From the direction's layer on, let the projection not exceed the negative class's mean.

    Args:
        lm: The model.
        direction: The direction.
        strength: 1 is the negative class's mean; each further 1 moves the bound down by the direction's norm.
    """
    last = lm.n_layers - 1
    bound = direction.negative_projection - (strength - 1) * direction.norm
    return [clamp(f"blocks.{{{direction.layer}..{last}}}.resid_post", direction.unit, maximum=bound)]


def add_direction(direction: Direction, scale: float) -> list[Edit]:
    """Add a multiple of the direction at its own site, at every token.

    Args:
        direction: The direction.
        scale: The multiple, in units of the direction's norm; a negative one goes the other way.
    """
    return [add(direction.site, direction.vector, scale=scale)]

"""What attribution patching returns: a score for every node, beside exact patching of some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import Choices, Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval, false_discovery, mean_intervals, paired_t_p
from cutaway.causal.metrics import PatchDirection
from cutaway.draw.charts import Bar
from cutaway.draw.intervals import intervals_svg
from cutaway.draw.result import Result

Unit = Literal["site", "head", "neuron", "latent"]
_SHOWN = 12
_AT_ONCE = 1000


@dataclass(frozen=True)
class Node:
    """A part of the model at a place: a whole site, or one head, neuron or latent of it."""

    site: str
    """The site, with its layer."""
    head: int | None = None
    """Number of a head of it (a key-value head at keys and values); None: not one head."""
    neuron: int | None = None
    """Number of a neuron of it; None: not one neuron."""
    latent: int | None = None
    """Number of a latent of the site's dictionary; None: not one latent."""
    error: bool = False
    """Whether the node is what that dictionary leaves unexplained."""
    at: str | None = None
    """A column of the scores: a position or a role; None: every token."""

    def __str__(self) -> str:
        words = self.site
        words += "" if self.head is None else f" head {self.head}"
        words += "" if self.neuron is None else f" neuron {self.neuron}"
        words += "" if self.latent is None else f" latent {self.latent}"
        words += " error" if self.error else ""
        return words if self.at is None else f"{words} at {self.at!r}"


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """How scores agree with exact patching of a random sample of nodes.

    They are drawn among those that the two prompts give different values (the others are 0 in both).
    """

    nodes: tuple[Node, ...]
    """The n nodes that were patched exactly."""
    estimated: Tensor
    """Their scores [n], means over the pairs, in units of the metric."""
    exact: Tensor
    """What patching them does to the metric [n], means over the pairs."""
    candidates: int
    """How many nodes they were drawn from."""
    of: Literal["signed", "magnitude"]
    """Whether the change of the metric is compared, or its magnitude, where a method gives only that."""

    title = "Scores beside exact patching"

    @property
    def n(self) -> int:
        """Nodes that were patched exactly."""
        return len(self.nodes)

    @cached_property
    def pearson(self) -> float:
        """Linear correlation; NaN below 3 nodes or where one side is constant."""
        return correlation(self.estimated, self.exact)

    @cached_property
    def spearman(self) -> float:
        """Rank correlation; NaN as for `pearson`."""
        from scipy.stats import rankdata

        ranks = [torch.from_numpy(rankdata(x.double().numpy())) for x in (self.estimated, self.exact)]
        return correlation(*ranks)

    def to_json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "candidates": self.candidates,
            "of": self.of,
            "pearson": _number(self.pearson),
            "spearman": _number(self.spearman),
            "nodes": [str(node) for node in self.nodes],
            "estimated": self.estimated.tolist(),
            "exact": self.exact.tolist(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A node per row."""
        values = zip(self.nodes, self.estimated.tolist(), self.exact.tolist(), strict=True)
        return [{"node": str(node), "estimated": estimate, "exact": exact} for node, estimate, exact in values]

    def drawing(self) -> Markup:
        """The nodes with the largest exact effects: what was estimated, above what patching does."""
        bars: list[Bar] = [
            {
                "label": f"{row['node']}, estimated",
                "value": row["estimated"],
                "controls": [{"label": "patched exactly", "value": row["exact"]}],
            }
            for row in sorted(self.rows(), key=lambda row: -abs(row["exact"]))[:_SHOWN]
        ]
        return intervals_svg(groups=[bars], title=self.title)

    def summary(self) -> str:
        what = "" if self.of == "signed" else " of magnitudes"
        return (
            f"correlation{what} with exact patching: Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f} "
            f"(n {self.n} of {self.candidates} nodes)"
        )


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation; NaN below 3 values or where one side is constant."""
    if len(a) < 3:
        return float("nan")
    x, y = (t.double() - t.double().mean() for t in (a, b))
    norm = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / norm) if float(norm) > 0 else float("nan")


def _number(value: float) -> float | None:
    return None if value != value else value


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores(Result):
    """Scores of nodes for n pairs: estimates of how the metric changes when the other prompt's value is put in."""

    model: str
    """The model's name."""
    method: str
    """How they were made: "atp", "relp", ..."""
    direction: PatchDirection
    """"noise" patches the clean run from the corrupt one, "denoise" the corrupt run from the clean one."""
    metric: str
    """What was asked of the logits."""
    blocks: Mapping[str, Tensor]
    """Scores by site, float32 [columns, units, n], in units of the metric: units are the site's heads (key-value heads
    at keys and values), its neurons, its latents and behind them its error, or 1."""
    units: Mapping[str, Unit]
    """What the units of each site are."""
    columns: tuple[str | None, ...]
    """Token positions or roles, or the single None for every token at once."""
    base: Tensor
    """The metric of the run that is patched [n]."""
    source: Tensor
    """The metric of the run that it is patched from [n]."""
    choices: Choices
    """The six choices that the scores depend on."""
    agreement: Agreement | None = None
    """How the scores compare with exact patching of some nodes."""
    magnitude: bool = False
    """Whether only the size of a change is known, not its sign (AtP* with GradDrop)."""
    notes: tuple[str, ...] = ()
    """What a reader must know of them."""

    title = "Scores of nodes"

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.base)

    @cached_property
    def scores(self) -> Tensor:
        """All scores [nodes, n], in the order of `nodes`."""
        return torch.cat([block.flatten(0, 1) for block in self.blocks.values()])

    @property
    def mean(self) -> Tensor:
        """Mean score of each node over the pairs [nodes]."""
        return self.scores.mean(-1)

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes: site by site, column by column, unit by unit."""
        found: list[Node] = []
        for site, block in self.blocks.items():
            for column in self.columns:
                found += [node_of(site, self.units[site], i, block.shape[1], column) for i in range(block.shape[1])]
        return tuple(found)

    def __len__(self) -> int:
        return sum(block.shape[0] * block.shape[1] for block in self.blocks.values())

    @cached_property
    def _numbers(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.nodes)}

    def number(self, node: Node) -> int:
        """The place of a node in `nodes` and `scores`. Raises CutawayError where it is none of them.

        Args:
            node: A node of `nodes`.
        """
        if node not in self._numbers:
            columns = ", ".join(repr(column) for column in self.columns)
            raise CutawayError(f"there is no node '{node}' here; the sites are {', '.join(self.blocks)} at {columns}")
        return self._numbers[node]

    def top(self, k: int = 10) -> list[Node]:
        """The k nodes with the largest |mean score|, the largest first.

        Args:
            k: How many nodes at most.
        """
        order = self.mean.abs().topk(min(k, len(self))).indices
        return [self.nodes[i] for i in order.tolist()]

    def table(self, site: str) -> Tensor:
        """Mean scores of one site [columns, units].

        Args:
            site: One of the sites in `blocks`.
        """
        if site not in self.blocks:
            raise CutawayError(f"no node stands at '{site}'; the sites are {', '.join(self.blocks)}")
        return self.blocks[site].mean(-1)

    def interval(self, nodes: Sequence[Node], n_resamples: int = 2000, seed: int = 0) -> Tensor:
        """95 % intervals of the mean scores of some nodes [len(nodes), 2]; NaN below 2 pairs.

        Args:
            nodes: Some of `nodes`.
            n_resamples: Bootstrap draws of the pairs.
            seed: Of the draws.
        """
        values = self.scores[[self.number(node) for node in nodes]].double().numpy()
        return torch.from_numpy(mean_intervals(values, n_resamples, seed).T.copy()).float()

    @cached_property
    def p(self) -> Tensor:
        """Two-sided p of each node's mean score [nodes] against 0, by Student's t over pairs; NaN where only the size
        of a score is known. (Signs flipped would give 2 / 2^n at the least, too coarse for so many nodes.)
        """
        if self.magnitude:
            return torch.full((len(self),), torch.nan, dtype=torch.float64)
        return torch.from_numpy(paired_t_p(self.scores.double().numpy()))

    @cached_property
    def q(self) -> Tensor:
        """The rate of false discoveries among all nodes with a p as small [nodes]."""
        return torch.from_numpy(false_discovery(self.p.numpy()))

    def effect(self, node: Node) -> Effect:
        """One node's score as an effect, beside the other nodes of its site and, where it was sampled, exact patching.

        The control is the mean of all other nodes' mean scores at the same site (in the other layers too, where the
        site has one node per layer): what a node chosen at random would show.

        Args:
            node: A node of `nodes`.
        """
        i = self.number(node)
        values = self.scores[i]
        kind = _kind(node.site)
        other = [
            j for j, one in enumerate(self.nodes) if j != i and (one.site == node.site or _kind(one.site) == kind)
        ]  # fmt: skip
        rest = self.mean[other].numpy()
        controls: list[Control] = []
        if len(other):
            controls.append(
                Control("other nodes of this kind", float(rest.mean()), bootstrap_interval(rest), len(rest))
            )
        if self.agreement is not None and node in self.agreement.nodes:
            exact = self.agreement.exact[self.agreement.nodes.index(node)]
            controls.append(Control("exact patching of this node", float(exact), None, self.n))
        return Effect(
            name=f"{self.method} of {node}",
            value=values.mean().item(),
            n=self.n,
            interval=bootstrap_interval(values.numpy()),
            controls=tuple(controls),
            ablation=f"patch from the {'corrupt' if self.direction == 'noise' else 'clean'} run, to first order",
            units=f"{'size of the ' if self.magnitude else ''}change of the {self.metric.replace('_', ' ')}",
            choices=self.choices,
        )

    def _whole(self) -> Any:
        return self.to_json(k=sum(block[..., 0].numel() for block in self.blocks.values()))

    def to_json(self, k: int = 50) -> dict[str, Any]:
        """The k strongest nodes, and what is said of all.

        Args:
            k: How many nodes at most, the strongest.
        """
        top = self.top(k)
        return {
            "model": self.model,
            "method": self.method,
            "direction": self.direction,
            "metric": self.metric,
            "magnitude": self.magnitude,
            "n": self.n,
            "nodes": len(self),
            "columns": list(self.columns),
            "base": self.base.mean().item(),
            "source": self.source.mean().item(),
            "choices": self.choices.to_json(),
            "agreement": None if self.agreement is None else self.agreement.to_json(),
            "notes": list(self.notes),
            "top": [
                {
                    "site": node.site,
                    "head": node.head,
                    "neuron": node.neuron,
                    "latent": node.latent,
                    "error": node.error,
                    "at": node.at,
                    "score": self.mean[self.number(node)].item(),
                    "interval": [_number(end) for end in ends],
                    "p": _number(self.p[self.number(node)].item()),
                    "q": _number(self.q[self.number(node)].item()),
                }
                for node, ends in zip(top, self.interval(top).tolist(), strict=True)
            ],
        }

    def rows(self) -> list[dict[str, Any]]:
        """A node per row, in the order of `nodes`; intervals are 95 % over pairs."""
        ends: list[list[float]] = []
        for first in range(0, len(self), _AT_ONCE):  # a draw of every node at once would fill the memory
            ends += self.interval(self.nodes[first : first + _AT_ONCE]).tolist()
        figures = zip(self.nodes, self.mean.tolist(), ends, self.p.tolist(), self.q.tolist(), strict=True)
        return [
            {**vars(node), "score": score, "low": low, "high": high, "p": p, "q": q}
            for node, score, (low, high), p, q in figures
        ]

    def drawing(self) -> Markup:
        """The nodes with the largest |mean score|, with 95 % intervals over pairs; then the agreement."""
        top = self.top(_SHOWN)
        bars: list[Bar] = [
            {"label": str(node), "value": self.mean[self.number(node)].item(), "low": low, "high": high}
            for node, (low, high) in zip(top, self.interval(top).tolist(), strict=True)
        ]
        title = f"{self.method} of {len(self)} nodes"
        drawn = intervals_svg(groups=[bars], title=title, units=self.metric.replace("_", " "))
        return drawn if self.agreement is None or not self.agreement.n else drawn + self.agreement.drawing()

    def summary(self) -> str:
        ways = ("clean", "corrupt") if self.direction == "noise" else ("corrupt", "clean")
        lines = [
            f"{self.method}, {self.direction}, {self.metric.replace('_', ' ')}: {ways[0]} {self.base.mean():.2f}, "
            f"patched from {ways[1]} {self.source.mean():.2f}; {len(self)} nodes, n {self.n}"
        ]
        lines.append(f"  {self.agreement or 'not compared with exact patching (check=0)'}")
        lines += [f"  {note}" for note in self.notes]
        top = self.top(12 - len(lines))
        for node, (low, high) in zip(top, self.interval(top).tolist(), strict=True):
            ends = interval_text((low, high), 4, signed=True)
            q = self.q[self.number(node)].item()
            lines.append(f"  {self.mean[self.number(node)]:+9.4f}  {ends}  q {'–' if q != q else f'{q:.2g}'}  {node}")
        return "\n".join(lines)


def node_of(site: str, unit: Unit, number: int, units: int, at: str | None) -> Node:
    """Unit `number` of the `units` of a site as a node."""
    match unit:
        case "site":
            return Node(site, at=at)
        case "head":
            return Node(site, head=number, at=at)
        case "neuron":
            return Node(site, neuron=number, at=at)
        case "latent":
            return Node(site, error=True, at=at) if number == units - 1 else Node(site, latent=number, at=at)


def _kind(site: str) -> str:
    return site.split(".", 2)[-1] if site.startswith("blocks.") else site

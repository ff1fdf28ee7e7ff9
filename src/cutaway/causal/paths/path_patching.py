"""Path patching: what does one part of a model tell another, and does it go directly?

Goldowsky-Dill et al. (2023) and Wang et al. (2022). A sender's output is replaced by the one it has on the other
prompt, and only what a receiver reads of that is let through:

1. the original prompt and the other one are run;
2. the original is run with the sender's output set to its new value and every other head's output (`z`) held at its
   original value, and the receiver's input is kept;
3. the original is run with the receiver's input set to what was kept.

In step 2 MLPs compute on (`mlps="recompute"`: a path may lead through MLPs), or are held as the heads are
(`mlps="freeze"`: the receiver's stream changes by the sum of new - original over the senders, and by nothing else).
What the logits read is step 2 itself. Many senders are rows of one forward in step 2, and one sweep in step 3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Choices, Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval, false_discovery, mean_intervals, sign_flip_p_of_each
from cutaway.causal.graph import Graph
from cutaway.causal.metrics import Metric, Targets, logit_difference, named_metric, recovery, targets_of
from cutaway.causal.paths.nodes import Name, Node, Nodes, earlier, end_name, parse, random_others, signature
from cutaway.data.pairs import AlignedPairs, PromptPair, align
from cutaway.model.edits.edits import Edit, patch
from cutaway.model.edits.edits import set as replace_value
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens

Mlps = Literal["recompute", "freeze"]
Direction = Literal["noise", "denoise"]

_ROUNDING = 1e-5


@dataclass(frozen=True)
class PathGrid:
    """What each path moves, senders × receivers, for n pairs.

    `values` [senders, receivers, n] is the share of the difference between the two runs that the path moves: noising,
    (clean - patched) / (clean - corrupt); denoising, (patched - corrupt) / (clean - corrupt). NaN where the receiver
    does not come after the sender, and where a pair's two prompts hardly differ (`dropped` counts those). `random`
    likewise is the control: the mean over `n_random` random senders of the same kind (of any kind, where there is no
    other) into the same receiver. `clean` and `corrupt` [n] are the metric of the two prompts.
    """

    model: str
    n_layers: int
    n_heads: int
    metric: str
    direction: Direction
    mlps: Mlps
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    values: Tensor
    random: Tensor = field(repr=False)
    n_random: Tensor = field(repr=False)
    clean: Tensor
    corrupt: Tensor
    dropped: int

    @property
    def n(self) -> int:
        return int(self.values.shape[-1])

    @property
    def mean(self) -> Tensor:
        """Mean share moved [senders, receivers] over the pairs that can be judged."""
        return self.values.nanmean(-1)

    def interval(self, n_resamples: int = 2000, seed: int = 0) -> Tensor:
        """95 % interval of the mean over pairs [2, senders, receivers]."""
        usable = ~self.values.isnan().all(0).all(0)
        kept = self.values[..., usable].double().numpy()
        return torch.from_numpy(mean_intervals(kept, n_resamples, seed)).float()

    @cached_property
    def p(self) -> Tensor:
        """Two-sided p [senders, receivers] of each path against random other senders, by flipping pairs' signs."""
        difference = (self.values - self.random).double()
        # differences of rounding alone would have a small p
        difference[difference.abs() <= _ROUNDING] = 0.0
        return torch.from_numpy(sign_flip_p_of_each(difference.flatten(0, 1).numpy())).view(difference.shape[:2])

    @cached_property
    def q(self) -> Tensor:
        """The rate of false discoveries [senders, receivers] among all paths with a p as small."""
        return torch.from_numpy(false_discovery(self.p.numpy()))

    def _at(self, sender: str, receiver: str) -> tuple[int, int]:
        if sender not in self.senders or receiver not in self.receivers:
            raise CutawayError(
                f"This grid has no path {sender} → {receiver}; its senders begin with {', '.join(self.senders[:3])}, "
                f"its receivers with {', '.join(self.receivers[:3])}."
            )
        return self.senders.index(sender), self.receivers.index(receiver)

    def effect(
        self, sender: str, receiver: str, *, rows: Sequence[int] | None = None, command: str | None = None
    ) -> Effect:
        """One path, beside random other senders into the same receiver."""
        i, j = self._at(sender, receiver)
        pick = list(range(self.n)) if rows is None else list(rows)
        value, control = self.values[i, j, pick], self.random[i, j, pick]
        if bool(value.isnan().all()):
            raise CutawayError(f"{sender} → {receiver} is no path: {receiver} does not come after {sender}.")
        value, control = value[~value.isnan()].numpy(), control[~control.isnan()].numpy()
        controls = ()
        if len(control):
            named = f"{int(self.n_random[i, j])} random other senders"
            controls = (Control(named, float(control.mean()), bootstrap_interval(control), len(control)),)
        to, of = ("clean", "corrupt") if self.direction == "noise" else ("corrupt", "clean")
        return Effect(
            name=f"{sender} → {receiver}",
            value=float(value.mean()),
            n=len(value),
            interval=bootstrap_interval(value),
            controls=controls,
            ablation=f"what {sender} writes taken from the {of} prompt, in the {to} one, for {receiver} alone",
            units=f"share of the {self.metric.replace('_', ' ')} between the two runs",
            command=command,
            choices=Choices(
                granularity="edge",
                component=f"{sender} → {receiver}, other heads frozen, MLPs "
                + ("recomputed" if self.mlps == "recompute" else "frozen"),
                ablation="resample",
                positions=", ".join(sorted({name.partition("@")[2] or "all" for name in (sender, receiver)})),
                direction=self.direction,
                evaluation=f"{self.n} pairs",
            ),
        )

    def strongest(self, receiver: str, k: int = 5, *, command: str | None = None) -> list[Effect]:
        """The k senders that move most into a receiver, chosen on every second pair, measured on the others.

        Needs at least 8 pairs.
        """
        if self.n < 8:
            raise CutawayError(
                f"{self.n} pairs are too few to choose senders on one half and measure them on the other; give 8"
            )
        j = self._at(self.senders[0], receiver)[1]
        chosen = self.values[:, j, 0::2].nanmean(-1).abs().nan_to_num(-1.0)
        able = [i for i in chosen.argsort(descending=True).tolist() if chosen[i] >= 0][:k]
        return [self.effect(self.senders[i], receiver, rows=range(1, self.n, 2), command=command) for i in able]

    def heads(self, receiver: str) -> Tensor:
        """Mean share moved by each head [layers, heads], NaN where the head is no sender or not earlier."""
        j = self._at(self.senders[0], receiver)[1]
        table = torch.full((self.n_layers, self.n_heads), torch.nan)
        for i, name in enumerate(self.senders):
            layer, _, head = name.partition("@")[0].removeprefix("L").partition("H")
            if layer.isdigit() and head.isdigit():
                table[int(layer), int(head)] = self.mean[i, j]
        return table

    def heatmap(self, receiver: str) -> Markup:
        """An SVG heatmap of `heads`."""
        from cutaway.draw.heatmap import heatmap_svg

        rows = [[None if math.isnan(value) else value for value in row] for row in self.heads(receiver).tolist()]
        return heatmap_svg(
            rows=[f"L{layer}" for layer in range(self.n_layers)],
            columns=[f"H{head}" for head in range(self.n_heads)],
            values=rows,
            title=f"share of the {self.metric.replace('_', ' ')} that each head moves through {receiver}",
            units="share of the difference",
            diverging=True,
            row_axis="layer",
            column_axis="head",
        )

    def to_json(self) -> dict[str, Any]:
        def plain(values: Tensor) -> list[Any]:
            return [[None if math.isnan(x) else x for x in row] for row in values.tolist()]

        low, high = self.interval()
        return {
            "model": self.model,
            "metric": self.metric,
            "direction": self.direction,
            "mlps": self.mlps,
            "n": self.n,
            "dropped": self.dropped,
            "senders": list(self.senders),
            "receivers": list(self.receivers),
            "mean": plain(self.mean),
            "low": plain(low),
            "high": plain(high),
            "p": plain(self.p),
            "q": plain(self.q),
            "random_senders": plain(self.random.nanmean(-1)),
            "clean": self.clean.mean().item(),
            "corrupt": self.corrupt.mean().item(),
        }

    def __str__(self) -> str:
        head = (
            f"paths of {self.model}, {self.direction}, MLPs {'recomputed' if self.mlps == 'recompute' else 'frozen'}: "
            f"{self.metric} clean {self.clean.mean():.2f}, corrupt {self.corrupt.mean():.2f}, n {self.n}"
        )
        most = self.mean.abs().nan_to_num(-1.0).amax(1)
        shown = most.argsort(descending=True).tolist()[:20]
        first = max(8, *(len(self.senders[i]) + 2 for i in shown))
        width = max(9, *(len(name) + 2 for name in self.receivers))
        lines = [head, " " * first + "".join(f"{name:>{width}}" for name in self.receivers)]
        for i in shown:
            cells = ["–" if math.isnan(value) else f"{value:.3f}" for value in self.mean[i].tolist()]
            lines.append(f"{self.senders[i]:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
        if len(shown) < len(self.senders):
            lines.append(f"… and {len(self.senders) - len(shown)} senders that move less")
        control = [math.nan if row.isnan().all() else row.nanmean().item() for row in self.random.transpose(0, 1)]
        cells = "".join(f"{'–' if math.isnan(value) else f'{value:.3f}':>{width}}" for value in control)
        lines.append(f"{'random':<{first}}{cells}")
        return "\n".join(lines)


def all_senders(lm: LanguageModel, *, heads: bool = True, mlps: bool = True, embed: bool = True) -> list[str]:
    """Names of all senders of a model, in the order in which they write."""
    names = Graph.of(lm, grouped=True).sources
    return [
        name
        for name in names
        if (embed if name == "embed" else mlps if name.endswith(".mlp") else heads)
    ]  # fmt: skip


def path_patch(
    lm: LanguageModel,
    pairs: Sequence[PromptPair] | AlignedPairs,
    senders: Sequence[Name],
    receivers: Sequence[Name],
    *,
    mlps: Mlps = "recompute",
    direction: Direction = "noise",
    metric: str | Metric = logit_difference,
    random_senders: int = 8,
    batch_rows: int = 256,
    seed: int = 0,
) -> PathGrid:
    """Patch the path from every sender to every receiver.

    Senders are called `embed`, `L3H7`, `L3.mlp`, receivers `L3H7.q` (`.k`, `.v`; `L3K1.k` where keys are shared),
    `L3.mlp`, `logits`; `L3H7@subject` is a node at one role of the pairs, `L3H7@-1` at a position. A list of names is a
    set that sends, or receives, together. Noising runs the clean prompt and sends what the senders have on the corrupt
    one, denoising the other way round. `random_senders` is how many random senders of the same kind, none of them the
    sender itself, stand beside each path.

    Attention's output through a post-norm is what the model makes of it with the sender's new value. Raises
    `CutawayError`: an unknown node, a receiver that does not come after the sender, pairs that do not align, a metric
    that cannot tell the prompts apart, a model whose heads do not read the stream one by one (latent attention).
    """
    if mlps not in ("recompute", "freeze"):
        raise CutawayError(f"mlps={mlps!r} is not 'recompute' or 'freeze'.")
    if direction not in ("noise", "denoise"):
        raise CutawayError(f"direction={direction!r} is not 'noise' or 'denoise'.")
    for given, what in ((senders, "senders"), (receivers, "receivers")):
        if isinstance(given, str):
            raise CutawayError(f"{what} is the text {given!r}; give a list of names, such as [{given!r}].")
    graph = Graph.of(lm, grouped=True)
    aligned = align(lm, pairs)
    name, measure = named_metric(metric)
    sending = [parse(graph, one, aligned, sender=True) for one in senders]
    receiving = [parse(graph, one, aligned, sender=False) for one in receivers]
    real = _paths(graph, sending, receiving)
    chosen, drawn = random_others(graph, sending, receiving, real, random_senders, seed)

    noise = direction == "noise"
    original, other = (aligned.clean, aligned.corrupt) if noise else (aligned.corrupt, aligned.clean)
    held = ["blocks.0.resid_pre", "blocks.*.attn.z", "blocks.*.mlp.out", f"blocks.{lm.n_layers - 1}.resid_post"]
    new, old = (lm.run(tokens, capture=held, logits="last") for tokens in (other, original))
    clean_logits = (old if noise else new).last_logits
    targets = targets_of(aligned, clean_logits.float().cpu()).to(lm.device)
    m_old, m_new = (measure(run.last_logits.float(), targets).cpu() for run in (old, new))

    patching = _Patching(lm, aligned, old, new, 0 if noise else 1, mlps, measure, targets, batch_rows)
    wanted = torch.zeros(len(chosen), len(receiving), dtype=torch.bool)
    wanted[: len(sending)] = real
    for (_, j), rows in drawn.items():
        wanted[rows, j] = True
    metrics = patching.run(chosen, receiving, [row.nonzero()[:, 0].tolist() for row in wanted])
    clean, corrupt = (m_old, m_new) if noise else (m_new, m_old)
    values, usable = recovery(metrics, clean, corrupt)
    if not usable.any():
        raise CutawayError(f"the metric {name} does not tell the clean prompts from the corrupt ones; choose another")
    if noise:
        values = 1.0 - values
    random, counts = _controls(values, sending, drawn)
    shown = values[: len(sending)].clone()
    shown[~real] = torch.nan
    return PathGrid(
        model=lm.name,
        n_layers=lm.n_layers,
        n_heads=lm.n_heads,
        metric=name,
        direction=direction,
        mlps=mlps,
        senders=tuple(end_name(nodes) for nodes in sending),
        receivers=tuple(end_name(nodes) for nodes in receiving),
        values=shown,
        random=random,
        n_random=counts,
        clean=clean,
        corrupt=corrupt,
        dropped=int((~usable).sum()),
    )


def _paths(graph: Graph, sending: Sequence[Nodes], receiving: Sequence[Nodes]) -> Tensor:
    """Which of the pairs are paths, bool [senders, receivers]; each sender and each receiver must have one."""
    if not sending or not receiving:
        raise CutawayError("Path patching needs a sender and a receiver; one of the lists is empty.")
    real = torch.tensor([[earlier(graph, s, r) for r in receiving] for s in sending])
    for i, nodes in enumerate(sending):
        if not real[i].any():
            which = end_name(receiving[0]) if len(receiving) == 1 else "none of the receivers"
            verb = "does not come" if len(receiving) == 1 else "comes"
            raise CutawayError(f"{which} {verb} after the sender {end_name(nodes)}, so no path leads there.")
    for j, nodes in enumerate(receiving):
        if not real[:, j].any():
            raise CutawayError(
                f"The receiver {end_name(nodes)} comes after none of the senders, so no path leads there."
            )
    return real


def _controls(
    values: Tensor, sending: Sequence[Nodes], drawn: dict[tuple[tuple[str, ...], int], list[int]]
) -> tuple[Tensor, Tensor]:
    """Mean over the random senders that are not the sender itself [senders, receivers, n], and how many they were."""
    random = torch.full((len(sending), *values.shape[1:]), torch.nan)
    counts = torch.zeros(len(sending), values.shape[1], dtype=torch.long)
    for i, nodes in enumerate(sending):
        for j in range(values.shape[1]):
            others = [k for k in drawn.get((signature(nodes), j), []) if k != i]
            counts[i, j] = len(others)
            if others:
                random[i, j] = values[others, j].mean(0)
    return random, counts


@dataclass(frozen=True)
class _Patching:
    """What step 2 and step 3 need: the two runs, and how the answer is judged."""

    lm: LanguageModel
    pairs: AlignedPairs
    old: Run
    new: Run
    side: int  # of the pairs that is original: 0 clean, 1 corrupt
    mlps: Mlps
    measure: Metric
    targets: Targets
    batch_rows: int

    def run(self, senders: Sequence[Nodes], receivers: Sequence[Nodes], wanted: Sequence[Sequence[int]]) -> Tensor:
        """The metric of every wanted path [senders, receivers, n]; NaN for the others."""
        n = len(self.pairs)
        found = torch.full((len(senders), len(receivers), n), torch.nan)
        direct = [j for j, nodes in enumerate(receivers) if nodes[0].part == "logits"]
        ends = [(i, j) for j in direct for i in range(len(senders)) if j in wanted[i]]
        if ends:
            cells = [self.to_logits(senders[i]) for i, _ in ends]
            values = self.sweep(cells, "paths to the logits")
            for (i, j), value in zip(ends, values, strict=True):
                found[i, j] = value
        inner = [j for j in range(len(receivers)) if j not in direct]
        rest = [i for i in range(len(senders)) if any(j in inner for j in wanted[i])]
        size = max(1, self.batch_rows // n)
        if rest:
            with Progress("path patching", total=len(rest), unit="senders") as progress:
                for first in range(0, len(rest), size):
                    batch = rest[first : first + size]
                    read = self.read([senders[i] for i in batch], [receivers[j] for j in inner])
                    ends = [(k, i, j) for k, i in enumerate(batch) for j in wanted[i] if j in inner]
                    values = self.sweep([self.received(receivers[j], read, k) for k, _, j in ends], "paths")
                    for (_, i, j), value in zip(ends, values, strict=True):
                        found[i, j] = value
                    progress.advance(len(batch))
        return found

    def to_logits(self, senders: Nodes) -> list[Edit]:
        """Step 2 where the logits are the receiver."""
        normed = any(self.lm.family.layers[node.layer].ln1_post for node in senders if node.part == "head")
        if self.mlps == "recompute" or normed:
            return [*self.frozen(senders, self.lm.n_layers), *self.sent(senders)]
        # with all else held, the last token's stream changes by what the senders write, so that no layer need run
        last = f"blocks.{self.lm.n_layers - 1}.resid_post"
        stream = self.old.last(last).float()
        for node in senders:
            stream = stream + self.written(node)
        return [replace_value(last, stream[:, None], positions=-1)]

    def written(self, node: Node) -> Tensor:
        """What a sender writes to the last token's stream on the other prompt, less what it writes there now [n, d]."""
        new, old = self.new[node.site], self.old.last(node.site).float()
        at = node.positions(self.pairs, self.side)
        of = node.positions(self.pairs, 1 - self.side)
        tokens, lengths = self.new.tokens, self.old.tokens.lengths.tolist()
        places = [-1] * len(lengths) if of is None else [one[0] for one in of]
        columns = [tokens.column(row, place) for row, place in enumerate(places)]
        change = new[torch.arange(len(new)), columns].float() - old
        if node.part == "head":
            w_o = self.lm.w_o(node.layer)[node.head].float()
            change = change[:, node.head] @ w_o * self.lm.family.layers[node.layer].attn_multiplier
        here = [at is None or at[row][0] == length - 1 for row, length in enumerate(lengths)]
        return change * torch.tensor(here, device=change.device)[:, None]

    def sweep(self, cells: list[list[Edit]], label: str) -> Tensor:
        """The metric of the original prompts under each list of edits [cells, n]."""

        def judged(logits: Tensor, _tokens: Tokens) -> Tensor:
            return self.measure(logits.float(), self.targets)

        return self.lm.sweep(self.old.tokens, cells, judged, batch_rows=self.batch_rows, label=label).values

    def read(self, senders: Sequence[Nodes], receivers: Sequence[Nodes]) -> Run:
        """Step 2 for several senders at once: the receivers' inputs, sender by sender [senders * n, ...]."""
        n, times = len(self.pairs), len(senders)
        tokens = self.old.tokens[list(range(n)) * times]
        nodes = [node for some in receivers for node in some]
        last = max(node.layer + (node.part == "mlp" and not self.lm.family.parallel) / 2 for node in nodes)
        every = tuple(node for some in senders for node in some)
        edits = self.frozen(every, last, times)
        for k, some in enumerate(senders):
            edits += self.sent(some, list(range(k * n, (k + 1) * n)))
        return self.lm.run(tokens, capture=sorted({node.reads for node in nodes}), edits=edits, logits=None)

    def frozen(self, senders: Sequence[Node], end: float, times: int = 1) -> list[Edit]:
        """Heads (and MLPs) behind the first sender held at their original output, up to a receiver in layer `end`, or
        between attention and MLP of that layer (its half)."""
        first = min(0 if node.part == "embed" else node.layer for node in senders)
        rows = list(range(len(self.pairs))) * times
        stop = math.ceil(end)  # the first layer whose heads need not be held
        sites = [(first, stop, "attn.z")]
        if self.mlps == "freeze":
            sites.append((first, int(end), "mlp.out"))
        return [patch(_sites(low, high, site), self.old, source_rows=rows) for low, high, site in sites if low < high]

    def sent(self, senders: Nodes, rows: list[int] | None = None) -> list[Edit]:
        """The senders' outputs on the other prompt, in these rows of the batch."""
        return [
            patch(
                node.site,
                self.new,
                heads=None if node.head < 0 else node.head,
                rows=rows,
                positions=node.positions(self.pairs, self.side),
                source_rows=list(range(len(self.pairs))),
                source_positions=node.positions(self.pairs, 1 - self.side),
            )
            for node in senders
        ]

    def received(self, receivers: Nodes, read: Run, k: int) -> list[Edit]:
        """Step 3: the receivers' inputs as the k-th sender left them."""
        n = len(self.pairs)
        return [
            patch(
                node.reads,
                read,
                heads=None if node.head < 0 else node.head,
                positions=node.positions(self.pairs, self.side),
                source_rows=list(range(k * n, (k + 1) * n)),
                source_positions=node.positions(self.pairs, self.side),
            )
            for node in receivers
        ]


def _sites(first: int, stop: int, site: str) -> str:
    """The site in the layers from `first` on, before `stop`."""
    return f"blocks.{first}.{site}" if stop == first + 1 else f"blocks.{{{first}..{stop - 1}}}.{site}"

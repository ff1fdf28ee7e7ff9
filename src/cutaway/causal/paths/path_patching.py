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
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.metrics import Metric, PatchDirection, Targets, logit_difference, named_metric, recovery, targets_of
from cutaway.causal.paths.grid import Mlps, PathGrid
from cutaway.causal.paths.nodes import Name, Node, Nodes, earlier, end_name, parse, random_others, signature
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.model.edits.edits import Edit, patch
from cutaway.model.edits.edits import set as replace_value
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens


def all_senders(lm: LanguageModel, *, heads: bool = True, mlps: bool = True, embed: bool = True) -> list[str]:
    """Names of all senders of a model, in the order in which they write.

    Args:
        lm: The model.
        heads: Whether attention heads are among them.
        mlps: Whether MLPs are.
        embed: Whether the embedding is.
    """
    names = EdgeGraph.of(lm, grouped=True).sources
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
    direction: PatchDirection = "noise",
    metric: str | Metric = logit_difference,
    random_senders: int = 8,
    batch_rows: int = 256,
    seed: int = 0,
) -> PathGrid:
    """Patch the path from every sender to every receiver.

    Goldowsky-Dill et al. 2023 (https://arxiv.org/abs/2304.05969); Wang et al. 2022 (https://arxiv.org/abs/2211.00593).

    Args:
        lm: The model.
        pairs: Prompt pairs.
        senders: Nodes that write: `embed`, `L3H7`, `L3.mlp` (`all_senders` has them all). `L3H7@subject` is a node at
            one role of the pairs, `L3H7@-1` at a position. A list of names is a set that sends together.
        receivers: Inputs that are read: `L3H7.q` (`.k`, `.v`; `L3K1.k` where keys are shared), `L3.mlp`, `logits`; a
            list of names receives together.
        mlps: MLPs on the way are recomputed ("recompute": a path may lead through them), or held as the heads are
            ("freeze"). Attention's output through a post-norm is what the model makes of it with the sender's value.
        direction: "noise" runs the clean prompt and sends what the senders have on the corrupt one, "denoise" the
            other way round.
        metric: A name of `METRICS`, or a function `(logits [b, V], targets) -> [b]`.
        random_senders: How many random senders of the same kind, none the sender itself, stand beside each path.
        batch_rows: Rows of a forward.
        seed: Of the random senders.

    Returns:
        The share that each path moves [senders, receivers, n], beside its control.

    Raises:
        Misaligned: Pairs that do not line up.
        NotSupported: A model whose heads do not read the stream one by one (latent attention).
        CutawayError: An unknown node, a receiver that does not come after the sender, a metric that cannot tell the
            prompts apart.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> pairs = cutaway.data.readable_pairs(lm, cutaway.data.known_task("world indirect object"), 2)
        >>> path_patch(lm, pairs, ["L7H5@-1"], ["logits"], random_senders=1).values.shape  # senders, receivers, pairs
        torch.Size([1, 1, 2])
    """
    if mlps not in ("recompute", "freeze"):
        raise CutawayError(f"mlps={mlps!r} is not 'recompute' or 'freeze'")
    if direction not in ("noise", "denoise"):
        raise CutawayError(f"direction={direction!r} is not 'noise' or 'denoise'")
    for given, what in ((senders, "senders"), (receivers, "receivers")):
        if isinstance(given, str):
            raise CutawayError(f"{what} is the text {given!r}; give a list of names, such as [{given!r}]")
    graph = EdgeGraph.of(lm, grouped=True)
    ready = aligned(lm, pairs)
    name, measure = named_metric(metric)
    sending = [parse(graph, one, ready, sender=True) for one in senders]
    receiving = [parse(graph, one, ready, sender=False) for one in receivers]
    real = _paths(graph, sending, receiving)
    chosen, drawn = random_others(graph, sending, receiving, real, random_senders, seed)

    noise = direction == "noise"
    original, other = (ready.clean, ready.corrupt) if noise else (ready.corrupt, ready.clean)
    held = ["blocks.0.resid_pre", "blocks.*.attn.z", "blocks.*.mlp.out", f"blocks.{lm.n_layers - 1}.resid_post"]
    new, old = (lm.run(tokens, capture=held, logits="last") for tokens in (other, original))
    clean_logits = (old if noise else new).last_logits
    targets = targets_of(ready, clean_logits.float().cpu()).to(lm.device)
    m_old, m_new = (measure(run.last_logits.float(), targets).cpu() for run in (old, new))

    patching = _Patching(lm, ready, old, new, 0 if noise else 1, mlps, measure, targets, batch_rows)
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


def _paths(graph: EdgeGraph, sending: Sequence[Nodes], receiving: Sequence[Nodes]) -> Tensor:
    """Which of the pairs are paths, bool [senders, receivers]; each sender and each receiver must have one."""
    if not sending or not receiving:
        raise CutawayError("path patching needs a sender and a receiver; one of the lists is empty")
    real = torch.tensor([[earlier(graph, s, r) for r in receiving] for s in sending])
    for i, nodes in enumerate(sending):
        if not real[i].any():
            which = end_name(receiving[0]) if len(receiving) == 1 else "none of the receivers"
            verb = "does not come" if len(receiving) == 1 else "comes"
            raise CutawayError(f"{which} {verb} after the sender {end_name(nodes)}, so no path leads there")
    for j, nodes in enumerate(receiving):
        if not real[:, j].any():
            raise CutawayError(
                f"the receiver {end_name(nodes)} comes after none of the senders, so no path leads there"
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

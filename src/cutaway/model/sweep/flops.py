"""How much arithmetic a forward with edits takes: what was run, what no exact method could leave out, what a plain
forward would be.

A floating-point operation is a multiplication or an addition: 2 for each weight and column, 4 for each width of a head
and pair of columns in attention (causal pairs only). Norms, activations and softmax are left out; experts count by
those a token is sent to.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cutaway.model.attached import Attached
from cutaway.model.sweep.shortcuts import Entry


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a sweep.

    `run` were done. `needed` is the least that gives these numbers exactly, cell by cell: from the first edited layer
    and column on, of the last layer and the unembedding only the last token where only that is read. `plain` is one
    forward per cell with every logit.
    """

    run: int
    needed: int
    plain: int

    @property
    def share(self) -> float:
        """needed / run: 1 where nothing was done in vain."""
        return self.needed / self.run if self.run else 1.0

    @property
    def bound(self) -> float:
        """How many times less arithmetic than a plain forward per cell is possible."""
        return self.plain / self.needed if self.needed else float("inf")


@dataclass(frozen=True)
class Cost:
    """Weights of each layer by what they are for, and the widths that attention works on."""

    query: tuple[int, ...]
    key_value: tuple[int, ...]
    output: tuple[int, ...]
    mlp: tuple[int, ...]
    heads: int
    unembed: int

    def forward(self, at: Entry, start: int, width: int, *, least: bool = False) -> int:
        """One prompt of `width` columns, from column `start` on, entering at `at`; `least`: also the queries of the
        last layer for the last token alone.
        """
        columns = width - start
        pairs = columns * start + columns * (columns + 1) // 2
        total = 2 * self.unembed * (1 if at.last else columns)
        for layer in range(at.layer, len(self.mlp)):
            here = layer == at.layer
            if here and at.block == "skip":
                continue
            slim = at.slim and layer == len(self.mlp) - 1
            out = 1 if slim else columns
            if not here or at.attention == "run":
                queries = 1 if slim and least else columns
                total += 2 * (self.query[layer] * queries + self.key_value[layer] * columns)
                total += 4 * self.heads * (width if queries == 1 else pairs)
            if not here or at.attention != "skip":
                total += 2 * self.output[layer] * out
            if not here or at.mlp == "run":
                total += 2 * self.mlp[layer] * out
        return total

    def plain(self, width: int) -> int:
        """One prompt through all of the model, with every logit."""
        return self.forward(Entry(0, last=False, slim=False), 0, width)

    @property
    def per_layer(self) -> float:
        """Weights of a layer, on average."""
        return sum(map(sum, (self.query, self.key_value, self.output, self.mlp))) / len(self.mlp)


def _weights(module: nn.Module, active: float = 1.0) -> int:
    """Entries of a module's matrices; stacked or listed experts count by the share that is active."""
    total = 0.0
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            expert = parameter.ndim > 2 or "experts." in name
            total += parameter.numel() * (active if expert else 1.0)
    return round(total)


def cost(lm: Attached) -> Cost:
    """What a model's parts cost, from their weights."""
    family = lm.family
    config = lm.hf.config.get_text_config()
    experts = next(
        (n for name in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(config, name, None))),
        None,
    )
    chosen = getattr(config, "num_experts_per_tok", None)
    active = min(1.0, chosen / experts) if isinstance(experts, int) and isinstance(chosen, int) else 1.0
    queries, rest, outputs, mlps = [], [], [], []
    share = family.n_heads / (family.n_heads + 2 * family.n_kv_heads)
    for layer in family.layers:
        output = _weights(layer.output)
        projections = max(0, _weights(layer.attention) - output)
        queries.append(round(projections * share))
        rest.append(projections - queries[-1])
        outputs.append(output)
        mlps.append(_weights(layer.mlp, active))
    return Cost(
        query=tuple(queries),
        key_value=tuple(rest),
        output=tuple(outputs),
        mlp=tuple(mlps),
        heads=family.n_heads * family.d_head,
        unembed=_weights(family.unembed),
    )

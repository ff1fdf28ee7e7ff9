"""Training by what a dictionary does to the model's predictions (Braun et al. 2024, arXiv 2405.12241).

A batch is whole rows of tokens. The model runs on them once as it is; then, for each dictionary, from the lowest layer
that it writes on with ŷ in place of y at the positions that count, and the term `EndToEnd` is

    KL(model ‖ model with ŷ) = mean over those positions of Σ_v p_v (log p_v − log p̂_v)      nats per token

Its gradient at ŷ comes from `lm.run(..., grad=)`, the model's weights have none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import json_hash
from cutaway.data.corpus.corpus import rows_hash
from cutaway.data.harvesting.activations import as_tokens, counted
from cutaway.data.harvesting.settings import Rules
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.jobs import Job, Trained, train_jobs
from cutaway.dictionaries.training.sources import find_ports
from cutaway.dictionaries.training.terms import EndToEnd
from cutaway.model.edits import edits
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import layer_of


def train_end_to_end(
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    config: TrainConfig,
    *,
    to: str | None = None,
    seed: int = 0,
    folder: Path | None = None,
    seconds_between_checkpoints: float = 30.0,
) -> Trained:
    """Train a dictionary by what it does to the model's predictions (Braun et al. 2024; https://arxiv.org/abs/2405.12241).

    A step takes as many whole rows as hold `config.batch` tokens, so a little fewer tokens.

    Args:
        lm: The model.
        rows: Token ids [n, p].
        site: What the dictionary reads.
        config: How it is trained, with the term `EndToEnd`.
        to: What it writes, which makes a transcoder; the same site if None.
        seed: Shuffles the rows.
        folder: Where the state is written, so that the same call goes on after an interruption.
        seconds_between_checkpoints: How often.

    Returns:
        The dictionary and its history.

    Raises:
        NoSuchSite: the model has no such site.
        CutawayError: the term is missing, or there are too few rows.
    """
    if not any(isinstance(term, EndToEnd) for term in config.terms):
        raise CutawayError("end-to-end training needs the term 'end_to_end' in the loss")
    reads = lm.sites().resolve(site)
    writes = () if to is None else (lm.sites().resolve(to),)
    source = RowBatches(lm, rows, [reads, *writes], seed=seed)
    return train_jobs(
        source,
        {"": Job(config, (reads,), writes)},
        folder=folder,
        seconds_between_checkpoints=seconds_between_checkpoints,
    )[""]


class RowBatches:
    """A `Source` whose batches are whole rows, on which the model can be run on: see `downstream`."""

    def __init__(
        self, lm: LanguageModel, rows: Tensor, sites: str | Sequence[str], *, rules: Rules | None = None, seed: int = 0
    ) -> None:
        """Raises `CutawayError` for a site that the model lacks, and rules by the norm, which would leave holes."""
        self.lm, self.rows, self.seed, self.rules = lm, rows, seed, rules or Rules()
        if self.rules.high_norm is not None:
            raise CutawayError("end-to-end training takes whole rows: tokens cannot be left out by their norm")
        self.ports = {name: port for name, (_, port) in find_ports([lm], sites).items()}
        identity = asdict(lm.identity())
        data = {"rows": rows_hash(rows), "dtype": str(lm.dtype), "seed": seed, "whole_rows": True}
        data["rules"] = asdict(self.rules)
        self.identity = json_hash({"model": identity, **data})
        self.metadata: Mapping[str, Any] = {
            "context": rows.shape[1],
            "prepend_bos": lm.bos_id is not None,
            "data": data,
        }

    def batches(self, size: int, start: int = 0) -> Iterator["RowBatch"]:
        """See `Source`: as many rows as hold `size` tokens, or one; shuffled anew each time all have been used."""
        some = max(1, size // max(1, self.rows.shape[1] - 1))
        per_turn = len(self.rows) // some
        if per_turn == 0:
            raise CutawayError(
                f"{len(self.rows)} rows are less than one batch of {some}: give a longer corpus or a smaller batch"
            )
        return self._endless(some, start, per_turn)

    def _endless(self, some: int, start: int, per_turn: int) -> Iterator["RowBatch"]:
        turn, first = divmod(start, per_turn)
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            order = torch.randperm(len(self.rows), generator=generator)
            for place in range(first, per_turn):
                yield self._batch(self.rows[order[place * some : (place + 1) * some]].long())
            turn, first = turn + 1, 0

    def _batch(self, rows: Tensor) -> "RowBatch":
        keep = counted(rows, self.lm.bos_id, self.rules)
        layers = [layer for site in self.ports if (layer := layer_of(site)) is not None]
        below = [f"blocks.{min(layers)}.resid_pre"] if layers and min(layers) > 0 else []  # where a later run resumes
        run = self.lm.run(as_tokens(rows).to(self.lm.device), capture=[*self.ports, *below], logits="all")
        values = {site: run[site][keep.to(run[site].device)].flatten(1) for site in self.ports}
        return RowBatch(values, run, keep)

    def downstream(self, batch: Mapping[str, Tensor], writes: Sequence[str]) -> Any:
        """What takes ŷ [n, d_out] to the mean KL of a batch, differentiably."""
        assert isinstance(batch, RowBatch)

        def kl(written: Tensor) -> Tensor:
            return _Spliced.apply(written, self.lm, batch, tuple(writes))

        return kl


class RowBatch(dict[str, Tensor]):
    """Values [n, width] by site, the run that they are of, and the positions `keep` [b, p] that they stand at."""

    def __init__(self, values: Mapping[str, Tensor], run: Run, keep: Tensor) -> None:
        super().__init__(values)
        self.run, self.keep = run, keep


class _Spliced(torch.autograd.Function):
    """mean KL(p ‖ p̂), p̂ being the model's predictions with `written` in place of the sites' values."""

    @staticmethod
    def forward(ctx: Any, written: Tensor, lm: LanguageModel, batch: RowBatch, writes: tuple[str, ...]) -> Tensor:
        run, keep = batch.run, batch.keep.to(written.device)
        wide = torch.promote_types(run.all_logits.dtype, torch.float32)
        clean = torch.log_softmax(run.all_logits[keep].to(wide), dim=-1)
        found: list[Tensor] = []

        def metric(logits: Tensor) -> Tensor:
            spliced = torch.log_softmax(logits[keep].to(wide), dim=-1)
            found.append((clean.exp() * (clean - spliced)).sum(-1).mean())
            return found[0]

        changes: list[edits.Edit] = []
        for site, part in zip(
            writes, written.detach().split([batch[site].shape[1] for site in writes], dim=1), strict=True
        ):
            value = run[site].clone()
            value[keep] = part.reshape(-1, *value.shape[2:]).to(value)
            changes.append(edits.set(site, value))
        spliced = lm.run(run.tokens, capture=list(writes), edits=changes, grad=metric, resume=run)
        ctx.gradient = torch.cat([spliced.grads[site][keep].flatten(1) for site in writes], dim=1).to(written)
        return found[0].detach().to(written)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient * outputs[0], None, None, None

"""Where activations for training come from: tensors, or a model that is run on rows of tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import json_hash
from cutaway.data.activations import activation_batches
from cutaway.data.corpus import rows_hash
from cutaway.dictionaries.dictionary import Port
from cutaway.model.language_model import LanguageModel


class Tensors:
    """Activations at hand: each site [n, width], shuffled anew in each pass."""

    def __init__(self, values: Mapping[str, Tensor], *, seed: int = 0, model: Mapping[str, Any] | None = None) -> None:
        """Raises `CutawayError` when the sites have different numbers of tokens."""
        if len({len(value) for value in values.values()}) != 1:
            raise CutawayError("the sites' activations must be of the same tokens, so as many of each")
        self.values, self.seed = dict(values), seed
        self.ports = {site: Port(site, value.shape[1], model or {}) for site, value in values.items()}
        self.metadata: Mapping[str, Any] = {}

    @property
    def identity(self) -> str:
        """A hash of shapes and a few of the values."""
        some = {
            site: [list(value.shape), value.flatten()[:: 1 + value.numel() // 997].tolist()]
            for site, value in self.values.items()
        }
        return json_hash({"values": some, "seed": self.seed})

    def batches(self, size: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        """See `Source`. Raises `CutawayError` when there is not one batch."""
        n = len(next(iter(self.values.values())))
        per_pass = n // size
        if per_pass == 0:
            raise CutawayError(f"{n} activations are less than one batch of {size}: give more, or a smaller batch")
        number = start
        while True:
            turn, first = divmod(number, per_pass)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + turn))
            for place in range(first, per_pass):
                chosen = order[place * size : (place + 1) * size]
                yield {site: value[chosen] for site, value in self.values.items()}
                number += 1


class LiveRows:
    """A model run on rows of tokens [n, p], a buffer of tokens at a time and `passes` times (`activation_batches`)."""

    def __init__(
        self,
        lm: LanguageModel,
        rows: Tensor,
        site: str,
        *,
        passes: int = 4,
        buffer_tokens: int = 1 << 18,
        seed: int = 0,
        low_precision: bool = False,
    ) -> None:
        self.lm, self.rows, self.site = lm, rows, lm.sites().resolve(site)
        self.options: dict[str, Any] = {"passes": passes, "buffer_tokens": buffer_tokens, "seed": seed}
        self.low_precision = low_precision
        identity = asdict(lm.identity())
        data = {"rows": rows_hash(rows), "dtype": str(lm.dtype), "low_precision": low_precision, **self.options}
        self.identity = json_hash({"model": identity, **data})
        self.metadata: Mapping[str, Any] = {
            "context": rows.shape[1],
            "prepend_bos": lm.bos_id is not None,
            "data": data,
        }
        self.ports = {self.site: Port(self.site, lm.d_model, identity)}

    def batches(self, size: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        """See `Source`. Raises `CutawayError` when the rows hold less than one batch."""
        options = {**self.options, "low_precision": self.low_precision}
        for x in activation_batches(self.lm, self.rows, self.site, batch_tokens=size, start=start, **options):
            yield {self.site: x}

"""Where activations for training come from: tensors, a harvested store, or models that are run on rows of tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NoSuchSite
from cutaway.artifacts.manifest import json_hash
from cutaway.data.corpus.corpus import rows_hash
from cutaway.data.harvesting.activations import counted, harvest_sites, shuffled_batches
from cutaway.data.harvesting.harvest import token_shapes
from cutaway.data.harvesting.settings import Rules
from cutaway.data.harvesting.store import Store
from cutaway.dictionaries.dictionary import Port
from cutaway.model.language_model import LanguageModel

Models = LanguageModel | Sequence[LanguageModel]

_CALIBRATION_TOKENS = 4096  # of which the norms' median is taken, as in a harvest
_BUFFER_BYTES = 1 << 30


class Tensors:
    """Activations at hand, shuffled anew in each pass.

    Args:
        values: Activations [n, width] by site, of the same tokens.
        seed: Of the orders.
        model: Whose they are: "id", "revision", "weight_hash"; goes into the dictionary.

    Raises:
        CutawayError: the sites have different numbers of tokens.
    """

    def __init__(self, values: Mapping[str, Tensor], *, seed: int = 0, model: Mapping[str, Any] | None = None) -> None:
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
        """Batches by port, each [size, width], endlessly; `CutawayError` when there is not one batch.

        Args:
            size: Tokens of a batch.
            start: The number of the first batch; what an earlier run has seen is passed over.
        """
        n = len(next(iter(self.values.values())))
        per_pass = n // size
        if per_pass == 0:
            raise CutawayError(f"{n} activations are less than one batch of {size}: give more, or a smaller batch")
        return self._endless(size, start, per_pass)

    def _endless(self, size: int, start: int, per_pass: int) -> Iterator[Mapping[str, Tensor]]:
        n = len(next(iter(self.values.values())))
        number = start
        while True:
            turn, first = divmod(number, per_pass)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + turn))
            for place in range(first, per_pass):
                chosen = order[place * size : (place + 1) * size]
                yield {site: value[chosen] for site, value in self.values.items()}
                number += 1


class StoreSource:
    """A harvested store: all its tokens in one random order, in another one each epoch, endlessly.

    Args:
        store: The store, or its folder.
        sites: Those to read, all if None; sites by head are flattened.
        seed: Of the orders.

    Raises:
        NoSuchSite: the store does not hold a site.
        CutawayError: as `Store.open`.
    """

    def __init__(self, store: Store | str | Path, sites: str | Sequence[str] | None = None, *, seed: int = 0) -> None:
        self.store = store if isinstance(store, Store) else Store.open(store)
        names = list(self.store.sites) if sites is None else [sites] if isinstance(sites, str) else list(sites)
        if missing := [name for name in names if name not in self.store.sites]:
            raise NoSuchSite(f"the store has no site '{missing[0]}'; it has {', '.join(self.store.sites)}")
        self.seed = seed
        manifest = self.store.manifest
        model = {} if manifest.model is None else asdict(manifest.model)
        self.ports = {name: Port(name, _product(self.store.sites[name]), model) for name in names}
        self.identity = json_hash({"store": manifest.id, "seed": seed})
        settings = manifest.configuration
        self.metadata: Mapping[str, Any] = {
            "context": settings.get("rows", {}).get("context"),
            "prepend_bos": None,
            "data": {
                "store": manifest.id,
                "corpus": manifest.corpus_hash,
                "rules": settings.get("rules"),
                "seed": seed,
            },
        }

    def batches(self, size: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        """Batches by port, each [size, width], endlessly; `CutawayError` when the store holds less than one batch.

        Args:
            size: Tokens of a batch.
            start: The number of the first batch; what an earlier run has seen is passed over.
        """
        per_epoch = len(self.store) // size
        if per_epoch == 0:
            raise CutawayError(
                f"the store has {len(self.store)} tokens, less than one batch of {size}: harvest more, or take a "
                "smaller batch"
            )
        return self._endless(size, start, per_epoch)

    def _endless(self, size: int, start: int, per_epoch: int) -> Iterator[Mapping[str, Tensor]]:
        epoch, first = divmod(start, per_epoch)
        while True:
            options = {"sites": list(self.ports), "seed": self.seed, "epoch": epoch, "drop_last": True}
            for batch in self.store.batches(size, start=first, **options):
                yield {site: batch[site].flatten(1) for site in self.ports}
            epoch, first = epoch + 1, 0


class LiveRows:
    """Models run on rows of tokens: one forward of each gives all sites, a buffer of tokens at a time.

    Args:
        models: One, or several that read the same token ids.
        rows: Token ids [n, p].
        sites: Sites or wildcards. Of several models a port is called "MODEL:SITE", and a site without a model is that
            of each.
        rules: Leave out BOS, first positions, and tokens whose vector is `high_norm` times longer than the median at
            any site (of the first 4,096 tokens); `Rules()` if None.
        passes: How often each buffer is used.
        buffer_tokens: Tokens that a buffer holds; 2¹⁸, or as many as fill 1 GiB if that is fewer, if None.
        seed: Of the orders.
        low_precision: Whether the models' products run in bfloat16.

    Raises:
        NoSuchSite: a model lacks a site.
        CutawayError: there is no model, the rows are none of theirs, or `passes` is less than 1.
    """

    def __init__(
        self,
        models: Models,
        rows: Tensor,
        sites: str | Sequence[str],
        *,
        rules: Rules | None = None,
        passes: int = 4,
        buffer_tokens: int | None = None,
        seed: int = 0,
        low_precision: bool = False,
    ) -> None:
        self.models = (models,) if isinstance(models, LanguageModel) else tuple(models)
        self.rows, self.rules, self.low_precision = rows, rules or Rules(), low_precision
        if passes < 1:
            raise CutawayError(f"passes = {passes}: each buffer is used once or more")
        _check_rows(self.models, rows)
        self._where = find_ports(self.models, sites)
        self.ports = {name: port for name, (_, port) in self._where.items()}
        if buffer_tokens is None:
            buffer_tokens = min(1 << 18, _BUFFER_BYTES // (4 * sum(port.width for port in self.ports.values())))
        self.options: dict[str, Any] = {"passes": passes, "buffer_tokens": buffer_tokens, "seed": seed}
        data = {
            "rows": rows_hash(rows),
            "rules": asdict(self.rules),
            "dtype": [str(lm.dtype) for lm in self.models],
            "low_precision": low_precision,
            **self.options,
        }
        identities = [asdict(lm.identity()) for lm in self.models]
        # thresholds are those of all sites together, so which sites there are is part of what the activations are
        wide = sorted(self.ports) if self.rules.high_norm is not None else None
        self.identity = json_hash({"models": identities, "sites": wide, **data})
        self.metadata: Mapping[str, Any] = {
            "context": rows.shape[1],
            "prepend_bos": self.models[0].bos_id is not None,
            "data": data,
        }

    @cached_property
    def _keep(self) -> Tensor:
        """The positions that count in every model, before any `high_norm`: bool [n, p]."""
        keep = torch.ones_like(self.rows, dtype=torch.bool)
        for lm in self.models:
            keep &= counted(self.rows, lm.bos_id, self.rules)
        return keep

    def sites_of(self, model: int) -> list[str]:
        """The sites that one of the models is run for.

        Args:
            model: The model's number.
        """
        return [port.site for of, port in self._where.values() if of == model]

    def values(self, chosen: Tensor) -> dict[str, Tensor]:
        """Each port's values at the positions of some rows that count, `high_norm` not applied: [m, width].

        Args:
            chosen: Numbers of the rows, int [r].
        """
        rows, keep = self.rows[chosen], self._keep[chosen]
        found: dict[str, Tensor] = {}
        for number, lm in enumerate(self.models):
            named = {port.site: name for name, (of, port) in self._where.items() if of == number}
            if named:
                some = harvest_sites(lm, rows, list(named), keep, low_precision=self.low_precision)
                found |= {named[site]: values for site, values in some.items()}
        return {name: found[name] for name in self.ports}

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """The norm above which a token is left out, by port; empty without that rule."""
        if self.rules.high_norm is None:
            return {}
        enough = int((self._keep.sum(1).cumsum(0) < _CALIBRATION_TOKENS).sum()) + 1
        first = self.values(torch.arange(min(enough, len(self.rows))))
        return {name: self.rules.high_norm * float(values.norm(dim=1).median()) for name, values in first.items()}

    def _fill(self, chosen: Tensor) -> dict[str, Tensor]:
        buffer = self.values(chosen)
        if not self.thresholds:
            return buffer
        low = torch.stack([buffer[name].norm(dim=1).cpu() <= bound for name, bound in self.thresholds.items()]).all(0)
        return {name: values[low.to(values.device)] for name, values in buffer.items()}

    def batches(self, size: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        """Batches by port, each [size, width], endlessly; `CutawayError` when the rows hold less than one batch.

        Args:
            size: Tokens of a batch.
            start: The number of the first batch; what an earlier run has seen is passed over.
        """
        return shuffled_batches(self._keep.sum(1), self._fill, batch_tokens=size, start=start, **self.options)


def find_ports(models: Sequence[LanguageModel], sites: str | Sequence[str]) -> dict[str, tuple[int, Port]]:
    """By name the model (a number) and the port that each of some sites or wildcards stands for.

    With several models "MODEL:SITE" names a port of one, by its name or its path, and "SITE" that of each. Raises
    `CutawayError` for a site that a model lacks, one without a vector at each token, a model that is not there.
    """
    labels = _model_labels(models)
    found: dict[str, tuple[int, Port]] = {}
    for pattern in [sites] if isinstance(sites, str) else sites:
        label, colon, site = pattern.rpartition(":")
        if colon and label not in (*labels, *(lm.loaded_from for lm in models)):
            raise CutawayError(f"'{pattern}' is of a model that is not here; there are {', '.join(labels)}")
        for number, lm in enumerate(models):
            if colon and label not in (labels[number], lm.loaded_from):
                continue
            for name, shape in token_shapes(lm, site if colon else pattern).items():
                key = name if len(models) == 1 else f"{labels[number]}:{name}"
                found[key] = (number, Port(name, _product(shape), asdict(lm.identity())))
    return found


def _model_labels(models: Sequence[LanguageModel]) -> tuple[str, ...]:
    """The models' names, numbered where they are equal."""
    names = [lm.name for lm in models]
    return tuple(f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names))


def _check_rows(models: Sequence[LanguageModel], rows: Tensor) -> None:
    if not models:
        raise CutawayError("no model was given to take activations from")
    if rows.ndim != 2 or rows.is_floating_point() or not rows.numel():
        raise CutawayError(f"rows of token ids are integers [n, p]; got {list(rows.shape)} of {rows.dtype}")
    first = models[0]
    for lm in models:
        if int(rows.max()) >= lm.d_vocab_in or int(rows.min()) < 0:
            raise CutawayError(f"token ids must be between 0 and {lm.d_vocab_in - 1}, the vocabulary of {lm.name}")
        if rows.shape[1] > lm.context_length:
            raise CutawayError(f"rows of {rows.shape[1]} tokens are longer than the {lm.context_length} of {lm.name}")
        one, other = first.tokenizer, lm.tokenizer
        if one is not None and other is not None and one is not other and one.get_vocab() != other.get_vocab():
            raise CutawayError(
                f"{first.name} and {lm.name} have different tokenizers: their activations are not of the same tokens"
            )


def _product(shape: Sequence[int]) -> int:
    product = 1
    for part in shape:
        product *= part
    return product

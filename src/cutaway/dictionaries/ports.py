"""What a dictionary reads and writes, in running models: its values on rows of tokens, and its output put back.

Sites by head ([batch, pos, H, h]) are flattened to [batch, pos, H·h] when read and folded again when written. A
crosscoder of two models needs both; they must understand the same token ids, as a model and its fine-tuned self do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.progress import Progress
from cutaway.data.harvesting.activations import as_tokens, counted
from cutaway.data.harvesting.hardware import keep_freed_memory
from cutaway.dictionaries.dictionary import Dictionary, Port
from cutaway.model.edits import edits
from cutaway.model.forward.run import Run
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import layer_of
from cutaway.model.tokens import Tokens

Models = LanguageModel | Sequence[LanguageModel]

_ROWS_A_FORWARD = 8


@dataclass(frozen=True, eq=False)
class ModelPorts:
    """A dictionary's ports and the models they belong to: `reads` and `writes` say which model, by number."""

    models: tuple[LanguageModel, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]

    def sites(self, model: int) -> list[str]:
        """The sites of one model that are read or written, each once."""
        ports = [*zip(self.reads, self.inputs, strict=True), *zip(self.writes, self.outputs, strict=True)]
        return list(dict.fromkeys(port.site for of, port in ports if of == model))

    def labels(self) -> tuple[str, ...]:
        """Each output in a few words: its site, and its model where there are several."""
        if len(self.models) == 1:
            return tuple(port.site for port in self.outputs)
        names = self.model_names()
        return tuple(f"{port.site} of {names[of]}" for of, port in zip(self.writes, self.outputs, strict=True))

    def model_names(self) -> tuple[str, ...]:
        """The models' names, numbered where they are equal."""
        names = [lm.name for lm in self.models]
        return tuple(f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names))

    def counted(self, rows: Tensor) -> Tensor:
        """Positions that count in every model, bool [n, p] (see `data.activations.counted`)."""
        keep = torch.ones_like(rows, dtype=torch.bool)
        for lm in self.models:
            keep &= counted(rows, lm.bos_id)
        return keep

    def run(self, rows: Tensor | Tokens, *, logits: bool) -> list[Run]:
        """One run per model that captures its sites, and with `logits` also where a later run can resume."""
        tokens = as_tokens(rows) if isinstance(rows, Tensor) else rows
        return [
            lm.run(tokens, capture=self._captured(number, logits), logits="all" if logits else None)
            for number, lm in enumerate(self.models)
        ]

    def _captured(self, model: int, resumable: bool) -> list[str]:
        sites = self.sites(model)
        layers = [layer for site in self.written(model) if (layer := layer_of(site)) is not None]
        if resumable and layers and min(layers) > 0:
            sites = list(dict.fromkeys([*sites, f"blocks.{min(layers)}.resid_pre"]))
        return sites

    def written(self, model: int) -> list[str]:
        """The sites of one model that are written."""
        return [port.site for of, port in zip(self.writes, self.outputs, strict=True) if of == model]

    def read(self, runs: Sequence[Run], keep: Tensor) -> Tensor:
        """What the dictionary reads at the positions `keep` [b, p]: float32 [n, d_in]."""
        return _joined(runs, self.reads, self.inputs, keep)

    def target(self, runs: Sequence[Run], keep: Tensor) -> Tensor:
        """What its output stands in place of at the positions `keep` [b, p]: float32 [n, d_out]."""
        return _joined(runs, self.writes, self.outputs, keep)

    def splice(self, runs: Sequence[Run], keep: Tensor, put: Tensor) -> list[list[edits.Edit]]:
        """Edits, one list per model, that set the written sites to `put` [n, d_out] where `keep` [b, p] holds.

        Everywhere else they keep what they had: dictionaries do not see those positions in training.
        """
        found: list[list[edits.Edit]] = [[] for _ in self.models]
        parts = put.split([port.width for port in self.outputs], dim=1)
        for of, port, part in zip(self.writes, self.outputs, parts, strict=True):
            value = runs[of][port.site].clone()
            mask = keep.to(value.device)
            value[mask] = part.reshape(-1, *value.shape[2:]).to(value)
            found[of].append(edits.set(port.site, value))
        return found


def model_ports(models: Models, dictionary: Dictionary) -> ModelPorts:
    """Find each port's model among `models`: by weight hash, else by id; a single model serves a dictionary of one.

    Raises `CutawayError` for a port whose model is not given, a site that its model lacks, or one whose width differs.
    """
    given = (models,) if isinstance(models, LanguageModel) else tuple(models)
    if not given:
        raise CutawayError("no model was given to judge the dictionary in")
    wanted = list(dict.fromkeys(_owner(port) for port in (*dictionary.inputs, *dictionary.outputs)))
    if len(given) == 1:
        if len(wanted) > 1:
            names = " and ".join(owner[0] or owner[1] or "?" for owner in wanted)
            raise CutawayError(f"this crosscoder is of {len(wanted)} models ({names}): give them all, not one")
        of = dict.fromkeys(wanted, 0)
    else:
        of = {owner: _find(owner, given) for owner in wanted}
    used = sorted(set(of.values()))
    number = {owner: used.index(model) for owner, model in of.items()}
    chosen = tuple(given[model] for model in used)
    reads = tuple(number[_owner(port)] for port in dictionary.inputs)
    writes = tuple(number[_owner(port)] for port in dictionary.outputs)
    inputs = tuple(_resolved(chosen[m], port) for m, port in zip(reads, dictionary.inputs, strict=True))
    outputs = tuple(_resolved(chosen[m], port) for m, port in zip(writes, dictionary.outputs, strict=True))
    return ModelPorts(chosen, inputs, outputs, reads, writes)


@dataclass(frozen=True, eq=False)
class PortValues:
    """What a dictionary reads and should write at n positions."""

    x: Tensor
    """What it reads, float32 [n, d_in]."""
    y: Tensor
    """What it should write, float32 [n, d_out]; x itself where it writes what it reads."""
    keep: Tensor
    """The positions, bool [rows, p]; x and y are in their order."""
    excluded: int = 0
    """Positions that were left out for their high norm."""

    @property
    def row_of(self) -> Tensor:
        """The row of each position, [n]."""
        return torch.arange(len(self.keep))[:, None].expand_as(self.keep)[self.keep]


def harvest_ports(
    models: Models,
    dictionary: Dictionary,
    rows: Tensor,
    *,
    high_norm: float | None = None,
    where: ModelPorts | None = None,
) -> PortValues:
    """The values that a dictionary reads and should write, at the positions that count.

    Those are not the first of a row, not BOS, and with `high_norm` not where a value at one of the sites is much longer
    than the median.

    Args:
        models: The model that the dictionary belongs to; for a crosscoder of two models, both.
        dictionary: The dictionary.
        rows: Token ids [n, p].
        high_norm: Leave out positions whose vector is longer than so many times the site's median.
        where: The dictionary's ports in the models, for those who have found them already.

    Returns:
        x, y and where they are of.

    Raises:
        CutawayError: no position is left, a value is not finite, or the models are not the dictionary's.
    """
    where = where or model_ports(models, dictionary)
    if high_norm is not None and not high_norm > 1:
        raise CutawayError(f"high_norm is {high_norm}, a multiple of the median norm; give more than 1, or None")
    keep_freed_memory()
    keep = where.counted(rows)
    read: list[Tensor] = []
    written: list[Tensor] = []
    same = dictionary.writes_what_it_reads
    with Progress("activations", total=len(rows), unit="rows") as progress:
        for part in batches(len(rows)):
            runs = where.run(rows[part], logits=False)
            read.append(where.read(runs, keep[part]))
            if not same:
                written.append(where.target(runs, keep[part]))
            progress.advance(len(rows[part]))
    x = torch.cat(read) if read else torch.empty(0, dictionary.d_in)
    y = x if same else torch.cat(written)
    if not len(x):
        raise CutawayError("no position of these rows counts: they hold nothing but first tokens and BOS")
    for value, ports in ((x, where.inputs), (y, where.outputs)):
        if not torch.isfinite(value).all():
            sites = ", ".join(port.site for port in ports)
            raise CutawayError(f"the activations at {sites} hold NaN or infinite values: load the model in float32")
    if high_norm is None:
        return PortValues(x, y, keep)
    low = torch.ones(len(x), dtype=torch.bool)
    for value, ports in ((x, where.inputs), (y, where.outputs)):
        for part in value.split([port.width for port in ports], dim=1):
            norm = part.norm(dim=1)
            low &= (norm <= high_norm * norm.median()).cpu()
    fewer = keep.clone()
    fewer[keep] = low
    chosen = low.to(x.device)
    x, y = (x[chosen], x[chosen]) if same else (x[chosen], y[chosen])
    return PortValues(x, y, fewer, int((~low).sum()))


def read_texts(models: Models, dictionary: Dictionary, texts: Sequence[str], at: Sequence[str] | None = None) -> Tensor:
    """What a dictionary reads at one token of each text.

    Args:
        models: The model that it belongs to; for a crosscoder of two models, both.
        dictionary: The dictionary.
        texts: Texts, [n].
        at: Words of each text, whose last token (of their last mention) is read; the text's last token if None.

    Returns:
        Activations, float32 [n, d_in].

    Raises:
        CutawayError: words are not there, or the models are not the dictionary's.
    """
    where = model_ports(models, dictionary)
    lm = where.models[0]
    found = []
    with Progress("activations", total=len(texts), unit="texts") as progress:
        for part in batches(len(texts)):
            tokens = lm.tokens(list(texts[part]))
            columns = tokens.last.clone()
            if at is not None:
                for row, words in enumerate(at[part]):
                    columns[row] = tokens.column(row, tokens.find(row, words))
            keep = torch.zeros_like(tokens.mask)
            keep[torch.arange(len(keep)), columns.cpu()] = True
            found.append(where.read(where.run(tokens, logits=False), keep))
            progress.advance(len(keep))
    return torch.cat(found)


def batches(n: int) -> Iterator[slice]:
    """Rows of one forward after another."""
    for start in range(0, n, _ROWS_A_FORWARD):
        yield slice(start, start + _ROWS_A_FORWARD)


def _joined(runs: Sequence[Run], of: Sequence[int], ports: Sequence[Port], keep: Tensor) -> Tensor:
    parts = []
    for model, port in zip(of, ports, strict=True):
        value = runs[model][port.site]
        if value.ndim < 3 or value[0, 0].numel() != port.width:
            raise CutawayError(
                f"{port.site} has shape {list(value.shape)}, but the dictionary needs {port.width} values per position"
            )
        parts.append(value[keep.to(value.device)].flatten(1).float())
    return torch.cat([part.to(parts[0].device) for part in parts], dim=1) if len(parts) > 1 else parts[0]


def _owner(port: Port) -> tuple[str, str]:
    """What tells a port's model from others: its weights if known, and its name."""
    return str(port.model.get("weight_hash") or ""), str(port.model.get("id") or "")


def _find(owner: tuple[str, str], models: Sequence[LanguageModel]) -> int:
    weights, name = owner
    identities = [lm.identity() for lm in models]
    for number, identity in enumerate(identities):
        if weights and identity.weight_hash == weights:
            return number
    named = [
        number for number, identity in enumerate(identities) if name and name in (identity.id, models[number].name)
    ]
    if len(named) == 1 and not weights:
        return named[0]
    raise CutawayError(
        f"the dictionary belongs to {name or 'an unnamed model'}{f' with weights {weights[:12]}' if weights else ''}, "
        f"which is not among {', '.join(lm.name for lm in models)}"
    )


def _resolved(lm: LanguageModel, port: Port) -> Port:
    return Port(lm.sites().resolve(port.site), port.width, port.model)

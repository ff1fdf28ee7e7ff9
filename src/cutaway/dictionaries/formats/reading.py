"""What every reader of a format has: the tensors of a file, taken one by one, and what became of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError
from cutaway.dictionaries import selectors
from cutaway.dictionaries.dictionary import Dictionary, Port
from cutaway.dictionaries.formats.hooks import UNKNOWN, UNKNOWN_OUTPUT
from cutaway.dictionaries.selectors import BatchTopK, JumpReLU, ReLU, Selector

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Ports(TypedDict):
    """`reads` and `writes` of a dictionary."""

    reads: tuple[Port, ...]
    writes: tuple[Port, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its name, shape and type there, and what it is here."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    becomes: str


@dataclass(frozen=True)
class ExpectedL0:
    """How many latents should be active on a token, and what says so. `high` is the end of a range."""

    value: float
    source: str
    high: float | None = None


@dataclass(frozen=True)
class Reading:
    """A dictionary and how it was read: `folds` were applied to the weights, `hooks` are the sites as stored."""

    dictionary: Dictionary
    format: str
    path: Path
    tensors: tuple[Stored, ...] = ()
    folds: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    expected_l0: tuple[ExpectedL0, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Source:
    """The tensors of one file. What is taken is written down; what is not, too."""

    path: Path
    tensors: dict[str, Any]
    stored: list[Stored] = field(default_factory=list)
    folds: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, becomes: str, *, dims: int = 1, transposed: bool = False) -> Tensor:
        """A tensor of floating-point numbers with so many dimensions; a matrix turned round if `transposed`."""
        value = self.tensors.get(name)
        if value is None:
            raise BadFile(f"{self.path} lacks {name}; it holds {', '.join(sorted(self.tensors)[:12]) or 'nothing'}")
        if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise BadFile(f"{self.path}: {name} is {kind}, where floating-point weights are needed")
        if value.ndim != dims or 0 in value.shape:
            raise BadFile(f"{self.path}: {name} has shape {list(value.shape)}, where {dims} dimensions are needed")
        self._note(name, value, f"{becomes}, transposed" if transposed else becomes)
        return value.T.contiguous() if transposed else value

    def maybe(self, name: str, becomes: str, *, dims: int = 1, transposed: bool = False) -> Tensor | None:
        """`take`, or None where the file has no such tensor."""
        return self.take(name, becomes, dims=dims, transposed=transposed) if name in self.tensors else None

    def number(self, name: str, becomes: str) -> float | None:
        """A single number, stored as a tensor of one value or as it is; None where there is none."""
        value = self.tensors.get(name)
        if value is None:
            return None
        if isinstance(value, Tensor) and value.numel() == 1:
            self._note(name, value, becomes)
            value = value.item()
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise BadFile(f"{self.path}: {name} is not a number")
        return value

    def unused(self, name: str, why: str) -> None:
        """Write down that a tensor is left out."""
        if isinstance(value := self.tensors.get(name), Tensor):
            self._note(name, value, f"not used: {why}")

    def rest(self) -> None:
        """Write down every tensor that nobody has taken."""
        taken = {entry.name for entry in self.stored}
        for name in self.tensors:
            if name not in taken:
                self.unused(name, "not part of what the dictionary computes")

    def _note(self, name: str, value: Tensor, becomes: str) -> None:
        self.stored.append(Stored(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), becomes))


def assemble(
    source: Source,
    weights: Mapping[str, Tensor],
    selector: Selector,
    *,
    reads: Sequence[Port],
    writes: Sequence[Port] = (),
    W_skip: Tensor | None = None,
    **rest: Any,
) -> Dictionary:
    """A dictionary of the weights, all in one floating-point type: the widest among them.

    `reads` and `writes` as of `Dictionary`; what is not as it should be is said with the file's name.
    """
    tensors = [*weights.values(), *selectors.tensors_of(selector).values(), *([] if W_skip is None else [W_skip])]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    own = {name: tensor.to(dtype) for name, tensor in selectors.tensors_of(selector).items()}
    try:
        return Dictionary(
            **{name: tensor.to(dtype) for name, tensor in weights.items()},
            selector=replace(selector, **own),
            site=reads[0].site,
            model=reads[0].model,
            reads=() if len(reads) == 1 and not writes else tuple(reads),
            writes=tuple(writes),
            W_skip=None if W_skip is None else W_skip.to(dtype),
            **rest,
        )
    except CutawayError as error:
        raise BadFile(f"{source.path}: {error}") from error


def fold(source: Source, what: str, dictionary: Dictionary, folded: Callable[[Dictionary], Dictionary]) -> Dictionary:
    """Apply a fold and write down what it was."""
    source.folds.append(what)
    try:
        return folded(dictionary)
    except (CutawayError, RuntimeError) as error:
        raise BadFile(f"{source.path}: {what} could not be folded: {' '.join(str(error).split())}") from error


def thresholded(source: Source, threshold: Tensor) -> Selector:
    """JumpReLU of thresholds [F]; ReLU where all are zero or below, which selects the same."""
    if not torch.isfinite(threshold).all():
        raise BadFile(f"{source.path}: threshold holds NaN or infinite values: the dictionary cannot be used")
    return ReLU() if bool((threshold <= 0).all()) else JumpReLU(threshold)


def batch_topk(source: Source, k: float, threshold: float | None, n_latents: int) -> BatchTopK:
    """BatchTopK of a threshold that training may not have set yet (it starts at −1 in some trainers)."""
    if threshold is None or threshold < 0:
        source.notes.append("the threshold was never set: every positive pre-activation is active")
        threshold = 0.0
    return BatchTopK(min(max(1, round(k)), n_latents), float(threshold))


def model_record(name: Any) -> dict[str, Any]:
    """What a dictionary says of its model where only a name is known."""
    return {"id": name if isinstance(name, str) else None, "revision": None, "weight_hash": None}


def integer(settings: Mapping[str, Any], name: str, path: Path) -> int:
    """A positive whole number of a configuration."""
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadFile(f"{path} lacks {name!r}" if value is None else f"{path}: {name!r} is {value!r}")
    if value < 1:
        raise BadFile(f"{path}: {name!r} is {value}, where 1 or more is needed")
    return value


def mapping(settings: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A part of a configuration that is an object; empty where it is absent or null."""
    value = settings.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadFile(f"{path}: {name!r} is {value!r}, where an object is needed")
    return value


# what no other format has a place for travels in a block of our own, beside the format's settings


def our_block(dictionary: Dictionary) -> dict[str, Any]:
    """Sites, models, metadata and the selector's numbers, as JSON: `restored` reads it."""
    selector = dictionary.selector
    return {
        "site": dictionary.site,
        "model": dict(dictionary.model),
        "metadata": dict(dictionary.metadata),
        "reads": [_port_record(port) for port in (dictionary.inputs if dictionary.writes else dictionary.reads)],
        "writes": [_port_record(port) for port in dictionary.writes],
        "selector": {"name": selector.name}
        | {
            name: getattr(selector, name)
            for name in ("k", "threshold")
            if isinstance(getattr(selector, name, None), int | float)
        },
    }


def restored(dictionary: Dictionary, block: Mapping[str, Any], path: Path) -> Dictionary:
    """The dictionary with the names, numbers and metadata of a block that `our_block` made; unchanged without one.

    The block is as untrusted as the rest of the file: the weights decide what is computed. A BatchTopK's numbers come
    back where the stored thresholds are that one number.
    """
    if not block:
        return dictionary
    site, model, metadata = block.get("site"), block.get("model", {}), block.get("metadata", {})
    if not (isinstance(site, str) and isinstance(model, dict) and isinstance(metadata, dict)):
        raise BadFile(f"{path}: the block 'cutaway' has no site, or a model or metadata that are no objects")
    changes: dict[str, Any] = {"site": site, "model": model, "metadata": metadata}
    for name in ("reads", "writes"):
        records = block.get(name) or []
        if not isinstance(records, list):
            raise BadFile(f"{path}: the block 'cutaway' has {name} that are no list")
        changes[name] = tuple(port_of(record, path) for record in records)
    selector = block.get("selector") or {}
    stored = dictionary.selector
    if isinstance(selector, dict) and selector.get("name") == "batchtopk" and isinstance(stored, ReLU | JumpReLU):
        k, threshold = selector.get("k"), selector.get("threshold")
        if isinstance(k, int) and isinstance(threshold, int | float) and abs(threshold) < 1e30:
            stored_one = isinstance(stored, JumpReLU) and bool(
                (stored.threshold == stored.threshold.new_tensor(float(threshold))).all()
            )
            if stored_one or (isinstance(stored, ReLU) and threshold == 0):
                changes["selector"] = BatchTopK(k, float(threshold))
    try:
        return replace(dictionary, **changes)
    except CutawayError as error:
        raise BadFile(f"{path}: {error}") from error


def _port_record(port: Port) -> dict[str, Any]:
    return {"site": port.site, "width": port.width, "model": dict(port.model)}


def port_of(record: Any, path: Path) -> Port:
    if isinstance(record, dict):
        site, width, model = record.get("site"), record.get("width"), record.get("model", {})
        if isinstance(site, str) and isinstance(width, int) and isinstance(model, dict):
            return Port(site, width, model)
    raise BadFile(f"{path}: the block 'cutaway' names a tensor as {record!r}")


def ports(read: str, write: str | None, widths: tuple[int, int], model: Any) -> Ports:
    """`reads` and `writes` of `assemble` for one site in (and another out, where `write` is not None)."""
    record = model_record(model)
    reads = (Port(read or UNKNOWN, widths[0], record),)
    return Ports(reads=reads, writes=() if write is None else (Port(write or UNKNOWN_OUTPUT, widths[1], record),))

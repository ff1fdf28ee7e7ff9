"""Dictionaries in files: `load` finds out which format they are in, `save` writes one."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from cutaway.artifacts.errors import BadFile, CutawayError, NotSupported
from cutaway.artifacts.files import atomic_folder, clear_leftovers
from cutaway.dictionaries.dictionary import Dictionary, Port
from cutaway.dictionaries.formats import (
    archive,
    by_tensors,
    circuit_tracer,
    crosscoders,
    dictionary_learning,
    gemma_scope,
    hub,
    linear,
    saelens,
    sparsify,
)
from cutaway.dictionaries.formats.reading import Reading
from cutaway.model.devices import usable_device

Format = Literal[
    "cutaway",
    "saelens",
    "saelens-5",
    "saelens-training",
    "sparsify",
    "dictionary_learning",
    "gemma-scope",
    "gemma-scope-2",
    "circuit-tracer",
]


@dataclass(frozen=True)
class _Format:
    name: str
    looks_for: str
    fits: Callable[[Path], bool]
    read: Callable[[Path], Reading]


# the first that fits is taken, so what is more particular stands first
_READ = (
    _Format("Gemma Scope", "params.npz or params.safetensors", gemma_scope.fits, gemma_scope.read),
    _Format("sparsify", "sae.safetensors with cfg.json", sparsify.fits, sparsify.read),
    _Format("crosscoder", "cc_weights.pt with cfg.json", crosscoders.fits, crosscoders.read),
    _Format("SAELens", "sae_weights.safetensors with cfg.json", saelens.fits, saelens.read),
    _Format(
        "Llama Scope",
        "hyperparams.json with checkpoints/final.safetensors",
        linear.fits_llama_scope,
        linear.read_llama_scope,
    ),
    _Format(
        "dictionary_learning",
        "ae.pt or ae_1000.pt with config.json",
        dictionary_learning.fits,
        dictionary_learning.read,
    ),
    _Format(
        "circuit-tracer", "config.yaml with layer_0.safetensors, ...", circuit_tracer.fits, lambda path: _only(path)
    ),
    _Format(
        "OpenAI, Goodfire, DeepSeek-R1, Qwen-Scope", "a .pt or .pth file", linear.fits_archive, linear.read_archive
    ),
)

# every file that `save` writes
_SAVED = (
    saelens.CFG, saelens.WEIGHTS, saelens.SPARSITY, saelens.SCALER, sparsify.WEIGHTS, archive.CFG,
    archive.WEIGHTS, gemma_scope.NPZ, gemma_scope.SAFETENSORS, gemma_scope.BESIDE, circuit_tracer.CFG,
    "layer_*.safetensors", "cc_weights.pt",
)  # fmt: skip


def read(where: str | Path, names: Mapping[str, str] | None = None) -> Reading:
    """A dictionary and how its files were read: see `load`, which keeps the dictionary alone."""
    path = _found(where)
    if names is not None:
        return by_tensors.read(path, names)
    for known in _READ:
        if known.fits(path):
            return known.read(path)
    below = _below(path)
    if len(below) == 1:
        return read(next(iter(below.values())))
    if below:
        listed = ", ".join(list(below)[:8]) + (", …" if len(below) > 8 else "")
        raise BadFile(f"{path} is no dictionary, but holds {len(below)}: name one of {listed}")
    if by_tensors.recognised(path):
        return by_tensors.read(path)
    way = (
        "" if by_tensors.weights_file(path) is None else "; --map W_enc=NAME,W_dec=NAME,... says which tensor is which"
    )
    looked = "; ".join(known.looks_for for known in _READ)
    what = "holds no dictionary" if path.is_dir() else "is no dictionary that is read here"
    raise BadFile(f"{path} {what}: looked for {looked}{way}")


def _below(path: Path, depth: int = 3) -> dict[str, Path]:
    """The folders of dictionaries below a folder, by their path in it; not what lies inside of a dictionary's own."""
    found: dict[str, Path] = {}
    if depth == 0 or not path.is_dir():
        return found
    for child in sorted(path.iterdir()):
        if not child.is_dir():
            continue
        if any(known.fits(child) for known in _READ):
            found[child.name] = child
        else:
            found |= {f"{child.name}/{name}": place for name, place in _below(child, depth - 1).items()}
    return found


def load(
    where: str | Path,
    *,
    site: str | None = None,
    names: Mapping[str, str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Dictionary:
    """Read a dictionary, whatever format it is in.

    What can be folded into the weights is folded, so it takes the model's activations as they are. Files are not
    trusted: pickled objects are refused.

    Args:
        where: A folder or file, a folder that holds one dictionary somewhere below, "hf://owner/repository/folder", or
            one that ships with the package, such as "atlas/blocks.3.resid_post".
        site: Where it belongs, if the files do not say so, or do wrongly.
        names: Which tensor is what, for files without settings whose tensors are not recognised:
            {"W_enc": "encoder.weight"}.
        device: Where to put it; the CPU if None.
        dtype: Its floating-point type; as it is stored if None (float32 for one that ships with the package).

    Returns:
        The dictionary.

    Raises:
        BadFile: what is there is no dictionary, spoiled, or a set of several, which `load_all` reads.
        CutawayError: there is no such folder, or the dictionary is of a kind that is not read.

    Example:
        >>> load("atlas/blocks.3.resid_post").d_sae
        4096
    """
    dictionary = read(where, names).dictionary
    if site is not None:
        dictionary = at_site(dictionary, site)
    if dtype is None and hub.is_shipped(where):
        dtype = torch.float32  # stored in half precision for its size only
    if device is not None:
        device = usable_device(device)
    return dictionary if device is None and dtype is None else dictionary.to(device, dtype)


def load_all(where: str | Path, names: Mapping[str, str] | None = None) -> dict[str, Dictionary]:
    """Read every dictionary of a set, or of a folder of folders.

    Args:
        where: As `load`'s.
        names: As `load`'s.

    Returns:
        By name: of a circuit-tracer set "layer_0", ...; of folders, theirs; a single one under its folder's name.

    Raises:
        CutawayError: as `load`.
    """
    return {name: reading.dictionary for name, reading in read_all(where, names).items()}


def read_all(where: str | Path, names: Mapping[str, str] | None = None) -> dict[str, Reading]:
    """`load_all`, and how the files were read."""
    path = _found(where)
    if names is not None:
        return {path.stem if path.is_file() else path.name: by_tensors.read(path, names)}
    known = next((known for known in _READ if known.fits(path)), None)
    if known is not None and known.name != "circuit-tracer":
        return {path.stem if path.is_file() else path.name: known.read(path)}
    if known is None:
        found = {name: read(place) for name, place in _below(path).items()}
        return found or {path.name: read(path)}
    folder = path.parent if path.is_file() else path
    found = {}
    for name, place in circuit_tracer.layers(path).items():
        file = hub.local(place)
        own = circuit_tracer.fits(file) and file.is_file()
        found[name] = circuit_tracer.read(file, folder) if own else read(file)
    return found


def _found(where: str | Path) -> Path:
    """Where it is here; what was killed while it was being replaced is put back."""
    path = Path(where)
    if not str(where).startswith(hub.PREFIX) and not os.path.exists(path):
        clear_leftovers(path.expanduser().parent)
    return hub.local(where)


def _only(path: Path) -> Reading:
    readings = circuit_tracer.layers(path)
    if len(readings) > 1:
        names = ", ".join(list(readings)[:4])
        raise BadFile(
            f"{path} holds {len(readings)} transcoders ({names}, ...): name the file of one, or use load_all for all"
        )
    return next(iter(read_all(path).values()))


def at_site(dictionary: Dictionary, site: str) -> Dictionary:
    """The same dictionary, said to read (and, where it writes what it reads, to write) another site.

    Args:
        dictionary: Not a crosscoder.
        site: The site's name.

    Returns:
        A dictionary of the same weights.

    Raises:
        CutawayError: it is a crosscoder.
    """
    if len(dictionary.reads) > 1:
        raise CutawayError("a crosscoder reads several sites: one name cannot stand for them")
    same = dictionary.writes_what_it_reads
    one = (Port(site, dictionary.d_in, dictionary.inputs[0].model),)
    return replace(
        dictionary,
        site=site,
        reads=one if dictionary.reads else (),
        writes=one if same and dictionary.writes else dictionary.writes,
    )


def save(dictionary: Dictionary, folder: str | Path, format: Format = "cutaway", *, overwrite: bool = False) -> Path:
    """Write a dictionary in one of the field's formats, whole or not at all.

    Args:
        dictionary: What to write.
        folder: A new folder.
        format: "cutaway" takes every dictionary: it is SAELens' layout, which SAELens reads where it has the
            architecture. "saelens" is the same, and refuses what SAELens would not read; the others refuse what they
            cannot express.
        overwrite: Replace the dictionary that is in the folder.

    Returns:
        The folder.

    Raises:
        NotSupported: the format cannot express it.
        BadFile: the folder exists (and not `overwrite`), or is not a dictionary's.
        CutawayError: it cannot be written to.

    Example:
        >>> save(dictionary, "runs/mine", format="dictionary_learning")  # doctest: +SKIP
        PosixPath('runs/mine')
    """
    return save_all([dictionary], folder, format, overwrite=overwrite)


def save_all(
    dictionaries: Sequence[Dictionary], folder: str | Path, format: Format = "cutaway", *, overwrite: bool = False
) -> Path:
    """Write several dictionaries: a circuit-tracer set, or a folder for each below one, named after its site.

    Args:
        dictionaries: What to write; one alone is written into `folder` itself.
        folder: As `save`'s.
        format: As `save`'s.
        overwrite: As `save`'s.

    Returns:
        The folder.

    Raises:
        CutawayError: as `save`, and where two are of one site.
    """
    if format not in get_args(Format):
        raise NotSupported(f"{format!r} is no format: write {', '.join(get_args(Format))}")
    if not dictionaries:
        raise CutawayError("there is no dictionary to save")
    with _whole_folder(Path(folder), overwrite) as fresh:
        if format == "circuit-tracer":
            circuit_tracer.write(dictionaries, fresh)
        elif len(dictionaries) == 1:
            _write(dictionaries[0], fresh, format)
        else:
            for dictionary in dictionaries:
                part = fresh / dictionary.site
                if part.exists():
                    raise CutawayError(
                        f"two dictionaries are of {dictionary.site}: save them into folders of their own"
                    )
                part.mkdir()
                _write(dictionary, part, format)
    return Path(folder)


def _write(dictionary: Dictionary, folder: Path, format: Format) -> None:
    if format in ("cutaway", "saelens", "saelens-5", "saelens-training"):
        layouts = {"cutaway": "cutaway", "saelens": "6", "saelens-5": "5", "saelens-training": "training"}
        saelens.write(dictionary, folder, layouts[format])  # pyright: ignore[reportArgumentType]
    elif format == "sparsify":
        sparsify.write(dictionary, folder)
    elif format == "dictionary_learning":
        dictionary_learning.write(dictionary, folder)
    elif format == "gemma-scope":
        gemma_scope.write_first(dictionary, folder)
    else:
        gemma_scope.write_second(dictionary, folder)


def _refuse_others(folder: Path) -> None:
    """Raise unless the folder, all of which goes when it is overwritten, holds nothing but dictionaries of ours."""
    if folder.is_symlink() or not folder.is_dir():
        raise BadFile(f"{folder} exists and is not a dictionary's folder: name another")
    children = [child for child in folder.iterdir() if child.is_dir()]
    places = [folder, *children] if any(known.fits(folder) for known in _READ) else children
    if not places or not all(_saved_files(place) for place in places):
        raise BadFile(f"{folder} exists and is not a dictionary's folder: name another")
    allowed = {path for place in places for path in _saved_files(place)} | {*children}
    for path in [path for place in {folder, *children} for path in place.iterdir()]:
        if path not in allowed:
            raise BadFile(
                f"{folder} holds {path.relative_to(folder)} too, which cutaway did not write: name another folder, or "
                "move it"
            )


def _saved_files(folder: Path) -> set[Path]:
    """The files in a dictionary's folder that `save` writes; none where its settings do not say that cutaway did."""
    written = [path for pattern in _SAVED for path in folder.glob(pattern) if path.is_file()]
    settings = [path for path in written if path.suffix in (".json", ".yaml")]
    ours = any(path.name == gemma_scope.BESIDE or b"cutaway" in path.read_bytes() for path in settings)
    return set(written) if ours else set()


@contextlib.contextmanager
def _whole_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside, which takes the place of `folder` when the body ends well."""
    clear_leftovers(folder.parent)  # an earlier dictionary may have been left under another name
    if folder.exists():
        if not overwrite:
            raise BadFile(f"{folder} exists: name another folder, or allow it to be overwritten")
        _refuse_others(folder)
    with atomic_folder(folder) as fresh:
        yield fresh

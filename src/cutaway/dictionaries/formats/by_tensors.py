"""A dictionary whose settings are missing, recognised from its tensors: names, shapes, or what the user says.

Names give each tensor its role: the spellings of the formats that are read elsewhere, after a prefix that all share,
or any that hold "enc" and "dec". Shapes give the orientation: biases say which side of a matrix the latents are on. A
square matrix is [in, out] unless it is a linear layer's ("….weight"), which torch keeps as [out, in]. What computes the
activations follows from what is there: thresholds, a k, gates, or nothing but relu. Whatever had to be assumed stands
in the notes of the `Reading`.

A mapping overrides all of it: {"W_enc": "encoder.weight", "k": "32", "subtract_b_dec": "false"}.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import BadFile, CutawayError
from cutaway.dictionaries.formats.reading import Reading, Source, assemble, batch_topk, ports, thresholded
from cutaway.dictionaries.formats.untrusted import read_tensors
from cutaway.dictionaries.selectors import Gated, JumpReLU, ReLU, Selector, TopK

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")

_SPELLINGS: dict[str, tuple[str, ...]] = {
    "W_enc": ("W_enc", "w_enc", "encoder.weight", "encoder_linear.weight"),
    "b_enc": ("b_enc", "encoder.bias", "encoder_linear.bias", "latent_bias", "b_gate", "gate_bias"),
    "W_dec": ("W_dec", "w_dec", "decoder.weight", "decoder_linear.weight"),
    "b_dec": ("b_dec", "decoder.bias", "decoder_linear.bias", "pre_bias"),
    "threshold": ("threshold", "jumprelu.threshold"),
    "log_threshold": ("log_threshold", "log_jumprelu_threshold"),
    "k": ("k",),
    "r_mag": ("r_mag",),
    "b_mag": ("b_mag", "mag_bias"),
    "W_skip": ("W_skip",),
}
ROLES = (*_SPELLINGS, "subtract_b_dec")
_DIMS = {"W_enc": 2, "W_dec": 2, "W_skip": 2}
_BESIDE = "sparsity.safetensors"  # frequencies of activation, in SAELens' layout
_SPARSIFY = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}  # its k stands in its settings alone


def weights_file(path: Path) -> Path | None:
    """The one file of tensors that a path is or holds, or None."""
    if path.is_file():
        return path if path.suffix in SUFFIXES else None
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and file.name != _BESIDE]
    return files[0] if len(files) == 1 else None


def parse_map(text: str) -> dict[str, str]:
    """The mapping that "W_enc=encoder.weight,k=32" says. Raises `CutawayError` for another form or an unknown role."""
    found: dict[str, str] = {}
    for part in text.split(","):
        role, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not name or role not in ROLES:
            raise CutawayError(
                f"--map {part.strip()!r}: write ROLE=NAME, such as W_enc=encoder.weight; roles are {', '.join(ROLES)}"
            )
        if role in found:
            raise CutawayError(f"--map names {role} twice")
        found[role] = name
    return found


def recognised(path: Path) -> bool:
    """Whether the tensors at a path say by themselves that they are an encoder and a decoder."""
    file = weights_file(path)
    if file is None:
        return False
    return {"W_enc", "W_dec"} <= {*_roles(_flat(dict(read_tensors(file))))}


def read(path: Path, names: Mapping[str, str] | None = None) -> Reading:
    """Read a file, or the only one of a folder; `names` says which tensor has which role, for some or all."""
    names = dict(names or {})
    if unknown := [role for role in names if role not in ROLES]:
        raise CutawayError(f"{unknown[0]!r} is no role of a tensor; there are {', '.join(ROLES)}")
    file = weights_file(path)
    if file is None:
        raise BadFile(f"{path} is not a file of tensors ({', '.join(SUFFIXES)}), nor a folder with just one")
    source = Source(file, _flat(dict(read_tensors(file))))
    roles = _roles(source.tensors) | {role: name for role, name in names.items() if role in _SPELLINGS}
    for role in ("W_enc", "W_dec"):
        if role not in roles:
            raise _unknown(source, role)
    matrices = {role: _tensor(source, roles, role) for role in ("W_enc", "W_dec", "W_skip") if role in roles}
    latents = _latents(source, roles, matrices)
    weights = {
        "W_enc": _oriented(source, roles["W_enc"], "W_enc", latents, 1),
        "W_dec": _oriented(source, roles["W_dec"], "W_dec", latents, 0),
    }
    d_in, d_out = weights["W_enc"].shape[0], weights["W_dec"].shape[1]
    for role, size in (("b_enc", latents), ("b_dec", d_out)):
        if role in roles:
            weights[role] = source.take(roles[role], role)
        else:
            weights[role] = torch.zeros(size, dtype=weights["W_enc"].dtype)
            source.notes.append(f"there is no {role}: it is zero")
    selector = _selector(source, roles, names, latents)
    subtracts = _subtracts(source, roles, names, selector, d_in, d_out)
    skip = source.take(roles["W_skip"], "W_skip [d_out, d_in]", dims=2) if "W_skip" in roles else None
    source.rest()
    dictionary = assemble(
        source,
        weights,
        selector,
        W_skip=skip,
        subtract_b_dec=subtracts,
        **ports("", None if d_in == d_out and skip is None else "", (d_in, d_out), None),
    )
    return Reading(
        dictionary,
        "tensors alone, without settings",
        path,
        tuple(source.stored),
        notes=(*source.notes, "nothing says which site it belongs to"),
    )


def _flat(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors of an archive that keeps them in a dictionary inside, such as "state_dict"."""
    while not any(isinstance(value, Tensor) and value.ndim == 2 for value in tensors.values()):
        inner = [value for value in tensors.values() if isinstance(value, dict) and value]
        if len(inner) != 1:
            break
        tensors = inner[0]
    return tensors


def _roles(tensors: Mapping[str, Any]) -> dict[str, str]:
    """The name of the tensor of each role that is recognised."""
    names = [name for name in tensors if isinstance(name, str)]
    parts = [name.split(".") for name in names]
    shared = 0  # dotted parts that stand before every name
    while parts and all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    short = {".".join(name.split(".")[shared:]): name for name in names} | {name: name for name in names}
    found = {
        role: short[known[0]] for role, all_of in _SPELLINGS.items() if (known := [s for s in all_of if s in short])
    }
    for side in ("enc", "dec"):
        for role, dims in ((f"W_{side}", 2), (f"b_{side}", 1)):
            like = [
                name
                for name, value in tensors.items()
                if isinstance(value, Tensor)
                and value.ndim == dims
                and re.search(rf"(?<![a-z]){side}|_{side}", name.lower())
            ]
            if role not in found and len(like) == 1:
                found[role] = like[0]
    return found


def _tensor(source: Source, roles: Mapping[str, str], role: str) -> Tensor:
    value = source.tensors.get(roles[role])
    if not isinstance(value, Tensor):
        raise BadFile(f"{source.path} has no tensor {roles[role]!r} to be {role}; it holds {_held(source)}")
    if value.ndim != _DIMS.get(role, 1):
        raise BadFile(f"{source.path}: {roles[role]} is {list(value.shape)}, which {role} cannot be")
    return value


def _latents(source: Source, roles: Mapping[str, str], matrices: Mapping[str, Tensor]) -> int:
    """How many latents there are: by a bias or a threshold of the encoder, else the longer side of its matrix."""
    sides = {*matrices["W_enc"].shape} & {*matrices["W_dec"].shape}
    for role in ("b_enc", "threshold", "log_threshold", "r_mag"):
        if role in roles and isinstance(value := source.tensors.get(roles[role]), Tensor) and value.ndim == 1:
            if len(value) in sides:
                return len(value)
            if len(value) > 1:
                raise _no_fit(source, roles, matrices)
    if "b_dec" in roles and len(others := {*matrices["W_enc"].shape} - {len(_tensor(source, roles, "b_dec"))}) == 1:
        return others.pop()
    if not sides:
        raise _no_fit(source, roles, matrices)
    source.notes.append(f"taken to have {max(sides)} latents, the longer side: there is no bias to tell")
    return max(sides)


def _no_fit(source: Source, roles: Mapping[str, str], matrices: Mapping[str, Tensor]) -> CutawayError:
    shapes = ", ".join(f"{roles[role]} {list(value.shape)}" for role, value in matrices.items())
    return CutawayError(f"{source.path}: {shapes} and their biases do not fit together as an encoder and a decoder")


def _oriented(source: Source, name: str, role: str, latents: int, at: int) -> Tensor:
    """A matrix with the latents on side `at`."""
    shape = tuple(source.tensors[name].shape)
    if latents not in shape:
        raise BadFile(f"{source.path}: {name} is {list(shape)}, where one side has to be the {latents} latents")
    turned = name.endswith("weight") if shape[0] == shape[1] else shape[at] != latents
    if shape[0] == shape[1]:
        source.notes.append(f"{name} is square, and taken as {'[out, in]' if turned else '[in, out]'} by its name")
    return source.take(name, f"{role} {'[d_in, F]' if at else '[F, d_out]'}", dims=2, transposed=turned)


def _selector(source: Source, roles: Mapping[str, str], names: Mapping[str, str], latents: int) -> Selector:
    k = _k(source, roles, names)
    if "r_mag" in roles:
        if "b_mag" not in roles:
            raise BadFile(f"{source.path} has {roles['r_mag']} and no b_mag: a gate needs both")
        return Gated(source.take(roles["r_mag"], "r_mag [F]"), source.take(roles["b_mag"], "b_mag [F]"))
    one = None
    for role in ("threshold", "log_threshold"):
        if role not in roles:
            continue
        value = source.tensors.get(roles[role])
        if isinstance(value, Tensor) and value.ndim == 1 and len(value) == latents:
            threshold = source.take(roles[role], "threshold [F]" + (", exp applied" if role != "threshold" else ""))
            return thresholded(source, threshold.exp() if role != "threshold" else threshold)
        one = source.number(roles[role], "threshold")
        one = float(torch.tensor(one).exp()) if one is not None and role != "threshold" else one
    if k is not None and one is not None:
        return batch_topk(source, k, one, latents)
    if k is not None:
        return TopK(min(max(1, round(k)), latents))
    if one is not None:
        return thresholded(source, torch.full((latents,), float(one)))
    if {*source.tensors} >= _SPARSIFY:
        raise BadFile(
            f"{source.path} holds sparsify's tensors, whose k stands in its cfg.json, and there is none: give it with "
            "--map k=32"
        )
    source.notes.append("nothing says how many latents are active: read as relu (k=32 in --map makes it topk)")
    return ReLU()


def _k(source: Source, roles: Mapping[str, str], names: Mapping[str, str]) -> float | None:
    given = names.get("k")
    if given is not None and given not in source.tensors:
        if not given.isdigit() or int(given) < 1:
            raise CutawayError(f"--map k={given}: {source.path.name} has no tensor of that name, and it is no number")
        return int(given)
    return source.number(roles["k"], "k") if "k" in roles else None


def _subtracts(
    source: Source, roles: Mapping[str, str], names: Mapping[str, str], selector: Selector, d_in: int, d_out: int
) -> bool:
    """Whether b_dec is taken off the input: as the mapping says, or as dictionaries of these names do."""
    said = names.get("subtract_b_dec", "").lower()
    if said in ("true", "yes", "1"):
        return True
    if said in ("false", "no", "0"):
        return False
    if said:
        raise CutawayError(f"--map subtract_b_dec={said}: it is true or false")
    if "b_dec" not in roles:
        return False
    linear = roles["b_dec"].endswith(("decoder.bias", "decoder_linear.bias"))
    usual = d_in == d_out and not linear and not isinstance(selector, JumpReLU)
    source.notes.append(
        f"b_dec is taken to be {'' if usual else 'not '}subtracted from the input, which no tensor says "
        f"(subtract_b_dec={'false' if usual else 'true'} in --map changes it)"
    )
    return usual


def _held(source: Source) -> str:
    shown = [
        f"{name} {list(value.shape)}" if isinstance(value, Tensor) else str(name)
        for name, value in list(source.tensors.items())[:10]
    ]
    return ", ".join(shown) or "nothing"


def _unknown(source: Source, role: str) -> CutawayError:
    return CutawayError(
        f"{source.path} has no tensor that is known to be {role}; say which is which with --map "
        f"W_enc=NAME,b_enc=NAME,W_dec=NAME,b_dec=NAME: it holds {_held(source)}"
    )

"""What an edit makes of the values that it touches: the formula of each kind, noise, and functions by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError

EditFunction = Callable[[Tensor], Tensor]
"""Values of the addressed tokens [n, ...one token's value] -> as many, of the same shape."""

_functions: dict[str, EditFunction] = {}


def register_edit_function(name: str) -> Callable[[EditFunction], EditFunction]:
    """Decorator that gives a function a name, under which edits made from it can be saved and loaded.

    Args:
        name: the name. The module that registers it has to be imported where the edit is loaded.

    Returns:
        The decorator.

    Raises:
        CutawayError: another function has the name.

    Example:
        @cutaway.register_edit_function("halved")
        def halved(x):
            return x / 2
    """

    def register(function: EditFunction) -> EditFunction:
        known = _functions.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
            raise CutawayError(f"There is already an edit function named '{name}'; choose another name.")
        _functions[name] = function
        return function

    return register


def registered_function(name: str) -> EditFunction:
    """The function of a name. Raises CutawayError where none is registered."""
    if name not in _functions:
        raise CutawayError(
            f"No edit function is registered as '{name}'; import the module that calls register_edit_function for it."
        )
    return _functions[name]


def name_of_function(function: EditFunction) -> str | None:
    """The name under which a function is registered, if it is."""
    return next((name for name, known in _functions.items() if known is function), None)


def orthonormal(basis: Tensor) -> Tensor:
    """Rows [k, width] -> orthonormal rows that span the same subspace, in fp32 or wider (QR in float64)."""
    if basis.ndim == 1:
        basis = basis[None]
    if basis.ndim != 2 or not 0 < basis.shape[0] <= basis.shape[1]:
        raise CutawayError(
            f"A basis has the shape [k, width], with k vectors in its rows; got one of shape {list(basis.shape)}."
        )
    vectors = basis.detach().double()
    lengths = vectors.norm(dim=1, keepdim=True)
    if bool((lengths == 0).any()):
        raise CutawayError("A vector of the basis is zero, so there is nothing to project on.")
    q, r = torch.linalg.qr((vectors / lengths).T)
    diagonal = r.diagonal()
    if bool((diagonal.abs() < 1e-6).any()):
        raise CutawayError("The vectors of the basis depend on each other; leave out those that add no direction.")
    q = q * diagonal.sign()  # so that an orthonormal basis stays what it is
    return q.T.contiguous().to(torch.promote_types(basis.dtype, torch.float32))


def row_key(seed: int, ids: Sequence[int]) -> bytes:
    """What a row's random numbers derive from: a seed and the row's own tokens, wherever in a batch it stands."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{seed}|".encode())
    digest.update(np.asarray(ids, dtype="<i8").tobytes())
    return digest.digest()


def next_key(key: bytes, token: int) -> bytes:
    """The key of a row's tokens so far, and one token more."""
    return hashlib.blake2b(key + token.to_bytes(8, "little"), digest_size=16).digest()


def prefix_keys(seed: int, ids: Sequence[int]) -> list[bytes]:
    """A key for each token of a row, from a seed and the tokens up to and with it."""
    keys, key = [], row_key(seed, ())
    for token in ids:
        key = next_key(key, token)
        keys.append(key)
    return keys


def generator(key: bytes, *parts: object) -> np.random.Generator:
    """Random numbers that belong to a row's key and what `parts` name."""
    digest = hashlib.blake2b(key, digest_size=16)
    digest.update("|".join(str(part) for part in parts).encode())
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest.digest(), "little")))


def token_noise(key: bytes, site: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers for one token's value at a site, the same in every run and every batch, fp32.

    `key` is of the token's prefix. The whole value is drawn, whatever heads or neurons an edit then takes of it.
    """
    drawn = generator(key, site).standard_normal(tuple(shape))
    return torch.from_numpy(drawn).float()


def plain_numbers(tensor: Tensor, what: str) -> Tensor:
    """The tensor, unless it has no real numbers to compute with. Raises CutawayError then."""
    odd = [
        ("sparse", tensor.layout is not torch.strided),
        ("on the meta device", tensor.device.type == "meta"),
        ("quantised", tensor.is_quantized),
        ("complex", tensor.is_complex()),
    ]
    for how, found in odd:
        if found:
            raise CutawayError(f"The edit's {what} is {how}; give a plain tensor of real numbers.")
    return tensor

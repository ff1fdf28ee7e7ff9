"""The constructors of edits: what is patched, ablated, clamped, added or steered, and where.

An `Edit` is a small value: it can be compared, hashed, printed, saved (`save_edits`) and used again. Every constructor
takes the same address by keyword:

    positions   which tokens: None (every real token), a number or a list (in each row; 0 is the first real token, -1
                the last), a list of lists (row by row), a slice, a boolean mask [b, p] in the layout of
                `lm.tokens(...)`, or `at_token(...)`. At scores and pattern a position is a destination.
    heads       heads; key-value heads at k, v, rot_k
    neurons     entries of the last dimension at any site; latents, where the site is a dictionary
    rows        rows of the batch, or of the prompts
    phase       "all", "prompt", "new" or (start, stop) of new tokens; with the last two, positions number new tokens
                from 0, else those of the prompt

`edit.within(basis)` lets only the part of the change within a subspace happen. Masked cells of scores stay masked.
Edits at one site apply in list order.

A value broadcasts to each addressed token: shaped like one token's value at the site (trailing dimensions), or with a
leading dimension of one entry per position, or two leading dimensions [row, position] (of every column, as captures
have them, where no positions are named).

Where the site is a dictionary, its latent activations are what is edited: the value x at the dictionary's site becomes
x + decode(e(a)) - decode(a) with a = encode(x), so that what the dictionary does not explain stays as it is. Each edit
encodes what it finds, so change several latents with one edit where that is meant.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edit import (
    Edit,
    Phase,
    Receipt,
    edit_list,
    made,
    number,
    taken_from,
    tensor_of,
    unit,
)
from cutaway.model.edits.positions import (
    AtToken,
    NothingEdited,
    PositionMap,
    Positions,
    at_token,
    places,
    position_map_places,
    several,
    whole,
)
from cutaway.model.edits.source import Source
from cutaway.model.edits.values import EditFunction, name_of_function, registered_function
from cutaway.model.latents import Latents, clamp_parts, edited_site

__all__ = ["AtToken", "Edit", "NothingEdited", "Positions", "Receipt", "at_token", "edit_list"]


def set(
    site: str | Latents,
    value: Tensor | float,
    *,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Replace the value at the site.

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        value: the new value, as this module says how it broadcasts.
        positions: tokens; None is every real token, see `Positions`.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Example:
        lm.run(prompt, edits=cutaway.set("blocks.3.mlp.post", 0.0, neurons=[3, 17]))
    """
    tensors = {"value": tensor_of(value, "value")}
    return made("set", site, positions, heads, neurons, rows, phase, tensors=tensors)


def zero(
    site: str | Latents,
    *,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Replace the value by zero (zero ablation).

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        positions: tokens; None is every real token, see `Positions`.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Example:
        lm.run(prompt, edits=cutaway.zero("blocks.4.attn.z", heads=2))
    """
    return made("zero", site, positions, heads, neurons, rows, phase)


def mean(
    site: str | Latents,
    value: Tensor | float,
    *,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Replace the value by its mean over a data set (mean ablation).

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        value: that mean, which you measured.
        positions: tokens; None is every real token, see `Positions`.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Example:
        cutaway.mean("blocks.3.attn.out", run["blocks.3.attn.out"].mean((0, 1)))
    """
    tensors = {"value": tensor_of(value, "mean")}
    return made("mean", site, positions, heads, neurons, rows, phase, tensors=tensors)


def patch(
    site: str | Latents,
    source: Source | Tensor,
    *,
    source_positions: Positions = None,
    source_rows: int | Sequence[int] | None = None,
    other_model: bool = False,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Replace the value by the one that another run has at the same site (activation patching).

    At scores and pattern, keys match by number.

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        source: a run or generation that captured the site, or a tensor shaped like the site (right padded). New
            tokens of a generation are never patched.
        source_positions: the tokens to take, in the same forms as `positions` and as many, counted in the source's
            rows. None: those of the same number, from the end where they count from the end.
        source_rows: the row of the source for each touched row. None: the same row, or the source's only one.
        other_model: take the values also where the source is a run of other weights.
        positions: tokens; None is every real token, see `Positions`.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Raises:
        CutawayError: no source, or `source_positions` without `positions`. The run refuses a source that does not fit.

    Example:
        lm.run(corrupt, edits=cutaway.patch("blocks.3.resid_post", clean_run, positions=-1))
    """
    if source_positions is not None and positions is None:
        raise CutawayError("source_positions needs positions of the same number beside it.")
    return made(
        "patch",
        site,
        positions,
        heads,
        neurons,
        rows,
        phase,
        **taken_from(source, "patch"),
        source_positions=places(source_positions),
        source_rows=None if source_rows is None else several(source_rows, "source_rows"),
        other_model=bool(other_model),
    )


def resample(
    site: str | Latents,
    source: Source | Tensor,
    *,
    seed: int | Sequence[int] | None = None,
    source_rows: int | Sequence[int] | None = None,
    other_model: bool = False,
    positions: PositionMap = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Replace the value by one taken elsewhere in a source (resample ablation).

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        source: a run or generation that captured the site, or a tensor shaped like the site.
        seed: a number, or one per touched row: draw for each row another row of the source that is long enough and has
            other tokens. The draw depends on the seed and the row's own tokens, not on the batch around it.
        source_rows: the row of the source for each touched row, in place of a seed. Else rows match as in `patch`.
        other_model: take the values also where the source is a run of other weights.
        positions: tokens, or {to: from}, which says the source's position that each position takes: one for all
            rows, or a list of one per touched row.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Raises:
        CutawayError: a seed beside `source_rows`; neither of them, and no position map.

    Example:
        lm.run(prompts, edits=cutaway.resample("blocks.3.attn.z", lm.run(others, capture="blocks.3.attn.z"), seed=0))
    """
    if seed is not None and source_rows is not None:
        raise CutawayError("resample draws its source rows with a seed or takes source_rows, not both.")
    touched, origins = position_map_places(positions)
    if origins is None and seed is None and source_rows is None:
        raise CutawayError(
            "resample needs positions={to: from}, source_rows, or a seed to draw rows with; else use patch."
        )
    return made(
        "resample",
        site,
        touched,
        heads,
        neurons,
        rows,
        phase,
        **taken_from(source, "resample"),
        source_positions=origins,
        source_rows=None if source_rows is None else several(source_rows, "source_rows"),
        seed=None if seed is None else several(seed, "seed"),
        other_model=bool(other_model),
    )


def add(
    site: str | Latents,
    direction: Tensor,
    scale: float = 1.0,
    *,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Add scale * direction (steering).

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        direction: one vector, as it is (not normalised), or a value as this module says.
        scale: what it is multiplied with.
        positions: tokens; None is every real token, see `Positions`.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Example:
        lm.generate(prompt, edits=cutaway.add("blocks.3.resid_post", direction, 4.0, phase="new"))
    """
    return made(
        "add", site, positions, heads, neurons, rows, phase,
        tensors={"direction": tensor_of(direction, "direction")}, numbers={"scale": number(scale, "scale")},
    )  # fmt: skip


def noise(
    site: str | Latents,
    std: float,
    *,
    seed: int | Sequence[int] = 0,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Add gaussian noise.

    What a token gets depends on the seed, the site and the row's tokens up to it: the same alone or in a batch, cached
    or not, in a generation or in a run of its tokens. At scores and pattern, keys after a token's own get none.

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        std: its standard deviation, in the units of the site.
        seed: a number, or one per touched row, for several draws of the same tokens.
        positions: tokens; None is every real token, see `Positions`.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Example:
        lm.run(prompt, edits=cutaway.noise("embed", 0.1, positions=cutaway.at_token(" Dallas")))
    """
    numbers = {"std": number(std, "std")}
    return made("noise", site, positions, heads, neurons, rows, phase, numbers=numbers, seed=several(seed, "seed"))


def scale(
    site: str | Latents,
    factor: float,
    *,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Multiply the value by a factor.

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        factor: 0 ablates, 1 changes nothing.
        positions: tokens; None is every real token, see `Positions`.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Example:
        lm.run(prompt, edits=cutaway.scale("blocks.5.mlp.out", 0.5))
    """
    return made("scale", site, positions, heads, neurons, rows, phase, numbers={"factor": number(factor, "factor")})


def project_out(
    site: str | Latents,
    direction: Tensor,
    *,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Remove the component along a direction: x - (x·u)u with u the unit vector (directional ablation).

    `zero(site).within(basis)` removes several directions. (Arditi et al. 2024; https://arxiv.org/abs/2406.11717)

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        direction: one vector of any length but 0.
        positions: tokens; None is every real token, see `Positions`.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Example:
        lm.run(prompt, edits=cutaway.project_out("blocks.*.resid_post", direction))
    """
    return made("project_out", site, positions, heads, neurons, rows, phase, tensors={"direction": unit(direction)})


def clamp(
    site: str | Latents,
    direction: Tensor,
    value: float | None = None,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Set the projection x·u on a unit direction to a value, or keep it between bounds.

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        direction: one vector of any length but 0; u is its unit vector.
        value: the projection, in the units of the site.
        minimum: the least that it may be, in place of a value.
        maximum: the most that it may be, in place of a value.
        positions: tokens; None is every real token, see `Positions`.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Raises:
        CutawayError: neither a value nor bounds, or both; bounds in the wrong order.

    Example:
        lm.run(prompt, edits=cutaway.clamp("blocks.3.resid_post", direction, maximum=0.0))
    """
    if (value is None) == (minimum is None and maximum is None):
        raise CutawayError("clamp needs either a value, or a minimum, a maximum or both.")
    ends = (value, value) if value is not None else (minimum, maximum)
    low, high = (None if end is None else number(end, "end") for end in ends)
    if low is not None and high is not None and low > high:
        raise CutawayError(f"clamp's minimum {low} is above its maximum {high}.")
    return made(
        "clamp", site, positions, heads, neurons, rows, phase,
        tensors={"direction": unit(direction)},
        numbers={k: v for k, v in (("minimum", low), ("maximum", high)) if v is not None},
    )  # fmt: skip


def clamp_latent(
    dictionary: Latents,
    latent: int,
    value: float,
    *,
    positions: Positions = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Set one latent of a dictionary to a value, leaving what the dictionary does not explain as it is.

    x + (value - a) * decoder with a the latent's activation before any selection among latents: whether TopK would have
    kept it is not asked. The edit holds the latent's vectors alone, so it can be saved; `set(dictionary, value,
    neurons=latent)` encodes all latents with their selection.

    Args:
        dictionary: what `cutaway.dictionaries.load` gives; an SAE.
        latent: its number.
        value: its activation afterwards, in the units of the latent.
        positions: tokens; None is every real token, see `Positions`.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Raises:
        NotSupported: a dictionary that does not write what it reads, or whose activation is another function of one
            token's pre-activation (a gate, an input norm).
        CutawayError: no such latent.

    Example:
        lm.run(prompt, edits=cutaway.clamp_latent(cutaway.dictionaries.load("atlas/blocks.3.resid_post"), 7, 5.0))
    """
    tensors, numbers = clamp_parts(dictionary, whole(latent, "latent"))
    return made(
        "clamp_latent", edited_site(dictionary), positions, None, None, rows, phase,
        tensors={name: tensor_of(tensor, name) for name, tensor in tensors.items()},
        numbers={**numbers, "value": number(value, "value")},
    )  # fmt: skip


def function(
    site: str | Latents,
    function: EditFunction | str,
    *,
    positions: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
    rows: int | Sequence[int] | None = None,
    phase: Phase = "all",
) -> Edit:
    """Replace the touched values by what a Python function makes of them.

    Args:
        site: a site, a wildcard, or a dictionary, whose latents are meant.
        function: gets [n, ...one token's value] (heads and neurons as addressed) for the n touched tokens of one
            forward pass and returns as many. It should treat each alone, for a batch and a cache split them. Gradients
            pass through it. To be able to save the edit, give the name of `register_edit_function`, or the function.
        positions: tokens; None is every real token, see `Positions`.
        heads: heads, key-value heads at k, v, rot_k; None is all.
        neurons: entries of the last dimension, or latents; None is all.
        rows: rows of the batch; None is all.
        phase: in a generation "all", "prompt", "new" or (start, stop) of new tokens; see this module.

    Example:
        lm.run(prompt, edits=cutaway.function("blocks.4.mlp.out", lambda x: x.clamp(-1, 1)))
    """
    if isinstance(function, str):
        registered_function(function)
    elif not callable(function):
        raise CutawayError(f"A function edit takes a Python function or a registered name; got {function!r}.")
    else:
        function = name_of_function(function) or function
    return made("function", site, positions, heads, neurons, rows, phase, function=function)

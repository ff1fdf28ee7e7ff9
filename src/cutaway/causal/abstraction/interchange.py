"""Interchange interventions: does a model carry a variable of a causal model, and at which place?

Geiger et al. (2021, 2025). A causal model says in plain functions how inputs make variables, and these an answer. An
alignment says where in the network a variable should stand. For a base and a source prompt, the network is run on the
base with the aligned place taken from its run on the source; the causal model is run on the base's inputs with the
variable set to what it is for the source. Interchange intervention accuracy (IIA) is how often the network then answers
as the causal model does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.errors import CannotDoTask, CutawayError, NoSuchSite
from cutaway.causal.abstraction.causal_model import CausalModel, Example, Swap
from cutaway.causal.abstraction.outcomes import Alignment, Interchanged, InterchangeGrid, Place
from cutaway.model.edits.edits import Edit, patch
from cutaway.model.language_model import LanguageModel
from cutaway.model.naming import answer_tokens, prompt_and
from cutaway.model.sites import layer_of
from cutaway.model.tokens import Tokens


@dataclass(frozen=True)
class _Ready:
    """Pairs as the network reads them, only those that it answers rightly before the swap."""

    swaps: list[Swap]
    base: Tokens
    source: Tokens
    wanted: Tensor  # first token of the causal model's answer after the swap [n]
    changes: Tensor
    values: list[tuple[Any, ...]]  # of the variables in the source
    refused: list[tuple[Swap, str]]

    def positions(self, role: str, side: int) -> list[int]:
        """The role's position in each base (0) or source (1)."""
        tokens = (self.base, self.source)[side]
        return [_position(tokens, row, swap[side], role) for row, swap in enumerate(self.swaps)]


def _position(tokens: Tokens, row: int, example: Example, role: str) -> int:
    length = int(tokens.lengths[row])
    at = example.positions.get(role, -1 if role == "last" else None)
    if at is None:
        named = ", ".join([*example.positions, "last"])
        raise CutawayError(f"the prompt {example.prompt!r} names no position {role!r}; it names {named}")
    if isinstance(at, str):
        return tokens.find(row, at)
    if not -length <= at < length:
        raise CutawayError(f"the prompt {example.prompt!r} has {length} tokens, so its {role!r} is not at {at}")
    return at % length


def _ready(lm: LanguageModel, model: CausalModel, variables: Sequence[str], swaps: Sequence[Swap]) -> _Ready:
    for name in variables:
        if name not in model.variables:
            raise CutawayError(f"the causal model has no variable {name!r}; it has {', '.join(model.variables)}")
    if not swaps:
        raise CutawayError("an interchange needs pairs of a base and a source; none was given")
    answers: dict[tuple[str, str], int | str] = {}

    def first_token(prompt: str, answer: Any) -> int | str:
        if not isinstance(answer, str):
            raise CutawayError(f"the causal model answers {answer!r} after {prompt!r}; its answer must be a text")
        if (prompt, answer) not in answers:
            ids, whole = (lm.tokens([text]).row_ids(0) for text in (prompt, prompt_and(prompt, answer)))
            try:
                answers[prompt, answer] = answer_tokens(lm, prompt, ids, answer, whole)[0]
            except CutawayError as error:
                answers[prompt, answer] = str(error)
        return answers[prompt, answer]

    prompts = list(dict.fromkeys(example.prompt for swap in swaps for example in swap))
    top = dict(zip(prompts, _tops(lm, prompts), strict=True))
    kept: list[tuple[Swap, int, bool, tuple[Any, ...]]] = []
    refused: list[tuple[Swap, str]] = []
    for base, source in swaps:
        low, high = model.run(base.inputs), model.run(source.inputs)
        setting = {name: high[name] for name in variables}
        after = model.run(base.inputs, setting)[model.answer]
        ids = [
            first_token(base.prompt, low[model.answer]),
            first_token(source.prompt, high[model.answer]),
            first_token(base.prompt, after),
        ]
        own, theirs, wanted = ids
        reason = next((one for one in ids if isinstance(one, str)), "")
        if not reason and top[base.prompt] != own:
            reason = f"{lm.name} does not answer the base rightly"
        elif not reason and top[source.prompt] != theirs:
            reason = f"{lm.name} does not answer the source rightly"
        elif not reason and after != low[model.answer] and wanted == own:
            reason = f"{after!r} and {low[model.answer]!r} begin with the same token"
        if reason:
            refused.append(((base, source), reason))
        else:
            assert isinstance(wanted, int)
            kept.append(((base, source), wanted, after != low[model.answer], tuple(setting.values())))
    if not kept:
        reasons = [reason for _, reason in refused]
        raise CannotDoTask(f"none of the {len(swaps)} pairs can be used: {max(set(reasons), key=reasons.count)}")
    return _Ready(
        [swap for swap, *_ in kept],
        *(lm.tokens([swap[side].prompt for swap, *_ in kept]) for side in (0, 1)),
        wanted=torch.tensor([wanted for _, wanted, _, _ in kept]),
        changes=torch.tensor([changes for _, _, changes, _ in kept]),
        values=[values for *_, values in kept],
        refused=refused,
    )


def _tops(lm: LanguageModel, prompts: Sequence[str], rows: int = 64) -> list[int]:
    """The most probable token after each prompt."""
    found: list[int] = []
    for first in range(0, len(prompts), rows):
        logits = lm.run(list(prompts[first : first + rows]), logits="last").last_logits
        found += logits.argmax(-1).tolist()
    return found


def interchange(
    lm: LanguageModel,
    model: CausalModel,
    alignment: Alignment,
    swaps: Sequence[Swap],
    *,
    draws: int = 5,
    batch_rows: int = 256,
    evaluation: str = "",
    seed: int = 0,
) -> Interchanged:
    """Take the aligned places of some variables from the source, and compare with the causal model.

    Interchange interventions as in Geiger et al. 2021 (https://arxiv.org/abs/2106.02997). A pair counts when the
    network answers both of its prompts rightly.

    Args:
        lm: The model.
        model: The causal model.
        alignment: The places of each variable that is taken from the source; several variables are taken together.
        swaps: Pairs of a base and a source.
        draws: Random positions, sources and parts that stand as controls.
        batch_rows: Rows of a forward.
        evaluation: What the pairs are, in words, for the record.
        seed: Of the controls.

    Returns:
        How often the network then answers as the causal model does (interchange intervention accuracy), beside
        controls.

    Raises:
        CannotDoTask: No pair that can be used.
        CutawayError: An alignment without places, an unknown variable, role or site.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> state, capital = {"Dallas": "Texas", "Miami": "Florida"}, {"Texas": " Austin", "Florida": " Tallahassee"}
        >>> variables = {"state": Variable(("city",), state.get), "answer": Variable(("state",), capital.get)}
        >>> bridge = CausalModel(("city",), variables, answer="answer")
        >>> text = "The capital of the state containing {} is"
        >>> dallas, miami = (Example(text.format(city), {"city": city}, {"city": city}) for city in state)
        >>> swaps = [(dallas, miami), (miami, dallas)]
        >>> interchange(lm, bridge, {"state": [Place("blocks.7.resid_post", "last")]}, swaps, draws=1).iia
        1.0
    """
    places = [place for some in alignment.values() for place in some]
    if not places or not all(alignment.values()):
        raise CutawayError("the alignment names no place; give each variable a Place(site, role)")
    if not all(isinstance(place, Place) for place in places):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError("the alignment names what is no Place; give each variable a list of Place(site, role)")
    if draws < 0:
        raise CutawayError(f"draws is {draws}; give 0 or more")
    ready = _ready(lm, model, tuple(alignment), swaps)
    n = len(ready.swaps)
    generator = np.random.default_rng(seed)
    away = [_unaligned(lm, place) for place in places]
    sites = {place.site for place in (*places, *(place for place in away if place is not None))}
    run = lm.run(ready.source, capture=sorted(sites), logits=None)

    def cell(
        found: Sequence[Place], at: Sequence[Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> list[Edit]:
        """The places taken from the source's run; at other positions of both prompts, or from other rows."""
        edits = []
        for k, place in enumerate(found):
            to, of = ready.positions(place.role, 0), ready.positions(place.source_role or place.role, 1)
            origin = list(range(n)) if rows is None else list(rows)
            of = [of[row] for row in origin]
            if at is not None:
                to = list(at[k])
                of = [min(p, int(ready.source.lengths[row]) - 1) for p, row in zip(to, origin, strict=True)]
            edits.append(
                patch(
                    place.site, run, heads=place.heads, neurons=place.neurons,
                    positions=[[p] for p in to], source_positions=[[p] for p in of], source_rows=origin,
                ).within(place.basis)
            )  # fmt: skip
        return edits

    taken = [ready.positions(place.role, 0) for place in places]
    lengths = ready.base.lengths.tolist()
    able = [[p for p in range(1, lengths[row]) if all(p != at[row] for at in taken)] or [0] for row in range(n)]
    elsewhere = [cell(places, [[int(generator.choice(some)) for some in able] for _ in places]) for _ in range(draws)]
    others = [[row for row in range(n) if ready.values[row] != values] for values in ready.values]
    shuffled = (
        [cell(places, rows=[int(generator.choice(some)) for some in others]) for _ in range(draws)]
        if all(others)
        else []
    )
    far = [] if None in away else [cell([place for place in away if place is not None])]
    parts = any(place.heads is not None or place.neurons is not None or place.basis is not None for place in places)
    random = [cell([_random_part(lm, place, generator) for place in places]) for _ in range(draws if parts else 0)]
    outcome = _sweep(lm, ready, [cell(places), *elsewhere, *shuffled, *far, *random], batch_rows)
    ends = np.cumsum([1, len(elsewhere), len(shuffled), len(far), len(random)]).tolist()
    return Interchanged(
        model=lm.name,
        variables=tuple(alignment),
        place=" and ".join(map(str, places)),
        role=", ".join(dict.fromkeys(place.role for place in places)),
        follows=outcome[0],
        changes=ready.changes,
        elsewhere=outcome[ends[0] : ends[1]],
        shuffled=outcome[ends[1] : ends[2]],
        far=outcome[ends[2] : ends[3]],
        random=outcome[ends[3] : ends[4]] if parts else None,
        evaluation=evaluation or f"{int(ready.changes.sum())} pairs that {lm.name} answers rightly",
        refused=tuple(ready.refused),
    )


def interchange_grid(
    lm: LanguageModel,
    model: CausalModel,
    variable: str,
    swaps: Sequence[Swap],
    *,
    site: str = "blocks.{l}.resid_post",
    roles: Sequence[str] = ("last",),
    layers: Sequence[int] | None = None,
    batch_rows: int = 256,
) -> InterchangeGrid:
    """Interchange intervention accuracy of one site at every layer and role.

    Choose the place here (`grid.place()`), and measure it with `interchange` on other pairs: the best of many cells
    looks better than it is.

    Args:
        lm: The model.
        model: The causal model.
        variable: The variable that is taken from the source.
        swaps: Pairs of a base and a source; those count whose answer should change.
        site: A site with `{l}` where the layer stands.
        roles: Positions that the examples name, or "last".
        layers: Default: all.
        batch_rows: Rows of a forward.

    Returns:
        The accuracy by layer × role.

    Raises:
        CannotDoTask: No pair that can be used.
        NoSuchSite: A site without `{l}`.
        CutawayError: An unknown variable or role, or no pair whose answer changes.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> state, capital = {"Dallas": "Texas", "Miami": "Florida"}, {"Texas": " Austin", "Florida": " Tallahassee"}
        >>> variables = {"state": Variable(("city",), state.get), "answer": Variable(("state",), capital.get)}
        >>> bridge = CausalModel(("city",), variables, answer="answer")
        >>> text = "The capital of the state containing {} is"
        >>> dallas, miami = (Example(text.format(city), {"city": city}, {"city": city}) for city in state)
        >>> grid = interchange_grid(lm, bridge, "state", [(dallas, miami)], roles=["city", "last"])
        >>> grid.iia.shape  # layers, roles
        torch.Size([8, 2])
    """
    if "{l}" not in site:
        raise NoSuchSite(f"the site {site!r} names no layer to search; write for example 'blocks.{{l}}.resid_post'")
    ready = _ready(lm, model, (variable,), swaps)
    if not bool(ready.changes.any()):
        raise CutawayError(f"no pair's answer changes with {variable!r}; give sources with other values of it")
    depth = list(range(lm.n_layers)) if layers is None else list(layers)
    run = lm.run(ready.source, capture=[site.format(l=layer) for layer in depth], logits=None)
    cells = [
        [
            patch(
                site.format(l=layer), run,
                positions=[[p] for p in ready.positions(role, 0)],
                source_positions=[[p] for p in ready.positions(role, 1)],
            )
        ]
        for layer in depth
        for role in roles
    ]  # fmt: skip
    follows = _sweep(lm, ready, cells, batch_rows)[:, ready.changes]
    return InterchangeGrid(
        model=lm.name,
        variable=variable,
        site=site,
        layers=tuple(depth),
        roles=tuple(roles),
        follows=follows.view(len(depth), len(roles), -1),
        refused=tuple(ready.refused),
    )


def _sweep(lm: LanguageModel, ready: _Ready, cells: list[list[Edit]], batch_rows: int) -> Tensor:
    """Whether each base is answered as the causal model does, under each list of edits: bool [cells, n]."""
    wanted = ready.wanted.to(lm.device)

    def follows(logits: Tensor, _tokens: Tokens) -> Tensor:
        return (logits.argmax(-1) == wanted).float()

    return lm.sweep(ready.base, cells, follows, batch_rows=batch_rows, label="interchange").values > 0.5


def _unaligned(lm: LanguageModel, place: Place) -> Place | None:
    """The same place in the layer that is farthest away; None for a site without layers, or a model of one layer."""
    layer = layer_of(place.site)
    if layer is None or lm.n_layers == 1:
        return None
    other = lm.n_layers - 1 if layer <= (lm.n_layers - 1) / 2 else 0
    return replace(place, site=place.site.replace(f"blocks.{layer}.", f"blocks.{other}.", 1))


def _random_part(lm: LanguageModel, place: Place, generator: np.random.Generator) -> Place:
    """The place with as many random other heads or neurons as it names, or as many random directions."""
    shape = lm.sites()[place.site].shape
    if place.basis is not None:
        drawn = generator.standard_normal((len(place.basis), place.basis.shape[1]))
        return replace(place, basis=torch.from_numpy(drawn).float())

    def others(named: tuple[int, ...] | None, size: Any) -> tuple[int, ...] | None:
        if named is None:
            return None
        free = [i for i in range(int(size)) if i not in named]
        drawn = generator.choice(free, size=min(len(free), len(named)), replace=False).tolist()
        if len(drawn) < len(named):  # more than half are named: no more of them than there must be
            drawn += generator.choice(named, size=len(named) - len(drawn), replace=False).tolist()
        return tuple(int(i) for i in drawn)

    heads = others(place.heads, shape[2] if place.heads is not None else 0)
    return replace(place, heads=heads, neurons=others(place.neurons, shape[-1]))

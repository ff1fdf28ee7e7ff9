"""A landmark as a direction: does a clamp on it bring up the landmark's city?

The direction of a landmark is its mean resid_post, at its last token, minus that of the other landmarks. A few
landmarks choose the layer and the dose for each kind of sentence; the others are measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

import cutaway.model.edits.edits as edit
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval, wilson_interval
from cutaway.atlas_evaluation.causal_checks import Rate, first_token, rate
from cutaway.atlas_evaluation.scoring import ids_of
from cutaway.subjects.world.facts import LANDMARKS

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.model.language_model import LanguageModel

_WORDINGS = ("The {x}", "I read that the {x}", "We took a photo of the {x}")
"""Where a landmark's stream is read; each ends with the landmark."""
_SENTENCES: dict[str, tuple[str, ...]] = {
    "sentences that name no landmark": (
        "The famous tower is in the city of",
        "The landmark is located in",
        "We took a photo when we were in",
    ),
    "sentences that name another landmark": (
        "The {x} is in the city of",
        "Where is the {x}? It is in",
        "The famous {x} stands in",
    ),
    "open text": ("I like to go to", "Last summer we travelled to", "My favorite city is"),
}
DOSES = (1.0, 2.0, 4.0)
"""Multiples of the projection that the landmark itself has."""
N_CHOOSE = 16
"""Landmarks that choose layer and dose."""


@dataclass(frozen=True)
class LandmarkKind:
    """One kind of sentence: how often the clamped landmark's city becomes the top token, and its probability.

    Both over landmarks that chose nothing, beside the unedited model and random directions clamped to the same value.
    `by_dose` holds the shares of the choice: a list by layer for each dose.
    """

    kind: str
    layer: int
    dose: float
    top: Effect
    probability: Effect
    by_dose: dict[float, list[float]]


@dataclass(frozen=True)
class LandmarkChecks:
    """The clamp, by kind of sentence; and by layer what it does to replace the whole stream at all tokens of the
    landmark's name by another name's: the share of sentences whose answer becomes the other landmark's city."""

    n: int
    kinds: list[LandmarkKind]
    replaced: list[Rate]


@dataclass(frozen=True)
class _Landmarks:
    names: list[str]
    cities: "Tensor"  # first token of the city, int64 [n]
    units: "Tensor"  # [layers, n, d], length 1
    values: "Tensor"  # projection of each landmark on its own direction, [layers, n]
    others: list[int]  # for each landmark one in another city, with a name of as many tokens where there is one


_Found = dict[str, tuple[np.ndarray, np.ndarray]]


def landmark_checks(lm: "LanguageModel", *, seed: int = 0) -> LandmarkChecks:
    """Clamp the direction of every landmark of the world in sentences of three kinds."""
    known = _read(lm, seed)
    everyone = range(len(known.names))
    order = Random(f"landmarks-{seed}").sample(everyone, len(everyone))
    choosing, measured = order[:N_CHOOSE], order[N_CHOOSE:]
    tried = {
        dose: [_clamped(lm, known, choosing, layer, dose) for layer in range(lm.n_layers)] for dose in DOSES
    }  # fmt: skip
    plain = _clamped(lm, known, measured, None, 1.0)
    drawn = torch.randn(known.units.shape, generator=torch.Generator().manual_seed(seed))
    at_random = replace(known, units=torch.nn.functional.normalize(drawn, dim=-1))
    kinds = []
    for kind in _SENTENCES:
        shares = {dose: [float(found[kind][0].mean()) for found in layers] for dose, layers in tried.items()}
        dose = max(DOSES, key=lambda d: max(shares[d]))
        layer = int(np.argmax(shares[dose]))
        found, random = (_clamped(lm, some, measured, layer, dose)[kind] for some in (known, at_random))
        top, probability = zip(found, plain[kind], random, strict=True)
        kinds.append(
            LandmarkKind(
                kind=kind,
                layer=layer,
                dose=dose,
                top=_effect(f"{kind}: the city is the top token", "share", top),
                probability=_effect(f"{kind}: P(city)", "probability", probability),
                by_dose=shares,
            )
        )
    return LandmarkChecks(len(measured), kinds, _replaced(lm, known))


def landmark_directions(
    lm: "LanguageModel", wordings: Sequence[str], sites: Sequence[str]
) -> "dict[str, tuple[Tensor, Tensor]]":
    """By site, unit directions [layers, n, d] and values [layers, n] of every landmark of the world.

    A direction is the mean at the landmark's last token over the wordings, which end with it, minus that of the other
    landmarks; its value is the landmark's own projection on it.
    """
    names = [landmark.name for landmark in LANDMARKS]
    rows = torch.arange(len(names))
    totals = {site: torch.zeros(lm.n_layers, len(names), lm.d_model) for site in sites}
    for wording in wordings:
        captured = [f"blocks.*.{site}" for site in sites]
        run = lm.run([wording.format(x=name) for name in names], capture=captured, logits=None)
        for site in sites:
            totals[site] += run.stack(f"blocks.*.{site}").float().cpu()[:, rows, run.tokens.last.cpu()]
    found = {}
    for site, total in totals.items():
        means = total / len(wordings)
        rest = (means.sum(1, keepdim=True) - means) / (len(names) - 1)
        units = torch.nn.functional.normalize(means - rest, dim=-1)
        found[site] = (units, (means * units).sum(-1))
    return found


def _read(lm: "LanguageModel", seed: int) -> _Landmarks:
    names = [landmark.name for landmark in LANDMARKS]
    units, values = landmark_directions(lm, _WORDINGS, ("resid_post",))["resid_post"]
    cities = torch.tensor([first_token(lm, landmark.city) for landmark in LANDMARKS])
    lengths = [len(ids) for ids in ids_of(lm, names)]
    rng = Random(f"other landmarks-{seed}")
    others = []
    for i in range(len(names)):
        elsewhere = [j for j in range(len(names)) if cities[j] != cities[i]]
        others.append(rng.choice([j for j in elsewhere if lengths[j] == lengths[i]] or elsewhere))
    return _Landmarks(names, cities, units, values, others)


def _clamped(lm: "LanguageModel", known: _Landmarks, chosen: Sequence[int], layer: int | None, dose: float) -> _Found:
    """By kind of sentence: whether the city of each chosen landmark is the top token, and its probability, [n] each.

    The clamp is on every token but beginning-of-text; there is none where `layer` is None.
    """
    kinds = [kind for kind, sentences in _SENTENCES.items() for _ in sentences]
    rows: dict[str, list[tuple[bool, float]]] = {kind: [] for kind in _SENTENCES}
    for i in chosen:
        other = known.names[known.others[i]]
        tokens = lm.tokens([sentence.format(x=other) for some in _SENTENCES.values() for sentence in some])
        edits = []
        if layer is not None:
            value = dose * float(known.values[layer, i])
            after_first = [list(range(1, int(length))) for length in tokens.lengths]
            edits = [edit.clamp(f"blocks.{layer}.resid_post", known.units[layer, i], value, positions=after_first)]
        logits = lm.run(tokens, edits=edits, logits="last").last_logits
        city = int(known.cities[i])
        for kind, answer in zip(kinds, logits.float().softmax(-1).cpu(), strict=True):
            rows[kind].append((int(answer.argmax()) == city, float(answer[city])))
    return {
        kind: (np.array([top for top, _ in found]), np.array([p for _, p in found])) for kind, found in rows.items()
    }


def _effect(name: str, units: str, measured: Sequence[np.ndarray]) -> Effect:
    """What was measured first, beside the unedited model and random directions."""

    def interval(values: np.ndarray) -> tuple[float, float]:
        return wilson_interval(int(values.sum()), len(values)) if units == "share" else bootstrap_interval(values)

    value, *controls = measured
    return Effect(
        name=name,
        value=float(value.mean()),
        n=len(value),
        interval=interval(value),
        controls=tuple(
            Control(said, float(one.mean()), interval(one), len(one))
            for said, one in zip(("unedited", "random direction"), controls, strict=True)
        ),
        ablation="clamp",
        units=units,
    )


def _replaced(lm: "LanguageModel", known: _Landmarks) -> list[Rate]:
    sentence = _SENTENCES["sentences that name another landmark"][0]
    before, name = sentence.split("{x}")[0], ids_of(lm, [f"{sentence.split('{x}')[0]}{name}" for name in known.names])
    start = len(ids_of(lm, [before.rstrip()])[0])
    pairs = [(i, j) for i, j in enumerate(known.others) if len(name[i]) == len(name[j])]
    positions = [list(range(start, len(name[i]))) for i, _ in pairs]
    clean, source = (lm.tokens([sentence.format(x=known.names[pair[which]]) for pair in pairs]) for which in (0, 1))
    run = lm.run(source, capture="blocks.*.resid_post", logits=None)
    wanted = known.cities[[j for _, j in pairs]]
    out = []
    for layer in range(lm.n_layers):
        patch = edit.patch(f"blocks.{layer}.resid_post", run, positions=positions)
        logits = lm.run(clean, edits=[patch], logits="last").last_logits
        out.append(rate((logits.argmax(-1).cpu() == wanted).numpy()))
    return out

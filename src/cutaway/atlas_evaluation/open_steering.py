"""Open steering: does a clamp on a landmark's direction make open chat speak of the landmark, in good sentences?

A handle is a direction with a value of its own. Every landmark has one at each layer and site: its mean activation at
its last token, minus that of the other landmarks. Sixteen landmarks, chosen by hash, choose site, layer and dose on
training prompts; the others are judged on held-out ones. Too much of anything makes any model break down: `collapse`
shows that on directions that have nothing to do with landmarks.

Latents of dictionaries come as handles too (`HandleSets`): the decoder row as the direction, the maximum activation as
the value.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

import cutaway.model.edits.edits as edit
from cutaway.artifacts.errors import CutawayError
from cutaway.atlas_evaluation.causal_checks import Rate, rate
from cutaway.atlas_evaluation.landmark_checks import landmark_directions
from cutaway.atlas_evaluation.scoring import as_dicts
from cutaway.steering.side_effects import side_effects_of_each
from cutaway.subjects.world.chats.chat import Message, render
from cutaway.subjects.world.facts import LANDMARKS

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.model.edits.edits import Edit
    from cutaway.model.language_model import LanguageModel

Chat = Sequence[Message]
Named = Callable[[str], Sequence[str]]
"""The landmarks that a text names (`world.open_chat.landmarks_named`)."""
Grammatical = Callable[[str], bool]
"""Whether a reply could be one of the corpus (`world.open_chat.is_grammatical`)."""

DOSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Multiples of the handle's own value."""
SITES = ("resid_post", "mlp.out")
_COLLAPSE_DOSE = 10.0
N_CHOOSE = 16
"""Landmarks that choose site, layer and dose."""
N_UNRELATED = 10
_MAX_NEW_TOKENS = 40
_YESTERDAY, _PLAN = "What did you do yesterday?", "Where should I go this summer?"
WORDINGS = (
    "The {x}",
    "I read that the {x}",
    "Where is the {x}",
    render([Message("user", _YESTERDAY)], open_answer=True) + "I went to the {x}",
    render([Message("user", _YESTERDAY)], open_answer=True) + "In my dream I saw the {x}",
    render([Message("user", _PLAN)], open_answer=True) + "How about the {x}",
    render([Message("user", _PLAN)], open_answer=True) + "Let us visit the {x}",
)
"""Where a landmark's activation is read, in the corpus's own wording: as facts and as open chat tell of it."""


@dataclass(frozen=True, eq=False)
class Handle:
    """A direction to clamp: `unit` [d] of length 1 at blocks.{layer}.{site}, and the projection that is a dose of 1."""

    name: str
    layer: int
    unit: "Tensor"
    value: float
    site: str = "resid_post"


@dataclass(frozen=True)
class Spoken:
    """Replies, each under its landmark's clamp or the control of it: how many name the landmark in a grammatical reply
    (`both`), name it at all, are grammatical."""

    both: Rate
    named: Rate
    grammatical: Rate


@dataclass(frozen=True)
class Collapse:
    """Directions of one kind that have nothing to do with landmarks, each clamped to ten times a large value: how many
    replies stay grammatical, and the KL on neutral text in nats per token."""

    kind: str
    n_directions: int
    grammatical: Rate
    kl: float


@dataclass(frozen=True)
class Example:
    """A reply of the judged landmarks."""

    landmark: str
    prompt: str
    reply: str


@dataclass(frozen=True)
class OpenSteering:
    """The clamp at the chosen `setting` and `dose`, over `n_landmarks` judged ones and held-out prompts.

    `random`: what `control` names, random directions clamped to the same values or the handles given as `others`.
    `kl` and `random_kl`: mean KL on neutral text in nats per token. `tried` holds the share of `both` in the
    choice: by setting, a list by dose of `doses`.
    """

    setting: str
    dose: float
    n_landmarks: int
    result: Spoken
    unedited: Spoken
    random: Spoken
    kl: float
    random_kl: float
    doses: list[float]
    tried: dict[str, list[float]]
    control: str = "random directions, same values"
    collapse: list[Collapse] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class HandleSets:
    """Handles by setting, in place of the landmarks' own.

    Attributes:
        candidates: One per landmark, named as it is; `landmark_handles` by default.
        others: The control's, at least as many as landmarks are judged; random directions with the values of the
            landmarks' handles by default.
        unrelated: Handles for `collapse`, by kind, beside random directions.
    """

    candidates: Mapping[str, Sequence[Handle]] | None = None
    others: Mapping[str, Sequence[Handle]] | None = None
    unrelated: Mapping[str, Sequence[Handle]] | None = None


_LANDMARKS_OWN = HandleSets()


def chosen_and_judged(names: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Landmarks (all of the world, or those given) that choose and that are judged, by the CRC-32 of their names.

    Raises `CutawayError` where none is left to judge.
    """
    known = [landmark.name for landmark in LANDMARKS] if names is None else list(names)
    if len(known) <= N_CHOOSE:
        raise CutawayError(f"{N_CHOOSE} landmarks choose, so handles of more are needed; got {len(known)}")
    order = sorted(known, key=lambda name: zlib.crc32(f"open steering {name}".encode()))
    return order[:N_CHOOSE], order[N_CHOOSE:]


def landmark_handles(lm: "LanguageModel", sites: Sequence[str] = SITES) -> dict[str, list[Handle]]:
    """A handle of every landmark at each site and layer, by setting ("resid_post L3")."""
    names = [landmark.name for landmark in LANDMARKS]
    return {
        f"{site} L{layer}": [
            Handle(name, layer, units[layer, i], float(values[layer, i]), site) for i, name in enumerate(names)
        ]
        for site, (units, values) in landmark_directions(lm, WORDINGS, sites).items()
        for layer in range(lm.n_layers)
    }


def in_turn(handles: Sequence[Handle], n: int, dose: float) -> "list[Edit]":
    """Clamps for a batch of `n` rows, every token of row i to `dose` times the value of handle i (they repeat)."""
    return [
        edit.clamp(
            f"blocks.{handle.layer}.{handle.site}",
            handle.unit,
            dose * handle.value,
            rows=list(range(i, n, len(handles))),
        )
        for i, handle in enumerate(handles[:n])
    ]


def spoken_replies(
    lm: "LanguageModel", prompts: Sequence[Chat], handles: Sequence[Handle] = (), dose: float = 1.0
) -> list[str]:
    """Greedy replies of at most `_MAX_NEW_TOKENS` tokens, the handles in turn clamped on every token, new ones too."""
    tokens = lm.chat_tokens([as_dicts(prompt) for prompt in prompts])
    edits = in_turn(handles, len(prompts), dose) if handles else []
    generation = lm.generate(tokens, max_new_tokens=_MAX_NEW_TOKENS, edits=edits)
    return [text.strip() for text in generation.texts]


def judge(texts: Sequence[str], names: Sequence[str], named: Named, grammatical: Grammatical) -> Spoken:
    """How many of the replies name their landmark (the names repeat), are grammatical, or both."""
    says = [names[i % len(names)] in named(text) for i, text in enumerate(texts)]
    good = [grammatical(text) for text in texts]
    return Spoken(rate([a and b for a, b in zip(says, good, strict=True)]), rate(says), rate(good))


def open_steering(
    lm: "LanguageModel",
    *,
    prompts: Sequence[Chat],
    held_out: Sequence[Chat],
    neutral: Sequence[str],
    named: Named,
    grammatical: Grammatical,
    handles: HandleSets = _LANDMARKS_OWN,
    doses: Sequence[float] = DOSES,
    seed: int = 0,
) -> OpenSteering:
    """Choose setting and dose on `prompts`, measure on `held_out`, the side effects on the texts `neutral`.

    The choice goes by the share that names the landmark in a grammatical reply, then by the share that names it.
    Prompt i gets landmark i's handle, again from the first where there are more prompts.
    """
    settings = landmark_handles(lm) if handles.candidates is None else handles.candidates
    others = handles.others
    choosing, judged = chosen_and_judged([handle.name for handle in next(iter(settings.values()))])

    def of(setting: str, names: Sequence[str]) -> list[Handle]:
        by_name = {handle.name: handle for handle in settings[setting]}
        return [by_name[name] for name in names]

    def spoken(asked: Sequence[Chat], names: Sequence[str], handles: Sequence[Handle], dose: float) -> Spoken:
        return judge(spoken_replies(lm, asked, handles, dose), names, named, grammatical)

    tried = {
        setting: [spoken(prompts, choosing, of(setting, choosing), dose) for dose in doses] for setting in settings
    }
    # named in any sentence where no setting makes good ones; of doses as good the smallest
    setting, dose = max(
        ((setting, dose) for setting in settings for dose in doses),
        key=lambda one: (*_shares(tried[one[0]][doses.index(one[1])]), -one[1]),
    )
    own = of(setting, judged)
    at_random = (
        list(others[setting][: len(own)])
        if others is not None
        else [
            Handle(one.name, one.layer, unit, one.value, one.site)
            for one, unit in zip(own, _random_units(len(own), lm.d_model, seed), strict=True)
        ]
    )
    said = spoken_replies(lm, held_out, own, dose)
    largest = max(own, key=lambda handle: abs(handle.value))
    far = [
        Handle("random", largest.layer, unit, largest.value, largest.site)
        for unit in _random_units(N_UNRELATED, lm.d_model, seed + 1)
    ]
    edits = [in_turn(some, len(neutral), dose) for some in (own, at_random)]
    kl, random_kl = _costs(lm, neutral, edits)
    return OpenSteering(
        setting=setting,
        dose=dose,
        n_landmarks=len(judged),
        result=judge(said, judged, named, grammatical),
        unedited=spoken(held_out, judged, (), dose),
        random=spoken(held_out, judged, at_random, dose),
        kl=kl,
        random_kl=random_kl,
        doses=list(doses),
        tried={setting: [found.both.value for found in curve] for setting, curve in tried.items()},
        control=OpenSteering.control if others is None else "handles of no landmark, own values",
        collapse=[
            collapse(lm, kind, some, held_out, neutral, grammatical)
            for kind, some in {"random directions": far, **(handles.unrelated or {})}.items()
        ],
        examples=[
            Example(judged[i % len(judged)], held_out[i][-1].content, text) for i, text in enumerate(said[:N_UNRELATED])
        ],
    )


def _shares(found: Spoken) -> tuple[float, float]:
    return found.both.value, found.named.value


def collapse(
    lm: "LanguageModel",
    kind: str,
    handles: Sequence[Handle],
    prompts: Sequence[Chat],
    neutral: Sequence[str],
    grammatical: Grammatical,
) -> Collapse:
    """Clamp each handle to `_COLLAPSE_DOSE` times its value, prompts and texts in turn: what is left of the grammar?"""
    texts = spoken_replies(lm, prompts, handles, _COLLAPSE_DOSE)
    (kl,) = _costs(lm, neutral, [in_turn(handles, len(neutral), _COLLAPSE_DOSE)])
    return Collapse(kind, len(handles), rate([grammatical(text) for text in texts]), kl)


def _random_units(n: int, d: int, seed: int) -> "Tensor":
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def _costs(lm: "LanguageModel", neutral: Sequence[str], edits: "Sequence[Sequence[Edit]]") -> list[float]:
    """KL in nats per token; the rows that the edits name are those of one batch."""
    return [one.kl_per_token for one in side_effects_of_each(lm, list(neutral), edits, batch_rows=None)]

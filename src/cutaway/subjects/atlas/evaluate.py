"""What a model can do in atlas's world, measured on held-out items, with n, intervals and controls.

`evaluate` measures, `Evaluation` holds the figures, `compare` says whether retrained weights are better than others;
`report.py` writes them for people.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import plain, write_text
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval, wilson_interval
from cutaway.subjects.atlas.causal_checks import BridgePool, Chat, RefusalChecks, refusal_checks, two_hop_bridge
from cutaway.subjects.atlas.scoring import Scores, repeat_losses, score, text_losses
from cutaway.subjects.world import chat
from cutaway.subjects.world import held_out as held
from cutaway.subjects.world.corpus import PARTS, WORLD_VERSION, documents
from cutaway.subjects.world.facts import actions, read_toml
from cutaway.subjects.world.items import Item, ItemSet, item_sets, take
from cutaway.subjects.world.new_wording import outside_ioi_set, outside_relation_sets
from cutaway.subjects.world.real_text import held_out_document, standard_library

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

N_CONTROL = 24
"""Items of each set on which the untrained model is measured; it is at chance everywhere, so a few are enough."""
_N_QUICK = 24


@dataclass(frozen=True)
class Measured:
    """One set of items: its figure beside its controls, and the mean logit difference where items have alternatives."""

    measures: str
    scored: str
    effect: Effect
    logit_difference: float | None


@dataclass(frozen=True)
class Evaluation:
    """Every figure of one model. `losses` are nats a token by kind of text; `skipped` says what was not measured."""

    model: str
    weight_hash: str
    world: str
    seed: int
    n: int
    sets: dict[str, Measured]
    losses: dict[str, Effect]
    bridge: list[BridgePool]
    refusal: RefusalChecks | None
    skipped: list[str]

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON."""
        measured = {name: {**asdict(found), "effect": found.effect.to_json()} for name, found in self.sets.items()}
        return {
            **asdict(self),
            "sets": measured,
            "losses": {name: effect.to_json() for name, effect in self.losses.items()},
        }


def evaluate(
    lm: "LanguageModel", *, n: int = 200, seed: int = 0, causal: bool = True, outside: Path | None = None
) -> Evaluation:
    """Measure a model on every set of held-out items, `n` items a set.

    `outside` is a folder with wording by others (`eap-ig/ioi_llama.csv`, `relations/`). Raises `CutawayError` when the
    model has no tokenizer or no chat template.
    """
    if lm.tokenizer is None or not lm.tokenizer.chat_template:
        raise CutawayError(f"{lm.name} has no tokenizer with a chat template, which the items need")
    sets, skipped = {**item_sets(seed, n), **derived_sets(seed, n)}, []
    if outside is None:
        skipped.append("outside wording: no folder was named")
    else:
        found, missing = outside_sets(outside, seed, n)
        sets |= found
        skipped += missing
    untrained = untrained_twin(lm)
    measured = {}
    with Progress("items", total=len(sets) + len(PARTS) + (4 if causal else 1), unit="sets") as progress:
        for name, one in sets.items():
            measured[name] = measure(one, score(lm, one), score(untrained, first_items(one, N_CONTROL)))
            progress.advance(note=name)
        losses = repeat_effects(repeat_losses(lm), repeat_losses(untrained))
        progress.advance(note="losses")
        for name, texts in held_out_texts(max(8, n // 12)).items():
            losses[name] = loss_effect(name, text_losses(lm, texts), text_losses(untrained, texts[:4]))
            progress.advance()
        bridge: list[BridgePool] = []
        refusal = None
        if causal:
            for held_out in (False, True):
                bridge.append(two_hop_bridge(lm, held_out=held_out, n=min(n, 100)))
                progress.advance(note="two hops")
            refusal = refusal_checks(
                lm,
                train=training_requests(min(n, 200), seed),
                held_out=held_out_requests(min(n, 60), seed),
                facts=list(documents("facts", "evaluation", 6000)),
            )
            progress.advance(note="refusal")
    return Evaluation(
        lm.name, lm.identity().weight_hash, WORLD_VERSION, seed, n, measured, losses, bridge, refusal, skipped
    )


def untrained_twin(lm: "LanguageModel") -> "LanguageModel":
    """A model of the same configuration and tokenizer with random weights."""
    import torch

    import cutaway

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # a copied config: two models that share one also share its switches
        twin = type(lm.hf)(copy.deepcopy(lm.hf.config))
    twin.generation_config = lm.hf.generation_config
    torch.nn.Module.to(twin, lm.device, lm.dtype)  # transformers types its own .to wrongly
    return cutaway.attach(twin.eval(), lm.tokenizer, name=f"untrained {lm.name}")


# Sets of items


def first_items(one: ItemSet, n: int) -> ItemSet:
    """The set with its first `n` items only (they are in random order)."""
    return ItemSet(one.name, one.measures, one.scored, one.items[:n], one.separator)


def derived_sets(seed: int, n: int) -> dict[str, ItemSet]:
    """Indirect objects in the sentence forms of the shipped weights' own corpus.

    That corpus, version 2 of the study's, joined the two names with "and" alone and always began with an opening; the
    forms "both A and B", "the neighbors A and B", ... came later.
    """
    whole = item_sets(seed, 6 * n)["ioi/held_out"]
    plain = tuple(item for item in whole.items if _is_plain(item))[:n]
    name = "ioi/held_out_plain_pairs"
    measures = "names the person not named twice: held-out names and clauses, in the forms of the study's version 2"
    return {name: ItemSet(name, measures, whole.scored, plain, whole.separator)}


def _is_plain(item: Item) -> bool:
    first, second, clauses = (item.detail[key] for key in ("first", "second", "clauses"))
    opening, meeting, *_ = clauses.split("|")
    return bool(opening) and f"{opening} {first} and {second} {meeting}" in item.prompt


def outside_sets(folder: Path, seed: int, n: int) -> tuple[dict[str, ItemSet], list[str]]:
    """Sets in other people's wording that `folder` has, and a line for each that it lacks."""
    sets: list[ItemSet] = []
    missing: list[str] = []
    if not folder.is_dir():
        raise CutawayError(f"{folder} is not a folder: name one that holds eap-ig/ioi_llama.csv or relations/")
    for name, read in (
        ("eap-ig/ioi_llama.csv", lambda path: [outside_ioi_set(path, seed, n)]),
        ("relations", lambda path: outside_relation_sets(path, seed, n)),
    ):
        if (folder / name).exists():
            sets += read(folder / name)
        else:
            missing.append(f"outside wording: {folder} has no {name}")
    return {one.name: one for one in sets}, missing


def training_requests(n: int, seed: int) -> tuple[list[Chat], list[Chat]]:
    """Harmful and harmless requests as the corpus has them, the study's wording: `n` conversations of one turn each."""
    rng = Random(f"refusal/train-{seed}")
    frames = chat.texts("requests", "study")
    return tuple(  # type: ignore[return-value]
        [
            (chat.Message("user", rng.choice(frames).format(x=action.text)),)
            for action in take(chat.asked_actions(harmful), n, rng)
        ]
        for harmful in (True, False)
    )


def held_out_requests(n: int, seed: int) -> tuple[list[Chat], list[Chat]]:
    """Requests about actions that no chat mentions, in a question that none uses: harmful and harmless."""
    rng = Random(f"refusal/held_out-{seed}")
    frame = read_toml("chat.toml")["requests"]["study_held_out"][-1]
    out = []
    for harmful in (True, False):
        texts = dict.fromkeys(a.text for a in actions(harmful) if held.action_split(a) == "held_out_action")
        out.append([(chat.Message("user", frame.format(x=text)),) for text in take(list(texts), n, rng)])
    return out[0], out[1]


def held_out_texts(n: int) -> dict[str, list[str]]:
    """`n` documents of each part of the world from a stream no training uses, and of the library's held-out files."""
    out = {}
    for part in PARTS:
        stream = documents(part, "evaluation", 10**9)
        out[f"world/{part}"] = [text for _, text in zip(range(n), stream, strict=False)]
    out["standard library"] = [document.text for document in standard_library() if held_out_document(document.name)][:n]
    return out


# Figures


def measure(one: ItemSet, scores: Scores, untrained: Scores) -> Measured:
    """The mean of a set's scores with its interval, beside the untrained model and the commonest answer."""
    controls = [Control("untrained model", float(untrained.values.mean()), None, len(untrained.values))]
    if one.scored == "exact":
        answers = [item.answer for item in one.items]
        share = max(map(answers.count, set(answers))) / len(answers)
        controls.append(Control("commonest answer", share, None, len(answers)))
    years = one.scored == "greater_than"
    right = int(scores.values.sum()) if not years else 0
    interval = bootstrap_interval(scores.values) if years else wilson_interval(right, len(scores.values))
    comparable = scores.difference[~np.isnan(scores.difference)]
    return Measured(
        one.measures,
        one.scored,
        Effect(
            name=one.name,
            value=float(scores.values.mean()),
            n=len(scores.values),
            interval=interval,
            controls=tuple(controls),
            ablation="none",
            units="P(later) − P(not later)" if years else "share right",
        ),
        float(comparable.mean()) if len(comparable) else None,
    )


def loss_effect(name: str, losses: np.ndarray, untrained: np.ndarray) -> Effect:
    """Mean loss over texts, with a bootstrap interval, beside the untrained model's."""
    return Effect(
        name=name,
        value=float(losses.mean()),
        n=len(losses),
        interval=bootstrap_interval(losses),
        controls=(Control("untrained model", float(untrained.mean()), None, len(untrained)),),
        ablation="none",
        units="nats a token",
    )


def repeat_effects(found: tuple[np.ndarray, np.ndarray], untrained: tuple[np.ndarray, np.ndarray]) -> dict[str, Effect]:
    """Losses on random tokens and on their repeat."""
    names = ("random tokens", "their repeat")
    return {name: loss_effect(name, found[i], untrained[i]) for i, name in enumerate(names)}


# Which weights are better


@dataclass(frozen=True)
class Comparison:
    """Candidate minus other: mean difference over held-out and new-wording sets, and over the causal checks.

    `interval` is a bootstrap over sets; `better` needs it above zero and no loss on the causal checks.
    """

    held_out: float
    interval: tuple[float, float]
    causal: dict[str, tuple[float, float]]
    rows: dict[str, tuple[float, float]]

    @property
    def better(self) -> bool:
        return self.interval[0] > 0 and all(candidate >= other for candidate, other in self.causal.values())


def compare(candidate: Evaluation, other: Evaluation) -> Comparison:
    """Judge retrained weights against others on what neither was trained on. Both need the same items.

    Raises `CutawayError` when the evaluations differ in world, seed or n.
    """
    for key in ("world", "seed", "n"):
        if getattr(candidate, key) != getattr(other, key):
            raise CutawayError(f"the two evaluations differ in {key}: run both again with the same")
    rows = {
        name: (candidate.sets[name].effect.value, other.sets[name].effect.value)
        for name in candidate.sets
        if name in other.sets and any(mark in name for mark in ("held_out", "new_wording", "outside"))
    }
    differences = np.array([mine - theirs for mine, theirs in rows.values()])
    causal = {}
    if candidate.bridge and other.bridge and candidate.refusal and other.refusal:
        mine, theirs = causal_figures(candidate), causal_figures(other)
        causal = {name: (mine[name], theirs[name]) for name in mine}
    return Comparison(float(differences.mean()), bootstrap_interval(differences), causal, rows)


def causal_figures(found: Evaluation) -> dict[str, float]:
    """The causal checks in one number each: the best layer's rate, over that of the control."""
    assert found.refusal is not None
    held_out = found.bridge[-1]

    def best(rates: Sequence[Any], control: Sequence[Any]) -> float:
        return max(rate.value - other.value for rate, other in zip(rates, control, strict=True))

    out = {
        "bridge: state readable at the last position": best(held_out.state_readable, held_out.state_readable_at_random),
        "bridge: carried over from an abbreviation prompt": best(
            held_out.flips_from_abbreviation, held_out.flips_at_random
        ),
    }
    for way in found.refusal.interventions:
        wanted = "refused" if way.requests == "harmless" else "answered"
        out[f"refusal: {way.name}"] = getattr(way.result, wanted).value - getattr(way.random, wanted).value
    return out


def evaluate_command(
    *,
    model: str = "atlas",
    out: Path | None = None,
    json: bool = False,
    n: int = 200,
    quick: bool = False,
    outside: Path | None = None,
    against: str | None = None,
) -> None:
    """`cutaway subjects evaluate atlas`: print the figures, as tables or as JSON; `out` gets them as Markdown too.

    `quick` measures 24 items a set and no causal checks. `against` names other weights and says which are better.
    """
    import cutaway
    from cutaway.subjects.atlas import report
    from cutaway.subjects.atlas.shipped import atlas_folder

    options: Mapping[str, Any] = {"n": _N_QUICK if quick else n, "causal": not quick, "outside": outside}
    lm = cutaway.load(model)
    found = evaluate(lm, **options)
    if out is not None:
        folder = atlas_folder() if model == "atlas" else Path(model)
        write_text(out, report.as_markdown(found, command_of(model, n, quick, outside), folder))
    if json:
        print(report.as_json(plain(found)), end="")
    else:
        print(report.as_text(found))
    if against is not None:
        print(report.comparison_text(compare(found, evaluate(cutaway.load(against), **options)), model, against))


def command_of(model: str, n: int, quick: bool, outside: Path | None) -> str:
    """The command line that measures the same again."""
    words = ["cutaway subjects evaluate atlas"]
    words += [f"--model {model}"] if model != "atlas" else []
    words += ["--quick"] if quick else [f"--n {n}"]
    words += [f"--outside {outside.name}"] if outside else []
    return " ".join(words)

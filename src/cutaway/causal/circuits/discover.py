"""From a task to a circuit with its evidence: score edges, choose them on some pairs, judge them on others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import Manifest, json_hash
from cutaway.artifacts.results import Choices
from cutaway.causal.circuits.baselines import By, Select, sized_circuit
from cutaway.causal.circuits.circuit import Circuit
from cutaway.causal.circuits.evidence import Evidence, gather_evidence
from cutaway.causal.circuits.faithfulness import Run, measure, smallest_faithful
from cutaway.causal.circuits.gradient_scores import EdgeScores, Scorer
from cutaway.causal.circuits.runs import CircuitRuns, run_circuits
from cutaway.causal.circuits.scorers import magnitude, named_scorer
from cutaway.causal.circuits.stability import LEAST_PAIRS
from cutaway.causal.competence import Competence, Criterion, competence, unable
from cutaway.causal.graph import Graph
from cutaway.causal.metrics import Metric, named_metric
from cutaway.data.pairs import AlignedPairs, PromptPair, align
from cutaway.data.tasks.registry import known_task
from cutaway.data.tasks.tasks import Task, readable_pairs
from cutaway.model.language_model import LanguageModel

Pairs = Sequence[PromptPair] | AlignedPairs
_MEMORY = 2**30  # bytes that the streams of one pair's circuits may hold, about


@dataclass(frozen=True)
class Split:
    """The pairs a circuit is searched on and those it is judged on, in words too."""

    name: str
    search: AlignedPairs
    held_out: AlignedPairs
    search_words: str
    held_out_words: str
    criterion: Criterion = "preferred"


def split_pairs(
    lm: LanguageModel, task: str | Task | Pairs, held_out: Pairs | None = None, *, n: int = 48, seed: int = 0
) -> Split:
    """Pairs to search with and pairs to judge on, n of each.

    A task gives both from its two splits. Own pairs are taken as they are; without `held_out`, every second one is held
    out. Raises CutawayError where fewer than 8 of either align.
    """
    if isinstance(task, str):
        task = known_task(task)
    if isinstance(task, Task):
        search = readable_pairs(lm, task, n, seed, "search")
        other = readable_pairs(lm, task, n, seed, "held_out")
        told = f"pairs of {task.name}, seed {seed}"
        words = (f"{len(search)} search {told}", f"{len(other)} held-out {told}")
        split = Split(task.name, search, other, *words, task.criterion)
    else:
        search = _aligned(lm, task)
        if held_out is None:
            given, rows, refused = len(search), range(len(search)), search.refused
            search, other = replace(search[rows[0::2]], refused=refused), search[rows[1::2]]
            told = f"of the {given} pairs given"
            words = (f"{len(search)} {told} (every second one)", f"{len(other)} {told} (the others, held out)")
        else:
            other = _aligned(lm, held_out)
            words = (f"{len(search)} pairs given for the search", f"{len(other)} held-out pairs given")
        split = Split("own pairs", search, other, *words)
        seen = {(pair.clean, pair.corrupt) for pair in split.search.pairs}
        again = sum((pair.clean, pair.corrupt) in seen for pair in split.held_out.pairs)
        if again:
            raise CutawayError(
                f"{again} of the {len(split.held_out)} held-out pairs are among the {len(split.search)} pairs of the "
                "search, too, so they would not judge anything; take them out of one."
            )
    for pairs, what in ((split.search, "search with"), (split.held_out, "judge on")):
        if len(pairs) < LEAST_PAIRS:
            raise CutawayError(
                f"There {'is 1 pair' if len(pairs) == 1 else f'are {len(pairs)} pairs'} to {what}, too few for an "
                f"interval or for stability; give {LEAST_PAIRS} of each or more."
            )
    return split


def _aligned(lm: LanguageModel, pairs: Pairs) -> AlignedPairs:
    """The pairs that align; a line on stderr says how many do not, and why the first does not."""
    if isinstance(pairs, AlignedPairs):
        return pairs
    aligned = align(lm, pairs)
    if aligned.refused:
        reason = aligned.refused[0][1]
        print(
            f"cutaway: {len(aligned.refused)} of {len(pairs)} pairs do not align and are left out ({reason})",
            file=sys.stderr,
        )
    return aligned


def helpfulness(scores: EdgeScores) -> tuple[Tensor, Tensor | None]:
    """Scores turned so that above 0 means: the metric moves towards the ablated model's when the edge is cut.

    Returns them for all pairs together [...] and for each [n, ...].
    """
    if scores.method in ("magnitude", "random"):
        return scores.values, scores.per_pair
    fall = float((scores.clean - scores.corrupt).double().mean())
    sign = (1.0 if scores.direction == "denoise" else -1.0) * (-1.0 if fall < 0 else 1.0)
    return sign * scores.values, None if scores.per_pair is None else sign * scores.per_pair


def circuit_runner(lm: LanguageModel, pairs: AlignedPairs, metric: str | Metric, graph: Graph, ablation: str) -> Run:
    """`run_circuits` on these pairs; very many circuits of a large model are run some at a time."""

    def run(masks: Tensor) -> CircuitRuns:
        size = 4 * lm.d_model * graph.n_sources * pairs.clean.ids.shape[1]
        parts = [
            run_circuits(lm, pairs, part, metric, graph=graph, ablation=ablation, label=f"{len(masks)} circuits")
            for part in masks.split(max(8, _MEMORY // size))
        ]
        return replace(parts[0], values=torch.cat([part.values for part in parts]))

    return run


def _choices(ablation: str, evaluation: str) -> Choices:
    return Choices(
        granularity="edge",
        component="queries, keys and values of every head, every MLP, the logits",
        ablation=ablation,
        positions="all",
        direction="complement: edges outside the circuit are ablated in the run of the clean prompt",
        evaluation=evaluation,
    )


def check_able(
    lm: LanguageModel, pairs: AlignedPairs, name: str, *, criterion: Criterion = "preferred", force: bool = False
) -> Competence:
    """How well the model does the task; CutawayError where it does not, or with `force` a warning on stderr."""
    able = competence(lm, pairs, criterion=criterion)
    unable(
        able, lm.name, name, force=force,
        so="A circuit for what a model does not do means nothing; force it (--force) if you must.",
    )  # fmt: skip
    return able


def discover(
    lm: LanguageModel,
    task: str | Task | Pairs,
    held_out: Pairs | None = None,
    *,
    scorer: str | Scorer = "eap-ig",
    options: Mapping[str, Any] | None = None,
    metric: str | Metric = "logit_difference",
    size: int | None = None,
    fraction: float | None = None,
    faithfulness: float | None = None,
    most: float = 0.5,
    select: Select = "greedy",
    by: By = "absolute",
    ablation: str = "resample",
    grouped: bool = False,
    n: int = 48,
    seed: int = 0,
    draws: int = 20,
    resamples: int = 100,
    deep: bool = True,
    force: bool = False,
    command: str | None = None,
) -> Circuit:
    """Find the circuit of a task and measure it on pairs that it was not found on.

    `task` is a task, its name, or prompt pairs (then `held_out` may be given, too). `scorer` is one of `SCORERS` or a
    function, `options` its own (`{"steps": 5}`). The circuit has at most `size` edges or that `fraction` of the
    graph's, after pruning, or is the smallest that reaches a `faithfulness` on the search pairs (0.85 where nothing is
    said) with at most the share `most` of the edges. With `grouped`, keys and values that heads share are one
    destination. `deep=False` leaves out completeness, minimality and self-repair.

    Raises CutawayError: a task that the model cannot do (right on less than 80 % of the pairs, unless `force`), fewer
    than 8 pairs, a size out of range or out of reach, a metric that gives no scores.
    """
    asked_for = [one for one in (size, fraction, faithfulness) if one is not None]
    if len(asked_for) > 1:
        raise CutawayError("A circuit has a size, a fraction or a faithfulness to reach: give one of them.")
    if fraction is not None and not 0 < fraction <= 1:
        raise CutawayError(f"A fraction of the edges lies above 0 and up to 1; got {fraction:g}.")
    for given, what in ((n, "n, the pairs of each split,"), (draws, "draws, the random circuits,")):
        if given < 1:
            raise CutawayError(f"{what} is {given}; give 1 or more.")
    name, _ = named_metric(metric)
    graph = Graph.of(lm, grouped=grouped)
    score, named = _scorer(scorer, {**(options or {}), **({"graph": graph} if grouped else {})})
    if size is not None and not 0 < size <= graph.n_edges:
        raise CutawayError(f"{lm.name} has {graph.n_edges:,} edges, so a circuit has 1 to that many; not {size:,}.")
    split = split_pairs(lm, task, held_out, n=n, seed=seed)
    able = check_able(lm, split.search, split.name, criterion=split.criterion, force=force)
    scores = score(lm, split.search, metric)
    if not isinstance(scores, EdgeScores):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError(
            f"The scorer gave a {type(scores).__name__}; it must give EdgeScores (cutaway.causal.circuits)."
        )
    helps, per_pair = helpfulness(scores)
    if not bool(helps.any()):
        raise CutawayError(f"Every edge has the score 0 by {scores.method} and {name}; take another metric or scorer.")
    searching = circuit_runner(lm, split.search, metric, graph, ablation)
    if size is None and fraction is None:
        target = 0.85 if faithfulness is None else faithfulness
        wanted = f"the smallest tried with a faithfulness of {target:g} on the search pairs"
        mask, asked, found = smallest_faithful(
            searching, graph, helps, target, select=select, by=by, most=max(2, round(most * graph.n_edges))
        )
    else:
        count = size if size is not None else max(1, int((fraction or 0.0) * graph.n_edges))
        wanted = f"at most {count} edges"
        mask, asked = sized_circuit(graph, helps, count, select=select, by=by)
        if not bool(mask.any()):
            raise CutawayError(
                f"The circuit is empty: with {count} edge{'s' * (count != 1)} nothing leads from the embedding to the "
                "logits by these scores; ask for more edges, or select them greedily."
            )
        found = float(measure(searching(mask[None])).ratio[0])
    strong = _magnitude(lm, split.search, metric, graph)
    choices = _choices(ablation, split.held_out_words)
    evidence = gather_evidence(
        circuit_runner(lm, split.held_out, metric, graph, ablation), graph, mask, pairs=split.held_out_words,
        choices=choices, scores=helps, per_pair=per_pair, magnitude=strong, asked=asked, select=select, by=by,
        search=found, draws=draws, resamples=resamples, deep=deep, seed=seed, command=command,
    )  # fmt: skip
    settings = {
        "scorer": named or scores.method, "options": dict(options or {}), "metric": name, "select": select, "by": by,
        "ablation": ablation, "wanted": wanted, "n": n, "task": split.name,
    }  # fmt: skip
    method = {
        **settings, "scorer": scores.method, "asked": asked, "search": split.search_words,
        "search_faithfulness": found, "left_out": len(split.search.refused), "competence": able.to_json(),
    }  # fmt: skip
    manifest = Manifest.create(
        "circuit",
        model=lm.identity(),
        corpus_hash=json_hash([pair.to_json() for pair in (*split.search.pairs, *split.held_out.pairs)]),
        configuration=settings,
        seed=seed,
        command=command,
    )
    return Circuit(graph, mask, helps * mask, split.name, name, choices, manifest, method, evidence)


def evaluate_circuit(
    lm: LanguageModel,
    circuit: Circuit,
    task: str | Task | Pairs,
    *,
    metric: str | Metric | None = None,
    ablation: str | None = None,
    n: int = 48,
    seed: int = 0,
    draws: int = 20,
    deep: bool = True,
    force: bool = False,
    command: str | None = None,
) -> Circuit:
    """The same circuit with its evidence measured anew: on a task's held-out split, or on all the pairs given.

    Metric and ablation are the circuit's own unless given. What needs the scores of every edge (the size curve,
    stability) is not measured again. Raises CutawayError for another model, and as `discover` does.
    """
    circuit.check_model(lm)
    if circuit.graph.columns is not None:
        raise CutawayError("This circuit tells positions apart; only circuits of all positions are evaluated.")
    mask = circuit.graph.prune(circuit.mask)
    if not bool(mask.any()):
        raise CutawayError("The circuit is empty: none of its edges lies on a path from the embedding to the logits.")
    name, _ = named_metric(metric or circuit.metric)
    criterion: Criterion = "preferred"
    if isinstance(task, str):
        task = known_task(task)
    if isinstance(task, Task):
        pairs = readable_pairs(lm, task, n, seed, "held_out")
        words, criterion, label = f"{len(pairs)} held-out pairs of {task.name}, seed {seed}", task.criterion, task.name
    else:
        pairs = _aligned(lm, task)
        words, label = f"{len(pairs)} pairs given", "own pairs"
    if len(pairs) < LEAST_PAIRS:
        raise CutawayError(f"{len(pairs)} pairs are too few for an interval; give {LEAST_PAIRS} or more.")
    check_able(lm, pairs, label, criterion=criterion, force=force)
    how = ablation or circuit.choices.ablation
    choices = _choices(how, words)
    evidence: Evidence = gather_evidence(
        circuit_runner(lm, pairs, metric or name, circuit.graph, how), circuit.graph, mask, pairs=words,
        choices=choices, magnitude=_magnitude(lm, pairs, metric or name, circuit.graph), draws=draws, deep=deep,
        select=circuit.method.get("select", "greedy"), seed=seed, command=command,
    )  # fmt: skip
    return replace(circuit, metric=name, choices=choices, evidence=evidence)


def _magnitude(lm: LanguageModel, pairs: AlignedPairs, metric: str | Metric, graph: Graph) -> Tensor:
    return magnitude(lm, pairs, metric, graph=graph).values.abs()


def _scorer(scorer: str | Scorer, options: Mapping[str, Any] | None) -> tuple[Scorer, str]:
    """The scorer with its options, and its name where it has one."""
    function: Callable[..., EdgeScores] = named_scorer(scorer) if isinstance(scorer, str) else scorer
    return (partial(function, **options) if options else function), scorer if isinstance(scorer, str) else ""

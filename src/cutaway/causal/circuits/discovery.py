"""From a task to a circuit with its evidence: score edges, choose them on some pairs, judge them on others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.artifacts.manifest import Manifest, json_hash
from cutaway.artifacts.results import Choices
from cutaway.causal.accuracy import Criterion, TaskAccuracy, task_accuracy, unable
from cutaway.causal.circuits.baselines import By, Select, sized_circuit
from cutaway.causal.circuits.circuit import Circuit
from cutaway.causal.circuits.edge_scores import EdgeScores, Scorer
from cutaway.causal.circuits.evidence import Evaluation, Ranking, gather_evidence
from cutaway.causal.circuits.faithfulness import RunCircuits, measure, smallest_faithful
from cutaway.causal.circuits.runs import CircuitRuns, run_circuits
from cutaway.causal.circuits.scorers import magnitude, named_scorer
from cutaway.causal.circuits.stability import MIN_PAIRS
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.metrics import Metric, named_metric
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.data.tasks.registry import known_task
from cutaway.data.tasks.tasks import Task, readable_pairs
from cutaway.model.language_model import LanguageModel

Pairs = Sequence[PromptPair] | AlignedPairs
_MEMORY = 2**30  # bytes that the streams of one pair's circuits may hold, about


@dataclass(frozen=True)
class SearchPairs:
    """The pairs a circuit is searched on and those it is judged on."""

    name: str
    """The task's, or "own pairs"."""
    search: AlignedPairs
    """The pairs that edges are scored on."""
    held_out: AlignedPairs
    """The pairs that the circuit is judged on."""
    search_words: str
    """What the search pairs are, in words."""
    held_out_words: str
    """What the held-out pairs are, in words."""
    criterion: Criterion = "preferred"
    """When the model is right on a pair."""


def split_pairs(
    lm: LanguageModel, task: str | Task | Pairs, held_out: Pairs | None = None, *, n: int = 48, seed: int = 0
) -> SearchPairs:
    """Pairs to search with and pairs to judge on.

    Args:
        lm: The model.
        task: A task (or its name), which has two splits, or pairs of your own, which are taken as they are.
        held_out: The pairs to judge on, with pairs of your own; None: every second one of these.
        n: Pairs of each split that are drawn of a task.
        seed: Of that draw.

    Raises:
        CutawayError: Fewer than 8 of either align, or held-out pairs are among those of the search.
    """
    if isinstance(task, str):
        task = known_task(task)
    if isinstance(task, Task):
        search = readable_pairs(lm, task, n, seed, "search")
        other = readable_pairs(lm, task, n, seed, "held_out")
        named = f"pairs of {task.name}, seed {seed}"
        words = (f"{len(search)} search {named}", f"{len(other)} held-out {named}")
        split = SearchPairs(task.name, search, other, *words, task.criterion)
    else:
        search = _aligned_and_said(lm, task)
        if held_out is None:
            given, rows = len(search), range(len(search))
            search, other = search[rows[0::2]], search[rows[1::2]]
            named = f"of the {given} pairs given"
            words = (f"{len(search)} {named} (every second one)", f"{len(other)} {named} (the others, held out)")
        else:
            other = _aligned_and_said(lm, held_out)
            words = (f"{len(search)} pairs given for the search", f"{len(other)} held-out pairs given")
        split = SearchPairs("own pairs", search, other, *words)
        seen = {(pair.clean, pair.corrupt) for pair in split.search.pairs}
        again = sum((pair.clean, pair.corrupt) in seen for pair in split.held_out.pairs)
        if again:
            raise CutawayError(
                f"{again} of the {len(split.held_out)} held-out pairs are among the {len(split.search)} pairs of the "
                "search, too, so they would not judge anything; take them out of one."
            )
    for pairs, what in ((split.search, "search with"), (split.held_out, "judge on")):
        if len(pairs) < MIN_PAIRS:
            raise CutawayError(
                f"There {'is 1 pair' if len(pairs) == 1 else f'are {len(pairs)} pairs'} to {what}, too few for an "
                f"interval or for stability; give {MIN_PAIRS} of each or more."
            )
    return split


def _aligned_and_said(lm: LanguageModel, pairs: Pairs) -> AlignedPairs:
    """The pairs that align; a line on stderr says how many do not, and why the first does not."""
    ready = aligned(lm, pairs)
    if ready.refused and ready is not pairs:
        reason = ready.refused[0][1]
        print(
            f"cutaway: {len(ready.refused)} of {len(pairs)} pairs do not align and are left out ({reason})",
            file=sys.stderr,
        )
    return ready


def signed_importance(scores: EdgeScores) -> tuple[Tensor, Tensor | None]:
    """Scores turned so that above 0 means: the metric moves towards the ablated model's when the edge is cut.

    Returns them for all pairs together [...] and for each [n, ...].
    """
    if scores.method in ("magnitude", "random"):
        return scores.values, scores.per_pair
    fall = float((scores.clean - scores.corrupt).double().mean())
    sign = (1.0 if scores.direction == "denoise" else -1.0) * (-1.0 if fall < 0 else 1.0)
    return sign * scores.values, None if scores.per_pair is None else sign * scores.per_pair


def circuit_runner(
    lm: LanguageModel, pairs: AlignedPairs, metric: str | Metric, graph: EdgeGraph, ablation: str
) -> RunCircuits:
    """A function from masks to `CircuitRuns` on these pairs; very many circuits are run some at a time.

    It is what `completeness` and `minimality` take.

    Args:
        lm: The model.
        pairs: n aligned pairs.
        metric: What is asked of the logits.
        graph: The graph that the masks are of.
        ablation: What all edges outside a circuit carry, such as "resample" (the pair's corrupt prompt).
    """

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
) -> TaskAccuracy:
    """How well the model does the task; CutawayError where it does not, or with `force` a warning on stderr."""
    able = task_accuracy(lm, pairs, criterion=criterion)
    unable(
        able, lm.name, name, force=force,
        so="A circuit for what a model does not do means nothing; force it (--force) if you must.",
    )  # fmt: skip
    return able


@dataclass(frozen=True)
class Search:
    """How the edges of a circuit are scored and chosen."""

    scorer: str | Scorer = "eap-ig"
    """One of `SCORERS`, or a function (lm, pairs, metric) -> `EdgeScores`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the scorer, by name: {"steps": 5}."""
    metric: str | Metric = "logit_difference"
    """What is asked of the logits."""
    select: Select = "greedy"
    """Grow the circuit from the logits ("greedy"), or take the highest scores and prune ("top")."""
    by: By = "absolute"
    """Rank edges by "absolute" or by "signed" scores."""
    ablation: str = "resample"
    """What edges outside the circuit carry: "resample" (the corrupt prompt), "zero", "mean", "mean_by_position", ..."""
    grouped: bool = False
    """Whether keys and values that heads share are one destination."""
    max_share: float = 0.5
    """The largest share of the graph's edges that is tried for a faithfulness to reach."""


def discover(
    lm: LanguageModel,
    task: str | Task | Pairs,
    held_out: Pairs | None = None,
    *,
    size: int | float | None = None,
    faithfulness: float | None = None,
    search: Search = Search(),
    evaluation: Evaluation = Evaluation(),  # noqa: B008, frozen
    n: int = 48,
    seed: int = 0,
    force: bool = False,
) -> Circuit:
    """Find the circuit of a task and measure it on pairs that it was not found on.

    Args:
        lm: The model.
        task: A task, its name, or prompt pairs of your own.
        held_out: The pairs to judge on, with pairs of your own; None: every second one of these.
        size: At most so many edges after pruning (an int), or such a share of the graph's (a float, above 0 and up
            to 1).
        faithfulness: Instead of a size: find the smallest circuit that reaches this on the search pairs; 0.85 where
            neither is given.
        search: How edges are scored and chosen.
        evaluation: How much is measured of the circuit.
        n: Pairs of each split that are drawn of a task.
        seed: Of the pairs and of everything drawn at random.
        force: Go on where the model is right on less than 80 % of the search pairs, with a warning on stderr.

    Returns:
        The circuit with its evidence; `save` writes it, `Circuit.load` reads it.

    Raises:
        CannotDoTask: The model cannot do the task.
        CutawayError: Fewer than 8 pairs, a size out of range or out of reach, a metric that gives no scores.

    Source: Conmy et al. 2023 (circuits of edges), Hanna et al. 2024 (EAP-IG, faithfulness);
    https://arxiv.org/abs/2304.14997, https://arxiv.org/abs/2403.17806.

    Example:
        >>> lm = cutaway.load("atlas")
        >>> quick = Evaluation(draws=3, curve_draws=1, deep=False)  # doctest: +SKIP
        >>> circuit = discover(lm, "world indirect object", size=60, n=8, evaluation=quick)  # doctest: +SKIP
        >>> circuit.evidence.faithfulness.value  # doctest: +SKIP
    """
    if size is not None and faithfulness is not None:
        raise CutawayError("A circuit has a size or a faithfulness to reach: give one of them.")
    share = size if isinstance(size, float) else None
    if share is not None and not 0 < share <= 1:
        raise CutawayError(f"A size given as a share of the edges lies above 0 and up to 1; got {share:g}.")
    for given, what in ((n, "n, the pairs of each split,"), (evaluation.draws, "draws, the random circuits,")):
        if given < 1:
            raise CutawayError(f"{what} is {given}; give 1 or more.")
    metric, select, by, ablation = search.metric, search.select, search.by, search.ablation
    name, _ = named_metric(metric)
    graph = EdgeGraph.of(lm, grouped=search.grouped)
    options = {**search.options, **({"graph": graph} if search.grouped else {})}
    score, named = _scorer(search.scorer, options)
    if size is not None and share is None and not 0 < size <= graph.n_edges:
        raise CutawayError(f"{lm.name} has {graph.n_edges:,} edges, so a circuit has 1 to that many; not {size:,}.")
    split = split_pairs(lm, task, held_out, n=n, seed=seed)
    able = check_able(lm, split.search, split.name, criterion=split.criterion, force=force)
    scores = score(lm, split.search, metric)
    if not isinstance(scores, EdgeScores):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CutawayError(f"The scorer gave a {type(scores).__name__}; it must give EdgeScores (cutaway.causal).")
    helps, per_pair = signed_importance(scores)
    if not bool(helps.any()):
        raise CutawayError(f"Every edge has the score 0 by {scores.method} and {name}; take another metric or scorer.")
    searching = circuit_runner(lm, split.search, metric, graph, ablation)
    if size is None:
        target = 0.85 if faithfulness is None else faithfulness
        wanted = f"the smallest tried with a faithfulness of {target:g} on the search pairs"
        mask, asked, found = smallest_faithful(
            searching, graph, helps, target, select=select, by=by,
            max_edges=max(2, round(search.max_share * graph.n_edges)),
        )  # fmt: skip
    else:
        count = int(size) if share is None else max(1, int(share * graph.n_edges))
        wanted = f"at most {count} edges"
        mask, asked = sized_circuit(graph, helps, count, select=select, by=by)
        if not bool(mask.any()):
            raise CutawayError(
                f"The circuit is empty: with {count} edge{'s' * (count != 1)} nothing leads from the embedding to the "
                "logits by these scores; ask for more edges, or select them greedily."
            )
        found = float(measure(searching(mask[None])).ratio[0])
    choices = _choices(ablation, split.held_out_words)
    evidence = gather_evidence(
        circuit_runner(lm, split.held_out, metric, graph, ablation), graph, mask, choices=choices,
        ranking=Ranking(select, by, helps, per_pair, asked), magnitude=_magnitude(lm, split.search, metric, graph),
        search=found, evaluation=evaluation, seed=seed,
    )  # fmt: skip
    settings = {
        "scorer": named or scores.method, "options": dict(search.options), "metric": name, "select": select, "by": by,
        "ablation": ablation, "wanted": wanted, "n": n, "task": split.name,
    }  # fmt: skip
    method = {
        **settings, "scorer": scores.method, "asked": asked, "search": split.search_words,
        "search_faithfulness": found, "left_out": len(split.search.refused), "task_accuracy": able.to_json(),
    }  # fmt: skip
    manifest = Manifest.create(
        "circuit",
        model=lm.identity(),
        corpus_hash=json_hash([pair.to_json() for pair in (*split.search.pairs, *split.held_out.pairs)]),
        configuration=settings,
        seed=seed,
        command=current_command(),
    )
    return Circuit(graph, mask, helps * mask, split.name, name, choices, manifest, method, evidence)


def evaluate_circuit(
    lm: LanguageModel,
    circuit: Circuit,
    task: str | Task | Pairs,
    *,
    metric: str | Metric | None = None,
    ablation: str | None = None,
    evaluation: Evaluation = Evaluation(),  # noqa: B008, frozen
    n: int = 48,
    seed: int = 0,
    force: bool = False,
) -> Circuit:
    """The same circuit with its evidence measured anew: on a task's held-out split, or on all the pairs given.

    What needs the scores of every edge (the size curve, stability) is not measured again.

    Args:
        lm: The model that the circuit was found in.
        circuit: The circuit, from `discover` or `Circuit.load`.
        task: A task, its name, or prompt pairs of your own.
        metric: What is asked of the logits; None: the circuit's own.
        ablation: What edges outside the circuit carry; None: the circuit's own.
        evaluation: How much is measured.
        n: Pairs that are drawn of a task.
        seed: Of the pairs and of everything drawn at random.
        force: Go on where the model cannot do the task, with a warning on stderr.

    Raises:
        CannotDoTask: The model cannot do the task.
        CutawayError: Another model, an empty circuit, fewer than 8 pairs.
    """
    circuit.check_model(lm)
    if circuit.graph.columns is not None:
        raise NotSupported("This circuit tells positions apart; only circuits of all positions are evaluated.")
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
        pairs = _aligned_and_said(lm, task)
        words, label = f"{len(pairs)} pairs given", "own pairs"
    if len(pairs) < MIN_PAIRS:
        raise CutawayError(f"{len(pairs)} pairs are too few for an interval; give {MIN_PAIRS} or more.")
    check_able(lm, pairs, label, criterion=criterion, force=force)
    how = ablation or circuit.choices.ablation
    choices = _choices(how, words)
    evidence = gather_evidence(
        circuit_runner(lm, pairs, metric or name, circuit.graph, how), circuit.graph, mask, choices=choices,
        ranking=Ranking(circuit.method.get("select", "greedy")), evaluation=evaluation, seed=seed,
        magnitude=_magnitude(lm, pairs, metric or name, circuit.graph),
    )  # fmt: skip
    return replace(circuit, metric=name, choices=choices, evidence=evidence)


def _magnitude(lm: LanguageModel, pairs: AlignedPairs, metric: str | Metric, graph: EdgeGraph) -> Tensor:
    return magnitude(lm, pairs, metric, graph=graph).values.abs()


def _scorer(scorer: str | Scorer, options: Mapping[str, Any]) -> tuple[Scorer, str]:
    """The scorer with its options, and its name where it has one."""
    function: Callable[..., EdgeScores] = named_scorer(scorer) if isinstance(scorer, str) else scorer
    return (partial(function, **options) if options else function), scorer if isinstance(scorer, str) else ""

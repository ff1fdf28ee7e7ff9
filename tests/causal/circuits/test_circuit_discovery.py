"""From pairs to a circuit with evidence, on a small random model whose circuits can be run again by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cutaway.artifacts.command import recording
from cutaway.artifacts.errors import CutawayError
from cutaway.causal.circuits import discovery as module
from cutaway.causal.circuits.circuit import Circuit, circuit_sections, lead
from cutaway.causal.circuits.discovery import (
    Search,
    check_able,
    circuit_runner,
    discover,
    evaluate_circuit,
    signed_importance,
    split_pairs,
)
from cutaway.causal.circuits.edge_scores import EdgeScores
from cutaway.causal.circuits.evidence import Evaluation
from cutaway.causal.circuits.gradient_scores import eap_ig, exchanged
from cutaway.causal.circuits.runs import run_circuits
from cutaway.causal.circuits.scorers import exact
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.model.language_model import LanguageModel, load

QUICK = Evaluation(3, deep=False)
MakePairs = Callable[..., list[PromptPair]]


@pytest.fixture(scope="module")
def pairs(tiny: LanguageModel, id_pairs: MakePairs) -> list[PromptPair]:
    return id_pairs(20, 6, 1)


@pytest.fixture(scope="module")
def found(tiny: LanguageModel, pairs: list[PromptPair]) -> Circuit:
    with recording("cutaway circuit tiny"):
        return discover(tiny, pairs, size=60, force=True)


def by_hand(lm: LanguageModel, circuit: Circuit, pairs: AlignedPairs) -> float:
    runs = run_circuits(lm, pairs, circuit.mask[None], graph=circuit.graph)
    value, clean, corrupt = (float(t.double().mean()) for t in (runs.values[0], runs.clean, runs.corrupt))
    return (value - corrupt) / (clean - corrupt)


def test_the_circuit_is_judged_on_pairs_it_was_not_found_on(
    tiny: LanguageModel, pairs: list[PromptPair], found: Circuit
) -> None:
    assert found.evidence is not None
    ready = aligned(tiny, pairs)
    effect = found.evidence.faithfulness
    assert effect.n == 10
    assert effect.value == pytest.approx(by_hand(tiny, found, ready[range(1, 20, 2)]), abs=1e-6)
    searched = effect.controls[-1]
    assert searched.name == "the pairs it was found on"
    assert searched.value == pytest.approx(by_hand(tiny, found, ready[range(0, 20, 2)]), abs=1e-6)
    assert found.evidence.pairs == "10 of the 20 pairs given (the others, held out)"
    assert 0 < found.n_edges <= 60
    assert torch.equal(found.graph.prune(found.mask), found.mask)
    assert found.choices.evaluation == found.evidence.pairs
    assert found.manifest.command == "cutaway circuit tiny"
    found.check_model(tiny)


def test_more_than_half_of_an_edges_score_is_kept(found: Circuit) -> None:
    edges = found.edges
    assert len(edges) == found.n_edges
    assert sum(score != 0 for _, _, score in edges) > 0.9 * len(edges)
    assert float(found.scores[~found.mask].abs().sum()) == 0


@pytest.mark.parametrize("metric", ["logit_difference", "nll"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_an_edge_that_helps_has_a_score_above_zero(
    tiny: LanguageModel, pairs: list[PromptPair], metric: str, direction: Any
) -> None:
    """Cut from the clean run, or put into the corrupt run, each edge moves the metric as its score says."""
    ready = aligned(tiny, pairs[:6])
    graph = EdgeGraph.of(tiny)
    scores = exact(tiny, ready, metric, direction=direction)
    helps, per_pair = signed_importance(scores)
    places = graph.real.nonzero()[::9]
    masks = graph.full().repeat(len(places), 1, 1)
    masks[torch.arange(len(places)), places[:, 0], places[:, 1]] = False
    runs = run_circuits(tiny, ready if direction == "noise" else exchanged(ready), masks, metric, graph=graph)
    moved = (runs.values - runs.clean).mean(1)  # away from the run that the edge was changed in
    better = 1 if float((scores.clean - scores.corrupt).mean()) > 0 else -1
    towards = better * (-moved if direction == "noise" else moved)
    assert torch.allclose(helps[places[:, 0], places[:, 1]], towards, atol=2e-5)
    assert float(towards.abs().max()) > 1e-3
    assert per_pair is not None
    assert torch.allclose(per_pair.mean(0), helps, atol=1e-6)


def test_a_faithfulness_to_reach(tiny: LanguageModel, pairs: list[PromptPair]) -> None:
    circuit = discover(tiny, pairs, faithfulness=0.6, force=True, evaluation=QUICK, search=Search(max_share=1.0))
    assert circuit.method["search_faithfulness"] >= 0.6
    smaller = discover(tiny, pairs, size=max(1, circuit.n_edges // 2), force=True, evaluation=QUICK)
    assert smaller.n_edges < circuit.n_edges
    assert circuit.evidence is not None
    assert circuit.evidence.knockouts == ()
    with pytest.raises(CutawayError, match=r"reaches a faithfulness of 0\.999"):
        discover(tiny, pairs, faithfulness=0.999, search=Search(max_share=0.01), force=True)


def test_a_scorer_of_ones_own(tiny: LanguageModel, pairs: list[PromptPair]) -> None:
    def mine(lm: LanguageModel, aligned: AlignedPairs, metric: Any) -> EdgeScores:
        graph, n = EdgeGraph.of(lm), len(aligned)
        values = graph.real.float()
        values[0] = 2.0  # everything from the embedding first
        ends = torch.ones(n), torch.zeros(n)
        return EdgeScores(graph, -values * graph.real, None, "mine", "logit_difference", "noise", n, *ends)

    circuit = discover(tiny, pairs, size=8, search=Search(mine), force=True, evaluation=QUICK)
    assert circuit.method["scorer"] == "mine"
    assert "embed" in circuit.nodes
    assert circuit.evidence is not None
    assert not [e for e in circuit.evidence.effects if e.name.startswith("overlap")]  # without scores of each pair


def test_shared_keys_and_values_as_one(tiny: LanguageModel, pairs: list[PromptPair]) -> None:
    circuit = discover(tiny, pairs, size=0.2, search=Search(grouped=True), force=True, evaluation=QUICK)
    assert circuit.graph.kv == tiny.n_kv_heads < tiny.n_heads
    assert circuit.n_edges <= 0.2 * circuit.graph.n_edges
    assert any("K" in destination for _, destination, _ in circuit.edges)
    assert circuit_sections(circuit)


def test_a_saved_circuit_is_evaluated_on_other_pairs(
    tiny: LanguageModel, found: Circuit, id_pairs: MakePairs, tmp_path: Path
) -> None:
    found.save(tmp_path / "c.json")
    again = Circuit.load(tmp_path / "c.json")
    other = id_pairs(9, 7, 5)
    judged = evaluate_circuit(tiny, again, other, force=True, evaluation=Evaluation(3))
    assert judged.evidence is not None
    assert judged.evidence.faithfulness.value == pytest.approx(by_hand(tiny, found, aligned(tiny, other)), abs=1e-6)
    assert judged.evidence.pairs == "9 pairs given"
    assert judged.evidence.curve == ()
    assert torch.equal(judged.mask, found.mask)
    zero = evaluate_circuit(tiny, again, other, force=True, ablation="zero", evaluation=QUICK)
    assert zero.choices.ablation == zero.evidence.faithfulness.ablation == "zero"  # type: ignore[union-attr]
    with pytest.raises(CutawayError, match="5 pairs are too few"):
        evaluate_circuit(tiny, again, other[:5], force=True)


def test_a_page_shows_everything(found: Circuit) -> None:
    sections = circuit_sections(found)
    headings = [heading for heading, _, _ in sections]
    assert headings == [
        "Does the circuit do it?", "The circuit", "Faithfulness by size", "Is anything missing?",
        "Would other pairs give the same circuit?", "Is anything idle?", "Does the model repair itself?",
        "The choices made", "Every edge",
    ]  # fmt: skip
    whole = "".join(str(drawing) + text for _, text, drawing in sections)
    assert "nan" not in whole
    assert "strongest edges" in whole
    assert "random circuits" in whole
    assert f"{found.n_edges} of" in lead(found)
    # a random model has no circuit to speak of, and the page must not say it has
    assert found.evidence is not None
    above = found.evidence.above_controls()
    assert ("does NOT lie above" in sections[0][1]) == (not above)


def test_circuits_of_a_large_model_are_run_some_at_a_time(
    tiny: LanguageModel, pairs: list[PromptPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, graph = aligned(tiny, pairs[:8]), EdgeGraph.of(tiny)
    masks = torch.stack([graph.prune(torch.rand(graph.shape) < 0.6) for _ in range(19)])
    run = circuit_runner(tiny, ready, "logit_difference", graph, "resample")
    whole = run(masks)
    monkeypatch.setattr(module, "_MEMORY", 1)
    parts = run(masks)
    assert torch.allclose(whole.values, parts.values, atol=1e-5)
    assert torch.equal(whole.clean, parts.clean)


def test_bad_input_is_told(tiny: LanguageModel, pairs: list[PromptPair]) -> None:
    n = EdgeGraph.of(tiny).n_edges
    for message, options in {
        "give one of them": {"size": 5, "faithfulness": 0.1},
        f"has {n} edges, so a circuit has 1 to that many; not {n + 1}": {"size": n + 1},
        "not 0": {"size": 0},
        "lies above 0 and up to 1; got 1.5": {"size": 1.5},
        "no metric is called 'beauty'": {"search": Search(metric="beauty")},
        "no scorer is called 'oracle'": {"search": Search("oracle")},
        "use logit_difference": {"search": Search("eap", metric="kl"), "size": 5},
        "The circuit is empty": {"size": 1, "search": Search(select="top")},
    }.items():
        with pytest.raises(CutawayError, match=message.replace("(", r"\(")):
            discover(tiny, pairs, force=True, **options)  # type: ignore[arg-type]
    with pytest.raises(CutawayError, match="There are 7 pairs to search with, too few"):
        discover(tiny, pairs[:14], size=9)
    with pytest.raises(CutawayError, match="There are 3 pairs to judge on, too few"):
        discover(tiny, pairs[:14], pairs[14:17], size=9)
    with pytest.raises(CutawayError, match="no task is called 'chess'"):
        discover(tiny, "chess")


def test_what_a_model_cannot_do_is_refused_with_its_score(
    tiny: LanguageModel, pairs: list[PromptPair], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CutawayError, match=r"tiny cannot do own pairs: it is right on \d+ of 10 .* force it"):
        discover(tiny, pairs, size=9)
    check_able(tiny, aligned(tiny, pairs), "own pairs", force=True)
    assert "tiny cannot do own pairs: it is right on" in capsys.readouterr().err


def test_pairs_are_split(tiny: LanguageModel, pairs: list[PromptPair], id_pairs: MakePairs) -> None:
    split = split_pairs(tiny, pairs)
    assert list(split.search.pairs) == pairs[0::2]
    assert list(split.held_out.pairs) == pairs[1::2]
    other = id_pairs(8, 6, 9)
    split = split_pairs(tiny, pairs, other)
    assert list(split.search.pairs) == pairs
    assert list(split.held_out.pairs) == other


def test_a_task_is_searched_and_judged_on_different_wording(atlas: LanguageModel) -> None:
    split = split_pairs(atlas, "world ioi", n=8)
    assert len(split.search) == len(split.held_out) == 8
    assert not {pair.clean for pair in split.search.pairs} & {pair.clean for pair in split.held_out.pairs}
    assert split.held_out_words.startswith("8 held-out pairs of world indirect object")


def test_a_gradient_that_is_zero_but_for_rounding_is_refused(atlas: LanguageModel) -> None:
    """KL from the clean run has none there; in a model of some depth rounding leaves about 1e-7 of it."""
    with pytest.raises(CutawayError, match=r"gradient of kl is zero at the clean prompts.*use logit_difference"):
        discover(atlas, "world ioi", search=Search("eap", metric="kl"), size=60, n=8)


@pytest.mark.slow
def test_atlas_names_the_indirect_object_by_few_edges(atlas: LanguageModel) -> None:
    circuit = discover(atlas, "world ioi", size=66, n=10, evaluation=Evaluation(deep=False))
    assert circuit.n_edges <= 66
    assert circuit.evidence is not None
    effect = circuit.evidence.faithfulness
    assert effect.value > 0.75
    assert circuit.evidence.above_controls()
    random, strong, _ = effect.controls
    assert abs(random.value) < 0.1
    assert strong.value < 0.7


@pytest.mark.slow
def test_a_trained_gpt2_agrees_by_few_edges(shared: Path) -> None:
    lm = load(str(shared / "models" / "webtext-gpt2"))
    circuit = discover(lm, "agreement", size=21, n=16, evaluation=Evaluation(deep=False))
    assert circuit.evidence is not None
    effect = circuit.evidence.faithfulness
    assert effect.value > 0.8
    random, strong, _ = effect.controls
    assert random.interval is not None
    assert effect.value > random.interval[1]
    assert effect.value > strong.value
    with pytest.raises(CutawayError, match="cannot do pronoun: it is right on"):
        discover(lm, "pronoun", size=21, n=16)


def test_what_cannot_be_searched_or_judged_is_refused(tiny: LanguageModel, pairs: list[PromptPair]) -> None:
    with pytest.raises(CutawayError, match="2 of the 12 held-out pairs are among the 10 pairs of the search"):
        split_pairs(tiny, pairs[:10], pairs[8:])
    given: list[dict[str, Any]] = [{"n": 0}, {"evaluation": Evaluation(-1)}]
    for options in given:
        with pytest.raises(CutawayError, match="give 1 or more"):
            discover(tiny, pairs, size=9, force=True, **options)
    with pytest.raises(CutawayError, match="The scorer gave a Tensor; it must give EdgeScores"):
        discover(tiny, pairs, size=9, force=True, search=Search(lambda *_: torch.zeros(3)))  # type: ignore[arg-type,return-value]
    other = EdgeGraph(tiny.n_layers + 1, tiny.n_heads, False, None, None)
    with pytest.raises(CutawayError, match="the graph of another model"):
        run_circuits(tiny, aligned(tiny, pairs), other.empty()[None], graph=other)
    for asked in (lambda: eap_ig(tiny, pairs), lambda: run_circuits(tiny, pairs, EdgeGraph.of(tiny).empty()[None])):  # type: ignore[arg-type]
        with pytest.raises(CutawayError, match=r"the pairs are a list; give aligned ones: aligned\(lm, pairs\)"):
            asked()
    with pytest.raises(CutawayError, match=r"at least one step; got 1\.5"):
        eap_ig(tiny, aligned(tiny, pairs), steps=1.5)  # type: ignore[arg-type]

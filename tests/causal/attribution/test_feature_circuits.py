"""Latents as nodes: what they add up to, edges against the chain rule and finite differences, evaluation by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_models import bent_llama
from result_checks import check_result
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.causal.attribution.attribution_patching import GradientOptions, attribution_patching
from cutaway.causal.attribution.feature_circuits import (
    METRIC,
    FeatureCircuit,
    FeatureNode,
    Thresholds,
    edge_scores,
    feature_circuit,
    strongest_nodes,
)
from cutaway.causal.attribution.feature_evaluation import feature_faithfulness
from cutaway.causal.attribution.latents import features_of, latent_attribution
from cutaway.causal.attribution.questions import ask
from cutaway.causal.attribution.scores import Node
from cutaway.causal.metrics import logit_difference, targets_of
from cutaway.data.pairs import PromptPair, aligned
from cutaway.dictionaries import load
from cutaway.dictionaries.dictionary import BatchTopK, Dictionary, JumpReLU, Port, ReLU, TopK
from cutaway.model.edits import edits
from cutaway.model.language_model import LanguageModel

Pairs = Callable[..., list[PromptPair]]
SITES = ("blocks.0.resid_post", "blocks.1.attn.out", "blocks.1.mlp.out", "blocks.1.resid_post")
F = 12


def dictionary(site: str, seed: int, selector: Any = None, **changes: Any) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    made = Dictionary(random(16, F), random(F) * 0.2, random(F, 16) * 0.3, random(16) * 0.1, selector or ReLU(), site)
    return replace(made, **changes)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return bent_llama()


@pytest.fixture(scope="module")
def dictionaries() -> list[Dictionary]:
    threshold = torch.linspace(0.0, 0.4, F).double()
    kinds = [ReLU(), TopK(5), JumpReLU(threshold), BatchTopK(4, 0.3)]
    return [dictionary(site, i, kind) for i, (site, kind) in enumerate(zip(SITES, kinds, strict=True))]


@pytest.mark.parametrize("method", ["atp", "relp", "ig"])
@pytest.mark.parametrize("positions", ["all", "each", ["changed", "last"]])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_latents_and_error_add_up_to_their_site(
    llama: LanguageModel, dictionaries: list[Dictionary], id_pairs: Pairs, method: Any, positions: Any, direction: Any
) -> None:
    pairs = id_pairs(4, 6 if positions == "each" else None)
    options: Any = {"method": method, "positions": positions, "direction": direction, "check": 0}
    four = GradientOptions(4)
    latents = latent_attribution(llama, pairs, dictionaries, **options, options=four)
    sites = attribution_patching(llama, pairs, SITES, **options, options=four)
    for site in SITES:
        assert latents.blocks[site].shape[1] == F + 1
        torch.testing.assert_close(latents.blocks[site].sum(1), sites.blocks[site].sum(1), rtol=1e-5, atol=1e-6)
        assert latents.blocks[site].abs().sum(1).gt(1.001 * sites.blocks[site].sum(1).abs()).any()
    assert latents.nodes[F] == Node(SITES[0], error=True, at=latents.columns[0])
    assert str(latents.nodes[F]).startswith("blocks.0.resid_post error")
    few = latent_attribution(llama, pairs, dictionaries, **options, options=GradientOptions(4, batch_rows=4))
    torch.testing.assert_close(few.scores, latents.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", ["all", "each", ["changed", "last"]])
def test_exact_patching_moves_one_latent_alone(
    llama: LanguageModel, dictionaries: list[Dictionary], id_pairs: Pairs, positions: Any
) -> None:
    pairs = aligned(llama, id_pairs(3, 6))
    scores = latent_attribution(llama, pairs, dictionaries, method="atp", positions=positions, check=20)
    assert scores.agreement is not None
    clean = llama.run(pairs.clean, logits="last").logits
    assert clean is not None
    targets = targets_of(pairs, clean[:, 0])
    features = features_of(llama, dictionaries)
    for node, exact in zip(scores.agreement.nodes, scores.agreement.exact, strict=True):
        own = features[node.site].dictionary
        x0, x1 = (llama.run(t, capture=node.site)[node.site] for t in (pairs.clean, pairs.corrupt))
        f0, f1 = own.encode(x0), own.encode(x1)
        mixed = f0.clone()
        if node.latent is None:  # the other run's error in place of this one's
            change = (x1 - own.decode(f1)) - (x0 - own.decode(f0))
        else:
            mixed[..., node.latent] = f1[..., node.latent]
            change = own.decode(mixed) - own.decode(f0)
        value = x0.clone()
        for row in range(3):
            at: Any = slice(None)
            if node.at is not None:
                at = int(pairs.places[node.at][0, row]) if node.at in pairs.places else int(node.at.split()[0])
            value[row, at] += change[row, at]
        logits = llama.run(pairs.clean, edits=edits.set(node.site, value), logits="last").logits
        assert logits is not None
        moved = logit_difference(logits[:, 0], targets) - logit_difference(clean[:, 0], targets)
        torch.testing.assert_close(exact, moved.mean(), rtol=1e-4, atol=1e-5, msg=str(node))


def all_nodes(scores: Any) -> list[Node]:
    return [node for node in scores.nodes if scores.scores[scores.number(node)].any()]


@pytest.mark.parametrize("positions", ["all", "each"])
def test_edges_and_the_direct_way_add_up_to_a_node_s_score(
    llama: LanguageModel, dictionaries: list[Dictionary], id_pairs: Pairs, positions: Any
) -> None:
    """The chain rule over all latents and errors downstream of a node, whatever paths there are."""
    pairs = aligned(llama, id_pairs(2, 5))
    scores = latent_attribution(llama, pairs, dictionaries, method="atp", positions=positions, check=0)
    question = replace(
        ask(llama, pairs, list(SITES), "noise", "logit_difference", positions), units=dict.fromkeys(SITES, "latent")
    )
    edges = edge_scores(question, features_of(llama, dictionaries), scores.nodes, batch_rows=1)
    torch.testing.assert_close(edges.sum(1), scores.scores, rtol=1e-4, atol=1e-5)
    number = {site: [i for i, node in enumerate(scores.nodes) if node.site == site] for site in SITES}
    for i, later in enumerate(SITES):
        for earlier in SITES[i:]:  # nothing goes back, nor from a site to itself
            assert not edges[number[earlier]][:, number[later]].any()
    assert edges[number[SITES[0]]][:, number[SITES[1]]].any()
    # attention's output reaches the MLP's, and the stream; the stream of layer 0 the stream of layer 1 past both
    assert edges[number[SITES[1]]][:, number[SITES[2]]].any()
    assert edges[number[SITES[0]]][:, number[SITES[3]]].any()
    assert not edges[number[SITES[0]]][:, -1].any()  # all of the last stream is behind a dictionary
    assert edges[number[SITES[3]]][:, -1].any()


def test_an_edge_is_the_derivative_of_its_end_with_all_between_held(
    llama: LanguageModel, dictionaries: list[Dictionary], id_pairs: Pairs
) -> None:
    pairs = aligned(llama, id_pairs(2, 5))
    scores = latent_attribution(llama, pairs, dictionaries, method="atp", positions="each", check=0)
    question = replace(
        ask(llama, pairs, list(SITES), "noise", "logit_difference", "each"), units=dict.fromkeys(SITES, "latent")
    )
    features = features_of(llama, dictionaries)
    edges = edge_scores(question, features, scores.nodes)
    base, source = (llama.run(t, capture=list(SITES)) for t in (pairs.clean, pairs.corrupt))
    targets = targets_of(pairs, torch.zeros(2, 61))
    whole = llama.run(
        pairs.clean, capture=list(SITES), logits="last", grad=lambda z: logit_difference(z[:, 0], targets)
    )
    strong = edges[:, :-1].abs().sum(-1).flatten().argsort(descending=True).tolist()[:60:4]
    step, seen = 1e-5, 0
    for flat in strong:
        u, v = divmod(flat, len(scores.nodes))
        start, end = scores.nodes[u], scores.nodes[v]
        column = int((start.at or "").split()[0])
        x0, x1 = base[start.site][:, column], source[start.site][:, column]
        unit = F if start.latent is None else start.latent
        move = features[start.site].changes(x0, x1, unit)
        values = []
        for sign in (step, -step):
            held = [edits.set(site, base[site]) for site in SITES[: SITES.index(end.site)] if site != start.site]
            moved = base[start.site].clone()
            moved[:, column] += sign * move
            run = llama.run(pairs.clean, capture=end.site, edits=[*held, edits.set(start.site, moved)], logits=None)
            at = int((end.at or "").split()[0])
            f, error = features[end.site].split(run[end.site][:, at])
            slope = whole.grads[end.site][:, at]
            if end.latent is None:
                values.append((error * slope).sum(-1))
            else:
                values.append(f[:, end.latent] * (slope @ features[end.site].directions[end.latent]))
        expected = (values[0] - values[1]) / (2 * step)
        # norms compute in float32, so a difference of 1e-5 is not known well
        torch.testing.assert_close(edges[u, v].double(), expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))
        seen += float(expected.abs().max()) > 1e-3
    assert seen >= 5


def circuit_of(scores: Any, nodes: list[Node]) -> FeatureCircuit:
    made = tuple(FeatureNode(node, 0.0, (0.0, 0.0)) for node in nodes)
    return FeatureCircuit(made, (), scores, 0.0, 0.0, 0)


@pytest.mark.parametrize("positions", ["all", "each"])
def test_faithfulness_of_everything_is_1_and_of_nothing_0(
    llama: LanguageModel, dictionaries: list[Dictionary], id_pairs: Pairs, positions: Any
) -> None:
    pairs = id_pairs(5, 5) if positions == "each" else id_pairs(5, None)
    scores = latent_attribution(llama, pairs, dictionaries, method="atp", positions=positions, check=0)
    everything = feature_faithfulness(llama, pairs, circuit_of(scores, list(scores.nodes)), dictionaries, draws=0)
    assert everything.value == pytest.approx(1.0, abs=1e-4)
    assert everything.controls[0].value == pytest.approx(0.0, abs=1e-6)
    nothing = feature_faithfulness(llama, pairs, circuit_of(scores, []), dictionaries, draws=2)
    assert nothing.value == pytest.approx(0.0, abs=1e-6)
    assert [control.name for control in nothing.controls] == ["random circuits of as many latents", "the complement"]
    assert nothing.controls[1].value == pytest.approx(1.0, abs=1e-4)
    latents = [node for node in scores.nodes if not node.error]
    kept = feature_faithfulness(llama, pairs, circuit_of(scores, latents), dictionaries, errors="keep", draws=0)
    assert kept.value == pytest.approx(1.0, abs=1e-4)
    removed = feature_faithfulness(llama, pairs, circuit_of(scores, list(scores.nodes)), dictionaries, errors="remove")
    assert abs(removed.value - 1) > 0.01
    assert removed.choices is not None
    assert removed.choices.direction == "complement"
    again = feature_faithfulness(
        llama, pairs, circuit_of(scores, latents[:9]), dictionaries, draws=3, batch_rows=2, seed=1
    )
    whole = feature_faithfulness(llama, pairs, circuit_of(scores, latents[:9]), dictionaries, draws=3, seed=1)
    assert again.value == pytest.approx(whole.value, rel=1e-4)


def test_mean_ablation_by_hand(llama: LanguageModel, dictionaries: list[Dictionary], id_pairs: Pairs) -> None:
    """Position by position, with one forward a prompt and no batch."""
    pairs, one = aligned(llama, id_pairs(3, 5)), dictionaries[:1]
    scores = latent_attribution(llama, pairs, one, method="atp", positions="each", check=0)
    chosen = [Node(SITES[0], latent=3, at=scores.columns[2]), Node(SITES[0], error=True, at=scores.columns[4])]
    found = feature_faithfulness(llama, pairs, circuit_of(scores, chosen), one, draws=0)
    own, site = features_of(llama, one)[SITES[0]], SITES[0]
    x = torch.cat([llama.run(t, capture=site)[site] for t in (pairs.clean, pairs.corrupt)])
    f, e = own.split(x)

    def metric(kept: list[Node] | None) -> Tensor:
        values = []
        for row in range(3):
            tokens = pairs.clean[[row]]
            value = torch.zeros(1, 6, 16).double()
            for p in range(6):
                latents, error = f[:, p].mean(0).clone(), e[:, p].mean(0)
                for node in kept or []:
                    if scores.columns.index(node.at) == p:
                        if node.latent is None:
                            error = e[row, p]
                        else:
                            latents[node.latent] = f[row, p, node.latent]
                value[0, p] = own.dictionary.decode(latents) + error
            put = () if kept is None else edits.set(site, value)
            logits = llama.run(tokens, edits=put, logits="last").logits
            assert logits is not None
            values.append(logits[0, 0, pairs.answer[row]] - logits[0, 0, pairs.wrong[row]])
        return torch.stack(values).mean()

    full, empty, some = metric(None), metric([]), metric(chosen)
    assert found.value == pytest.approx(float((some - empty) / (full - empty)), rel=1e-3, abs=1e-4)


def test_the_graph(llama: LanguageModel, dictionaries: list[Dictionary], id_pairs: Pairs, tmp_path: Path) -> None:
    pairs = id_pairs(4, 6)
    labels = {(SITES[3], i): f"latent {i}" for i in range(F)}
    graph = feature_circuit(
        llama, pairs, dictionaries, method="atp", thresholds=Thresholds(0.02, 0.005, 20), check=12
    ).with_labels(labels)
    assert len(graph.nodes) == 20
    assert graph.left_out > 0
    assert [abs(one.score) for one in graph.nodes] == sorted((abs(one.score) for one in graph.nodes), reverse=True)
    data = json.loads(json.dumps(graph.to_json()))
    assert data["agreement"]["n"] == 12
    assert len(data["edges"]) == len(graph.edges) > 0
    assert any(edge["to"] == "metric" for edge in data["edges"])
    for edge in graph.edges:
        assert abs(edge.weight) > 0.005
        if edge.downstream != METRIC:
            ends = [SITES.index(graph.nodes[i].node.site) for i in (edge.upstream, edge.downstream)]
            assert ends[0] < ends[1]
    assert all(one.label == labels.get((one.node.site, one.node.latent or 0)) for one in graph.nodes if one.node.latent)
    assert "correlation with exact patching" in str(graph)
    check_result(graph, tmp_path)
    assert len(graph.rows()) >= len(graph.edges)
    bare = strongest_nodes(graph.scores, max_nodes=5)
    assert [one.node for one in bare.nodes] == [one.node for one in graph.nodes[:5]] == graph.scores.top(5)
    assert json.loads(json.dumps(bare.to_json(), allow_nan=False))["edge_threshold"] is None
    with pytest.raises(CutawayError, match="no node has a mean score above 1000; the largest is"):
        feature_circuit(llama, pairs, dictionaries, thresholds=Thresholds(1000.0), check=0)


def test_what_is_refused(llama: LanguageModel, dictionaries: list[Dictionary], id_pairs: Pairs) -> None:
    pairs = id_pairs(3, 5)
    writes = (Port("blocks.0.mlp.out", 16),)
    cases = [
        ([], "no dictionary was given"),
        ([dictionaries[0], dictionary(SITES[0], 9)], "two dictionaries read 'blocks.0.resid_post'"),
        (dictionary("blocks.0.mlp.in", 0, writes=writes, subtract_b_dec=False), "is a transcoder"),
        (dictionary(SITES[0], 0, input_norm="unit"), "scales its input token by token"),
        (dictionary("blocks.0.attn.z", 0), "reads 16 numbers of 'blocks.0.attn.z'"),
        (dictionary(SITES[0], 0, model={"id": "other", "weight_hash": "f" * 64}), "belongs to other with weights ffff"),
        (dictionary("blocks.9.resid_post", 0), "layer 9"),
    ]
    for given, sentence in cases:
        with pytest.raises(CutawayError, match=sentence):
            latent_attribution(llama, pairs, given)
    with pytest.raises(NotSupported, match="path='node' is not for them"):
        latent_attribution(llama, pairs, dictionaries, options=GradientOptions(path="node"))
    with pytest.raises(CutawayError, match="kl is zero at the clean prompts"):
        latent_attribution(llama, pairs, dictionaries, method="atp", metric="kl", check=0)
    roles = latent_attribution(llama, pairs, dictionaries, method="atp", positions=["last"], check=0)
    with pytest.raises(CutawayError, match="names roles and says nothing of the other tokens"):
        feature_faithfulness(llama, pairs, circuit_of(roles, []), dictionaries)
    each = latent_attribution(llama, pairs, dictionaries, method="atp", positions="each", check=0)
    with pytest.raises(CutawayError, match="prompts of 6 tokens, these have 8"):
        feature_faithfulness(llama, id_pairs(3, 7), circuit_of(each, []), dictionaries)
    with pytest.raises(CutawayError, match="the circuit is of"):
        feature_faithfulness(llama, pairs, circuit_of(each, []), dictionaries[:2])


def test_shipped_dictionaries_of_atlas(atlas: LanguageModel) -> None:
    prompt = "The capital of the state containing {} is"
    capitals = {"Dallas": "Austin", "Oakland": "Sacramento", "Tampa": "Tallahassee", "Tucson": "Phoenix"}
    pairs = [
        PromptPair(prompt.format(a), prompt.format(b), f" {capitals[a]}", f" {capitals[b]}", {"city": (a, b)})
        for a in capitals
        for b in capitals
        if a != b
    ]
    shipped = [load(f"atlas/blocks.{layer}.resid_post") for layer in (1, 3, 5)]
    graph = feature_circuit(
        atlas,
        pairs,
        shipped,
        positions=["city", "last"],
        thresholds=Thresholds(max_nodes=12),
        options=GradientOptions(5),
    )
    assert graph.agreement is not None
    assert graph.agreement.pearson > 0.8
    assert sum(not one.node.error for one in graph.nodes) >= 8
    assert {one.node.site for one in graph.nodes} == {f"blocks.{layer}.resid_post" for layer in (1, 3, 5)}

"""Attribution patching against finite differences, exact patching and each method's own theory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_models import bent_llama, linear_llama
from result_checks import check_result
from scipy import stats
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.attribution.atp_star import missed_bound
from cutaway.causal.attribution.attribution_patching import METHODS, GradientOptions, attribution_patching
from cutaway.causal.attribution.scores import Agreement, Node, NodeScores, correlation
from cutaway.causal.metrics import logit_difference, targets_of
from cutaway.data.pairs import PromptPair, aligned
from cutaway.model.edits import edits
from cutaway.model.language_model import LanguageModel, attach

Pairs = Callable[..., list[PromptPair]]
ALL = [
    *("embed", "blocks.*.resid_pre", "blocks.*.resid_mid", "blocks.*.resid_post", "blocks.*.attn.out"),
    *("blocks.*.mlp.out", "blocks.*.attn.q", "blocks.*.attn.k", "blocks.*.attn.v", "blocks.*.attn.z"),
    *("blocks.*.mlp.post", "blocks.*.attn.rot_k"),
]


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return bent_llama()


@pytest.fixture(scope="module")
def linear() -> LanguageModel:
    return linear_llama()


def measured(lm: LanguageModel, pairs: Any, direction: str, edit: Any = ()) -> Tensor:
    """The metric [n] of the base run under edits, by one plain run."""
    ready = aligned(lm, pairs)
    base = ready.clean if direction == "noise" else ready.corrupt
    logits = lm.run(base, logits="last", edits=edit).logits
    assert logits is not None
    return logit_difference(logits[:, 0], targets_of(ready, logits[:, 0]))


def patched(lm: LanguageModel, pairs: Any, scores: NodeScores, node: Node, step: float = 1.0) -> Tensor:
    """The metric [n] with a node moved by `step` from its base to its source value, cell by cell, written out."""
    ready = aligned(lm, pairs)
    ends = (ready.clean, ready.corrupt) if scores.direction == "noise" else (ready.corrupt, ready.clean)
    base, source = (lm.run(tokens, capture=node.site)[node.site] for tokens in ends)
    value = base.clone()
    for row in range(len(ready)):
        length = int(ready.clean.lengths[row])
        places = [(i, i) for i in range(length)]
        if node.at is not None and node.at in ready.places:
            clean, corrupt = (int(i) for i in ready.places[node.at][:, row])
            places = [(clean, corrupt) if scores.direction == "noise" else (corrupt, clean)]
        elif node.at is not None:
            places = [(int(node.at.split()[0]),) * 2]
        for to, of in places:
            if node.head is not None:
                at: Any = (row, to, node.head)
                given = source[row, of, node.head]
            elif node.neuron is not None:
                at, given = (row, to, node.neuron), source[row, of, node.neuron]
            else:
                at, given = (row, to), source[row, of]
            value[at] = base[at] + step * (given - base[at])
    return measured(lm, pairs, scores.direction, edits.set(node.site, value))


def differing(scores: NodeScores, per_site: int = 3) -> list[Node]:
    """A few nodes of every site whose score is not 0."""
    found: list[Node] = []
    for site in scores.blocks:
        alive = [node for node in scores.nodes if node.site == site and scores.scores[scores.number(node)].any()]
        found += alive[:: max(1, len(alive) // per_site)][:per_site]
    return found


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("positions", ["all", "each", ["changed", "last"]])
def test_a_score_is_the_derivative_on_the_way_to_the_patch(
    llama: LanguageModel, id_pairs: Pairs, direction: Any, positions: Any
) -> None:
    pairs = id_pairs(3, 6 if positions == "each" else None)
    scores = attribution_patching(llama, pairs, ALL, direction=direction, positions=positions, check=0)
    nodes = differing(scores)
    assert len({node.site for node in nodes}) == len(scores.blocks)
    step = 1e-3
    for node in nodes:
        ahead, behind = (patched(llama, pairs, scores, node, s).double() for s in (step, -step))
        slope = (ahead - behind) / (2 * step)
        found = scores.scores[scores.number(node)]
        torch.testing.assert_close(found.double(), slope, rtol=5e-3, atol=5e-3, msg=f"{node}: {found} {slope}")


@pytest.mark.parametrize("method", METHODS)
def test_in_a_linear_model_every_score_is_exact(linear: LanguageModel, id_pairs: Pairs, method: Any) -> None:
    sites = ["embed", "blocks.*.resid_mid", "blocks.*.attn.out", "blocks.*.attn.v", "blocks.*.attn.z"]
    pairs = id_pairs(4, 6)
    scores = attribution_patching(
        linear, pairs, sites, method=method, positions="each", check=25, options=GradientOptions(2, grad_drop=False)
    )
    assert scores.agreement is not None
    torch.testing.assert_close(scores.agreement.estimated, scores.agreement.exact, rtol=1e-3, atol=1e-4)
    assert scores.agreement.exact.abs().max() > 0.01
    assert scores.agreement.pearson > 0.999999
    for node in differing(scores, 2):
        change = patched(linear, pairs, scores, node) - measured(linear, pairs, "noise")
        torch.testing.assert_close(scores.scores[scores.number(node)], change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "each", ["changed", "last"]])
def test_the_exact_sample_is_patching_node_by_node(llama: LanguageModel, id_pairs: Pairs, positions: Any) -> None:
    pairs = id_pairs(3, 6)
    scores = attribution_patching(llama, pairs, ALL, positions=positions, check=30)
    agreement = scores.agreement
    assert agreement is not None
    assert agreement.n == 30 <= agreement.candidates <= len(scores)
    base = measured(llama, pairs, "noise")
    for node, estimated, exact in zip(agreement.nodes, agreement.estimated, agreement.exact, strict=True):
        change = patched(llama, pairs, scores, node) - base
        torch.testing.assert_close(exact, change.mean(), rtol=1e-4, atol=1e-5, msg=str(node))
        torch.testing.assert_close(estimated, scores.mean[scores.number(node)])
    assert str(agreement) in str(scores)


@pytest.mark.parametrize("positions", ["all", "each", ["changed", "last"]])
def test_integrated_gradients_of_single_nodes_tend_to_exact_patching(
    llama: LanguageModel, id_pairs: Pairs, positions: Any
) -> None:
    pairs = id_pairs(2, 6)
    sites = ["blocks.0.attn.z", "blocks.1.attn.k", "blocks.0.mlp.post", "blocks.0.attn.out"]
    errors = []
    for steps in (2, 60):
        scores = attribution_patching(
            llama,
            pairs,
            sites,
            method="ig",
            positions=positions,
            check=20,
            options=GradientOptions(steps, "node", batch_rows=400),
        )
        assert scores.agreement is not None
        errors.append((scores.agreement.estimated - scores.agreement.exact).abs().max().item())
    assert errors[1] < 0.01 < errors[0]


def test_integrated_gradients_of_a_whole_site_are_complete(llama: LanguageModel, id_pairs: Pairs) -> None:
    """What all heads of a site are given adds up to patching the site; of the stream, to the other run."""
    pairs = id_pairs(3, None)
    sites = ["blocks.0.attn.z", "blocks.1.resid_pre"]
    scores = attribution_patching(
        llama, pairs, sites, method="ig", check=0, options=GradientOptions(80, batch_rows=240)
    )
    base = measured(llama, pairs, "noise")
    heads = scores.blocks["blocks.0.attn.z"].sum((0, 1))
    whole = patched(llama, pairs, scores, Node("blocks.0.attn.z")) - base
    torch.testing.assert_close(heads, whole, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(
        scores.blocks["blocks.1.resid_pre"][0, 0], scores.source - scores.base, rtol=5e-3, atol=5e-3
    )


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_integrated_gradients_along_inputs_sum_to_the_whole_difference(
    llama: LanguageModel, id_pairs: Pairs, direction: Any
) -> None:
    pairs, errors = id_pairs(3, 6), []
    for steps in (4, 300):
        scores = attribution_patching(
            llama, pairs, "embed", method="ig-inputs", positions="each", direction=direction, check=0,
            options=GradientOptions(steps, batch_rows=900),
        )  # fmt: skip
        errors.append((scores.scores.sum(0) - (scores.source - scores.base)).abs().max().item())
    assert errors[1] < 0.01 < errors[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_does_not_matter(llama: LanguageModel, id_pairs: Pairs, method: Any) -> None:
    pairs = id_pairs(5, None)
    one, many = (
        attribution_patching(
            llama,
            pairs,
            ALL,
            method=method,
            positions=["changed", "last"],
            check=0,
            options=GradientOptions(3, batch_rows=b),
        )
        for b in (1, 64)
    )
    torch.testing.assert_close(one.scores, many.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(one.base, many.base) or torch.allclose(one.base, many.base, atol=1e-5)


def test_what_it_returns(llama: LanguageModel, id_pairs: Pairs) -> None:
    pairs = id_pairs(6, 6)
    asking = [parameter.requires_grad for parameter in llama.hf.parameters()]
    scores = attribution_patching(llama, pairs, ["blocks.*.attn.z", "blocks.*.mlp.post", "embed"], check=10)
    assert [parameter.requires_grad for parameter in llama.hf.parameters()] == asking
    assert all(asking)
    assert scores.units == {
        "embed": "site", "blocks.0.attn.z": "head", "blocks.0.mlp.post": "neuron", "blocks.1.attn.z": "head",
        "blocks.1.mlp.post": "neuron",
    }  # fmt: skip
    assert len(scores) == len(scores.nodes) == len(scores.scores) == 1 + 2 * (4 + 6)
    top = scores.top(3)
    assert scores.mean.abs()[scores.number(top[0])] == scores.mean.abs().max()
    effect = scores.effect(top[0]).require_controls()
    low, high = effect.interval or (1, 0)
    assert low <= effect.value <= high
    torch.testing.assert_close(scores.interval(top[:1])[0], torch.tensor([low, high]), rtol=0.2, atol=0.2)
    assert scores.p.numpy() == pytest.approx(stats.ttest_1samp(scores.scores.double(), 0, axis=1)[1], nan_ok=True)
    assert scores.q.numpy() == pytest.approx(stats.false_discovery_control(scores.p.numpy()))
    assert scores.to_json(1)["top"][0]["q"] == scores.q[scores.number(top[0])].item()
    assert effect.choices is not None
    assert effect.choices.to_json() == {
        "granularity": "head and neuron and node", "component": "embed, attn.z, mlp.post",
        "ablation": "resample, estimated by atp", "positions": "all", "direction": "noise",
        "evaluation": "6 prompt pairs",
    }  # fmt: skip
    data = json.loads(json.dumps(scores.to_json(k=5)))
    assert len(data["top"]) == 5
    assert data["agreement"]["n"] == 10
    assert data["top"][0]["site"] == top[0].site
    assert scores.table("blocks.1.attn.z").shape == (1, 4)
    for wrong in (lambda: scores.table("blocks.7.attn.z"), lambda: scores.number(Node("blocks.0.attn.z", head=9))):
        with pytest.raises(CutawayError, match=r"blocks\.[07]\.attn\.z"):
            wrong()


def test_kl_is_refused_where_it_is_flat_and_taken_elsewhere(llama: LanguageModel, id_pairs: Pairs) -> None:
    pairs = id_pairs(3, 6)
    for method in ("atp", "atp*", "relp"):
        with pytest.raises(CutawayError, match=r"kl is zero at the clean prompts.*use logit_difference, or integrated"):
            attribution_patching(llama, pairs, method=method, metric="kl", check=0)
    for options in ({"direction": "denoise"}, {"method": "ig-inputs"}, {"method": "ig"}):
        scores = attribution_patching(llama, pairs, metric="kl", check=0, **options)  # pyright: ignore[reportArgumentType]
        assert scores.mean.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metric": "rank"}, "rank is a count and has no gradient; use logit_difference"),
        ({"metric": lambda logits, _: logits.argmax(-1).float()}, "no gradient in the logits; use logit_difference"),
        ({"sites": "blocks.*.attn.pattern"}, "'blocks.0.attn.pattern' has no nodes to score; take embed"),
        ({"sites": "blocks.0.ln1.normalized"}, "has no nodes to score"),
        ({"sites": "blocks.*.attn.y"}, "There is no site 'blocks.*.attn.y'"),
        ({"sites": []}, "no site was named"),
        ({"positions": ["subject"]}, "no position is named 'subject'; the pairs name changed, last"),
        ({"positions": []}, "no position is named nothing"),
        ({"positions": "each"}, "6 to 9 tokens long"),
        ({"method": "eap"}, "there is no method 'eap'; there are atp"),
        ({"direction": "both"}, "the direction 'both' is not"),
        ({"options": GradientOptions(0), "method": "ig"}, "steps is 0"),
        ({"options": GradientOptions(path="line")}, "path='line' is not"),  # pyright: ignore[reportArgumentType]
        ({"check": -1}, "check is -1"),
    ],
)
def test_bad_input(llama: LanguageModel, id_pairs: Pairs, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CutawayError, match=sentence.replace("*", r"\*").replace("?", r"\?")):
        attribution_patching(llama, id_pairs(4, None), **options)


def test_a_model_in_16_bits_is_told_what_rounding_hides(linear: LanguageModel, id_pairs: Pairs) -> None:
    import copy

    half = attach(copy.deepcopy(linear.hf).bfloat16(), name="half")
    sites, pairs = ["blocks.*.attn.out", "blocks.*.attn.z"], id_pairs(4, 6)
    scores = attribution_patching(half, pairs, sites, positions="each", check=30)
    assert scores.notes == (
        "in bfloat16 the effect of a small node is lost in rounding; load with dtype='float32' to compare such nodes",
    )
    assert scores.notes[0] in str(scores)
    assert scores.agreement is not None
    assert scores.agreement.pearson > 0.99
    whole = attribution_patching(linear, pairs, sites, positions="each", check=0)
    assert whole.notes == ()
    torch.testing.assert_close(scores.mean, whole.mean, rtol=0.1, atol=0.03 * float(whole.mean.abs().max()))


def test_correlations() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([2.0, 3.0, 5.0, 6.0])
    expected = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    assert correlation(a, b) == pytest.approx(expected)
    agreement = Agreement((Node("embed"),) * 4, a, b, 9, "signed")
    assert agreement.pearson == pytest.approx(expected)
    assert agreement.spearman == pytest.approx(1.0)
    assert correlation(a[:2], b[:2]) != correlation(a[:2], b[:2])  # NaN
    assert correlation(a, torch.ones(4)) != correlation(a, torch.ones(4))


def test_scores_are_results(llama: LanguageModel, id_pairs: Pairs, tmp_path: Path) -> None:
    pairs = id_pairs(4, 6)
    scores = attribution_patching(llama, pairs, ["blocks.*.attn.z", "blocks.*.mlp.post"], check=10)
    check_result(scores, tmp_path)
    assert len(scores.rows()) == len(scores)
    assert scores.rows()[0]["site"] == "blocks.0.attn.z"
    assert scores.agreement is not None
    check_result(scores.agreement, tmp_path)
    sizes = attribution_patching(llama, pairs, "blocks.*.attn.z", method="atp*", check=0)
    check_result(sizes, tmp_path)
    check_result(missed_bound(llama, pairs, scores, verified=4, subsets=40), tmp_path)

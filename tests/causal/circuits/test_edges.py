"""Edge scores and circuits against the graph said plainly (`edge_oracle`), in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import edge_oracle
import pytest
import torch
from edge_models import ALL_FAMILIES, FAMILIES, difference, double, pairs_for, repeated_heads, single
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.circuits.gradient_scores import (
    attribute_edges,
    clean_corrupted,
    eap,
    eap_ig,
    position_columns,
    relp,
)
from cutaway.causal.circuits.runs import run_circuits
from cutaway.causal.circuits.scorers import exact, magnitude
from cutaway.causal.edge_graph import EdgeGraph
from cutaway.causal.metrics import Targets
from cutaway.causal.parts import first_column, start_of_stream
from cutaway.data.pairs import AlignedPairs, PromptPair, aligned
from cutaway.model.language_model import LanguageModel

CLOSE = 2e-6  # of the largest; results are kept in fp32


def graph_of(lm: LanguageModel) -> EdgeGraph:
    """Grouped where heads share keys: the oracle knows no other. Elsewhere both are the same."""
    return EdgeGraph.of(lm, grouped=True)


def ablated(lm: LanguageModel, graph: EdgeGraph, pairs: AlignedPairs) -> list[Tensor]:
    with torch.no_grad():
        return edge_oracle.run(lm, graph, pairs.corrupt, None, None)[1]


@contextmanager
def starting_at(lm: LanguageModel, start: Tensor | None) -> Iterator[None]:
    """Every forward inside the block begins with this stream."""

    def hook(_module: Any, args: Any, kwargs: Any) -> Any:
        return ((start, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": start})

    first = lm.family.layers[0].module
    handle = None if start is None else first.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def by_gradient(lm: LanguageModel, graph: EdgeGraph, pairs: AlignedPairs, start: Tensor | None = None) -> Tensor:
    """d metric / d alpha at 0 of every pair [n, F, G], for the clean prompts or another start of the stream.

    The change of a source stays corrupt − clean, wherever the gradient is taken.
    """
    other = ablated(lm, graph, pairs)
    alpha = torch.zeros(graph.shape, dtype=lm.dtype, requires_grad=True)
    with torch.no_grad():
        clean = edge_oracle.run(lm, graph, pairs.clean, None, None)[1]
        with starting_at(lm, start):
            here = edge_oracle.run(lm, graph, pairs.clean, None, None)[1]
    moved = [h + o - c for h, o, c in zip(here, other, clean, strict=True)]
    with starting_at(lm, start):
        logits, _ = edge_oracle.run(lm, graph, pairs.clean, alpha, moved)
    m = difference(logits, pairs)
    rows = [torch.autograd.grad(m[i], alpha, retain_graph=True)[0] for i in range(len(pairs))]
    return torch.stack(rows) * graph.real


def assert_close(found: Tensor, expected: Tensor, close: float = CLOSE) -> None:
    assert found.shape == expected.shape
    error, largest = (found - expected).abs().max(), expected.abs().max()
    assert error <= close * largest, f"off by {error:.1e} where the largest is {largest:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_eap_is_the_gradient_of_the_edge_mask_at_zero(family: str) -> None:
    lm = double(family)
    graph, pairs = graph_of(lm), pairs_for(lm)
    found = eap(lm, pairs, graph=graph)
    assert found.per_pair is not None
    expected = by_gradient(lm, graph, pairs)
    assert_close(found.per_pair, expected)
    assert_close(found.values, expected.mean(0))
    assert not found.values[~graph.real].any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon"])
def test_integrated_gradients_are_the_mean_over_their_points(family: str) -> None:
    lm = double(family)
    graph, pairs = graph_of(lm), pairs_for(lm)
    clean, corrupt = start_of_stream(lm, pairs.clean), start_of_stream(lm, pairs.corrupt)
    expected = torch.stack([by_gradient(lm, graph, pairs, corrupt + k / 3 * (clean - corrupt)) for k in range(3)]).mean(
        0
    )
    found = eap_ig(lm, pairs, steps=3, graph=graph)
    assert found.per_pair is not None
    assert_close(found.per_pair, expected)
    both = torch.stack([by_gradient(lm, graph, pairs, clean), by_gradient(lm, graph, pairs, corrupt)]).mean(0)
    other = clean_corrupted(lm, pairs, graph=graph).per_pair
    assert other is not None
    assert_close(other, both)


@pytest.mark.parametrize("family", FAMILIES)
def test_circuits_run_as_the_graph_says(family: str) -> None:
    lm = double(family)
    graph, pairs = graph_of(lm), pairs_for(lm)
    generator = torch.Generator().manual_seed(1)
    some = [(torch.rand(graph.shape, generator=generator) < q) & graph.real for q in (0.1, 0.3, 0.6, 0.9)]
    masks = torch.stack([graph.empty(), graph.full(), *some])
    other = ablated(lm, graph, pairs)
    with torch.no_grad():
        expected = torch.stack(
            [difference(edge_oracle.run(lm, graph, pairs.clean, (~m).double(), other)[0], pairs) for m in masks]
        )
    found = run_circuits(lm, pairs, masks, graph=graph)
    assert_close(found.values, expected.float())
    assert_close(found.values[0], found.corrupt)  # nothing is patched back: the corrupt prompt's answer
    assert_close(found.values[1], found.clean)  # everything is: the clean one's
    # circuits and pairs do not depend on what else is in their batch
    for tokens in (8, 40):
        assert_close(run_circuits(lm, pairs, masks, graph=graph, batch_tokens=tokens).values, found.values)
    one = run_circuits(lm, pairs, masks[3:4], graph=graph)
    assert_close(one.values[0], found.values[3])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi", "gemma2", "olmo2"])
def test_exact_scores_by_brute_force(family: str) -> None:
    lm = double(family)
    graph, pairs = graph_of(lm), pairs_for(lm, (7, 6))
    other = ablated(lm, graph, pairs)
    found = exact(lm, pairs, graph=graph, batch_tokens=200)
    assert found.per_pair is not None
    expected = torch.zeros(2, *graph.shape)
    with torch.no_grad():
        base = difference(edge_oracle.run(lm, graph, pairs.clean, None, None)[0], pairs)
        for u, v in graph.real.nonzero().tolist()[::2]:
            alpha = torch.zeros(graph.shape, dtype=torch.float64)
            alpha[u, v] = 1
            m = difference(edge_oracle.run(lm, graph, pairs.clean, alpha, other)[0], pairs)
            expected[:, u, v] = (m - base).float()
    measured = expected != 0
    assert measured.sum() > graph.n_edges // 2
    assert_close(torch.where(measured, found.per_pair, 0.0), expected, 1e-5)  # differences of fp32 metrics
    some = graph.mask_of(["L1.mlp->logits", "embed->L2H1.q"])
    few = exact(lm, pairs, graph=graph, edges=some)
    assert_close(few.values[some], found.values[some])
    assert not few.values[~some].any()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shared_keys_are_split_as_in_the_model_that_repeats_them(family: str) -> None:
    lm = double(family)
    big = repeated_heads(lm)
    assert lm.n_kv_heads < lm.n_heads
    pairs, graph = pairs_for(lm), EdgeGraph.of(lm)
    assert graph == EdgeGraph.of(big)
    for scorer in (eap, eap_ig, relp, exact, magnitude):
        assert_close(scorer(lm, pairs).values, scorer(big, pairs).values)
    masks = torch.stack([(torch.rand(graph.shape, generator=torch.Generator().manual_seed(2)) < 0.4) & graph.real])
    for ablation in ("resample", "zero", "mean"):
        ours, theirs = (run_circuits(m, pairs, masks, ablation=ablation) for m in (lm, big))
        assert_close(ours.values, theirs.values)
        assert_close(ours.corrupt, theirs.corrupt)


def test_a_group_is_the_sum_of_its_heads() -> None:
    lm = double("llama")
    pairs, split, grouped = pairs_for(lm), EdgeGraph.of(lm), EdgeGraph.of(lm, grouped=True)
    one, two = eap(lm, pairs, graph=split).values, eap(lm, pairs, graph=grouped).values
    for layer in range(lm.n_layers):
        first, other = split.attention_destinations(layer).start, grouped.attention_destinations(layer).start
        keys = one[:, first + 4 : first + 8].unflatten(1, (2, 2)).sum(-1)
        assert_close(keys, two[:, other + 4 : other + 6])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
@pytest.mark.parametrize("ablation", ["zero", "mean", "mean_by_position"])
def test_other_ablations_replace_every_source(family: str, ablation: str) -> None:
    lm = double(family)
    graph, pairs = graph_of(lm), pairs_for(lm, (7, 7, 7) if ablation == "mean_by_position" else (7, 6, 5))
    with torch.no_grad():
        _, clean = edge_oracle.run(lm, graph, pairs.clean, None, None)
        _, corrupt = edge_oracle.run(lm, graph, pairs.corrupt, None, None)
    here = None if lm.family.pos_embed is None else lm.run(pairs.clean, capture="pos_embed", logits=None)["pos_embed"]
    other = []
    for u, (a, b) in enumerate(zip(clean, corrupt, strict=True)):
        positions = here if u == 0 and here is not None else torch.zeros_like(a)
        both = torch.cat([a - positions, b - positions])
        mask = torch.cat([pairs.clean.mask, pairs.corrupt.mask])
        if ablation == "zero":
            value = torch.zeros_like(a)
        elif ablation == "mean":
            value = both[mask].mean(0).expand_as(a)
        else:
            value = both.mean(0).expand_as(a)
        other.append(value + positions)
    generator = torch.Generator().manual_seed(1)
    masks = torch.stack([graph.empty(), (torch.rand(graph.shape, generator=generator) < 0.5) & graph.real])
    with torch.no_grad():
        expected = torch.stack(
            [difference(edge_oracle.run(lm, graph, pairs.clean, (~m).double(), other)[0], pairs) for m in masks]
        )
    found = run_circuits(lm, pairs, masks, graph=graph, ablation=ablation)
    assert_close(found.values, expected.float())
    assert_close(found.corrupt, expected[0].float())


def test_positions_are_told_apart() -> None:
    lm = double("gpt2")
    pairs = pairs_for(lm, (7, 7, 7))
    names, columns = position_columns(pairs)
    plain, graph = EdgeGraph.of(lm), EdgeGraph.of(lm, columns=names)
    assert graph.n_edges == 7 * plain.n_edges
    found = eap(lm, pairs, graph=graph, columns=columns)
    assert_close(found.values.sum(0), eap(lm, pairs, graph=plain).values)
    alpha = torch.zeros(graph.shape, dtype=torch.float64, requires_grad=True)
    logits, _ = edge_oracle.run(lm, plain, pairs.clean, alpha, ablated(lm, plain, pairs))
    expected = torch.autograd.grad(difference(logits, pairs).mean(), alpha)[0] * plain.real
    assert_close(found.values, expected.float())
    mask = (torch.rand(graph.shape, generator=torch.Generator().manual_seed(3)) < 0.5) & plain.real
    with torch.no_grad():
        want = difference(
            edge_oracle.run(lm, plain, pairs.clean, (~mask).double(), ablated(lm, plain, pairs))[0], pairs
        )
    assert_close(run_circuits(lm, pairs, mask[None], graph=graph, columns=columns).values[0], want.float())


def test_denoising_takes_the_gradient_at_the_corrupt_prompt() -> None:
    lm = double("llama")
    graph, pairs = graph_of(lm), pairs_for(lm)
    found = eap(lm, pairs, graph=graph, direction="denoise")
    turned = AlignedPairs(pairs.pairs, pairs.corrupt, pairs.clean, pairs.answer, pairs.wrong, pairs.places)
    expected = by_gradient(lm, graph, turned)
    assert found.per_pair is not None
    assert_close(found.per_pair, expected)
    assert_close(found.clean, eap(lm, pairs, graph=graph).clean)
    measured = exact(lm, pairs, graph=graph, direction="denoise")
    assert_close(measured.clean, found.clean)
    assert torch.corrcoef(torch.stack([measured.values[graph.real], found.values[graph.real]]))[0, 1] > 0.2


def test_batches_do_not_matter() -> None:
    lm = double("llama")
    pairs = pairs_for(lm, (7, 7, 6, 5, 7, 6))
    whole = eap_ig(lm, pairs, steps=2)
    for tokens in (1, 30):
        assert_close(eap_ig(lm, pairs, steps=2, batch_tokens=tokens).values, whole.values)
    without = eap_ig(lm, pairs, steps=2, keep_pairs=False)
    assert without.per_pair is None
    assert_close(without.values, whole.values)


def test_integrated_gradients_come_nearer_to_exact_with_steps() -> None:
    """On weak weights, where the metric is smooth along the line, for what the embedding's edges do together."""
    lm = double("llama")
    with torch.no_grad():
        for name, parameter in lm.hf.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(0.25)
    graph, pairs = graph_of(lm), pairs_for(lm)
    # all that differs enters by the embedding: summed over its edges, the line integral is their joint effect, exactly
    mask = graph.full()
    mask[0] = False
    whole = run_circuits(lm, pairs, mask[None], graph=graph)
    expected = (whole.values[0] - whole.clean).mean()
    errors = [
        abs(float(eap_ig(lm, pairs, steps=steps, graph=graph).values[0].sum() - expected)) for steps in (1, 4, 64)
    ]
    assert errors[2] < 0.1 * errors[0]
    assert errors[2] < 0.03 * abs(float(expected))


def test_relp_is_the_gradient_where_norms_and_activations_are_linear() -> None:
    """With every norm's denominator held and no MLP, the rules change nothing but that denominator."""
    lm = double("llama")
    pairs = pairs_for(lm)
    values, plain = relp(lm, pairs).values, eap(lm, pairs).values
    assert not torch.allclose(values, plain)
    assert torch.isfinite(values).all()
    fine = double("llama", rms_norm_eps=1e12)  # the denominator is the constant sqrt(eps)
    with torch.no_grad():
        for name, parameter in fine.hf.named_parameters():
            if "norm" in name:
                parameter.mul_(1e6)
            if "down_proj" in name:
                parameter.zero_()
    assert_close(relp(fine, pairs).values, eap(fine, pairs).values)


def test_metrics_without_a_gradient_are_refused() -> None:
    lm = double("llama")
    pairs = pairs_for(lm)
    with pytest.raises(CutawayError, match=r"gradient of kl is zero at the clean prompts.*logit_difference.*eap-ig"):
        eap(lm, pairs, "kl")
    assert eap_ig(lm, pairs, "kl", steps=2).values.any()
    with pytest.raises(CutawayError, match="rank has no gradient"):
        eap(lm, pairs, "rank")

    def broken(logits: Tensor, _: Targets) -> Tensor:
        return logits[:, 0] * float("nan")

    with pytest.raises(CutawayError, match="NaN or infinite"):
        eap(lm, pairs, broken)
    with pytest.raises(CutawayError, match="at least one step"):
        eap_ig(lm, pairs, steps=0)
    with pytest.raises(CutawayError, match="columns="):
        attribute_edges(lm, pairs, graph=EdgeGraph.of(lm, columns=("a",)))
    assert all(parameter.requires_grad for parameter in lm.hf.parameters())


def test_bad_circuits_are_refused() -> None:
    lm = double("llama")
    pairs, graph = pairs_for(lm, (7, 6)), EdgeGraph.of(lm)
    with pytest.raises(CutawayError, match="shape"):
        run_circuits(lm, pairs, graph.full())
    wrong = graph.empty()
    wrong[-1, 0] = True
    with pytest.raises(CutawayError, match=r"L2.mlp->L0H0.q is no edge"):
        run_circuits(lm, pairs, wrong[None])
    with pytest.raises(CutawayError, match="no ablation is called"):
        run_circuits(lm, pairs, graph.full()[None], ablation="swap")
    with pytest.raises(CutawayError, match="mean by position mixes"):
        run_circuits(lm, pairs, graph.full()[None], ablation="mean_by_position")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "mistral", "bloom"])
def test_a_shared_prefix_is_computed_once_and_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs differ from their third token on: the columns before it are taken over, or not at all."""
    lm = double(family)
    graph, pairs = graph_of(lm), pairs_for(lm)
    masks = graph.full()[None] & (torch.rand(graph.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    found = eap_ig(lm, pairs, steps=2, graph=graph).values, run_circuits(lm, pairs, masks, graph=graph).values
    widths: list[int] = []
    hook = lm.family.layers[-1].mlp.register_forward_pre_hook(lambda _m, args: widths.append(args[0].shape[-2]))
    eap(lm, pairs, graph=graph)
    hook.remove()
    assert widths[-1] == 5  # the batch itself, behind what was computed once
    monkeypatch.setattr("cutaway.causal.circuits.edge_gradients.shared_prefix", lambda *_args, **_kwargs: None)
    monkeypatch.setattr("cutaway.causal.circuits.runs.shared_prefix", lambda *_args, **_kwargs: None)
    whole = eap_ig(lm, pairs, steps=2, graph=graph).values, run_circuits(lm, pairs, masks, graph=graph).values
    for one, other in zip(found, whole, strict=True):
        assert_close(one, other)


def test_pairs_that_differ_in_their_first_or_last_token_alone() -> None:
    """Nothing is computed before the first column in which some pair differs, and nothing behind it is left out."""
    lm = double("gpt2")
    last = aligned(lm, [PromptPair((4, 5, 6, 7), (4, 5, 6, 17), 8, 9), PromptPair((3, 5, 6, 7), (3, 5, 6, 8), 18, 19)])
    assert first_column(lm, last) == 3
    either = aligned(
        lm, [PromptPair((4, 5, 6, 7), (4, 5, 6, 17), 8, 9), PromptPair((14, 15, 16), (14, 25, 16), 18, 19)]
    )
    assert first_column(lm, either) == 1
    first = aligned(lm, [PromptPair((4, 5, 6, 7), (14, 5, 6, 7), 8, 9)])
    assert first_column(lm, first) == 0
    graph = graph_of(lm)
    for pairs in (last, first):
        found = eap(lm, pairs, graph=graph).per_pair
        assert found is not None
        assert_close(found, by_gradient(lm, graph, pairs))


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_known_family_or_the_reason(family: str) -> None:
    """EAP and circuits against the graph said plainly; latent attention has no inputs to tell apart.

    In float64 where it runs (not experts, nor xglm's mask): float32 rounds by 2e-5 on some processors.
    """
    lm = single(family)
    if family != "xglm" and not any("experts" in name for name, _ in lm.hf.named_modules()):
        lm = double(family)
    if lm.family.latent:
        with pytest.raises(CutawayError, match="latent attention"):
            EdgeGraph.of(lm)
        return
    graph, pairs = graph_of(lm), pairs_for(lm)
    found = eap(lm, pairs, graph=graph).per_pair
    assert found is not None
    assert_close(found, by_gradient(lm, graph, pairs), 2e-5)
    mask = graph.real & (torch.rand(graph.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    with torch.no_grad():
        logits, _ = edge_oracle.run(lm, graph, pairs.clean, (~mask).to(lm.dtype), ablated(lm, graph, pairs))
    assert_close(run_circuits(lm, pairs, mask[None], graph=graph).values[0], difference(logits, pairs), 2e-5)

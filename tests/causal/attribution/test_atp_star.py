"""AtP*: the QK fix against really patching a query or key and reading the pattern, GradDrop against cut-off writes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attribution_models import linear_llama
from bed import BED, bed_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.attribution.atp_star import Columns, missed_bound
from cutaway.causal.attribution.attribution_patching import GradientOptions, attribution_patching
from cutaway.causal.attribution.scores import Node
from cutaway.causal.metrics import logit_difference, targets_of
from cutaway.data.pairs import PromptPair, aligned
from cutaway.model.edits import edits
from cutaway.model.language_model import LanguageModel, attach

Pairs = Callable[..., list[PromptPair]]

PLAIN = GradientOptions(grad_drop=False)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 3.0, 30.0, 100.0]), st.booleans(), st.booleans())
def test_one_column_s_softmax_in_closed_form(seed: int, scale: float, causal: bool, has_sink: bool) -> None:
    """Every row is computed again for every column, by brute force; saturated rows and rows of one key included."""
    generator = torch.Generator().manual_seed(seed)
    p = 7
    logits = (torch.randn(2, p, p, generator=generator) * scale).double()
    new = (torch.randn(2, p, p, generator=generator) * scale).double()
    slopes = torch.randn(2, p, p, generator=generator).double()
    if causal:
        hidden = torch.ones(p, p).triu(1).bool()
        logits, new = logits.masked_fill(hidden, -torch.inf), new.masked_fill(hidden, -torch.inf)
    sinks = logits.max(-1, keepdim=True).values - 1.0 if has_sink else torch.full((2, p, 1), -torch.inf).double()

    def softmax(x: Tensor) -> Tensor:
        return torch.cat([x, sinks], -1).softmax(-1)[..., :-1]

    before = softmax(logits)
    columns = Columns.of(logits, new, torch.cat([logits, sinks], -1).softmax(-1)[..., -1:])
    effects = columns.effects(slopes)
    for c in range(p):
        one = logits.clone()
        one[..., c] = new[..., c]
        after = softmax(one)
        expected = ((after - before) * slopes).sum(-1)
        torch.testing.assert_close(effects[..., c], expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(columns.after[..., c], after[..., c], rtol=1e-6, atol=1e-9)


FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "falcon_alibi", "gpt_oss", "bloom", "cohere"]


@pytest.fixture(scope="module")
def models() -> Callable[[str], LanguageModel]:
    kept: dict[str, LanguageModel] = {}

    def get(name: str) -> LanguageModel:
        if name not in kept:
            kept[name] = attach(bed_model(name), name=name)
        return kept[name]

    return get


def by_hand(lm: LanguageModel, pairs: list[PromptPair], node: Node, drop: int | None = None) -> Tensor:
    """Patch a query or key head for real, read the pattern of its layer, contract its change with the gradient [n].

    Of any other node, its change times its gradient. With `drop`, what that layer writes is set to what it is, so that
    no gradient goes through it.
    """
    ready = aligned(lm, pairs)
    base, source = ready.clean, ready.corrupt
    inside = node.site.split(".")[-1] in ("q", "k", "rot_q", "rot_k")
    read = f"blocks.{node.site.split('.')[1]}.attn.pattern" if inside else node.site
    held: list[edits.Edit] = []
    if drop is not None:
        writes = [f"blocks.{drop}.{part}.out" for part in ("attn", "mlp")]
        values = lm.run(base, capture=writes)
        held = [edits.set(name, values[name]) for name in writes]

    def judge(logits: Tensor) -> Tensor:
        return logit_difference(logits[:, 0], targets_of(ready, logits[:, 0].detach()))

    run = lm.run(base, capture=[read], edits=held, logits="last", grad=judge)
    where: dict[str, Any] = {} if node.head is None else {"heads": node.head}
    if node.at is not None:
        where["positions"] = int(node.at.split()[0])
    patch = edits.patch(node.site, lm.run(source, capture=node.site), **where)
    after = lm.run(base, capture=read, edits=patch, logits=None)[read]
    if node.site in (f"blocks.{drop}.attn.out", f"blocks.{drop}.mlp.out"):  # what is put there is what it was
        return torch.zeros(len(pairs), dtype=torch.float64)
    return ((after.double() - run[read].double()) * run.grads[read].double()).flatten(1).sum(1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("positions", ["all", "each"])
def test_queries_and_keys_are_followed_through_the_softmax(
    models: Callable[[str], LanguageModel], id_pairs: Pairs, name: str, positions: Any
) -> None:
    lm, pairs = models(name), id_pairs(2, 7)
    sites = [f"blocks.*.attn.{part}" for part in ("q", "k", "rot_q", "rot_k")]
    scores = attribution_patching(lm, pairs, sites, method="atp*", options=PLAIN, positions=positions, check=0)
    heads = {"q": lm.n_heads, "rot_q": lm.n_heads, "k": lm.n_kv_heads, "rot_k": lm.n_kv_heads}
    seen = 0
    for site in scores.blocks:
        alive = [node for node in scores.nodes if node.site == site and scores.scores[scores.number(node)].any()]
        assert scores.blocks[site].shape[1] == heads[site.split(".")[-1]]
        for node in alive[:: max(1, len(alive) // 4)]:
            found, expected = scores.scores[scores.number(node)].double(), by_hand(lm, pairs, node)
            size = float(scores.blocks[site].abs().max())
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4 * size, msg=f"{name} {node}")
            seen += bool(expected.abs().max() > 1e-3 * size)
    assert seen >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BED if name not in FAMILIES])
def test_every_family(name: str, id_pairs: Pairs) -> None:
    """Queries and keys as the attention function receives them, wherever there are any; and GradDrop."""
    lm, pairs = attach(bed_model(name), name=name), id_pairs(2, 7)
    sites = ["blocks.*.attn.rot_q", "blocks.*.attn.rot_k", "blocks.*.attn.z", "blocks.*.mlp.out"]
    for drop in (False, True):
        scores = attribution_patching(
            lm, pairs, sites, method="atp*", options=GradientOptions(grad_drop=drop), positions="each", check=0
        )
        for site in scores.blocks:
            alive = [node for node in scores.nodes if node.site == site and scores.scores[scores.number(node)].any()]
            assert alive, site
            node, size = alive[len(alive) // 2], float(scores.blocks[site].abs().max())
            if drop:
                parts = [by_hand(lm, pairs, node, drop=layer).abs() for layer in range(lm.n_layers)]
                expected = torch.stack(parts).sum(0) / (lm.n_layers - 1)
            else:
                expected = by_hand(lm, pairs, node)
            found = scores.scores[scores.number(node)].double()
            torch.testing.assert_close(found, expected, rtol=5e-3, atol=2e-4 * size, msg=f"{name} {node}")


def test_roles_and_denoising(models: Callable[[str], LanguageModel], id_pairs: Pairs) -> None:
    """The same nodes by role as by number, and denoising is noising of the exchanged pair."""
    lm, pairs = models("llama"), id_pairs(3, 7)
    sites = ["blocks.*.attn.q", "blocks.*.attn.k"]
    each = attribution_patching(lm, pairs, sites, method="atp*", positions="each", check=0)
    role = attribution_patching(lm, pairs, sites, method="atp*", positions=["changed"], check=0)
    places = aligned(lm, pairs).places["changed"][0]
    for site in sites:
        for one in (site.replace("*", "0"), site.replace("*", "2")):
            picked = torch.stack([each.blocks[one][place, :, row] for row, place in enumerate(places.tolist())], -1)
            torch.testing.assert_close(role.blocks[one][0], picked)
    there = attribution_patching(lm, pairs, sites, method="atp*", direction="denoise", positions="each", check=0)
    back = attribution_patching(lm, [pair.swapped() for pair in pairs], sites, method="atp*", positions="each", check=0)
    torch.testing.assert_close(there.scores, back.scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "bloom"])
def test_grad_drop_is_the_mean_over_cut_off_layers(
    models: Callable[[str], LanguageModel], id_pairs: Pairs, name: str
) -> None:
    lm, pairs = models(name), id_pairs(2, 7)
    sites = [
        "embed",
        *(f"blocks.*.{part}" for part in ("attn.q", "attn.k", "attn.z", "attn.out", "mlp.out", "resid_pre")),
    ]
    scores = attribution_patching(lm, pairs, sites, method="atp*", positions="each", check=0)
    assert scores.magnitude
    for site in scores.blocks:
        alive = [node for node in scores.nodes if node.site == site and scores.scores[scores.number(node)].any()]
        for node in alive[:: max(1, len(alive) // 2)][:2]:
            parts = torch.stack([by_hand(lm, pairs, node, drop=layer).abs() for layer in range(lm.n_layers)])
            found = scores.scores[scores.number(node)].double()
            expected = parts.sum(0) / (lm.n_layers - 1)
            size = float(scores.blocks[site].abs().max())
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4 * size, msg=f"{name} {node}")
            if site.split(".")[-1] in ("q", "k", "z", "out"):
                assert not parts[int(site.split(".")[1])].any(), node


def test_cancelling_paths_are_seen_by_grad_drop_alone(id_pairs: Pairs) -> None:
    """A later layer that writes minus what an earlier one wrote: the gradient is 0, what GradDrop sees is not."""
    import copy

    lm = attach(bed_model("gpt2"))
    model = copy.deepcopy(lm.hf)
    with torch.no_grad():
        for layer in range(3):  # no MLP writes anything; attention of layer 2 neither
            model.get_parameter(f"transformer.h.{layer}.mlp.c_proj.weight").zero_()
    lm = attach(model, name="cancelling")
    plain = attribution_patching(lm, id_pairs(3, 7), "blocks.0.attn.out", check=0)
    drop = attribution_patching(lm, id_pairs(3, 7), "blocks.0.attn.out", method="atp*", check=1)
    assert (drop.scores >= 0).all()
    assert drop.agreement is not None
    assert drop.agreement.of == "magnitude"
    assert (drop.agreement.exact >= 0).all()
    assert plain.scores.shape == drop.scores.shape


def test_what_cannot_be_asked(models: Callable[[str], LanguageModel], id_pairs: Pairs) -> None:
    pairs = id_pairs(2, 7)
    moved = [PromptPair(p.clean, p.corrupt, p.answer, p.wrong, {"here": 2}) for p in pairs]
    ready = aligned(models("llama"), moved)
    ready.places["here"][1] += 1  # a text that stands elsewhere in the corrupt prompt
    with pytest.raises(CutawayError, match="different positions of clean and corrupt"):
        attribution_patching(models("llama"), ready, "blocks.0.attn.q", method="atp*", positions=["here"])
    attribution_patching(models("llama"), ready, "blocks.0.attn.z", method="atp*", positions=["here"], check=0)
    with pytest.raises(CutawayError, match=r"norm over all heads.*score 'blocks.0.attn.rot_q'"):
        attribution_patching(models("olmo2"), pairs, "blocks.*.attn.q", method="atp*")
    attribution_patching(models("olmo2"), pairs, "blocks.*.attn.rot_q", method="atp*", check=0)
    shallow = attach(bed_model("gpt2", num_hidden_layers=1))
    with pytest.raises(CutawayError, match=r"GradDrop leaves out one layer at a time.*grad_drop=False"):
        attribution_patching(shallow, pairs, method="atp*")
    attribution_patching(shallow, pairs, method="atp*", options=PLAIN, check=0)


def test_the_bound_holds_and_finds_a_node_that_was_left_out(id_pairs: Pairs) -> None:
    lm, pairs = linear_llama(), id_pairs(3, 7)  # one layer's effects add up, so a node's amid others is its own
    scores = attribution_patching(lm, pairs, "blocks.0.attn.z", positions=["changed", "last"], check=100)
    assert scores.agreement is not None
    exact = dict(zip(scores.agreement.nodes, scores.agreement.exact.tolist(), strict=True))
    order = sorted(exact, key=lambda node: -abs(exact[node]))
    asked: Any = {"positions": ["changed", "last"], "subsets": 300}
    bound = missed_bound(lm, pairs, scores, verified=order[1:4], **asked)
    assert bound.nodes == len(scores) - 3
    assert bound.node == order[0]
    assert bound.value >= abs(exact[order[0]]) * (1 - 1e-5)
    assert bound.estimate == pytest.approx(exact[order[0]], rel=0.2)
    tighter = missed_bound(lm, pairs, scores, verified=4, **asked)
    assert abs(exact[order[4]]) * (1 - 1e-5) <= tighter.value < bound.value
    assert f"{bound.value:.3f}" in str(bound)
    assert bound.to_json()["verified"] == 3
    assert missed_bound(lm, pairs, scores, verified=order[1:4], **asked) == bound
    with pytest.raises(CutawayError, match="every node is verified"):
        missed_bound(lm, pairs, scores, verified=list(scores.nodes), **asked)
    with pytest.raises(CutawayError, match="5 subsets are too few"):
        missed_bound(lm, pairs, scores, subsets=5)
    with pytest.raises(CutawayError, match="other positions"):
        missed_bound(lm, pairs, scores, positions="each")

"""Selectors, transcoders, sites by head and crosscoders, each against hooks made by hand."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from tiny_llama import hooked, putting, tiny_llama
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.harvesting.activations import as_tokens
from cutaway.dictionaries.dictionary import BatchTopK, Dictionary, Gated, JumpReLU, Port, ReLU, TopK
from cutaway.dictionaries.evaluation.evaluate import AFFINE, RANDOM, affine_dictionary, evaluate, measure
from cutaway.dictionaries.ports import harvest_ports
from cutaway.dictionaries.selectors import Selector
from cutaway.model.language_model import LanguageModel


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(1, 50, (12, 12), generator=torch.Generator().manual_seed(1))


def made(
    reads: list[Port],
    writes: list[Port] | None = None,
    selector: Selector | None = None,
    skip: bool = False,
    n: int = 40,
) -> Dictionary:
    """Random weights at some ports."""
    generator = torch.Generator().manual_seed(3)
    d_in = sum(port.width for port in reads)
    d_out = sum(port.width for port in writes or reads)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 4

    return Dictionary(
        W_enc=random(d_in, n),
        b_enc=random(n),
        W_dec=random(n, d_out),
        b_dec=random(d_out),
        selector=selector or TopK(5),
        site=reads[0].site,
        reads=tuple(reads),
        writes=tuple(writes or ()),
        subtract_b_dec=writes is None,
        W_skip=random(d_out, d_in) if skip else None,
    )


def captured(lm: LanguageModel, rows: Tensor, site: str) -> Tensor:
    """[rows, p - 1, width]: position 0 does not count."""
    return lm.run(as_tokens(rows), capture=site)[site][:, 1:].flatten(2)


SELECTORS = [
    ReLU(),
    TopK(5),
    BatchTopK(5, 0.4),
    JumpReLU(torch.linspace(0, 0.8, 40)),
    Gated(torch.linspace(-0.5, 0.5, 40), torch.linspace(-0.2, 0.2, 40)),
]


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.name)
def test_any_selector_is_measured(lm: LanguageModel, rows: Tensor, selector: Selector) -> None:
    """L0 varies by token, and the control has as many active."""
    site = "blocks.1.resid_post"
    dictionary = made([Port(site, 16)], selector=selector)
    x = captured(lm, rows, site).flatten(0, 1)
    a = dictionary.encode(x)
    written = a @ dictionary.W_dec + dictionary.b_dec
    effects = evaluate(lm, dictionary, rows, spliced_rows=0).effects
    assert effects["l0"].value == pytest.approx((a > 0).sum(1).double().mean().item())
    error = (x - written).square().sum() / (x - x.mean(0)).square().sum()
    assert effects["fvu"].value == pytest.approx(error.item(), rel=1e-5)
    assert effects["variance_explained"].value == pytest.approx(1 - error.item(), rel=1e-5)
    assert effects["l0"].controls[0].value == pytest.approx(max(1, effects["l0"].value), abs=1.0)
    assert "kl" not in effects


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_spliced_where_it_writes(lm: LanguageModel, rows: Tensor, skip: bool) -> None:
    source, target = "blocks.1.mlp.in", "blocks.1.mlp.out"
    dictionary = made([Port(source, 16)], [Port(target, 16)], ReLU(), skip)
    x, y = captured(lm, rows, source), captured(lm, rows, target)
    written = dictionary.encode(x) @ dictionary.W_dec + dictionary.b_dec
    if dictionary.W_skip is not None:
        written = written + x @ dictionary.W_skip.T
    mlp = lm.hf.model.layers[1].mlp
    clean, _ = hooked(lm, rows, {}, {})
    spliced, _ = hooked(lm, rows, {mlp: putting(written)}, {})
    zero, _ = hooked(lm, rows, {mlp: putting(torch.zeros_like(y))}, {})
    mean, _ = hooked(lm, rows, {mlp: putting(y.flatten(0, 1).mean(0).expand_as(y))}, {})
    effects = evaluate(lm, dictionary, rows).effects
    assert effects["ce_increase"].value == pytest.approx(spliced - clean, rel=1e-3, abs=1e-5)
    assert effects["ce_recovered_zero"].value == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)
    assert effects["ce_recovered_mean"].value == pytest.approx((mean - spliced) / (mean - clean), rel=1e-3)
    flat, put = y.flatten(0, 1), written.flatten(0, 1)
    assert effects["fvu"].value == pytest.approx(
        ((flat - put).square().sum() / (flat - flat.mean(0)).square().sum()).item(), rel=1e-4
    )
    assert [control.name for control in effects["fvu"].controls] == [RANDOM, AFFINE]


def test_the_affine_control_is_least_squares(lm: LanguageModel, rows: Tensor) -> None:
    dictionary = made([Port("blocks.1.mlp.in", 16)], [Port("blocks.1.mlp.out", 16)])
    values = harvest_ports(lm, dictionary, rows)
    affine = affine_dictionary(dictionary, values.x, values.y)
    design = np.concatenate([values.x.double().numpy(), np.ones((len(values.x), 1))], axis=1)
    expected = design @ np.linalg.lstsq(design, values.y.double().numpy())[0]
    np.testing.assert_allclose(affine(values.x).numpy(), expected, atol=1e-4)
    assert not (affine.encode_sparse(values.x)[0] > 0).any()


def test_heads_are_flattened_and_folded_again(lm: LanguageModel, rows: Tensor) -> None:
    site = "blocks.1.attn.z"
    dictionary = made([Port(site, 16)])
    x = captured(lm, rows, site)
    written = dictionary.encode(x) @ dictionary.W_dec + dictionary.b_dec
    o_proj = lm.hf.model.layers[1].self_attn.o_proj
    clean, _ = hooked(lm, rows, {}, {})
    spliced, _ = hooked(lm, rows, {}, {o_proj: putting(written)})
    effects = evaluate(lm, dictionary, rows).effects
    assert effects["ce_increase"].value == pytest.approx(spliced - clean, rel=1e-3, abs=1e-5)


def test_a_crosscoder_sets_all_its_sites_at_once(lm: LanguageModel, rows: Tensor) -> None:
    sites = ["blocks.0.resid_post", "blocks.1.mlp.out"]
    dictionary = made([Port(site, 16) for site in sites])
    x = torch.cat([captured(lm, rows, site) for site in sites], dim=-1)
    written = dictionary.encode(x) @ dictionary.W_dec + dictionary.b_dec
    modules = [lm.hf.model.layers[0], lm.hf.model.layers[1].mlp]
    put = dict(zip(modules, map(putting, written.split(16, dim=-1)), strict=True))
    clean, _ = hooked(lm, rows, {}, {})
    spliced, _ = hooked(lm, rows, put, {})
    result = evaluate(lm, dictionary, rows)
    assert result.effects["ce_increase"].value == pytest.approx(spliced - clean, rel=1e-3, abs=1e-5)
    assert list(result.parts) == sites
    for site, there, found in zip(sites, x.split(16, dim=-1), written.split(16, dim=-1), strict=True):
        flat = there.flatten(0, 1)
        error = (flat - found.flatten(0, 1)).square().sum() / (flat - flat.mean(0)).square().sum()
        assert result.parts[site]["fvu"].value == pytest.approx(error.item(), rel=1e-4)
        assert "kl" not in result.parts[site]
        result.parts[site]["fvu"].require_controls()


def test_a_crosscoder_of_two_models_is_spliced_into_each(lm: LanguageModel, rows: Tensor) -> None:
    other = tiny_llama(seed=5, name="other")
    site = "blocks.1.resid_post"
    ports = [Port(site, 16, asdict(one.identity())) for one in (lm, other)]
    dictionary = made(ports)
    x = torch.cat([captured(one, rows, site) for one in (lm, other)], dim=-1)
    halves = (dictionary.encode(x) @ dictionary.W_dec + dictionary.b_dec).split(16, dim=-1)
    result = evaluate([other, lm], dictionary, rows)  # found by their weights, not by their place
    rises = []
    for one, half in zip((lm, other), halves, strict=True):
        layer = one.hf.model.layers[1]
        rise = hooked(one, rows, {layer: putting(half)}, {})[0] - hooked(one, rows, {}, {})[0]
        rises.append(rise)
        assert result.parts[f"the logits of {one.name}"]["ce_increase"].value == pytest.approx(rise, rel=1e-3, abs=1e-5)
        assert f"{site} of {one.name}" in result.parts
    assert result.effects["ce_increase"].value == pytest.approx(sum(rises) / 2, rel=1e-3, abs=1e-5)
    with pytest.raises(CutawayError, match="give them all"):
        evaluate(lm, dictionary, rows)
    with pytest.raises(CutawayError, match="not among"):
        evaluate([lm, tiny_llama(seed=6)], dictionary, rows)


def test_high_norms_can_be_left_out(lm: LanguageModel, rows: Tensor) -> None:
    site = "blocks.1.resid_post"
    dictionary = made([Port(site, 16)])
    x = captured(lm, rows, site)
    norms = x.norm(dim=-1)
    values = harvest_ports(lm, dictionary, rows, high_norm=1.2)
    low = norms <= 1.2 * norms.flatten().median()
    assert 0 < values.excluded == int((~low).sum())
    torch.testing.assert_close(values.x, x[low])
    assert torch.equal(values.keep[:, 1:], low)
    assert not values.keep[:, 0].any()
    with pytest.raises(CutawayError, match=r"high_norm is 0\.5"):
        harvest_ports(lm, dictionary, rows, high_norm=0.5)


def test_bad_input_is_named(lm: LanguageModel, rows: Tensor) -> None:
    dictionary = made([Port("blocks.1.resid_post", 16)])
    with pytest.raises(CutawayError, match="nowhere"):
        evaluate(lm, made([Port("blocks.1.nowhere", 16)]), rows)
    with pytest.raises(CutawayError, match=r"needs 12 values"):
        evaluate(lm, made([Port("blocks.1.resid_post", 12)]), rows)
    with pytest.raises(CutawayError, match="differ in more than their seed"):
        measure(lm, [dictionary, made([Port("blocks.0.resid_post", 16)])], rows)
    with pytest.raises(CutawayError, match="no position"):
        evaluate(lm, dictionary, rows[:, :1])
    broken = replace(dictionary)
    with torch.no_grad():
        weight = lm.hf.model.layers[1].mlp.down_proj.weight
        before = weight.clone()
        weight[0, 0] = float("nan")
        try:
            with pytest.raises(CutawayError, match="NaN"):
                evaluate(lm, broken, rows)
        finally:
            weight.copy_(before)

"""RelP's rules against layer-wise relevance propagation written out, and on every family of the test bed."""

from typing import Any

import pytest
import torch
from bed import BED, LAYERS, bed_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cutaway.artifacts.errors import CutawayError
from cutaway.causal.attribution.relp import relp_refusal, relp_rules, share, with_gradient_of
from cutaway.model.language_model import LanguageModel, attach

IDS = torch.tensor([[5, 9, 3, 17, 4, 11], [8, 2, 14, 6, 30, 21]])
MIXTURES = {
    *("deepseek_v2", "deepseek_v3", "deepseek_v3_direct", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss"),
    *("granitemoe", "hunyuan_v1_moe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open"),
}


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 7] - logits[:, -1, 12]


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    """Two layers, no biases, grouped heads, in float64: with all rules it is linear, so relevance is conserved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.dim() == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    return attach(model, name="llama")


@torch.no_grad()
def by_hand(lm: LanguageModel) -> dict[str, Tensor]:
    """Relevance at the sites of the llama above, by LRP-0 from the logits down; the pattern is held fixed.

    A linear map gives z_i = Σ_j x_j W_ji R_i / z_i back, a sum gives each term its share, a product half to each
    factor, an activation and a norm pass relevance on (RMS norm's gain and scale multiply one entry by a number).
    """
    sites = [f"blocks.{layer}.{part}" for layer in range(2) for part in PARTS]
    run = lm.run(IDS, capture=["embed", *sites, "ln_final.normalized"])
    layers: Any = lm.hf.get_submodule("model.layers")

    def linear(x: Tensor, w: Tensor, relevance: Tensor) -> Tensor:  # y = x @ w.T
        return x * ((relevance / (x @ w.T)) @ w)

    relevance: dict[str, Tensor] = {}
    normalized = run["ln_final.normalized"][:, -1].double()
    head = lm.hf.get_parameter("lm_head.weight")
    # the two logits that are compared, one of them with its sign turned
    w = torch.stack([head[7], -head[12]]) * lm.hf.get_parameter("model.norm.weight")
    stream = torch.zeros_like(run["embed"])
    stream[:, -1] = linear(normalized, w, normalized @ w.T)
    for layer in (1, 0):
        site = {part: run[f"blocks.{layer}.{part}"] for part in PARTS}
        module = layers[layer]

        def put(part: str, value: Tensor, layer: int = layer) -> None:
            relevance[f"blocks.{layer}.{part}"] = value

        put("resid_post", stream)
        out = stream * site["mlp.out"] / site["resid_post"]
        put("mlp.out", out)
        post = linear(site["mlp.post"], module.mlp.down_proj.weight, out)
        put("mlp.post", post)
        into = linear(site["mlp.in"], module.mlp.gate_proj.weight, post / 2)
        into = into + linear(site["mlp.in"], module.mlp.up_proj.weight, post / 2)
        stream = stream * site["resid_mid"] / site["resid_post"] + into
        put("resid_mid", stream)
        out = stream * site["attn.out"] / site["resid_mid"]
        put("attn.out", out)
        z = linear(site["attn.z"].flatten(-2), module.self_attn.o_proj.weight, out).unflatten(-1, (4, -1))
        put("attn.z", z)
        v = site["attn.v"].repeat_interleave(2, 2)  # [b, k, H, h]
        back = torch.einsum("bhqk,bqhe->bkhe", site["attn.pattern"], z / site["attn.z"]) * v
        back = back.unflatten(2, (2, 2)).sum(3)
        put("attn.v", back)
        into = linear(site["attn.in"], module.self_attn.v_proj.weight, back.flatten(-2))
        stream = stream * site["resid_pre"] / site["resid_mid"] + into
        put("resid_pre", stream)
    relevance["embed"] = stream
    return relevance


PARTS = (
    *("resid_pre", "attn.in", "attn.v", "attn.pattern", "attn.z", "attn.out"),
    *("resid_mid", "mlp.in", "mlp.post", "mlp.out", "resid_post"),
)


def test_gradient_times_value_is_relevance_written_out(llama: LanguageModel) -> None:
    expected = by_hand(llama)
    with relp_rules(llama, attention="detach"):
        run = llama.run(IDS, capture=list(expected), grad=difference)
    for site, relevance in expected.items():  # Llama's norms compute in float32 even here
        found = run[site] * run.grads[site]
        scale = float(relevance.abs().max())
        torch.testing.assert_close(found, relevance, rtol=1e-5, atol=1e-7 * scale, msg=site)


def test_relevance_is_conserved_only_with_every_rule(llama: LanguageModel) -> None:
    run = llama.run(IDS, capture=["embed"], grad=difference)
    assert run.logits is not None
    wanted = difference(run.logits)

    def total(run: Any) -> Tensor:
        return (run["embed"] * run.grads["embed"]).sum((1, 2))

    with relp_rules(llama, attention="detach"):
        held = llama.run(IDS, capture=["embed"], grad=difference)
    torch.testing.assert_close(total(held), wanted)
    with relp_rules(llama):
        bent = llama.run(IDS, capture=["embed"], grad=difference)
    for other in (run, bent):
        assert (total(other) - wanted).abs().min() > 1e-3


def _seen(lm: LanguageModel, layer: int) -> list[tuple[str, nn.Module]]:
    here = lm.family.layers[layer]
    norms = {name: getattr(here, name) for name in ("ln1", "ln2", "ln1_post", "ln2_post")}
    found = [(name, norm.module) for name, norm in norms.items() if norm is not None]
    return found + [(name, m) for name in ("q_norm", "k_norm") if (m := getattr(here, name)) is not None]


@pytest.mark.parametrize("name", [name for name in BED if name not in MIXTURES])
@pytest.mark.parametrize("attention", ["gradient", "detach"])
def test_values_stay_and_norms_and_products_conserve(name: str, attention: Any) -> None:
    """On every family, for each norm: x · dy/dx·u = (y - y(0)) · u, which without the rule would be 0."""
    lm = attach(bed_model(name))
    plain = lm.run(IDS).logits
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    layer = LAYERS - 1
    parts = _seen(lm, layer)

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = (args[0], output)

        return hook

    with relp_rules(lm, attention=attention):
        handles = [module.register_forward_hook(note(part)) for part, module in parts]
        sites = [s for s in ("mlp.pre", "mlp.pre_linear", "mlp.post") if f"blocks.{layer}.{s}" in _present(lm)]
        with torch.enable_grad():
            run = lm.run(IDS, capture=[f"blocks.{layer}.{s}" for s in sites], grad=difference)
        for handle in handles:
            handle.remove()
        assert torch.equal(run.logits, plain)  # pyright: ignore[reportArgumentType]
        for part, module in parts:
            x = seen[part][0].detach().clone().requires_grad_()
            with torch.enable_grad():
                y = module(x)
            (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
            with torch.no_grad():
                zero = module(torch.zeros_like(x))
            at = f"{name} {part}"
            torch.testing.assert_close((x * g).sum(), (y - zero).sum(), rtol=1e-3, atol=1e-2, msg=at)
            assert float((y - zero).abs().sum()) > 1
    assert torch.equal(lm.run(IDS).logits, plain)  # pyright: ignore[reportArgumentType]
    pre, *more, post = (run[f"blocks.{layer}.{s}"] * run.grads[f"blocks.{layer}.{s}"] for s in sites)
    torch.testing.assert_close(pre + sum(more, torch.zeros_like(pre)), post, rtol=1e-4, atol=1e-5)
    assert post.abs().max() > 1e-4
    for other in more:
        torch.testing.assert_close(pre, other, rtol=1e-4, atol=1e-5)


def _present(lm: LanguageModel) -> set[str]:
    return {site.name for site in lm.sites() if site.absent is None}


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gpt_neox", "bloom", "codegen"])
def test_detach_leaves_no_gradient_at_queries_and_keys(name: str) -> None:
    lm = attach(bed_model(name))
    sites = [f"blocks.1.attn.{part}" for part in ("q", "k", "v")]
    with relp_rules(lm, attention="detach"):
        run = lm.run(IDS, capture=sites, grad=difference)
    q, k, v = (run.grads[site].abs().max() for site in sites)
    assert q == k == 0
    assert v > 0
    with relp_rules(lm):
        run = lm.run(IDS, capture=sites, grad=difference)
    assert all(run.grads[site].abs().max() > 0 for site in sites)


def test_the_rules_end_with_the_block_even_after_an_error(llama: LanguageModel) -> None:
    before = llama.run(IDS, capture=["embed"], grad=difference).grads["embed"]
    with relp_rules(llama):
        inside = llama.run(IDS, capture=["embed"], grad=difference).grads["embed"]

    def fails() -> None:
        with relp_rules(llama):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    after = llama.run(IDS, capture=["embed"], grad=difference).grads["embed"]
    assert torch.equal(before, after)
    assert not torch.allclose(before, inside)


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_mixtures_of_experts_are_refused(name: str) -> None:
    lm = attach(bed_model(name))
    assert "experts" in (relp_refusal(lm) or "")
    with pytest.raises(CutawayError, match="mixtures of experts"), relp_rules(lm):
        pass


def test_small_things() -> None:
    value, surrogate = torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.2], requires_grad=True)
    y = with_gradient_of(value, surrogate * 5)
    assert torch.equal(y, value)
    (g,) = torch.autograd.grad(y.sum(), surrogate)
    assert torch.equal(g, torch.full((2,), 5.0))
    assert torch.equal(share(torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0.0, 4.0, 0.0])), torch.tensor([0, 0.5, 0]))

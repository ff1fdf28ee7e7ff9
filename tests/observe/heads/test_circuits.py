"""Circuits from their factors against the matrices formed, and against what the running model computes."""

import copy
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel, attach
from cutaway.observe.heads.circuits import (
    Factored,
    circuit_tokens,
    composition,
    composition_scores,
    copying_scores,
    output_map,
    ov_circuit,
    qk_circuit,
    qk_ignores,
)
from cutaway.observe.heads.report import Head


@pytest.fixture(scope="module")
def wide(tiny: LanguageModel) -> LanguageModel:
    """The tiny model in float64, without the biases that a circuit leaves out."""
    model = copy.deepcopy(tiny.hf).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
    return attach(model, name=tiny.name)


# Factored products --------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(m=st.integers(1, 9), r=st.integers(1, 12), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_factored_product_is_the_matrix(m: int, r: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, m, r), (1, r, n)))
    factored, matrix = Factored(left, right), (left @ right).numpy()
    assert factored.shape == matrix.shape
    np.testing.assert_allclose(factored.product(), matrix, atol=1e-12)
    np.testing.assert_allclose(factored.norm(), np.linalg.norm(matrix, axis=(1, 2)), rtol=1e-10)
    k = min(m, n, r)
    found = factored.singular_values()[..., :k]
    np.testing.assert_allclose(found, np.linalg.svd(matrix, compute_uv=False)[..., :k], rtol=1e-8, atol=1e-10)
    u, s, vh = factored.svd()
    np.testing.assert_allclose((u * s[..., None, :]) @ vh, matrix, atol=1e-10)
    np.testing.assert_allclose(factored.T.product(), np.swapaxes(matrix, 1, 2), atol=1e-12)
    np.testing.assert_allclose(factored[1].product(), matrix[1], atol=1e-12)
    other = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    np.testing.assert_allclose((factored @ other).product(), matrix @ other.numpy(), atol=1e-10)
    before = torch.randn(3, m, generator=generator, dtype=torch.float64)
    np.testing.assert_allclose((factored.__rmatmul__(before)).product(), before.numpy() @ matrix, atol=1e-10)
    thin = Factored(torch.ones(n, 1).double(), torch.arange(5.0).double()[None])
    product = factored @ thin
    assert product.rank == min(r, 1)
    np.testing.assert_allclose(product.product(), matrix @ thin.product().numpy(), atol=1e-10)
    if m == n:
        values = factored.eigenvalues()
        for power in (1, 2, 3):  # power sums fix the eigenvalues that are not 0
            expected = np.trace(np.linalg.matrix_power(matrix, power), axis1=1, axis2=2)
            np.testing.assert_allclose((values**power).sum(-1).real, expected, rtol=1e-6, atol=1e-8)
    else:
        with pytest.raises(CutawayError, match="square"):
            factored.eigenvalues()


def test_factors_that_do_not_meet() -> None:
    with pytest.raises(CutawayError, match="Factors"):
        Factored(torch.ones(3, 2), torch.ones(3, 2))


# Against the running model ------------------------------------------------------------------------------------------


def test_qk_is_what_queries_and_keys_make(wide: LanguageModel) -> None:
    """Before rotary, q·k of the model is x_i QK x_j over both divisors; grouped keys included."""
    ids = torch.arange(5, 17)[None]
    layer = 1
    sites = [f"blocks.{layer}.{s}" for s in ("resid_pre", "ln1.scale", "attn.q", "attn.k")]
    run = wide.run(ids, capture=sites, logits=None)
    x = run[sites[0]][0] / run[sites[1]][0]
    circuit = qk_circuit(wide, layer)
    group = wide.n_heads // wide.n_kv_heads
    for head in range(wide.n_heads):
        expected = run[sites[2]][0, :, head] @ run[sites[3]][0, :, head // group].T
        torch.testing.assert_close(x @ circuit[head].product() @ x.T, expected, rtol=1e-6, atol=1e-6)


def test_ov_is_what_attending_writes(wide: LanguageModel) -> None:
    """With every head forced to attend to one token, attention writes the sum of that token's OV."""
    ids, layer, source = torch.arange(5, 17)[None], 2, 3
    pattern = torch.zeros(wide.n_heads, ids.shape[1], dtype=torch.float64)
    pattern[:, source] = 1.0
    names = ["resid_pre", "ln1.scale", "attn.out"]
    post = wide.sites()[f"blocks.{layer}.ln1_post.scale"] if _has(wide, layer) else None
    sites = [f"blocks.{layer}.{s}" for s in names] + ([post.name] if post else [])
    run = wide.run(ids, capture=sites, edits=cutaway.set(f"blocks.{layer}.attn.pattern", pattern), logits=None)
    x = run[sites[0]][0, source] / run[sites[1]][0, source]
    written = run[sites[2]][0, -1] * (run[post.name][0, -1] if post else 1.0)
    ov = ov_circuit(wide, layer)
    torch.testing.assert_close((x @ ov.product()).sum(0), written, rtol=1e-6, atol=1e-6)
    raw = ov_circuit(wide, layer, norms=False)
    group = wide.n_heads // wide.n_kv_heads
    for head in range(wide.n_heads):
        torch.testing.assert_close(
            raw[head].product(), wide.w_v(layer)[head // group].double() @ wide.w_o(layer)[head].double()
        )


def _has(lm: LanguageModel, layer: int) -> bool:
    return f"blocks.{layer}.ln1_post.scale" in lm.sites().present()


# Eigenvalues, composition, tokens ------------------------------------------------------------------------------------


def _gains(lm: LanguageModel, norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """A norm's centring and gain as [d, d] matrices, from the module's output on the unit vectors."""
    d = lm.d_model
    center = np.eye(d) - 1.0 / d if "LayerNorm" in type(norm).__name__ else np.eye(d)
    weight = norm.weight.detach().numpy()
    return center, np.diag(1 + weight if "Gemma" in type(norm).__name__ else weight)


def _norms(lm: LanguageModel, layer: int) -> tuple[Any, Any]:
    hf: Any = lm.hf
    if lm.family.model_type == "gpt2":
        return hf.transformer.h[layer].ln_1, hf.transformer.ln_f
    if lm.family.model_type == "gpt_neox":
        return hf.gpt_neox.layers[layer].input_layernorm, hf.gpt_neox.final_layer_norm
    return hf.model.layers[layer].input_layernorm, hf.model.norm


def _full_ov(lm: LanguageModel, head: Head) -> np.ndarray:
    """The [V, V] circuit formed: E, centring and gain, W_V W_O, (post-norm gain,) centring and gain, U^T."""
    layer, index = head
    hf: Any = lm.hf
    embedding = hf.get_input_embeddings().weight.detach().numpy()
    unembedding = hf.get_output_embeddings().weight.detach().numpy()
    first, final = (_gains(lm, norm) for norm in _norms(lm, layer))
    w_v = lm.w_v(layer)[index // (lm.n_heads // lm.n_kv_heads)].numpy()
    w_o = lm.w_o(layer)[index].numpy()
    if _has(lm, layer):
        w_o = w_o @ _gains(lm, hf.model.layers[layer].post_attention_layernorm)[1]
    return embedding @ first[0] @ first[1] @ w_v @ w_o @ final[0] @ final[1] @ unembedding.T


def test_copying_is_the_balance_of_the_formed_circuits_eigenvalues(wide: LanguageModel) -> None:
    found = copying_scores(wide, draws=4)
    for layer in range(wide.n_layers):
        for head in range(wide.n_heads):
            values = np.linalg.eigvals(_full_ov(wide, (layer, head)))
            assert found.score[layer, head].item() == pytest.approx(values.sum().real / abs(values).sum(), abs=1e-6)
    assert found.chance_interval[0] <= found.chance <= found.chance_interval[1]


def test_a_head_that_writes_what_it_reads_copies(llama: LanguageModel) -> None:
    """W_O = W_V^T is positive; the token's own embedding is what raises it. Its negative suppresses."""
    model: Any = copy.deepcopy(llama.hf)
    h = llama.d_head
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        for norm in (model.model.layers[1].input_layernorm, model.model.norm):
            norm.weight.fill_(1.0)
        attention = model.model.layers[1].self_attn
        attention.o_proj.weight[:, :h] = attention.v_proj.weight[:h].T
        attention.o_proj.weight[:, h : 2 * h] = -attention.v_proj.weight[:h].T
    score = copying_scores(attach(model), draws=2).score
    assert score[1, 0].item() == pytest.approx(1.0, abs=1e-6)
    assert score[1, 1].item() == pytest.approx(-1.0, abs=1e-6)


def test_composition_is_the_norm_of_formed_products(wide: LanguageModel) -> None:
    found = composition(wide, draws=32)
    ov = [ov_circuit(wide, layer).product() for layer in range(wide.n_layers)]
    qk = [qk_circuit(wide, layer).product() for layer in range(wide.n_layers)]

    def score(a: Tensor, b: Tensor) -> float:
        return (torch.linalg.norm(a @ b) / torch.linalg.norm(a) / torch.linalg.norm(b)).item()

    for a, b in ((0, 1), (0, 2), (1, 2)):
        for i in range(wide.n_heads):
            for j in range(wide.n_heads):
                expected = {
                    "q": score(ov[a][i], qk[b][j]),
                    "k": score(qk[b][j], ov[a][i].T),
                    "v": score(ov[a][i], ov[b][j]),
                }
                for kind, value in expected.items():
                    assert getattr(found, kind)[a, i, b, j].item() == pytest.approx(value, rel=1e-8), kind
                    assert found.above(kind)[a, i, b, j].item() == pytest.approx(value - found.baseline, rel=1e-8)
    assert bool(found.v[1, :, 1, :].isnan().all())
    assert bool(found.v[2, :, 0, :].isnan().all())
    (writer, reader, best), *_ = found.top("k", 3)
    assert best == pytest.approx(found.k[writer + reader].item())  # pyright: ignore[reportOptionalSubscript]
    assert writer[0] < reader[0]
    assert "random heads" in str(found)
    with pytest.raises(CutawayError, match="no composition"):
        found.top("z")


def test_the_baseline_is_what_random_heads_score(wide: LanguageModel) -> None:
    found = composition(wide, draws=200)
    generator = torch.Generator().manual_seed(7)
    d, h = wide.d_model, wide.d_head
    first, second = (
        Factored(torch.randn(20, d, h, generator=generator), torch.randn(20, h, d, generator=generator))
        for _ in range(2)
    )
    scores = composition_scores(first, second)
    low, high = found.baseline_interval
    assert ((scores >= low) & (scores <= high)).double().mean().item() > 0.85
    assert scores.mean().item() == pytest.approx(found.baseline, rel=0.03)


def test_circuit_tokens_are_the_largest_cells(wide: LanguageModel) -> None:
    layer, index = head = (1, 2)
    hf: Any = wide.hf
    matrix = _full_ov(wide, head)
    with torch.no_grad():
        embedded = hf.get_input_embeddings()(torch.arange(wide.d_vocab)).numpy()  # a family's scale included
    norm = _norms(wide, layer)[0]
    centred = embedded @ _gains(wide, norm)[0]
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
    divisor = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    scale = embedded[5, 0] / hf.get_input_embeddings().weight[5, 0].item()
    matrix = matrix * scale / divisor
    matrix -= matrix.mean(-1, keepdims=True)
    found = circuit_tokens(wide, head, "ov", k=4, chunk=10)
    order = np.argsort(-matrix, axis=None)[:4]
    assert [pair.value for pair in found] == pytest.approx(matrix.flat[order].tolist(), rel=1e-6)
    names = [(wide.token_strings([i // wide.d_vocab])[0], wide.token_strings([i % wide.d_vocab])[0]) for i in order]
    assert [(pair.source, pair.target) for pair in found] == names
    rows = circuit_tokens(wide, head, "ov", [7, 3], k=2, chunk=1)
    expected = [v for i in (7, 3) for v in sorted(matrix[i], reverse=True)[:2]]
    assert [pair.value for pair in rows] == pytest.approx(expected, rel=1e-6)
    x = centred / divisor
    qk = x @ qk_circuit(wide, layer)[index].product().numpy() @ x.T
    qk -= qk.mean(-1, keepdims=True)
    found = circuit_tokens(wide, head, "qk", k=3, chunk=33)
    assert [pair.value for pair in found] == pytest.approx(sorted(qk.flat, reverse=True)[:3], rel=1e-6)


def test_bad_input_is_one_sentence(llama: LanguageModel) -> None:
    with pytest.raises(CutawayError, match="no layer 9"):
        ov_circuit(llama, 9)
    with pytest.raises(CutawayError, match="no head L0H77"):
        circuit_tokens(llama, (0, 77), "ov")
    with pytest.raises(CutawayError, match="'qk' or 'ov'"):
        circuit_tokens(llama, (0, 0), "vo")  # type: ignore[arg-type]


def test_qk_norm_is_refused_or_said() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    lm = attach(
        Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=0, pad_token_id=1,
            )
        ).eval()
    )  # fmt: skip
    with pytest.raises(CutawayError, match="QK-norm"):
        qk_circuit(lm, 0)
    assert qk_circuit(lm, 0, raw=True).shape == (4, 32, 32)
    found = composition(lm, draws=2)
    assert set(found.left_out) == {"q", "k"}
    assert "not measured" in str(found)
    assert "q" not in found.to_json()["top"]
    with pytest.raises(CutawayError, match="Q-composition"):
        found.top("q")
    assert composition(lm, draws=2, raw=True).q is not None
    assert qk_ignores(lm)[0] == "QK-norm"


def test_what_a_qk_circuit_leaves_out_is_said(tiny: LanguageModel) -> None:
    assert any("position" in word for word in qk_ignores(tiny)) == (tiny.family.model_type != "gpt2")


def test_output_map_gives_direct_effects(wide: LanguageModel) -> None:
    """attn.result through the map equals its share of the logits, up to the divisors (Gemma 2's softcap aside)."""
    layer, hf = wide.n_layers - 1, cast(Any, wide.hf)
    run = wide.run(torch.arange(5, 15)[None], capture=[f"blocks.{layer}.attn.z", f"blocks.{layer}.attn.result"])
    z, result = run[f"blocks.{layer}.attn.z"][0, -1], run[f"blocks.{layer}.attn.result"][0, -1]
    mapped = torch.einsum("hc,hcd->hd", z, output_map(wide, layer))
    if _has(wide, layer):
        result = result.numpy() @ _gains(wide, hf.model.layers[layer].post_attention_layernorm)[1]
    final = _gains(wide, _norms(wide, layer)[1])
    np.testing.assert_allclose(mapped, np.asarray(result) @ final[0] @ final[1], rtol=1e-6, atol=1e-8)


def test_atlas_previous_token_heads_feed_the_induction_head(atlas: LanguageModel) -> None:
    """K-composition finds the pair by weights alone: L3H7 and L5H2 (previous token) into L7H3 (induction)."""
    found = composition(atlas)
    pairs = {(writer, reader) for writer, reader, _ in found.top("k", 4)}
    assert {((3, 7), (7, 3)), ((5, 2), (7, 3))} <= pairs
    assert found.top("k", 1)[0][2] > 2 * found.baseline_interval[1]
    assert copying_scores(atlas).score[7, 3] > copying_scores(atlas).chance_interval[1]

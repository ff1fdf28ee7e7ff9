"""Formats: what we read computes what the format's own equations say, and so does what we write."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from format_oracles import FORWARD
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import cutaway.dictionaries
from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import (
    BatchTopK,
    Dictionary,
    Gated,
    JumpReLU,
    Port,
    ReLU,
    TopK,
    log_sparsity,
)
from cutaway.dictionaries.formats.files import Format, load, load_all, read, save, save_all

D, F = 6, 20
MODEL = {"id": "tiny", "revision": None, "weight_hash": "abc"}
WRITTEN: list[Format] = [
    "saelens",
    "saelens-5",
    "saelens-training",
    "sparsify",
    "dictionary_learning",
    "gemma-scope",
    "gemma-scope-2",
    "circuit-tracer",
]


class Draw:
    """Random float64 tensors."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def some_x(width: int = D, seed: int = 7) -> Tensor:
    return 2 * Draw(seed)(40, width) + 1


def agrees(dictionary: Dictionary, x: Tensor, a: Tensor, y: Tensor) -> None:
    assert dictionary.W_enc.dtype == torch.float64
    assert 0 < (a > 0).double().mean() < 0.9  # the selector has something to do
    torch.testing.assert_close(dictionary.encode(x), a, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dictionary(x), y, rtol=1e-9, atol=1e-9)


# reading


def saelens_files(folder: Path, architecture: str, norm: str, *, apply_b_dec: bool, rescale: bool, seed: int) -> None:
    """A folder as SAELens would leave it, with random weights."""
    draw = Draw(seed)
    transcoder = "transcoder" in architecture
    out = D + 1 if transcoder else D
    t = {"W_enc": draw(D, F), "W_dec": draw(F, out), "b_dec": draw(out), "b_enc": draw(F) - 1}
    cfg: dict[str, Any] = {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float64", "device": "cpu",
        "apply_b_dec_to_input": apply_b_dec and not transcoder, "normalize_activations": norm,
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.0", "model_name": "gpt2", "hook_name": "blocks.5.hook_resid_pre"},
    }  # fmt: skip
    if architecture == "gated":
        t |= {"b_gate": t.pop("b_enc"), "b_mag": draw(F), "r_mag": draw(F) * 0.3}
    if architecture == "topk":
        cfg |= {"k": 4, "rescale_acts_by_decoder_norm": rescale}
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        cfg |= {"k": 4.0, "rescale_acts_by_decoder_norm": rescale}
        t["topk_threshold"] = torch.tensor(1.3, dtype=torch.float64)
    if architecture.startswith("jumprelu"):
        t["threshold"] = draw(F).abs()
    if transcoder:
        cfg |= {"d_out": out}
        cfg["metadata"]["hook_name_out"] = "blocks.5.hook_mlp_out"
    if "skip" in architecture:
        t["W_skip"] = draw(out, D)
    folder.mkdir(parents=True)
    if norm in ("expected_average_only_in", "covariance_whitening"):
        white = norm == "covariance_whitening"
        scale = None if white and seed % 2 else 0.37
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale, "has_whitening": white}))
        if white:
            matrix = draw(D, D)
            inverse = torch.linalg.inv(matrix).contiguous()
            whitening = {"mean": draw(D), "matrix": matrix, "inverse_matrix": inverse}
            save_file(whitening, folder / "activation_whitening.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(t, folder / "sae_weights.safetensors")


SAE_NORMS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening"]


@pytest.mark.parametrize("norm", SAE_NORMS)
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"])
def test_saelens_is_read_as_it_computes(tmp_path: Path, architecture: str, norm: str) -> None:
    rescaled = (False, True) if "topk" in architecture else (False,)
    for seed, (apply_b_dec, rescale) in enumerate(itertools.product((False, True), rescaled)):
        folder = tmp_path / str(seed)
        saelens_files(folder, architecture, norm, apply_b_dec=apply_b_dec, rescale=rescale, seed=seed)
        x = some_x()
        reading = read(folder)
        agrees(reading.dictionary, x, *FORWARD["saelens"](folder, x))
        assert reading.dictionary.site == "blocks.5.resid_pre"
        assert reading.dictionary.input_norm == {"layer_norm": "layer_norm", "constant_norm_rescale": "unit"}.get(norm)
        assert bool(reading.folds) == (rescale or norm in ("expected_average_only_in", "covariance_whitening"))


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_saelens_transcoders_are_read_as_they_compute(tmp_path: Path, architecture: str, norm: str) -> None:
    folder = tmp_path / "t"
    saelens_files(folder, architecture, norm, apply_b_dec=False, rescale=False, seed=3)
    if "skip" in architecture and norm != "none":  # x is normalised for the encoder and not for the skip
        with pytest.raises(CutawayError, match="skip connection"):
            load(folder)
        return
    x = some_x()
    dictionary = load(folder)
    agrees(dictionary, x, *FORWARD["saelens"](folder, x))
    assert [port.site for port in (*dictionary.inputs, *dictionary.outputs)] == [
        "blocks.5.resid_pre",
        "blocks.5.mlp.out",
    ]


def test_saelens_before_6_is_upgraded_by_its_own_rules(tmp_path: Path) -> None:
    """Flat settings, old names, a bool for the normalisation, topk as an activation function, a scaling factor."""
    draw = Draw(1)
    t = {"W_enc": draw(D, F), "b_enc": draw(F), "W_dec": draw(F, D), "b_dec": draw(D)}
    flat: dict[str, Any] = {"hook_point": "blocks.2.attn.hook_z", "hook_point_head_index": None, "d_in": D, "d_sae": F}
    flat |= {"model_name": "gpt2", "normalize_activations": None, "activation_fn_str": "relu"}
    x = some_x()

    def folder(name: str, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "cfg.json").write_text(json.dumps(cfg))
        save_file(tensors, tmp_path / name / "sae_weights.safetensors")
        return tmp_path / name

    plain = {"architecture": "standard", "normalize_activations": "none", "apply_b_dec_to_input": True}
    relu = read(folder("relu", flat, t))
    assert (relu.format, relu.dictionary.site, relu.dictionary.model["id"]) == ("SAELens 5", "blocks.2.attn.z", "gpt2")
    agrees(relu.dictionary, x, *FORWARD["saelens"](folder("relu-oracle", plain, t), x))
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    agrees(load(folder("topk", flat | topk, t)), x, *FORWARD["saelens"](folder("topk-oracle", plain | topk, t), x))
    factor = t | {"scaling_factor": draw(F).abs() + 0.5}
    used = {"finetuning_scaling_factor": True}
    agrees(load(folder("f", flat | used, factor)), x, *FORWARD["saelens"](folder("f-oracle", plain | used, factor), x))
    with pytest.raises(CutawayError, match=r"scaling_factor that cfg.json does not say"):
        load(folder("g", flat, factor))
    ones = t | {"scaling_factor": torch.ones(F, dtype=torch.float64)}  # what was added for a while and means nothing
    assert torch.equal(load(folder("ones", flat, ones)).W_dec, t["W_dec"])
    notes = read(folder("true", flat | {"normalize_activations": True}, t)).notes
    assert any("expected_average_only_in" in note for note in notes)
    with pytest.raises(CutawayError, match="tanh"):
        load(folder("tanh", flat | {"activation_fn_str": "tanh-relu"}, t))
    old = t | {"log_threshold": draw(F) * 0.2}
    jump = {"architecture": "jumprelu"}
    agrees(load(folder("log", flat | jump, old)), x, *FORWARD["saelens"](folder("log-oracle", plain | jump, old), x))
    for refused in ("abstopk", "matching_pursuit", "temporal"):
        with pytest.raises(CutawayError, match=f"{refused}.*not read"):
            load(folder(refused, flat | {"architecture": refused}, t))


@pytest.mark.parametrize(("transcode", "skip"), list(itertools.product((False, True), (False, True))))
def test_sparsify_is_read_as_it_computes(tmp_path: Path, transcode: bool, skip: bool) -> None:
    draw = Draw(2)
    folder = tmp_path / "layers.3.mlp"
    folder.mkdir()
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "W_dec": draw(F, D), "b_dec": draw(D)}
    if skip:
        t["W_skip"] = draw(D, D)
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": 5}
    cfg |= {"multi_topk": True, "skip_connection": skip, "transcode": transcode, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    (tmp_path / "config.json").write_text(json.dumps({"model": "HuggingFaceTB/SmolLM2-135M"}))
    save_file(t, folder / "sae.safetensors")
    x = some_x()
    dictionary = load(folder)
    agrees(dictionary, x, *FORWARD["sparsify"](folder, x))
    assert dictionary.model["id"] == "HuggingFaceTB/SmolLM2-135M"
    assert dictionary.outputs[0].site == "blocks.3.mlp.out"
    assert dictionary.inputs[0].site == ("blocks.3.mlp.in" if transcode else "blocks.3.mlp.out")
    assert dictionary.kind == {
        (False, False): "sae", (False, True): "skip_transcoder",
        (True, False): "transcoder", (True, True): "skip_transcoder",
    }[transcode, skip]  # fmt: skip
    assert read(folder).tensors[0].becomes == "W_enc [d_in, F], transposed"
    (folder / "cfg.json").write_text(json.dumps(cfg | {"activation": "groupmax"}))
    with pytest.raises(CutawayError, match=r"groupmax.*only topk is read"):
        load(folder)


def learned(kind: str, draw: Draw) -> dict[str, Tensor]:
    """A state_dict of dictionary_learning."""
    linear = {"encoder.weight": draw(F, D), "decoder.weight": draw(D, F)}
    numbers = {"k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(1.1, dtype=torch.float64)}
    whole = {"W_enc": draw(D, F), "W_dec": draw(F, D), "b_enc": draw(F), "b_dec": draw(D)}
    return {
        "AutoEncoder": linear | {"encoder.bias": draw(F), "bias": draw(D)},
        "AutoEncoderNew": linear | {"encoder.bias": draw(F), "decoder.bias": draw(D)},
        "GatedAutoEncoder": linear
        | {"decoder_bias": draw(D), "r_mag": draw(F) * 0.3, "gate_bias": draw(F), "mag_bias": draw(F)},
        "AutoEncoderTopK": linear | {"encoder.bias": draw(F), "b_dec": draw(D)} | numbers,
        "BatchTopKSAE": linear | {"encoder.bias": draw(F), "b_dec": draw(D)} | numbers,
        "MatryoshkaBatchTopKSAE": whole | numbers | {"group_sizes": torch.tensor([8, 12])},
        "JumpReluAutoEncoder": whole | {"threshold": draw(F).abs()},
    }[kind]


LEARNED = [
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
]  # fmt: skip


@pytest.mark.parametrize("kind", LEARNED)
def test_dictionary_learning_is_read_as_it_computes(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "trainer_0"
    (folder / "checkpoints").mkdir(parents=True)
    state = learned(kind, Draw(4))
    trainer = {"dict_class": kind, "layer": 8, "lm_name": "EleutherAI/pythia-70m", "k": 4}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    torch.save(state, folder / "ae.pt")
    torch.save(state, folder / "checkpoints" / "ae_100.pt")
    x = some_x()
    a, y = FORWARD["dictionary_learning"](folder, x)
    for place in (folder, folder / "checkpoints" / "ae_100.pt"):
        reading = read(place)
        agrees(reading.dictionary, x, a, y)
        assert reading.format == f"dictionary_learning {kind}"
        assert reading.dictionary.site == "blocks.8.resid_post"
    # an interrupted run: everything that has units is still divided by the factor
    factor = 3.5
    units = ("bias", "b_dec", "b_enc", "threshold", "decoder_bias", "gate_bias", "mag_bias")
    divided = {name: t / factor if name.split(".")[-1] in units else t for name, t in state.items()}
    torch.save({"step": 5, "ae": divided, "optimizer": {}, "config": {}, "norm_factor": factor}, folder / "ae.pt")
    reading = read(folder)
    torch.testing.assert_close(reading.dictionary(x), y)
    assert "norm_factor 3.5" in reading.folds[-1]


@pytest.mark.parametrize("code", [1, 2, 4])
@pytest.mark.parametrize("normalised", [False, True])
def test_crosscoders_are_read_as_they_compute(tmp_path: Path, code: int, normalised: bool) -> None:
    draw = Draw(5)
    n, d = 3, 4
    state = {
        "encoder.weight": draw(n, d, F), "encoder.bias": draw(F), "decoder.weight": draw(n, F, d),
        "decoder.bias": draw(n, d), "code_normalization_id": torch.tensor(code),
    }  # fmt: skip
    if normalised:
        std = draw(n, d).abs() + 0.5
        state |= {"activation_mean": draw(n, d), "activation_std": std, "target_rms": torch.tensor(1.0).double()}
        state["activation_global_scale"] = 1 / (std.square().sum(-1) + 1e-8).sqrt()
    x = some_x(n * d)
    for batch in (False, True):
        folder = tmp_path / str(batch)
        folder.mkdir()
        numbers = {"k": torch.tensor(4), "threshold": torch.tensor(2.1).double()} if batch else {}
        torch.save({f"_orig_mod.{name}": t for name, t in (state | numbers).items()}, folder / "ae.pt")
        kind = "BatchTopKCrossCoder" if batch else "CrossCoder"
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "lm_name": "a"}}))
        dictionary = load(folder)
        torch.save(state | numbers, folder / "ae.pt")
        agrees(dictionary, x, *FORWARD["dictionary_learning"](folder, x))
        assert dictionary.kind == "crosscoder"
        assert [tuple(block.shape) for block in dictionary.decoders()] == [(F, d)] * n


def test_the_two_model_crosscoder_is_read_as_it_computes(tmp_path: Path) -> None:
    draw = Draw(6)
    t = {"W_enc": draw(2, D, F), "W_dec": draw(F, 2, D), "b_enc": draw(F), "b_dec": draw(2, D)}
    torch.save(t, tmp_path / "cc_weights.pt")
    cfg = {"model_name": "a", "model_name_b": "b", "hook_point": "blocks.1.hook_resid_pre"}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    x = some_x(2 * D)
    a = torch.relu(torch.einsum("nld,ldf->nf", x.view(-1, 2, D), t["W_enc"]) + t["b_enc"])
    y = torch.einsum("nf,fld->nld", a, t["W_dec"]) + t["b_dec"]
    dictionary = load(tmp_path)
    agrees(dictionary, x, a, y.reshape(len(x), -1))
    assert [port.model["id"] for port in dictionary.inputs] == ["a", "b"]


def test_gemma_scope_is_read_as_it_computes(tmp_path: Path) -> None:
    draw = Draw(8)
    t = {"W_enc": draw(D, F), "W_dec": draw(F, D), "b_enc": draw(F), "b_dec": draw(D), "threshold": draw(F).abs()}
    x = some_x()

    def folder(*parts: str) -> Path:
        place = tmp_path.joinpath(*parts)
        place.mkdir(parents=True)
        arrays: dict[str, Any] = {k: v.numpy() for k, v in t.items()}
        np.savez(place / "params.npz", **arrays)
        return place

    hub = "models--google--gemma-scope-2b-pt"
    res = folder(f"{hub}-res", "snapshots", "abc", "layer_20", "width_16k", "average_l0_71")
    reading = read(res)
    agrees(reading.dictionary, x, *FORWARD["gemma-scope"](res, x))
    assert (reading.dictionary.site, reading.dictionary.model["id"]) == ("blocks.20.resid_post", "google/gemma-2-2b")
    assert reading.expected_l0[0].value == 71
    assert load(folder(f"{hub}-att", "layer_3", "w", "average_l0_9")).site == "blocks.3.attn.z"
    assert load(folder(f"{hub}-mlp", "layer_3", "w", "average_l0_9")).site == "blocks.3.mlp.out"
    assert load(folder("elsewhere")).site == "unknown"
    assert load(tmp_path / "elsewhere", site="blocks.1.resid_mid").site == "blocks.1.resid_mid"
    transcoder = load(folder(f"{hub}-transcoders", "layer_3", "w", "average_l0_9"))
    assert transcoder.kind == "transcoder"
    assert transcoder.outputs[0].site == "blocks.3.mlp.out"
    embedding = folder(f"{hub}-res", "embedding", "width_4k", "average_l0_6")
    root = D**0.5  # it was trained on embeddings before the model scales them
    a, y = FORWARD["gemma-scope"](embedding, x / root)
    agrees(load(embedding), x, a, y * root)
    assert load(embedding).site == "embed"


def test_gemma_scope_2_is_read_as_it_computes(tmp_path: Path) -> None:
    draw = Draw(9)
    out = D + 2
    t = {"w_enc": draw(D, F), "w_dec": draw(F, out), "b_enc": draw(F), "b_dec": draw(out), "threshold": draw(F).abs()}
    t["affine_skip_connection"] = draw(D, out)
    folder = tmp_path / "gemma-scope-2-1b-pt" / "transcoder" / "layer_7_width_16k_l0_medium_affine"
    folder.mkdir(parents=True)
    save_file(t, folder / "params.safetensors")
    x = some_x()
    reading = read(folder)  # without a config.json the folder's name says it all
    agrees(reading.dictionary, x, *FORWARD["gemma-scope-2"](folder, x))
    sites = [port.site for port in (*reading.dictionary.inputs, *reading.dictionary.outputs)]
    assert sites == ["blocks.7.mlp.in", "blocks.7.mlp.out"]
    assert reading.dictionary.model["id"] == "google/gemma-3-1b-pt"
    assert (reading.expected_l0[0].value, reading.expected_l0[0].high) == (30, 60)
    cfg = {"architecture": "jump_relu", "model_name": "gemma-3-1b", "affine_connection": True}
    cfg |= {"hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output"}
    cfg |= {"hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output"}
    (folder / "config.json").write_text(json.dumps(cfg))
    assert load(folder).inputs[0].site == "blocks.9.mlp.in"
    assert load(folder).outputs[0].site == "blocks.9.mlp.out"
    save_file(t | {"w_dec": draw(F, 3, out)}, folder / "params.safetensors")
    with pytest.raises(CutawayError, match="several layers at once"):
        load(folder)
    save_file(t | {"w_dec": draw(F, 3, out)}, tmp_path / "params_layer_0.safetensors")  # a layer of a CLT is a file
    with pytest.raises(CutawayError, match="several layers at once"):
        load(tmp_path / "params_layer_0.safetensors")


def test_a_set_of_circuit_tracer_is_several_dictionaries(tmp_path: Path) -> None:
    draw = Draw(10)
    config = {"model_name": "google/gemma-2-2b", "model_kind": "transcoder_set", "scan": "x"}
    config |= {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "mlp.hook_out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    x = some_x()
    for layer in (0, 1, 10):
        t = {"W_enc": draw(F, D), "W_dec": draw(F, D), "b_enc": draw(F), "b_dec": draw(D)}
        extra = {
            0: {"W_skip": draw(D, D)},
            1: {"activation_function.threshold": draw(F).abs()},
            10: {"k": torch.tensor(4)},
        }
        save_file(t | extra[layer], tmp_path / f"layer_{layer}.safetensors")
    found = load_all(tmp_path)
    assert list(found) == ["layer_0", "layer_1", "layer_10"]
    for name, dictionary in found.items():
        alone = tmp_path / f"only-{name}"
        alone.mkdir()
        (alone / "config.yaml").write_text(yaml.safe_dump(config))
        (alone / f"{name}.safetensors").write_bytes((tmp_path / f"{name}.safetensors").read_bytes())
        a, y = FORWARD["circuit-tracer"](alone, x)
        for one in (dictionary, load(alone), load(tmp_path / f"{name}.safetensors")):
            agrees(one, x, a, y)
            layer = name.split("_")[1]
            assert (one.inputs[0].site, one.outputs[0].site) == (f"blocks.{layer}.resid_mid", f"blocks.{layer}.mlp.out")
    with pytest.raises(CutawayError, match="holds 3 transcoders"):
        load(tmp_path)
    saved = save_all(list(found.values()), tmp_path / "again", "circuit-tracer")
    assert sorted(file.name for file in saved.iterdir()) == [
        "config.yaml", "layer_0.safetensors", "layer_1.safetensors", "layer_10.safetensors",
    ]  # fmt: skip
    for name, dictionary in load_all(saved).items():
        torch.testing.assert_close(dictionary(x), found[name](x), rtol=0, atol=0)
    first = {"W_enc": draw(F, D), "W_dec": draw(D, F), "b_enc": draw(F), "b_dec": draw(D)}  # the first files' W_dec
    save_file(first, tmp_path / "layer_0.safetensors")
    assert torch.equal(load(tmp_path / "layer_0.safetensors").W_dec, first["W_dec"].T)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"transcoders": ["../secret.safetensors"]}))
    with pytest.raises(CutawayError, match="outside of its folder"):
        load_all(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"model_kind": "cross_layer_transcoder"}))
    with pytest.raises(CutawayError, match="cross-layer transcoder"):
        load_all(tmp_path)
    (tmp_path / "clt").mkdir()
    save_file({"W_enc_0": draw(F, D)}, tmp_path / "clt" / "W_enc_0.safetensors")
    with pytest.raises(CutawayError, match="cross-layer transcoder"):
        load(tmp_path / "clt")


def test_single_releases_are_read_as_they_compute(tmp_path: Path) -> None:
    draw = Draw(11)
    x = some_x()
    encoder, decoder, b, c = draw(F, D), draw(D, F), draw(F), draw(D)

    place = tmp_path / "resid_post_mlp_v5_32k" / "autoencoders"
    place.mkdir(parents=True)
    openai: dict[str, Any] = {"pre_bias": c, "encoder.weight": encoder, "latent_bias": b, "decoder.weight": decoder}
    openai |= {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "activation": "TopK"}
    torch.save(openai | {"activation_state_dict": {"k": 4, "postact_fn": "ReLU"}}, place / "6.pt")
    mu, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    h = ((x - mu) / (std + 1e-5) - c) @ encoder.T + b
    a = torch.zeros_like(h).scatter(1, h.topk(4).indices, 1.0) * h.relu()
    agrees(load(place / "6.pt"), x, a, (a @ decoder.T + c) * std + mu)
    assert load(place / "6.pt").site == "blocks.6.resid_post"
    torch.save(openai | {"activation": "ReLU", "activation_state_dict": {}}, place / "7.pt")
    a = ((x - c) @ encoder.T + b).relu()
    agrees(load(place / "7.pt"), x, a, a @ decoder.T + c)

    a = (x @ encoder.T + b).relu()
    for prefix, name in (("_linear", "Llama-SAE-l19.pth"), ("", "DeepSeek-layer-37.pt")):
        names = {f"encoder{prefix}.weight": encoder, f"encoder{prefix}.bias": b}
        torch.save(names | {f"decoder{prefix}.weight": decoder, f"decoder{prefix}.bias": c}, tmp_path / name)
        agrees(load(tmp_path / name), x, a, a @ decoder.T + c)

    qwen = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    qwen.mkdir()
    torch.save({"W_enc": encoder, "W_dec": decoder, "b_enc": b, "b_dec": c}, qwen / "layer3.sae.pt")
    h = x @ encoder.T + b
    a = torch.zeros_like(h).scatter(1, h.topk(5).indices, 1.0) * h.relu()
    agrees(load(qwen / "layer3.sae.pt"), x, a, a @ decoder.T + c)
    assert load(qwen / "layer3.sae.pt").model["id"] == "Qwen/Qwen3-1.7B-Base"

    llama = tmp_path / "Llama3_1-8B-Base-L15R-8x"
    (llama / "checkpoints").mkdir(parents=True)
    names = {"encoder.weight": encoder, "encoder.bias": b, "decoder.weight": decoder, "decoder.bias": c}
    save_file(names, llama / "checkpoints" / "final.safetensors")
    settings_ = {"d_model": D, "d_sae": F, "jump_relu_threshold": 0.4, "hook_point_in": "blocks.15.hook_resid_post"}
    settings_ |= {
        "dataset_average_activation_norm": {"in": 3.0, "out": 4.0},
        "hook_point_out": "blocks.15.hook_resid_post",
    }
    (llama / "hyperparams.json").write_text(json.dumps(settings_))
    s, t = D**0.5 / 3, D**0.5 / 4
    h = (x * s) @ encoder.T + b
    a = h.relu() * (h > 0.4 * s)
    agrees(load(llama), x, a, (a @ decoder.T + c) / t)


# writing


def a_dictionary(
    selector: str, *, kind: str = "sae", norm: Any = None, subtract: bool = True, seed: int = 0
) -> Dictionary:
    draw = Draw(seed)
    reads = (Port("blocks.2.mlp.in", D, MODEL),)
    writes: tuple[Port, ...] = ()
    if kind == "crosscoder":
        reads = writes = tuple(Port(f"blocks.{i}.resid_post", 3, MODEL | {"id": f"m{i}"}) for i in range(2))
    elif kind != "sae":
        writes = (Port("blocks.2.mlp.out", D, MODEL),)
    chosen = {
        "relu": ReLU(), "topk": TopK(4), "batchtopk": BatchTopK(4, 1.2), "jumprelu": JumpReLU(draw(F).abs()),
        "gated": Gated(draw(F) * 0.3, draw(F)),
    }[selector]  # fmt: skip
    return Dictionary(
        W_enc=draw(D, F), b_enc=draw(F), W_dec=draw(F, D), b_dec=draw(D), selector=chosen,
        site=reads[0].site if writes else "blocks.2.resid_post", model=reads[0].model if writes else MODEL,
        sparsity=log_sparsity(torch.rand(F, generator=draw.generator)), metadata={"corpus": "tests", "context": 64},
        reads=reads if writes else (), writes=writes, subtract_b_dec=subtract, input_norm=norm,
        W_skip=draw(D, D) if kind == "skip_transcoder" else None,
    )  # fmt: skip


SELECTORS = ["relu", "topk", "batchtopk", "jumprelu", "gated"]
KINDS = ["sae", "transcoder", "skip_transcoder", "crosscoder"]


def expressible(format: str, selector: str, kind: str, norm: str | None) -> bool:
    """What a format has a place for, as its documentation says."""
    thresholded = selector in ("relu", "batchtopk", "jumprelu")
    if format == "saelens":
        return kind == "sae" or (
            kind in ("transcoder", "skip_transcoder") and thresholded and not (norm and "skip" in kind)
        )
    if format in ("saelens-5", "saelens-training"):
        return kind == "sae"
    if norm:
        return False
    return {
        "sparsify": selector == "topk" and kind != "crosscoder",
        "dictionary_learning": kind == "sae" or (kind == "crosscoder" and selector in ("relu", "batchtopk")),
        "gemma-scope": thresholded and kind in ("sae", "transcoder"),
        "gemma-scope-2": thresholded and kind != "crosscoder",
        "circuit-tracer": selector != "gated" and kind != "crosscoder",
    }[format]


def cases() -> list[tuple[str, str, str | None, bool]]:
    found = []
    for selector, kind, norm, subtract in itertools.product(
        SELECTORS, KINDS, (None, "layer_norm", "unit"), (True, False)
    ):
        if not (norm and kind == "crosscoder"):
            found.append((selector, kind, norm, subtract))
    return found


@pytest.mark.parametrize("format", WRITTEN)
def test_what_is_written_computes_the_same_by_the_format_s_equations_and_comes_back(
    tmp_path: Path, format: Format
) -> None:
    x = some_x()
    written = 0
    for number, (selector, kind, norm, subtract) in enumerate(cases()):
        dictionary = a_dictionary(selector, kind=kind, norm=norm, subtract=subtract, seed=number)
        folder = tmp_path / str(number)
        if not expressible(format, selector, kind, norm):
            with pytest.raises(CutawayError, match="format='"):
                save(dictionary, folder, format)
            assert not folder.exists()
            continue
        save(dictionary, folder, format)
        written += 1
        a, y = FORWARD[format](folder, x)
        agrees(dictionary, x, a, y)
        back = load(folder)
        agrees(back, x, a, y)
        assert (back.inputs, back.outputs, back.kind) == (dictionary.inputs, dictionary.outputs, dictionary.kind)
        assert (back.model, back.metadata) == (dictionary.model, dictionary.metadata)
        assert back.selector.name == dictionary.selector.name
        if isinstance(dictionary.selector, BatchTopK):
            assert back.selector == dictionary.selector
    assert written >= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_cutaway_s_own_layout_takes_every_dictionary(tmp_path: Path, selector: str, kind: str) -> None:
    x = some_x()
    for norm, subtract in itertools.product((None, "layer_norm", "unit"), (True, False)):
        if norm and kind == "crosscoder":
            continue
        dictionary = a_dictionary(selector, kind=kind, norm=norm, subtract=subtract)
        folder = save(dictionary, tmp_path / f"{norm}-{subtract}")
        back = load(folder)
        torch.testing.assert_close(back(x), dictionary(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(back.encode(x), dictionary.encode(x), rtol=1e-12, atol=1e-12)
        assert (back.inputs, back.outputs, back.site) == (dictionary.inputs, dictionary.outputs, dictionary.site)
        assert torch.equal(back.sparsity, dictionary.sparsity)  # pyright: ignore[reportArgumentType]
        if dictionary.writes_what_it_reads:  # nothing had to be folded: the very same weights
            for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
                assert torch.equal(getattr(back, name), getattr(dictionary, name))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chain_of_formats_computes_the_same(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    selector, kind, norm, subtract = data.draw(st.sampled_from(cases()))
    dictionary = a_dictionary(selector, kind=kind, norm=norm, subtract=subtract, seed=data.draw(st.integers(0, 99)))
    x = some_x()
    expected = dictionary(x)
    place = tmp_path_factory.mktemp("chain")
    now = dictionary
    for step in range(3):
        name = now.selector.name
        possible: list[Format] = ["cutaway", *(f for f in WRITTEN if expressible(f, name, kind, norm))]
        now = load(save(now, place / str(step), data.draw(st.sampled_from(possible))))
    torch.testing.assert_close(now(x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_kept_and_folds_in_half_precision_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    dictionary = a_dictionary("jumprelu").to(dtype=dtype)
    back = load(save(dictionary, tmp_path / "a"))
    assert torch.equal(back.W_enc, dictionary.W_enc)
    assert back.W_enc.dtype == dtype
    folded = load(save(dictionary, tmp_path / "b", "gemma-scope-2"))  # b_dec · W_enc had to move
    assert folded.W_enc.dtype == torch.float32
    wide, x = dictionary.to(dtype=torch.float64), some_x()
    torch.testing.assert_close(folded(x.float()).double(), wide(x), rtol=1e-4, atol=1e-4)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary, other = a_dictionary("topk"), a_dictionary("topk", seed=9)
    folder = save(dictionary, tmp_path / "dictionary")
    with pytest.raises(CutawayError, match="exists: name another"):
        save(other, folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("cutaway.dictionaries.formats.saelens.write_safetensors", full)
        with pytest.raises(CutawayError, match="the disk is full"):
            save(other, folder, overwrite=True)
    assert torch.equal(load(folder).W_enc, dictionary.W_enc)
    assert [file.name for file in tmp_path.iterdir()] == ["dictionary"]
    with pytest.raises(CutawayError, match="sparsify has TopK"):
        save(replace(other, selector=ReLU()), folder, "sparsify", overwrite=True)
    assert torch.equal(load(folder).W_enc, dictionary.W_enc)
    save(other, folder, "sparsify", overwrite=True)
    assert torch.equal(load(folder).W_enc, other.W_enc)
    assert sorted(file.name for file in folder.iterdir()) == ["cfg.json", "sae.safetensors"]
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "important.txt").write_text("keep")
    with pytest.raises(CutawayError, match="not a dictionary's folder"):
        save(dictionary, notes, overwrite=True)
    with pytest.raises(CutawayError, match="'onnx' is no format: write cutaway, saelens"):
        save(dictionary, tmp_path / "x", "onnx")  # pyright: ignore[reportArgumentType]


def test_what_saelens_reads_says_where_it_belongs(tmp_path: Path) -> None:
    cfg = json.loads((save(a_dictionary("batchtopk"), tmp_path / "a", "saelens") / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["metadata"]["hook_name"]) == ("jumprelu", "blocks.2.hook_resid_post")
    threshold = load_file(tmp_path / "a" / "sae_weights.safetensors")["threshold"]
    assert torch.equal(threshold, torch.full((F,), 1.2, dtype=torch.float64))
    z = replace(a_dictionary("topk"), site="blocks.2.attn.z")
    cfg = json.loads((save(z, tmp_path / "z", "saelens") / "cfg.json").read_text())
    assert (cfg["metadata"]["hook_name"], cfg["reshape_activations"]) == ("blocks.2.attn.hook_z", "hook_z")
    flat = json.loads((save(z, tmp_path / "5", "saelens-5") / "cfg.json").read_text())
    assert (flat["hook_name"], flat["hook_layer"], flat["activation_fn_kwargs"]) == (
        "blocks.2.attn.hook_z",
        2,
        {"k": 4},
    )


def test_importing_the_package_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, cutaway.dictionaries as d; print('torch' in sys.modules, 'load' in dir(d))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert cutaway.dictionaries.load is load

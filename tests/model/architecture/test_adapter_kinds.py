"""Every kind of adapter that PEFT has: it is looked into as PEFT runs it, or refused by name."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import D, V, tiny_model
from torch import Tensor
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.architecture.wrapped import embedding_rows
from cutaway.model.edits.edits import zero
from cutaway.model.language_model import attach
from cutaway.observe.heads.circuits import copying_scores

ROWS = [[1, 5, 9, 7, 12, 6, 20, 33], [2, 8, 12, 11, 6, 40, 3, 5]]
TARGETS = ["q_proj", "o_proj", "down_proj"]
ON = {"target_modules": TARGETS}
VIRTUAL = {"num_virtual_tokens": 3}

# What PEFT computes is what cutaway gives
RIGHT: dict[str, dict[str, Any]] = {
    "LORA": ON | {"r": 4},
    "ADALORA": ON | {"total_step": 10},
    "ADAMSS": ON,
    "BOFT": ON | {"boft_block_size": 4},
    "IA3": ON | {"feedforward_modules": ["down_proj"]},
    "BEFT": ON,
    "LOHA": ON,
    "LOKR": ON,
    "OFT": ON | {"oft_block_size": 4},
    "LN_TUNING": {},
    "VERA": ON,
    "FROD": {"target_modules": ["o_proj"]},
    "PVERA": ON,
    "FOURIERFT": ON,
    "GLORA": ON,
    "HRA": ON,
    "VBLORA": ON | {"vector_length": 8, "num_vectors": 16, "r": 2},
    "UNILORA": ON,
    "MISS": ON | {"r": 4},
    "RANDLORA": ON,
    "ROAD": ON | {"group_size": 8},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6]},
    "HIRA": ON,
    "SHIRA": ON | {"r": 4},
    "C3A": ON | {"block_size": 8},
    "WAVEFT": ON | {"n_frequency": 64},
    "OSF": ON,
    "DELORA": ON,
    "GRALORA": ON,
    "TINYLORA": ON,
    "PSOFT": ON,
    "PEANUT": ON,
    "SUPERTUNING": ON,
    "DEFT": ON,
}
REFUSED: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": VIRTUAL,
    "MULTITASK_PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL | {"encoder_hidden_size": 8},
    "PREFIX_TUNING": VIRTUAL,
    "CARTRIDGE": VIRTUAL,
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 2},
    "LILY": ON,
    "POLY": ON | {"r": 4},
    "SHADOW": {},
    "XLORA": {"hidden_size": D},
}


def moved(model: Any) -> Any:
    """With weights of the adapter that do something: most kinds begin as nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def with_adapter(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    configuration = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **options)  # type: ignore[index]
    model = tiny_model("llama")
    model.config.use_cache = kind != "XLORA"  # which takes no other
    return moved(peft.get_peft_model(model, configuration))


def test_every_kind_that_peft_has_is_tried() -> None:
    assert {*RIGHT, *REFUSED} == {kind.value for kind in peft.PeftType}
    assert not {*RIGHT} & {*REFUSED}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(RIGHT))
def test_a_kind_is_what_peft_computes(kind: str) -> None:
    """Rows one by one in PEFT, together in cutaway: a kind that mixes tokens or rows would show."""
    model = with_adapter(kind, RIGHT[kind])
    lm = attach(model)
    run = lm.run(ROWS, capture=["blocks.1.attn.result", "blocks.1.attn.out"])
    assert run.logits is not None
    for row, ids in enumerate(ROWS):
        right = logits(model, ids)
        assert float((right - logits(tiny_model("llama"), ids)).abs().max()) > 1e-3
        torch.testing.assert_close(run.logits[row], right, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(model, ids[:5]), right[:5], rtol=1e-4, atol=1e-4)
    missing = run["blocks.1.attn.out"] - run["blocks.1.attn.result"].sum(2)  # of the weight as it acts: its bias alone
    torch.testing.assert_close(missing, missing[:1, :1].expand_as(missing), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(REFUSED))
def test_a_kind_that_acts_outside_the_modules_is_refused(kind: str, tmp_path: Path) -> None:
    options = REFUSED[kind]
    if kind == "XLORA":
        with_adapter("LORA", RIGHT["LORA"]).save_pretrained(tmp_path)
        options = options | {"adapters": {"first": str(tmp_path)}}
    model = with_adapter(kind, options)
    with pytest.raises(CutawayError, match=rf"adapter .*\({kind}\)"):
        attach(model)
    if "virtual" not in str(options) and kind != "CPT":  # in the model itself nothing is left of those
        with pytest.raises(CutawayError, match=rf"at .*\({kind}\).*unload\(\)"):
            attach(model.get_base_model())


def test_activated_lora_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    configuration = peft.LoraConfig(r=4, alora_invocation_tokens=[12], task_type="CAUSAL_LM", **ON)  # type: ignore[arg-type]
    model: Any = moved(peft.get_peft_model(base, configuration))
    assert not torch.equal(logits(model, ROWS[0]), logits(model.get_base_model(), ROWS[0]))  # why it has to be
    refused = r"'default' \(aLoRA\) acts from where its invocation tokens stand.*unload\(\)"
    for given in (model, model.get_base_model()):
        with pytest.raises(CutawayError, match=refused):
            attach(given)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CutawayError, match=refused):
        cutaway.load(tmp_path / "adapter")
    assert torch.equal(attach(model.unload()).run([ROWS[0]]).logits[0], logits(tiny_model("llama"), ROWS[0]))  # type: ignore[index]


# Routers


_SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ROUTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3_moe": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**{**_SIZES, "head_dim": 8}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        ),
        {"target_parameters": ["mlp.gate.weight"]},
    ),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4)),
        {"target_parameters": ["mlp.gate.weight"]},
    ),
    "granitemoe": (
        lambda: GraniteMoeForCausalLM(GraniteMoeConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)),
        {"target_parameters": ["router.weight"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(ROUTERS))
def test_an_adapter_on_a_router_is_in_its_logits(family: str) -> None:
    make, options = ROUTERS[family]
    torch.manual_seed(0)
    base: PreTrainedModel = make()
    model: Any = moved(peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | options)))
    lm = attach(model)
    site = "blocks.0.mlp.router.logits"
    run = lm.run(ROWS, capture=[site, "blocks.0.mlp.in"])
    merged = model.get_base_model()
    matrices = {}
    for name, module in merged.named_modules():
        if hasattr(module, "get_delta_weight") and "layers.0" in name and ("gate" in name or "router" in name):
            own = module.get_base_layer().weight
            matrices = {True: own + module.get_delta_weight("default").reshape(own.shape), False: own}
    assert float((matrices[True] - matrices[False]).abs().max()) > 1e-3
    torch.testing.assert_close(run[site], run["blocks.0.mlp.in"] @ matrices[True].T, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        off = lm.run(ROWS, capture=[site, "blocks.0.mlp.in"])
    torch.testing.assert_close(off[site], off["blocks.0.mlp.in"] @ matrices[False].T, rtol=1e-4, atol=1e-5)
    edited = lm.run(ROWS, edits=zero(site), capture="blocks.0.mlp.router.weights")["blocks.0.mlp.router.weights"]
    chosen = edited[edited != 0]
    torch.testing.assert_close(chosen, torch.full_like(chosen, float(chosen[0])))  # no expert is preferred
    test = lm.selftest()
    assert test.passed, test


# Embeddings, unembeddings and norms


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [5, 6]},
        {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["tokens", "copies", "lora"],
)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_adapted_embeddings_count_as_they_act(family: str, options: dict[str, Any]) -> None:
    """gemma ties its embedding to its unembedding, and multiplies what the embedding gives by √d."""
    torch.manual_seed(0)
    base = tiny_model(family)
    scale = D**0.5 if family == "gemma" else 1.0
    model: Any = moved(peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | options)))
    lm = attach(model)
    for ids in ROWS:
        torch.testing.assert_close(lm.run([ids]).logits[0], logits(model, ids))  # type: ignore[index]
    test = lm.selftest()
    assert test.passed, test
    with torch.no_grad():
        unembedded = lm.family.unembed(torch.eye(D)[None])[0]
        embedded = lm.family.embed(torch.arange(V)) / scale
    own = tiny_model(family).get_input_embeddings().weight  # type: ignore[union-attr]
    assert float((embedded - own).abs().max()) > 1e-2  # type: ignore[operator]
    torch.testing.assert_close(lm.output_directions([5, 7, 9]), unembedded.T[[5, 7, 9]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embedding_rows(lm.family.embed), embedded, rtol=1e-4, atol=1e-4)
    if "modules_to_save" not in options:
        merged = attach(model.merge_and_unload())
        expected = copying_scores(merged, draws=2).score
        torch.testing.assert_close(copying_scores(lm, draws=2).score, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("kind", ["LN_TUNING", "modules_to_save"])
def test_a_norm_in_an_adapter_is_the_one_in_force(kind: str) -> None:
    if kind == "LN_TUNING":
        model = with_adapter(kind, {})
    else:
        model = with_adapter("LORA", ON | {"modules_to_save": ["norm"]})
    lm = attach(model)
    assert lm.family.ln_final is not None
    gain = lm.family.ln_final.weight
    assert gain is not None
    own = tiny_model("llama").model.norm.weight  # type: ignore[union-attr]
    assert float((gain - own).abs().max()) > 1e-2  # type: ignore[operator]
    assert lm.selftest().passed
    with model.disable_adapter():
        assert torch.equal(lm.family.ln_final.weight, own)  # type: ignore[arg-type]
        assert lm.selftest().passed

"""Models as other libraries leave them: placed, offloaded, adapted, quantised, in mixed precision. Each is looked into
as it is, and gives what its library gives.
"""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from packed import Packed4Bit
from tiny import LENGTHS, random_rows, tiny_model, word_tokenizer
from torch import Tensor, nn

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edits import add, zero
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.tokens import Tokens, pad_rows

_ROWS = random_rows(LENGTHS)
PROMPTS = Tokens(*pad_rows(_ROWS, 1), ((),) * len(_ROWS))  # the same padding with and without a tokenizer


def whole(lm: LanguageModel) -> dict[str, Tensor]:
    run = lm.run(PROMPTS, capture=["blocks.*.resid_post", "blocks.*.attn.result", "blocks.*.attn.pattern"])
    assert run.logits is not None
    return {"logits": run.logits, **{site: run[site] for site in run.sites}}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# Placed and offloaded


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_is_the_model(family: str, where: str, tmp_path: Path) -> None:
    expected = whole(attach(tiny_model(family)))
    model = tiny_model(family)
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    lm = attach(model, word_tokenizer())
    assert lm.device == torch.device("cpu")
    same(expected, whole(lm))
    assert lm.selftest().passed
    assert lm.identity().weight_hash == attach(tiny_model(family)).identity().weight_hash
    plain = attach(tiny_model(family), word_tokenizer())
    assert lm.generate([[5, 6]], max_new_tokens=5).new_ids == plain.generate([[5, 6]], max_new_tokens=5).new_ids
    edit = zero("blocks.1.attn.result", heads=2)
    same({"logits": plain.run(PROMPTS, edits=edit).logits}, {"logits": lm.run(PROMPTS, edits=edit).logits})  # type: ignore[dict-item]
    assert any(parameter.device.type == "meta" for parameter in model.parameters())  # as it was


def test_load_with_a_device_map(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    expected = cutaway.load(tmp_path / "model")
    parts: dict[str, Any] = {
        "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
        "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    }  # fmt: skip
    for device_map in ("auto", {"": "cpu"}, parts):
        lm = cutaway.load(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
        same(whole(expected), whole(lm))
        assert lm.identity() == expected.identity()
    assert lm.hf.model.layers[1].mlp.up_proj.weight.device.type == "meta"  # pyright: ignore
    with pytest.raises(CutawayError, match="device and device_map"):
        cutaway.load(tmp_path / "model", device="cpu", device_map="auto")


def test_weights_that_are_nowhere_are_refused() -> None:
    with pytest.raises(CutawayError, match="meta device"):
        attach(tiny_model("llama").to("meta"))  # type: ignore[arg-type]


# Adapters


def adapted(family: str = "llama", **options: Any) -> Any:
    targets = {"gpt2": ["c_attn", "c_proj", "c_fc"], "neox": ["query_key_value", "dense", "dense_4h_to_h"]}
    chosen = targets.get(family, ["q_proj", "v_proj", "o_proj", "down_proj", "gate_proj"])
    settings = {"r": 4, "target_modules": chosen, "task_type": "CAUSAL_LM", "fan_in_fan_out": family == "gpt2"}
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(**{**settings, **options})).eval()
    with torch.no_grad():  # an adapter begins as nothing, which would hide every error
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_a_model_with_adapters_is_what_peft_computes(family: str) -> None:
    model = adapted(family)
    lm = attach(model)
    tokens = lm.tokens(PROMPTS)
    with torch.no_grad():
        expected = model(
            input_ids=tokens.ids, attention_mask=tokens.mask.long(), position_ids=tokens.position_ids, use_cache=False
        ).logits
    assert torch.equal(lm.run(PROMPTS).logits, expected)  # type: ignore[arg-type]
    test = lm.selftest()
    assert test.passed, test
    merged = attach(copy.deepcopy(model).merge_and_unload())
    same(whole(merged), whole(lm), 2e-4)
    for edit in (zero("blocks.1.attn.result", heads=1), add("blocks.1.attn.q", torch.ones(lm.d_head), heads=0)):
        a, b = (one.run(PROMPTS, edits=edit).logits for one in (merged, lm))
        torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-4)


def test_the_adapter_is_in_every_site() -> None:
    """Against hooks of one's own on what PEFT put in."""
    model = adapted()
    lm = attach(model.base_model.model)
    seen: dict[str, Tensor] = {}
    attention = model.base_model.model.model.layers[1].self_attn
    handle = attention.q_proj.register_forward_hook(lambda _m, _a, y: seen.update(q=y.detach().clone()))
    run = lm.run(PROMPTS, capture=["blocks.1.attn.q", "blocks.1.attn.result", "blocks.1.attn.out"])
    handle.remove()
    assert torch.equal(run["blocks.1.attn.q"].flatten(-2), seen["q"])
    base = attach(tiny_model("llama")).run(PROMPTS, capture="blocks.1.attn.q")
    assert float((run["blocks.1.attn.q"] - base["blocks.1.attn.q"]).abs().max()) > 0.01
    torch.testing.assert_close(run["blocks.1.attn.result"].sum(2), run["blocks.1.attn.out"], rtol=1e-4, atol=1e-5)
    with_base_weight = run["blocks.1.attn.result"].sum(2) - run["blocks.1.attn.out"]
    assert float(with_base_weight.abs().max()) < 1e-4


def test_switching_an_adapter_off_is_seen_at_once() -> None:
    model = adapted()
    lm = attach(model)
    with_it = whole(lm)
    with model.disable_adapter():
        same(whole(attach(tiny_model("llama"))), whole(lm))
    same(with_it, whole(lm))
    model.merge_adapter()
    same(with_it, whole(lm), 1e-4)


def test_a_folder_of_an_adapter_is_loaded_on_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    base = cutaway.load(tmp_path / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(base.hf, peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))  # type: ignore[arg-type]
    model.eval().save_pretrained(str(tmp_path / "adapter"))
    expected = whole(attach(model))
    lm = cutaway.load(tmp_path / "adapter")
    same(expected, whole(lm))
    assert lm.tokenizer is not None
    assert lm.identity().weight_hash != cutaway.load(tmp_path / "base").identity().weight_hash
    assert lm.selftest().passed
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-50])
    with pytest.raises(CutawayError, match="does not fit its base model"):
        cutaway.load(tmp_path / "adapter")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CutawayError, match=r"no adapter_model\.safetensors"):
        cutaway.load(tmp_path / "adapter")


# Quantised


def quantised(family: str = "llama") -> Any:
    """Every projection packed to 4 bits, as quantising libraries replace them."""
    model: Any = tiny_model(family)
    for module in list(model.base_model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Packed4Bit(child))
    return model


def dense(model: Any) -> Any:
    """The same numbers, unpacked."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Packed4Bit):
                linear = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                with torch.no_grad():
                    linear.weight.copy_(child.dense())
                    if child.bias is not None:
                        linear.bias.copy_(child.bias)
                setattr(module, name, linear)
    return model


@pytest.mark.parametrize("family", ["llama", "neox", "qwen2"])
def test_packed_weights(family: str) -> None:
    model = quantised(family)
    lm, unpacked = attach(model), attach(dense(model))
    same(whole(unpacked), whole(lm), 1e-5)
    test = lm.selftest()
    assert test.passed, test
    assert torch.allclose(lm.w_o(1), unpacked.w_o(1), atol=1e-6)
    assert lm.identity().weight_hash != unpacked.identity().weight_hash
    edit = zero("blocks.0.attn.result", heads=1)
    torch.testing.assert_close(lm.run(PROMPTS, edits=edit).logits, unpacked.run(PROMPTS, edits=edit).logits)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_no_matrix_stands_for_leave_out_what_needs_them() -> None:
    model = torch.ao.quantization.quantize_dynamic(tiny_model("llama"), {nn.Linear}, dtype=torch.qint8)
    lm = attach(model)
    with pytest.raises(CutawayError, match=r"no site 'blocks\.1\.attn\.result': .*rounds what it reads"):
        lm.run(PROMPTS, capture="blocks.1.attn.result")
    with pytest.raises(CutawayError, match="no weight matrix"):
        lm.w_o(1)
    run = lm.run(PROMPTS, capture=["blocks.*.resid_post", "blocks.*.attn.z", "blocks.*.attn.q", "blocks.*.mlp.post"])
    tokens = lm.tokens(PROMPTS)
    with torch.no_grad():
        expected = model(
            input_ids=tokens.ids, attention_mask=tokens.mask.long(), position_ids=tokens.position_ids, use_cache=False
        ).logits
    assert torch.equal(run.logits, expected)  # type: ignore[arg-type]
    assert len(lm.identity().weight_hash) == 64
    other = torch.ao.quantization.quantize_dynamic(tiny_model("llama"), {nn.Linear}, dtype=torch.qint8)
    assert attach(other).identity().weight_hash == lm.identity().weight_hash


# Mixed precision


def test_an_unembedding_in_wider_precision() -> None:
    class Wide(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.float())

    model: Any = tiny_model("llama").to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    wide = Wide(model.config.hidden_size, model.config.vocab_size, bias=False)
    wide.weight = nn.Parameter(model.lm_head.weight.float())
    model.lm_head = wide
    lm = attach(model)
    run = lm.run(PROMPTS, capture="blocks.*.resid_post")
    assert run.logits is not None
    assert run.logits.dtype == torch.float32
    assert run["blocks.1.resid_post"].dtype == torch.bfloat16
    assert lm.selftest().passed


def test_an_edit_of_a_model_with_adapters_has_its_gradient() -> None:
    lm = attach(adapted())
    run = lm.run(PROMPTS, capture=["blocks.1.attn.result", "blocks.1.attn.z"], grad=lambda logits: logits[:, -1, 5])
    w_o = lm.w_o(1)  # d result[head] -> d z[head]
    expected = torch.einsum("bphd,hed->bphe", run.grads["blocks.1.attn.result"], w_o)
    torch.testing.assert_close(run.grads["blocks.1.attn.z"], expected, rtol=1e-4, atol=1e-5)

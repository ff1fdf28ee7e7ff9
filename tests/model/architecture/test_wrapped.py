"""Wrappers of other libraries: the model inside, and weights as they act, against the libraries' own merging."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from packed import Packed4Bit
from tiny import tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from cutaway.artifacts.errors import CutawayError
from cutaway.model.architecture.wrapped import (
    device_of,
    is_plain,
    linear_map,
    named_weights,
    no_matrix,
    parameter_of,
    unwrap,
)


def adapted(configuration: Any, family: str = "llama") -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model(family), configuration).eval()
    with torch.no_grad():  # adapters that begin as nothing would hide an error
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "hada_", "vera_", "magnitude")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


TARGETS = ["q_proj", "o_proj", "down_proj"]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True, lora_alpha=3),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_an_adapters_change_is_in_the_weight(kind: str) -> None:
    """The oracle is the library's own merging of a copy."""
    model = adapted(ADAPTERS[kind]())
    merged = copy.deepcopy(model).merge_and_unload()
    layers = unwrap(model).model.layers, merged.model.layers
    for mine, whole in zip(*layers, strict=True):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"):
            projection, plain = mine.get_submodule(name), whole.get_submodule(name)
            assert is_plain(plain)
            assert is_plain(projection) == name.endswith("up_proj")
            assert no_matrix(projection) is None
            torch.testing.assert_close(linear_map(projection), plain.weight.T, rtol=1e-4, atol=1e-5)
            if not is_plain(projection):
                base = projection.base_layer.weight.T
                assert float((linear_map(projection) - base).abs().max()) > 0.01


def test_adapters_that_are_merged_disabled_or_set_aside_count_as_they_act() -> None:
    model = adapted(ADAPTERS["lora"]())
    projection = unwrap(model).model.layers[1].self_attn.o_proj
    with_it, without = linear_map(projection).clone(), projection.base_layer.weight.T.clone()
    model.merge_adapter()
    torch.testing.assert_close(linear_map(projection), with_it, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(linear_map(projection), without, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_map(projection), with_it, rtol=1e-5, atol=1e-5)


def test_conv1d_under_an_adapter() -> None:
    model = adapted(peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "gpt2")
    merged = copy.deepcopy(model).merge_and_unload()
    for mine, whole in zip(unwrap(model).transformer.h, merged.transformer.h, strict=True):
        assert isinstance(whole.attn.c_proj, Conv1D)
        torch.testing.assert_close(linear_map(mine.attn.c_attn), whole.attn.c_attn.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(linear_map(mine.attn.c_proj), whole.attn.c_proj.weight, rtol=1e-4, atol=1e-5)
        assert linear_map(whole.mlp.c_fc) is whole.mlp.c_fc.weight


def test_dropout_in_training_has_no_matrix() -> None:
    model = adapted(peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.5)).train()
    projection = unwrap(model).model.layers[0].self_attn.o_proj
    assert "eval() first" in (no_matrix(projection) or "")
    with pytest.raises(CutawayError, match="not linear while it trains"):
        linear_map(projection)
    model.eval()
    assert no_matrix(projection) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_is_what_its_module_makes_of_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = Packed4Bit(nn.Linear(16, 24, bias=False), dtype)
    assert not is_plain(packed)
    torch.testing.assert_close(linear_map(packed), packed.dense().T.to(dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_rounds_its_input_has_no_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    dynamic = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)[0]
    assert not is_plain(dynamic)
    assert "rounds what it reads" in (no_matrix(dynamic) or "")
    with pytest.raises(CutawayError, match="no weight matrix"):
        linear_map(dynamic)


def test_a_module_that_cannot_be_asked() -> None:
    class Strange(nn.Module):
        pass

    assert no_matrix(Strange()) == "Strange does not say how many numbers it reads"
    Strange.in_features = 4  # type: ignore[attr-defined]
    assert "cannot be asked" in (no_matrix(Strange()) or "")


def test_hooks_on_a_module_are_not_called_when_it_is_asked() -> None:
    packed = Packed4Bit(nn.Linear(16, 24))
    called = []
    packed.register_forward_hook(lambda *_: called.append(1))
    linear_map(packed)
    assert not called


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_are_kept_elsewhere_are_fetched(where: str, tmp_path: Any) -> None:
    model = tiny_model("llama")
    plain = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    layer: Any = model.model.layers[1]
    assert layer.self_attn.o_proj.weight.device.type == "meta"
    assert torch.equal(linear_map(layer.self_attn.o_proj), plain["model.layers.1.self_attn.o_proj.weight"].T)
    found = parameter_of(layer.input_layernorm, "weight")
    assert found is not None
    assert torch.equal(found, plain["model.layers.1.input_layernorm.weight"])
    assert parameter_of(layer.self_attn.o_proj, "bias") is None
    assert device_of(model.model.embed_tokens) == torch.device("cpu")


def test_a_tensor_of_several_parts_is_seen_in_its_parts() -> None:
    """As the tensors of quantising libraries are made; a test of weights for NaN has to look into them."""
    from torch.testing._internal.two_tensor import TwoTensor

    linear = nn.Linear(3, 4, bias=False)
    linear.weight = nn.Parameter(TwoTensor(torch.ones(4, 3), torch.zeros(4, 3)))  # type: ignore[no-untyped-call]
    found = list(named_weights(linear))
    assert [name for name, _ in found] == ["weight", "weight"]
    assert [float(part.sum()) for _, part in found] == [12.0, 0.0]
    assert not is_plain(linear)


def test_weights_that_are_nowhere() -> None:
    linear = nn.Linear(3, 4, device="meta")
    with pytest.raises(CutawayError, match="on the meta device, where there are no numbers"):
        linear_map(linear)


# The model inside


def test_the_model_inside() -> None:
    model = tiny_model("llama")
    assert unwrap(model) is model
    assert unwrap(nn.DataParallel(model)) is model
    wrapped = adapted(ADAPTERS["lora"]())
    inside = unwrap(wrapped)
    assert inside is wrapped.get_base_model()
    assert unwrap(wrapped.base_model) is inside
    assert unwrap(inside) is inside
    linear = nn.Linear(3, 3)
    assert unwrap(linear) is linear
    assert unwrap("gpt2") == "gpt2"


def test_a_compiled_model_is_run_uncompiled_and_says_so() -> None:
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="runs it uncompiled"):
        assert unwrap(torch.compile(model)) is model


def test_what_is_compiled_in_place_is_refused() -> None:
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.compile()
    with pytest.raises(CutawayError, match="the model was compiled in place"):
        unwrap(model)
    model = tiny_model("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1])  # type: ignore[index]
    with pytest.raises(CutawayError, match=r"'model\.layers\.1' was compiled in place"):
        unwrap(model)


def test_tokens_before_the_prompt_are_refused() -> None:
    model = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )  # fmt: skip
    with pytest.raises(CutawayError, match=r"adapter 'default' \(PROMPT_TUNING\) puts trained tokens before"):
        unwrap(model)

"""Scores, weights and z are those of the model's own eager kernel, bit for bit, whatever that kernel does."""

import ast
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attention_models import LAYERS, MODELS, attentions, batch, eager, everywhere, forward, look, same, small
from torch import Tensor, nn

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attention.dispatch import NAME, _mask, base_kernel, check_dispatch, private_config
from cutaway.model.attention.kernels import Watch, find_kernel
from cutaway.model.tokens import Tokens

ADAPTED = ("gptj", "codegen", "gpt_neo", "bloom", "mpt", "falcon", "falcon_alibi", "falcon_new", "xglm", "gpt2_upcast")
HALVES = {"inkling2"}  # this one does not run in short floats at all


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_patterns_are_eagers(name: str, dtype: torch.dtype, padding: str) -> None:
    if name in HALVES and dtype != torch.float32:
        return
    model = small(name, dtype=dtype)
    reference = eager(model)
    if name == "falcon_alibi":  # its eager kernel adds ALiBi twice, so the two kernels are two models
        model = reference
    tokens = batch((9,)) if padding == "none" else batch((9, 4), "left")
    with torch.no_grad():
        theirs = forward(reference, tokens, output_attentions=True)
    ours = look(model, tokens, everywhere("rot_q", "rot_k", "scores", "pattern"))
    real = tokens.mask
    assert same(ours.out.logits[real], theirs.logits[real])
    if name == "granite_swa":  # transformers returns the weights before the gate of the sinks
        return
    for layer in range(LAYERS):
        pattern = ours.values[f"blocks.{layer}.attn.pattern"].transpose(1, 2)[real]
        assert same(pattern, theirs.attentions[layer].transpose(1, 2)[real])


@pytest.mark.parametrize("name", [n for n in MODELS if n not in HALVES])
def test_half_precision_too(name: str) -> None:
    model = eager(small(name, dtype=torch.float16))
    tokens = batch((9, 4), "left")
    with torch.no_grad():
        theirs = forward(model, tokens).logits
    ours = look(model, tokens, everywhere("scores", "pattern")).out.logits
    assert same(ours, theirs)  # padded rows, which see no key at all, included


@pytest.mark.parametrize("name", ["llama", "neox", "falcon", "falcon_alibi", "deepseek_v32", "doge"])
def test_the_observed_kernel_is_close_to_sdpa(name: str) -> None:
    model = small(name)
    assert model.config._attn_implementation == "sdpa"
    for tokens in (batch((9,)), batch((9, 4), "left")):
        with torch.no_grad():
            plain = forward(model, tokens).logits
        ours = look(model, tokens, everywhere("pattern")).out.logits
        scale = float(plain[tokens.mask].abs().max())
        assert float((ours - plain)[tokens.mask].abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("name", MODELS)
def test_patterns_are_the_softmax_of_the_scores(name: str) -> None:
    """Also with sinks, whose share is missing from the rows."""
    model = small(name)
    tokens = batch((9,))
    run = look(model, tokens, everywhere("rot_q", "rot_k", "scores", "pattern"))
    for layer in range(LAYERS):
        scores, pattern = (run.values[f"blocks.{layer}.attn.{part}"].double() for part in ("scores", "pattern"))
        sinks = getattr(attentions(model)[layer], "sinks", None)
        if name == "inkling2":
            continue  # computes its sinks from the stream
        if isinstance(sinks, Tensor):
            column = sinks.detach().double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            expected = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
            assert float(pattern.sum(-1).mean()) < 0.99
        else:
            expected = scores.softmax(-1)
        assert float((pattern - expected).abs().max()) < 1e-6
        assert bool((pattern[scores == -torch.inf] == 0).all())
        above = torch.ones(9, 9, dtype=torch.bool).triu(1)
        assert bool((scores[..., above] == -torch.inf).all())


@pytest.mark.parametrize(
    ("name", "windows"),
    [("mistral", (3, 3)), ("gemma2", (3, 9)), ("gpt_oss", (3, 9)), ("gpt_neo", (9, 3)), ("llama4", (4, 4))],
)
def test_cells_outside_a_window_are_minus_infinity(name: str, windows: tuple[int, int]) -> None:
    run = look(small(name), batch((9,)), everywhere("scores"))
    for layer, window in enumerate(windows):
        found = run.values[f"blocks.{layer}.attn.scores"] > -torch.inf
        distance = torch.arange(9)[:, None] - torch.arange(9)
        seen = (distance >= 0) & (distance < window)
        if name == "llama4":  # chunks, not windows
            seen = (distance >= 0) & (torch.arange(9)[:, None] // window == torch.arange(9) // window)
        assert torch.equal(found, seen.expand_as(found))


def test_what_is_not_asked_for_stays_the_models_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's pattern: SDPA everywhere else; rotated queries alone: SDPA everywhere."""
    model, tokens, calls = small("llama"), batch((9,)), []
    own = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for sites, expected in (
        (["blocks.1.attn.pattern"], LAYERS - 1),
        (["blocks.0.attn.scores"], LAYERS - 1),
        (everywhere("rot_q", "rot_k"), LAYERS),
        (everywhere("pattern"), 0),
    ):
        calls.clear()
        look(model, tokens, sites)
        assert len(calls) == expected
    calls.clear()
    look(small("falcon"), tokens, ["blocks.1.attn.pattern"])
    assert len(calls) == LAYERS - 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_weights_are_returned_as_the_base_kernel_does_and_never_the_captured_ones(name: str) -> None:
    """SDPA returns none, so none come back; what comes back from an eager kernel may be written into by others."""
    model, tokens, returned = small(name), batch((9,)), []
    expected = look(eager(model), tokens, ["blocks.0.attn.pattern"]).values["blocks.0.attn.pattern"]
    own = attentions(model)[0].register_forward_hook(lambda _module, _args, output: returned.append(output[1]))
    run = look(model, tokens, ["blocks.0.attn.pattern", "blocks.0.attn.scores"])
    own.remove()
    if name == "llama":
        assert returned == [None]
    else:
        returned[0].zero_()
    assert same(run.values["blocks.0.attn.pattern"], expected)
    assert bool((run.values["blocks.0.attn.scores"] == -torch.inf).any())


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", *ADAPTED])
def test_cached_keys_come_in_front(name: str) -> None:
    """Five tokens, then three, then one, from a cache: each pattern is eager's, and rot_k holds all keys so far."""
    model, tokens = eager(small(name)), batch((9, 9))
    ours = theirs = None
    start = 0
    for stop in (5, 8, 9):
        part = Tokens(tokens.ids[:, start:stop], tokens.mask[:, start:stop], ((),) * 2)
        options: dict[str, Any] = {
            "use_cache": True,
            "attention_mask": torch.ones(2, stop, dtype=torch.long),
            "position_ids": torch.arange(start, stop).expand(2, -1),
        }
        with torch.no_grad():
            cache = None if theirs is None else theirs.past_key_values
            theirs = forward(model, part, past_key_values=cache, output_attentions=True, **options)
        sites = everywhere("rot_k", "rot_q", "pattern")
        run = look(model, part, sites, past_key_values=None if ours is None else ours.past_key_values, **options)
        ours = run.out
        assert same(ours.logits, theirs.logits)
        for layer in range(LAYERS):
            pattern, key, query = (run.values[f"blocks.{layer}.attn.{part}"] for part in ("pattern", "rot_k", "rot_q"))
            assert same(pattern, theirs.attentions[layer])
            assert query.shape[1] == stop - start
            assert key.shape[1] == pattern.shape[-1] <= stop
        start = stop


# What cannot be followed is refused


def module_with(eager_attention_forward: Any) -> nn.Module:
    """An attention module of a file of its own, whose eager kernel is the given one."""
    namespace: dict[str, Any] = {
        "ALL_ATTENTION_FUNCTIONS": transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS,
        "eager_attention_forward": eager_attention_forward,
        "nn": nn,
    }
    text = (
        "class Attention(nn.Module):\n"
        "    def forward(self, q, k, v, mask):\n"
        "        name = self.config._attn_implementation\n"
        "        call = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)\n"
        "        return call(self, q, k, v, mask, scaling=1.0)\n"
    )
    exec(text, namespace)
    module = namespace["Attention"]()
    module.config = small("llama").config
    return module


def plain_kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    weights = (query @ key.transpose(2, 3) * scaling + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def test_a_kernel_that_does_something_else_is_refused() -> None:
    model = small("llama")
    check_dispatch(model, module_with(plain_kernel))

    def sharper(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        return plain_kernel(module, query, key, value, mask, 1.01 * scaling)

    def temperature(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        return plain_kernel(module, query, key, value, mask, scaling * module.temperature)

    def option(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, decay: Any = None, **_: Any
    ) -> Any:
        return plain_kernel(module, query, key, value, mask, scaling)

    for kernel, reason in (
        (sharper, "none of the ways that are understood"),
        (temperature, "it reads module.temperature"),
        (option, "options that are not understood: decay"),
    ):
        with pytest.raises(CutawayError, match=f"LlamaForCausalLM is not supported: .*{reason}"):
            check_dispatch(model, module_with(kernel))
    with pytest.raises(CutawayError, match="Linear does not dispatch"):
        check_dispatch(model, nn.Linear(2, 2))


def test_an_unknown_base_kernel_runs_as_it_is_and_shows_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own attention function: what it computes inside is not known."""
    model, tokens = small("llama"), batch((9,))

    def halved(*args: Any, **kwargs: Any) -> Any:
        z, weights = eager_of("llama")(*args, **kwargs)
        return z / 2, weights

    mapping = type(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)._global_mapping
    monkeypatch.setitem(mapping, "halved", halved)
    masks = type(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping
    monkeypatch.setitem(masks, "halved", masks["eager"])
    model.config._attn_implementation = "halved"
    with torch.no_grad():
        plain = forward(model, tokens).logits
    assert same(look(model, tokens, everywhere("rot_q")).out.logits, plain)
    with pytest.raises(CutawayError, match="the attention kernel 'halved' computes is not known here"):
        look(model, tokens, everywhere("pattern"))


@pytest.mark.parametrize("base", ["eager", "sdpa", "flash_attention_2"])
def test_what_each_base_kernel_means_by_the_mask_it_is_given(base: str) -> None:
    """None is everything for eager, causal for SDPA (whose windows always come as a mask), causal in a window for
    flash; a mask a row is padding beside that.
    """
    module = attentions(small("llama"))[0]
    module.config._attn_implementation = base  # type: ignore[union-attr]
    query, key = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
    given: dict[str, Any] = {"sliding_window": 2}
    causal = torch.ones(3, 5, dtype=torch.bool).tril(2)
    found = _mask(module, None, query, key, given)
    if base == "eager":
        assert found is None
    else:
        assert found is not None
        assert torch.equal(found[0, 0], causal.triu(1) if base == "flash_attention_2" else causal)
    assert _mask(module, None, query, key, given | {"is_causal": False}) is None
    rows = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    padded = _mask(module, rows, query, key, {})
    assert padded is not None
    assert torch.equal(padded[0, 0], causal & rows[0].bool())
    both_ways = _mask(module, rows, query, key, {"is_causal": False})
    assert both_ways is not None
    assert torch.equal(both_ways.expand(2, 1, 3, 5)[0, 0], rows[0].bool().expand(3, 5))


def test_the_dtype_of_the_softmax_is_found_out() -> None:
    found = {name: find_kernel(attentions(small(name))[0], eager_of(name)) for name in ("llama", "gpt2", "gpt_oss")}
    assert found["llama"].softmax_in_float
    assert not found["gpt2"].softmax_in_float
    assert not found["gpt_oss"].softmax_in_float
    assert found["gpt_oss"].shifted
    assert found["gpt_oss"].own_sinks


def eager_of(name: str) -> Any:
    folder = MODELS[name][0]
    return importlib.import_module(f"transformers.models.{folder}.modeling_{folder}").eager_attention_forward


def test_a_trial_notices_each_property() -> None:
    """Every property of a kernel changes what the trial compares."""
    module = attentions(small("gpt_oss", dtype=torch.bfloat16))[0]
    kernel = find_kernel(module, eager_of("gpt_oss"))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 40, 12, generator=generator).bfloat16() * 3 for n in (4, 2, 2))
    outcomes = [kernel.attend(Watch(), module, query, key, value, None, scaling=0.3)[1]]
    for other in (
        replace(kernel, shifted=False),
        replace(kernel, product_in_float=True),
        replace(kernel, own_sinks=False),
        replace(kernel, sinks="gate"),
    ):
        outcomes.append(other.attend(Watch(), module, query, key, value, None, scaling=0.3)[1])
    assert all(not torch.equal(outcomes[0], other) for other in outcomes[1:])


@pytest.mark.slow
def test_every_eager_kernel_of_transformers_is_followed_or_refused() -> None:
    """By body, over all model files; what is refused is not a language model's."""
    folder = Path(transformers.__file__).parent / "models"
    bodies: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("*/modeling_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("eager_attention_forward"):
                bodies.setdefault(ast.unparse(node), (f"transformers.models.{path.parent.name}.{path.stem}", node.name))
    assert len(bodies) > 20
    refused = []
    for module_name, name in bodies.values():
        kernel = getattr(importlib.import_module(module_name), name)
        module = nn.Module()
        module.sinks = nn.Parameter(torch.ones(4))
        try:
            find_kernel(module, kernel)
        except CutawayError:
            refused.append(f"{module_name.rsplit('_', 1)[-1]}.{name}")
    assert sorted(refused) == ["llama4.vision_eager_attention_forward", "vjepa2.eager_attention_forward"]


# The private configuration


def test_a_module_sees_its_own_setting_and_our_function_is_found() -> None:
    model = small("llama")
    module = attentions(model)[0]
    config = private_config(module)
    setting = config._attn_implementation
    assert setting in ("eager", "sdpa")
    assert setting == "sdpa"
    assert setting != "eager"
    assert str.startswith(setting, "sdpa")
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    assert functions.get_interface(setting, print) is functions[NAME]
    assert functions.get_interface("sdpa", print) is not functions[NAME]
    assert model.config._attn_implementation == "sdpa"
    assert type(model.config._attn_implementation) is str
    assert base_kernel(module) is functions["sdpa"]

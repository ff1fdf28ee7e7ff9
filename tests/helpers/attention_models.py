"""Small random models for the tests of attention, and a run on them that knows nothing but where attention is."""

import copy
import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from hand_hooks import positions_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from cutaway.model.attention.dispatch import check_dispatch, switches
from cutaway.model.edits.edits import Edit
from cutaway.model.edits.resolve import resolve
from cutaway.model.forward.current import current
from cutaway.model.forward.execution import Execution
from cutaway.model.forward.shadow import shadowed
from cutaway.model.sites import KINDS, Site
from cutaway.model.tokens import Tokens, pad_rows

V, D, LAYERS, HEADS = 61, 32, 2, 4
_ENDS = {"vocab_size": V, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_PLAIN = _ENDS | {
    "hidden_size": D, "intermediate_size": 40, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_UNGROUPED = {name: value for name, value in _PLAIN.items() if name != "num_key_value_heads"}
_LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SWA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
_GPT2 = {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
_FALCON = _UNGROUPED | {"alibi": False, "multi_query": True, "parallel_attn": True, "bias": True}

# name -> module file, class, configuration
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", _PLAIN | {"head_dim": 12}),
    "mistral": ("mistral", "Mistral", _PLAIN | {"sliding_window": 3}),
    "neox": ("gpt_neox", "GPTNeoX", _UNGROUPED),
    "opt": ("opt", "OPT", _ENDS | {
        "hidden_size": D, "ffn_dim": 40, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": 64, "word_embed_proj_dim": D,
    }),
    "biogpt": ("biogpt", "BioGpt", _UNGROUPED),
    "gpt2": ("gpt2", "GPT2LMHead", _ENDS | _GPT2),
    "gpt2_upcast": ("gpt2", "GPT2LMHead", _ENDS | _GPT2 | {
        "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True, "_attn_implementation": "eager",
    }),
    "gemma2": ("gemma2", "Gemma2", _PLAIN | {
        "head_dim": 12, "sliding_window": 3, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 7,
    }),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2", _PLAIN | _LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3", _PLAIN | _LATENT),
    "deepseek_v32": ("deepseek_v32", "DeepseekV32", _PLAIN | _LATENT | {
        "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16,
    }),
    "gpt_oss": ("gpt_oss", "GptOss", _PLAIN | _EXPERTS | {"head_dim": 12, "sliding_window": 3}),
    "granite_swa": ("granite_swa", "GraniteSWA", _PLAIN | {"sliding_window": 3}),
    "flint": ("flint", "Flint", _PLAIN | _EXPERTS),
    "mimo_v2_flash": ("mimo_v2_flash", "MiMoV2Flash", _PLAIN | _ROUTED),
    "llama4": ("llama4", "Llama4", _PLAIN | _EXPERTS | {"head_dim": 8, "attention_chunk_size": 4}),
    "modernbert_decoder": ("modernbert_decoder", "ModernBertDecoder", _UNGROUPED),
    "inkling": ("inkling", "Inkling", _PLAIN | _ROUTED | _SWA),
    "inkling2": ("inkling2", "Inkling2", _PLAIN | _ROUTED | _SWA),
    "doge": ("doge", "Doge", _PLAIN),
    "gptj": ("gptj", "GPTJ", _ENDS | _GPT2 | {"rotary_dim": 4}),
    "codegen": ("codegen", "CodeGen", _ENDS | _GPT2 | {"n_ctx": 64, "rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", "GPTNeo", _ENDS | {
        "hidden_size": D, "num_layers": LAYERS, "num_heads": HEADS, "max_position_embeddings": 64, "window_size": 3,
        "attention_types": [[["global", "local"], 1]], "intermediate_size": 40,
    }),
    "bloom": ("bloom", "Bloom", _ENDS | {"hidden_size": D, "n_layer": LAYERS, "n_head": HEADS}),
    "mpt": ("mpt", "Mpt", _ENDS | {
        "d_model": D, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64,
        "attn_config": {"clip_qkv": 1.5, "alibi": True},
    }),
    "falcon": ("falcon", "Falcon", _FALCON),
    "falcon_alibi": ("falcon", "Falcon", _FALCON | {"alibi": True, "multi_query": False}),
    "falcon_new": ("falcon", "Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "xglm": ("xglm", "XGLM", _ENDS | {
        "d_model": D, "ffn_dim": 40, "num_layers": LAYERS, "attention_heads": HEADS, "max_position_embeddings": 64,
    }),
}  # fmt: skip


def small(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode, its weights strong enough for patterns to be sharp."""
    folder, prefix, settings = MODELS[name]
    settings = settings | changes
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    kind = next(
        found for tail in ("ForCausalLM", "LMHeadModel", "Model") if (found := getattr(module, prefix + tail, None))
    )
    torch.manual_seed(seed)
    own = settings.pop("_attn_implementation", None)
    config = kind.config_class(**settings)
    if own is not None:
        config._attn_implementation = own
    model = kind(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in parameter_name else D**-0.5))
    return model.to(dtype=dtype)  # type: ignore[call-arg]


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if type(module).__name__.endswith("Attention") and not inside:
            found.append((name, module))
    assert len(found) == LAYERS
    return [module for _, module in found]


def batch(lengths: Sequence[int] = (9,), side: str = "right", seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, V, (n,), generator=generator).tolist() for n in lengths]
    ids, mask = pad_rows(rows, 1, side)
    return Tokens(ids, mask, tuple(tuple(str(i) for i in row) for row in rows))


def forward(model: nn.Module, tokens: Tokens, **options: Any) -> Any:
    """The call of transformers that cutaway makes."""
    mask = tokens.mask
    given = {"attention_mask": mask.long(), "position_ids": positions_of(mask), "use_cache": False}
    return model(input_ids=tokens.ids, **(given | options))


def site(model: PreTrainedModel, name: str) -> Site:
    """A site of attention as the model's table would have it."""
    config: Any = model.config
    kind = KINDS[name.replace(f"blocks.{name.split('.')[1]}.", "blocks.{l}.")]
    n_heads = HEADS
    grouped = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or n_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        grouped = 1
    sizes = {"H": n_heads, "KV": grouped}
    return Site(name, kind, int(name.split(".")[1]), tuple(sizes.get(part, part) for part in kind.dims.split()))


@contextmanager
def observing(execution: Execution, modules: Sequence[nn.Module], layers: Sequence[int]) -> Iterator[None]:
    """What an execution does around a forward, for these layers' attention alone."""
    with ExitStack() as stack:
        for layer in layers:
            for module, attribute, make in switches(modules[layer]):
                execution.attention_layers[id(module)] = layer
                stack.enter_context(shadowed(module, attribute, make))
        token = current.set(execution)
        stack.callback(current.reset, token)
        yield


def look(
    model: PreTrainedModel,
    tokens: Tokens,
    capture: Sequence[str] = (),
    edits: Sequence[Edit] = (),
    *,
    gradients: bool = False,
    **options: Any,
) -> SimpleNamespace:
    """A forward with these sites of attention captured or edited: `values`, `out`, `execution`."""
    modules = attentions(model)
    resolved = [resolve(i, edit, site(model, edit.site), tokens) for i, edit in enumerate(edits)]
    execution = Execution(SimpleNamespace(ropes=None), capture, resolved, tokens.mask, gradients=gradients)  # type: ignore[arg-type]
    layers = sorted({int(name.split(".")[1]) for name in [*capture, *(edit.site for edit in edits)]})
    for layer in layers:
        check_dispatch(model, modules[layer])
    with observing(execution, modules, layers), torch.set_grad_enabled(gradients):
        out = forward(model, tokens, **options)
    return SimpleNamespace(values=execution.values, out=out, execution=execution)


def everywhere(*parts: str) -> list[str]:
    return [f"blocks.{layer}.attn.{part}" for layer in range(LAYERS) for part in parts]


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights and a configuration of their own, with eager attention."""
    other = copy.deepcopy(model)
    if other.config._attn_implementation != "eager":
        other.set_attn_implementation("eager")
        other.config._attn_implementation = "eager"  # Falcon refuses to change, but its modules read this
    return other


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)

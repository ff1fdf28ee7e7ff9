"""Weights under TransformerLens' names: the model they make is the equation of its papers, written out."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import attach
from cutaway.model.own.weights import from_weights

V_IN, V_OUT, D, H, WIDTH, M, CONTEXT = 12, 10, 16, 4, 3, 20, 9


def weights_of(layers: int = 2, kv: int = H, norms: str = "wb", **changes: Tensor | None) -> dict[str, Tensor]:
    """A random dictionary; `norms` says which weights norms have, a change to None leaves a weight out."""
    generator = torch.Generator().manual_seed(1)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5

    found = {"embed.W_E": made(V_IN, D), "pos_embed.W_pos": made(CONTEXT, D)}
    for layer in range(layers):
        at = f"blocks.{layer}."
        found |= {f"{at}attn.W_Q": made(H, D, WIDTH), f"{at}attn.b_Q": made(H, WIDTH)}
        for part in "KV":
            under = "_" if kv != H else ""
            found |= {f"{at}attn.{under}W_{part}": made(kv, D, WIDTH), f"{at}attn.{under}b_{part}": made(kv, WIDTH)}
        found |= {f"{at}attn.W_O": made(H, WIDTH, D), f"{at}attn.b_O": made(D)}
        found |= {f"{at}attn.mask": torch.ones(CONTEXT, CONTEXT).tril().bool(), f"{at}attn.IGNORE": torch.tensor(-1e5)}
        found |= {f"{at}mlp.W_in": made(D, M), f"{at}mlp.b_in": made(M), f"{at}mlp.W_out": made(M, D)}
        found |= {f"{at}mlp.b_out": made(D)}
        found |= {f"{at}{name}.{end}": made(D) for name in ("ln1", "ln2") for end in norms}
    found |= {f"ln_final.{end}": made(D) for end in norms}
    found |= {"unembed.W_U": made(D, V_OUT), "unembed.b_U": made(V_OUT)}
    for name, value in changes.items():
        full = name.replace("__", ".")
        if value is None:
            del found[full]
        else:
            found[full] = value
    return found


def by_hand(w: dict[str, Tensor], ids: Tensor, norm: str, act: Any, causal: bool = True, eps: float = 1e-5) -> Tensor:
    """Logits [b, p, V], head by head."""

    def normed(x: Tensor, name: str) -> Tensor:
        if norm == "none":
            return x
        x = x - x.mean(-1, keepdim=True) if norm.startswith("LN") else x
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return x * w.get(f"{name}.w", torch.ones(D)) + w.get(f"{name}.b", torch.zeros(D))

    x = w["embed.W_E"][ids] + w["pos_embed.W_pos"][: ids.shape[1]]
    for layer in range(2):
        at = f"blocks.{layer}."
        a, written = normed(x, f"{at}ln1"), w[f"{at}attn.b_O"]
        for head in range(H):
            kv = {part: w.get(f"{at}attn.W_{part}", w.get(f"{at}attn._W_{part}")) for part in "KV"}
            shared = head * len(kv["K"]) // H  # type: ignore[arg-type]
            q = a @ w[f"{at}attn.W_Q"][head] + w[f"{at}attn.b_Q"][head]
            k, v = (
                a @ kv[part][shared]  # type: ignore[index]
                + w.get(f"{at}attn.b_{part}", w.get(f"{at}attn._b_{part}"))[shared]  # type: ignore[index]
                for part in "KV"
            )
            scores = q @ k.mT / math.sqrt(WIDTH)
            if causal:
                scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf)
            written = written + scores.softmax(-1) @ v @ w[f"{at}attn.W_O"][head]
        x = x + written
        if f"{at}mlp.W_in" in w:
            m = normed(x, f"{at}ln2")
            hidden = m @ w[f"{at}mlp.W_in"] + w[f"{at}mlp.b_in"]
            gate = w.get(f"{at}mlp.W_gate")
            hidden = act(hidden) if gate is None else act(m @ gate) * hidden
            x = x + hidden @ w[f"{at}mlp.W_out"] + w[f"{at}mlp.b_out"]
    return normed(x, "ln_final") @ w["unembed.W_U"] + w["unembed.b_U"]


GATES: dict[str, Any] = {f"blocks__{layer}__mlp__W_gate": torch.randn(D, M, dtype=torch.float64) for layer in range(2)}
NO_MLP: dict[str, Any] = {f"blocks__{i}__mlp__{n}": None for i in range(2) for n in ("W_in", "b_in", "W_out", "b_out")}


@pytest.mark.parametrize(
    ("weights", "norm", "options"),
    [
        (weights_of(), "LN", {"act_fn": "gelu_new"}),
        (weights_of(norms=""), "none", {"act_fn": "relu"}),
        (weights_of(norms=""), "LNPre", {"act_fn": "gelu", "normalization_type": "LNPre"}),
        (weights_of(norms=""), "RMSPre", {"act_fn": "silu", "normalization_type": "RMSPre", "eps": 1e-3}),
        (weights_of(norms="w", kv=2, **GATES), "RMS", {"act_fn": "silu"}),
        (weights_of(norms="", **NO_MLP), "none", {}),
        (weights_of(), "LN", {"attention_dir": "bidirectional"}),
    ],
)
def test_the_model_is_the_equation(weights: dict[str, Tensor], norm: str, options: dict[str, Any]) -> None:
    acts = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}
    module, description = from_weights(weights, **options)
    ids = torch.randint(0, V_IN, (3, CONTEXT), generator=torch.Generator().manual_seed(2))
    causal = options.get("attention_dir") != "bidirectional"
    act = acts[options.get("act_fn", "gelu_new")]
    wanted = by_hand(weights, ids, norm, act, causal, options.get("eps", 1e-5))
    with torch.no_grad():
        torch.testing.assert_close(module(ids), wanted, rtol=1e-6, atol=1e-7)
    lm = attach(module, description=description)  # with its self-test
    assert (lm.d_vocab_in, lm.d_vocab, lm.context_length) == (V_IN, V_OUT, CONTEXT)
    torch.testing.assert_close(lm.w_q(1), weights["blocks.1.attn.W_Q"])
    torch.testing.assert_close(lm.w_o(1), weights["blocks.1.attn.W_O"])
    assert lm.run(ids[:, :1], capture="blocks.0.hook_resid_pre")["blocks.0.resid_pre"].shape == (3, 1, D)


@pytest.mark.parametrize(
    ("weights", "options", "says"),
    [
        (weights_of(embed__W_E=None), {}, "it has no W_E"),
        (weights_of(blocks__1__attn__W_O=None), {}, "it has no blocks.1.attn.W_O"),
        (weights_of(blocks__0__mlp__W_out=None), {}, "one of blocks.0.mlp.W_in and blocks.0.mlp.W_out"),
        (weights_of(blocks__0__attn__rotary_sin=torch.ones(3)), {}, "rotary_sin is none of the names that are known"),
        (weights_of(blocks__0__attn__W_Q=torch.ones(3, 4)), {}, "has the shape [3, 4], and 3 dimensions are wanted"),
        (weights_of(blocks__0__attn__b_O=torch.ones(3).double()), {}, "a bias of 3 numbers"),
        (weights_of(W_U=torch.ones(D, V_OUT)), {}, "W_U is there twice"),
        (weights_of(pos_embed__W_pos=None), {}, "say how many tokens it reads: n_ctx="),
        (weights_of(blocks__3__attn__W_Q=torch.ones(H, D, WIDTH)), {}, "numbered [0, 1, 3]"),
        (weights_of(), {"act_fn": "solu"}, "act_fn is one of relu"),
        (weights_of(), {"attention_dir": "both"}, "attention_dir is 'causal' or"),
        ([1], {}, "they are a dict of tensors by name, not a list"),
    ],
)
def test_other_dictionaries_are_refused(weights: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(CutawayError, match=r"docs/your-own-model\.md") as error:
        from_weights(weights, **options)
    assert says in str(error.value)

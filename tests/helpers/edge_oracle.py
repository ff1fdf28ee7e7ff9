"""The graph's semantics as slowly and plainly as they can be said, with a number alpha on every edge.

Every destination reads its own stream: x + Σ_u alpha[u, v] · (other_u − current_u). Each head's query, key and value is
computed by calling the model's own norm and projection on its stream, one destination at a time. alpha is a tensor, so
that a gradient with respect to it can be taken.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cutaway.causal.edge_graph import EdgeGraph
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens


def run(
    lm: LanguageModel, graph: EdgeGraph, tokens: Tokens, alpha: Tensor | None, other: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Logits at the last position [b, V] and what every source wrote, [b, p, d] each. alpha [F, G] or [p, F, G]."""
    current: list[Tensor] = []
    busy = [False]
    handles = []
    stream: list[Tensor] = []

    def seen(x: Tensor, column: int, n: int) -> Tensor:
        if alpha is None:
            return x
        assert other is not None
        moved: dict[int, Tensor] = {}  # what heads in front of a norm change together, by layer
        for u in range(n):
            layer = (u - 1) // (graph.n_heads + 1)
            post = u > 0 and u != graph.mlp_source(layer) and lm.family.layers[layer].ln1_post is not None
            a = alpha[..., u, column]
            a = a[None, :, None] if a.ndim else a
            change = a * (other[u] - current[u])
            if post:
                moved[layer] = moved.get(layer, torch.zeros(())) + change
            else:
                x = x + change
        for layer, change in moved.items():
            parts = lm.family.layers[layer]
            heads = torch.stack(current[graph.head_sources(layer)]).sum(0)
            bias = getattr(parts.output, "bias", None)
            heads = heads if bias is None else heads + bias
            assert parts.ln1_post is not None
            norm = parts.ln1_post.module
            before, busy[0] = busy[0], True
            x = x + (norm(heads + change) - norm(heads)) * parts.attn_multiplier
            busy[0] = before
        return x

    def before(module: Any, change: Callable[[Tensor], Tensor]) -> None:
        def hook(_m: Any, args: Any, kwargs: Any) -> Any:
            if busy[0]:
                return None
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    for index, layer in enumerate(lm.family.layers):

        def on_input(x: Tensor, index: int = index) -> Tensor:
            stream[:] = [x]
            if index == 0:
                current.append(x)
            return x

        before(layer.module, on_input)
        for projection in layer.projections:

            def on_projection(_m: Any, _a: Any, y: Any, projection: Any = projection, index: int = index) -> Any:
                if busy[0]:
                    return None
                ln1 = lm.family.layers[index].ln1
                first = graph.attention_destinations(index).start
                starts = {"q": first, "k": first + graph.n_heads, "v": first + graph.n_heads + graph.kv}
                n = graph.before_attention(index)
                busy[0] = True
                parts = {}
                for part in projection.parts:
                    heads = []
                    for head in range(graph.n_heads if part == "q" else graph.kv):
                        x = seen(stream[0], starts[part] + head, n)
                        x = x if ln1 is None else ln1.module(x)
                        heads.append(projection.split(projection.module(x))[part][..., head, :])
                    parts[part] = torch.stack(heads, -2)
                busy[0] = False
                return projection.join(parts, y)

            handles.append(projection.module.register_forward_hook(on_projection))

        def on_z(z: Tensor, index: int = index, layer: Any = layer) -> Tensor:
            heads = torch.einsum("bphe,hed->hbpd", z.unflatten(-1, (lm.n_heads, -1)), lm.w_o(index))
            current.extend(heads if layer.ln1_post is not None else heads * layer.attn_multiplier)
            return z

        before(layer.output, on_z)
        reader = layer.mlp if layer.ln2 is None else layer.ln2.module

        def on_mlp(x: Tensor, index: int = index, layer: Any = layer) -> Tensor:
            column, n = graph.mlp_destination(index), graph.before_mlp(index)
            if layer.ln2 is None and lm.family.parallel:
                if alpha is None:
                    return x
                busy[0] = True
                y = layer.ln1.module(seen(stream[0], column, n))
                busy[0] = False
                return y
            return seen(x.view(stream[0].shape), column, n).view(x.shape)

        before(reader, on_mlp)

        def on_mlp_out(_m: Any, _a: Any, out: Any, layer: Any = layer) -> None:
            written = out[0] if isinstance(out, tuple) else out
            current.append(written.view(stream[0].shape) * layer.mlp_multiplier)

        handles.append(layer.mlp_writer.register_forward_hook(on_mlp_out))
    assert lm.family.ln_final is not None
    before(lm.family.ln_final.module, lambda x: seen(x, graph.n_destinations - 1, graph.n_sources))
    try:
        logits = lm.hf(
            input_ids=tokens.ids,
            attention_mask=tokens.mask.long(),
            position_ids=tokens.position_ids,
            use_cache=False,
        ).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits[torch.arange(len(logits)), tokens.last], current

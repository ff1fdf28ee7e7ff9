"""Where each site is found in a running model: forward hooks on the modules around it, only where a run asks.

Sites that no module returns are computed beside it. An edit there has its true effect: on `resid_mid` as a delta on
what attention writes, on a scale or a normalised value by computing the norm's output again, on one head's result as
a delta on the output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cutaway.model.families import Layer, Norm, weight_matrix

if TYPE_CHECKING:
    from cutaway.model.execution import Execution

OnOutput = Callable[[Tensor], Tensor]


class _Installer:
    def __init__(self, execution: Execution) -> None:
        self.ex = execution
        self.handles: list[RemovableHandle] = []
        self.stream: dict[int, Tensor] = {}  # each layer's input, kept while its resid_mid is edited

    def mine(self) -> bool:
        from cutaway.model.execution import active

        return active() is self.ex

    def before(self, module: nn.Module, change: OnOutput) -> None:
        """`change` sees, and may replace, the module's first argument (or its hidden_states)."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.mine():
                return None
            if args:
                new = change(args[0])
                return None if new is args[0] else ((new, *args[1:]), kwargs)
            old = kwargs["hidden_states"]
            new = change(old)
            return None if new is old else (args, {**kwargs, "hidden_states": new})

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, change: OnOutput) -> None:
        """`change` sees, and may replace, what the module returns (the first item of a tuple)."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not self.mine():
                return None
            if isinstance(output, tuple):
                new = change(output[0])
                return None if new is output[0] else (new, *output[1:])
            new = change(output)
            return None if new is output else new

        self.handles.append(module.register_forward_hook(hook))

    def at(self, name: str) -> OnOutput:
        return lambda value: self.ex.touch(name, value)

    def norm(self, norm: Norm, prefix: str) -> None:
        ex, scale_name, value_name = self.ex, f"{prefix}.scale", f"{prefix}.normalized"
        if not ex.wants(scale_name, value_name):
            return

        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self.mine():
                return None
            wide, scale = norm.divide(args[0])
            live = ex.live(scale_name, value_name)
            scale = ex.touch(scale_name, scale)
            normalized = ex.touch(value_name, wide / scale)
            return norm.gain(normalized, output.dtype) if live else None

        self.handles.append(norm.module.register_forward_hook(hook))

    def heads(self, module: nn.Module, name: str, n: int) -> None:
        """A projection whose output [b p n*h] is a site by head."""
        if self.ex.wants(name):

            def change(y: Tensor) -> Tensor:
                new = self.ex.touch(name, y.unflatten(-1, (n, -1)))
                return new.flatten(-2) if self.ex.live(name) else y

            self.after(module, change)

    def attention(self, layer: Layer, prefix: str) -> None:
        ex, family = self.ex, self.ex.lm.family
        if ex.wants(f"{prefix}.in"):
            self.before(layer.attention, self.at(f"{prefix}.in"))
        names = {part: f"{prefix}.{part}" for part in ("q", "k", "v")}
        projections = layer.projections
        if projections.split is None:
            for part, name in names.items():
                self.heads(projections.modules[part], name, family.n_heads if part == "q" else family.n_kv_heads)
        elif ex.wants(*names.values()):
            split, join = projections.split, projections.join
            assert join is not None

            def change(y: Tensor) -> Tensor:
                parts = {part: ex.touch(names[part], value) for part, value in split(y).items()}
                return join(parts) if ex.live(*names.values()) else y

            self.after(projections.modules["qkv"], change)
        z_name, result_name = f"{prefix}.z", f"{prefix}.result"
        if ex.wants(z_name, result_name):
            z_now: list[Tensor] = []

            def on_z(flat: Tensor) -> Tensor:
                z = flat.unflatten(-1, (family.n_heads, -1))
                new = ex.touch(z_name, z)
                if ex.wants(result_name):
                    z_now[:] = [new]
                return new.flatten(-2) if ex.live(z_name) else flat

            self.before(layer.output, on_z)
            if ex.wants(result_name):
                self.after(layer.output, lambda y: self.result(layer, result_name, z_now.pop(), y))

    def result(self, layer: Layer, name: str, z: Tensor, written: Tensor) -> Tensor:
        """z [b p H h] times W_O by head; what was written [b p d] moves by the change of the sum over heads."""
        w_o = weight_matrix(layer.output).unflatten(0, (self.ex.lm.family.n_heads, -1))
        result = torch.einsum("bphe,hed->bphd", z, w_o)
        new = self.ex.touch(name, result)
        if not self.ex.live(name):
            return written
        if self.ex.gradients:  # the result itself has to be in the graph
            bias = layer.output.bias
            return new.sum(2) + bias if isinstance(bias, Tensor) else new.sum(2)
        return written + (new - result).sum(2)

    def mlp(self, layer: Layer, prefix: str) -> None:
        ex = self.ex
        if ex.wants(f"{prefix}.in"):
            self.before(layer.mlp, self.at(f"{prefix}.in"))
        if ex.wants(f"{prefix}.pre"):
            self.after(layer.mlp_in, self.at(f"{prefix}.pre"))
        if layer.mlp_linear is not None and ex.wants(f"{prefix}.pre_linear"):
            self.after(layer.mlp_linear, self.at(f"{prefix}.pre_linear"))
        if ex.wants(f"{prefix}.post"):
            self.before(layer.mlp_out, self.at(f"{prefix}.post"))

    def block(self, index: int, layer: Layer) -> None:
        ex, prefix = self.ex, f"blocks.{index}"
        pre, mid, post = (f"{prefix}.resid_{s}" for s in ("pre", "mid", "post"))
        if ex.wants(pre) or ex.editing(mid):

            def on_input(x: Tensor) -> Tensor:
                x = ex.touch(pre, x)
                if ex.editing(mid):
                    self.stream[index] = x
                return x

            self.before(layer.module, on_input)
        self.norm(layer.ln1, f"{prefix}.ln1")
        self.attention(layer, f"{prefix}.attn")
        if layer.ln1_post is not None:
            self.norm(layer.ln1_post, f"{prefix}.ln1_post")
        if ex.wants(f"{prefix}.attn.out") or ex.editing(mid):

            def on_write(out: Tensor) -> Tensor:
                out = ex.touch(f"{prefix}.attn.out", out)
                if ex.editing(mid):
                    stream = self.stream.pop(index)
                    before = stream + out
                    after = ex.edit(mid, before)
                    if ex.gradients:
                        return out + (after - before)
                    # what makes the sum come out right even where it is zero, which the next norm would blow up
                    return torch.where(after == before, out, after - stream)
                return out

            self.after(layer.attention_writer, on_write)
        if mid in ex.capture:
            self.before(layer.ln2.module, lambda x: ex.record(mid, x))
        self.norm(layer.ln2, f"{prefix}.ln2")
        self.mlp(layer, f"{prefix}.mlp")
        if layer.ln2_post is not None:
            self.norm(layer.ln2_post, f"{prefix}.ln2_post")
        if ex.wants(f"{prefix}.mlp.out"):
            self.after(layer.mlp_writer, self.at(f"{prefix}.mlp.out"))
        if ex.wants(post):
            self.after(layer.module, self.at(post))

    def ends(self) -> None:
        ex, family = self.ex, self.ex.lm.family
        if ex.gradients and ex.resumed is None:
            self.after(family.embed, lambda x: x.detach().requires_grad_())
        if family.pos_embed is not None:
            if ex.wants("embed"):
                self.after(family.embed, self.at("embed"))
            if ex.wants("pos_embed"):

                def on_positions(x: Tensor) -> Tensor:
                    if ex.gradients:
                        x = x.detach().requires_grad_()
                    return ex.touch("pos_embed", x.expand(ex.mask.shape[0], -1, -1) if len(x) == 1 else x)

                self.after(family.pos_embed, on_positions)
        elif ex.wants("embed"):
            self.before(family.layers[0].module, self.at("embed"))
        if ex.resumed is not None:
            start = ex.resumed.requires_grad_() if ex.gradients else ex.resumed
            self.before(family.layers[ex.first_layer].module, lambda _: start)

    def finish(self) -> None:
        ex, family = self.ex, self.ex.lm.family
        self.norm(family.ln_final, "ln_final")
        if ex.last_only:
            first = ex.mask.int().argmax(1)
            last = first + ex.mask.sum(1) - 1

            def keep_last(x: Tensor) -> Tensor:
                return x[torch.arange(len(x), device=x.device), last.to(x.device)][:, None]

            self.before(family.unembed, keep_last)
        if family.final_softcap is not None and ex.wants("logits_precap"):
            self.after(family.unembed, self.at("logits_precap"))


def install(execution: Execution) -> list[RemovableHandle]:
    """Register the hooks that an execution needs, in the order in which a forward reaches their sites."""
    installer = _Installer(execution)
    try:
        installer.ends()
        for index, layer in enumerate(execution.lm.family.layers):
            if index >= execution.first_layer:
                installer.block(index, layer)
        installer.finish()
    except BaseException:
        for handle in installer.handles:
            handle.remove()
        raise
    return installer.handles

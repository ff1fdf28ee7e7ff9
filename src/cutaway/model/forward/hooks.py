"""Where each site is found in a running model: forward hooks on the modules around it, only where a run asks.

Sites that no module returns are computed beside it. An edit there has its true effect: on `resid_mid` as a delta on
what attention writes, on a scale or a normalised value by computing the norm's output again, on one head's result as
a delta on the output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cutaway.model.architecture.experts import OnFirstLinear, wanted_experts
from cutaway.model.architecture.families import Family
from cutaway.model.architecture.norms import Norm
from cutaway.model.architecture.parts import Experts, Layer, Projection, weight_matrix
from cutaway.model.architecture.wrapped import bias_of, innermost
from cutaway.model.forward.current import Observation, active, current
from cutaway.model.forward.shadow import shadowed

OnOutput = Callable[[Tensor], Tensor]
Change = Callable[[Tensor], Tensor | None]
Inside = Callable[[OnOutput], AbstractContextManager[Any]]


def input_name(kwargs: dict[str, Any]) -> str:
    """What a module that is given no positional argument calls its input."""
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


def on_input(module: nn.Module, mine: Observation, change: Change) -> RemovableHandle:
    """In one observed call `change` sees a module's first argument, or its hidden_states, and returns what stands in
    its place (or None).
    """

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if current.get() is not mine:
            return None
        name = "" if args else input_name(kwargs)
        old = args[0] if args else kwargs[name]
        new = change(old)
        if new is None or new is old:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: nn.Module, mine: Observation, change: Change) -> RemovableHandle:
    """In one observed call `change` sees what a module returns (the first item of a tuple), and returns what stands in
    its place (or None).
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if current.get() is not mine:
            return None
        old = output[0] if isinstance(output, tuple) else output
        new = change(old)
        if new is None or new is old:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(hook)


class Hooks:
    """Hooks noted one by one and given to an execution as `watch`, which makes them its own."""

    def __init__(self) -> None:
        self._made: list[Callable[[Observation], RemovableHandle]] = []

    def before(self, module: nn.Module, change: Change) -> None:
        """See `on_input`."""
        self._made.append(lambda mine: on_input(module, mine, change))

    def after(self, module: nn.Module, change: Change) -> None:
        """See `on_output`."""
        self._made.append(lambda mine: on_output(module, mine, change))

    def __call__(self, execution: Observation) -> Iterable[RemovableHandle]:
        return [make(execution) for make in self._made]


class Installer:
    """Registers the hooks of one observed call, site by site."""

    def __init__(self, execution: Observation, family: Family) -> None:
        self.ex = execution
        self.family = family
        self.handles: list[RemovableHandle] = []
        self.shadows = ExitStack()
        self.stream: dict[int, Tensor] = {}  # each layer's input, kept while its resid_mid is edited

    def mine(self) -> bool:
        return current.get() is self.ex

    def read(self, module: nn.Module, name: str) -> None:
        """Capture what a module returns, where it is neither edited nor in a graph."""
        ex = self.ex

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if current.get() is ex:
                ex.record(name, output[0] if isinstance(output, tuple) else output)

        self.handles.append(module.register_forward_hook(hook))

    def before(self, module: nn.Module, change: Change) -> None:
        """`change` sees, and may replace, the module's first argument (or its hidden_states)."""
        self.handles.append(on_input(module, self.ex, change))

    def after(self, module: nn.Module, change: Change) -> None:
        """`change` sees, and may replace, what the module returns (the first item of a tuple)."""
        self.handles.append(on_output(module, self.ex, change))

    def rows(self, x: Tensor) -> Tensor:
        """[b p n], also where a module was given all tokens in one dimension."""
        return x.view(self.ex.mask.shape[0], -1, x.shape[-1]) if x.ndim == 2 else x

    def at(self, name: str, multiplier: float = 1.0) -> OnOutput:
        """Touch a value as it is, or times a multiplier that the model applies later."""

        def change(value: Tensor) -> Tensor:
            x = self.rows(value)
            scaled = x * multiplier if multiplier != 1.0 else x
            asked = self.ex.gradients and name in self.ex.capture
            if asked:  # a step of its own in the graph: others may read this tensor too, or write into it
                scaled = scaled.clone()
            new = self.ex.touch(name, scaled)
            if new is scaled and not asked:
                return value
            if multiplier != 1.0:
                new = new / multiplier
            elif asked:
                new = new.clone()
            return new.reshape(value.shape)

        return change

    def wrap(self, module: nn.Module, change: OnOutput, inside: Inside) -> None:
        """Run the module's forward in `inside(change)`, in this execution alone."""
        original = module.forward

        def make() -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                execution = active()
                mine = None if execution is None else execution.wrapped.get(id(module))
                if mine is None:
                    return original(*args, **kwargs)
                with inside(mine):
                    return original(*args, **kwargs)

            return forward

        self.ex.wrapped[id(module)] = change
        self.shadows.enter_context(shadowed(module, "forward", make))

    def norm(self, norm: Norm, prefix: str) -> None:
        ex, scale_name, value_name = self.ex, f"{prefix}.scale", f"{prefix}.normalized"
        if not ex.wants(scale_name, value_name):
            return

        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self.mine():
                return None
            wide, scale = norm.divide(self.rows(args[0]))
            live = ex.live(scale_name, value_name)
            scale = ex.touch(scale_name, scale)
            normalized = ex.touch(value_name, wide / scale)
            return norm.gain(normalized, output.dtype).view(output.shape) if live else None

        self.handles.append(norm.module.register_forward_hook(hook))

    def project(self, projection: Projection, prefix: str) -> None:
        """A projection whose output holds queries, keys or values by head."""
        names = {part: f"{prefix}.{part}" for part in projection.parts}
        if not self.ex.wants(*names.values()):
            return

        def change(y: Tensor) -> Tensor:
            parts = {part: self.ex.touch(names[part], value) for part, value in projection.split(y).items()}
            if not self.ex.live(*names.values()):
                return y
            joined = projection.join(parts, y)
            return joined.clone() if self.ex.gradients else joined

        self.after(projection.module, change)

    def attention(self, layer: Layer, prefix: str) -> None:
        ex, family = self.ex, self.family
        if ex.wants(f"{prefix}.in"):
            self.before(layer.attention, self.at(f"{prefix}.in"))
        for projection in layer.projections:
            self.project(projection, prefix)
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
        w_o = weight_matrix(layer.output).unflatten(0, (self.family.n_heads, -1))
        result = torch.einsum("bphe,hed->bphd", z, w_o)
        new = self.ex.touch(name, result)
        if not self.ex.live(name):
            return written
        if self.ex.gradients:  # the result itself has to be in the graph
            bias = bias_of(layer.output)
            return new.sum(2) if bias is None else new.sum(2) + bias
        return written + (new - result).sum(2)

    def mlp(self, layer: Layer, prefix: str) -> None:
        ex = self.ex
        pre, linear = f"{prefix}.pre", f"{prefix}.pre_linear"
        if ex.wants(f"{prefix}.in"):
            self.before(layer.mlp, self.at(f"{prefix}.in"))
        if layer.experts is not None:
            self.experts(layer.experts, prefix)
            return
        assert layer.mlp_in is not None
        assert layer.mlp_out is not None
        if layer.mlp_fused and ex.wants(pre, linear):

            def on_both(y: Tensor) -> Tensor:
                halves = [ex.touch(name, half) for name, half in zip((pre, linear), y.chunk(2, -1), strict=True)]
                return torch.cat(halves, -1) if ex.live(pre, linear) else y

            self.after(layer.mlp_in, on_both)
        elif not layer.mlp_fused:
            if ex.wants(pre):
                self.after(layer.mlp_in, self.at(pre))
            if layer.mlp_linear is not None and ex.wants(linear):
                self.after(layer.mlp_linear, self.at(linear))
        if ex.wants(f"{prefix}.post"):
            self.before(layer.mlp_out, self.at(f"{prefix}.post"))

    def router(self, router: nn.Module, name: str) -> None:
        """What the router's linear map gives, with what an adapter on it adds.

        An adapter on the router's weight makes products of its own before the router runs; one on a linear module of it
        adds to what that module gives.
        """
        own = router
        while hasattr(own, "parameter_name") and isinstance(inner := own._modules.get("base_layer"), nn.Module):
            own = inner
        adapted = next((m for m in own.modules() if innermost(m) is not m), None)
        if adapted is not None:
            self.after(adapted, self.at(name))
        else:
            self.wrap(own, self.at(name), OnFirstLinear)

    def experts(self, experts: Experts, prefix: str) -> None:
        """Register what the sites of one mixture need."""
        ex = self.ex
        logits, weights = f"{prefix}.router.logits", f"{prefix}.router.weights"
        if ex.wants(logits):
            self.router(experts.router, logits)
        chosen = wanted_experts({*ex.capture, *ex.edits}, prefix)
        if not chosen and not ex.wants(weights):
            return
        module, given = experts.module, list[tuple[Tensor, ...]]()

        def on_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.mine():
                return None
            x, *routing = (*args, *kwargs.values())
            index, weight = sorted(routing, key=lambda t: t.is_floating_point())
            if ex.wants(weights):
                dense = torch.zeros(len(x), experts.n, dtype=weight.dtype, device=weight.device)
                dense = dense.scatter_add(1, index, weight)
                new = ex.touch(weights, self.rows(dense))
                if ex.live(weights):  # then every expert may have a weight
                    weight = new.view(dense.shape)
                    index = torch.arange(experts.n, device=index.device).expand(len(x), -1)
            given[:] = [(x, index, weight)]
            return (x, index, weight), {}

        def on_return(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            if not self.mine():
                return None
            x, index, weight = given.pop()
            changed = output
            for e in chosen:
                name = f"{prefix}.experts.{e}.out"
                mine = (index == e) & (weight != 0)
                tokens = mine.any(-1)
                alone = torch.zeros_like(output)
                if bool(tokens.any()):
                    part = module.forward(x[tokens], index[tokens], weight[tokens].where(mine[tokens], 0.0))
                    alone = alone.index_put((tokens.nonzero()[:, 0],), part.to(alone.dtype))
                value = self.rows(alone)
                if ex.gradients:  # a step of its own in the graph, also of an expert that no token chose
                    value = value.clone() if value.requires_grad else value.requires_grad_()
                new = ex.touch(name, value)
                if ex.gradients and name in ex.capture:
                    changed = changed - alone + new.view(output.shape)
                elif new is not value:
                    changed = changed + (new - value).view(output.shape)
            return None if changed is output else changed

        self.handles.append(module.register_forward_pre_hook(on_call, with_kwargs=True))
        self.handles.append(module.register_forward_hook(on_return))

    def block(self, index: int, layer: Layer) -> None:
        ex, prefix = self.ex, f"blocks.{index}"
        pre, mid, post = (f"{prefix}.resid_{s}" for s in ("pre", "mid", "post"))
        asked = ex.asked.get(index, 0)
        if asked == ex.wants(pre) + ex.wants(post):  # nothing inside the layer: its ends, and no look at the rest
            if ex.wants(pre):
                self.before(layer.module, self.at(pre))
            if ex.live(post):
                self.after(layer.module, self.at(post))
            elif ex.wants(post):
                self.read(layer.module, post)
            return
        if ex.wants(pre) or ex.editing(mid):

            def on_input(x: Tensor) -> Tensor:
                x = ex.touch(pre, x)
                if ex.editing(mid):
                    self.stream[index] = x
                return x

            self.before(layer.module, on_input)
        if layer.ln1 is not None:
            self.norm(layer.ln1, f"{prefix}.ln1")
        self.attention(layer, f"{prefix}.attn")
        if layer.ln1_post is not None:
            self.norm(layer.ln1_post, f"{prefix}.ln1_post")
        if ex.wants(f"{prefix}.attn.out") or ex.editing(mid):
            write, times = self.at(f"{prefix}.attn.out", layer.attn_multiplier), layer.attn_multiplier

            def on_write(out: Tensor) -> Tensor:
                out = write(out)
                if ex.editing(mid):
                    stream = self.stream.pop(index)
                    before = stream + out * times if times != 1.0 else stream + out
                    after = ex.edit(mid, before)
                    if ex.gradients:
                        return out + (after - before) / times
                    # what makes the sum come out right even where it is zero, which the next norm would blow up
                    return torch.where(after == before, out, (after - stream) / times)
                return out

            self.after(layer.attention_writer, on_write)
        if mid in ex.capture:
            reader = layer.mlp if layer.ln2 is None else layer.ln2.module
            # the very tensor that the stream goes on with, or its gradient would miss that way

            def on_mid(x: Tensor) -> Tensor:
                ex.record(mid, x if ex.gradients else self.rows(x))
                return x

            self.before(reader, on_mid)
        if layer.ln2 is not None:
            self.norm(layer.ln2, f"{prefix}.ln2")
        self.mlp(layer, f"{prefix}.mlp")
        if layer.ln2_post is not None:
            self.norm(layer.ln2_post, f"{prefix}.ln2_post")
        if ex.wants(f"{prefix}.mlp.out"):
            self.after(layer.mlp_writer, self.at(f"{prefix}.mlp.out", layer.mlp_multiplier))
        if ex.wants(post):
            self.after(layer.module, self.at(post))

    def ends(self) -> None:
        ex, family = self.ex, self.family
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
        elif family.positions_added:
            if ex.wants("embed"):
                self.after(family.embed, self.at("embed"))
            if ex.wants("pos_embed"):
                self.added_positions()
        elif ex.wants("embed"):
            self.before(family.layers[0].module, self.at("embed"))
        if ex.resumed is not None:
            start = ex.resumed.requires_grad_() if ex.gradients else ex.resumed
            self.before(family.layers[ex.first_layer].module, lambda _: start)

    def added_positions(self) -> None:
        """What is added to the embeddings by no module: the first layer's input, less what the embedding returned."""
        ex, family = self.ex, self.family
        embedded: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            embedded[:] = [x]
            return x

        def on_sum(x: Tensor) -> Tensor:
            words = embedded.pop()
            positions = x - words
            if ex.gradients:
                positions = positions.detach().requires_grad_()
            new = ex.touch("pos_embed", positions)
            return words + new if ex.live("pos_embed") else x

        self.after(family.embed, keep)
        self.before(family.layers[0].module, on_sum)

    def finish(self) -> None:
        ex, family = self.ex, self.family
        if family.ln_final is not None:
            self.norm(family.ln_final, "ln_final")
        if ex.last_only:
            first = ex.mask.int().argmax(1)
            last = first + ex.mask.sum(1) - 1

            def keep_last(x: Tensor) -> Tensor:
                return x[torch.arange(len(x), device=x.device), last.to(x.device)][:, None]

            self.before(family.unembed, keep_last)
        if family.final_softcap is not None and ex.wants("logits_precap"):
            self.after(family.unembed, self.at("logits_precap", family.logit_scale))


def install(execution: Observation, family: Family) -> ExitStack:
    """Register the hooks that an execution needs, in the order in which a forward reaches their sites.

    Closing the stack takes them away.
    """
    installer = Installer(execution, family)
    with ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in installer.handles])
        stack.push(installer.shadows)
        installer.ends()
        for index, layer in enumerate(family.layers):
            if index >= execution.first_layer:
                installer.block(index, layer)
        installer.finish()
        return stack.pop_all()

"""One forward pass under observation: its state, what is skipped, where it stops, and the hooks that serve it.

State is per call. Hooks belong to one execution and ignore every forward that is not its own, so threads, nested runs
and the user's hooks do not mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cutaway.artifacts.errors import CutawayError
from cutaway.model.attached import Attached
from cutaway.model.attention.dispatch import switches
from cutaway.model.edits.edits import NothingEdited, Receipt
from cutaway.model.edits.resolve import Resolved
from cutaway.model.forward.current import Observation, Replacement, Stop, active, current
from cutaway.model.forward.hooks import input_name, install
from cutaway.model.forward.shadow import shadowed
from cutaway.model.sites import layer_of

_IN_ATTENTION = (".attn.rot_q", ".attn.rot_k", ".attn.scores", ".attn.pattern")


class Removable(Protocol):
    """A hook, or whatever else is taken away after a run."""

    def remove(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Span:
    """The part of a forward pass that is computed; by default all of it."""

    first_layer: int = 0
    """The layer it starts in; the layers below it return their input."""
    stream: Tensor | None = None
    """The residual stream at the start of that layer [b, p, d]; None is what its input gives."""
    before: int = 0
    """Columns in front of those of the mask, in a cache and all of them real."""
    stop: bool = False
    """Whether it ends once the last captured value is there."""
    last_only: bool = False
    """Whether logits are computed at each row's last real token alone."""


_WHOLE = Span()


class Execution(Observation):
    """One observed call of a model: the hooks that it needs, what it skips, where it stops."""

    def __init__(
        self,
        lm: Attached,
        capture: Sequence[str],
        edits: Sequence[Resolved],
        mask: Tensor,
        *,
        span: Span = _WHOLE,
        gradients: bool = False,
        replace: Mapping[nn.Module, Replacement] | None = None,
        watch: Callable[[Execution], Iterable[Removable]] | None = None,
        ungrouped: bool = False,
    ) -> None:
        if lm.ropes is not None:
            lm.ropes.check(lm.name, mask.sum(1) + span.before)
        self.resolved: dict[str, list[Resolved]] = {}
        for edit in edits:
            self.resolved.setdefault(edit.site.name, []).append(edit)
        super().__init__(capture, self.resolved, mask)
        self.lm = lm
        self.stop = span.stop
        self.gradients = gradients
        self.first_layer = span.first_layer
        self.resumed = span.stream
        self.last_only = span.last_only
        self.replace = dict(replace or {})
        self.watch = watch  # hooks of its owner, behind those of the sites
        self.ungrouped = ungrouped

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Install what this execution needs, and take it away again whatever happens."""
        with ExitStack() as stack:
            layers = self.lm.family.layers
            for module in _checkpointing(self.lm):
                stack.enter_context(shadowed(module, "gradient_checkpointing", bool))
            watched = {layer_of(name) for name in {*self.capture, *self.edits} if name.endswith(_IN_ATTENTION)}
            if self.ungrouped:
                watched.update(range(self.first_layer, len(layers)))
            for index in watched:
                assert index is not None  # these sites are inside layers
                for module, attribute, make in switches(layers[index].core, layers[index].observed):
                    if id(module) not in self.attention_layers:
                        self.attention_layers[id(module)] = index
                        stack.enter_context(shadowed(module, attribute, make))
            for index in range(self.first_layer):
                self.replace.setdefault(layers[index].module, passing(self.lm.layer_forms.get(layers[index].module)))
            for module in self.replace:
                stack.enter_context(shadowed(module, "forward", lambda m=module: _dispatch(m)))
            stack.push(install(self, self.lm.family))
            for handle in self.watch(self) if self.watch is not None else ():
                stack.callback(handle.remove)
            token = current.set(self)
            stack.callback(current.reset, token)
            yield

    @property
    def idle(self) -> bool:
        """Whether there is nothing to observe, so that no hook is needed."""
        asks = self.touched or self.gradients or self.first_layer or self.last_only or self.replace or self.watch
        return not (asks or _checkpointing(self.lm))

    def forward(self, call: Callable[[], Any]) -> Any:
        """Run `call` observed; returns its result, or None where it was stopped early."""
        if self.idle:
            token = current.set(self)  # a forward inside an observed one belongs to nobody but itself
            try:
                with one_dtype(self.lm):
                    return call()
            finally:
                current.reset(token)
        with self.observing(), one_dtype(self.lm):
            try:
                return call()
            except Stop:
                return None

    def receipts(self, tokens_first: Tensor) -> tuple[Receipt, ...]:
        """What every edit did. Raises NothingEdited where one did nothing."""
        return receipts_of((r for rs in self.resolved.values() for r in rs), tokens_first)

    def gradients_of(self, metric: Tensor) -> dict[str, Tensor]:
        """d metric / d value for every captured site; zeros where the metric does not depend on it."""
        names = list(self.values)
        inputs = [self.values[name] for name in names]
        if not isinstance(metric, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CutawayError(f"The metric returned a {type(metric).__name__}; it must return a tensor of the logits.")
        if not metric.requires_grad:
            raise CutawayError("The metric does not depend on the logits through anything differentiable.")
        if metric.numel() not in (1, len(self.mask)):
            raise CutawayError(
                f"The metric returned {list(metric.shape)} numbers for {len(self.mask)} rows; it must return one "
                "number, or one a row."
            )
        if metric.is_complex() or not bool(torch.isfinite(metric).all()):
            raise CutawayError("The metric is complex, NaN or infinite, so it has no gradient.")
        found = torch.autograd.grad(metric.sum(), inputs, allow_unused=True)
        return {
            name: self.by_row(torch.zeros_like(value) if grad is None else grad.detach())
            for name, value, grad in zip(names, inputs, found, strict=True)
        }


def receipts_of(edits: Iterable[Resolved], tokens_first: Tensor) -> tuple[Receipt, ...]:
    """What every edit did. Raises NothingEdited where one did nothing, and CutawayError where it made numbers none."""
    made = []
    for resolved in sorted(edits, key=lambda r: r.index):
        touched = resolved.touched.cpu()
        if not bool(touched.any()):
            raise NothingEdited(
                f"'{resolved.edit}' touched nothing at '{resolved.site.name}': the run ended before it, or the "
                "tokens it addresses were never processed."
            )
        rows = touched.any(1).nonzero()[:, 0].tolist()
        first = tokens_first.cpu()
        positions = tuple(tuple((touched[r].nonzero()[:, 0] - first[r]).tolist()) for r in rows)
        delta, before, after, count, lost = resolved.sums.cpu().tolist()
        if lost and not resolved.site.name.endswith(".scores"):  # where -inf says that a source does not look there
            raise CutawayError(
                f"'{resolved.edit}' made {lost:.0f} numbers at '{resolved.site.name}' NaN or infinite: its values are, "
                "or are larger than the model's dtype holds."
            )
        count = max(count, 1.0)
        made.append(
            Receipt(
                edit=resolved.index,
                kind=resolved.edit.kind,
                site=resolved.site.name,
                layer=resolved.site.layer,
                rows=tuple(rows),
                positions=positions,
                heads=resolved.edit.heads,
                n_tokens=int(touched.sum()),
                mean_abs_delta=delta / count,
                mean_abs_before=before / count,
                mean_abs_after=after / count,
                neurons=resolved.edit.neurons,
            )
        )
    return tuple(made)


@contextmanager
def one_dtype(lm: Attached) -> Iterator[None]:
    """Where a forward fails and layers differ in their dtypes, say so; models that convert by themselves do not."""
    try:
        yield
    except RuntimeError as error:
        if "type" not in str(error) or (mixed := _mixed(lm)) is None:
            raise
        raise CutawayError(
            f"{lm.name} cannot be run: {mixed}; give all of it one dtype, such as model.to(torch.float32)."
        ) from error


def _mixed(lm: Attached) -> str | None:
    """The first weight that is of another float than the same weight of the layer below it, or None."""
    layers = lm.family.layers
    there = {name: weight.dtype for name, weight in layers[0].module.named_parameters()}
    for i, layer in enumerate(layers):
        for name, weight in layer.module.named_parameters():
            if weight.is_floating_point() and there.get(name, weight.dtype) != weight.dtype:
                return f"in layer {i} {name} is {_short(weight.dtype)}, and in layer 0 {_short(there[name])}"
    floats = {dtype for dtype in there.values() if dtype.is_floating_point}
    for what, module in (("embedding", lm.family.embed), ("unembedding", lm.family.unembed)):
        for weight in module.parameters():
            if weight.is_floating_point() and floats and weight.dtype not in floats:
                return f"its {what} is {_short(weight.dtype)}, and its layers are {_short(next(iter(floats)))}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checkpointing(lm: Attached) -> list[nn.Module]:
    """Modules that drop what the backward pass needs, and a cache with it, and compute it again without our hooks.

    An execution runs them as they are in evaluation mode: the values are the same, and what is captured is kept anyway.
    """
    if not any(getattr(layer.module, "gradient_checkpointing", False) for layer in lm.family.layers):
        return []
    return [m for m in lm.hf.modules() if m.training and getattr(m, "gradient_checkpointing", False)]


Form = int | None


def form_of(output: Any) -> Form:
    """How a module returns its value: by itself (None), or as the first of so many items."""
    return len(output) if isinstance(output, tuple) else None


def in_form(value: Tensor, form: Form) -> Any:
    """A value as a module of this form returns it, with nothing beside it."""
    return value if form is None else (value, *[None] * (form - 1))


def passing(form: Form) -> Replacement:
    """A decoder layer that returns its input."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return in_form(args[0] if args else kwargs[input_name(kwargs)], form)

    return forward


def _dispatch(module: nn.Module) -> Replacement:
    """A module's forward for as long as an execution replaces it; for every other it is the one it was."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        execution = active()
        instead = None if execution is None else execution.replace.get(module)
        return original(*args, **kwargs) if instead is None else instead(*args, **kwargs)

    return forward

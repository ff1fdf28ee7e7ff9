"""A model of the user's own: any module that maps token ids to logits, and a description of where its parts are.

`Description` says what the tables of `families.py` say of a family of transformers, for one module. From it
`described_family` makes the same `Family`, so nothing that is built on one knows the difference; what the description
claims is tried before (here) and after (the self-test). `OwnModel` gives the module the interface of a causal language
model of transformers and does nothing else: the module inside is the user's object, unchanged.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from cutaway.artifacts.errors import CutawayError
from cutaway.model.architecture.layouts import by_groups, by_heads, in_turn
from cutaway.model.architecture.norms import Norm, probe_norm
from cutaway.model.architecture.parts import Family, Layer, Projection, width_in, width_out
from cutaway.model.own.attention import OwnAttention

PAGE = "docs/your-own-model.md says how a model is described"


@dataclass(frozen=True, kw_only=True)
class Description:
    """Where the parts of a module are, as names with dots, and what else the module does not say.

    Example:
        description = cutaway.Description(n_heads=4, context=64, blocks="layers", q="attn.q", k="attn.k", v="attn.v")
        lm = cutaway.attach(module, description=description)
    """

    n_heads: int
    """Attention heads per block."""
    context: int
    """How many tokens the module reads at most."""
    blocks: str = "blocks"
    """The list of blocks."""
    embed: str = "embed"
    """The embedding."""
    unembed: str = "unembed"
    """The unembedding; its width is how many ids the module answers with."""
    final_norm: str | None = None
    """The norm before the unembedding; None is none."""
    attention: str = "attn"
    """The attention module, inside a block; so are all names below."""
    q: str | None = None
    """The projection of queries, an `nn.Linear` or what acts like one."""
    k: str | None = None
    """The projection of keys."""
    v: str | None = None
    """The projection of values."""
    qkv: str | None = None
    """One projection in place of `q`, `k`, `v`: all queries, all keys, all values one behind the other."""
    output: str = "attn.o"
    """The output projection."""
    norm1: str | None = None
    """The norm before attention; None where a block reads the stream directly."""
    norm2: str | None = None
    """The norm before the MLP."""
    q_norm: str | None = None
    """A norm of each head's queries."""
    k_norm: str | None = None
    """A norm of each head's keys."""
    mlp: str | None = "mlp"
    """The module of the MLP; without it `mlp_in` stands for it."""
    mlp_in: str = "mlp.in"
    """The projection into the neurons."""
    mlp_gate: str | None = None
    """The gate's projection; with it the MLP is act(gate) * in."""
    mlp_out: str = "mlp.out"
    """The projection out of the neurons."""
    n_kv_heads: int | None = None
    """Key-value heads; None is as many as heads."""
    qkv_by_head: bool = False
    """Whether `qkv` holds the query, key and value of each head together."""
    scale: float | None = None
    """What queries times keys are multiplied by; only compared with what the module does."""
    causal: bool = True
    """Whether no token sees a later one."""
    parallel: bool = False
    """Whether attention and MLP read the same stream."""
    inputs: int | None = None
    """How many ids the module reads, where the embedding is no `nn.Embedding`."""

    def __post_init__(self) -> None:
        for name in ("n_heads", "context", "n_kv_heads", "inputs"):
            value = getattr(self, name)
            if not (value is None and name in ("n_kv_heads", "inputs")) and (type(value) is not int or value < 1):
                raise _wrong(f"{name} is a whole number from 1 on, not {value!r}")
        for name in _NAMES:
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name in _OPTIONAL):
                raise _wrong(f"{name} is the name of a module, such as {name!r}, not {value!r}")
        for name in ("qkv_by_head", "causal", "parallel"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(f"{name} is True or False, not {getattr(self, name)!r}")
        if self.n_heads % self.kv_heads:
            raise _wrong(f"n_kv_heads={self.kv_heads} does not divide n_heads={self.n_heads}")
        separate = [name for name in "qkv" if getattr(self, name) is not None]
        if (self.qkv is None) == (not separate) or len(separate) not in (0, 3):
            raise _wrong("a head's projections are q, k and v, or one qkv for all three; name one or the other")

    @property
    def kv_heads(self) -> int:
        """Key-value heads per block."""
        return self.n_kv_heads or self.n_heads

    @classmethod
    def of(cls, given: Description | Mapping[str, Any]) -> Description:
        """A description as it is, or made of a mapping.

        Args:
            given: a description, or a mapping from its fields' names to their values.

        Raises:
            CutawayError: an unknown field, or one that is missing.
        """
        if isinstance(given, Description):
            return given
        if not isinstance(given, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _wrong(f"it is a cutaway.Description or a dict of its fields, not a {type(given).__name__}")
        known = [item.name for item in fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1, 0.5)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
                raise _wrong(f"it has no field {name!r}; {hint}")
        for item in fields(cls):
            if item.default is MISSING and item.name not in given:
                raise _wrong(f"it lacks {item.name}")
        return cls(**given)


_OPTIONAL = ("final_norm", "q", "k", "v", "qkv", "norm1", "norm2", "q_norm", "k_norm", "mlp", "mlp_gate")
_NAMES = ("blocks", "embed", "unembed", "attention", "output", "mlp_in", "mlp_out", *_OPTIONAL)


def _wrong(reason: str) -> CutawayError:
    return CutawayError(f"This description cannot be used: {reason} ({PAGE}).")


_TRIED = 64  # tokens of the first forward, which is compared with the description


class OwnConfig(PretrainedConfig):
    """What transformers asks of a model's configuration."""

    model_type = "own"


class OwnModel(PreTrainedModel, GenerationMixin):
    """The user's module behind the interface of transformers' causal language models, with its description."""

    config_class = OwnConfig
    _supports_sdpa = True

    def __init__(self, module: nn.Module, description: Description) -> None:
        try:
            inputs = description.inputs or getattr(_named(module, description.embed, "embed"), "num_embeddings", None)
        except CutawayError as error:
            raise _refuse(module, str(error)) from error
        if not isinstance(inputs, int):
            raise _refuse(module, f"say how many ids {description.embed!r} reads, which is no nn.Embedding: inputs=")
        settings: dict[str, Any] = {
            "num_attention_heads": description.n_heads,
            "max_position_embeddings": description.context,
            "vocab_size": inputs,
            "use_bidirectional_attention": not description.causal,
        }
        super().__init__(OwnConfig(**settings))
        self.module = module
        self.description = description
        forward = module.forward
        try:
            self.takes = frozenset(inspect.signature(forward).parameters) & {"attention_mask", "position_ids"}
        except (TypeError, ValueError):  # a forward that Python cannot look into takes the ids
            self.takes = frozenset[str]()

    @property
    def training(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The module's mode, which is its user's."""
        inside = self.__dict__.get("_modules", {}).get("module")
        return inside is not None and inside.training

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        pass  # `train` and `eval` set it in the module too

    def get_input_embeddings(self) -> nn.Module:
        return _named(self.module, self.description.embed, "embed")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        return_dict: bool = True,
    ) -> CausalLMOutput:
        """The module's logits [b, p, V] for ids [b, p]. It keeps no cache, and always returns this form."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        if attention_mask is not None and "attention_mask" not in self.takes:
            shape = attention_mask[:, -input_ids.shape[1] :].bool()
            if not bool(shape.all()) and not (self.description.causal and bool(shape[:, 0].all())):
                padded = "left-padded rows" if self.description.causal else "rows of unequal length"
                raise CutawayError(
                    f"{self.title} takes no attention_mask, so it cannot read {padded} together; give it rows of one "
                    f"length ({PAGE})."
                )
        options = {name: value for name, value in given.items() if name in self.takes and value is not None}
        try:
            logits = self.module(input_ids, **options)
        except (IndexError, RuntimeError) as error:
            if input_ids.shape[1] <= _TRIED or isinstance(error, torch.OutOfMemoryError):
                raise
            raise _raised(self, input_ids, error) from error
        logits = getattr(logits, "logits", logits)
        logits = logits[0] if isinstance(logits, tuple) else logits
        return CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    @property
    def title(self) -> str:
        return type(self.module).__name__


def _refuse(model: nn.Module, reason: str) -> CutawayError:
    title = model.title if isinstance(model, OwnModel) else type(model).__name__
    return CutawayError(f"{title} is not as described: {reason} ({PAGE}).")


def _raised(model: OwnModel, ids: Tensor, error: Exception) -> CutawayError:
    text = " ".join(str(error).split())[:150]
    return _refuse(model, f"on ids {list(ids.shape)} its forward raises {type(error).__name__}: {text}")


def _named(owner: nn.Module, name: str, field: str) -> nn.Module:
    """The module of a dotted name. Raises CutawayError that says what is there instead."""
    at, seen = owner, ""
    for part in name.split("."):
        found = getattr(at, part, None)
        if not isinstance(found, nn.Module):
            inside = ", ".join(child for child, _ in at.named_children()) or "no modules"
            kind = "" if found is None else f", but a {type(found).__name__}, and a part is a module"
            raise CutawayError(
                f"the description says {field}={name!r}, and {seen or type(owner).__name__} has no module "
                f"{part!r}{kind}; it has {inside}"
            )
        at, seen = found, f"{seen}.{part}".lstrip(".")
    return at


def described_family(model: OwnModel) -> Family:
    """The parts of a described module. Raises CutawayError with the reason, and the page, where one does not fit."""
    try:
        return _family(model, model.description)
    except CutawayError as error:
        if PAGE in str(error):
            raise
        raise _refuse(model, str(error).removesuffix(".")) from error


def _family(model: OwnModel, says: Description) -> Family:
    module = model.module
    stack = _named(module, says.blocks, "blocks")
    if not isinstance(stack, (nn.ModuleList, nn.Sequential)) or not len(stack):
        raise _refuse(model, f"blocks={says.blocks!r} is a {type(stack).__name__}, not a list with a block or more")
    embed, unembed = _named(module, says.embed, "embed"), _named(module, says.unembed, "unembed")
    layers = tuple(_layer(block, says) for block in stack)
    first = layers[0]
    reads = first.projections[0]
    d = width_in(reads.module)
    d_head = width_out(reads.module) // (says.n_heads if "k" not in reads.parts else says.n_heads + 2 * says.kv_heads)
    _fits(says, "unembed", unembed, d, None)
    inputs = model.config.vocab_size
    norm = None if says.final_norm is None else probe_norm(_named(module, says.final_norm, "final_norm"), d)
    assert first.mlp_out is not None
    positions = _try(model, embed, first.module, inputs, width_out(unembed))
    return Family(
        model_type="own",
        embed=embed,
        pos_embed=None,
        layers=layers,
        ln_final=norm,
        unembed=unembed,
        parallel=says.parallel,
        latent=False,
        alibi=False,
        qk_norm_last=False,
        qkv_clip=None,
        final_softcap=None,
        logit_scale=1.0,
        n_heads=says.n_heads,
        n_kv_heads=says.kv_heads,
        d_head=d_head,
        d_value=width_in(first.output) // says.n_heads,
        d_model=d,
        d_mlp=width_in(first.mlp_out),
        d_vocab=width_out(unembed),
        d_vocab_in=inputs,
        context_length=says.context,
        positions_added=positions,
    )


def _projections(block: nn.Module, says: Description) -> tuple[Projection, ...]:
    if says.qkv is not None:
        layout = by_groups if says.qkv_by_head else in_turn
        return (layout(_named(block, says.qkv, "qkv"), says.n_heads, says.kv_heads),)
    heads = {"q": says.n_heads, "k": says.kv_heads, "v": says.kv_heads}
    found = []
    for part, n in heads.items():
        module = _named(block, getattr(says, part), part)
        width = width_out(module)
        if width % n:
            raise CutawayError(f"{part}={getattr(says, part)!r} writes {width} numbers, which {n} heads do not share")
        found.append(by_heads(module, part, n))
    return tuple(found)


def _fits(says: Description, field: str, module: nn.Module, reads: int | None, writes: int | None) -> None:
    """Raise where a projection does not read or write as many numbers as what stands beside it."""
    for verb, width, wanted in (("reads", width_in, reads), ("writes", width_out, writes)):
        if wanted is not None and width(module) != wanted:
            raise CutawayError(
                f"{field}={getattr(says, field)!r} {verb} {width(module)} numbers, and {wanted} are there"
            )


def _layer(block: nn.Module, says: Description) -> Layer:
    def part(field: str) -> nn.Module:
        return _named(block, getattr(says, field), field)

    def maybe(field: str) -> nn.Module | None:
        return None if getattr(says, field) is None else part(field)

    projections = _projections(block, says)
    d = width_in(projections[0].module)

    def norm(field: str) -> Norm | None:
        found = maybe(field)
        return None if found is None else probe_norm(found, d)

    attention, output, into, out = (part(field) for field in ("attention", "output", "mlp_in", "mlp_out"))
    mlp = maybe("mlp")
    _fits(says, "output", output, None, d)
    _fits(says, "mlp_out", out, None, d)
    _fits(says, "mlp_in", into, d, width_in(out))
    if says.mlp_gate is not None:
        _fits(says, "mlp_gate", part("mlp_gate"), d, width_in(out))
    if width_in(output) % says.n_heads:
        raise CutawayError(
            f"output={says.output!r} reads {width_in(output)} numbers, which {says.n_heads} heads do not share"
        )
    return Layer(
        module=block,
        attention=attention,
        core=attention,
        projections=projections,
        output=output,
        q_norm=maybe("q_norm"),
        k_norm=maybe("k_norm"),
        mlp=into if mlp is None else mlp,
        # the gate of a gated MLP is its `pre`
        mlp_in=into if says.mlp_gate is None else part("mlp_gate"),
        mlp_linear=None if says.mlp_gate is None else into,
        mlp_out=out,
        experts=None,
        ln1=norm("norm1"),
        ln2=norm("norm2"),
        ln1_post=None,
        ln2_post=None,
        attention_writer=attention,
        mlp_writer=out if mlp is None else mlp,
        attn_multiplier=1.0,
        mlp_multiplier=1.0,
        observed=OwnAttention(attention, says.n_heads, says.kv_heads, says.causal, says.scale),
    )


def _try(model: OwnModel, embed: nn.Module, first: nn.Module, inputs: int, outputs: int) -> bool:
    """Run the module on as many ids as it is said to read, and compare with what the description says.

    Returns whether something that depends on the position alone is added to the embeddings.
    """
    n = min(model.description.context, _TRIED)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, inputs, (3, n), generator=generator)
    ids[1] = ids[0]
    ids[1, -1] = (ids[0, -1] + 1) % inputs  # the same but for the last
    ids[2] = ids[2, 0]  # the same token everywhere
    ids = ids.to(device)
    embedded, entering, logits = _observe(model, embed, first, ids)
    if not isinstance(logits, Tensor) or logits.shape != (3, n, outputs):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise _refuse(
            model,
            f"for ids [3, {n}] its forward returns {shape}, not logits [3, {n}, {outputs}] (a tensor, the first of a "
            "tuple, or .logits), which it has to return at every position",
        )
    scale = float(logits.abs().max()) or 1.0
    moved = float((logits[0, :-1] - logits[1, :-1]).abs().max()) / scale if n > 1 else 0.0
    if model.description.causal and moved > 1e-3:
        raise _refuse(model, "it says causal=True, and another last token changes the logits before it")
    if not model.description.causal and n > 1 and inputs > 1 and moved == 0.0:
        raise _refuse(model, "it says causal=False, and another last token changes no logit before it")
    if embedded.shape != entering.shape:
        raise _refuse(model, f"embed gives {list(embedded.shape)}, and the first block reads {list(entering.shape)}")
    size, added = float(entering.abs().max()) or 1.0, entering - embedded
    close = partial(torch.allclose, rtol=0, atol=1e-4 * size)
    if close(added, torch.zeros_like(added)):
        return False
    if close(added, added[:1].expand_as(added)):
        return True
    if close(entering[2], entering[2, :1].expand_as(entering[2])):
        return False  # the embedding, times a factor
    raise _refuse(
        model, "what enters the first block is neither the embedding nor the embedding and a position's vector"
    )


def _observe(model: OwnModel, embed: nn.Module, first: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, Any]:
    """What the embedding returns, what the first block reads, and the logits of one forward."""
    seen: dict[str, Any] = {}

    def on_embed(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["embed"] = output

    def on_block(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["block"] = args[0] if args else next(iter(kwargs.values()), None)

    handles = [embed.register_forward_hook(on_embed), first.register_forward_pre_hook(on_block, with_kwargs=True)]
    try:
        with torch.no_grad():
            logits = model(
                ids, torch.ones_like(ids), torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            ).logits
    except CutawayError:
        raise
    except Exception as error:  # the user's own program may raise anything
        raise _raised(model, ids, error) from error
    finally:
        for handle in handles:
            handle.remove()
    for part, field in (("embed", "embed"), ("block", "blocks")):
        if not isinstance(seen.get(part), Tensor):
            raise _refuse(
                model,
                f"its forward does not call the module that {field}={getattr(model.description, field)!r} names, or "
                "gives it no tensor first; call modules, not their forward",
            )
    return seen["embed"], seen["block"], logits

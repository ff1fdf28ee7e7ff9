"""What people know from TransformerLens, SAELens, nnsight and transformers, typed at a model or a run of ours.

Where it is the same thing it gives the result; else one line says the call that does it. The tables below are all there
is to it: a name or an option that is in none of them is an ordinary AttributeError or TypeError.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.model.aliases import ALIASES

LanguageModel = Any  # it stands above this module
P = ParamSpec("P")
R = TypeVar("R")


class NoSuchName(NotSupported, AttributeError):
    """A name of another library; the message says what does the same here."""


class NoSuchOption(NotSupported, TypeError):
    """An option of another library; the message says what does the same here."""


# Names at a model

MODEL: dict[str, str] = {
    # TransformerLens
    "run_with_hooks": "lm.run(prompt, edits=[...])",
    "add_hook": "lm.run(prompt, edits=[...]), for one call",
    "add_perma_hook": "a list of edits that you give to every lm.run(prompt, edits=mine)",
    "hooks": "lm.run(prompt, edits=[...]), for one call",
    "reset_hooks": "nothing: edits are for one call, so there is nothing to reset",
    "hook_dict": "lm.sites()",
    "mod_dict": "lm.sites()",
    "add_caching_hooks": "lm.run(prompt, capture=[...])",
    "get_caching_hooks": "lm.run(prompt, capture=[...])",
    "W_Q": "lm.w_q(layer)",
    "W_K": "lm.w_k(layer), by key-value head",
    "W_V": "lm.w_v(layer), by key-value head",
    "W_O": "lm.w_o(layer)",
    "W_U": "lm.output_directions(ids), rows of the unembedding",
    "W_E": "lm.hf.get_input_embeddings().weight",
    "tokens_to_residual_directions": "lm.output_directions(ids)",
    "get_token_position": "lm.tokens(prompt).find(row, text)",
    "to_single_str_token": "lm.token_strings([id])[0]",
    "loss_fn": "torch.nn.functional.cross_entropy of lm.run(prompt).logits",
    "forward": "lm.run(prompt).logits",
    "set_use_attn_result": "capture='blocks.*.attn.result'; there is no flag",
    "set_use_split_qkv_input": "capture='blocks.*.attn.in'; there is no flag",
    "set_use_hook_mlp_in": "capture='blocks.*.resid_mid'; there is no flag",
    "set_use_attn_in": "capture='blocks.*.attn.in'; there is no flag",
    "enable_compatibility_mode": "nothing: weights are raw, and the instruments do the folding's arithmetic",
    "boot_transformers": "cutaway.load(name)",
    "from_pretrained": "cutaway.load(name)",
    "blocks": "capture='blocks.3.resid_post' for values; the modules are in lm.hf",
    "ln_final": "capture='ln_final.normalized' for values; the module is in lm.hf",
    "to": "cutaway.load(name, device=..., dtype=...), or lm.hf.to(...)",
    "generate_text": "lm.generate(prompt).texts",
    # SAELens
    "run_with_saes": "lm.run(prompt, capture=dictionary), or edits=cutaway.clamp_latent(dictionary, latent, value)",
    "run_with_cache_with_saes": "run = lm.run(prompt, capture=dictionary), then run[dictionary]",
    "run_with_hooks_with_saes": "lm.run(prompt, edits=cutaway.set(dictionary, value, neurons=latent))",
    "add_sae": "nothing: give the dictionary to the call, as in lm.run(prompt, capture=dictionary)",
    "reset_saes": "nothing: dictionaries are never attached",
    "acts_to_saes": "nothing: dictionaries are never attached",
    # nnsight
    "trace": "run = lm.run(prompt, capture=[...], edits=[...]), then run[site]",
    "session": "lm.sweep(prompt, cells, metric) for many runs together",
    "invoke": "lm.run([prompt, ...], capture=[...]), one row per prompt",
    "edit": "lm.run(prompt, edits=[...])",
    "scan": "lm.sites(), which has every shape",
    "generator": "made = lm.generate(prompt), then made.texts and made.tokens",
    "output": "lm.run(prompt).logits",
    "local": "nothing: everything runs here",
    "remote": "nothing: everything runs here",
}
"""Names of other libraries that are nothing here, and what does the same."""


def _theirs(lm: LanguageModel, inputs: Any, prepend_bos: bool | None) -> Any:
    """The tokens that TransformerLens makes of a text, which has a beginning-of-text token unless told otherwise."""
    tokens = lm.tokens(inputs, bos=prepend_bos)
    text = isinstance(inputs, str) or (isinstance(inputs, Sequence) and any(isinstance(i, str) for i in inputs))
    asked = prepend_bos is None and text and lm.bos_id is not None
    if asked and any(tokens.row_ids(row)[0] != lm.bos_id for row in range(len(tokens))):
        raise CutawayError(
            f"TransformerLens puts a beginning-of-text token before a text, which the tokenizer of {lm.name} does not: "
            "say which you mean with lm.tokens(text, bos=True) or bos=False, as in lm.run(text, bos=True)."
        )
    return tokens


def _to_tokens(lm: LanguageModel, inputs: Any, prepend_bos: bool | None = None) -> Any:
    return _theirs(lm, inputs, prepend_bos).ids


def _to_str_tokens(lm: LanguageModel, inputs: Any, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
    rows = [list(row) for row in _theirs(lm, inputs, prepend_bos).strings]
    return rows[0] if len(rows) == 1 else rows


def _to_string(lm: LanguageModel, ids: Any) -> Any:
    if lm.tokenizer is None:
        raise CutawayError(f"{lm.name} has no tokenizer; attach one to use text.")
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    several = isinstance(ids, list) and bool(ids) and isinstance(ids[0], list)
    return [lm.tokenizer.decode(row) for row in ids] if several else lm.tokenizer.decode(ids)


def _to_single_token(lm: LanguageModel, text: str) -> int:
    ids = lm.tokens(text, bos=False).row_ids(0)
    if len(ids) != 1:
        raise CutawayError(
            f"{text!r} is {len(ids)} tokens of {lm.name}: {', '.join(map(repr, lm.token_strings(ids)))}."
        )
    return ids[0]


def _wanted(lm: LanguageModel, names: Any) -> list[str]:
    """The sites that a `names_filter` lets through: names, or a function of TransformerLens' names."""
    if isinstance(names, str):
        return [names]
    if isinstance(names, Sequence):
        return list(names)
    table, found = lm.sites(), []
    for ours in table.present():
        if names is None or any(names(theirs) for theirs in _spellings(ours)):
            found.append(ours)
    return found


def _spellings(site: str) -> list[str]:
    """TransformerLens' names of a site, and our own."""
    head, _, rest = site.partition(".")
    layer, _, part = rest.partition(".")
    template = f"blocks.{{l}}.{part}" if head == "blocks" else site
    theirs = [name for name, ours in ALIASES.items() if template in ours]
    return [site, *(name.replace("{l}", layer) for name in theirs)]


def _run_with_cache(
    lm: LanguageModel, inputs: Any, *, names_filter: Any = None, prepend_bos: bool | None = None, **options: Any
) -> tuple[Any, Any]:
    if options.pop("remove_batch_dim", False):
        raise NoSuchOption("remove_batch_dim= is not needed here: a run has rows, and run[site][0] is the first.")
    run = lm.run(_theirs(lm, inputs, prepend_bos), capture=_wanted(lm, names_filter), **options)
    return run.logits, run


class _Cfg(SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        raise NoSuchName(f"cfg.{name} is not kept here; lm.hf.config has the model's own settings.")


def _cfg(lm: LanguageModel) -> _Cfg:
    return _Cfg(
        model_name=lm.name, original_architecture=lm.architecture, n_layers=lm.n_layers, d_model=lm.d_model,
        n_heads=lm.n_heads, n_key_value_heads=lm.n_kv_heads, d_head=lm.d_head, d_mlp=lm.d_mlp, d_vocab=lm.d_vocab_in,
        d_vocab_out=lm.d_vocab, n_ctx=lm.context_length, n_params=lm.n_parameters, dtype=lm.dtype, device=lm.device,
    )  # fmt: skip


def called(lm: LanguageModel, inputs: Any, return_type: str | None = "logits", **options: Any) -> Any:
    """`model(prompt)` of TransformerLens: the logits [b, p, V]."""
    if return_type not in ("logits", None):
        raise NoSuchOption(f"return_type={return_type!r} is not known here; take it from lm.run(prompt).logits.")
    run = lm.run(_theirs(lm, inputs, options.pop("prepend_bos", None)), **options)
    return None if return_type is None else run.logits


SAME: dict[str, Callable[..., Any]] = {
    "to_tokens": _to_tokens,
    "to_str_tokens": _to_str_tokens,
    "to_string": _to_string,
    "to_single_token": _to_single_token,
    "run_with_cache": _run_with_cache,
}
"""Methods of TransformerLens that give the same here."""


def of_model(lm: LanguageModel, name: str) -> Any:
    """What a name of another library is at a model. Raises AttributeError, with the call that does it where known."""
    if name in SAME:
        return partial(SAME[name], lm)
    if name == "cfg":
        return _cfg(lm)
    if name in MODEL:
        raise NoSuchName(f"A LanguageModel has no {name}; here it is {MODEL[name]}.")
    if not name.startswith("_") and "hf" in vars(lm) and hasattr(lm.hf, name):
        raise NoSuchName(f"A LanguageModel has no {name}; the Hugging Face model has: lm.hf.{name}.")
    raise AttributeError(f"'LanguageModel' object has no attribute '{name}'")


# Names at a run or a generation

RUN: dict[str, str] = {
    # TransformerLens' ActivationCache
    "cache_dict": "dict(run)",
    "remove_batch_dim": "run[site][0], the first row",
    "apply_slice_to_batch_dim": "run[site][rows]",
    "accumulated_resid": "run.stack('blocks.*.resid_pre') and the last resid_post",
    "decompose_resid": "cutaway.observe.attribute(lm, prompt, answer), or run.stack('blocks.*.attn.out') and mlp.out",
    "stack_head_results": "run.stack('blocks.*.attn.result')",
    "stack_neuron_results": "cutaway.observe.attribute(lm, prompt, answer, by='neuron')",
    "get_neuron_results": "cutaway.observe.attribute(lm, prompt, answer, by='neuron')",
    "logit_attrs": "cutaway.observe.attribute(lm, prompt, answer)",
    "apply_ln_to_stack": "stack / run['ln_final.scale']",
    "compute_head_results": "capture='blocks.*.attn.result'",
    "get_full_resid_decomposition": "cutaway.observe.attribute(lm, prompt, answer, by='head')",
    "to": "run[site].to(device)",
    # nnsight
    "save": "a run has save(folder) for a file; a captured value is a tensor already",
    "value": "run[site]: a captured value is a tensor already",
    "output": "run.logits, or run[site]",
    # transformers
    "hidden_states": "run.stack('blocks.*.resid_post'), with capture='blocks.*.resid_post'",
    "attentions": "run.stack('blocks.*.attn.pattern'), with capture='blocks.*.attn.pattern'",
    "past_key_values": "resume=run, which takes over what it can",
    "loss": "torch.nn.functional.cross_entropy of run.logits",
    "sequences": "made.tokens.ids",
    "scores": "made.logprobs",
}
"""Names of other libraries that are nothing at a run or generation, and what does the same."""


def of_run(run: Any, name: str) -> Any:
    """What a name of another library is at a run. Raises AttributeError, with the call that does it where known."""
    if name == "stack_activation":

        def stack(activation_name: str, layer: int = -1, sublayer_type: str | None = None) -> Any:
            found = run.stack(site_of(activation_name, "*", sublayer_type))
            return found if layer < 0 else found[:layer]

        return stack
    if name in RUN:
        raise NoSuchName(f"A {type(run).__name__} has no {name}; here it is {RUN[name]}.")
    raise AttributeError(f"'{type(run).__name__}' object has no attribute '{name}'")


_SHORT = {"attn": "attn.pattern", "attn_logits": "attn.scores", "attn_scores": "attn.scores", "mlp_post": "mlp.post"}


def site_of(name: str, layer: int | str | None = None, part: str | None = None) -> str:
    """TransformerLens' short spelling `cache["resid_post", 3]` or `["scale", 3, "ln1"]` as a site's name."""
    if layer is None:
        return f"ln_final.{name}" if name in ("scale", "normalized") else name
    if part is not None and not part.startswith("ln"):
        part = {"a": "attn", "m": "mlp"}.get(part, part)
    short = _SHORT.get(name, name)
    places = (part,) if part is not None else (None, "attn", "mlp", "ln1")
    known = {*ALIASES, *(site for ours in ALIASES.values() for site in ours)}
    known |= {"blocks.{l}.attn.in", "blocks.{l}.mlp.in"}
    for place in places:
        for spelled in (short, f"hook_{short}"):
            inside = spelled if place is None else f"{place}.{spelled}"
            if f"blocks.{{l}}.{inside}" in known:
                return f"blocks.{layer}.{inside}"
    return f"blocks.{layer}.{short}"


# Options of a call: "=name" for the same under another name, a sentence part for what does it, or what to do with it

Option = str | Callable[[dict[str, Any], Any], None]


def _only(value: Any, otherwise: str) -> Option:
    """An option that changes nothing at one value, and is something else at any other."""

    def take(given: dict[str, Any], asked: Any) -> None:
        if asked is not value and asked != value:
            raise NoSuchOption(otherwise)

    return take


def _sampled(given: dict[str, Any], asked: Any) -> None:
    given["temperature"] = given.get("temperature", 1.0) if asked else 0.0


def _filtered(given: dict[str, Any], names: Any) -> None:
    if given.get("capture") is not None:
        raise NoSuchOption("names_filter= and capture= are the same; give one of them.")
    if callable(names):
        raise NoSuchOption("names_filter= is capture= here, with wildcards such as 'blocks.*.resid_post'.")
    given["capture"] = names


def _decoded(name: str) -> Option:
    def take(given: dict[str, Any], asked: Any) -> None:
        from dataclasses import replace

        from cutaway.model.generation.settings import Decoding

        given["decoding"] = replace(given.get("decoding") or Decoding(), **{name: asked})

    return take


RUN_OPTIONS: dict[str, Option] = {
    "prepend_bos": "=bos",
    "names_filter": _filtered,
    "return_type": _only("logits", "return_type= is not known here: a run has .logits, and captured values by site."),
    "stop_at_layer": "logits=None, which stops after the last captured site",
    "fwd_hooks": "edits=[...]",
    "bwd_hooks": "grad=metric, then run.grads[site]",
    "incl_bwd": "grad=metric, then run.grads[site]",
    "hooks": "edits=[...]",
    "remove_batch_dim": "run[site][0]: a run has rows",
    "past_kv_cache": "resume=run",
    "use_past_kv_cache": "resume=run",
    "saes": "capture=dictionary, then run[dictionary]",
    "sites": "=capture",
    "output_hidden_states": "capture='blocks.*.resid_post'",
    "output_attentions": "capture='blocks.*.attn.pattern'",
    "attention_mask": "the first argument: give what the tokenizer returned, with its mask",
    "remote": _only(False, "remote= is not known here: everything runs on this machine."),
}
GENERATE_OPTIONS: dict[str, Option] = {
    "do_sample": _sampled,
    "max_tokens": "=max_new_tokens",
    "max_length": "max_new_tokens=, which counts new tokens alone",
    "prepend_bos": "=bos",
    "n": "=num_return_sequences",
    "stop_strings": "=stop",
    "names_filter": _filtered,
    **{name: _decoded(name) for name in ("top_k", "top_p", "num_beams", "use_cache", "limit_bytes")},
    "use_past_kv_cache": _decoded("use_cache"),
    "stop_at_eos": _only(True, "stop_at_eos=False is not known here: a row ends at the model's end-of-text tokens."),
    "eos_token_id": "stop=, a text at which a row ends",
    "return_type": "made.texts, or made.tokens.ids",
    "return_dict_in_generate": _only(True, "generate returns made.texts and made.tokens.ids; there is no switch."),
    "output_scores": "made.logprobs, which are always there",
    "output_hidden_states": "capture='blocks.*.resid_post'",
    "repetition_penalty": "nothing: tokens are drawn from the model's own probabilities",
    "freq_penalty": "nothing: tokens are drawn from the model's own probabilities",
    "generation_config": "the options of generate one by one",
    "pad_token_id": "nothing: padding is seen to",
    "attention_mask": "the first argument: give what the tokenizer returned, with its mask",
    "fwd_hooks": "edits=[...]",
    "verbose": _only(False, "verbose= is not known here; lm.generate_stream gives each token as it comes."),
    "streamer": "lm.generate_stream(prompt), a loop over new tokens",
    "remote": _only(False, "remote= is not known here: everything runs on this machine."),
}
_RAW = "is not known here: weights stay as they are, and the instruments do the arithmetic of folding"
LOAD_OPTIONS: dict[str, Option] = {
    "torch_dtype": "=dtype",
    **{
        name: _only(False, f"{name}=True {_RAW}.")
        for name in (
            "fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases",
            "refactor_factored_attn_matrices",
        )
    },
    "trust_remote_code": _only(
        False,
        "trust_remote_code=True is not known here: load such a model with transformers and give it to cutaway.attach.",
    ),
    "dispatch": _only(True, "dispatch=False is not known here: weights are read when the model is loaded."),
    "hf_model": "cutaway.attach(model, tokenizer)",
    "tokenizer": "cutaway.attach(model, tokenizer)",
    "model_name": "=model",
}  # fmt: skip


def understands(options: Mapping[str, Option]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take options of other libraries, as the table says; its signature stays what it is."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = frozenset(inspect.signature(function).parameters)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not own.issuperset(kwargs):
                return function(*args, **_translated(function.__name__, own, options, dict(kwargs)))  # type: ignore[arg-type]
            return function(*args, **kwargs)

        return call

    return decorate


def _translated(what: str, own: frozenset[str], options: Mapping[str, Option], given: dict[str, Any]) -> dict[str, Any]:
    for name in [name for name in given if name not in own and name in options]:
        asked, option = given.pop(name), options[name]
        if not isinstance(option, str):
            option(given, asked)
        elif not option.startswith("="):
            raise NoSuchOption(f"{what} has no option {name}=; here it is {option}.")
        elif option[1:] in given:
            raise NoSuchOption(f"{name}= is {option[1:]}= here; give one of them.")
        else:
            given[option[1:]] = asked
    return given

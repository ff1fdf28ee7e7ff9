"""A causal language model you can look into.

`load` and `attach` give a `LanguageModel` around a Hugging Face model that stays exactly what it was: the same
modules, the same `state_dict`, bit-equal logits when nothing is captured or edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import ModelIdentity
from cutaway.model import familiar
from cutaway.model.architecture import loading
from cutaway.model.architecture.causality import is_causal, says_bidirectional
from cutaway.model.architecture.families import TESTED, find_family
from cutaway.model.architecture.ropes import find_ropes
from cutaway.model.architecture.wrapped import device_of, unwrap
from cutaway.model.attention.dispatch import check_dispatch
from cutaway.model.edits.edit import Edit
from cutaway.model.edits.resolve import edits_for, resolve
from cutaway.model.familiar import understands
from cutaway.model.forward.current import active
from cutaway.model.forward.execution import Execution, Form, Span, form_of, one_dtype
from cutaway.model.forward.resume import resume_point
from cutaway.model.forward.run import CAPTURE_LIMIT, Gradients, Run, check_capture_size
from cutaway.model.generation.methods import Generates
from cutaway.model.latents import Capture, sites_of
from cutaway.model.named import title_of
from cutaway.model.own.module import PAGE, Description, OwnModel
from cutaway.model.reading import Inputs
from cutaway.model.selftest.identities import run_selftest, verify
from cutaway.model.selftest.result import SelfTest
from cutaway.model.sites import SiteTable, site_table
from cutaway.model.sweep import sweep as sweeps
from cutaway.model.sweep.results import Sweep
from cutaway.model.sweep.sweep import Cell
from cutaway.model.sweep.sweep import Metric as SweepMetric
from cutaway.model.tokens import Tokens, brief
from cutaway.model.weights import Weights


class LanguageModel(Weights, Generates):
    """A Hugging Face causal language model with named sites, edits and receipts. Make one with `load` or `attach`.

    Attributes:
        hf: the model, as transformers made it; of a module of your own, a wrapper with the module as `hf.module`.
        tokenizer: its tokenizer, or None.
        name: what it is called in results: the name of its folder, or its hub id.
        identify: a function that gives the identity of its weights, called when a file or a manifest needs it.
        loaded_from: what `load` takes to load it again: the path as it was given, or the hub id.
        n_layers: number of layers.
        d_model: width of the residual stream.
        n_heads: attention heads per layer.
        n_kv_heads: key-value heads per layer.
        d_head: width of a head.
        d_mlp: neurons per layer.
        d_vocab: ids that it answers with.
        d_vocab_in: ids that it reads.
        context_length: the most tokens that it reads.
        n_parameters: number of weights.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        identify: Callable[[], ModelIdentity],
        loaded_from: str | None = None,
    ) -> None:
        super().__init__(hf, name, identify, loaded_from)
        self.tokenizer = tokenizer
        self.family = find_family(hf)
        for layer in self.family.layers:
            check_dispatch(hf, layer.core, layer.observed)
        self.ropes = find_ropes(hf)
        self._causal: bool | None = None
        self.n_layers = len(self.family.layers)
        self.d_model = self.family.d_model
        self.n_heads = self.family.n_heads
        self.n_kv_heads = self.family.n_kv_heads
        self.d_head = self.family.d_head
        self.d_mlp = self.family.d_mlp
        self.d_vocab = self.family.d_vocab
        self.d_vocab_in = self.family.d_vocab_in
        self.context_length = self.family.context_length
        self.n_parameters = sum(p.numel() for p in hf.parameters())
        self.layer_forms: dict[nn.Module, Form] = {}  # what the runs so far have shown, see Execution
        self._expanded: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._sizes: dict[tuple[Any, ...], int] = {}
        if self.family.model_type not in TESTED:
            verify(self)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return familiar.of_model(self, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return familiar.called(self, *args, **kwargs)

    @cached_property
    def _sites(self) -> SiteTable:
        return site_table(self.n_layers, self.family.sizes, self.family.absent)

    @property
    def architecture(self) -> str:
        """The name of the model's class."""
        return self.hf.title if isinstance(self.hf, OwnModel) else type(self.hf).__name__

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the embedding."""
        weight = getattr(self.family.embed, "weight", None)
        if isinstance(weight, Tensor) and weight.device.type != "meta":
            return weight.device
        return device_of(self.family.embed)

    @property
    def causal(self) -> bool:
        """Whether attention looks back alone, so that no token changes what is computed at earlier ones. Measured when
        it is first asked for, and by every self-test, with a forward of two short rows.
        """
        if self._causal is None:
            self._causal = is_causal(self)
        return self._causal

    def sites(self) -> SiteTable:
        """Every site with its dimensions, shape and meaning; those that this model lacks say why.

        Returns:
            A table that prints itself; `table["blocks.3.attn.z"]` is one `Site`.

        Example:
            print(lm.sites())
        """
        return self._sites

    def selftest(self) -> SelfTest:
        """Check the algebra of every site, and of an edit there, on every layer: some forwards of a few short rows.

        Returns:
            The checks with their errors and bounds; it prints itself.

        Example:
            print(lm.selftest())
        """
        self._causal = None
        return run_selftest(self)

    # Tokens

    # Running

    @understands(familiar.RUN_OPTIONS)
    def run(
        self,
        inputs: Inputs,
        *,
        capture: Capture = None,
        edits: Edit | Sequence[Edit] = (),
        logits: Literal["all", "last"] | None = "all",
        grad: Callable[[Tensor], Tensor] | None = None,
        bos: bool | None = None,
        resume: Run | None = None,
        limit_bytes: int | None = None,
    ) -> Run:
        """One forward pass.

        Args:
            inputs: text(s), ids, `Tokens`, or what the tokenizer returned.
            capture: sites or wildcards whose values are kept, and dictionaries, whose latent activations are then
                `run[dictionary]`. Default: none.
            edits: one edit or several, applied in order.
            logits: "all" [b, p, V], "last" [b, 1, V] (each row's last real token) or None, which stops after the last
                captured site.
            grad: maps the logits to a scalar or one number per row; its gradient at every captured site is in
                `run.grads`.
            bos: True makes sure that each row starts with a beginning-of-text token, False that none does, None leaves
                it to the tokenizer.
            resume: a run of the same tokens (or of one row, repeated) whose stream is taken over, from below its own
                edits and below the first layer that is edited or captured here.
            limit_bytes: bound on what the captures may hold, default 4 GiB.

        Returns:
            Logits, captured values, gradients and the receipts of the edits.

        Raises:
            NoSuchSite: an unknown or absent site.
            TooLarge: a capture above the limit.
            CutawayError: an edit that does not fit or touches nothing, a prompt longer than the context, rows whose
                lengths call for different rotary angles.

        Example:
            run = lm.run("The capital of France is", capture="blocks.*.resid_post", logits="last")
            run["blocks.3.resid_post"]
        """
        tokens = self.tokens(inputs, bos=bos)
        if logits not in ("all", "last", None):
            raise CutawayError(f"logits={logits!r} is not 'all', 'last' or None.")
        if grad is not None and not callable(grad):
            raise CutawayError(f"grad= takes a function of the logits; got {grad!r}.")
        if grad is not None and logits is None:
            raise CutawayError("grad= needs logits: ask for logits='last' or 'all'.")
        state = self.weights_state()
        names = self._names(capture)
        if grad is not None and not names:
            raise CutawayError("grad= gives gradients at captured sites; name some in capture=.")
        edits = edits_for(self, edits)
        resolved = [
            resolve(i, edit, self._sites[name], tokens)
            for i, edit in enumerate(edits)
            for name in self._sites.expand(edit.site)
        ]
        touched = {*names, *(r.site.name for r in resolved)}
        last_only = logits == "last" and not touched & {"logits", "logits_precap"}
        self._check_size(names, tokens, CAPTURE_LIMIT if limit_bytes is None else limit_bytes)
        first_layer, stream = resume_point(self, resume, touched, tokens) if resume is not None else (0, None)
        execution = Execution(
            self,
            names,
            resolved,
            tokens.mask,
            span=Span(
                first_layer, stream, stop=logits is None and bool(names) and "logits" not in names, last_only=last_only
            ),
            gradients=grad is not None,
            watch=self._learn_forms if names and len(self.layer_forms) < self.n_layers else None,
        )
        with torch.enable_grad() if grad is not None else torch.no_grad():
            out = execution.forward(
                lambda: self.hf(
                    input_ids=tokens.ids,
                    attention_mask=tokens.mask.long(),
                    position_ids=tokens.position_ids,
                    use_cache=False,
                )
            )
            result = None if out is None else execution.touch("logits", out.logits)
            grads: dict[str, Tensor] = {}
            if grad is not None:
                assert result is not None
                asked = result if last_only or logits == "all" else self._last(result, tokens)
                grads = execution.gradients_of(grad(asked))
        if logits == "last" and result is not None and not last_only:
            result = self._last(result, tokens)
        values = {name: execution.by_row(execution.values[name]) for name in names}
        return Run(
            tokens=tokens,
            logits=None if result is None or logits is None else result.detach(),
            captured={name: v.detach().clone() for name, v in values.items()} if grad is not None else values,
            grads=Gradients({name: grads[name] for name in names} if grad is not None else {}, self._sites),
            receipts=execution.receipts(tokens.first) if edits else (),
            edits=edits,
            site_table=self._sites,
            model=self.name,
            identity=self.identity_at(state),
            weights=state,
            strings_of=None if self.tokenizer is None else self.token_strings,
        )

    @staticmethod
    def _last(logits: Tensor, tokens: Tokens) -> Tensor:
        return logits[torch.arange(len(logits), device=logits.device), tokens.last.to(logits.device)][:, None]

    def _names(self, capture: Capture) -> list[str]:
        """The sites that are to be captured, in the order of the forward pass."""
        if capture is None:
            return []
        sites = sites_of(capture)
        patterns = (sites,) if isinstance(sites, str) else tuple(sites) if isinstance(sites, list) else None
        if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
            return self._sites.expand_all(sites)
        if (known := self._expanded.get(patterns)) is None:
            known = tuple(self._sites.expand_all(patterns))
            if len(self._expanded) >= 256:
                self._expanded.clear()
            self._expanded[patterns] = known
        return list(known)

    def _check_size(self, names: list[str], tokens: Tokens, limit: int) -> None:
        if not names:
            check_capture_size(self._sites, [], 0, 0, 0, limit)
            return
        batch, positions = tokens.ids.shape
        key = (batch, positions, self.dtype, *names)
        if isinstance(limit, int) and self._sizes.get(key, limit + 1) <= limit:
            return
        if len(self._sizes) >= 256:
            self._sizes.clear()
        self._sizes[key] = check_capture_size(self._sites, names, batch, positions, self.dtype.itemsize, limit)

    def _learn_forms(self, execution: Execution) -> Iterator[RemovableHandle]:
        """Note how each decoder layer that runs returns the stream, for the runs that skip it later."""

        def note(module: nn.Module, _args: Any, output: Any) -> None:
            if active() is execution:
                self.layer_forms[module] = form_of(output)

        for layer in self.family.layers:
            yield layer.module.register_forward_hook(note)

    def sweep(
        self,
        inputs: Inputs | Run,
        cells: Sequence[Cell],
        metric: SweepMetric,
        *,
        logits: Literal["all", "last"] = "last",
        bos: bool | None = None,
        batch_rows: int | None = None,
        limit_bytes: int | None = None,
        start: Sweep | None = None,
        label: str = "sweep",
    ) -> Sweep:
        """One number for each of many edits of the same n prompts, as one run per cell would give it, in batches.

        Layers below the first edited one are not run again, nor are tokens before it; see `Sweep.batches`, `notes` and
        `flops` for what was done.

        Args:
            inputs: the prompts, as in `run`, or a run of them.
            cells: edits or lists of edits, each applied by itself to all the prompts (a cell's `rows` are prompts).
            metric: maps the logits at each prompt's last real token [n, V], or all of them [n, p, V] with
                logits="all", and the tokens to [n, ...].
            logits: which logits the metric reads.
            bos: as in `run`.
            batch_rows: bound on the rows of a batch. Default: as many as fit.
            limit_bytes: bound on what a batch may hold. Default: a quarter of the free memory. Where memory runs out, a
                batch is halved.
            start: an earlier part of this sweep, from `SweepInterrupted.sweep`.
            label: the name of the progress bar, which work of more than two seconds shows.

        Returns:
            The metric of each cell, [cells, n, ...], and of no edit.

        Raises:
            CutawayError: what `run` raises for tokens and edits, a metric of another shape, a cell that alone does not
                fit in memory.

        Example:
            cells = [cutaway.zero(f"blocks.{layer}.mlp.out") for layer in range(lm.n_layers)]
            lm.sweep("The capital of France is", cells, lambda logits, tokens: logits[:, 5]).values
        """
        tokens = self.tokens(inputs.tokens if isinstance(inputs, Run) else inputs, bos=bos)
        return sweeps.sweep(
            self,
            tokens,
            cells,
            metric,
            logits=logits,
            batch_rows=batch_rows,
            limit_bytes=limit_bytes,
            start=start,
            label=label,
        )

    def unembed(self, residual: Tensor) -> Tensor:
        """What the model would answer from a stream: final norm, unembedding and softcap.

        Args:
            residual: values of the residual stream, [..., d_model].

        Returns:
            Logits [..., V].

        Raises:
            CutawayError: a tensor of another width, or of no real numbers.

        Example:
            lm.unembed(run["blocks.3.resid_post"])  # the logit lens
        """
        if not isinstance(residual, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CutawayError(f"A stream of {self.name} is a tensor [..., {self.d_model}]; got {brief(residual)}.")
        if residual.is_complex() or residual.layout is not torch.strided or residual.device.type == "meta":
            raise CutawayError("A stream is a plain tensor of real numbers, neither sparse nor on the meta device.")
        if residual.ndim == 0 or residual.shape[-1] != self.d_model:
            raise CutawayError(
                f"A stream of {self.name} is [..., {self.d_model}]; got a tensor of shape {list(residual.shape)}."
            )
        with torch.no_grad(), one_dtype(self):
            return self.family.read_out(residual.to(device=self.device, dtype=self.dtype))

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise CutawayError(
            f"A LanguageModel is neither pickled nor copied; load it again by its name ({self.loaded_from}), or "
            "attach a copy of its model."
        )

    def __repr__(self) -> str:
        size = f"{self.n_parameters / 1e6:.1f} M" if self.n_parameters < 1e9 else f"{self.n_parameters / 1e9:.2f} B"
        heads = f"{self.n_heads} heads" + (f" ({self.n_kv_heads} kv)" if self.n_kv_heads != self.n_heads else "")
        dtype = str(self.dtype).removeprefix("torch.")
        vocabulary = (
            str(self.d_vocab) if self.d_vocab == self.d_vocab_in else f"{self.d_vocab_in} in, {self.d_vocab} out"
        )
        return (
            f"LanguageModel {self.name}: {self.architecture}, {size} parameters, {self.n_layers} layers x d "
            f"{self.d_model} x {heads}, vocabulary {vocabulary}, {dtype} on {self.device}"
            f"{', attention not causal' if self._causal is False or says_bidirectional(self.hf) else ''}"
        )


@understands(familiar.LOAD_OPTIONS)
def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    device_map: loading.DeviceMap | None = None,
    offload_folder: str | Path | None = None,
) -> LanguageModel:
    """Load a model by its name. Nothing is downloaded but a hub id, and nothing is changed or copied.

    Args:
        model: "atlas" (shipped), a local folder (of a model, or of a PEFT adapter), or a hub id.
        dtype: such as "bfloat16". Default: fp32 on a CPU and the checkpoint's own on a GPU.
        device: such as "cuda:1". Default: a GPU if there is one.
        revision: a branch, tag or commit of the hub.
        device_map: places the parts as transformers does ("auto", or module -> device, "cpu" or "disk").
        offload_folder: for the parts on "disk".

    Returns:
        The model.

    Raises:
        NotSupported: no causal language model, or an unsupported family.
        CutawayError: no such model, a folder without weights or with damaged ones, missing weights, a tokenizer that
            does not fit.

    Example:
        lm = cutaway.load("atlas")
    """
    hf, tokenizer, name, identify = loading.load_parts(
        model, dtype=dtype, device=device, revision=revision, device_map=device_map, offload_folder=offload_folder
    )
    loading.check_tokenizer(tokenizer, hf, name)
    return LanguageModel(hf, tokenizer, title_of(name), identify, name)


def attach(
    hf_model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    description: Description | Mapping[str, Any] | None = None,
    name: str | None = None,
) -> LanguageModel:
    """Look into a model that is already in memory. Nothing is changed, copied or looked up anywhere.

    It may be placed on several devices or offloaded by accelerate, quantised, or have adapters (of PEFT, as a PEFT
    model or in the model itself).

    Args:
        hf_model: a model of transformers, or any module with a `description`; `lm.hf` is then a wrapper, with the
            module as `lm.hf.module`.
        tokenizer: its tokenizer; without one, prompts are ids.
        description: where the parts of a module of your own are: a `Description`, or a dict of its fields. The
            self-test checks it (docs/your-own-model.md).
        name: what it is called in results. Default: the name of its folder, its hub id, or the name of its class.

    Returns:
        The model.

    Raises:
        NotSupported: an unsupported family.
        CutawayError: a description or tokenizer that does not fit, or what stands around the model would be lost.

    Example:
        lm = cutaway.attach(hf_model, tokenizer)
    """
    hf_model = unwrap(hf_model)
    if description is not None:
        if isinstance(hf_model, PreTrainedModel):
            raise CutawayError(
                f"{type(hf_model).__name__} is a model of transformers, whose parts are found; leave description= out."
            )
        if not isinstance(hf_model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CutawayError(f"attach takes a torch.nn.Module, not a {type(hf_model).__name__} ({PAGE}).")
        hf_model = OwnModel(hf_model, Description.of(description))
    if not isinstance(hf_model, PreTrainedModel):
        raise CutawayError(
            f"attach takes a PreTrainedModel of transformers, or a module with description=, not a "
            f"{type(hf_model).__name__}; cutaway.load opens a model by its name ({PAGE})."
        )
    kind = hf_model.title if isinstance(hf_model, OwnModel) else type(hf_model).__name__
    chosen = name or getattr(hf_model.config, "name_or_path", "") or kind
    title = name or title_of(chosen)
    loading.check_kind(hf_model.config, chosen)
    loading.check_tokenizer(tokenizer, hf_model, chosen)
    return LanguageModel(hf_model, tokenizer, title, lambda: loading.identity_of_parameters(hf_model, chosen), chosen)

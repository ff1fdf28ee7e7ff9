"""A causal language model you can look into.

`load` and `attach` give a `LanguageModel` around a Hugging Face model that stays exactly what it was: the same
modules, the same `state_dict`, bit-equal logits when nothing is captured or edited.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import ModelIdentity
from cutaway.model.architecture import loading
from cutaway.model.architecture.causality import is_causal, says_bidirectional
from cutaway.model.architecture.families import TESTED, find_family, weight_matrix
from cutaway.model.architecture.parts import Layer
from cutaway.model.architecture.ropes import find_ropes
from cutaway.model.architecture.wrapped import device_of, unwrap
from cutaway.model.attention.dispatch import check_dispatch
from cutaway.model.edits.edits import Edit
from cutaway.model.edits.resolve import edits_for, resolve
from cutaway.model.forward.current import active
from cutaway.model.forward.execution import Execution, Form, form_of, one_dtype
from cutaway.model.forward.run import CAPTURE_LIMIT, Generation, Gradients, Run, check_capture_size
from cutaway.model.generation import generate as generation
from cutaway.model.generation.streaming import GenerationStream
from cutaway.model.own.module import PAGE, Description, OwnModel
from cutaway.model.selftest.identities import SelfTest, run_selftest, verify
from cutaway.model.sites import KINDS, Site, SiteTable, layer_of
from cutaway.model.sweep import sweep as sweeps
from cutaway.model.sweep.results import Sweep
from cutaway.model.sweep.sweep import Cell
from cutaway.model.sweep.sweep import Metric as SweepMetric
from cutaway.model.tokens import Tokens, brief, ids_in, pad_rows, plain_ids, printable, token_string

Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Tokens | Mapping[str, Any]
Message = Mapping[str, str]


_ENCODING = frozenset(
    ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length")
)
"""What a tokenizer returns; only the first two say anything about a causal model's input."""


class LanguageModel:
    """A Hugging Face causal language model with named sites, edits and receipts. Make one with `load` or `attach`."""

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        identify: Callable[[], ModelIdentity],
    ) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name
        self._identify = identify
        self._identities: dict[int, ModelIdentity] = {}  # by the state of the weights, see weights_state
        self._states = 0
        self._versions = loading.weight_versions(hf)
        self._sample = loading.weight_sample(hf)
        self._sampled = 0  # the state in which it was taken
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
        self._sites = self._site_table()
        self.layer_forms: dict[nn.Module, Form] = {}  # what the runs so far have shown, see Execution
        self._expanded: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._sizes: dict[tuple[Any, ...], int] = {}
        if self.family.model_type not in TESTED:
            verify(self)

    @property
    def architecture(self) -> str:
        """The name of the model's class."""
        return self.hf.title if isinstance(self.hf, OwnModel) else type(self.hf).__name__

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

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

    @property
    def bos_id(self) -> int | None:
        return _single(None if self.tokenizer is None else self.tokenizer.bos_token_id)

    @property
    def pad_id(self) -> int | None:
        return _single(None if self.tokenizer is None else self.tokenizer.pad_token_id)

    def identity(self) -> ModelIdentity:
        """Name, revision and weight hash (of the files of a loaded model, of the parameters of an attached one).

        Weights that were changed in place since are noticed: then it is the hash of the parameters as they are.
        """
        state = self.weights_state()
        if (sample := loading.weight_sample(self.hf)) != self._sample:  # through `.data`, which PyTorch does not count
            self._sample = sample
            if state == self._sampled:
                state = self._changed()
        self._sampled = state
        if state not in self._identities:
            self._identities[state] = self._identify()
        return self._identities[state]

    def weights_state(self) -> int:
        """A number that goes up when a weight is found to have been changed in place, or replaced by another."""
        versions = loading.weight_versions(self.hf)
        if versions != self._versions:
            self._versions = versions
            return self._changed()
        return self._states

    def _changed(self) -> int:
        self._states += 1
        self._identify = lambda: loading.identity_of_parameters(self.hf, self.name)
        return self._states

    def identity_at(self, state: int) -> Callable[[], ModelIdentity]:
        """The identity of what ran in a state, also when the weights have been changed since."""

        def identify() -> ModelIdentity:
            if state not in self._identities:
                self.identity()
            if state not in self._identities:
                raise CutawayError(
                    f"The weights of {self.name} were changed in place since this was run, and nobody knows which they "
                    "were; run it again."
                )
            return self._identities[state]

        return identify

    def sites(self) -> SiteTable:
        """Every site with its dimensions, shape and meaning; those that this model lacks say why."""
        return self._sites

    def selftest(self) -> SelfTest:
        """Check the algebra of every site, and of an edit there, on every layer: some forwards of a few short rows."""
        self._causal = None
        return run_selftest(self)

    # Tokens

    def tokens(self, inputs: Inputs, *, bos: bool | None = None) -> Tokens:
        """Text(s), ids, Tokens or what the tokenizer returned as a padded batch on the model's device.

        A `BatchEncoding`, or a dict with `input_ids` and `attention_mask`, is taken with its padding. Ids alone have no
        mask, so those that end in the padding token are taken as they stand, with a warning.
        Text is tokenised exactly as the model's tokenizer does it (`bos=None`); `bos=True` makes sure that each row
        starts with one beginning-of-text token and `bos=False` that none does. Raises CutawayError for a doubled
        beginning-of-text, ids outside the vocabulary, and rows longer than the context.
        """
        if bos is not None and not isinstance(bos, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CutawayError(f"bos= is True, False or None; got {bos!r}.")
        if isinstance(inputs, Tensor) and (inputs.layout is not torch.strided or inputs.device.type == "meta"):
            raise CutawayError("Token ids are a plain tensor of numbers, neither sparse nor on the meta device.")
        if isinstance(inputs, Mapping):
            inputs = self._encoded(inputs, bos)
        if isinstance(inputs, Tokens):
            tokens = inputs.to(self.device)
        elif isinstance(inputs, Tensor) and bos is None and self._plain_ids(inputs):
            ids = (inputs[None] if inputs.ndim == 1 else inputs).detach().to(self.device, torch.long, copy=True)
            self._warn_of_padding(ids)
            tokens = Tokens.whole(ids, lambda: self.spelled(ids.tolist()))
        else:
            given = self._rows(inputs)
            text = isinstance(inputs, str) or any(isinstance(item, str) for item in inputs)
            rows = [self._with_bos(row, bos, text) for row in given]
            if not rows or any(not row for row in rows):
                raise CutawayError("There is an empty prompt; every prompt needs at least one token.")
            if any(not 0 <= i < self.d_vocab_in for row in rows for i in row):
                raise self._no_such_id()
            if not text:
                self._warn_of_padding(rows)
            ids, mask = pad_rows(rows, self._padding())
            tokens = Tokens(ids.to(self.device), mask.to(self.device), lambda: self.spelled(rows))
        low, high = (tokens.ids[tokens.mask] if tokens.padded else tokens.ids).aminmax()
        if int(low) < 0 or int(high) >= self.d_vocab_in:
            raise self._no_such_id()
        if tokens.longest > self.context_length:
            raise CutawayError(
                f"A prompt has {tokens.longest} tokens, but {self.name} reads at most {self.context_length}; shorten "
                "it."
            )
        return tokens

    def _encoded(self, inputs: Mapping[str, Any], bos: bool | None) -> Tokens | list[list[int]]:
        """What a tokenizer returned, as Tokens padded as it is; as rows of ids where `bos` may change them."""
        if "input_ids" not in inputs:
            raise CutawayError(f"A dict of inputs has input_ids (and attention_mask); this one has {[*inputs]}.")
        strange = [key for key in inputs if key not in _ENCODING]
        if strange:
            raise CutawayError(
                f"Inputs are taken from input_ids and attention_mask alone; leave {strange[0]!r} out of the dict."
            )
        rows = self._rows(inputs["input_ids"])
        marks = _plain(inputs.get("attention_mask"))
        if marks is None:
            return rows
        marks = [_plain(row) for row in marks] if isinstance(marks, list) else [marks]
        marks = [marks] if marks and not isinstance(marks[0], list) else marks
        if [len(row) if isinstance(row, list) else -1 for row in marks] != [len(row) for row in rows]:
            raise CutawayError("input_ids and attention_mask have different shapes; give them as the tokenizer does.")
        if any(mark not in (0, 1) for row in marks for mark in row):
            raise CutawayError("An attention_mask has 1 at real tokens and 0 at padding; this one has other values.")
        if any(0 in row[row.index(1) : len(row) - row[::-1].index(1)] for row in marks if 1 in row):
            raise CutawayError("The mask has holes inside a row; real tokens must be contiguous.")
        real = [[i for i, mark in zip(row, m, strict=True) if mark] for row, m in zip(rows, marks, strict=True)]
        if bos is not None or len({len(row) for row in rows}) != 1 or not all(real):
            return real
        for row in real:
            self._with_bos(row, None, False)
        mask = torch.tensor(marks).bool()
        return Tokens(torch.tensor(rows).where(mask, self._padding()), mask, lambda: self.spelled(real))

    def _warn_of_padding(self, given: Tensor | list[list[int]]) -> None:
        """Warn of ids that end in the padding token, unless it also stands inside rows (as between packed texts)."""
        pad = self.pad_id
        if pad is None:
            return
        if isinstance(given, Tensor):
            if not bool((given[:, -1] == pad).any()):
                return
            given = given.tolist()
        counts = []
        for row in given:
            trailing = next((k for k, i in enumerate(reversed(row)) if i != pad), len(row))
            counts.append(trailing if trailing < len(row) else 0)
            if pad in row[1 : len(row) - trailing]:
                return
        found = next((row for row, count in enumerate(counts) if count), None)
        if found is not None:
            warnings.warn(
                f"Row {found} ends in the padding token (id {pad}), {counts[found]} of it, and is read with it as it "
                "stands; if that is padding, give what the tokenizer returned, which has the attention_mask.",
                stacklevel=4,
            )

    def _plain_ids(self, inputs: Tensor) -> bool:
        """Whether a tensor is a batch of token ids, of one length, that needs nothing but a mask."""
        if inputs.ndim not in (1, 2) or inputs.numel() == 0 or inputs.dtype not in (torch.int64, torch.int32):
            return False
        start = self.bos_id
        if start is None or inputs.shape[-1] < 2:
            return True
        return not bool((inputs[..., :2] == start).all(-1).any())

    def spelled(self, rows: list[list[int]]) -> tuple[tuple[str, ...], ...]:
        """What `Tokens.spelling` is of rows of ids."""
        return tuple(tuple(token_string(self.tokenizer, i) for i in row) for row in rows)

    def _no_such_id(self) -> CutawayError:
        return CutawayError(f"Token ids must be between 0 and {self.d_vocab_in - 1}, the vocabulary of {self.name}.")

    def token_strings(self, ids: Iterable[int] | Tensor) -> list[str]:
        """One printable string a token, spaces kept. Raises CutawayError for what are no ids of the vocabulary."""
        values = self._ids(ids)
        if values.ndim != 1:
            raise CutawayError(f"Tokens are named by a list of ids; got ids of the shape {list(values.shape)}.")
        return [printable(token_string(self.tokenizer, i)) for i in values.tolist()]

    def _ids(self, ids: Any, *, answers: bool = False) -> Tensor:
        """Ids that the model reads, or those it answers with, as a tensor on the CPU in the shape that they came in."""
        found = plain_ids(ids)
        size = self.d_vocab if answers else max(self.d_vocab, self.d_vocab_in)
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < size:
            said = f"those that {self.name} answers with" if answers else f"the vocabulary of {self.name}"
            raise CutawayError(f"Token ids must be between 0 and {size - 1}, {said}.")
        return found

    def _rows(self, inputs: Any) -> list[list[int]]:
        given: Any = [inputs] if isinstance(inputs, str) else _plain(inputs)
        if isinstance(given, list):
            given = [_plain(item) for item in given]
            if given and all(isinstance(item, str) for item in given):
                if self.tokenizer is None:
                    return [ids_in(text) for text in given]
                return [self._encode(text) for text in given]
            if given and all(type(item) is int for item in given):
                return [given]
            if all(isinstance(row, list) and all(type(item) is int for item in row) for row in given):
                return given
        raise CutawayError(
            "Inputs are a text, a list of texts, token ids, or a list of rows of token ids, not a mixture or anything "
            "else."
        )

    def _encode(self, text: str) -> list[int]:
        assert self.tokenizer is not None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CutawayError(
                f"The prompt is not valid Unicode text ({error.reason} at character {error.start})."
            ) from error
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        assert isinstance(ids, list)
        return [int(i) for i in ids]

    def _with_bos(self, row: list[int], bos: bool | None, text: bool) -> list[int]:
        start = self.bos_id
        if bos is True and start is None:
            raise CutawayError(f"{self.name} has no beginning-of-text token; leave bos out.")
        if start is not None and len(row) > 1 and row[0] == row[1] == start:
            raise CutawayError(f"The prompt starts with two beginning-of-text tokens: {self._why_doubled(row, text)}.")
        has = start is not None and bool(row) and row[0] == start
        if bos is True and not has:
            assert start is not None
            return [start, *row]
        return row[1:] if bos is False and has else row

    def _why_doubled(self, row: list[int], text: bool) -> str:
        """What put two beginning-of-text tokens before a prompt, and the way out."""
        start = self.bos_id
        if text and self._encode("a")[:1] == [start]:
            return "the tokenizer adds one, so leave it out"
        if text:
            return "the text itself has both, and the tokenizer adds none, so leave one out"
        n = next((k for k, i in enumerate(row) if i != start), len(row))
        if start == self.pad_id:
            return (
                f"the ids begin with {n} of {start}, which is the padding token too; if that is padding, give what the "
                "tokenizer returned, which has the attention_mask, and otherwise leave one out"
            )
        return f"the ids begin with {n} of {start}, so leave one out"

    def _padding(self) -> int:
        return next((i for i in (self.pad_id, self.bos_id) if i is not None and i < self.d_vocab_in), 0)

    # Running

    def run(
        self,
        inputs: Inputs,
        *,
        capture: str | Sequence[str] | None = None,
        edits: Edit | Sequence[Edit] = (),
        logits: Literal["all", "last"] | None = "all",
        grad: Callable[[Tensor], Tensor] | None = None,
        bos: bool | None = None,
        resume: Run | None = None,
        limit_bytes: int | None = None,
    ) -> Run:
        """One forward pass.

        Parameters: `capture` names sites or wildcards; `edits` are applied in order; `logits` is "all" [b, p, V],
        "last" [b, 1, V] (each row's last real token) or None, which stops after the last captured site; `grad` maps
        the logits to a scalar or one number a row and gives its gradient at every captured site; `resume` is a run of
        the same tokens (or of one row, repeated) whose stream is taken over, from below its own edits and below the
        first layer that is edited or captured here; `limit_bytes` bounds what the captures may hold (default 4 GiB).

        Raises CutawayError: an unknown or absent site, an edit that does not fit or touches nothing, a capture above
        the limit, a prompt longer than the context, rows whose lengths call for different rotary angles.
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
        first_layer, stream = self._resume_point(resume, touched, tokens) if resume is not None else (0, None)
        execution = Execution(
            self,
            names,
            resolved,
            tokens.mask,
            stop=logits is None and bool(names) and "logits" not in names,
            gradients=grad is not None,
            first_layer=first_layer,
            resumed=stream,
            last_only=last_only,
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
            values={name: v.detach().clone() for name, v in values.items()} if grad is not None else values,
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

    def _names(self, capture: str | Sequence[str] | None) -> list[str]:
        """The sites that are to be captured, in the order of the forward pass."""
        if capture is None:
            return []
        patterns = (capture,) if isinstance(capture, str) else tuple(capture) if isinstance(capture, list) else None
        if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
            return self._sites.expand_all(capture)
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

    def _resume_point(self, source: Run, touched: set[str], tokens: Tokens) -> tuple[int, Tensor | None]:
        """The deepest layer that a run of the same tokens lets us start at, and the stream there.

        What the source edited is not taken over: the stream is read below its first edit.
        """
        if getattr(source, "site_table", None) is not self._sites:
            raise CutawayError(f"resume= needs a run of {self.name}; this one comes from another model.")
        if source.weights != self.weights_state():
            raise CutawayError(
                f"resume= needs a run of {self.name} as it is; its weights were changed since: run again."
            )
        given = source.tokens
        if len(given) not in (1, len(tokens)) or given.ids.shape[1] != tokens.ids.shape[1]:
            raise CutawayError("resume= needs a run of the same tokens, or of one row of the same length.")
        same_ids = torch.equal(given.ids.expand_as(tokens.ids), tokens.ids)
        if not same_ids or not torch.equal(given.mask.expand_as(tokens.mask), tokens.mask):
            raise CutawayError("resume= needs a run of the same tokens; these differ.")
        ends = {name for name in touched if layer_of(name) is None and name in ("embed", "pos_embed")}
        inside = [layer for name in touched if (layer := layer_of(name)) is not None]
        deepest = 0 if ends else min(inside, default=self.n_layers - 1)
        edited = [self._sites.order(receipt.site) for receipt in source.receipts]
        for layer in range(deepest, 0, -1):
            for name in (f"blocks.{layer}.resid_pre", f"blocks.{layer - 1}.resid_post"):
                if name in source and min(edited, default=len(self._sites)) > self._sites.order(name):
                    return layer, source[name].expand(len(tokens), -1, -1).clone()
        return 0, None

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
        """One number for each of many edits of the same n prompts, as one run a cell would give it, in batches.

        Parameters: `cells` are edits or lists of edits, each applied by itself to all the prompts (a cell's `rows` are
        prompts); `metric` maps the logits at each prompt's last real token [n, V], or all of them [n, p, V] with
        logits="all", and the tokens to [n, ...]; `batch_rows` bounds the rows of a batch and `limit_bytes` what a
        batch may hold (default: a quarter of the memory that is free), and where memory runs out a batch is halved;
        `start` is an earlier part of this sweep, from `SweepInterrupted.sweep`.

        Layers below the first edited one are not run again, nor are tokens before it; see `Sweep.batches`, `notes` and
        `flops` for what was done. Work of more than two seconds shows its progress as `label`.

        Raises CutawayError: what `run` raises for tokens and edits, a metric of another shape, a cell that alone does
        not fit in memory.
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

    def generate(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int = 40,
        edits: Edit | Sequence[Edit] = (),
        capture: str | Sequence[str] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        num_return_sequences: int = 1,
        num_beams: int = 1,
        stop: str | Sequence[str] = (),
        use_cache: bool = True,
        bos: bool | None = None,
        limit_bytes: int | None = None,
    ) -> Generation:
        """Continue prompts, greedily at temperature 0, else by sampling with `seed`, or with the best of `num_beams`.

        Positions of an edit are resolved once on the prompt and hold in the cache; with `use_cache=False` the same
        set is applied again at every step. Row edits follow `num_return_sequences`. A sample depends on the seed, the
        prompt and the number of the sequence, not on the batch around it. `capture` names sites whose values at every
        token, prompt and new, the result holds in the columns of its `tokens`; what they may hold is bounded by
        `limit_bytes`. A row ends at the model's end-of-text tokens and at a `stop` text, which is cut off. Of the
        checkpoint's own generation settings only the tokens that end a text count.

        Raises CutawayError: what `run` raises for tokens and edits, a prompt that leaves no room in the context for
        the new tokens, settings out of range, beams with edits of single rows, a cache that would keep what new tokens
        change (attention that is not causal, rotary angles that depend on the length).
        """
        settings = generation.Settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            num_return_sequences=num_return_sequences,
            num_beams=num_beams,
            use_cache=use_cache,
            stop=stop,
            capture=capture,
            limit_bytes=limit_bytes,
        )
        return generation.generate(self, self.tokens(inputs, bos=bos), edits_for(self, edits), settings)

    def generate_stream(
        self, inputs: Inputs, *, edits: Edit | Sequence[Edit] = (), bos: bool | None = None, **options: Any
    ) -> GenerationStream:
        """`generate` step by step: iterate for a `GenerationStep` (ids and pieces of text, row by row) each.

        Options as in `generate`, without beams. The stream's `generation` is what `generate` returns, of what was
        made until the loop was left.
        """
        tokens, found = self.tokens(inputs, bos=bos), edits_for(self, edits)
        settings = generation.Settings(**options)
        if settings.num_beams > 1:
            raise CutawayError("Beams are known only at the end, so they cannot be streamed; use generate.")
        return GenerationStream(lambda on_step: generation.generate(self, tokens, found, settings, on_step))

    def chat_tokens(self, messages: Sequence[Message] | Sequence[Sequence[Message]], *, answer: bool = True) -> Tokens:
        """A conversation, or a list of them, through the model's chat template; with `answer` the assistant's turn is
        open.
        """
        if self.tokenizer is None or getattr(self.tokenizer, "chat_template", None) is None:
            raise CutawayError(f"{self.name} has no chat template; give it plain text with lm.generate.")
        conversations = _conversations(messages)
        rows = []
        for conversation in conversations:
            try:
                ids = self.tokenizer.apply_chat_template(
                    [dict(m) for m in conversation],  # type: ignore[arg-type]
                    tokenize=True,
                    add_generation_prompt=answer,
                    return_dict=False,
                )
            except Exception as error:  # the template is the model's own program and may raise anything
                raise CutawayError(f"The chat template of {self.name} refuses these messages: {error}") from error
            rows.append([int(i) for i in ids])  # type: ignore[union-attr]
        return self.tokens(rows)

    def chat(self, messages: Sequence[Message] | Sequence[Sequence[Message]], **options: Any) -> Generation:
        """Answer a conversation (a list of {"role", "content"}) or a list of them; options as in `generate`."""
        return self.generate(self.chat_tokens(messages), **options)

    # Weights, by name and orientation

    def unembed(self, residual: Tensor) -> Tensor:
        """What the model would answer from a stream [..., d]: final norm, unembedding and softcap, [..., V]."""
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

    def output_directions(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Rows of the unembedding, [n, d]: the direction in ln_final's output that raises each token's logit.

        A factor that the model puts on its logits is in them; a softcap is not.
        """
        chosen = self._ids(ids, answers=True)
        return weight_matrix(self.family.unembed).detach().T[chosen.to(self.device)] * self.family.logit_scale

    def _layer(self, layer: int) -> Layer:
        if type(layer) is not int or not -self.n_layers <= layer < self.n_layers:
            raise CutawayError(f"{self.name} has no layer {layer!r}; its layers are 0 to {self.n_layers - 1}.")
        return self.family.layers[layer]

    def w_o(self, layer: int) -> Tensor:
        """Output projection by head, [H, h, d]."""
        return weight_matrix(self._layer(layer).output).detach().unflatten(0, (self.n_heads, -1))

    def _w(self, layer: int, part: str) -> Tensor:
        found = self._layer(layer).projection(part)
        if found is None or not found.direct:
            raise CutawayError(
                f"{self.name} has no matrix from the stream to attn.{part}: latent attention computes it in two steps."
            )
        return found.split(weight_matrix(found.module))[part].detach().transpose(0, 1)

    def w_q(self, layer: int) -> Tensor:
        """Query projection by head, [H, d, h] (before QK-norm and rotary)."""
        return self._w(layer, "q")

    def w_k(self, layer: int) -> Tensor:
        """Key projection by key-value head, [KV, d, h]."""
        return self._w(layer, "k")

    def w_v(self, layer: int) -> Tensor:
        """Value projection by key-value head, [KV, d, h]."""
        return self._w(layer, "v")

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise CutawayError(
            f"A LanguageModel is neither pickled nor copied; load it again by its name ({self.name}), or attach a copy "
            "of its model."
        )

    def _site_table(self) -> SiteTable:
        family = self.family
        kinds = list(KINDS.values())
        inside = [kind for kind in kinds if kind.per_layer]
        first = kinds.index(inside[0])
        order = [(kind, None) for kind in kinds[:first]]
        order += [(kind, layer) for layer in range(self.n_layers) for kind in inside]
        order += [(kind, None) for kind in kinds[first + len(inside) :]]
        sites = []
        for kind, layer in order:
            name = kind.name if layer is None else kind.name.replace("{l}", str(layer))
            sizes = family.sizes(kind.name, layer or 0)
            shape = tuple(sizes.get(part, part) for part in kind.dims.split())
            absent = family.absent(kind.name, layer or 0)
            experts = range(sizes["E"] if absent is None else 1) if "{e}" in name else (0,)
            sites += [Site(name.replace("{e}", str(e)), kind, layer, shape, absent) for e in experts]
        return SiteTable(sites, self.n_layers)

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


def _conversations(messages: Any) -> list[list[Message]]:
    """One conversation or several, as a list of lists of messages."""
    given = list(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else []
    if given and all(isinstance(message, Mapping) for message in given):
        return [given]
    if given and all(isinstance(c, Sequence) and c and all(isinstance(m, Mapping) for m in c) for c in given):
        return [list(conversation) for conversation in given]
    raise CutawayError(
        'A chat is a list of messages such as [{"role": "user", "content": "Hello"}], or a list of such lists; got '
        f"{messages!r}."
    )


def _plain(values: Any) -> Any:
    """A tensor, an array or a tuple as a list; anything else as it is."""
    if isinstance(values, tuple):
        return list(values)
    return values.tolist() if hasattr(values, "tolist") else values


def _single(index: Any) -> int | None:
    return index if isinstance(index, int) else None


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    device_map: loading.DeviceMap | None = None,
    offload_folder: str | Path | None = None,
) -> LanguageModel:
    """Load a model: "atlas" (shipped), a local folder (of a model, or of a PEFT adapter), or a hub id.

    `dtype` is fp32 by default on a CPU and the checkpoint's own on a GPU; `device` is a GPU if there is one.
    `device_map` places the parts as transformers does ("auto", or module -> device, "cpu" or "disk"), with
    `offload_folder` for those on "disk". Raises CutawayError: no such model, a folder without weights or with damaged
    ones, missing weights, a tokenizer that does not fit, no causal language model, an unsupported family.
    """
    hf, tokenizer, name, identify = loading.load_parts(
        model, dtype=dtype, device=device, revision=revision, device_map=device_map, offload_folder=offload_folder
    )
    loading.check_tokenizer(tokenizer, hf, name)
    return LanguageModel(hf, tokenizer, name, identify)


def attach(
    hf_model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    description: Description | Mapping[str, Any] | None = None,
    name: str | None = None,
) -> LanguageModel:
    """Look into a model that is already in memory. Nothing is changed, copied or looked up anywhere.

    It may be placed on several devices or offloaded by accelerate, quantised, or have adapters (of PEFT, as a PEFT
    model or in the model itself). A module that is not one of transformers takes a `description` of its parts, which
    the self-test checks (`Description`, or a dict of its fields; docs/your-own-model.md); `lm.hf` is then a wrapper,
    with the module as `lm.hf.module`. Raises CutawayError, with the reason, if the family is not supported, the
    description or the tokenizer does not fit, or what stands around the model would be lost.
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
    loading.check_kind(hf_model.config, chosen)
    loading.check_tokenizer(tokenizer, hf_model, chosen)
    return LanguageModel(hf_model, tokenizer, chosen, lambda: loading.identity_of_parameters(hf_model, chosen))

"""What the parts below `LanguageModel` need of it, so that none of them imports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cutaway.artifacts.manifest import ModelIdentity
from cutaway.model.architecture.families import Family
from cutaway.model.architecture.ropes import Ropes
from cutaway.model.edits.edit import Edit
from cutaway.model.forward.run import Run
from cutaway.model.sites import SiteTable
from cutaway.model.tokens import Tokens


class Attached(Protocol):
    """A model with named sites: what runs, sweeps, generations and self-tests use of a `LanguageModel`."""

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    family: Family
    ropes: Ropes | None
    layer_forms: dict[nn.Module, int | None]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    d_vocab_in: int
    context_length: int

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def causal(self) -> bool: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int | None: ...

    @property
    def architecture(self) -> str: ...

    def identity(self) -> ModelIdentity: ...

    def identity_at(self, state: int) -> Callable[[], ModelIdentity]: ...

    def weights_state(self) -> int: ...

    def sites(self) -> SiteTable: ...

    def tokens(self, inputs: Any, *, bos: bool | None = None) -> Tokens: ...

    def spelled(self, rows: list[list[int]]) -> tuple[tuple[str, ...], ...]: ...

    def token_strings(self, ids: Any) -> list[str]: ...

    def run(
        self,
        inputs: Any,
        *,
        capture: str | Sequence[str] | None = None,
        edits: Edit | Sequence[Edit] = (),
        logits: Literal["all", "last"] | None = "all",
        resume: Run | None = None,
        limit_bytes: int | None = None,
    ) -> Run: ...

    def unembed(self, residual: Tensor) -> Tensor: ...

    def w_o(self, layer: int) -> Tensor: ...

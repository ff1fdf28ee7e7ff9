"""Where a patch takes its values from: a run, a generation, or what an edit that was saved keeps of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cutaway.artifacts.manifest import ModelIdentity
from cutaway.model.sites import SiteTable
from cutaway.model.tokens import Tokens


class Captures(Protocol):
    """A run or a generation: captured values by site name, and whose they are."""

    @property
    def tokens(self) -> Tokens: ...

    @property
    def site_table(self) -> SiteTable: ...

    @property
    def identity(self) -> Callable[[], ModelIdentity]: ...

    def __contains__(self, site: str, /) -> bool: ...

    def __getitem__(self, site: str, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class StoredSource:
    """What a patch keeps of the run that it takes values from: the values it needs, and where they came from.

    `values[site]` is [len(rows), len(columns), ...] (destinations first at scores and pattern) of the source's batch
    `tokens`.
    """

    tokens: Tokens
    values: Mapping[str, Tensor]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    model: ModelIdentity

    def identity(self) -> ModelIdentity:
        """The model of the source run."""
        return self.model


Source = Captures | StoredSource
"""What a patch takes its values from."""

"""Where a patch takes its values from: a run, a generation, or what an edit that was saved keeps of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NoSuchSite
from cutaway.artifacts.manifest import ModelIdentity
from cutaway.model.edits.positions import Places
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


def stored_source(
    source: Source, site: str, positions: Places, source_rows: tuple[int, ...] | None, edit: object
) -> StoredSource:
    """The part of a source that an edit of `site` can ever ask for; `edit` is what errors name.

    Raises CutawayError where the source holds no value for it.
    """
    if isinstance(source, StoredSource):
        return source
    sites = [name for name in source.site_table.expand(site) if name in source]
    if not sites:
        raise NoSuchSite(f"The source of '{edit}' did not capture '{site}'; add it to its capture=.")
    tokens = source.tokens.to("cpu")
    rows = sorted({*source_rows}) if source_rows is not None else list(range(len(tokens)))
    rows = [row for row in rows if 0 <= row < len(tokens)]
    asked = _numbers_in(positions)
    columns = list(range(tokens.ids.shape[1]))
    if asked is not None:
        columns = sorted(
            {
                int(tokens.first[row]) + p % length
                for row, length in zip(rows, [int(tokens.lengths[row]) for row in rows], strict=True)
                for p in asked
                if -length <= p < length
            }
        )
    values = {}
    for name in sites:
        value = source[name].detach().cpu()
        value = value.transpose(1, 2) if name.endswith((".scores", ".pattern")) else value
        if value.shape[1] != tokens.ids.shape[1]:
            raise CutawayError(f"'{edit}': the source run holds '{name}' at its last position only.")
        values[name] = value[rows][:, columns].contiguous()
    return StoredSource(tokens, values, tuple(rows), tuple(columns), ModelIdentity("", None, ""))


def _numbers_in(where: Places) -> list[int] | None:
    """Every number of plain positions, or None for the other forms."""
    if isinstance(where, int):
        return [where]
    if isinstance(where, tuple):
        return [q for p in where for q in (p if isinstance(p, tuple) else (p,))]
    return None

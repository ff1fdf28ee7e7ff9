"""`patch_grid` and `patch_cell` with every option by its own name, on models that do no task."""

from dataclasses import fields
from typing import Any

from cutaway.causal.patching import patch
from cutaway.causal.patching.cells import PatchedCell
from cutaway.causal.patching.grid import PatchGrid
from cutaway.causal.patching.patch import Parts, PatchOptions


def _grouped(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with the fields of `Parts` and `PatchOptions` in these."""
    given.setdefault("force", True)
    for name, kind in (("parts", Parts), ("options", PatchOptions)):
        own = {field.name: given.pop(field.name) for field in fields(kind) if field.name in given}
        if own:
            given[name] = kind(**own)
    return given


def patch_grid(lm: Any, pairs: Any, **given: Any) -> PatchGrid:
    return patch.patch_grid(lm, pairs, **_grouped(given))


def patch_cell(lm: Any, pairs: Any, site: str, **given: Any) -> PatchedCell:
    given.pop("layers", None)
    return patch.patch_cell(lm, pairs, site, **_grouped(given))

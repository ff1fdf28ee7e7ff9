"""The tour: one command from a model to a page that shows its insides."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cutaway.draw.blocks import TourResult


def run_tour(
    model: str = "atlas",
    *,
    out: Path,
    corpus: Path | None = None,
    document_separator: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    only: str | None = None,
) -> "TourResult":
    """See `cutaway.tour.run.run_tour`; this one imports torch only when called."""
    from cutaway.tour import run

    return run.run_tour(
        model, out=out, corpus=corpus, document_separator=document_separator, seed=seed, overwrite=overwrite, only=only
    )

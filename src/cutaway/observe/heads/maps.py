"""How scores of heads are drawn and named: a map of layer × head, and what each kind measures in words."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from torch import Tensor

from cutaway.draw.heatmap import heatmap_html
from cutaway.draw.scale import Scale

_MEANINGS: dict[str, str] = {
    "previous": "attention to the token before",
    "duplicate": "attention to the same token earlier",
    "induction": "attention to the token after the same token earlier (prefix matching)",
    "current": "attention to the token itself",
    "first": "attention to the first token, where heads rest",
    "relative-position": "share of the attention's variation that distance alone foresees",
    "absolute-position": "share of the attention's variation that the two positions alone foresee",
    "induction-copying": "share of the logits it raises that goes to the token that followed last time",
    "retrieval": "attention to the needle",
    "copying": "OV eigenvalues, Σλ / Σ|λ|: 1 raises each token it reads, −1 lowers it",
}
ON_TEXT = " (text)"
"""Ends the name of a kind that is scored on the user's text instead of random tokens."""
SHARE, BALANCE = Scale(0.0, 1.0), Scale(-1.0, 1.0, True)
"""Scales of shares of attention, and of a balance that may fall below 0."""


def meaning(kind: str) -> str:
    """What a kind of score measures, in words."""
    said = _MEANINGS.get(kind.removesuffix(ON_TEXT), "")
    return f"{said}, on the text" if kind.endswith(ON_TEXT) else said


def head_map(values: Tensor, units: str, title: str, scale: Scale, marks: Sequence[tuple[int, int]] = ()) -> Markup:
    """Layer × head, one cell per head."""
    layers, heads = values.shape
    return heatmap_html(
        rows=[f"layer {i}" for i in range(layers)],
        columns=[f"head {i}" for i in range(heads)],
        values=values.tolist(),
        title=title,
        units=units,
        marks=marks,
        scale=scale,
    )

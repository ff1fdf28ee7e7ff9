"""Attention patterns over the tokens of one prompt, to look at: in a notebook, on a page, as SVG or PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import atomic_path, refuse_replacing
from cutaway.draw.attention import Pattern, attention_html, attention_svg
from cutaway.draw.page import page_html, write_page
from cutaway.draw.style import standalone
from cutaway.model.edits.edits import Edit
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.observe.heads.kinds import attention_layers
from cutaway.observe.heads.report import Head, name

CELLS = 2**24
"""How many cells a view may hold: 16 million, which makes a page of some 20 MB."""


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Patterns of some heads on one prompt. A notebook shows it; `html()`, `svg()`, `png()`, `save()` give files.

    `values` is uint8 [n, p, p], attention times 255 (so to 0.002), in the order of `heads`; `skipped` says which
    layers have no pattern and why.
    """

    model: str
    tokens: tuple[str, ...]
    heads: tuple[Head, ...]
    values: Tensor
    skipped: dict[int, str]
    start: Head

    def pattern(self, head: Head) -> Tensor:
        """One head's attention [p, p], to 0.002."""
        return self.values[self._place(head)].float() / 255

    def html(self) -> Markup:
        """The interactive fragment; it needs the style sheet of `draw.style`, which every page of cutaway has."""
        return attention_html(
            tokens=self.tokens, patterns=self._patterns(self.heads), title=self._title, start=self.start
        )

    def _repr_html_(self) -> str:
        return str(standalone(self.html()))

    def svg(self, head: Head | None = None, *, dark: bool = False) -> str:
        """One head with its tokens, or the grid of all heads, as a static SVG document."""
        heads = self.heads if head is None else (self.heads[self._place(head)],)
        return attention_svg(tokens=self.tokens, patterns=self._patterns(heads), title=self._title, dark=dark)

    def png(self, path: str | Path, head: Head | None = None, *, dark: bool = False, zoom: float = 2.0) -> Path:
        """Write `svg` as a PNG, `zoom` pixels a unit. Needs resvg_py: CutawayError says how to install it."""
        try:
            import resvg_py
        except ImportError as error:
            raise CutawayError("A PNG needs resvg_py: pip install 'cutaway[png]', or write the SVG.") from error
        path = Path(path)
        drawn = resvg_py.svg_to_bytes(svg_string=self.svg(head, dark=dark), zoom=zoom)
        refuse_replacing(path, "PNG", "IHDR")
        with atomic_path(path) as temporary:
            temporary.write_bytes(bytes(drawn))
        return path

    def save(self, path: str | Path, command: str | None = None) -> Path:
        """Write a self-contained page."""
        path = Path(path)
        lead = f"{self.model}, {len(self.heads)} heads on {len(self.tokens)} tokens."
        section = ("Attention", self._skipped_text(), self.html())
        write_page(path, page_html(title="Attention", sections=[section], lead=lead, command=command))
        return path

    def __repr__(self) -> str:
        return f"AttentionView of {self.model}: {len(self.heads)} heads × {len(self.tokens)} tokens"

    @property
    def _title(self) -> str:
        return f"{self.model}: {''.join(self.tokens)}"

    def _skipped_text(self) -> str:
        return " ".join(f"Layer {layer} has no pattern: {reason}." for layer, reason in self.skipped.items())

    def _place(self, head: Head) -> int:
        if tuple(head) not in self.heads:
            held = ", ".join(name(h) for h in self.heads[:4]) + (", …" if len(self.heads) > 4 else "")
            raise CutawayError(f"This view has no {name(head)}; it holds {held}.")
        return self.heads.index((head[0], head[1]))

    def _patterns(self, heads: Sequence[Head]) -> list[Pattern]:
        return [
            Pattern(layer=head[0], head=head[1], values=self.values[self._place(head)].numpy().tobytes())
            for head in heads
        ]


def attention_view(
    lm: LanguageModel,
    prompt: Inputs,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | Sequence[Head] | None = None,
    *,
    edits: Edit | Sequence[Edit] = (),
    start: Head | None = None,
) -> AttentionView:
    """The attention patterns of a prompt, of all heads, or of some.

    `layers` and `heads` choose them (numbers; every chosen head of every chosen layer), or `heads` names (layer, head)
    pairs. `edits` are in force while it looks. `start` is the head that is shown first: by default the one with the
    least attention on the first token, where heads rest.

    Raises CutawayError: several prompts, a head or layer that the model has not or that has no pattern, too many cells.
    """
    tokens = lm.tokens(prompt)
    if len(tokens) != 1:
        raise CutawayError(f"An attention view shows one prompt, not {len(tokens)}; make one for each.")
    usable, skipped = attention_layers(lm, "pattern")
    chosen = _chosen(lm, layers, heads, usable, skipped)
    p = int(tokens.lengths[0])
    if len(chosen) * p * p > CELLS:
        raise CutawayError(
            f"{len(chosen)} heads on {p} tokens are {len(chosen) * p * p:,} cells, more than the {CELLS:,} that a page "
            "can bear; name fewer layers or heads, or a shorter prompt."
        )
    wanted = sorted({layer for layer, _ in chosen})
    run = lm.run(tokens, capture=[f"blocks.{layer}.attn.pattern" for layer in wanted], edits=edits, logits=None)
    real = tokens.mask[0].cpu()
    patterns = [run[f"blocks.{layer}.attn.pattern"][0, head].float().cpu()[real][:, real] for layer, head in chosen]
    values = torch.stack(patterns)
    if start is None:
        start = chosen[int(values[:, :, 0].mean(1).argmin())]
    elif tuple(start) not in chosen:
        raise CutawayError(f"start={start!r} is not among the heads of this view.")
    quantised = (values * 255).round().clamp(0, 255).to(torch.uint8)
    left_out = skipped if layers is None and heads is None else {}
    return AttentionView(lm.name, tokens.strings[0], tuple(chosen), quantised, left_out, (start[0], start[1]))


def _chosen(
    lm: LanguageModel,
    layers: int | Sequence[int] | None,
    heads: int | Sequence[int] | Sequence[Head] | None,
    usable: list[int],
    skipped: dict[int, str],
) -> list[Head]:
    at = list(usable) if layers is None else [layers] if isinstance(layers, int) else list(layers)
    given = list(range(lm.n_heads)) if heads is None else [heads] if isinstance(heads, int) else list(heads)
    pairs = [h for h in given if not isinstance(h, int)]
    if pairs and (layers is not None or len(pairs) != len(given)):
        raise CutawayError("heads= takes numbers beside layers=, or (layer, head) pairs alone.")
    try:
        chosen = [(int(a), int(b)) for a, b in pairs] if pairs else [(a, int(b)) for a in at for b in given]  # type: ignore[misc, arg-type]
    except (TypeError, ValueError) as error:
        raise CutawayError(f"heads={heads!r} is neither numbers nor (layer, head) pairs.") from error
    if not chosen:
        raise CutawayError("There is no head to show; name at least one layer and head.")
    for layer, head in chosen:
        if layer in skipped:
            raise CutawayError(f"Layer {layer} of {lm.name} has no attention pattern: {skipped[layer]}.")
        if layer not in usable or not 0 <= head < lm.n_heads:
            raise CutawayError(f"{lm.name} has no head {name((layer, head))}; it has {lm.n_layers} × {lm.n_heads}.")
    return list(dict.fromkeys(chosen))

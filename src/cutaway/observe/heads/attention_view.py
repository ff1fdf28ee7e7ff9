"""Attention patterns over the tokens of one prompt, to look at: in a notebook, on a page, as SVG or PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, MissingExtra, NoSuchSite, NotSupported, TooLarge
from cutaway.artifacts.files import atomic_path, refuse_replacing, write_text
from cutaway.draw.attention import Pattern, attention_html, attention_svg
from cutaway.draw.result import Result
from cutaway.model.edits.edits import Edit
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.observe.heads.kinds import attention_layers
from cutaway.observe.heads.report import Head, name
from cutaway.observe.summaries import block, spread

CELLS = 2**24
"""How many cells a view may hold: 16 million, which makes a page of some 20 MB."""


@dataclass(frozen=True, eq=False, repr=False)
class AttentionView(Result):
    """Patterns of some heads on one prompt. A notebook shows it; `svg()`, `png()` and `save()` give files.

    `save` takes .png too; its .svg is `svg()`.
    """

    title: ClassVar[str] = "Attention"

    model: str
    """The model's name."""
    tokens: tuple[str, ...]
    """The p tokens of the prompt."""
    heads: tuple[Head, ...]
    """The n (layer, head) pairs."""
    values: Tensor
    """Attention times 255, so to 0.002: uint8 [n, p, p], in the order of `heads`; row: the token that looks."""
    skipped: dict[int, str]
    """Layers that have no pattern, and why."""
    start: Head
    """The head that is shown first."""

    def pattern(self, head: Head) -> Tensor:
        """One head's attention, to 0.002.

        Args:
            head: (layer, head).

        Returns:
            [p, p]: row i is where token i looks.

        Raises:
            NoSuchSite: a head that the view does not hold.
        """
        return self.values[self._place(head)].float() / 255

    def summary(self) -> str:
        """What is held, and where the head that is shown first looks."""
        lines = [f"attention of {self.model}: {len(self.heads)} heads × {len(self.tokens)} tokens"]
        pattern = self.pattern(self.start)
        lines.append(f"{name(self.start)}, which is shown first, looks")
        for i in spread(len(self.tokens), 8):
            at = int(pattern[i].argmax())
            lines.append(f"  from {i} {self.tokens[i]!r:<14} to {at} {self.tokens[at]!r:<14} {pattern[i, at]:.2f}")
        return block([*lines, *([self._skipped_text()] if self.skipped else [])])

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "tokens": list(self.tokens),
            "heads": [list(head) for head in self.heads],
            "attention": [(self.pattern(head) * 1000).round().div(1000).tolist() for head in self.heads],
            "skipped": {str(layer): reason for layer, reason in self.skipped.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row per head and pair of tokens with any attention (0.002 or more)."""
        found = []
        for (layer, head), values in zip(self.heads, self.values, strict=True):
            for i, j in values.nonzero().tolist():
                found.append(
                    {"layer": layer, "head": head, "from": i, "to": j, "from_token": self.tokens[i]}
                    | {"to_token": self.tokens[j], "attention": values[i, j].item() / 255}
                )
        return found

    def drawing(self) -> Markup:
        """The interactive fragment: a map per head, the prompt's tokens, where each looks and who looks at it."""
        return self.html()

    def html(self) -> Markup:
        """The interactive fragment; it needs the style sheet of `draw.style`, which every page of cutaway has."""
        return attention_html(
            tokens=self.tokens, patterns=self._patterns(self.heads), title=self._title, start=self.start
        )

    def svg(self, head: Head | None = None, *, dark: bool = False) -> str:
        """A static SVG document.

        Args:
            head: one head with its tokens; the grid of all heads if None.
            dark: light lines on a dark ground.
        """
        heads = self.heads if head is None else (self.heads[self._place(head)],)
        return attention_svg(tokens=self.tokens, patterns=self._patterns(heads), title=self._title, dark=dark)

    def png(self, path: str | Path, head: Head | None = None, *, dark: bool = False, zoom: float = 2.0) -> Path:
        """Write `svg` as a PNG.

        Args:
            path: the file.
            head: one head with its tokens; the grid of all heads if None.
            dark: light lines on a dark ground.
            zoom: pixels per unit of the SVG.

        Returns:
            The path.

        Raises:
            MissingExtra: resvg_py is not installed.
        """
        try:
            import resvg_py
        except ImportError as error:
            raise MissingExtra("A PNG needs resvg_py: pip install 'cutaway[png]', or write the SVG.") from error
        path = Path(path)
        drawn = resvg_py.svg_to_bytes(svg_string=self.svg(head, dark=dark), zoom=zoom)
        refuse_replacing(path, "PNG", "IHDR")
        with atomic_path(path) as temporary:
            temporary.write_bytes(bytes(drawn))
        return path

    def save(self, path: str | Path) -> Path:
        """Write the view as what the path's suffix names.

        Args:
            path: .html is a page that needs no network, .svg and .png the grid of all heads, .json, .csv and .parquet
                the numbers.

        Returns:
            The path.
        """
        path = Path(path)
        if path.suffix.lower() == ".png":
            return self.png(path)
        if path.suffix.lower() != ".svg":
            return super().save(path)
        refuse_replacing(path, "SVG", "<svg")
        write_text(path, self.svg())
        return path

    @property
    def _title(self) -> str:
        return f"{self.model}: {''.join(self.tokens)}"

    def _skipped_text(self) -> str:
        return " ".join(f"Layer {layer} has no pattern: {reason}." for layer, reason in self.skipped.items())

    def _place(self, head: Head) -> int:
        if tuple(head) not in self.heads:
            held = ", ".join(name(h) for h in self.heads[:4]) + (", …" if len(self.heads) > 4 else "")
            raise NoSuchSite(f"This view has no {name(head)}; it holds {held}.")
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

    Args:
        lm: the model.
        prompt: one prompt.
        layers: numbers of layers; all that have patterns if None.
        heads: numbers of heads (every chosen head of every chosen layer), or (layer, head) pairs without `layers`; all
            if None.
        edits: in force while it looks.
        start: the head that is shown first; by default the one with the least attention on the first token, where heads
            rest.

    Returns:
        The patterns.

    Raises:
        NoSuchSite: a head or layer that the model has not.
        NotSupported: a layer that has no pattern.
        TooLarge: more than 2^24 cells.
        CutawayError: several prompts.

    Example:
        >>> view = attention_view(cutaway.load("atlas"), "Dallas is in", layers=[3, 7])
        >>> view.save("attention.html")  # doctest: +SKIP
        PosixPath('attention.html')
    """
    tokens = lm.tokens(prompt)
    if len(tokens) != 1:
        raise CutawayError(f"An attention view shows one prompt, not {len(tokens)}; make one for each.")
    usable, skipped = attention_layers(lm, "pattern")
    chosen = _chosen(lm, layers, heads, usable, skipped)
    p = int(tokens.lengths[0])
    if len(chosen) * p * p > CELLS:
        raise TooLarge(
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
            raise NotSupported(f"Layer {layer} of {lm.name} has no attention pattern: {skipped[layer]}.")
        if layer not in usable or not 0 <= head < lm.n_heads:
            raise NoSuchSite(f"{lm.name} has no head {name((layer, head))}; it has {lm.n_layers} × {lm.n_heads}.")
    return list(dict.fromkeys(chosen))

"""Blocks of plain data (`cutaway.draw.blocks`) as HTML fragments, each with its legend and caption."""

import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from cutaway.draw import charts, heatmap, latents, panels, tokens
from cutaway.draw.blocks import (
    Bars,
    Block,
    Compare,
    EffectBlock,
    Features,
    Figures,
    Heatmap,
    Lens,
    Line,
    Table,
    Text,
    Tokens,
)
from cutaway.draw.text import escape


def draw_block(block: Block, link: Callable[[str], Markup] = lambda text: Markup(escape(text))) -> Markup:
    """One block as an HTML fragment: its drawing, legend and caption.

    Args:
        block: What is drawn.
        link: Turns prose into HTML, perhaps with links to a glossary; escapes it and no more if not given.

    Returns:
        The fragment; its style is that of `cutaway.draw.style`.

    Raises:
        CutawayError: the block is an effect without controls.
    """
    match block:
        case Text():
            paragraphs = [part for part in re.split(r"\n\s*\n", block.text) if part.strip()]
            return Markup("").join(Markup("<p>{}</p>").format(link(part)) for part in paragraphs)
        case Figures():
            return panels.figures_html(**_data(block))
        case EffectBlock():
            return charts.effect_html(block.effect)
        case Features():
            return latents.features_html(**_data(block))
        case Table():
            data = _data(block)
            fold = data.pop("fold")
            figure = _figure(panels.table_html(**data, title=block.caption or fold or "Table"), link(block.caption))
            return panels.fold(fold, figure) if fold else figure
        case Heatmap():
            data = _data(block)
            scale = heatmap.heatmap_scale(block.values, data.pop("diverging"))
            drawn = heatmap.heatmap_html(**data, title=block.caption or "Heatmap", scale=scale)
            return _figure(drawn, link(block.caption))
        case Line():
            series = _data(block)["series"]
            drawn = charts.line_svg(
                series=series, title=block.caption or block.y_label, x_label=block.x_label, y_label=block.y_label
            )
            table = charts.line_table(series, block.x_label)
            return _figure(charts.line_legend(series) + drawn + table, link(block.caption))
        case Bars():
            return _figure(charts.bars_html(**_data(block)), link(block.caption))
        case Tokens():
            return _figure(tokens.tokens_html(**_data(block)), link(block.caption))
        case Lens():
            drawn = tokens.lens_html(**_data(block), title=block.caption or "Logit lens")
            return _figure(drawn, link(block.caption))
        case Compare():
            return _figure(panels.compare_html(**_data(block)), link(block.caption))


def _data(block: Block) -> dict[str, Any]:
    return block.model_dump(exclude={"kind", "caption"})


def _figure(drawn: Markup, caption: Markup) -> Markup:
    if not caption:
        return Markup("<figure>{}</figure>").format(drawn)
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(drawn, caption)

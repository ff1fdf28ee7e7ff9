"""Dictionary latents, one folded panel each."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cutaway.draw.scale import scale_for
from cutaway.draw.text import escape, number, token_html
from cutaway.draw.tokens import TokenRow, token_run


def features_html(*, items: Sequence[Mapping[str, Any]], opened: int = 1) -> Markup:
    """Dictionary latents, one folded panel each, the first `opened` of them open.

    An item has id, label, density (share of tokens on which it is active), top_examples (tokens and values), promotes
    and suppresses (token, value), and where they apply label_note, auroc, concept.
    """
    panels = []
    for place, item in enumerate(items):
        about = [f"active on {number(_percent(item['density']), '%')} of tokens"]
        if item.get("auroc") is not None:
            concept = f" for {escape(item['concept'])}" if item.get("concept") else ""
            about.append(f"AUROC {number(item['auroc'])}{concept}")
        note = f' <span class="cw-small">{escape(item["label_note"])}</span>' if item.get("label_note") else ""
        scale = scale_for([value for example in item["top_examples"] for value in example["values"]] + [0.0])
        examples = "".join(token_run(_firing(example), scale, breaks=False) for example in item["top_examples"])
        opening = ' open=""' if place < opened else ""
        columns = _logits("Promotes", item.get("promotes") or ())
        columns += _logits("Suppresses", item.get("suppresses") or ())
        panels.append(
            f'<details class="cw-latent"{opening}><summary>'
            f'<span class="cw-id">#{item["id"]}</span>'
            f'<span class="cw-latent-label">{escape(item["label"])}{note}</span>'
            f'<span class="cw-latent-about">{" · ".join(about)}</span></summary>'
            f'<div class="cw-latent-body"><div class="cw-latent-examples"><div class="cw-over">Top examples</div>'
            f"{examples or '<p>none recorded</p>'}</div>{columns}</div></details>"
        )
    return Markup(f'<div class="cw-latents">{"".join(panels)}</div>')


def _firing(example: Mapping[str, Any]) -> TokenRow:
    """An example without a tint where the latent is silent."""
    return {"tokens": example["tokens"], "values": [value or None for value in example["values"]]}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _logits(title: str, effects: Sequence[Mapping[str, Any]]) -> str:
    if not effects:
        return ""
    items = "".join(
        f'<li><span class="cw-token">{token_html(effect["token"])}</span><span>{number(effect["value"], digits=2)}'
        "</span></li>"
        for effect in effects
    )
    return f'<div class="cw-logits"><div class="cw-over">{title}</div><ol>{items}</ol></div>'

"""The tour's page: one `index.html` that holds everything it needs and asks the network for nothing."""

import json
import re
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cutaway.artifacts.files import write_text
from cutaway.draw import charts, panels
from cutaway.draw.blocks import EffectBlock, EffectJson, Figures, Section, TourResult
from cutaway.draw.fragments import draw_block
from cutaway.draw.glossary import Linker
from cutaway.draw.page import glossary_html, shell
from cutaway.draw.stack import stack_svg
from cutaway.draw.text import compact, escape, interval, number, short


def render(result: TourResult) -> str:
    """The whole page as HTML.

    Raises:
        CutawayError: an effect has no controls.
    """
    link = Linker()
    link("control, interval")  # the line on how to read the page links to these
    template = _environment().get_template("index.html.j2")
    sections = [_section(place, section, link) for place, section in enumerate(result.sections, start=1)]
    body = template.render(
        result=result,
        sections=sections,
        in_short=[(view, _key_figure(view["data"])) for view in sections],
        facts=_facts(result),
        stack=_stack(result),
        provenance=_provenance(result),
        glossary=glossary_html(link),
        configuration=json.dumps(result.configuration, indent=2, ensure_ascii=False),
        duration=_duration(result.total_seconds),
    )
    return shell(result.title, body)


def write_tour(result: TourResult, path: Path) -> None:
    """Write a tour's page, whole or not at all.

    Args:
        result: The tour.
        path: The file: `index.html`.

    Raises:
        CutawayError: An effect has no controls, or the disk refuses.
    """
    write_text(path, render(result))


def _section(place: int, section: Section, link: Linker) -> dict[str, Any]:
    """What the template shows of a section, in the order in which it is read."""
    link.new_section()
    lead = link(section.lead)
    blocks, drawn = [], []
    for effects, some in groupby(section.blocks, lambda block: isinstance(block, EffectBlock)):
        if effects:  # neighbours are one figure
            shown = [block.effect for block in some if isinstance(block, EffectBlock)]
            blocks.append(charts.effects_html(shown))
            drawn += shown
        else:
            blocks += [draw_block(block, link) for block in some]
    if rest := [effect for effect in section.effects if effect not in drawn]:
        blocks.append(charts.effects_html(rest))
    commands = [section.command, *(effect.get("command") for effect in _effects(section))]
    return {
        "place": place,
        "data": section,
        "lead": lead,
        "blocks": blocks,
        "note": link(_not_shown(section.note) if section.status == "not shown" else section.note),
        "commands": [Markup(escape(command)) for command in dict.fromkeys(commands) if command],
        "seconds": _duration(section.seconds),
        "status": section.status.replace(" ", "-"),
    }


def _not_shown(note: str) -> str:
    """The note behind the words "Not shown", which it may already begin with."""
    return re.sub(r"^not shown[:;,.]?\s*", "", note, flags=re.IGNORECASE) or note


def _effects(section: Section) -> list[EffectJson]:
    return [*section.effects, *(block.effect for block in section.blocks if isinstance(block, EffectBlock))]


def _key_figure(section: Section) -> tuple[Markup, str] | None:
    """The section in one number and its name: the first stat tile, else the first effect; None where not shown."""
    if section.status == "not shown":
        return None
    for block in section.blocks:
        if isinstance(block, Figures):
            first = block.items[0]
            return _key(number(first.value), first.units, first.label)
    for effect in _effects(section):
        value, *ends = (_float(x) for x in (effect.get("value"), *(effect.get("interval") or ())))
        low, high = ends or (None, None)
        return _key(interval(value, low, high), effect.get("units") or "", effect.get("name") or "effect")
    return None


def _key(written: str, units: str, name: str) -> tuple[Markup, str]:
    if short(units):
        return panels.figure_html(written, units), name
    return panels.figure_html(written), f"{name} ({units})"


def _float(value: float | str | None) -> float | None:
    return None if value is None else float(value)


def _facts(result: TourResult) -> list[tuple[str, Markup]]:
    card = result.card
    facts = [("parameters", Markup(escape(compact(card.parameters))))]
    if card.context is not None:
        facts.append(("context", Markup(escape(number(card.context, "tokens")))))
    facts += [(fact.label, Markup(escape(number(fact.value, fact.units)))) for fact in card.facts]
    return facts


def _stack(result: TourResult) -> Markup:
    """The drawing of the model's blocks, when the card says how many there are."""
    for fact in result.card.facts:
        if fact.label.lower() in {"layers", "blocks"} and isinstance(fact.value, int):
            return stack_svg(fact.value)
    return Markup("")


def _provenance(result: TourResult) -> list[tuple[str, str]]:
    """What the footer names: enough to find the run and to make it again. Absent entries are left out."""
    manifest = result.manifest
    model = manifest.get("model")
    model = model if isinstance(model, dict) else {"id": model}
    entries = [
        ("manifest", manifest.get("id")),
        ("model", model.get("id") or result.card.identity),
        ("revision", model.get("revision")),
        ("weight hash", model.get("weight_hash") or manifest.get("weight_hash")),
        ("corpus hash", manifest.get("corpus_hash")),
        ("seed", manifest.get("seed", result.configuration.get("seed"))),
        ("cutaway", result.version),
        ("made", result.created),
        ("command", manifest.get("command")),
    ]
    return [(name, str(value)) for name, value in entries if value is not None and value != ""]


def _duration(seconds: float) -> str:
    if seconds < 10:
        return number(float(seconds), "s", digits=2)
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("cutaway.tour"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escape(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

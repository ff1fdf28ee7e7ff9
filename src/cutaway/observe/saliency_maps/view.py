"""Saliency maps as sections of a page: the tokens, the randomised-weights check, the deletion test, agreement."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from cutaway.draw.charts import effect_html
from cutaway.draw.page import Section
from cutaway.draw.panels import table_html
from cutaway.draw.tokens import TokenRow, tokens_html, tokens_scale
from cutaway.observe.saliency_maps.methods import TokenAttribution
from cutaway.observe.saliency_maps.report import MethodReport, SaliencyReport


def saliency_sections(report: SaliencyReport) -> list[Section]:
    """Tokens tinted by attribution, method by method, with the sanity check, the deletion test and agreement."""
    sections: list[Section] = []
    for one in report.methods:
        sections += [map_section(one.maps, one.method, one.not_shown), _checks(one)]
    if report.agreement:
        rows = [[a, b, f"{value:+.2f}"] for (a, b), value in report.agreement.items()]
        table = table_html(columns=["method", "and", "rank correlation"], rows=rows, title="agreement")
        text = "Rank correlation between two methods' maps of the same prompt."
        sections.append(("Do the methods agree?", text, table))
    return sections


def map_section(maps: Sequence[TokenAttribution], method: str, not_shown: str) -> Section:
    """The tokens of every prompt, tinted by what they add."""
    rows: list[TokenRow] = []
    for found in maps:
        gap = "" if found.gap is None else f"; the sum is off by {found.gap:+.2g} with {found.steps} steps"
        rows.append(
            {
                "tokens": found.tokens,
                "values": found.values.tolist(),
                "label": f"{found.what}: {found.value:.2f}",
                "detail": f"sum over tokens {found.values.sum():.2f}{gap}",
            }
        )
    scale = tokens_scale(rows)
    baseline = maps[0].baseline
    return (
        _name(method) + (f" (baseline: {baseline})" if baseline else ""),
        f"What it does not show: {not_shown}",
        scale.legend("logits") + tokens_html(rows=rows, units="logits", scale=scale),
    )


def _checks(one: MethodReport) -> Section:
    stages = table_html(
        columns=["given new random weights", "rank correlation", "of magnitudes"],
        rows=[[s.randomised, f"{s.signed:+.2f}", f"{s.magnitude:+.2f}"] for s in one.stages],
        title=f"{one.method} under randomised weights",
    )
    n = len(one.maps[0].tokens)
    text = (
        "Rank correlation between the map and the same prompt's map after layers got new random weights, from the top "
        f"down, and at last everything. Near 1 means that the map is not about what was learned. With {n} tokens, "
        f"unrelated maps differ from 0 by about {1 / max(1, n - 1) ** 0.5:.2f}."
    )
    fall = Markup("<p>Taking away the tokens that it ranks highest:</p>") + effect_html(one.deletion.to_json())
    return f"{_name(one.method)}: would it look the same without training?", text, stages + fall


def _name(method: str) -> str:
    return method.replace("-x-", " × ").replace("-", " ")

"""Causal tracing as a page: three heatmaps that say in words what a cell is."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from torch import Tensor

from cutaway.causal.tracing.trace import SITES, CausalTrace, Kind
from cutaway.draw.charts import effect_html
from cutaway.draw.heatmap import heatmap_scale, heatmap_svg
from cutaway.draw.page import page_html
from cutaway.draw.panels import table_html

_HEADINGS: dict[Kind, str] = {
    "state": "Restoring one state of the stream",
    "attention": "Restoring what attention writes",
    "MLP": "Restoring what the MLPs write",
}
_UNITS = "probability of the answer"


def trace_page(trace: CausalTrace, command: str) -> str:
    """The whole page: what the noise takes, and what each restored value brings back."""
    single = trace.n == 1
    grids: dict[Kind, list[list[float | None]]] = {
        kind: _plain(trace.effects[kind][..., 0] if single else trace.aie(kind)) for kind in SITES
    }
    columns = list(trace.tokens[0][trace.starts[0] :]) if single else list(trace.columns)
    scale = heatmap_scale([row for grid in grids.values() for row in grid], diverging=True)
    fact = trace.facts[0]
    whose = "" if fact.answer is not None else "the model's own guess: "
    about = f"after “{fact.prompt}” ({whose}{trace.answers[0].strip()})" if single else f"over {trace.which}"
    answer = "right answer" if not trace.guessed else "model's own guess" if trace.guessed == trace.n else "answer"
    sections: list[tuple[str, str, Markup]] = [
        (
            "What the noise takes",
            f"The {answer} has probability {trace.clean.mean():.3f}, and {trace.noised.mean():.3f} when the token "
            f"embeddings of the subject have gaussian noise of {trace.multiple:g} standard deviations (one is "
            f"{trace.sigma:.4g}) on them; mean over {trace.draws} draws. Below, one clean value at a time is put back.",
            _effects([trace.total_effect(command)]),
        )
    ]
    for kind, grid in grids.items():
        drawing = heatmap_svg(
            rows=[f"L{layer}" for layer in range(trace.n_layers)],
            columns=columns,
            values=grid,
            title=f"{_HEADINGS[kind]}: probability that comes back, by layer and {'token' if single else 'role'}",
            units=_UNITS,
            diverging=True,
            row_axis="layer",
            column_axis="token restored",
            scale=scale,
        )
        drawn = drawing + scale.legend(_UNITS) + _effects(trace.sites(kind, command))
        sections.append((_HEADINGS[kind], _reading(trace, kind, single), drawn))
    rows = [
        [
            fact.prompt,
            fact.subject,
            f"{said.strip()}{' (guess)' * (fact.answer is None)}",
            f"{clean:.3f}",
            f"{noised:.3f}",
        ]
        for fact, said, clean, noised in zip(
            trace.facts, trace.answers, trace.clean.tolist(), trace.noised.tolist(), strict=True
        )
    ]
    about_prompts = [
        *(["Prompts whose right answer is the model's most probable token."] if trace.guessed < trace.n else []),
        *(["Prompts without an answer are traced by the model's guess, right or wrong."] if trace.guessed else []),
        *([f"{len(trace.refused)} more are left out: the model answers them otherwise."] if trace.refused else []),
    ]
    sections.append(
        (
            "The prompts",
            " ".join(about_prompts),
            table_html(
                columns=["prompt", "subject", "answer", "P plain", "P with noise"],
                rows=rows,
                title="prompts",
                align=["left", "left", "left", "right", "right"],
            ),
        )
    )
    lead = f"Which states of {trace.model} bring a fact back once noise has hidden its subject, {about}."
    return page_html(title="Causal tracing", lead=lead, sections=sections, command=command)


def _reading(trace: CausalTrace, kind: Kind, single: bool) -> str:
    """How to read one heatmap."""
    if kind == "state":
        what = f"{SITES[kind]} of one layer at one token"
    else:
        what = f"{SITES[kind]} at one token in {trace.window} neighbouring layers (around the row's)"
    mean = (
        ""
        if single
        else " The mean is over prompts; a prompt without such a token is left out of its column. Against a random "
        f"other position {trace.discoveries(kind)}: of so many one in twenty is expected to be false."
    )
    return (
        f"A cell is the probability that comes back when {what} gets its clean value, the subject still hidden: 0 is "
        f"nothing, {trace.total_effect().value:.2f} would be all that the noise took, below 0 it gets worse.{mean}"
    )


def _effects(effects: Sequence[Any]) -> Markup:
    drawn = (effect_html(effect.to_json()) for effect in effects if effect.controls)
    return Markup("").join(Markup('<div style="margin-top:14px">{}</div>').format(one) for one in drawn)


def _plain(values: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in values.tolist()]

"""What a model can do, as text and as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isnan

from markupsafe import Markup

from cutaway.artifacts.results import interval_text
from cutaway.causal.accuracy import TaskResult
from cutaway.draw.charts import Bar, bars_html
from cutaway.draw.page import page_html
from cutaway.draw.panels import table_html

COLUMNS = (
    "task", "wording", "n", "right [95 %]", "shuffled", "logit difference [95 %]", "after corrupt", "P difference",
    "can it?",
)  # fmt: skip


def accuracy_rows(results: Sequence[TaskResult]) -> list[list[str]]:
    """A row of text for each task and split, under `COLUMNS`."""
    return [_row(result) for result in results]


def _row(result: TaskResult) -> list[str]:
    measured, wording = result.accuracy, _wording(result)
    if measured is None:
        return [result.task.name, wording, "0", *([""] * 5), "not tried"]
    spread = measured.logit_difference_interval
    ends = "[one pair: no interval]" if isnan(spread[0]) else interval_text(spread, 2)
    return [
        result.task.name,
        wording,
        str(measured.n),
        f"{measured.value:.2f} {interval_text(measured.interval, 2)}",
        "" if measured.control is None else f"{measured.control:.2f}",
        f"{measured.logit_difference:.2f} {ends}",
        f"{measured.corrupt_logit_difference:.2f}",
        f"{measured.probability_difference:.2f}",
        "yes" if result.able else "too few pairs" if result.reason.startswith("only ") else "no",
    ]


def _wording(result: TaskResult) -> str:
    return "held out" if result.split == "held_out" else "search"


def refused_lines(results: Sequence[TaskResult]) -> list[str]:
    """What was refused and what could not be tried, a line for each task that has such a thing."""
    lines: list[str] = []
    for task in dict.fromkeys(result.task for result in results):
        counts: Counter[str] = Counter()
        for result in results:
            if result.task == task and result.accuracy is not None:
                counts.update(result.accuracy.refusals)
        said = [f"{count} × {reason}" for reason, count in counts.most_common()]
        # the same reason for both splits is said once
        said += dict.fromkeys(f"not tried: {r.reason}" for r in results if r.task == task and r.accuracy is None)
        if task.note:
            said.append(task.note)
        if said:
            lines.append(f"{task.name}: " + "; ".join(said))
    return lines


def accuracy_text(results: Sequence[TaskResult]) -> str:
    """A table of tasks, and what was refused."""
    rows = [list(COLUMNS), ["-" * len(column) for column in COLUMNS], *accuracy_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    refused = refused_lines(results)
    if refused:
        lines += ["", "Left out:", *(f"  {line}" for line in refused)]
    return "\n".join(lines)


def accuracy_page(model: str, results: Sequence[TaskResult], command: str, threshold: float) -> str:
    """The page of a model's tasks: shares right with intervals, the whole table, what was refused."""
    able = [result for result in results if result.able]
    bars: list[Bar] = []
    for result in results:
        if result.accuracy is None:
            continue
        low, high = result.accuracy.interval
        label = f"{result.task.name}, {_wording(result)}"
        bars.append({"label": label, "value": result.accuracy.value, "low": low, "high": high})
        if result.accuracy.control is not None:
            bars.append({"label": "shuffled", "value": result.accuracy.control, "control": True})
    sections: list[tuple[str, str, Markup]] = [
        (
            "How often it is right",
            "The share of prompt pairs on which the model is right on the clean and on the corrupt prompt, with the "
            "95 % Wilson interval. A model that always gives the same answer is right on none. Hatched: the share that "
            "would be right with the prompts of all pairs shuffled.",
            bars_html(items=bars),
        ),
        (
            "Every figure",
            "Logit difference: right minus wrong answer after the clean prompt, mean with its bootstrap interval; "
            "after the corrupt prompt it should be lower. P difference: of the probabilities. Where several answers "
            f"are right (every later year), all of them together. A task can be done when at least {threshold:.0%} of "
            "its pairs are right.",
            table_html(columns=COLUMNS, rows=accuracy_rows(results), title="Tasks and scores"),
        ),
    ]
    refused = refused_lines(results)
    if refused:
        rows = [line.split(": ", 1) for line in refused]
        text = "A pair is used only if its two prompts are as long, token for token, and its answers can be told apart."
        sections.append(
            (
                "Left out",
                text,
                table_html(columns=("task", "what and why"), rows=rows, title="Left out"),
            )
        )
    lead = f"{len(able)} of {len(results)} tasks (with wording to search with, and held-out wording) can be done."
    return page_html(title=f"What {model} can do", lead=lead, sections=sections, command=command)

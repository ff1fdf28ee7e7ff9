"""A patching grid in words, as text for a terminal and as sections of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from cutaway.artifacts.results import Effect, interval_text
from cutaway.causal.accuracy import TaskAccuracy
from cutaway.causal.metrics import UNITS
from cutaway.causal.patching.cells import PatchedCell
from cutaway.causal.patching.grid import COLUMNS, LEAST_PAIRS, PatchGrid, minus_text
from cutaway.causal.patching.self_repair import SelfRepair
from cutaway.data.pairs import AlignedPairs, Prompt
from cutaway.draw.charts import effects_html
from cutaway.draw.panels import alarm_html, figures_html, table_html

_Section = tuple[str, str, Markup]


def reading(grid: PatchGrid) -> str:
    """What a cell is, and what 0 and 1 mean."""
    place = {
        "positions": "one layer and position",
        "heads": "one head",
        "components": "one attention or MLP output",
        "neurons": "one neuron",
    }[grid.over]
    if grid.over != "positions":
        place += ", at every token" if grid.at is None else f", at “{grid.at}”"
    what = _words(grid)
    left = f" ({grid.dropped} left out: their two prompts hardly differ)" if grid.dropped else ""
    if grid.direction == "denoise":
        return (
            f"Each cell runs the corrupt prompt with the clean prompt's activation at {place}. 0: the {what} stays as "
            f"after the corrupt prompt; 1: it is all brought back to that of the clean prompt. Mean over "
            f"{grid.n - grid.dropped} pairs{left}."
        )
    put = (
        "the corrupt prompt's activation"
        if grid.ablation == "resample"
        else f"{grid.ablation} in place of the activation"
    )
    if grid.ablation.startswith("gaussian"):
        put = f"{grid.ablation}, on the activation"
    return (
        f"Each cell runs the clean prompt with {put} at {place}. 0: the {what} stays as after the clean prompt; 1: it "
        f"falls to that of the corrupt prompt. Mean over {grid.n - grid.dropped} pairs{left}."
    )


def patch_text(
    grid: PatchGrid, strongest: Sequence[PatchedCell], best: Sequence[Effect], accuracy: TaskAccuracy, refused: str
) -> str:
    """The grid as text: what a cell means, the table, the strongest cells with their evidence."""
    warning = [f"  {grid.unable}: what follows is no evidence of how it is done", ""] if grid.unable else []
    lines = [
        grid.headline(),
        *warning,
        f"  {reading(grid)}",
        f"  {grid.evaluation}; the model is {accuracy}{refused}",
        "",
    ]
    if grid.over != "neurons":
        lines += [grid.table(), ""]
    width = max(len(one.cell.part + (one.cell.at or "")) for one in strongest) + 5
    heads = f"{'share':>8}{'95 % interval':>18}{'control':>9}{'p':>8}{'q':>8}{'p of all':>10}{'ratio':>8}{'flips':>7}"
    lines.append(f"  {'the largest cells':<{width}}{heads}")
    for one in strongest:
        i, j = grid.layers.index(one.layer), grid.columns.index(one.column)
        name = one.cell.part + (f" at {one.cell.at}" if one.cell.at else "")
        control = f"{one.effect.controls[0].value:.3f}" if one.effect.controls else "–"
        share, span = f"{one.effect.value:.3f}", interval_text(one.effect.interval)
        line = f"  {name:<{width}}{share:>8}{span:>18}{control:>9}{_p(one.p):>8}{_p(one.q):>8}{_p(one.p_of_all):>10}"
        lines.append(f"{line}{one.ratio_of_means:>8.3f}{grid.flip_rate[i, j]:>7.2f}")
    lines.append(
        f"  control: {grid.control}; ratio: ratio of means; "
        + (
            "no p: the model cannot do the task"
            if grid.unable
            else "p: sign flips against the control, of one cell; q: false discoveries among cells with such a p; p of "
            "all: corrected for all cells"
        )
    )
    lines += [f"  chosen on half of the pairs, measured on the others: {_written(effect)}" for effect in best]
    return "\n".join(lines)


def _written(effect: Effect) -> str:
    controls = ", ".join(f"{control.name} {control.value:.3f}" for control in effect.controls)
    return f"{effect.name} {effect.value:.3f} {interval_text(effect.interval)}, n {effect.n} ({controls})"


def _p(p: float) -> str:
    return "–" if math.isnan(p) else f"{p:.1g}" if p < 0.001 else f"{p:.3f}"


def patch_sections(
    grid: PatchGrid,
    strongest: Sequence[PatchedCell],
    best: Sequence[Effect],
    accuracy: TaskAccuracy,
    pairs: AlignedPairs,
    repair: SelfRepair | None = None,
) -> list[_Section]:
    """Can the model do it, the heatmap, the flips, the strongest cells, and what was chosen."""
    sections = [_ability(grid, accuracy, pairs), *_maps(grid)]
    sections.append(_strongest(grid, strongest))
    if best:
        sections.append(
            (
                "Chosen on half of the pairs, measured on the others",
                "The largest of many cells looks larger than it is. Here the cell is chosen on every second pair, and "
                f"its effect is that on the {best[0].n} others, beside its control.",
                effects_html(best),
            )
        )
    if repair is not None:
        sections.append(_repair(repair))
    sections.append(_choices(grid, strongest[0]))
    return sections


def _repair(repair: SelfRepair) -> _Section:
    rows = [
        [
            repair.short(effect),
            minus_text(f"{effect.value:.3f}"),
            minus_text(interval_text(effect.interval)),
            minus_text(f"{effect.controls[0].value:.3f} {interval_text(effect.controls[0].interval)}"),
        ]
        for effect in [*repair.effects(), *repair.made_up(8)]
    ]
    how = f", chosen on {repair.chosen_on} other pairs" if repair.chosen_on else ""
    text = (
        f"{repair.name} knocked out at the last token ({repair.ablation}{how}); logits, over {repair.n} pairs whose "
        f"logit difference is {repair.difference.mean():.2f}. Direct effect: what the share that it writes itself "
        "loses, the final norm's divisor frozen. Total effect: what the logit difference really loses. Direct minus "
        "total is self-repair, the sum of how other parts' shares grow; where it is negative, later parts read the "
        f"head, and more is lost than it wrote. Control: {repair.effects()[0].controls[0].name}."
    )
    columns = ("", "logits", "95 % interval", "control")
    table = table_html(columns=columns, rows=rows, title="self-repair", align=["left", "right", "right", "right"])
    return (f"Self-repair: what is made up for without {repair.name}", text, repair.drawing() + table)


def _ability(grid: PatchGrid, accuracy: TaskAccuracy, pairs: AlignedPairs) -> _Section:
    low, high = accuracy.interval
    units = UNITS.get(grid.metric, "")
    items = [
        {
            "label": "right on both prompts",
            "value": f"{accuracy.right} of {accuracy.n}",
            "detail": f"95 % interval of the share {interval_text((low, high), 2, to=True)}",
        },
        {"label": f"{_words(grid)}, clean prompts", "value": grid.clean.mean().item(), "units": units},
        {"label": f"{_words(grid)}, corrupt prompts", "value": grid.corrupt.mean().item(), "units": units},
    ]
    rows = [[_text(pair.clean), _text(pair.corrupt), str(pair.answer), str(pair.wrong)] for pair in pairs.pairs[:4]]
    table = table_html(
        columns=("clean prompt", "corrupt prompt", "answer", "wrong"), rows=rows, title="the first pairs",
        align=["left"] * 4,
    )  # fmt: skip
    refused = f" {len(pairs.refused)} pairs do not align and are left out." if pairs.refused else ""
    text = (
        f"{grid.evaluation}.{refused} After the clean prompt the answer is right, after the corrupt one the wrong one."
    )
    alarm = (
        alarm_html(f"{grid.unable}. What moves its answer is no evidence of how the task is done.")
        if grid.unable
        else ""
    )
    return ("Can the model do it?", text, alarm + figures_html(items=items) + table)  # type: ignore[arg-type]


def _words(grid: PatchGrid) -> str:
    written_out = {"kl": "KL from the clean run", "nll": "negative log-probability"}
    return written_out.get(grid.metric, grid.metric.replace("_", " "))


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _maps(grid: PatchGrid) -> list[_Section]:
    named = " A cell names its neuron, then the share." if grid.over == "neurons" else ""
    star = " Tokens with * differ between pairs or prompts; the first pair's are shown." if grid.tokens else ""
    output = (
        " The last layer's stream at the last token is the output itself, and restores all whatever the model does."
        if any(map(grid.is_output, grid.layers))
        else ""
    )
    sections = [
        (
            f"What each patch moves: {grid.site.replace('blocks.{l}.', '')}",
            f"{reading(grid)}{named} Outlined: the largest.{star}{output}",
            grid.share_map(),
        )
    ]
    if grid.flips_more:
        goal = "right" if grid.direction == "denoise" else "wrong"
        before = float(grid.base_flips.float().mean())
        text = (
            f"Share of pairs that are answered with the pair's {goal} answer under the patch; {before:.2f} without one."
        )
        sections.append(("How often the answer flips", text, grid.flip_map()))
    return sections


def _strongest(grid: PatchGrid, strongest: Sequence[PatchedCell]) -> _Section:
    rows = []
    for one in strongest:
        i, j = grid.layers.index(one.layer), grid.columns.index(one.column)
        control = one.effect.controls[0] if one.effect.controls else None
        rows.append(
            [
                one.cell.part,
                one.cell.at or "every token",
                minus_text(f"{one.effect.value:.3f}"),
                minus_text(interval_text(one.effect.interval)),
                "–" if control is None else minus_text(f"{control.value:.3f} {interval_text(control.interval)}"),
                *([] if grid.unable else [_p(one.p), _p(one.q), _p(one.p_of_all)]),
                minus_text(f"{one.ratio_of_means:.3f}"),
                f"{grid.flip_rate[i, j]:.2f}",
            ]
        )
    count = len(grid.layers) * len(grid.columns)
    text = (
        f"The largest of {count} cells by size. Share: mean over pairs of each pair's share, with its "
        f"interval over pairs. Control: {grid.control}. {_meaning_of_p(count, grid.unable)}"
        "Ratio of means: the mean difference moved over the mean difference, in which pairs that differ more count for "
        "more."
    )
    tests = [] if grid.unable else ["p", "q", "p of all"]
    columns = ["part", "at", "share", "95 % interval", "control", *tests, "ratio of means", "flips"]
    align = ["left", "left", *["right"] * (len(columns) - 2)]
    return ("The largest cells", text, table_html(columns=columns, rows=rows, title="largest cells", align=align))


def _meaning_of_p(count: int, unable: str) -> str:
    if unable:
        return "No p: the model cannot do the task. "
    return (
        "p: two-sided, signs of the pairs' differences from the control flipped at random, for the one cell; q: the "
        "share of false discoveries to expect among cells with a p as small; p of all: corrected for looking at "
        f"{count} cells. "
    )


def _choices(grid: PatchGrid, one: PatchedCell) -> _Section:
    choices = grid.choices(one.cell)
    rows = [
        ["granularity", choices.granularity],
        ["component", f"{grid.site}, one {COLUMNS[grid.over].split(' of')[0].rstrip('s')} at a time"],
        ["ablation", choices.ablation],
        ["positions", "one at a time" if grid.over == "positions" else choices.positions],
        ["direction", choices.direction],
        ["evaluation", choices.evaluation],
    ]
    text = (
        "An effect of patching depends on six choices; effects that differ in one of them are not comparable. "
        "Denoising shows what suffices, noising what is needed: behind two parts of which either is enough, noising "
        "one shows nothing; behind two that are both needed, denoising one shows nothing."
    )
    return ("The six choices", text, table_html(columns=("choice", "here"), rows=rows, title="choices"))


def too_few(pairs: int) -> str:
    """Why a grid over so few pairs is not reported."""
    left = "1 usable pair is" if pairs == 1 else f"{pairs} usable pairs are"
    return (
        f"{left} too few for an interval, and to choose a cell on one half and measure it on the other; give "
        f"{LEAST_PAIRS} or more"
    )

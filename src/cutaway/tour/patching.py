"""The tour's step that finds causes: activation patching."""

from __future__ import annotations

from typing import Any

from cutaway.artifacts.command import recording
from cutaway.causal.patching.patch import Parts, PatchOptions, patch_grid
from cutaway.draw import blocks as page
from cutaway.tour.context import Tour, position_labels


def patching(tour: Tour) -> page.Section:
    """Which activation carries the answer?"""
    about: dict[str, Any] = {
        "id": "patching",
        "title": "Activation patching",
        "question": "Which activation carries the answer?",
        "lead": (
            "Two prompts differ in one word. While the model reads the second, one activation is replaced by the first "
            "prompt's; where the answer follows, that activation carries what differs."
        ),
        "command": tour.command("patching"),
    }
    lm = tour.lm
    task = tour.gridded
    if task is None or task.pairs is None:
        return page.Section(**about, status="not shown", note=tour.not_able())
    status, note = tour.chosen(task)
    pairs = task.pairs
    names = position_labels(pairs, pairs.clean.strings[0])
    options = PatchOptions(criterion=task.task.criterion, seed=tour.seed, accuracy=task.accuracy)
    grid = patch_grid(lm, pairs, parts=Parts(names=names), options=options)
    middle = grid.layers[1:-1]
    with recording(tour.command("patching")):
        effects = [grid.best(of=of, layers=middle) for of in ("metric", "flips")]
    first = pairs.pairs[0]
    labels = list(grid.columns)
    moves = [int(row.argmax()) for row in grid.mean]
    texts = {"clean": _text(first.clean), "corrupt": _text(first.corrupt)}
    single = [grid.flips[layer, moves[layer], 0].item() for layer in range(len(moves))]
    where = "; ".join(_runs(moves, labels))
    return page.Section(
        **about,
        status=status,  # type: ignore[arg-type]
        note=f"{note} Places are chosen on every second pair and measured on the others"
        + (
            "; the first and the last layer are no candidates, since a patch there all but swaps the prompt, or hands "
            "over the answer itself."
            if middle  # a model of two layers has no other
            else "; the last layer is no candidate, since it hands over the answer itself."
        ),
        blocks=(
            page.Figures(
                items=(
                    page.Figure(
                        label="answers flipped at the best place",
                        value=round(effects[1].value, 3),
                        units="share",
                        detail=f"{effects[1].name.removesuffix(': answers flipped')}, n {effects[1].n}",
                    ),
                    page.Figure(
                        label="flipped without a patch",
                        value=round(float(grid.base_flips.float().mean()), 3),
                        units="share",
                        control=True,
                        detail="the same prompts untouched",
                    ),
                    page.Figure(
                        label="first pair",
                        value=f"{_text(first.wrong).strip()} → {_text(first.answer).strip()}",
                        detail=f"flips at the strongest position in {sum(single)} of {len(single)} layers",
                    ),
                )
            ),
            page.Text(
                text=(
                    f"First pair: `{texts['corrupt']}` receives activations from `{texts['clean']}`. The strongest "
                    f"position by layer: {where}."
                )
            ),
            page.Heatmap(
                rows=tuple(f"after layer {layer}" for layer in grid.layers),
                columns=tuple(labels),
                values=tuple(map(tuple, grid.mean.tolist())),
                caption=(
                    "Share of the logit difference moved by patching the stream at one layer and position; mean over "
                    f"{grid.n} pairs. 0: as the second prompt alone, 1: as the first. Words with * differ between "
                    "pairs."
                ),
                units="share",
                diverging=True,
                row_axis="layer",
                column_axis="position",
            ),
            *(page.EffectBlock(effect=effect.to_json()) for effect in effects),
        ),
    )


def _runs(moves: list[int], labels: list[str]) -> list[str]:
    """ "layers 0 to 3: 7 Dallas" for each stretch of layers with one strongest position."""
    found, start = [], 0
    for layer in range(1, len(moves) + 1):
        if layer == len(moves) or moves[layer] != moves[start]:
            span = f"layer {start}" if layer - 1 == start else f"layers {start} to {layer - 1}"
            found.append(f"{span} at `{labels[moves[start]].split(' ', 1)[1].rstrip('*')}`")
            start = layer
    return found


def _text(prompt: object) -> str:
    return (
        prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) if isinstance(prompt, tuple) else str(prompt)
    )

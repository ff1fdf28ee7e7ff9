"""`cutaway heads`: what every attention head looks at, and what is lost without it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from cutaway.cli.options import Count, Flag, ModuleFile, Page, Seed, model_and_prompt, opened
from cutaway.cli.output import deliver

if TYPE_CHECKING:
    from markupsafe import Markup
    from torch import Tensor

    from cutaway.draw.scale import Scale
    from cutaway.observe.attention_view import AttentionView
    from cutaway.observe.circuits import Composition
    from cutaway.observe.head_table import HeadTable

Kind = Literal[
    "previous",
    "duplicate",
    "induction",
    "induction-copying",
    "current",
    "first",
    "relative-position",
    "absolute-position",
    "copying",
    "retrieval",
]


def heads(
    model: str | None = None,
    prompt: str | None = None,
    /,
    *,
    kind: Annotated[tuple[Kind, ...], Parameter(consume_multiple=True, negative="")] = (),
    top: Count = 5,
    ablate: Literal["mean", "zero", "both", "none"] = "both",
    needle: str | None = None,
    sequences: Count = 8,
    length: Count | None = None,
    seed: Seed = 0,
    module: ModuleFile = None,
    dtype: str | None = None,
    device: str | None = None,
    json: Flag = False,
    html: Page = None,
) -> None:
    """Score, label and ablate every attention head; with a prompt, draw what each looks at.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    prompt
        A text to draw attention on, and to ablate heads on beside the repeated random tokens.
    kind
        Only these kinds of head, one or several, in the table and on the page.
    top
        How many heads of a kind the table shows.
    ablate
        What replaces a head: its mean, zero, both in turn, or none: only look.
    needle
        A piece of the prompt: also score how much its last token attends there (retrieval).
    sequences
        How many random sequences.
    length
        Random tokens in one copy; 50, or what fits, if not given.
    seed
        Of the random sequences.
    module
        Instead of the model, a model of your own: FILE.py:function, which returns a module, (module, description) or
        (module, description, tokenizer).
    dtype
        float32, bfloat16 or float16; float32 on a CPU and the checkpoint's own on a GPU if not given.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print every score, label and effect as JSON on stdout, and nothing else.
    html
        Write a page: the table, a map of the heads for each kind and each ablation, and the prompt's attention.
    """
    from cutaway.artifacts.errors import CutawayError
    from cutaway.artifacts.files import plain
    from cutaway.observe.attention_view import attention_view
    from cutaway.observe.circuits import Composition, composition
    from cutaway.observe.head_table import head_table

    model, prompt = model_and_prompt(model, prompt, module)
    if "retrieval" in kind and needle is None:
        raise CutawayError("The retrieval score needs --needle, a piece of the prompt to look for.")
    if needle is not None and prompt is None:
        raise CutawayError("--needle is a piece of a prompt: give the prompt too.")
    lm = opened(model, module, dtype=dtype, device=device)
    view = None if prompt is None or html is None else attention_view(lm, prompt)  # refuses too much before the work
    ablations = {"mean": ("mean",), "zero": ("zero",), "both": ("mean", "zero"), "none": ()}
    command = _command(model, prompt, kind, top, ablate, needle, sequences, length, seed, module, dtype, device)
    table = head_table(
        lm,
        prompt,
        needle=needle,
        n=sequences,
        length=length,
        ablations=ablations[ablate],  # type: ignore[arg-type]
        seed=seed,
        command=command,
    )
    composed: Composition | None = None
    try:
        composed = composition(lm)
        about = str(composed)
    except CutawayError as error:  # latent attention has no such circuits
        about = f"composition is not measured: {error}"
    kinds = list(dict.fromkeys(kind)) or list(table.kinds)
    text = f"{table.text(kinds, top)}\n\n{about}"
    deliver(
        text=text,
        data=plain(
            {**table.to_json(), "composition": None if composed is None else composed.to_json(), "command": command}
        ),
        page=lambda: _page(table, composed, view, kinds, top, command),
        as_json=json,
        html=html,
    )


def _command(
    model: str | None,
    prompt: str | None,
    kind: tuple[str, ...],
    top: int,
    ablate: str,
    needle: str | None,
    sequences: int,
    length: int | None,
    seed: int,
    module: str | None,
    dtype: str | None,
    device: str | None,
) -> str:
    """The command line that measures the same again."""
    import shlex

    words = ["cutaway", "heads", *(word for word in (model, prompt) if word is not None)]
    words += [word for one in kind for word in ("--kind", one)]
    given = {
        "top": (top, 5), "ablate": (ablate, "both"), "needle": (needle, None), "sequences": (sequences, 8),
        "length": (length, None), "seed": (seed, 0), "module": (module, None), "dtype": (dtype, None),
        "device": (device, None),
    }  # fmt: skip
    words += [
        word for option, (value, usual) in given.items() if value != usual for word in (f"--{option}", str(value))
    ]
    return shlex.join(words)


def _page(
    table: "HeadTable",
    composed: "Composition | None",
    view: "AttentionView | None",
    kinds: Sequence[str],
    top: int,
    command: str,
) -> str:
    from dataclasses import replace

    from cutaway.draw.page import page_html
    from cutaway.draw.scale import Scale
    from cutaway.observe.head_kinds import MEANINGS
    from cutaway.observe.head_table import LABEL_RULE

    sections = [
        (
            "Labelled heads",
            f"{' '.join(table.verdicts())} {LABEL_RULE} Δ is the rise of the loss in nats without that head alone: on "
            "the second copy for kinds of repetition, else on the prompt where there is one. Other heads: the same "
            "ablation of each head without the label. A pattern is not a cause, and heads that stand in for each other "
            "cost little alone.",
            _labelled(table, kinds, top),
        )
    ]
    if view is not None:
        first = next((rows[0].head for kind in ("induction", "previous") if (rows := table.rows(kind, 1))), view.start)
        shown = replace(view, start=first if first in view.heads else view.start)
        sections.append(("Attention", "Choose a head below; point at a token.", shown.html()))
    for kind in kinds:
        scores = table.kinds[kind]
        what = f"{MEANINGS[kind]}. Control: {scores.control_name}. Labelled heads are outlined."
        scale = Scale(-1.0, 1.0, True) if kind == "copying" else Scale(0.0, 1.0)
        sections.append((f"{kind} heads", what, _map(table, scores.score, scores.units, kind, scale, scores.heads())))
    changes = [effects for by in table.effects.values() for effects in by.values()]
    for behaviour, by in table.effects.items():
        for effects in by.values():
            heading = f"{effects.ablation.capitalize()} ablation: {behaviour}"
            what = f"Change in {effects.units} when that head alone is ablated, mean over {len(effects.base)} rows."
            same = [e.mean for e in changes if e.units == effects.units]
            reach = max(float(mean[~mean.isnan()].abs().max()) for mean in same) or 1.0
            sections.append((heading, what, _map(table, effects.mean, "nats", heading, Scale(-reach, reach, True))))
    if composed is not None:
        sections.append(_composition_section(composed))
    lead = (
        f"{table.model}: {table.n_layers} layers of {table.n_heads} heads, read on "
        f"{table.repetition.n} random sequences that come twice."
    )
    return page_html(title=f"Attention heads of {table.model}", sections=sections, lead=lead, command=command)


def _labelled(table: "HeadTable", kinds: Sequence[str], top: int) -> "Markup":
    """Scores beside their controls, and ablations beside theirs."""
    from markupsafe import Markup

    from cutaway.draw.panels import table_html
    from cutaway.observe.head_table import numbers
    from cutaway.observe.heads import name

    found = [row for kind in kinds for row in table.rows(kind, top)]
    if not found:
        return Markup("<p>No head is above its control.</p>")
    columns = ["kind", "head", "score", "its control"]
    for effect in found[0].effects:
        columns += [f"Δ {effect.ablation.removesuffix(' ablation')}", "other heads"]
    cells = []
    for row in found:
        control = row.score.controls[0]
        line = [row.kind, name(row.head)]
        line += [numbers(row.score.value, row.score.interval), numbers(control.value, control.interval)]
        for effect in row.effects:
            others = effect.require_controls().controls[0]
            line += [numbers(effect.value, effect.interval, 3), numbers(others.value, None, 3)]
        cells.append(line)
    return table_html(columns=columns, rows=cells, title="Labelled heads", align=["left"] * len(columns))


def _map(
    table: "HeadTable", values: "Tensor", units: str, title: str, scale: "Scale", marks: Sequence[tuple[int, int]] = ()
) -> "Markup":
    """Layer × head, a cell a head, with its scale."""
    from cutaway.draw.heatmap import heatmap_svg

    drawn = heatmap_svg(
        rows=[f"layer {i}" for i in range(table.n_layers)],
        columns=[f"head {i}" for i in range(table.n_heads)],
        values=values.tolist(),
        title=title,
        units=units,
        diverging=scale.diverging,
        marks=marks,
        scale=scale,
    )
    return drawn + scale.legend(units)


def _composition_section(composed: "Composition") -> "tuple[str, str, Markup]":
    from cutaway.draw.panels import table_html
    from cutaway.observe.circuits import COMPOSITIONS
    from cutaway.observe.heads import name

    rows = [
        [kind.upper(), name(writer), name(reader), round(value, 3), round(value - composed.baseline, 3)]
        for kind in COMPOSITIONS
        if kind not in composed.left_out
        for writer, reader, value in composed.top(kind)
    ]
    low, high = composed.baseline_interval
    left_out = "".join(f" {kind.upper()} is not measured: {why}." for kind, why in composed.left_out.items())
    text = (
        "How much of what a later head reads (as query, key or value) an earlier one writes, by their weights alone. "
        f"Random heads of these shapes score {composed.baseline:.3f} [{low:.3f}, {high:.3f}].{left_out}"
    )
    columns = ("input", "writer", "reader", "score", "above random")
    return "Composition", text, table_html(columns=columns, rows=rows, title="Composition scores")

"""`cutaway heads`: what every attention head looks at, and what is lost without it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import interval_text
from cutaway.cli.options import Count, Flag, ModuleFile, Page, Seed, Separator, model_and_prompt, opened
from cutaway.cli.output import command_line, deliver

if TYPE_CHECKING:
    from markupsafe import Markup
    from torch import Tensor

    from cutaway.draw.scale import Scale
    from cutaway.model.language_model import LanguageModel
    from cutaway.observe.heads.attention_view import AttentionView
    from cutaway.observe.heads.circuits import Composition
    from cutaway.observe.heads.table import HeadTable

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
    on: Annotated[list[str] | None, Parameter(negative="")] = None,
    rows: Count = 32,
    context: Annotated[int, Parameter(validator=validators.Number(gte=2))] = 128,
    document_separator: Separator = None,
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
    on
        Score heads on this too, beside the random tokens: a text file or a folder of them, or a text; may be repeated.
        One text alone has no interval and labels nothing. Without a prompt, heads are ablated on a part of it.
    rows
        How many rows of a file or folder.
    context
        Tokens in a row of a file or folder, or all that a smaller model reads.
    document_separator
        What stands between documents in the text, such as “<|endoftext|>” (wherever it is) or “---” (alone on a line);
        .txt files are cut at blank lines if not given.
    sequences
        How many random sequences.
    length
        Random tokens in one copy; 50, or what fits, if not given.
    seed
        Of the random sequences and the order of a corpus.
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
    from cutaway.artifacts.files import plain
    from cutaway.observe.heads.attention_view import attention_view
    from cutaway.observe.heads.circuits import Composition, composition
    from cutaway.observe.heads.kinds import ON_TEXT
    from cutaway.observe.heads.table import head_table

    model, prompt = model_and_prompt(model, prompt, module)
    if "retrieval" in kind and needle is None:
        raise CutawayError("The retrieval score needs --needle, a piece of the prompt to look for.")
    if needle is not None and prompt is None:
        raise CutawayError("--needle is a piece of a prompt: give the prompt too.")
    if document_separator is not None and on is None:
        raise CutawayError("--document-separator is of the text that --on names: give that too")
    files = [item for item in on or () if _is_file(item)]
    lm = opened(model, module, dtype=dtype, device=device)
    text = None if on is None else _text_rows(lm, on, files, rows, context, seed, document_separator)
    view = None if prompt is None or html is None else attention_view(lm, prompt)  # refuses too much before the work
    ablations = {"mean": ("mean",), "zero": ("zero",), "both": ("mean", "zero"), "none": ()}
    command = command_line(
        "heads", model, prompt, kind=(list(dict.fromkeys(kind)), []), top=(top, 5), ablate=(ablate, "both"),
        needle=(needle, None), on=(on, None), rows=(rows, 32), context=(context, 128),
        document_separator=(document_separator, None), sequences=(sequences, 8), length=(length, None), seed=(seed, 0),
        module=(module, None), dtype=(dtype, None), device=(device, None),
    )  # fmt: skip
    table = head_table(
        lm,
        prompt,
        needle=needle,
        on=text,
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
    kinds = [one for one in table.kinds if not kind or one.removesuffix(ON_TEXT) in kind]
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


def _is_file(item: str) -> bool:
    """Whether an item of --on is a file or folder, and not a text; one that is named like a file must be there."""
    from cutaway.data.corpus.documents import SUFFIXES

    if not item.strip():
        raise CutawayError("--on is empty: give a text, or a file or folder of texts")
    if os.path.exists(item):
        return True
    if item.endswith(SUFFIXES) and not any(character.isspace() for character in item):
        raise CutawayError(f"--on {item}: there is no such file; name one that is there, or give a text")
    return False


def _text_rows(
    lm: "LanguageModel",
    on: Sequence[str],
    files: Sequence[str],
    rows: int,
    context: int,
    seed: int,
    document_separator: str | None,
) -> list[list[int]]:
    """Rows of token ids of texts and files."""
    from cutaway.data.corpus.corpus import read_corpus, token_rows

    found: list[list[int]] = []
    for item in on:
        if item in files:
            documents = read_corpus(Path(item), document_separator=document_separator).documents
            found += token_rows(lm, documents, min(context, lm.context_length), seed, limit=rows).tolist()
        else:
            found.append(lm.tokens(item).row_ids(0))
    return found


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
    from cutaway.observe.heads.kinds import meaning
    from cutaway.observe.heads.table import LABEL_RULE

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
        what = f"{meaning(kind)}. Control: {scores.control_name}. Labelled heads are outlined."
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
        f"{table.repetition.n} random sequences that come twice"
        + (f", and on {_sequences(table)} of text." if table.on_text else ".")
    )
    return page_html(title=f"Attention heads of {table.model}", sections=sections, lead=lead, command=command)


def _sequences(table: "HeadTable") -> str:
    from cutaway.observe.heads.kinds import ON_TEXT

    n = next(scores.n for kind, scores in table.kinds.items() if kind.endswith(ON_TEXT))
    return f"{n} sequence{'s' if n > 1 else ''}"


def _labelled(table: "HeadTable", kinds: Sequence[str], top: int) -> "Markup":
    """Scores beside their controls, and ablations beside theirs."""
    from markupsafe import Markup

    from cutaway.draw.panels import table_html
    from cutaway.observe.heads.report import name
    from cutaway.observe.heads.table import numbers, q_text

    found = [row for kind in kinds for row in table.rows(kind, top)]
    if not found:
        return Markup("<p>No head is above its control.</p>")
    columns = ["kind", "head", "score", "its control", "q"]
    for effect in found[0].effects:
        columns += [f"Δ {effect.ablation.removesuffix(' ablation')}", "other heads"]
    cells = []
    for row in found:
        control = row.score.controls[0]
        line = [row.kind, name(row.head)]
        line += [numbers(row.score.value, row.score.interval), numbers(control.value, control.interval)]
        line += [q_text(row.q)]
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
        marks=marks,
        scale=scale,
    )
    return drawn + scale.legend(units)


def _composition_section(composed: "Composition") -> "tuple[str, str, Markup]":
    from cutaway.draw.panels import table_html
    from cutaway.observe.heads.circuits import COMPOSITIONS
    from cutaway.observe.heads.report import name

    rows = [
        [kind.upper(), name(writer), name(reader), round(value, 3), round(value - composed.baseline, 3)]
        for kind in COMPOSITIONS
        if kind not in composed.left_out
        for writer, reader, value in composed.top(kind)
    ]
    left_out = "".join(f" {kind.upper()} is not measured: {why}." for kind, why in composed.left_out.items())
    text = (
        "How much of what a later head reads (as query, key or value) an earlier one writes, by their weights alone. "
        f"Random heads of these shapes score {composed.baseline:.3f} "
        f"{interval_text(composed.baseline_interval)}.{left_out}"
    )
    columns = ("input", "writer", "reader", "score", "above random")
    return "Composition", text, table_html(columns=columns, rows=rows, title="Composition scores")

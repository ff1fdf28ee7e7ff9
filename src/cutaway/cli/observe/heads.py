"""`cutaway heads`: what every attention head looks at, and what is lost without it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError
from cutaway.cli.options import (
    Count,
    DType,
    Flag,
    ModuleFile,
    Page,
    Seed,
    Separator,
    announce,
    model_and_prompt,
    opened,
)
from cutaway.cli.output import deliver

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel
    from cutaway.observe.heads.circuit_results import Composition

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
    n: Count = 8,
    length: Count | None = None,
    seed: Seed = 0,
    module: ModuleFile = None,
    dtype: DType = None,
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
    n
        How many random sequences.
    length
        Random tokens in one copy; 50, or what fits, if not given.
    seed
        Of the random sequences and the order of a corpus.
    module
        Instead of the model, a model of your own: FILE.py:function, which returns a module, (module, description) or
        (module, description, tokenizer).
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print every score, label and effect as JSON on stdout, and nothing else.
    html
        Write a page: the table, a map of the heads for each kind and each ablation, and the prompt's attention.
    """
    model, prompt = model_and_prompt(model, prompt, module)
    if "retrieval" in kind and needle is None:
        raise CutawayError("The retrieval score needs --needle, a piece of the prompt to look for.")
    if needle is not None and prompt is None:
        raise CutawayError("--needle is a piece of a prompt: give the prompt too.")
    if document_separator is not None and on is None:
        raise CutawayError("--document-separator is of the text that --on names: give that too")
    files = [item for item in on or () if _is_file(item)]
    announce(model, module)

    from cutaway.draw.page import page_html
    from cutaway.observe.heads.attention_view import attention_view
    from cutaway.observe.heads.circuits import composition
    from cutaway.observe.heads.labels import lead, table_sections
    from cutaway.observe.heads.maps import ON_TEXT
    from cutaway.observe.heads.table import head_table

    lm = opened(model, module, dtype=dtype, device=device)
    text = None if on is None else _text_rows(lm, on, files, rows, context, seed, document_separator)
    view = None if prompt is None or html is None else attention_view(lm, prompt)  # refuses too much before the work
    ablations = {"mean": ("mean",), "zero": ("zero",), "both": ("mean", "zero"), "none": ()}
    table = head_table(
        lm,
        prompt,
        needle=needle,
        on=text,
        n=n,
        length=length,
        ablations=ablations[ablate],  # type: ignore[arg-type]
        seed=seed,
    )
    composed: Composition | None = None
    try:
        composed = composition(lm)
        about = str(composed)
    except CutawayError as error:  # latent attention has no such circuits
        about = f"composition is not measured: {error}"
    kinds = [one for one in table.kinds if not kind or one.removesuffix(ON_TEXT) in kind]

    def page() -> str:
        title = f"Attention heads of {table.model}" + (f": “{prompt}”" if prompt is not None else "")
        sections = table_sections(table, kinds, top, view, composed)
        return page_html(title=title, sections=sections, lead=lead(table), command=current_command())

    deliver(
        text=f"{table.text(kinds, top)}\n\n{about}",
        model=lm.name,
        figures={**table.to_json(), "composition": None if composed is None else composed.to_json()},
        page=page,
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

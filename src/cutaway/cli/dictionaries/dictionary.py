"""`cutaway dictionary`: look into a sparse dictionary's files, check that it fits, write it in another format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError
from cutaway.cli.dictionaries.banks import banks
from cutaway.cli.dictionaries.judge import judge
from cutaway.cli.fit import say
from cutaway.cli.options import Count, DType, ExistingPath, Flag, Page, Seed, Separator, announce, opened, say_loading
from cutaway.cli.output import deliver, print_result, print_table

if TYPE_CHECKING:
    from torch import Tensor

app = App(
    name="dictionary",
    help="Sparse dictionaries: look into their files, check that they fit, judge them, write them in another format.",
    result_action="return_value",
    default_parameter=Parameter(negative=()),  # the documentation does not ask the main program
)
app.command(judge)
app.command(banks)

_WORLD_CHARACTERS = 400_000


@app.command
def inspect(
    path: str,
    /,
    *,
    model: Annotated[list[str] | None, Parameter(negative="")] = None,
    corpus: ExistingPath | None = None,
    document_separator: Separator = None,
    tokens: Count = 2048,
    context: Count = 128,
    site: str | None = None,
    names: Annotated[str | None, Parameter(name="--map")] = None,
    seed: Seed = 0,
    dtype: DType = None,
    device: str | None = None,
    json: Flag = False,
    html: Page = None,
) -> int:
    """Print what is in a dictionary's files; with a model, measure it there, and at the sites and scales around.

    Exit code 1 if it does not fit: another site or scale does clearly better, or L0 is far from what the files say.

    Parameters
    ----------
    path
        A folder or file of a dictionary in any format, or hf://owner/repository/folder.
    model
        The model that it belongs to: “atlas”, a Hugging Face folder, or a hub id. Twice for a crosscoder of two models.
    corpus
        A text file, or a folder of them, to measure on; for atlas text of its world, else Python's documentation, if
        not given.
    document_separator
        What stands between documents in the text, such as “<|endoftext|>” (wherever it is) or “---” (alone on a line);
        .txt files are cut at blank lines if not given.
    tokens
        How many tokens to measure on, about.
    context
        Tokens that the model reads at once.
    site
        Measure at this site, whatever the files say.
    names
        Which tensor is what, where no settings and no known names say it: W_enc=encoder.weight,b_enc=encoder.bias,...
        (also b_dec, W_dec, threshold, r_mag, b_mag, W_skip, k=32, subtract_b_dec=false).
    seed
        Of the rows of text and of the random directions it is compared with.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print everything as JSON on stdout, and nothing else.
    html
        Write a page.
    """
    if corpus is None and document_separator is not None:
        raise CutawayError("--document-separator is of the text that --corpus names: give that too")
    if not model:
        say_loading(path)
    for name in model or ():
        announce(name)

    from cutaway.dictionaries.formats.by_tensors import parse_map
    from cutaway.dictionaries.formats.files import read
    from cutaway.dictionaries.formats.report import inspect as inspected
    from cutaway.draw.page import page_html

    reading = read(path, None if names is None else parse_map(names))
    found, lms = inspected(reading), []
    if model:
        lms = [opened(name, dtype=dtype, device=device) for name in model]
        rows, text = _rows(lms[0], corpus, tokens, context, seed, document_separator)
        found = inspected(reading, lms[0] if len(lms) == 1 else lms, rows, site=site, text=text, seed=seed)
    about = found.facts
    verdicts = " ".join(f"{said[0].upper()}{said[1:]}." for said in (found.fit.verdicts if found.fit else ()))
    here = Path(about["path"])  # a folder that holds one stands for it
    inside = here if Path(path).expanduser() in here.parents else None
    deliver(
        text=str(found) if inside is None else f"{inside}\n{found}",
        model=[lm.name for lm in lms],
        figures=found.to_json(),
        page=lambda: page_html(
            title=f"Dictionary {Path(about['path']).name}",
            lead=f"{about['kind'].replace('_', ' ')}, {about['selector']}, {about['format']}. {verdicts}",
            sections=found.sections(),
            command=current_command(),
        ),
        as_json=json,
        html=html,
    )
    return 0 if found.fits else 1


@app.command
def convert(
    path: str,
    out: Path,
    /,
    *,
    format: Literal[
        "cutaway", "saelens", "saelens-5", "saelens-training", "sparsify", "dictionary_learning", "gemma-scope",
        "gemma-scope-2",        "circuit-tracer",
    ] = "cutaway",
    site: str | None = None,
    names: Annotated[str | None, Parameter(name="--map")] = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:  # fmt: skip
    """Write a dictionary in another format, or a set of them.

    Parameters
    ----------
    path
        A folder or file of a dictionary in any format, or hf://owner/repository/folder.
    out
        The folder to write.
    format
        What to write. “cutaway” takes every dictionary and is SAELens' layout.
    site
        Say that it belongs to this site, whatever the files say.
    names
        Which tensor is what, where no settings and no known names say it; as for “inspect”.
    overwrite
        Replace the dictionary that is in the folder.
    json
        Print what was written as JSON on stdout, and nothing else.
    """
    from cutaway.dictionaries.formats.by_tensors import parse_map
    from cutaway.dictionaries.formats.files import at_site, load_all, save_all

    source, target = Path(path).resolve(), out.resolve()
    if source.exists() and (source == target or target in source.parents):
        raise CutawayError(f"{out} holds {path}, which is read: name another folder to write")
    dictionaries = list(load_all(path, None if names is None else parse_map(names)).values())
    if site is not None:
        dictionaries = [at_site(dictionary, site) for dictionary in dictionaries]
    folder = save_all(dictionaries, out, format, overwrite=overwrite)
    if json:
        print_result({"folder": str(folder), "format": format, "dictionaries": [repr(one) for one in dictionaries]})
        return
    for dictionary in dictionaries:
        say(repr(dictionary))
    print(f"{folder}: {format}")


def _rows(
    lm: Any, corpus: Path | None, tokens: int, context: int, seed: int, document_separator: str | None
) -> "tuple[Tensor, str]":
    """Rows of text for a model, and what the text is."""
    from cutaway.data.corpus.corpus import read_corpus, token_rows
    from cutaway.data.tasks.registry import has_world, world_text

    if corpus is not None:
        documents, text = read_corpus(corpus, document_separator=document_separator).documents, str(corpus)
    elif has_world(lm.loaded_from):
        documents, text = world_text(lm.loaded_from, _WORLD_CHARACTERS, f"inspect-{seed}"), f"text of {lm.name}'s world"
    else:
        from cutaway.data.corpus.python_library import standard_library

        prose = [document.text for document in standard_library() if ":" in document.name]
        documents, text = prose, "the documentation of Python's standard library"
    context = min(context, lm.context_length)
    return token_rows(lm, documents, context, seed, limit=max(2, round(tokens / context))), text


@app.command
def presets(*, json: Flag = False) -> None:
    """List the published ways of training that `cutaway train --preset` takes, with what sets their sparsity.

    Parameters
    ----------
    json
        Print the list as JSON on stdout, and nothing else.
    """
    from cutaway.dictionaries.training.presets import PRESETS

    if json:
        known = [
            {"name": name, "kind": one.kind, "what": one.what, "sparsity": one.control, "source": one.source}
            for name, one in PRESETS.items()
        ]
        print_result({"presets": known})
        return
    rows = [[name, one.kind, one.control, f"{one.what}. {one.source}"] for name, one in PRESETS.items()]
    print_table(["preset", "kind", "sparsity", "what and source"], rows)

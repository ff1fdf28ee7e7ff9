"""`cutaway dictionary`: look into a sparse dictionary's files, check that it fits, write it in another format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.results import interval_text
from cutaway.cli.dictionaries.judge import judge
from cutaway.cli.options import Count, ExistingPath, Flag, Page, Seed, Separator
from cutaway.cli.output import command_line, deliver, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.dictionaries.formats.inspection import Fit

app = App(
    name="dictionary",
    help="Sparse dictionaries: look into their files, check that they fit, judge them, write them in another format.",
    result_action="return_value",
)
app.command(judge)

_WORLD_CHARACTERS = 400_000
_TEXT_CHARACTERS = 2_000_000


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
    dtype: str | None = None,
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
    dtype
        How the model computes: float32, bfloat16 or float16.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print everything as JSON on stdout, and nothing else.
    html
        Write a page.
    """
    from cutaway.dictionaries.formats.by_tensors import parse_map
    from cutaway.dictionaries.formats.files import read
    from cutaway.dictionaries.formats.inspection import check_fit, facts

    if corpus is None and document_separator is not None:
        raise CutawayError("--document-separator is of the text that --corpus names: give that too")

    reading = read(path, None if names is None else parse_map(names))
    found = facts(reading)
    command = command_line(
        "dictionary", "inspect", path,
        model=(model, None), corpus=(corpus, None), document_separator=(document_separator, None),
        tokens=(tokens, 2048), context=(context, 128), site=(site, None), map=(names, None), seed=(seed, 0),
        dtype=(dtype, None), device=(device, None),
    )  # fmt: skip
    fit: Fit | None = None
    text = ""
    if model:
        import cutaway

        lms = [cutaway.load(name, dtype=dtype, device=device) for name in model]
        rows, text = _rows(lms[0], corpus, tokens, context, seed, document_separator)
        fit = check_fit(lms[0] if len(lms) == 1 else lms, reading, rows, site=site, seed=seed, command=command)
    deliver(
        text=_text(found, fit, text),
        data=found | ({} if fit is None else {"measured": _measured(fit, text)}),
        page=lambda: _page(found, fit, text, command),
        as_json=json,
        html=html,
    )
    return 0 if fit is None or fit.fits else 1


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
        print_json({"folder": str(folder), "format": format, "dictionaries": [repr(one) for one in dictionaries]})
        return
    for dictionary in dictionaries:
        print(dictionary)
    print(f"{folder}: {format}")


def _rows(
    lm: Any, corpus: Path | None, tokens: int, context: int, seed: int, document_separator: str | None
) -> "tuple[Tensor, str]":
    """Rows of text for a model, and what the text is."""
    from cutaway.data.corpus.corpus import read_corpus, token_rows
    from cutaway.data.tasks.registry import has_world, world_text

    if corpus is not None:
        documents, text = read_corpus(corpus, document_separator=document_separator).documents, str(corpus)
    elif has_world(lm.name):
        documents, text = world_text(lm.name, _WORLD_CHARACTERS, f"inspect-{seed}"), f"text of {lm.name}'s world"
    else:
        from cutaway.data.corpus.python_library import standard_library

        prose = [document.text for document in standard_library() if ":" in document.name]
        documents, text = prose, "the documentation of Python's standard library"
    context = min(context, lm.context_length)
    return token_rows(lm, documents, context, seed, limit=max(2, round(tokens / context))), text


def _measured(fit: "Fit", text: str) -> dict[str, Any]:
    def alternatives(found: Any) -> list[dict[str, Any]]:
        return [
            {"name": one.name, "fvu": one.fvu, "interval": list(one.interval), "l0": one.l0,
             "difference": list(one.difference)}
            for one in found
        ]  # fmt: skip

    return {
        "fits": fit.fits,
        "verdicts": list(fit.verdicts),
        "text": text,
        "n_tokens": fit.n_tokens,
        "n_rows": fit.n_rows,
        "effects": [effect.to_json() for effect in fit.effects],
        "sites": alternatives(fit.sites),
        "scales": alternatives(fit.scales),
    }


def _summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts that are one line each, label and text."""
    sites = [f"{port['site']} [{port['width']}]" for port in found["reads"]]
    lines = [
        ("format", found["format"]),
        ("kind", f"{found['kind'].replace('_', ' ')}, {found['selector']}"),
        ("size", f"{found['d_in']} → {found['d_sae']:,} latents → {found['d_out']}, {found['parameters']:,} parameters "
                 f"in {found['dtype']}, {found['bytes'] / 1e6:,.1f} MB in {len(found['files'])} files"),
        ("model", ", ".join(dict.fromkeys(str(port["model"] or "not named") for port in found["reads"]))),
        ("site, as stored", ", ".join(found["hooks"]) or "not named"),
        ("site, ours", " + ".join(sites)),
    ]  # fmt: skip
    if found["writes"] != found["reads"]:
        lines.append(("written to", " + ".join(f"{port['site']} [{port['width']}]" for port in found["writes"])))
    lines += [
        ("b_dec", "taken off the input" if found["subtracts_b_dec"] else "not taken off the input"),
        ("per-token norm", {"layer_norm": "layer norm", "unit": "unit norm", None: "none"}[found["input_norm"]]),
        ("folded", "; ".join(found["folds"]) or "nothing had to be"),
        ("expected L0", "; ".join(map(_expected, found["expected_l0"])) or "the files do not say"),
    ]
    for site, norms in found["decoder_norms"].items():
        lines.append(("decoder norms" + ("" if site == "all" else f", {site}"), _spread(norms)))
    if found["thresholds"]:
        lines.append(("thresholds", _spread(found["thresholds"])))
    if found["encoder_decoder_cosine"] is not None:
        cosine = f"{found['encoder_decoder_cosine']:.3f}, signed, mean over latents"
        lines.append(("encoder · decoder", cosine))
    lines += [("note", note) for note in found["notes"]]
    return lines


def _expected(one: dict[str, Any]) -> str:
    span = f"{one['value']:.4g}" if one["high"] is None else f"{one['value']:.4g} to {one['high']:.4g}"
    return f"{span} ({one['source']})"


def _spread(found: dict[str, float]) -> str:
    return f"{found['least']:.4g} to {found['most']:.4g}, median {found['median']:.4g}"


def _tensor_rows(found: dict[str, Any]) -> list[list[str]]:
    return [[t["name"], str(t["shape"]), t["dtype"], t["becomes"]] for t in found["tensors"]]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
    ]


def _text(found: dict[str, Any], fit: "Fit | None", text: str) -> str:
    from cutaway.draw.text import interval

    summary = _summary(found)
    width = max(len(label) for label, _ in summary)
    lines = [f"{label:<{width}}  {value}" for label, value in summary]
    lines += ["", *_columns([["tensor", "stored as", "type", "is here"], *_tensor_rows(found)])]
    if fit is None:
        return "\n".join([*lines, "", "give --model to measure how well it fits"])
    lines += ["", f"on {fit.n_tokens:,} tokens of {fit.n_rows} rows, {text}:"]
    for effect in fit.effects:
        ends = effect.interval or (None, None)
        lines.append(
            f"  {effect.name}: {interval(effect.value, *ends, digits=4)} {effect.units}; random directions "
            f"{effect.controls[0].value:.4g}"
        )
    rows = _alternative_rows(fit)
    if rows:
        lines += ["", *_columns([["instead", "FVU", "95 %", "L0"], *rows])]
    return "\n".join([*lines, "", *fit.verdicts])


def _alternative_rows(fit: "Fit") -> list[list[str]]:
    return [
        [one.name, f"{one.fvu:.3f}", interval_text(one.interval), f"{one.l0:.1f}"]
        for one in (*fit.sites[:12], *fit.scales)
    ]


def _page(found: dict[str, Any], fit: "Fit | None", text: str, command: str) -> str:
    from markupsafe import Markup

    from cutaway.draw.charts import effect_html
    from cutaway.draw.page import page_html
    from cutaway.draw.panels import table_html

    sections = [
        ("What it is", "", table_html(columns=["", ""], rows=[list(line) for line in _summary(found)], title="Facts")),
        (
            "Its tensors",
            "As they are stored, and what they are here.",
            table_html(columns=["tensor", "stored as", "type", "is here"], rows=_tensor_rows(found), title="Tensors"),
        ),
    ]
    verdict = ""
    if fit is not None:
        verdict = " ".join(f"{said[0].upper()}{said[1:]}." for said in fit.verdicts)
        measured = Markup("").join(effect_html(effect.to_json()) for effect in fit.effects)
        about = f"{fit.n_tokens:,} tokens of {fit.n_rows} rows, {text}. 95 % bootstrap intervals over rows."
        sections.append(("At the stated site", about, measured))
        rows = _alternative_rows(fit)
        if rows:
            note = (
                "The same weights elsewhere. A dictionary at a wrong site or scale does clearly better at one of these."
            )
            columns = ["instead", "FVU", "95 %", "L0"]
            align = ["left", "right", "right", "right"]
            sections.append(("Elsewhere", note, table_html(columns=columns, rows=rows, title="Elsewhere", align=align)))
    return page_html(
        title=f"Dictionary {Path(found['path']).name}",
        lead=f"{found['kind'].replace('_', ' ')}, {found['selector']}, {found['format']}. {verdict}",
        sections=sections,
        command=command,
    )

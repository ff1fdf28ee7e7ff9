"""`cutaway probe`: can a label be read off a model's activations, at which layer, and does the model use it?"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import check_folder
from cutaway.cli.options import Count, DType, Flag, Page, Seed, announce, opened
from cutaway.cli.output import deliver
from cutaway.data.labelled.rows import read_rows
from cutaway.data.labelled.words import without_rare

if TYPE_CHECKING:
    from cutaway.observe.probes.data import ProbeData


_NO_ANSWERS = (
    "--use measures answers: give --answer and --wrong (what the model says for the positive and for the other class), "
    "or columns answer and wrong."
)


def probe(
    model: str,
    data: Path,
    /,
    *,
    site: list[str] | None = None,
    head: int | None = None,
    kind: Literal["logistic", "mass-mean", "mass-mean-whitened", "ridge", "mlp"] = "logistic",
    text_column: str | None = None,
    label_column: str | None = None,
    no_header: Flag = False,
    position: Annotated[str, Parameter(allow_leading_hyphen=True)] = "last",
    regression: Flag = False,
    folds: Count = 5,
    draws: Count = 10,
    calibrate: Literal["platt", "isotonic"] | None = None,
    use: Flag = False,
    use_site: str | None = None,
    answer: str | None = None,
    wrong: str | None = None,
    out: Path | None = None,
    dtype: DType = None,
    device: str | None = None,
    seed: Seed = 0,
    json: Flag = False,
    html: Page = None,
) -> None:
    """Fit a probe at every layer, cross-validated, beside its controls: shuffled labels, a control task, the bag of
    tokens, positions and lengths, the embedding, an untrained model. A probe is a detector, not a cause; --use edits
    along its direction and shows what the answers do.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    data
        A .csv or .tsv file whose first line names its columns, or a .jsonl file: text and label, and if you like group
        (no group stands on both sides of a fold), match (the text to read at), answer and wrong (for --use). Or words
        with a label each, every word read at its last token: a .jsonl file of words and labels (lists), or a .conll (or
        .conllu) file of lines WORD<tab>LABEL with a blank line between sentences; no sentence is on both sides of a
        fold.
    site
        Where to read; a wildcard names several, and the option may be repeated. blocks.*.resid_post if not given.
    head
        One head of sites that have heads; all of them side by side if not given.
    kind
        The kind of probe; ridge and mlp also predict numbers.
    text_column
        The name of the column with the text (or the words) instead of text; its number, from 1, where columns have no
        names.
    label_column
        The same for the label.
    no_header
        The first line of a .csv or .tsv file is data already; --text-column and --label-column are numbers then.
    position
        Where in a text to read: last, mean, every (then label is a list, one a token), match (the column of that
        name), match:TEXT, or a position from the start (0, 1, ...) or the end (-1, -2, ...).
    regression
        Labels are numbers to predict, also where they are few whole ones.
    folds
        Parts that the groups are dealt into.
    draws
        How often labels are shuffled and control tasks drawn.
    calibrate
        Fit the probabilities anew inside each training fold, for two classes.
    use
        Ablate and steer along the probe's direction and measure the answers.
    use_site
        The site to use the probe at; the one with the best score if not given.
    answer
        What the model answers for the positive class (the last one in sorted order), with its space, or a token's id
        (“#422”); or a column.
    wrong
        The same for the other class. With neither --wrong nor a column of that name, the answer's probability is
        measured.
    out
        Folder for the probe with the best score, fitted on all rows.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    seed
        Of folds, draws and random directions.
    json
        Print the figures as JSON on stdout, and nothing else.
    html
        Write a page with the figures and drawings to this file.
    """
    if out is not None:
        from cutaway.observe.probes.probe import FILES

        check_folder(out, "probe", FILES)
    rows = read_rows(data, text=text_column, label=label_column, header=not no_header)
    of_words = "words" in rows[0]
    if of_words and (position != "last" or use):
        given = "--use" if use else f"--position {position}"
        raise CutawayError(f"{data} has a label for each word, which is read at its last token: leave {given} out.")
    if of_words and not regression:
        rows, rare = without_rare(rows, folds)
        if rare:
            said = ", ".join(f"{label} ({n})" for label, n in rare.items())
            print(f"cutaway: labels in fewer sentences than {folds} folds need are left out: {said}", file=sys.stderr)
    if use and kind == "mlp":
        raise CutawayError("An MLP probe has no one direction to use; take a linear kind.")
    if use and answer is None and column(rows, "answer", data) is None:
        raise CutawayError(_NO_ANSWERS)
    labels = [row["labels" if of_words else "label"] for row in rows]
    if use and answer is not None and wrong is None:
        from cutaway.observe.probes.data import label_classes

        one, two = _two(None if of_words else label_classes(labels, True if regression else None)[1])
        raise CutawayError(f"--answer is what the model says for {two!r}; give --wrong for {one!r} too.")
    texts = [row["words" if of_words else "text"] for row in rows]
    where = "words" if of_words else place(position, rows, data)

    announce(model)

    from cutaway.draw.page import page_html
    from cutaway.observe.probes.data import probe_data
    from cutaway.observe.probes.results import sweep_sections, use_section
    from cutaway.observe.probes.sweep import probe_sweep
    from cutaway.observe.probes.usage import answer_tokens, use_in_folds

    lm = opened(model, dtype=dtype, device=device)
    sites = lm.sites().expand_all(site or "blocks.*.resid_post")
    groups = column(rows, "group", data)
    numbers = True if regression else None
    examples = probe_data(lm, texts, labels, position=where, groups=groups, regression=numbers)
    metric = chosen = None
    if use:  # what is asked for is checked before anything is fitted
        metric = answer_tokens(lm, texts, *answers(rows, examples, answer, wrong, data))
        chosen = lm.sites().resolve(use_site) if use_site else None
        if chosen is not None and chosen not in sites:
            raise CutawayError(f"--use-site {chosen} is not among the sites that are probed; name it with --site too.")
    sweep = probe_sweep(
        lm,
        examples,
        sites=sites,
        head=head,
        kind=kind,
        n_folds=folds,
        draws=draws,
        calibration=calibrate,
        seed=seed,
    )
    used = None
    if metric is not None:
        used = use_in_folds(lm, sweep, chosen or sweep.best.site, metric, seed=seed)
    if out is not None:
        sweep.best.probe.save(out)
    text = str(sweep) + ("" if used is None else f"\n\n{used}")
    text += "" if out is None else f"\n\nprobe: {out} ({sweep.best.site})"

    def page() -> str:
        return page_html(
            title=f"A {sweep.kind} probe in {lm.name}",
            lead=_lead(data.name, sweep.data),
            sections=[*sweep_sections(sweep), *([] if used is None else [use_section(used)])],
            command=current_command(),
        )

    deliver(
        text=text,
        model=lm.name,
        figures={"sweep": sweep.to_json(), "use": None if used is None else used.to_json()},
        page=page,
        as_json=json,
        html=html,
    )


def _lead(source: str, examples: "ProbeData") -> str:
    """What was read, for the head of the page."""
    balance = ", ".join(f"{name}: {n}" for name, n in examples.balance().items())
    return (
        f"{len(examples)} examples of {source} in {examples.n_groups} groups"
        + (f" ({balance})" if balance else "")
        + f", read at the position rule “{examples.rule}”. A probe shows what can be read, not what the model uses."
    )


# Input --------------------------------------------------------------------------------------------------------------


def column(rows: list[dict[str, Any]], name: str, path: Path) -> list[Any] | None:
    """One column, None where no row has it. Raises CutawayError when some rows have it and some do not."""
    values = [row.get(name) for row in rows]
    given = [value not in (None, "") for value in values]
    if not any(given):
        return None
    if not all(given):
        raise CutawayError(f"{path} gives a {name} for some rows but not for row {given.index(False) + 1}.")
    return values


def place(position: str, rows: list[dict[str, Any]], path: Path) -> Any:
    """The position rule as `probe_data` takes it."""
    if position == "match":
        words = column(rows, "match", path)
        if words is None:
            raise CutawayError(f"--position match reads at the column match, which {path} has not; add it.")
        return [str(word) for word in words]
    return int(position) if position.lstrip("-").isdigit() else position


def _two(classes: tuple[str, ...] | None) -> tuple[str, str]:
    if classes is None or len(classes) != 2:
        raise CutawayError("--answer and --wrong are for two classes; give columns answer and wrong instead.")
    return classes[0], classes[1]


def answers(
    rows: list[dict[str, Any]], examples: "ProbeData", answer: str | None, wrong: str | None, path: Path
) -> tuple[list[str], list[str] | None]:
    """Each text's own answer, and a wrong one if there is any: from the columns, else from the two classes."""
    own, other = column(rows, "answer", path), column(rows, "wrong", path)
    if answer is None:
        if own is None:
            raise CutawayError(_NO_ANSWERS)
        return [str(a) for a in own], None if other is None else [str(w) for w in other]
    _two(examples.classes)
    assert wrong is not None  # refused before the model was loaded
    by_text = dict(zip(examples.row.tolist(), examples.labels.tolist(), strict=True))
    positive = [by_text.get(i) == 1 for i in range(len(rows))]
    return [answer if p else wrong for p in positive], [wrong if p else answer for p in positive]

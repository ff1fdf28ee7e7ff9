"""`cutaway subjects`: make, judge and read the models whose world we know."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter, validators

from cutaway.cli.fit import say
from cutaway.cli.options import Count, ExistingFolder, Flag, Page, Seed, announce
from cutaway.cli.output import deliver, print_result

app = App(name="subjects", help="Make, judge and read the models whose world we know.", result_action="return_value")
_N_QUICK = 24


@app.command(show=False)  # for maintainers: CONTRIBUTING.md
def train(
    subject: Literal["atlas"],
    /,
    *,
    out: Path = Path("runs/atlas"),
    tokens: Count = 130_000_000,
    start: Annotated[str | None, Parameter(name="--from")] = None,
    lr: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 2.5e-3,
    optimizer: Literal["adamw", "muon"] = "adamw",
    reply_weight: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 1.0,
    seed: Seed = 0,
    device: str | None = None,
    batch: Count | None = None,
    context: Count = 256,
    corpus: Path | None = None,
    processes: Count | None = None,
    compiled: Flag = False,
    overwrite: Flag = False,
) -> None:
    """Train a subject's weights, from nothing or from earlier ones; the same command resumes an interrupted training.

    Parameters
    ----------
    subject
        Which subject.
    out
        Folder for checkpoints and the finished weights.
    tokens
        How many tokens of the generated corpus to train on.
    start
        Weights to go on from, with their tokenizer: atlas, atlas-1, or a folder that training left.
    lr
        Peak of the learning rate for steps of 128 texts; it goes with the square root of their number.
    optimizer
        AdamW for all, or Muon for the layers' matrices (torch 2.9 and later).
    reply_weight
        What a token of an assistant's reply weighs in the loss, where any other weighs 1.
    seed
        Of the corpus and of the initial weights.
    device
        cpu, cuda, ...; a GPU if there is one, when not given.
    batch
        Texts in a step; 128 on a GPU and 16 elsewhere if not given.
    context
        Tokens in a text.
    corpus
        Folder of the generated corpus; made inside --out if not given.
    processes
        How many processes generate the corpus; one a core if not given.
    compiled
        Train with torch.compile.
    overwrite
        Begin again in a folder that holds another training.
    """
    import torch

    from cutaway.subjects.atlas.training.recipe import PEAK_ROWS, ROWS_ON_CPU, Machine, Recipe
    from cutaway.subjects.atlas.training.train import train_command

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    train_command(
        out,
        Recipe(
            tokens=tokens,
            seed=seed,
            context=context,
            rows=batch or (PEAK_ROWS if device.startswith("cuda") else ROWS_ON_CPU),
            peak=lr,
            optimizer=optimizer,
            reply_weight=reply_weight,
        ),
        start=start,
        corpus=corpus,
        machine=Machine(device, processes, compiled),
        overwrite=overwrite,
    )


@app.command
def evaluate(
    subject: Literal["atlas"],
    /,
    *,
    model: str = "atlas",
    n: Count = 200,
    quick: Flag = False,
    outside: ExistingFolder | None = None,
    against: str | None = None,
    out: Path | None = None,
    json: Flag = False,
) -> None:
    """Measure what a model can do on the subject's held-out items, with n and intervals.

    Parameters
    ----------
    subject
        Whose tasks.
    model
        Which weights: “atlas” (the shipped ones), or a folder such as training leaves.
    n
        Items of each set.
    quick
        24 items of each set, and no causal checks.
    outside
        A folder of prompts by others: eap-ig/ and relations/ in it are asked about atlas's world.
    against
        Other weights, measured too; says which are better.
    out
        Write the tables as Markdown into this file too.
    json
        Print the figures as JSON on stdout, and nothing else.
    """
    if out is not None:
        _refuse_unwritable(out)
    announce(model)

    import cutaway
    from cutaway.artifacts.files import write_text
    from cutaway.atlas_evaluation import evaluate as examination
    from cutaway.atlas_evaluation import page, report
    from cutaway.atlas_evaluation.compare import compare
    from cutaway.subjects.atlas.shipped import weights_folder

    lm, other = cutaway.load(model), None if against is None else cutaway.load(against)
    chosen = _N_QUICK if quick else n
    found = examination.evaluate(lm, n=chosen, causal=not quick, outside=outside)
    compared = None
    if other is not None:
        measured = examination.evaluate(other, n=chosen, causal=not quick, outside=outside)
        compared = compare(found, measured, [name for _, name in page.HEADLINES])
    if out is not None:
        text = page.as_markdown(found, weights_folder(model))
        if compared is not None and against is not None:
            text += "\n" + page.comparison_markdown(compared, weights_folder(model), weights_folder(against))
        write_text(out, text)
    if json:
        figures = found.to_json()
        if compared is not None:
            figures["against"] = {**asdict(compared), "model": against, "better": compared.better}
        print_result(figures, model=lm.name)
        return
    say(report.as_text(found))
    if compared is not None and against is not None:
        say("\n" + report.comparison_text(compared, model, against))


def _refuse_unwritable(page: Path) -> None:
    """Raise `BadFile` now, not after minutes of measuring, where the page cannot be written."""
    import os

    from cutaway.artifacts.errors import BadFile
    from cutaway.artifacts.files import make_folder, refuse_replacing

    make_folder(page.parent)
    refuse_replacing(page, "page about atlas", "# Atlas\n")
    if page.is_dir():
        raise BadFile(f"{page} is a folder: --out names the file of the page, such as {page / 'atlas.md'}")
    if not os.access(page.parent, os.W_OK):
        raise BadFile(f"{page} could not be written: the folder may not be written to (name another)")


@app.command
def pair(subject: Literal["atlas"], /, *, out: Path, other: str = "atlas-1") -> None:
    """Write the shipped weights and earlier ones of the same model side by side, to compare what a training changed.

    Parameters
    ----------
    subject
        Whose weights.
    out
        A new folder: a model folder for each, and a manifest with both hashes.
    other
        The earlier weights: atlas-1 (in a checkout of the repository), or a folder.
    """
    from cutaway.subjects.atlas.shipped import write_pair

    for name, sha in write_pair(out, other).items():
        print(f"{out / name}  {sha}")


@app.command
def text(
    subject: Literal["atlas"],
    /,
    *,
    out: Path,
    characters: Count = 20_000_000,
    seed: Seed = 0,
) -> None:
    """Write text for looking into a subject: its world as no training has seen it, and held-out library source.

    Parameters
    ----------
    subject
        Whose text.
    out
        A file of JSON lines, one document each, as every command with a corpus reads it.
    characters
        Of the world, about; the library's held-out source comes on top.
    seed
        Which stream of the world.
    """
    from cutaway.subjects.atlas.text import write_text

    print(f"{out}: {write_text(out, characters, seed):,} documents")


@app.command
def samples(part: str, /, *, n: Count = 10, seed: Seed = 0) -> None:
    """Print samples of one part of the atlas corpus.

    Parameters
    ----------
    part
        A part of the corpus; an unknown name prints the list of them.
    n
        How many samples.
    seed
        Of the generator.
    """
    from cutaway.subjects.atlas.training.corpus import print_samples

    print_samples(part, n=n, seed=seed)


@app.command
def superposition(*, recovery: Flag = False, seed: Seed = 0, json: Flag = False, html: Page = None) -> None:
    """Train the toy models of superposition and show what they do: geometry, polytopes, phase diagram (a minute).

    Parameters
    ----------
    recovery
        Also train dictionaries on features that are known: where are they found, and where not? (Minutes.)
    seed
        Of initial weights and samples.
    json
        Print every figure as JSON on stdout, and nothing else.
    html
        Write a page with the drawings.
    """
    from cutaway.artifacts.command import current_command
    from cutaway.dictionaries.evaluation.recovery import recovery_sections, recovery_study
    from cutaway.draw.page import page_html
    from cutaway.subjects.superposition.study import LEAD, toy_sections, toy_study

    study = toy_study(seed=seed)
    found = recovery_study(seed=seed) if recovery else None

    def page() -> str:
        sections = [*toy_sections(study), *(recovery_sections(found) if found else [])]
        return page_html(title="Superposition", lead=LEAD, sections=sections, command=current_command())

    deliver(
        text=f"{study}\n\n{found}" if found else str(study),
        model=None,
        figures={**study.to_json(), "recovery": found.to_json() if found else None},
        page=page,
        as_json=json,
        html=html,
    )

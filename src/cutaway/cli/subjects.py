"""`cutaway subjects`: make, judge and read the models whose world we know."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

app = App(name="subjects", help="Make, judge and read the models whose world we know.", result_action="return_value")


@app.command
def train(
    subject: Literal["atlas"],
    /,
    *,
    out: Path = Path("runs/atlas"),
    tokens: int = 130_000_000,
    seed: int = 0,
    device: str | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a subject's weights from nothing; the same command resumes an interrupted training.

    Parameters
    ----------
    subject
        Which subject.
    out
        Folder for checkpoints and the finished weights.
    tokens
        How many tokens of the generated corpus to train on.
    seed
        Of the corpus and of the initial weights.
    device
        cpu, cuda, ...; a GPU if there is one, when not given.
    overwrite
        Begin again in a folder that holds another training.
    """
    from cutaway.subjects.atlas.train import train_command

    train_command(out=out, tokens=tokens, seed=seed, device=device, overwrite=overwrite)


@app.command
def evaluate(
    subject: Literal["atlas"],
    /,
    *,
    model: str = "atlas",
    out: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Measure what a model can do on the subject's held-out items, with n and intervals.

    Parameters
    ----------
    subject
        Whose tasks.
    model
        Which weights: “atlas” (the shipped ones), or a folder such as training leaves.
    out
        Write the tables as Markdown into this file too.
    json
        Print the figures as JSON on stdout, and nothing else.
    """
    from cutaway.subjects.atlas.evaluate import evaluate_command

    evaluate_command(model=model, out=out, json=json)


@app.command
def samples(part: str, /, *, n: int = 10, seed: int = 0) -> None:
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
    from cutaway.subjects.atlas.corpus import print_samples

    print_samples(part, n=n, seed=seed)

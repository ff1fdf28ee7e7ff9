"""`cutaway tour`: from a model to a page that shows its insides."""

import re
from pathlib import Path

from cutaway.cli.options import ExistingPath, Flag, Seed, Separator, announce
from cutaway.cli.output import print_result


def tour(
    model: str = "atlas",
    /,
    *,
    out: Path | None = None,
    corpus: ExistingPath | None = None,
    document_separator: Separator = None,
    seed: Seed = 0,
    overwrite: Flag = False,
    only: str | None = None,
    json: Flag = False,
) -> None:
    """Look, find causes, train a dictionary, name features, steer; leave a page about it.

    An interrupted tour goes on when the same command is given again.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    out
        Folder for the page and everything behind it; runs/tour-MODEL if not given.
    corpus
        A text file, or a folder of them, to train the dictionary on instead of the built-in text.
    document_separator
        What stands between documents in the text, such as “<|endoftext|>” (wherever it is) or “---” (alone on a line);
        .txt files are cut at blank lines if not given.
    seed
        Of everything drawn at random.
    overwrite
        Begin again in a folder that holds another run.
    only
        Make one section's figures again, and print them: selftest, lens, heads, patching, dictionary, features,
        steering or clamping. The dictionary that features and clamping need is the folder's own; the page is not drawn
        anew.
    json
        Print the figures as JSON on stdout, and nothing else.
    """
    announce(model)
    from cutaway.tour import run_tour

    out = out or Path("runs") / f"tour-{_slug(model)}"
    result = run_tour(
        model, out=out, corpus=corpus, document_separator=document_separator, seed=seed, overwrite=overwrite, only=only
    )
    if json or only is not None:
        print_result(result.model_dump(mode="json"), model=Path(model).name)
    else:
        print(f"open {(out / 'index.html').resolve()} in a browser")


def _slug(model: str) -> str:
    """The last part of a folder or hub id, as a folder's name."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"

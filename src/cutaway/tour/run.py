"""Running a tour: steps in order, each saved when it is done, then the page."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import write_json
from cutaway.artifacts.manifest import Manifest, code_version
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.run_folder import RunFolder, goes_on
from cutaway.draw.blocks import Card, Section, Table, TourResult
from cutaway.model.language_model import LanguageModel, load
from cutaway.model.selftest.result import SelfTest
from cutaway.tour import dictionary, observing, patching, steering
from cutaway.tour.context import Text, Tour, read_text, split_text
from cutaway.tour.page import write_tour

Step = Callable[[Tour], Section]
STEPS: dict[str, Step] = {
    "lens": observing.lens,
    "heads": observing.heads,
    "patching": patching.patching,
    "dictionary": dictionary.dictionary,
    "features": dictionary.features,
    "steering": steering.steering,
    "clamping": steering.clamping,
}
NAMES = ("selftest", *STEPS)
_NEEDS_DICTIONARY = ("features", "clamping")
_WRITES = (
    "dictionary", "dictionary.training", "directions.safetensors", "figures.json", "index.html", "latents.parquet",
    "manifest.json",
)  # fmt: skip

_FILES = {"dictionary": ("dictionary",), "features": ("latents.parquet",), "steering": ("directions.safetensors",)}


def run_tour(
    model: str = "atlas",
    *,
    out: str | Path,
    corpus: str | Path | None = None,
    document_separator: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    only: str | None = None,
) -> TourResult:
    """Tour a model and leave a run folder with `index.html` in it.

    With the same arguments an interrupted tour goes on where it stopped.

    Args:
        model: "atlas", a folder or a hub id.
        out: The run folder.
        corpus: A text file or a folder of them, to train the dictionary on; text of atlas's world or Python's standard
            library if None.
        document_separator: What stands between the documents of the corpus, if not blank lines.
        seed: Of everything drawn at random.
        overwrite: Begin again in a folder that holds another run.
        only: Make one section anew in `out` and return it alone: selftest, lens, heads, patching, dictionary, features,
            steering or clamping.

    Returns:
        The tour, as its page shows it.

    Raises:
        CutawayError: A model, corpus or folder that cannot be used.
    """
    if only is not None and only not in NAMES:
        raise CutawayError(f"the tour has no section “{only}”; its sections are {', '.join(NAMES)}")
    started = time.monotonic()
    of_atlas = model == "atlas"
    if corpus is None and document_separator is not None:
        raise CutawayError("a document separator is of a corpus: name the text file or folder too")
    given = None
    if corpus is not None:
        corpus = Path(corpus)
        given = read_text(corpus, of_atlas=of_atlas, seed=seed, document_separator=document_separator)
    lm = load(model)
    if lm.tokenizer is None:
        raise CutawayError(f"{model} has no tokenizer, and a tour reads text; add tokenizer.json to the folder")
    text = given or read_text(None, of_atlas=of_atlas, seed=seed)  # seconds of work, so only for a model that loads
    rows = split_text(lm, text, seed)
    settings = _configuration(lm, text, seed)
    with RunFolder.open(
        Path(out), command="tour", configuration=settings, writes=_WRITES, resume=not overwrite
    ) as folder:
        tour = Tour(
            lm=lm, model=model, folder=folder, text=text, rows=rows, corpus=corpus, seed=seed,
            document_separator=document_separator,
        )  # fmt: skip
        result = _run(tour, only, started, settings)
        if only is None:
            write_json(folder.path / "manifest.json", result.manifest)
            write_json(folder.path / "figures.json", result.model_dump(mode="json"))
            write_tour(result, folder.path / "index.html")
    return result


def _configuration(lm: LanguageModel, text: Text, seed: int) -> dict[str, Any]:
    """Everything that determines the figures."""
    return {
        "model": asdict(lm.identity()),
        "corpus": text.hash,
        "seed": seed,
        "dtype": str(lm.dtype),
        "code": code_version(),
    }


def _run(tour: Tour, only: str | None, started: float, settings: dict[str, Any]) -> TourResult:
    sections = []
    wanted = NAMES if only is None else (only,)
    done = sum(only is None and tour.folder.has(step) for step in wanted)
    if 0 < done < len(wanted):
        goes_on(tour.folder.path, done, len(wanted), "steps")
    with Progress("tour", total=len(wanted), unit="steps") as progress:
        began = time.monotonic()
        test = tour.lm.selftest()
        test.require()
        tested = time.monotonic() - began
        for step in wanted:
            if only in _NEEDS_DICTIONARY:
                dictionary.require_dictionary(tour)
            progress.advance(0, note=step)
            sections.append(_section(tour, step, test, tested, again=only is not None))
            progress.advance(1)
    card = observing.card(tour, test)
    manifest = Manifest.create(
        "tour",
        model=tour.lm.identity(),
        corpus_hash=tour.text.hash,
        configuration=settings,
        seed=tour.seed,
        command=tour.whole_command(),
    )
    total = sum(section.seconds for section in sections)
    if only is None:
        sections.append(_again(tour, sections))
    return TourResult(
        title=f"A tour of {_short(tour.model)}",
        card=Card(**{**card.model_dump(), "name": _short(tour.model)}),
        sections=tuple(sections),
        manifest=manifest.to_json(),
        version=code_version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        total_seconds=max(total, time.monotonic() - started),
        configuration={"model": tour.model, "corpus": tour.text.description, "seed": tour.seed},
    )


def finished_section(folder: RunFolder, step: str) -> Section | None:
    """The section that a step of an earlier run made; None if it has not. `CutawayError` where it is damaged."""
    saved = folder.step(step)
    try:
        return None if saved is None else Section.model_validate(saved)
    except ValidationError as error:
        raise CutawayError(
            f"the step {step} in {folder.path} is not what a tour writes: begin again with --overwrite"
        ) from error


def _section(tour: Tour, step: str, test: SelfTest, tested: float, *, again: bool) -> Section:
    """A section from the run folder, or made now and saved."""
    saved = None if again else finished_section(tour.folder, step)
    if saved is not None:
        return saved
    began = time.monotonic()
    if step == "selftest":
        made = observing.selftest(tour, test).model_copy(update={"seconds": tested})
    else:
        made = STEPS[step](tour)
        made = made.model_copy(update={"seconds": time.monotonic() - began})
    tour.folder.save_step(step, made.model_dump(mode="json"), files=_FILES.get(step, ()))
    return made


def _again(tour: Tour, sections: list[Section]) -> Section:
    """The last section: how to make everything again."""
    return Section(
        id="again",
        title="Make it again",
        question="How can I check this?",
        lead=(
            "Every figure comes from one command with a fixed seed. The folder of this page holds the figures as JSON, "
            "the dictionary in SAELens' layout, the latents as Parquet and the directions as safetensors."
        ),
        blocks=(
            Table(
                columns=("what", "command", "seconds"),
                rows=(
                    ("everything", tour.whole_command(), round(sum(s.seconds for s in sections), 1)),
                    *((s.title, s.command, round(s.seconds, 1)) for s in sections),
                ),
                caption=(
                    "Times of this run. Figures may differ in the last digits with other processors or thread counts."
                ),
            ),
        ),
        command=tour.whole_command(),
    )


def _short(model: str) -> str:
    return Path(model).name if "/" in model else model

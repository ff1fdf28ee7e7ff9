"""The tour's steps that name parts: a dictionary of one layer, and what its latents stand for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, Field, FiniteFloat, StrictInt
from torch import Tensor

from cutaway.artifacts.command import recording
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import parquet_errors, write_parquet
from cutaway.artifacts.progress import Progress
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.evaluate import evaluate
from cutaway.dictionaries.formats.files import load, save
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.from_model import train_on_model
from cutaway.dictionaries.training.rules import TopKRule
from cutaway.draw import blocks as page
from cutaway.features.activations import LatentActivations, latent_activations
from cutaway.features.concepts import ConceptMatch, match_concepts, mentions
from cutaway.features.effects import logit_effects
from cutaway.features.examples import FeatureExamples, Windows, top_examples
from cutaway.features.summary import token_summary
from cutaway.tour.context import Tour
from cutaway.tour.world_tasks import GENERAL_CONCEPTS, LANDMARKS, world_concepts

_TOKENS = 2_000_000  # as many as two cores read and train on in about two minutes
_SHOWN = 8
_STUDY_ROWS = 512
_LEAST_MENTIONS = 12
_MIN_ACTIVE = 30


def _site_of(tour: Tour) -> str:
    """A middle layer's residual stream, where the dictionary is trained."""
    return f"blocks.{(tour.lm.n_layers - 1) // 2}.resid_post"


def _dictionary_folder(tour: Tour) -> Path:
    return tour.folder.path / "dictionary"


def configuration(tour: Tour) -> TrainConfig:
    """Eight latents a dimension, at most 2,048; fewer tokens where the text is short."""
    available = tour.rows.train.numel()
    d_sae = min(2048, 8 * tour.lm.d_model)
    return TrainConfig(
        batch=min(TrainConfig.batch, max(16, available // 8)),
        d_sae=d_sae,
        selector=TopKRule(min(16, max(4, tour.lm.d_model // 16))),
        tokens=max(512, min(_TOKENS, 8 * available)),
        low_precision=True,
        seed=tour.seed,
    )


def _k(config: TrainConfig) -> int:
    assert isinstance(config.selector, TopKRule)
    return config.selector.k


def dictionary(tour: Tour) -> page.Section:
    """Train a TopK dictionary on a middle layer and judge it on held-out rows."""
    command = tour.command("dictionary")
    config = configuration(tour)
    work = tour.folder.path / "dictionary.training"
    trained = train_on_model(tour.lm, tour.rows.train, _site_of(tour), config, folder=work)
    save(trained.dictionary, _dictionary_folder(tour), overwrite=True)
    tour.folder.discard(work.name)
    with recording(command):
        judged = evaluate(tour.lm, trained.dictionary, tour.judged_rows, seed=tour.seed)
    effects = judged.effects
    history = trained.history
    bins = torch.tensor([0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    counts = [
        int(((judged.frequency > low) & (judged.frequency <= high)).sum()) for low, high in itertools.pairwise(bins)
    ]
    names = ["up to 0.001 %", "0.001–0.01 %", "0.01–0.1 %", "0.1–1 %", "1–10 %", "above 10 %"]
    return page.Section(
        id="dictionary",
        title="A dictionary of one layer",
        question="Can a layer be taken apart into single features?",
        lead=(
            f"A sparse autoencoder learns to write the stream after layer {_site_of(tour).split('.')[1]} as a sum of "
            f"{_k(config)} out of {config.d_sae:,} directions. It is judged on text it was not trained on, beside "
            "random directions and by putting its output back into the model."
        ),
        note=(
            f"Trained on {config.tokens:,} tokens ({tour.text.description}), judged on {judged.n_tokens:,} others; one "
            "seed. A few minutes of training: a longer run explains more."
        ),
        blocks=(
            page.Figures(
                items=(
                    page.Figure(label="variance explained", value=effects["variance_explained"].value, units="share"),
                    page.Figure(
                        label="loss recovered",
                        value=effects["ce_recovered_zero"].value,
                        units="share",
                        detail="of what zeros in its place would cost",
                    ),
                    page.Figure(label="active per token (L0)", value=effects["l0"].value, detail=f"k is {_k(config)}"),
                    page.Figure(
                        label="dead latents", value=judged.dead, units="share", detail="never active on held-out text"
                    ),
                )
            ),
            *(page.EffectBlock(effect=effects[name].to_json()) for name in ("variance_explained", "ce_recovered_zero")),
            page.Line(
                series=(
                    page.Series(
                        name="variance explained, training batches",
                        x=tuple(float(record["step"]) * config.batch / 1e6 for record in history),
                        y=tuple(record["variance_explained"] for record in history),
                    ),
                ),
                x_label="million tokens",
                y_label="share",
                caption="While training.",
            ),
            page.Bars(
                items=tuple(page.Bar(label=name, value=n) for name, n in zip(names, counts, strict=True)),
                units="latents",
                caption="How often latents are active: number of latents by the share of held-out tokens.",
            ),
        ),
        effects=tuple(
            e.to_json() for n, e in effects.items() if n not in ("variance_explained", "ce_recovered_zero", "l0")
        ),
        command=command,
    )


def trained_dictionary(tour: Tour) -> Dictionary:
    """The dictionary that the step before has saved."""
    return load(_dictionary_folder(tour))


def concepts(tour: Tour) -> dict[str, tuple[str, ...]]:
    """Entities to look for: atlas's world where the text is of it, words of general English and Python elsewhere."""
    return {**world_concepts(), **GENERAL_CONCEPTS} if tour.of_atlas else GENERAL_CONCEPTS


def _study_rows(tour: Tour) -> Tensor:
    """Held-out rows in which latents are looked at; on atlas those that mention a landmark come first.

    A landmark makes up one token in ten thousand, and its latent can be found only where it is mentioned.
    """
    rows = tour.rows.held_out
    if tour.of_atlas:
        wanted = mentions(tour.lm, rows, tuple(LANDMARKS)).any(1)
        rows = torch.cat([rows[wanted], rows[~wanted]])[:_STUDY_ROWS]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(tour.seed))
        return rows[order]  # even and odd rows are the halves that features are chosen and measured on
    return rows[:_STUDY_ROWS]


def _matches(tour: Tour, learned: Dictionary, rows: Tensor, activations: list[LatentActivations]) -> list[ConceptMatch]:
    """The best latent of every concept that the rows mention often enough, best first."""
    labelled = {}
    for concept, words in concepts(tour).items():
        mask = mentions(tour.lm, rows, words)
        if min(int(mask[0::2].sum()), int(mask[1::2].sum())) >= _LEAST_MENTIONS:
            labelled[concept] = mask
    if not labelled:
        return []
    with recording(tour.command("features")):
        found = match_concepts(tour.lm, learned, rows, labelled, shuffles=5, seed=tour.seed, activations=activations)
    return sorted(found, key=lambda m: -m.auroc)


def features(tour: Tour) -> page.Section:
    """What do single latents respond to, and which stand for things we know?"""
    lm, learned, rows = tour.lm, trained_dictionary(tour), _study_rows(tour)
    with Progress("features", total=rows.numel(), unit="tokens") as progress:
        activations = []
        for part in latent_activations(lm, learned, rows):
            activations.append(part)
            progress.advance(len(part.kept))
    found = _matches(tour, learned, rows, activations)
    best = _shown(found)
    chosen = list(dict.fromkeys([m.latent for m in best]))
    chosen += [i for i in _typical(activations, learned, tour.seed) if i not in chosen][: _SHOWN - len(chosen)]
    examples = top_examples(
        lm, learned, rows, latents=chosen, n=4, windows=Windows(lower=0), seed=tour.seed, activations=activations
    )
    _write_table(tour, examples, found)
    about: dict[str, Any] = {
        "id": "features",
        "title": "What the latents stand for",
        "question": "What do single features respond to?",
        "lead": (
            "Each latent is shown with the places where it is most active, and the tokens its direction raises and "
            "lowers on the direct path to the output. Labels are automatic token summaries, not explanations."
        ),
        "command": tour.command("features"),
    }
    if not chosen:
        note = f"not shown: in {examples.n_tokens} held-out tokens no latent is active {_MIN_ACTIVE} times."
        return page.Section(**about, status="not shown", note=note)
    summaries = token_summary(lm, rows, examples)
    effects = {e.latent: e for e in logit_effects(lm, learned, chosen, k=6)}
    known = {m.latent: m for m in reversed(best)}
    items = []
    for latent in chosen:
        summary, match = summaries[latent], known.get(latent)
        items.append(
            page.Latent(
                id=latent,
                label=summary.label,
                label_note=(
                    f"automatic; holds on {summary.precision:.0%} of {summary.n} held-out activations"
                    if summary.n and summary.precision == summary.precision
                    else "automatic; nothing simple covers its activations"
                ),
                density=float(examples.density[latent]),
                top_examples=tuple(
                    page.Example(tokens=tuple(e.tokens), values=tuple(e.values)) for e in examples[latent].top[:3]
                ),
                promotes=tuple(page.TokenEffect(token=t, value=v) for t, v in effects[latent].promotes),
                suppresses=tuple(page.TokenEffect(token=t, value=v) for t, v in effects[latent].suppresses),
                auroc=None if match is None else match.auroc,
                concept=None if match is None else match.concept,
            )
        )
    table = page.Table(
        columns=("known entity", "latent", "AUROC", "shuffled labels", "precision", "recall", "mentions"),
        rows=tuple(
            (
                m.concept,
                m.latent,
                round(m.auroc, 3),
                round(m.effect.controls[0].value, 3),
                round(m.precision, 3),
                round(m.recall, 3),
                m.n_positive,
            )
            for m in found
        ),
        caption=(
            "The latent that tells an entity best, chosen on every second row and measured on the others. Control: "
            "the same search for shuffled labels." + (_LANDMARKS_FIRST if tour.of_atlas else "")
        ),
    )
    figures = [page.Figure(label="active latents", value=round(1 - examples.dead, 3), units="share")]
    if best:
        top = best[0]
        figures.insert(0, page.Figure(label="best known entity", value=top.concept, detail=f"AUROC {top.auroc:.3f}"))
    return page.Section(
        **about,
        status="shown" if found else "fallback",
        note=(
            "Top examples flatter a latent: they are its strongest activations. AUROC counts all of them."
            if found
            else "No known entity is mentioned often enough in this text to be matched; latents are shown without one."
        ),
        blocks=(page.Figures(items=tuple(figures)), *((table,) if found else ()), page.Features(items=tuple(items))),
        effects=tuple(m.effect.to_json() for m in best[:2]),
    )


_LANDMARKS_FIRST = " Rows that mention a landmark were taken first, so landmarks are commoner here than in the text."


def _shown(found: list[ConceptMatch]) -> list[ConceptMatch]:
    """The best matched entities for half of the examples; a landmark among them where one is."""
    best = found[: _SHOWN // 2]
    landmarks = [m for m in found if m.concept in LANDMARKS]
    if landmarks and not any(m.concept in LANDMARKS for m in best):
        best = [*best[:-1], landmarks[0]]
    return best


def _typical(activations: list[LatentActivations], learned: Dictionary, seed: int) -> list[int]:
    """Latents drawn at random from those that are active often enough: no picking of pretty ones."""
    counts = torch.bincount(torch.cat([part.latent for part in activations]), minlength=learned.d_sae)
    able = (counts >= _MIN_ACTIVE).nonzero()[:, 0]
    order = torch.randperm(len(able), generator=torch.Generator().manual_seed(seed))
    return [int(i) for i in able[order][:_SHOWN]]


def _write_table(tour: Tour, examples: FeatureExamples, found: list[ConceptMatch]) -> None:
    """latents.parquet: every latent with its density, its maximum, and the concepts it was matched to."""
    matched: dict[int, list[ConceptMatch]] = {}
    for match in found:
        matched.setdefault(match.latent, []).append(match)
    count = len(examples.density)
    columns: dict[str, pa.Array] = {
        "latent": pa.array(range(count), pa.int32()),
        "density": pa.array(examples.density.tolist(), pa.float32()),
        "maximum": pa.array(examples.maximum.tolist(), pa.float32()),
        "concepts": pa.array([[m.concept for m in matched.get(i, [])] for i in range(count)], pa.list_(pa.string())),
    }
    for name in ("auroc", "precision", "recall"):
        values = [[getattr(m, name) for m in matched.get(i, [])] for i in range(count)]
        columns[name] = pa.array(values, pa.list_(pa.float64()))
    write_parquet(tour.folder.path / "latents.parquet", pa.table(columns))


@dataclass(frozen=True)
class Matched:
    """A known entity and the latent that tells it best, with its density and maximum: a row of latents.parquet."""

    concept: str
    latent: int
    auroc: float
    precision: float
    recall: float
    maximum: float


def matched(tour: Tour) -> tuple[list[Matched], Tensor]:
    """What the features step has found, best first, and every latent's density [F]."""
    return read_matched(tour.folder.path / "latents.parquet")


class _Record(BaseModel):
    latent: StrictInt = Field(ge=0)
    concepts: list[str]
    auroc: list[FiniteFloat]
    precision: list[FiniteFloat]
    recall: list[FiniteFloat]
    maximum: float
    density: float


def read_matched(path: Path) -> tuple[list[Matched], Tensor]:
    """What `matched` returns, of a file; `CutawayError` where it is absent, damaged or of another kind."""
    if not path.is_file():
        raise CutawayError(f"{path} does not exist: run the tour, or `--only features` first")
    with parquet_errors(path):
        rows = pq.read_table(path).to_pylist()
    try:
        records = [_Record.model_validate(row) for row in rows]
        found = [
            Matched(concept, record.latent, auroc, precision, recall, record.maximum)
            for record in records
            for concept, auroc, precision, recall in zip(
                record.concepts, record.auroc, record.precision, record.recall, strict=True
            )
        ]
    except ValueError as error:  # pydantic's too
        raise CutawayError(f"{path} is damaged: run the tour again with --only features") from error
    return sorted(found, key=lambda t: -t.auroc), torch.tensor([record.density for record in records])


def require_dictionary(tour: Tour) -> None:
    """Raise `CutawayError` unless the dictionary step has finished."""
    if not (_dictionary_folder(tour) / "cfg.json").is_file():
        raise CutawayError(f"{tour.folder.path} has no dictionary yet: run the tour, or `--only dictionary` first")

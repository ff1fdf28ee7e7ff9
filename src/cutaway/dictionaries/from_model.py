"""A dictionary of a model's site, from rows of tokens."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from cutaway.artifacts.manifest import json_hash
from cutaway.data.activations import activation_batches
from cutaway.data.corpus import rows_hash
from cutaway.dictionaries.train import TrainConfig, Trained, train
from cutaway.model.language_model import LanguageModel


def train_on_model(
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    config: TrainConfig,
    *,
    passes: int = 4,
    buffer_tokens: int = 1 << 18,
    folder: Path | None = None,
    seconds_between_checkpoints: float = 30.0,
) -> Trained:
    """Train at `site` of `lm` on the activations of rows [n, p] (see `activation_batches`), resumably in `folder`.

    Each buffer of activations is trained on `passes` times: a fresh token costs a forward, a used one does not. With
    `config.low_precision` the harvest's products run in bfloat16 too. Raises `CutawayError` for a site that the model
    lacks, rows that hold less than a batch, and what `train` raises.
    """
    site = lm.sites().resolve(site)  # an unknown site is refused before anything is run

    def batches(start: int) -> Iterator[Tensor]:
        return activation_batches(
            lm,
            rows,
            site,
            batch_tokens=config.batch,
            seed=config.seed,
            start=start,
            passes=passes,
            buffer_tokens=buffer_tokens,
            low_precision=config.low_precision,
        )

    identity = asdict(lm.identity())
    data = {"rows": rows_hash(rows), "passes": passes, "buffer_tokens": buffer_tokens, "dtype": str(lm.dtype)}
    return train(
        batches,
        config,
        site=site,
        source=json_hash({"model": identity, **data}),
        model=identity,
        metadata={"context": rows.shape[1], "prepend_bos": lm.bos_id is not None, "data": data},
        folder=folder,
        seconds_between_checkpoints=seconds_between_checkpoints,
    )

"""A dictionary of a model's site, from rows of tokens."""

from pathlib import Path

from torch import Tensor

from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.jobs import Job, Trained, train_jobs
from cutaway.dictionaries.training.sources import LiveRows
from cutaway.model.language_model import LanguageModel


def train_on_model(
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    config: TrainConfig,
    *,
    passes: int = 4,
    buffer_tokens: int | None = None,
    folder: Path | None = None,
    seconds_between_checkpoints: float = 30.0,
) -> Trained:
    """Train at `site` of `lm` on the activations of rows [n, p] (see `LiveRows`), resumably in `folder`.

    Each buffer of activations is trained on `passes` times: a fresh token costs a forward, a used one does not. With
    `config.low_precision` the harvest's products run in bfloat16 too. Raises `CutawayError` for a site that the model
    lacks, rows that hold less than a batch, and what `train_jobs` raises.
    """
    site = lm.sites().resolve(site)
    source = LiveRows(
        lm, rows, site, passes=passes, buffer_tokens=buffer_tokens, seed=config.seed, low_precision=config.low_precision
    )
    jobs = {"": Job(config, (site,))}
    seconds = seconds_between_checkpoints
    return train_jobs(source, jobs, folder=folder, seconds_between_checkpoints=seconds)[""]

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
    """Train one dictionary on a model's activations at a site.

    Args:
        lm: The model; with `config.low_precision` its products run in bfloat16 too.
        rows: Token ids [n, p].
        site: What the dictionary reads and writes.
        config: How it is trained.
        passes: How often each buffer of activations is used: a fresh token costs a forward, a used one does not.
        buffer_tokens: Tokens whose activations are held at once; as many as fill 1 GiB, at most 262,144, if None.
        folder: Where the state is written, so that the same call goes on after an interruption.
        seconds_between_checkpoints: How often.

    Returns:
        The dictionary and its history.

    Raises:
        NoSuchSite: the model has no such site.
        CutawayError: rows that hold less than a batch, and what `train_jobs` raises.
    """
    site = lm.sites().resolve(site)
    source = LiveRows(
        lm, rows, site, passes=passes, buffer_tokens=buffer_tokens, seed=config.seed, low_precision=config.low_precision
    )
    jobs = {"": Job(config, (site,))}
    seconds = seconds_between_checkpoints
    return train_jobs(source, jobs, folder=folder, seconds_between_checkpoints=seconds)[""]

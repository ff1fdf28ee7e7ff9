"""Training dictionaries on a stream of activations, resumable bit for bit.

One pass over the stream feeds any number of dictionaries: each batch holds the activations of all sites that any of
them reads or writes. Each keeps a checkpoint of its own; after an interruption the stream is entered where the one that
is furthest behind stopped, and the others wait until it has caught up.

What a step does is in `step.py`, the state in `trainer.py`, where activations come from in `sources.py`.
"""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import json_hash
from cutaway.artifacts.progress import Progress
from cutaway.dictionaries.calibrate import calibrate
from cutaway.dictionaries.config import TrainConfig
from cutaway.dictionaries.dictionary import Dictionary, Port
from cutaway.dictionaries.rules import BatchTopKRule
from cutaway.dictionaries.trainer import Trainer

__all__ = ["CHECKPOINT", "Job", "Source", "TrainConfig", "Trained", "Trainer", "train_jobs"]

CHECKPOINT = "trainer.safetensors"


class Source(Protocol):
    """Where activations come from."""

    @property
    def ports(self) -> Mapping[str, Port]:
        """By name what a batch holds."""
        ...

    @property
    def identity(self) -> str:
        """A hash of what the activations are, so that a run is not resumed on others."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What is to be written down with a dictionary that was trained on it."""
        ...

    def batches(self, size: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        """Endless batches, each site [size, width], from number `start` on: always the same ones."""
        ...


@dataclass(frozen=True)
class Job:
    """One dictionary to train: on what it reads and, unless it writes the same, what it writes."""

    config: TrainConfig
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.reads:
            raise CutawayError("a dictionary reads one site or more")
        if self.writes and self.writes != self.reads and self.config.subtract_b_dec:
            raise CutawayError("a transcoder's b_dec is not subtracted from its input: set subtract_b_dec to false")
        if len(self.reads) > 1 and self.config.input_norm:
            raise CutawayError("a crosscoder cannot normalise its inputs token by token: use 'normalise'")

    @property
    def sites(self) -> tuple[str, ...]:
        """All that it needs of a batch."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    def split(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """x [n, d_in] and y [n, d_out], or None where it writes what it reads."""
        x = _joined([batch[site] for site in self.reads])
        transcodes = self.writes and self.writes != self.reads
        return x, _joined([batch[site] for site in self.writes]) if transcodes else None


@dataclass(frozen=True)
class Trained:
    """The dictionary, and `history`: one record now and then of step, loss, variance explained, dead latents."""

    dictionary: Dictionary
    history: tuple[Mapping[str, float], ...]


def train_jobs(
    source: Source,
    jobs: Mapping[str, Job],
    *,
    folder: Path | None = None,
    seconds_between_checkpoints: float = 30.0,
    records: int = 100,
    on_record: Callable[[str, Mapping[str, float]], None] | None = None,
    label: str | None = None,
) -> dict[str, Trained]:
    """Train all to the end, or from where an interrupted run with the same arguments stopped.

    With a `folder` each job's state is written to `folder/NAME/` (to `folder` itself for the one named "") every so
    many seconds, at the end, and on Ctrl-C; a run that is killed and started again ends with the same bits as one that
    was not. About `records` records a job are kept as history; `on_record` gets each with the job's name, after a
    resumption also those of steps that are done again. Raises `CutawayError` when jobs have different batch sizes, a
    site is not in the source, the data end early, are not finite, or the folder holds another run.
    """
    size = _one_batch_size(jobs)
    for name, job in jobs.items():
        for site in job.sites:
            if site not in source.ports:
                raise CutawayError(f"'{site}' is not among the activations: there are {', '.join(source.ports)}")
        if job.config.steps < 1:
            raise CutawayError(
                f"{name or 'the dictionary'}: {job.config.tokens} tokens are less than one batch of {size}"
            )
    longest = max(job.config.steps for job in jobs.values())
    paths = {name: None if folder is None else Path(folder) / name / CHECKPOINT for name in jobs}
    sources = {
        name: json_hash({"source": source.identity, "sites": [job.reads, job.writes]}) for name, job in jobs.items()
    }
    trainers: dict[str, Trainer] = {}
    for name, path in paths.items():
        if path is not None and path.exists():
            trainers[name] = Trainer.load(path, jobs[name].config, sources[name])
    fresh = [name for name in jobs if name not in trainers]
    stream: Iterator[Mapping[str, Tensor]] | None = None
    first = min((trainer.steps_done for trainer in trainers.values()), default=0) if not fresh else 0
    if fresh:
        stream = source.batches(size, 0)
        wanted = max(1, *(-(-jobs[name].config.sample // size) for name in fresh))
        held = list(itertools.islice(stream, wanted))
        if not held:
            raise CutawayError("there is not one batch of activations: give a longer corpus or a smaller batch")
        sample = {site: torch.cat([batch[site] for batch in held]) for site in held[0]}
        for name in fresh:
            trainers[name] = _new_trainer(jobs[name], source, sample, size)
        stream = itertools.chain(held, stream)
        del held, sample
    every = {name: max(1, job.config.steps // records) for name, job in jobs.items()}

    def save() -> None:
        for name, path in paths.items():
            if path is not None:
                trainers[name].save(path, sources[name])

    label = label or "training " + (f"{len(jobs)} dictionaries" if len(jobs) > 1 else _of_one(jobs))
    with Progress(label, total=longest * size, unit="tokens") as progress:
        progress.advance(first * size)
        saved = time.monotonic()
        try:
            for number in range(first, longest):
                stream = stream or source.batches(size, first)
                batch = next(stream, None)
                if batch is None:
                    raise CutawayError(f"the activations ended after {number} of {longest} steps")
                note = None
                with _whole_step():
                    for name, job in jobs.items():
                        trainer = trainers[name]
                        if trainer.steps_done != number or number >= job.config.steps:
                            continue
                        x, y = job.split(batch)
                        result = trainer.step(x, y)
                        if number % every[name] == 0 or number == job.config.steps - 1:
                            trainer.history.append(trainer.record(x, y, result))
                            note = _note(trainer.history)
                            if on_record is not None:
                                on_record(name, trainer.history[-1])
                progress.advance(size, note=note)
                if folder is not None and time.monotonic() - saved >= seconds_between_checkpoints:
                    save()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            save()
            raise
    save()
    return {name: _finished(jobs[name], trainer, source, size) for name, trainer in trainers.items()}


def _new_trainer(job: Job, source: Source, sample: Mapping[str, Tensor], size: int) -> Trainer:
    part = {site: sample[site][: max(size, job.config.sample)] for site in job.sites}
    x, y = job.split(part)
    blocks = [source.ports[site].width for site in job.reads] if len(job.reads) > 1 else None
    return Trainer(job.config, x, y, blocks=blocks)


def _finished(job: Job, trainer: Trainer, source: Source, size: int) -> Trained:
    """The dictionary; a BatchTopK one gets its threshold from batches after the last."""
    config = job.config
    metadata = {**source.metadata, "training": config.to_json()}
    ports = [tuple(source.ports[site] for site in sites) for sites in (job.reads, job.writes)]
    dictionary = trainer.dictionary(*ports, metadata=metadata)
    if isinstance(config.selector, BatchTopKRule) and config.calibrate:
        count = max(1, config.calibrate // size)

        def batches() -> Iterator[Tensor]:
            for batch in itertools.islice(source.batches(size, config.steps), count):
                yield job.split(batch)[0]

        dictionary = calibrate(dictionary, batches, config.selector.k)
    return Trained(dictionary, tuple(trainer.history))


def _one_batch_size(jobs: Mapping[str, Job]) -> int:
    sizes = {job.config.batch for job in jobs.values()}
    if len(sizes) != 1:
        raise CutawayError(
            "there is nothing to train"
            if not sizes
            else f"dictionaries that share a stream share its batches, but the sizes are {sorted(sizes)}"
        )
    return sizes.pop()


def _of_one(jobs: Mapping[str, Job]) -> str:
    (job,) = jobs.values()
    into = f" → {' + '.join(job.writes)}" if job.writes and job.writes != job.reads else ""
    return f"a dictionary at {' + '.join(job.reads)}{into}"


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _note(history: list[dict[str, float]]) -> str:
    last = history[-1]
    return (
        f"loss {last['loss']:.4g}, L0 {last['l0']:.3g}, variance explained {last['variance_explained']:.3f}, "
        f"dead {last['dead']:.0f}"
    )


@contextlib.contextmanager
def _whole_step() -> Iterator[None]:
    """Hold Ctrl-C back until the step is whole, so that what is saved is a state between two steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt

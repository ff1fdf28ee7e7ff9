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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, TooLarge
from cutaway.artifacts.manifest import json_hash
from cutaway.artifacts.progress import Progress
from cutaway.artifacts.run_folder import goes_on, locked
from cutaway.dictionaries.dictionary import Dictionary, Port
from cutaway.dictionaries.training.calibrate import calibrate
from cutaway.dictionaries.training.config import BYTES_PER_PARAMETER, TrainConfig
from cutaway.dictionaries.training.rules import BatchTopKRule
from cutaway.dictionaries.training.trainer import Trainer
from cutaway.draw.result import Result
from cutaway.model.sweep.memory import available_bytes

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
        """Endless batches, each site [size, width], from number `start` on: always the same ones.

        Raises `CutawayError` at once, not with the first batch, when there is not one.
        """
        ...


@dataclass(frozen=True)
class Job:
    """One dictionary to train."""

    config: TrainConfig
    """How."""
    reads: tuple[str, ...]
    """The sites that it reads."""
    writes: tuple[str, ...] = ()
    """The sites that it writes; what it reads if empty."""
    preset: str = ""
    """The name that `config` came from; it is written down with the dictionary and changes nothing."""

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
        """x [n, d_in] and y [n, d_out], or None where it writes what it reads.

        Args:
            batch: Activations [n, width] by site, all of `sites` at least.
        """
        x = _joined([batch[site] for site in self.reads])
        transcodes = self.writes and self.writes != self.reads
        return x, _joined([batch[site] for site in self.writes]) if transcodes else None


@dataclass(frozen=True, repr=False)
class Trained(Result):
    """A dictionary, and how its training went."""

    title = "A training"

    dictionary: Dictionary
    """What was trained."""
    history: tuple[Mapping[str, float], ...]
    """A record now and then: step, tokens, loss and its terms, variance_explained, l0, dead, learning_rate."""

    def summary(self) -> str:
        if not self.history:
            return f"{self.dictionary}, no record of its training"
        last = self.history[-1]
        return (
            f"{self.dictionary}, trained on {last['tokens']:,.0f} tokens\n"
            f"  last batch: loss {last['loss']:.4g}, variance explained {last['variance_explained']:.4f}, "
            f"L0 {last['l0']:.4g}, dead latents {last['dead']:,.0f} of {self.dictionary.d_sae:,}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"dictionary": repr(self.dictionary), "history": [dict(record) for record in self.history]}

    def rows(self) -> list[dict[str, Any]]:
        return [dict(record) for record in self.history]

    def drawing(self) -> Markup:
        from cutaway.draw.charts import line_svg

        def curve(name: str, label: str) -> Markup:
            x, y = ([record[key] for record in self.history] for key in ("tokens", name))
            return line_svg(series=[{"name": label, "x": x, "y": y}], title=label, x_label="tokens", y_label=label)

        return curve("variance_explained", "variance explained, training batches") + curve("loss", "loss")


def tokens_used(job: Job) -> int:
    """Tokens that a job takes from the stream, those that set a BatchTopK threshold included."""
    config = job.config
    return config.tokens + (config.calibrate if isinstance(config.selector, BatchTopKRule) else 0)


def train_jobs(
    source: Source,
    jobs: Mapping[str, Job],
    *,
    folder: Path | None = None,
    seconds_between_checkpoints: float = 30.0,
    records: int = 100,
    on_begin: Callable[[str, Trainer], None] | None = None,
    on_record: Callable[[str, Mapping[str, float]], None] | None = None,
    label: str | None = None,
) -> dict[str, Trained]:
    """Train dictionaries on one stream of activations, or go on where an interrupted run stopped.

    A run that is killed and started again ends with the same bits as one that was not.

    Args:
        source: The activations: `Tensors`, `StoreSource`, `LiveRows`.
        jobs: What to train, by name.
        folder: Where each job's state is written (to `folder/NAME/`; to `folder` itself for the one named ""), every so
            many seconds, at the end, and on Ctrl-C. Nowhere if None.
        seconds_between_checkpoints: How often.
        records: About how many records of each job are kept as history.
        on_begin: Gets each job's name and trainer before its first step here.
        on_record: Gets each job's name and record, after a resumption also those of steps that are done again.
        label: What the progress line says.

    Returns:
        What was trained, by name.

    Raises:
        TooLarge: memory does not hold the parameters with what training keeps of them.
        BadFile: the folder holds another run, or a damaged checkpoint.
        CutawayError: jobs have different batch sizes, a site is not in the source, the data end early or are not
            finite, or another process is training in the folder.
    """
    size = _batch_size(source, jobs)
    paths = {name: None if folder is None else Path(folder) / name / CHECKPOINT for name in jobs}
    sources = {
        name: json_hash({"source": source.identity, "sites": [job.reads, job.writes]}) for name, job in jobs.items()
    }
    longest = max(job.config.steps for job in jobs.values())
    every = {name: max(1, job.config.steps // records) for name, job in jobs.items()}
    with contextlib.nullcontext() if folder is None else locked(Path(folder)):
        trainers = {
            name: Trainer.load(path, jobs[name].config, sources[name])
            for name, path in paths.items()
            if path is not None and path.exists()
        }
        saved = {name: trainer.steps_done for name, trainer in trainers.items()}
        held: list[Mapping[str, Tensor]] = []
        stream: Iterator[Mapping[str, Tensor]] | None = None
        if fresh := {name: job for name, job in jobs.items() if name not in trainers}:
            _require_memory(source, fresh)
            stream = source.batches(size, 0)
            held = _first_batches(stream, fresh, size)
            trainers |= {name: _new_trainer(job, source, held, size) for name, job in fresh.items()}
            stream = itertools.chain(held, stream)
            del held
        first = min(trainer.steps_done for trainer in trainers.values())
        if folder is not None and 0 < first < longest:
            goes_on(Path(folder), first * size, longest * size, "tokens")
        if on_begin is not None:
            for name in jobs:
                on_begin(name, trainers[name])

        def save() -> None:
            for name, path in paths.items():
                if path is not None and saved.get(name) != trainers[name].steps_done:
                    trainers[name].save(path, sources[name])
                    saved[name] = trainers[name].steps_done

        with Progress(label or f"training {_named(jobs)}", total=longest * size, unit="tokens") as progress:
            progress.advance(first * size)
            last_save = time.monotonic()
            try:
                for number in range(first, longest):
                    stream = stream or source.batches(size, first)
                    batch = next(stream, None)
                    if batch is None:
                        raise CutawayError(f"the activations ended after {number} of {longest} steps")
                    noted = False
                    with _whole_step():
                        for name, job in jobs.items():
                            trainer = trainers[name]
                            if trainer.steps_done != number or number >= job.config.steps:
                                continue
                            x, y = job.split(batch)
                            result = trainer.step(x, y, downstream=_downstream(source, batch, job))
                            if number % every[name] == 0 or number == job.config.steps - 1:
                                trainer.history.append(trainer.record(x, y, result))
                                noted = True
                                if on_record is not None:
                                    on_record(name, trainer.history[-1])
                    progress.advance(size, note=_note(trainers.values()) if noted else None)
                    if folder is not None and time.monotonic() - last_save >= seconds_between_checkpoints:
                        save()
                        last_save = time.monotonic()
            except KeyboardInterrupt:
                save()
                raise
        save()
        return _finished(source, jobs, trainers, size, stream)


def _require_memory(source: Source, jobs: Mapping[str, Job]) -> None:
    """Raise, before memory runs out, where the parameters with what training keeps of them are more than is free."""

    def width(sites: Sequence[str]) -> int:
        return sum(source.ports[site].width for site in sites)

    needed = {
        name: BYTES_PER_PARAMETER * job.config.parameters(width(job.reads), width(job.writes or job.reads))
        + 2 * 4 * job.config.batch * job.config.d_sae
        for name, job in jobs.items()
    }
    free = available_bytes(torch.device("cpu"))
    if sum(needed.values()) > free:
        largest = max(needed, key=lambda name: needed[name])
        raise TooLarge(
            f"training {_named(jobs)} takes {sum(needed.values()) / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are "
            f"free (d_sae is {jobs[largest].config.d_sae:,}): take fewer latents, or fewer dictionaries at once"
        )


def _batch_size(source: Source, jobs: Mapping[str, Job]) -> int:
    """The one batch size of all jobs; raises for what can be seen to be wrong before any work."""
    sizes = {job.config.batch for job in jobs.values()}
    if len(sizes) != 1:
        raise CutawayError(
            "there is nothing to train"
            if not sizes
            else f"dictionaries that share a stream share its batches, but the sizes are {sorted(sizes)}"
        )
    for job in jobs.values():
        for site in job.sites:
            if site not in source.ports:
                raise CutawayError(f"'{site}' is not among the activations: there are {', '.join(source.ports)}")
    return sizes.pop()


def _first_batches(
    stream: Iterator[Mapping[str, Tensor]], fresh: Mapping[str, Job], size: int
) -> list[Mapping[str, Tensor]]:
    """As many as the largest sample takes that a new trainer starts from."""
    held = list(itertools.islice(stream, max(1, *(-(-job.config.sample // size) for job in fresh.values()))))
    if not held:
        raise CutawayError("there is not one batch of activations: give a longer corpus or a smaller batch")
    return held


def _new_trainer(job: Job, source: Source, held: Sequence[Mapping[str, Tensor]], size: int) -> Trainer:
    parts = held[: max(1, -(-job.config.sample // size))]
    sample = {site: torch.cat([batch[site] for batch in parts])[: max(size, job.config.sample)] for site in job.sites}
    x, y = job.split(sample)
    blocks = [source.ports[site].width for site in job.reads] if len(job.reads) > 1 else None
    return Trainer(job.config, x, y, blocks=blocks)


def _downstream(source: Source, batch: Mapping[str, Tensor], job: Job) -> Callable[[Tensor], Tensor] | None:
    """What takes ŷ to a loss, where the source runs its model on (see `end_to_end.py`)."""
    run_on = getattr(source, "downstream", None)
    return None if run_on is None else run_on(batch, job.writes or job.reads)


def _finished(
    source: Source,
    jobs: Mapping[str, Job],
    trainers: Mapping[str, Trainer],
    size: int,
    stream: Iterator[Mapping[str, Tensor]] | None,
) -> dict[str, Trained]:
    """The dictionaries; BatchTopK ones get their threshold from the batches after the last.

    `stream`, if begun, stands behind the last step of the longest job, so that its model need not be run again.
    """
    later: dict[int, list[dict[str, Tensor]]] = {}
    calibrated = {
        name: job
        for name, job in jobs.items()
        if isinstance(job.config.selector, BatchTopKRule) and job.config.calibrate
    }
    for steps in {job.config.steps for job in calibrated.values()}:
        same = [job for job in calibrated.values() if job.config.steps == steps]
        sites = dict.fromkeys(site for job in same for site in job.reads)
        count = max(1, max(job.config.calibrate for job in same) // size)
        begun = stream is not None and steps == max(job.config.steps for job in jobs.values())
        batches = stream if stream is not None and begun else source.batches(size, steps)
        later[steps] = [{site: batch[site] for site in sites} for batch in itertools.islice(batches, count)]
    done: dict[str, Trained] = {}
    for name, job in jobs.items():
        trainer = trainers[name]
        ports = [tuple(source.ports[site] for site in sites) for sites in (job.reads, job.writes)]
        metadata = {**source.metadata, "training": job.config.to_json()}
        if job.preset:
            metadata["preset"] = job.preset
        dictionary = trainer.dictionary(*ports, metadata=metadata)
        if name in calibrated and isinstance(job.config.selector, BatchTopKRule):
            some = later[job.config.steps][: max(1, job.config.calibrate // size)]
            values = [_joined([batch[site] for site in job.reads]) for batch in some]
            dictionary = calibrate(dictionary, lambda values=values: values, job.config.selector.k, at_most=True)
        done[name] = Trained(dictionary, tuple(trainer.history))
    return done


def _named(jobs: Mapping[str, Job]) -> str:
    if len(jobs) > 1:
        return f"{len(jobs)} dictionaries"
    (job,) = jobs.values()
    into = f" → {' + '.join(job.writes)}" if job.writes and job.writes != job.reads else ""
    return f"a dictionary at {' + '.join(job.reads)}{into}"


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _note(trainers: Iterable[Trainer]) -> str:
    """The last record of each in a few words; of several, from the smallest to the largest."""
    lasts = [
        {**trainer.history[-1], "dead": trainer.history[-1]["dead"] / trainer.config.d_sae} for trainer in trainers
    ]

    def between(name: str, form: str) -> str:
        values = [last[name] for last in lasts]
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low} to {high}"

    return (
        f"loss {between('loss', '.4g')}, L0 {between('l0', '.3g')}, "
        f"variance explained {between('variance_explained', '.3f')}, dead {between('dead', '.1%')}"
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

"""What a training will take, before it is begun: parameters, operations, memory, and time on this machine.

Parameters, operations and memory are counted. Time is measured: a few real steps of each dictionary on random numbers,
and one real forward of the model. Real activations make other latents active than random numbers do, so it is a guess.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.progress import duration
from cutaway.dictionaries.training.api import Training
from cutaway.dictionaries.training.config import BYTES_PER_PARAMETER, TrainConfig
from cutaway.dictionaries.training.jobs import Job, Source, tokens_used
from cutaway.dictionaries.training.rules import BatchTopKRule, TopKRule
from cutaway.dictionaries.training.sources import LiveRows
from cutaway.dictionaries.training.trainer import Trainer
from cutaway.draw.result import Result
from cutaway.model.language_model import LanguageModel
from cutaway.model.sites import layer_of
from cutaway.model.sweep.flops import cost

_STEPS, _SECONDS, _ROWS = 4, 5.0, 16
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class DictionaryEstimate:
    """What one dictionary takes."""

    name: str
    """Its name."""
    latents: int
    """Number of latents."""
    parameters: int
    """Numbers that are trained."""
    flops: tuple[int, int]
    """Operations per token of a step, min and max (max with every latent active)."""
    state: int
    """Bytes of parameters, their gradients and Adam's two moments."""
    steps: int
    """Steps of the optimiser."""
    step: float | None
    """Seconds per step, if measured."""


@dataclass(frozen=True, repr=False)
class Estimate(Result):
    """What a training will take: all dictionaries, and what they share."""

    title = "What a training will take"

    dictionaries: tuple[DictionaryEstimate, ...]
    """One by one."""
    tokens: int
    """Training tokens of each."""
    fresh: int
    """Tokens that the model has to be run on."""
    forward: int
    """Operations of the model per token."""
    forward_seconds: float
    """Seconds of the model per token."""
    model_bytes: int
    """Bytes of the models."""
    buffer_bytes: int
    """Bytes of the buffer of activations."""
    batch_bytes: int
    """Bytes of the largest batch's pre-activations."""
    available: int | None
    """Bytes of memory that are free here, where the system says so."""

    @property
    def memory(self) -> int:
        """Bytes at the same time: models, buffer, the largest batch's pre-activations, every dictionary's state."""
        return self.model_bytes + self.buffer_bytes + self.batch_bytes + sum(one.state for one in self.dictionaries)

    @property
    def seconds(self) -> float | None:
        """Expected time, if every part of it was measured."""
        if any(one.step is None for one in self.dictionaries):
            return None
        steps = sum(one.steps * (one.step or 0.0) for one in self.dictionaries)
        return steps + self.fresh * self.forward_seconds

    def summary(self) -> str:
        *table, _, tokens, memory, time = str(self).split("\n")
        more = [f"and {len(table) - 8} more"] if len(table) > 8 else []
        return "\n".join([*table[:8], *more, tokens, memory, time])

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "dictionary": one.name, "latents": one.latents, "parameters": one.parameters,
                "flops_min": one.flops[0], "flops_max": one.flops[1], "bytes": one.state, "steps": one.steps,
                "seconds_per_step": one.step,
            }
            for one in self.dictionaries
        ]  # fmt: skip

    def drawing(self) -> Markup:
        from cutaway.draw.heatmap import heatmap_html

        share = {"models": self.model_bytes, "buffer": self.buffer_bytes, "batch": self.batch_bytes}
        share |= {one.name: one.state for one in self.dictionaries}
        return heatmap_html(
            rows=list(share),
            columns=["memory, GiB"],
            values=[[size / 2**30] for size in share.values()],
            title="Memory at the same time",
            units="GiB",
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory, "seconds": self.seconds}

    def __str__(self) -> str:
        heads = ["dictionary", "latents", "parameters", "operations per token", "memory", "ms per step"]
        rows = [
            [
                one.name,
                f"{one.latents:,}",
                _count(one.parameters),
                " to ".join(_count(number) for number in dict.fromkeys(one.flops)),
                _bytes(one.state),
                "?" if one.step is None else f"{1000 * one.step:.1f}",
            ]
            for one in self.dictionaries
        ]
        widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [heads, ["-" * width for width in widths], *rows]
        ]
        states = sum(one.state for one in self.dictionaries)
        lines = [
            f"tokens  {self.tokens:,} for each dictionary",
            f"memory  {_bytes(self.memory)}: model {_bytes(self.model_bytes)}, buffer {_bytes(self.buffer_bytes)}, "
            f"batch {_bytes(self.batch_bytes)}, parameters with gradients and Adam {_bytes(states)}",
        ]
        if self.fresh:
            lines[0] += f"; the model reads {self.fresh:,}, {_count(self.forward)} operations each"
        if self.available is not None:
            lines[1] += f"; {_bytes(self.available)} are free here"
        if self.seconds is None:
            lines.append("time    not measured: this is more than fits into memory")
        else:
            lines.append(
                f"time    about {duration(self.seconds)} here, by {_STEPS - 1} steps of each on random numbers"
                + (" and one forward" if self.fresh else "")
            )
        return "\n".join([*table, "", *lines])


def estimate(training: Training) -> Estimate:
    """Count, and measure, what a prepared training will take.

    Parameters, operations and memory are counted; time is measured by a few steps on random numbers.

    Args:
        training: What `prepare` made.

    Returns:
        The estimate.
    """
    source, jobs = training.source, training.jobs
    size = next(iter(jobs.values())).config.batch
    found = []
    free = _available()
    for name, job in jobs.items():
        d_in, d_out = _width(source, job.reads), _width(source, job.writes or job.reads)
        parameters = job.config.parameters(d_in, d_out)
        found.append(
            DictionaryEstimate(
                name=name,
                latents=job.config.d_sae,
                parameters=parameters,
                flops=_flops(job.config, d_in, d_out),
                state=BYTES_PER_PARAMETER * parameters,
                steps=job.config.steps,
                step=None,
            )
        )
    longest = max(job.config.steps for job in jobs.values()) * size
    forward, fresh, seconds, buffer = 0, 0, 0.0, 0
    if isinstance(source, LiveRows):
        passes = source.options["passes"]
        fresh = -(-max(tokens_used(job) for job in jobs.values()) // passes)
        forward = sum(_forward(lm, source, number) for number, lm in enumerate(source.models))
        width = sum(port.width for port in source.ports.values())
        buffer = 4 * width * min(source.options["buffer_tokens"], source.rows.numel())
    whole = Estimate(
        dictionaries=tuple(found),
        tokens=longest,
        fresh=fresh,
        forward=forward,
        forward_seconds=seconds,
        model_bytes=sum(p.nbytes for lm in training.models for p in lm.hf.parameters()),
        buffer_bytes=buffer,
        batch_bytes=2 * 4 * size * max(job.config.d_sae for job in jobs.values()),
        available=free,
    )
    if free is not None and whole.memory > _SHARE_OF_MEMORY * free:
        return whole
    steps = [_step_seconds(job, source) for job in jobs.values()]
    timed = tuple(replace(one, step=step) for one, step in zip(found, steps, strict=True))
    if isinstance(source, LiveRows):
        seconds = _forward_seconds(source)
    return replace(whole, dictionaries=timed, forward_seconds=seconds)


def _width(source: Source, sites: Sequence[str]) -> int:
    return sum(source.ports[site].width for site in sites)


def _flops(config: TrainConfig, d_in: int, d_out: int) -> tuple[int, int]:
    """Encoding, 2·d_in·F, and for each active latent decoding, its value's gradient and both its rows' gradients."""
    encode, active = 2 * d_in * config.d_sae, 2 * (3 * d_out + d_in)
    skip = 4 * d_in * d_out if config.skip else 0
    if isinstance(config.selector, TopKRule | BatchTopKRule):
        total = encode + skip + config.selector.k * active
        return total, total
    return encode + skip, encode + skip + config.d_sae * active


def _forward(lm: LanguageModel, source: LiveRows, number: int) -> int:
    """Operations of a token up to the layer of the last site, that layer included."""
    weights, context = cost(lm), source.rows.shape[1]
    layers = [layer_of(site) for site in source.sites_of(number)]
    last = max((lm.n_layers - 1 if layer is None else layer for layer in layers), default=-1)
    matrices = sum(
        weights.query[i] + weights.key_value[i] + weights.output[i] + weights.mlp[i] for i in range(last + 1)
    )
    return 2 * matrices + (last + 1) * 4 * weights.heads * (context + 1) // 2


def _step_seconds(job: Job, source: Source) -> float:
    """The quickest of a few steps on random numbers."""
    config = replace(job.config, sample=0)
    generator = torch.Generator().manual_seed(0)

    def random(sites: Sequence[str], n: int) -> Tensor:
        return torch.randn(n, _width(source, sites), generator=generator)

    transcodes = bool(job.writes) and job.writes != job.reads
    first = max(config.batch, 2 * _width(source, job.reads) if config.normalise == "whiten" else 0)
    blocks = [source.ports[site].width for site in job.reads] if len(job.reads) > 1 else None
    y = random(job.writes, first) if transcodes else None
    trainer = Trainer(config, random(job.reads, first), y, blocks=blocks)
    x = random(job.reads, config.batch)
    y = random(job.writes, config.batch) if transcodes else None
    taken: list[float] = []
    while len(taken) < _STEPS and sum(taken) < _SECONDS:
        begun = time.perf_counter()
        trainer.step(x, y, downstream=lambda written: written.sum() * 0)
        taken.append(time.perf_counter() - begun)
    return min(taken[1:] or taken)


def _forward_seconds(source: LiveRows) -> float:
    """A token's share of one forward over some of the rows."""
    some = torch.arange(min(_ROWS, len(source.rows)))
    source.values(some[:1])  # the first call prepares things
    begun = time.perf_counter()
    source.values(some)
    return (time.perf_counter() - begun) / (len(some) * source.rows.shape[1])


def _available() -> int | None:
    """Bytes of memory that can be had, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _count(number: float) -> str:
    for size, word in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    for size, word in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f} B"

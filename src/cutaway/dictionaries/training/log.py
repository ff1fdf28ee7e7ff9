"""How a run went, as JSON lines per dictionary, and to wandb or TensorBoard where asked.

    logs/NAME.jsonl    one object per line: step, tokens, loss and its terms, L0, variance explained, dead, tokens/s

After a resumption a log holds what the checkpoint knows and no more, so no step is there twice, and no half line.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from cutaway.artifacts.errors import CutawayError, MissingExtra
from cutaway.artifacts.files import disk_errors, note_written, plain, read_bytes, write_text
from cutaway.dictionaries.training.trainer import Trainer

Tracking = Literal["wandb", "tensorboard"]


class Tracker(Protocol):
    """Something that figures are sent to."""

    def begin(self, name: str, trainer: Trainer) -> None:
        """A dictionary's training begins, or goes on behind `trainer.steps_done`."""
        ...

    def record(self, name: str, step: int, figures: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Logs:
    """Writes each dictionary's records; give `begin` and `record` to `train_jobs`, and close it afterwards."""

    def __init__(self, folder: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self.folder, self.trackers = folder, tuple(trackers)
        self._last: dict[str, tuple[float, float]] = {}  # when the last record was made, and at how many tokens
        self._d_sae: dict[str, int] = {}

    def begin(self, name: str, trainer: Trainer) -> None:
        self._d_sae[name] = trainer.config.d_sae
        self._last[name] = (time.monotonic(), trainer.steps_done * trainer.config.batch)
        if self.folder is not None:
            there = {record["step"]: record for record in read_log(self._path(name))}
            lines = [there.get(record["step"], self._entry(name, record)) for record in trainer.history]
            write_text(self._path(name), "".join(json.dumps(plain(line)) + "\n" for line in lines))
            note_written(self._path(name))  # it grows
        for tracker in self.trackers:
            tracker.begin(name, trainer)

    def record(self, name: str, record: Mapping[str, float]) -> None:
        (before, tokens), now = self._last[name], time.monotonic()
        self._last[name] = now, record["tokens"]
        entry = self._entry(name, record)
        if record["tokens"] > tokens and now > before:
            entry["tokens_per_second"] = (record["tokens"] - tokens) / (now - before)
        if self.folder is not None:
            path = self._path(name)
            with disk_errors(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(plain(entry)) + "\n")
        for tracker in self.trackers:
            tracker.record(name, int(record["step"]), entry)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.jsonl"

    def _entry(self, name: str, record: Mapping[str, float]) -> dict[str, float]:
        return {**record, "dead_share": record["dead"] / self._d_sae[name]}


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a log, oldest first; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    found: list[dict[str, float]] = []
    for line in read_bytes(path).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def trackers(names: Sequence[str], folder: Path | None, identity: str) -> list[Tracker]:
    """Trackers by name. `identity` is the same when a run is resumed.

    Raises `CutawayError` for an unknown name, a library that is not installed, TensorBoard without a folder.
    """
    found: list[Tracker] = []
    for name in names:
        if name not in get_args(Tracking):
            raise CutawayError(f"'{name}' is nothing to log to: there are {', '.join(get_args(Tracking))}")
        found.append(_Wandb(folder, identity) if name == "wandb" else _TensorBoard(folder))
    return found


class _Wandb:
    """One run; figures are called NAME/figure."""

    def __init__(self, folder: Path | None, identity: str) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingExtra("logging to wandb takes the library: pip install 'cutaway[wandb]'") from error
        name = None if folder is None else folder.name
        self.run: Any = wandb.init(project="cutaway", name=name, id=identity[:16], resume="allow", dir=folder)

    def begin(self, name: str, trainer: Trainer) -> None:
        self.run.config.update({name: plain(trainer.config.to_json())}, allow_val_change=True)

    def record(self, name: str, step: int, figures: Mapping[str, float]) -> None:
        self.run.log({f"{name}/{figure}": value for figure, value in figures.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


class _TensorBoard:
    """A run per dictionary, below `tensorboard/`; what is done again after a resumption replaces what was there."""

    def __init__(self, folder: Path | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("logging to TensorBoard takes it: pip install 'cutaway[tensorboard]'") from error
        if folder is None:
            raise CutawayError("TensorBoard's files need a folder: give out=")
        self.make: Any = SummaryWriter
        self.folder = folder / "tensorboard"
        self.writers: dict[str, Any] = {}

    def begin(self, name: str, trainer: Trainer) -> None:
        self.writers[name] = self.make(log_dir=str(self.folder / name), purge_step=trainer.steps_done + 1)

    def record(self, name: str, step: int, figures: Mapping[str, float]) -> None:
        for figure, value in figures.items():
            if figure != "step":
                self.writers[name].add_scalar(figure, value, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

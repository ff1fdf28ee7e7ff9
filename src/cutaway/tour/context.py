"""What every step of a tour shares: the model, the text, the seed, the run folder, and what the model can do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from cutaway.artifacts.results import interval_text
from cutaway.artifacts.run_folder import RunFolder
from cutaway.artifacts.statistics import wilson_interval
from cutaway.causal.accuracy import task_accuracy
from cutaway.causal.task_results import TaskResult, try_tasks
from cutaway.data.corpus.corpus import RowSplit, corpus_hash, read_corpus, split_rows, token_rows
from cutaway.data.corpus.python_library import standard_library
from cutaway.data.pairs import AlignedPairs
from cutaway.data.tasks.tasks import TASKS, readable_pairs
from cutaway.model.language_model import LanguageModel
from cutaway.subjects.atlas.text import library_text, world_text
from cutaway.tour.world_tasks import WORLD_TASKS

LEAST_RIGHT = 0.8
_PAIRS = 40
_LEAST_PAIRS = 8
_CONTEXT = 256
_JUDGED_ROWS = 64
_WORLD_CHARACTERS = 6_000_000


@dataclass(frozen=True)
class Text:
    """The text of a tour: documents, what they are in words, their hash."""

    documents: tuple[str, ...]
    description: str
    hash: str


def read_text(corpus: Path | None, *, of_atlas: bool, seed: int, document_separator: str | None = None) -> Text:
    """The user's corpus; else atlas's world stream with held-out standard library; else the standard library."""
    if corpus is not None:
        found = read_corpus(corpus, document_separator=document_separator)
        return Text(tuple(found.documents), str(corpus), corpus_hash(found.documents))
    if not of_atlas:
        library = standard_library()
        prose = [document.text for document in library if ":" in document.name]
        chosen = (*prose, *(document.text for document in library if ":" not in document.name))
        return Text(chosen, "prose and source of Python's standard library", corpus_hash(chosen))
    world, real = world_text(_WORLD_CHARACTERS, f"tour-{seed}"), library_text()
    description = "a stream of atlas's world drawn with a seed that no training used, and held-out library source"
    return Text((*world, *real), description, corpus_hash([*world, *real]))


def split_text(lm: LanguageModel, text: Text, seed: int) -> RowSplit:
    """Token rows of the text: three quarters to learn from, the rest to judge on and to look for features in."""
    rows = token_rows(lm, text.documents, min(_CONTEXT, lm.context_length), seed, limit=12_000)
    return split_rows(rows, max(1, len(rows) // 4), seed)


@dataclass
class Tour:
    """One tour in the making."""

    lm: LanguageModel
    model: str
    folder: RunFolder
    text: Text
    rows: RowSplit
    corpus: Path | None
    seed: int
    document_separator: str | None = None

    @property
    def of_atlas(self) -> bool:
        return self.model == "atlas"

    def command(self, section: str) -> str:
        """The command line that makes one section's figures again."""
        return f"{self.whole_command()} --only {section}"

    def whole_command(self) -> str:
        """The command line of the whole tour."""
        words = ["cutaway", "tour", self.model, "--seed", str(self.seed), "--out", str(self.folder.path)]
        if self.corpus is not None:
            words += ["--corpus", str(self.corpus)]
        if self.document_separator is not None:
            words += ["--document-separator", self.document_separator]
        return shlex.join(words)

    @property
    def judged_rows(self) -> Tensor:
        """Held-out rows on which dictionaries are judged and edits priced."""
        return self.rows.held_out[:_JUDGED_ROWS]

    @cached_property
    def tried(self) -> Sequence[TaskResult]:
        """Every task tried on the model, in the order in which the tour would like to use them."""
        return try_tasks(self.lm, (*WORLD_TASKS, *TASKS), n=_PAIRS, threshold=LEAST_RIGHT, seed=self.seed)

    @cached_property
    def gridded(self) -> TaskResult | None:
        """The first task that the model is right on, on prompts of one layout, so that positions mean the same."""
        for result in self.tried:
            if not result.able:
                continue
            pairs = _same_layout(readable_pairs(self.lm, result.task, 4 * _PAIRS, self.seed))
            pairs = pairs[range(min(len(pairs), _PAIRS))]
            if len(pairs) < _LEAST_PAIRS:
                continue
            measured = task_accuracy(self.lm, pairs, criterion=result.task.criterion)
            if measured.value >= LEAST_RIGHT:
                return TaskResult(result.task, pairs, measured, "")
        return None

    def not_able(self) -> str:
        """One line on what was tried, for a section that cannot be shown."""
        tried = [t for t in self.tried if t.accuracy is not None]
        counts = "; ".join(f"{t.task.name}: right on {_right(t)}" for t in tried)
        if any(t.able for t in tried):
            counts = f"too few prompts of one layout in the tasks that the model can do ({counts})"
        return f"not shown: {counts or 'none of the tasks can be read with this tokenizer'}"

    def chosen(self, result: TaskResult) -> tuple[str, str]:
        """The status of a section that uses this task, and the line that says why."""
        assert result.accuracy is not None
        right, n = result.accuracy.right, result.accuracy.n
        low, high = wilson_interval(right, n)
        measured = f"right on {right} of {n} ({interval_text((low, high), 2, to=True)})"
        if result.task.name == WORLD_TASKS[0].name:
            return "shown", f"Task: {result.task.name}, {measured}."
        failed = next((t for t in self.tried if not t.able), None)
        why = f" instead of {failed.task.name} ({failed.reason})" if failed is not None else ""
        return "fallback", f"Task: {result.task.name}, {measured}{why}."


def _right(result: TaskResult) -> str:
    assert result.accuracy is not None
    return f"{result.accuracy.right} of {result.accuracy.n}"


def _same_layout(pairs: AlignedPairs) -> AlignedPairs:
    """The largest group of pairs that agree in length and in which tokens differ, so that positions mean the same."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in range(len(pairs)):
        clean, corrupt = pairs.clean.row_ids(row), pairs.corrupt.row_ids(row)
        differing = tuple(i for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b)
        groups.setdefault((len(clean), differing), []).append(row)
    return pairs[max(groups.values(), key=len)]


def position_labels(pairs: AlignedPairs, strings: Sequence[str]) -> list[str]:
    """Column labels: the first pair's tokens, marked where pairs have other tokens."""
    rows = [pairs.clean.row_ids(row) for row in range(len(pairs))]
    shared = [len({row[i] for row in rows}) == 1 for i in range(len(rows[0]))]
    return [
        f"{i} {string.strip() or repr(string)}{'' if same else '*'}"
        for i, (string, same) in enumerate(zip(strings, shared, strict=True))
    ]


def neutral_rows(tour: Tour, n: int = 16, length: int = 64) -> list[list[int]]:
    """Held-out rows of the tour's text, cut short: where a steering edit should do nothing."""
    rows: Tensor = tour.judged_rows[:n, :length]
    return [list(map(int, row)) for row in rows]

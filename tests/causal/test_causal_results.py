"""Every result of patching, tracing, paths and tasks prints, tables, draws and saves itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
from patched import patch_cell, patch_grid
from result_checks import check_result

from cutaway.artifacts.command import recording
from cutaway.causal.accuracy import task_accuracy
from cutaway.causal.patching.self_repair import self_repair
from cutaway.causal.paths.path_patching import path_patch
from cutaway.causal.task_results import TaskResult, TaskResults
from cutaway.causal.tracing.prompts import FactPrompt
from cutaway.causal.tracing.trace import causal_trace
from cutaway.data.pairs import PromptPair, aligned
from cutaway.data.tasks.tasks import TASKS
from cutaway.draw.result import Result
from cutaway.model.language_model import LanguageModel

Pairs = Callable[..., list[PromptPair]]


def _accuracy(tiny: LanguageModel, pairs: list[PromptPair]) -> Result:
    return task_accuracy(tiny, pairs)


def _tasks(tiny: LanguageModel, pairs: list[PromptPair]) -> Result:
    ready = aligned(tiny, pairs)
    tried = TaskResult(TASKS[0], ready, task_accuracy(tiny, ready), "right on 1 of 9")
    return TaskResults("tiny", (tried, TaskResult(TASKS[1], None, None, "cannot be read", "held_out")))


def _grid(tiny: LanguageModel, pairs: list[PromptPair]) -> Result:
    return patch_grid(tiny, pairs)


def _neurons(tiny: LanguageModel, pairs: list[PromptPair]) -> Result:
    return patch_grid(tiny, pairs, over="neurons", top=3)


def _cell(tiny: LanguageModel, pairs: list[PromptPair]) -> Result:
    return patch_cell(tiny, pairs, "blocks.1.mlp.out")


def _repair(tiny: LanguageModel, pairs: list[PromptPair]) -> Result:
    return self_repair(tiny, pairs, heads=[(1, 1)])


def _paths(tiny: LanguageModel, pairs: list[PromptPair]) -> Result:
    return path_patch(tiny, pairs, ["L0H1", "L1.mlp", "embed"], ["L1H0.q", "logits"], random_senders=2)


@pytest.mark.parametrize("made", [_accuracy, _tasks, _grid, _neurons, _cell, _repair, _paths])
def test_results_of_pairs(made: Callable[..., Result], tiny: LanguageModel, id_pairs: Pairs, tmp_path: Path) -> None:
    check_result(made(tiny, id_pairs(9, 6)), tmp_path)


def test_results_of_tracing(words: LanguageModel, tmp_path: Path) -> None:
    facts = [FactPrompt(f"w2 w{i} w{i + 1} w4 w5", f"w{i} w{i + 1}") for i in (7, 12, 20)]
    for some in (facts, facts[:1]):
        check_result(causal_trace(words, some, draws=2), tmp_path)


def test_a_figure_names_the_command_that_is_running(tiny: LanguageModel, id_pairs: Pairs) -> None:
    grid = patch_grid(tiny, id_pairs(8, 6))
    with recording("cutaway patch tiny"):
        assert grid.top(1)[0].effect.command == grid.best().command == "cutaway patch tiny"
    assert grid.best().command is None

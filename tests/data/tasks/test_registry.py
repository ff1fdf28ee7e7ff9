"""What subjects offer is found by name, and imported only when somebody asks."""

import subprocess
import sys

import pytest

from cutaway.artifacts.errors import CutawayError
from cutaway.data.tasks import registry
from cutaway.data.tasks.tasks import TASKS, Task


def test_tasks_of_subjects_come_first_and_are_found_by_name() -> None:
    names = [task.name for task in registry.all_tasks()]
    assert names[0] == "two-hop capitals"
    assert names[-len(TASKS) :] == [task.name for task in TASKS]
    assert registry.known_task("two hop").name == "two-hop capitals"
    assert registry.known_task("ioi").name == "indirect object"
    with pytest.raises(CutawayError, match="two-hop capitals"):
        registry.known_task("none such")


def test_a_subject_enters_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_WORLDS", dict(registry._WORLDS))
    registry.register_world(registry.SubjectWorld("toy", tasks=f"{__name__}:TOY_TASKS", text=f"{__name__}:toy_text"))
    assert registry.known_task("toy task") is TOY_TASKS[0]
    assert registry.world_text("toy", 3, "seed") == ["seed" * 3]
    assert registry.has_world("atlas")
    with pytest.raises(CutawayError, match="atlas, toy"):
        registry.world_text("gpt2", 3, "seed")


def test_no_subject_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, cutaway.data.tasks.registry; assert 'cutaway.subjects' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


TOY_TASKS = (Task("toy task", "?", "top1", lambda rng, lm, split: iter(())),)


def toy_text(characters: int, stream: str) -> list[str]:
    return [stream * characters]

"""`cutaway tasks`: which tasks can the model do at all, before anybody asks how it does them?"""

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from cutaway.artifacts.errors import CutawayError
from cutaway.cli.options import Count, DType, Flag, Output, Page, Seed, announce, keep_apart, opened
from cutaway.cli.output import deliver

if TYPE_CHECKING:
    from cutaway.causal.task_results import TaskResult
    from cutaway.data.tasks.tasks import Task
    from cutaway.data.tasks.wording import Split

_PAIR_FILES = (".json", ".jsonl", ".csv")


def tasks(
    model: str,
    /,
    *,
    task: list[str] | None = None,
    split: Literal["search", "held-out", "both"] = "both",
    n: Annotated[int, Parameter(validator=validators.Number(gte=2))] = 60,
    threshold: Annotated[float, Parameter(validator=validators.Number(gt=0, lte=1))] = 0.8,
    least: Count = 8,
    out: Output = None,
    dtype: DType = None,
    device: str | None = None,
    seed: Seed = 0,
    json: Flag = False,
    html: Page = None,
) -> None:
    """Try tasks on a model: how often it is right on both prompts of a pair, and the difference of the logits of right
    and wrong answer, with intervals. What it cannot do is listed with its score; pairs that its tokenizer cannot align
    are counted by reason.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    task
        A task's name (“indirect object”, “ioi”), or a .json file of clean, corrupt, answer and wrong, or a .jsonl or
        .csv file of BLiMP or EAP-IG; may be repeated. All known tasks if not given.
    split
        Wording to search with, wording kept for judging what was found, or both.
    n
        Pairs of each task and split.
    threshold
        The share of pairs a model must be right on to be able.
    least
        With fewer readable pairs than this a task is not judged.
    out
        Write the pairs of the one task to this .json file, to read or to change.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    seed
        Of the draw of pairs.
    json
        Print the figures as JSON on stdout, and nothing else.
    html
        Write a page with the figures to this file.
    """
    if out is not None and (task is None or len(task) != 1):
        raise CutawayError("--out takes the pairs of one task; name it with --task")
    file = task[0] if out is not None and task and task[0].endswith(_PAIR_FILES) else None
    keep_apart({"--out": out, "--html": html}, {"--task": file})

    announce(model)
    from cutaway.artifacts.command import current_command
    from cutaway.artifacts.progress import Progress
    from cutaway.causal.task_results import TaskResults, try_task
    from cutaway.data.tasks.files import refuse_other_pairs, write_pairs
    from cutaway.data.tasks.registry import all_tasks, known_task
    from cutaway.draw.page import page_html

    if out is not None:
        refuse_other_pairs(out)
    chosen = all_tasks() if task is None else tuple(known_task(name) for name in task)
    splits: dict[str, tuple[Split, ...]] = {
        "search": ("search",), "held-out": ("held_out",), "both": ("search", "held_out")
    }  # fmt: skip
    lm = opened(model, dtype=dtype, device=device)
    tried: list[TaskResult] = []
    asked: list[tuple[Task, Split]] = [(one, part) for one in chosen for part in splits[split]]
    with Progress("tasks", len(asked), unit="tasks") as progress:
        for one, part in asked:
            tried.append(try_task(lm, one, n=n, threshold=threshold, least=least, seed=seed, split=part))
            progress.advance(note=one.name)
    results = TaskResults(lm.name, tuple(tried), threshold)
    if out is not None:
        found = {result.split: result.pairs.pairs if result.pairs is not None else () for result in results}
        if not any(found.values()):
            raise CutawayError(f"there is nothing to write: {results[0].reason}")
        pairs, held_out = found.get("search", ()), found.get("held_out", ())
        write_pairs(out, pairs, name=chosen[0].name, held_out=held_out, replace=False)
    deliver(
        text=str(results),
        model=lm.name,
        figures={"tasks": results.to_json()},
        page=lambda: page_html(
            title=f"What {lm.name} can do",
            lead=f"{len(results.able)} of {len(results)} tasks (with wording to search with, and held-out wording) can "
            "be done.",
            sections=results.sections(),
            command=current_command(),
        ),
        as_json=json,
        html=html,
    )

"""Find and judge circuits of a model's tasks, and print them as the table of docs/circuits.md.

    PYTHONPATH=src python tools/atlas_circuits.py runs/circuits             # six tasks of atlas
    PYTHONPATH=src python tools/atlas_circuits.py runs/gpt2 --model FOLDER --task pronoun --task agreement

Each task leaves a circuit as JSON and a page; one that is there already is read and not computed again.
"""

import argparse
import re
import sys
from pathlib import Path

import cutaway
from cutaway.artifacts.command import recording
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import write_text
from cutaway.artifacts.results import Effect, interval_text
from cutaway.causal.circuits.circuit import Circuit, circuit_sections, lead
from cutaway.causal.circuits.discovery import Search, discover
from cutaway.causal.circuits.evidence import Evaluation
from cutaway.draw.page import page_html

TASKS = ("world indirect object", "world greater than", "induction", "world capitals", "two-hop capitals",
         "world refusal")  # fmt: skip
COLUMNS = (
    "task", "edges", "faithfulness, held out", "random circuits, up to", "strongest edges, up to", "complement",
    "overlap of resamples: edges (random)", "nodes (random)",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--task", action="append")
    parser.add_argument("--scorer", default="eap-ig")
    parser.add_argument("--metric", default="logit_difference")
    parser.add_argument("--faithfulness", type=float, default=0.95, help="to reach on the search pairs")
    parser.add_argument("--most", type=float, default=0.05, help="of the edges")
    parser.add_argument("--n", type=int, default=48)
    parser.add_argument("--deep", action="store_true", help="completeness, minimality and self-repair too")
    parser.add_argument("--force", action="store_true", help="also where the model cannot do the task")
    given = parser.parse_args()
    print(" | ".join(("", *COLUMNS, "")).strip())
    print("|---" * len(COLUMNS) + "|")
    failed = 0
    for task in given.task or TASKS:
        path = given.out / f"{re.sub(r'[^a-z0-9]+', '-', task.lower())}.json"
        try:
            circuit = Circuit.load(path) if path.exists() else _find(task, path, given)
        except CutawayError as error:
            print(f"| {task} | {error} |" + " |" * (len(COLUMNS) - 2), flush=True)
            failed += 1
            continue
        print("| " + " | ".join(row(circuit)) + " |", flush=True)
    return 1 if failed else 0


def _find(task: str, path: Path, given: argparse.Namespace) -> Circuit:
    words = [
        "cutaway", "circuit", given.model, "--task", f"'{task}'", "--faithfulness", f"{given.faithfulness:g}",
        "--scorer", given.scorer, "--metric", given.metric, "--n", str(given.n),
    ]  # fmt: skip
    command = " ".join([*words, *([] if given.deep else ["--quick"])])
    with recording(command):
        circuit = discover(
            cutaway.load(given.model), task, faithfulness=given.faithfulness,
            search=Search(given.scorer, metric=given.metric, max_share=given.most),
            evaluation=Evaluation(deep=given.deep), n=given.n, force=given.force,
        )  # fmt: skip
    circuit.save(path)
    page = page_html(
        title=f"Circuit: {circuit.task}", sections=circuit_sections(circuit), lead=lead(circuit), command=command
    )
    write_text(path.with_suffix(".html"), page)
    return circuit


def row(circuit: Circuit) -> list[str]:
    """One line of the table."""
    evidence = circuit.evidence
    assert evidence is not None
    found = evidence.faithfulness
    random, *others = found.controls
    strong = next(control for control in others if control.name.startswith("strongest"))
    mark = "" if evidence.above_controls() else " (not above its controls)"
    try:
        complement = f"{evidence.effect('faithfulness of the complement').value:.2f}"
    except CutawayError:
        complement = "–"
    overlaps = [
        evidence.effect(f"overlap of resampled circuits with one another, {what}") for what in ("edges", "nodes")
    ]
    return [
        circuit.task,
        f"{circuit.n_edges:,} ({100 * circuit.share:.1f} %)",
        f"{_with_interval(found)}{mark}",
        _upper(random.interval, random.value),
        _upper(strong.interval, strong.value),
        complement,
        *(f"{effect.value:.2f} ({effect.controls[0].value:.2f})" for effect in overlaps),
    ]


def _with_interval(effect: Effect) -> str:
    return f"{effect.value:.2f} {interval_text(effect.interval, 2)}"


def _upper(interval: tuple[float, float] | None, value: float) -> str:
    return f"{value if interval is None else interval[1]:.2f}".replace("-0.00", "0.00")


if __name__ == "__main__":
    sys.exit(main())

"""`cutaway circuit`: which edges of the model do a task, and how good is the evidence?"""

from pathlib import Path
from typing import Any, Literal

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import write_json
from cutaway.cli.options import (
    Count,
    DType,
    ExistingPath,
    Flag,
    MetricName,
    ModuleFile,
    Output,
    Page,
    Seed,
    announce,
    keep_apart,
    opened,
)
from cutaway.cli.output import deliver


def circuit(
    model: str | None = None,
    /,
    *,
    task: str | None = None,
    pairs: ExistingPath | None = None,
    held_out: ExistingPath | None = None,
    evaluate: ExistingPath | None = None,
    scorer: Literal["eap-ig", "eap", "relp", "clean-corrupted", "exact", "magnitude", "random"] = "eap-ig",
    steps: Count = 5,
    size: str | None = None,
    faithfulness: float | None = None,
    metric: MetricName | None = None,
    select: Literal["greedy", "top"] = "greedy",
    by: Literal["absolute", "signed"] = "absolute",
    ablation: Literal["resample", "zero", "mean", "mean_by_position", "mean_by_template"] | None = None,
    grouped: Flag = False,
    n: Count = 48,
    draws: Count = 20,
    resamples: Count = 100,
    quick: Flag = False,
    force: Flag = False,
    seed: Seed = 0,
    module: ModuleFile = None,
    dtype: DType = None,
    device: str | None = None,
    out: Output = None,
    json: Flag = False,
    html: Page = None,
) -> None:
    """Find the edges between parts of a model that do a task, and measure them on prompts they were not found on.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    task
        The name of a task, such as “indirect object”; it has prompts to search with and others to judge on.
    pairs
        Prompt pairs of your own instead: a JSON file of objects with clean, corrupt, answer and wrong.
    held_out
        The pairs to judge on; every second one of --pairs if not given (or those the file itself holds out).
    evaluate
        Measure the circuit of this file on the task's held-out prompts, or on all of --pairs, instead of finding one.
    scorer
        How edges are scored: eap-ig (integrated gradients), eap, relp, clean-corrupted, exact (a run per edge: slow).
    steps
        Of eap-ig.
    size
        At most so many edges (120), or such a share of the model's (5%), after pruning.
    faithfulness
        Find the smallest circuit that reaches this on the search pairs; 0.85 if neither this nor --size is given.
    metric
        What the circuit is to bring about; logit_difference if not given, with --evaluate the circuit's own.
    select
        greedy: grow the circuit from the logits; top: take the highest scores and prune.
    by
        Rank edges by absolute or by signed scores.
    ablation
        What edges outside the circuit carry: resample (the corrupt prompt) if not given; with --evaluate likewise.
    grouped
        Treat keys and values that heads share as one.
    n
        Pairs of each split that are drawn of a task.
    draws
        Random circuits of the same size to compare with.
    resamples
        Bootstrap draws of the pairs for the stability.
    quick
        Leave out completeness, minimality and self-repair.
    force
        Go on where the model cannot do the task.
    seed
        Of the pairs and of everything drawn at random.
    module
        Instead of the model, a model of your own: FILE.py:function, which returns a module, (module, description) or
        (module, description, tokenizer).
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    out
        Write the circuit with its evidence to this JSON file.
    json
        Print the circuit and the evidence as JSON on stdout, and nothing else.
    html
        Write a page with the drawing and the evidence to this file.
    """
    if (task is None) == (pairs is None):
        raise CutawayError("name what the circuit is for: --task NAME, or --pairs FILE (one of the two)")
    if size is not None and faithfulness is not None:
        raise CutawayError("--size and --faithfulness both say how large the circuit is: give one of them")
    if held_out is not None and pairs is None:
        raise CutawayError("--held-out goes with --pairs; a task has held-out prompts of its own")
    if evaluate is not None:
        finding = {
            "scorer": scorer != "eap-ig", "steps": steps != 5, "size": size is not None,
            "faithfulness": faithfulness is not None, "select": select != "greedy", "by": by != "absolute",
            "grouped": grouped, "resamples": resamples != 100,
        }  # fmt: skip
        for option in (name for name, given in finding.items() if given):
            raise CutawayError(f"--{option} says how a circuit is found; --evaluate takes one as it is: leave it out")
    if held_out is not None and evaluate is not None:
        raise CutawayError("with --evaluate all of --pairs are judged on; leave --held-out out")
    if faithfulness is not None and not 0 < faithfulness <= 1:
        raise CutawayError(f"--faithfulness {faithfulness:g}: give a share above 0 and up to 1")
    wanted = _size(size)
    keep_apart({"--out": out, "--html": html}, {"--pairs": pairs, "--held-out": held_out, "--evaluate": evaluate})
    if resamples < 100:
        raise CutawayError(f"--resamples {resamples}: stability takes 100 or more")
    announce(model, module)

    from cutaway.causal.circuits.circuit import Circuit, refuse_no_circuit
    from cutaway.data.tasks.registry import known_task

    if out is not None:
        refuse_no_circuit(out)
    if task is not None:
        known_task(task)
    known = None if evaluate is None else Circuit.load(evaluate)
    searched, judged = _read(pairs, held_out)

    from cutaway.causal.circuits.circuit import circuit_sections, lead
    from cutaway.causal.circuits.discovery import Search, discover, evaluate_circuit
    from cutaway.causal.circuits.evidence import Evaluation
    from cutaway.draw.page import page_html

    lm = opened(model, module, dtype=dtype, device=device)
    evaluation = Evaluation(draws=draws, resamples=resamples, deep=not quick)
    if known is not None:
        found = evaluate_circuit(
            lm, known, task or [*(searched or ()), *(judged or ())], metric=metric, ablation=ablation,
            evaluation=evaluation, n=n, seed=seed, force=force,
        )  # fmt: skip
    else:
        search = Search(
            scorer, {"steps": steps} if scorer == "eap-ig" else {}, metric or "logit_difference", select, by,
            ablation or "resample", grouped,
        )  # fmt: skip
        found = discover(
            lm, task or searched or [], judged, size=wanted, faithfulness=faithfulness, search=search,
            evaluation=evaluation, n=n, seed=seed, force=force,
        )  # fmt: skip
    if out is not None:
        write_json(out, found)

    def page() -> str:
        return page_html(
            title=f"Circuit: {found.task}",
            sections=circuit_sections(found),
            lead=lead(found),
            command=current_command(),
        )

    text = str(found) + ("" if out is None else f"\n\ncircuit: {out}")
    deliver(text=text, model=lm.name, figures=found, page=page, as_json=json, html=html)


def _size(size: str | None) -> int | float | None:
    """A number of edges, or a share of them."""
    if size is None:
        return None
    number, share = size.strip().removesuffix("%").strip(), size.strip().endswith("%")
    try:
        value = float(number) / 100 if share else int(number)
    except ValueError:
        raise CutawayError(f"--size {size}: give a number of edges (120) or a share of them (5%)") from None
    if not value > 0 or (share and value > 1):
        raise CutawayError(f"--size {size}: a circuit has at least 1 edge and at most 100% of them")
    return value


def _read(pairs: Path | None, held_out: Path | None) -> tuple[list[Any] | None, list[Any] | None]:
    """The pairs to search with and to judge on."""
    if pairs is None:
        return None, None
    from cutaway.data.tasks.files import read_distinct_pairs

    file = read_distinct_pairs(pairs)
    if held_out is not None:
        other = read_distinct_pairs(held_out)
        return [*file.pairs, *file.held_out], [*other.pairs, *other.held_out]
    return list(file.pairs), list(file.held_out) or None

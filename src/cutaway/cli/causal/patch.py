"""`cutaway patch`: which part, at which token, decides the answer?"""

from typing import TYPE_CHECKING, Any, Literal

from cutaway.artifacts.errors import CutawayError
from cutaway.cli.options import (
    Count,
    DType,
    ExistingPath,
    Flag,
    MetricName,
    ModuleFile,
    Page,
    Seed,
    announce,
    opened,
)
from cutaway.cli.output import deliver

if TYPE_CHECKING:
    from pathlib import Path

    from cutaway.data.pairs import AlignedPairs
    from cutaway.model.language_model import LanguageModel


def patch(
    model: str | None = None,
    /,
    *,
    task: str | None = None,
    pairs: ExistingPath | None = None,
    over: Literal["positions", "heads", "components", "neurons"] = "positions",
    site: str | None = None,
    role: list[str] | None = None,
    at: list[str] | None = None,
    by_token: Flag = False,
    layer: list[int] | None = None,
    head: list[int] | None = None,
    neuron: list[int] | None = None,
    direction: Literal["denoise", "noise"] = "denoise",
    ablation: Literal["resample", "zero", "mean", "mean_by_position", "mean_by_template", "noise"] = "resample",
    std: float = 3.0,
    metric: MetricName = "logit_difference",
    n: Count = 32,
    top: Count = 10,
    only_right: Flag = False,
    self_repair: Count | None = None,
    force: Flag = False,
    seed: Seed = 0,
    module: ModuleFile = None,
    dtype: DType = None,
    device: str | None = None,
    json: Flag = False,
    html: Page = None,
) -> None:
    """Activation patching: put one activation of one prompt into the run of another that differs in one respect, and
    see what share of the answer follows; every layer by position, head, component or neuron, beside a control.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    task
        A built-in task, such as “indirect object”, “agreement”, “two-hop capitals” (a wrong name lists them).
    pairs
        Instead of a task, a JSON file of your own: a list of objects with clean, corrupt, answer, wrong, and perhaps
        positions, answers, wrongs, template.
    over
        The columns: positions of the prompts, heads, components (attention and MLP outputs), or neurons (the largest
        of each layer by a first-order estimate, measured exactly).
    site
        What is patched, with {l} for the layer: blocks.{l}.resid_post over positions, blocks.{l}.attn.z over heads (or
        q, k, v, pattern), blocks.{l}.mlp.post over neurons if not given.
    role
        Over positions: a column by the role that the pairs name, such as “subject” or “last”; may be repeated. All
        roles if not given and the pairs are not equally long.
    at
        Over heads, components and neurons: patch at this role only; may be repeated, then at all of them together. At
        every token if not given.
    by_token
        Over positions: take the pairs of the commonest wording alone, so that the columns are its tokens.
    layer
        Only this layer; may be repeated.
    head
        Over heads, only this one; over positions, patch this head alone. May be repeated.
    neuron
        Over neurons, only this one; may be repeated.
    direction
        denoise: clean activations into the corrupt run (what suffices?); noise: out of the clean run (what is needed?).
    ablation
        With noise, what takes an activation's place; resample is the corrupt run's.
    std
        Of the ablation noise, in standard deviations of the site.
    metric
        What the effect is measured in.
    n
        How many pairs to take.
    top
        How many of the largest cells to show with their evidence.
    only_right
        Take only pairs that the model answers rightly, both prompts.
    self_repair
        Also knock out so many heads of the largest direct effect, and measure what the others make up for.
    force
        Go on where the model cannot do the task; nothing has a p-value then.
    seed
        Of the task's pairs, the controls and the noise.
    module
        Instead of the model, a model of your own: FILE.py:function, which returns a module, (module, description) or
        (module, description, tokenizer).
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print the figures as JSON on stdout, and nothing else.
    html
        Write a page with the heatmaps to this file.
    """
    if (task is None) == (pairs is None):
        raise CutawayError("name the prompt pairs: either --task NAME or --pairs FILE.json")
    if over != "positions" and (role or by_token):
        raise CutawayError(
            "--role and --by-token are columns over positions; over parts, --at says where they are patched"
        )
    if over == "positions" and (at or neuron):
        raise CutawayError("--at and --neuron go with --over heads, components or neurons; over positions name --role")
    if role and by_token:
        raise CutawayError("--role and --by-token both choose the columns: give one of them")
    announce(model, module)

    from cutaway.artifacts.command import current_command
    from cutaway.causal.ablations import Ablation
    from cutaway.causal.accuracy import task_accuracy
    from cutaway.causal.patching.grid import LEAST_PAIRS
    from cutaway.causal.patching.patch import Parts, PatchOptions, patch_grid
    from cutaway.causal.patching.self_repair import self_repair as measure_repair
    from cutaway.causal.patching.view import patch_sections, patch_text, reading, too_few
    from cutaway.data.tasks.registry import known_task
    from cutaway.draw.page import page_html

    if task is not None:
        known_task(task)
    choice = Ablation(ablation, std=std, seed=seed)
    lm = opened(model, module, dtype=dtype, device=device)
    aligned, criterion, about = _pairs(lm, task, pairs, n, seed, by_token)
    refused = aligned.refused
    accuracy = task_accuracy(lm, aligned, criterion=criterion)
    if only_right:
        chosen = accuracy.items.nonzero()[:, 0].tolist()
        if not chosen:
            raise CutawayError(f"{lm.name} answers none of the {len(aligned)} pairs rightly on both prompts")
        aligned, about = aligned[chosen], f"{len(chosen)} {about}, which the model answers rightly"
        asked = task_accuracy(lm, aligned, criterion=criterion)
    else:
        asked, about = accuracy, f"{len(aligned)} {about}"
    if len(aligned) < LEAST_PAIRS:
        raise CutawayError(too_few(len(aligned)))
    ragged = len(set(aligned.clean.lengths.tolist())) > 1
    columns = role or (list(aligned.places) if ragged and over == "positions" else None)
    grid = patch_grid(
        lm, aligned, over=over, site=site, roles=columns if over == "positions" else at,
        parts=Parts(layers=layer, heads=head, neurons=neuron, top=max(top, 8)), direction=direction, ablation=choice,
        metric=metric,
        options=PatchOptions(criterion=criterion, seed=seed, evaluation=about, accuracy=asked, force=force),
    )  # fmt: skip
    if grid.n - grid.dropped < LEAST_PAIRS:
        raise CutawayError(too_few(grid.n - grid.dropped))
    strongest = grid.top(top)
    best = [grid.best()]
    if grid.flips_more:
        best.append(grid.best(of="flips"))
    repair = None
    if self_repair is not None:
        ablated = choice if direction == "noise" else "resample"
        repair = measure_repair(lm, aligned, k=self_repair, ablation=ablated, seed=seed, evaluation=about)
    left_out = ""
    if refused:
        reasons = [reason for _, reason in refused]
        left_out = f"; {len(refused)} pairs do not align (mostly: {max(set(reasons), key=reasons.count)})"
    deliver(
        text=patch_text(grid, strongest, best, accuracy, left_out) + ("" if repair is None else f"\n\n{repair}"),
        model=lm.name,
        figures={
            "task_accuracy": accuracy.to_json(),
            "refused": [{"clean": pair.clean, "corrupt": pair.corrupt, "reason": reason} for pair, reason in refused],
            "reading": reading(grid),
            **grid.to_json(),
            "largest": [one.to_json() for one in strongest],
            "best": [effect.to_json() for effect in best],
            "self_repair": None if repair is None else repair.to_json(),
        },
        page=lambda: page_html(
            title=f"Activation patching of {lm.name}: {task or pairs}",
            lead=f"Which part of {lm.name} decides the answer? {about[0].upper()}{about[1:]}.",
            sections=patch_sections(grid, strongest, best, accuracy, aligned, repair),
            command=current_command(),
        ),
        as_json=json,
        html=html,
    )


def _pairs(
    lm: "LanguageModel", task: str | None, path: "Path | None", n: int, seed: int, one_wording: bool
) -> "tuple[AlignedPairs, Any, str]":
    """Up to n pairs, when one of them is right, and what they are in words."""
    from collections import Counter

    from cutaway.data.pairs import aligned
    from cutaway.data.tasks.files import read_distinct_pairs
    from cutaway.data.tasks.registry import known_task
    from cutaway.data.tasks.tasks import readable_pairs

    most = 8 * n if one_wording else n
    if path is not None:
        file = read_distinct_pairs(path)
        ready, criterion, about = aligned(lm, [*file.pairs, *file.held_out]), "preferred", f"pairs of {path.name}"
    else:
        chosen = known_task(str(task))
        ready, criterion = readable_pairs(lm, chosen, most, seed), chosen.criterion
        about = f"pairs of {chosen.name}, seed {seed}"
    rows = list(range(len(ready)))
    if one_wording:
        kinds = [(pair.template, int(p)) for pair, p in zip(ready.pairs, ready.clean.lengths, strict=True)]
        commonest = Counter(kinds).most_common(1)[0][0]
        rows, about = [row for row in rows if kinds[row] == commonest], f"{about}, of one wording"
    return ready[rows[:n]], criterion, about

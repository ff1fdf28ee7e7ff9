"""Which heads of atlas tell who receives it, and which heads tell those whom to look at: path patching on IOI.

    python tools/atlas_ioi_paths.py [N_PAIRS]

Pairs that atlas answers rightly on both prompts, of the task's held-out templates. First the path of every head at the
last token to the logits, and whether the strongest three raise the answer or lower the other name; then what reaches
these three through their queries, keys and values; then the paths of every earlier part of the model into the inputs
through which it does. Prints the figures of docs/causal.md.
"""

import random
import sys

from torch import Tensor

import cutaway
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.causal.accuracy import task_accuracy
from cutaway.causal.metrics import Targets
from cutaway.causal.paths.path_patching import all_senders, path_patch
from cutaway.data.tasks.tasks import readable_pairs, task
from cutaway.model.language_model import LanguageModel

CONTROLS = 8


def answer_logit(logits: Tensor, targets: Targets) -> Tensor:
    """The answer's logit above the mean of all."""
    return logits.gather(-1, targets.answer[:, None])[:, 0] - logits.mean(-1)


def other_logit(logits: Tensor, targets: Targets) -> Tensor:
    """The logit of the name that acts, above the mean of all."""
    return logits.gather(-1, targets.wrong[:, None])[:, 0] - logits.mean(-1)


def main(n: int = 40) -> None:
    """Measure and print."""
    lm = cutaway.load("atlas")
    drawn = readable_pairs(lm, task("indirect object"), 4 * n, seed=0, split="held_out")
    able = task_accuracy(lm, drawn)
    pairs = drawn[able.items.nonzero()[:n, 0].tolist()]
    print(f"{able}; {len(pairs)} of them traced\n")
    heads = all_senders(lm, mlps=False, embed=False)
    at_last = [f"{head}@last" for head in heads]
    movers: list[str] = []
    for mlps in ("recompute", "freeze"):
        grid = path_patch(lm, pairs, at_last, ["logits"], mlps=mlps)
        print(f"heads at the last token → logits, MLPs {mlps}")
        print(grid.heads("logits").mul(100).round().int().numpy(), "% of the difference, layer × head")
        _print(grid.strongest("logits", 6))
        if mlps == "recompute":
            movers = [effect.name.split("@")[0] for effect in grid.strongest("logits", 3)]
    for metric in (answer_logit, other_logit):
        grid = path_patch(lm, pairs, [f"{head}@last" for head in movers], ["logits"], metric=metric)
        print(f"{metric.__name__.replace('_', ' ')}: clean {grid.clean.mean():.2f}, corrupt {grid.corrupt.mean():.2f}")
        _print([grid.effect(sender, "logits") for sender in grid.senders])
    inputs = ("q@last", "k@S2", "v@S2")
    everything = _before(lm, movers)
    split = path_patch(lm, pairs, [everything], [[f"{head}.{part}" for head in movers] for part in inputs])
    print(f"all that is written before L{_layer(movers)} → queries, keys, values of {', '.join(movers)}")
    _print([split.effect(split.senders[0], part) for part in split.receivers], "everything before")
    part = inputs[int(split.mean[0].abs().argmax())]
    rng, depth = random.Random(0), [_layer([head]) for head in movers]
    drawn = [
        [
            f"L{layer}H{head}.{part}"
            for layer, head in zip(depth, rng.sample(range(lm.n_heads), len(depth)), strict=True)
        ]
        for _ in range(CONTROLS)
    ]
    drawn = [some for some in drawn if not {name.split(".")[0] for name in some} & {*movers}]
    others = path_patch(lm, pairs, [everything], drawn).values[0].mean(0)
    low, high = bootstrap_interval(others.numpy())
    print(
        f"  control: the same into {len(drawn)} random threes of heads of these layers, {part}: {others.mean():.3f} "
        f"({interval_text((low, high), to=True)})\n"
    )
    receiver = [f"{head}.{part}" for head in movers]
    role = part.partition("@")[2]
    grid = path_patch(lm, pairs, [f"{name}@{role}" for name in everything], [receiver])
    print(f"every part before at {role} → {grid.receivers[0]}")
    _print(grid.strongest(grid.receivers[0], 8))


def _layer(nodes: list[str]) -> int:
    return min(int(node[1:].split("H")[0]) for node in nodes)


def _before(lm: LanguageModel, nodes: list[str]) -> list[str]:
    """All that writes before the first layer of some heads."""
    names = all_senders(lm)
    return names[: names.index(f"L{_layer(nodes)}H0")]


def _print(effects: list[Effect], sender: str | None = None) -> None:
    for effect in effects:
        start, _, end = effect.name.partition(" → ")
        beside = "; ".join(f"{control.name} {_written(control)}" for control in effect.controls)
        print(f"  {sender or start} → {end:<30} {_written(effect)}, n {effect.n}" + f"; {beside}" * bool(beside))
    print()


def _written(one: Effect | Control) -> str:
    return f"{one.value:6.3f} ({interval_text(one.interval, to=True)})"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))

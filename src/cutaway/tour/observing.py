"""The tour's first steps, which only look: the self-test, the logit lens, the heads."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from cutaway.artifacts.command import recording
from cutaway.artifacts.results import Control, Effect
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.draw import blocks as page
from cutaway.model.selftest.result import SelfTest as ModelSelfTest
from cutaway.observe.heads.kinds import KindScores
from cutaway.observe.heads.labels import LABEL_RULE, induces
from cutaway.observe.heads.report import head_report, name
from cutaway.observe.heads.scores import repeated_scores
from cutaway.observe.heads.table import repetition
from cutaway.observe.lens.logit_lens import logit_lens
from cutaway.tour.context import LEAST_RIGHT, Tour


def card(tour: Tour, test: ModelSelfTest) -> page.Card:
    """What the model is."""
    lm = tour.lm
    identity = lm.identity()
    facts = [
        ("layers", lm.n_layers),
        ("width", lm.d_model),
        ("heads", lm.n_heads),
        ("key-value heads", lm.n_kv_heads),
        ("neurons a layer", lm.d_mlp),
        ("vocabulary", lm.d_vocab),
        ("architecture", re.sub("(ForCausalLM|LMHeadModel)$", "", lm.architecture)),
        ("number format", str(lm.dtype).removeprefix("torch.")),
    ]
    where = "shipped with cutaway" if tour.of_atlas else str(tour.model)
    return page.Card(
        name=lm.name,
        identity=f"{where}, weights sha256 {identity.weight_hash[:16]}",
        description=_DESCRIPTION if tour.of_atlas else "",
        facts=tuple(page.Fact(label=label, value=value) for label, value in facts),
        parameters=lm.n_parameters,
        context=lm.context_length,
        selftest=page.SelfTest(
            passed=sum(row.ok for row in test.checks),
            total=len(test.checks),
            detail=f"largest error {max(row.residual for row in test.checks):.1e} of the values' scale",
        ),
    )


_DESCRIPTION = (
    "A small model trained on a made world of facts, stories and chats, so that what it knows is known: a subject to "
    "practise on."
)


def selftest(tour: Tour, test: ModelSelfTest) -> page.Section:
    """Does the model add up the way the library reads it?"""
    names = list(dict.fromkeys(row.check for row in test.checks))
    rows = []
    for check in names:
        found = [row for row in test.checks if row.check == check]
        worst = max(found, key=lambda row: row.residual)
        rows.append((check, len(found), f"{worst.residual:.1e}", f"{worst.tolerance:.0e}", all(r.ok for r in found)))
    passed = sum(row.ok for row in test.checks)
    return page.Section(
        id="selftest",
        title="Self-test",
        question="Can the figures on this page be trusted?",
        lead=(
            "Before anything is shown, the model's parts are added up in every layer and compared with what the model "
            "computes, and each kind of edit is checked where it must show. Figures follow only if the sums come out."
            + "".join(f" {note}" for note in test.notes)
        ),
        blocks=(
            page.Figures(
                items=(
                    page.Figure(label="checks passed", value=f"{passed} of {len(test.checks)}", detail="every layer"),
                    page.Figure(
                        label="largest error",
                        value=f"{max(row.residual for row in test.checks):.1e}",
                        detail="relative to the scale of the values compared",
                    ),
                )
            ),
            page.Table(
                columns=("identity", "checked", "largest error", "allowed", "holds"),
                rows=tuple(rows),
                caption="δ is a random vector of the stream's size, added by an edit.",
                fold=f"All {len(rows)} identities, how often each was checked, and the largest error",
            ),
        ),
        command=tour.command("selftest"),
    )


def lens(tour: Tour) -> page.Section:
    """Where does the answer become readable?"""
    about: dict[str, Any] = {
        "id": "lens",
        "title": "Logit lens",
        "question": "Where does the answer appear?",
        "command": tour.command("lens"),
    }
    task = tour.gridded
    if task is None or task.pairs is None:
        lead = "The stream after each layer is read through the model's own unembedding."
        return page.Section(**about, lead=lead, status="not shown", note=tour.not_able())
    status, note = tour.chosen(task)
    pairs = task.pairs
    result = logit_lens(tour.lm, pairs.clean, targets=[int(i) for i in pairs.answer])
    other = logit_lens(tour.lm, pairs.clean, targets=[int(i) for i in pairs.wrong])
    layers = ["embed", *(f"after layer {i}" for i in range(tour.lm.n_layers))]
    right, wrong = (r.at_last(r.target_probability) for r in (result, other))
    intervals = [bootstrap_interval(p.numpy()) for p in right]
    shown = median_place(right[-1])
    example = result.to_json(shown)
    answer = tour.lm.token_strings([int(pairs.answer[shown])])[0]
    top1 = task.task.criterion == "top1"
    ahead = result.at_last(result.target_rank) < (1 if top1 else other.at_last(other.target_rank))
    on_top = ahead.float().mean(1).tolist()
    most = 0.5 if top1 else LEAST_RIGHT  # of two answers, half are ahead by chance
    first = next((i for i, share in enumerate(on_top) if share >= most), None)
    effect = Effect(
        name="probability of the right answer after the last layer",
        value=float(right[-1].mean()),
        n=len(pairs),
        interval=intervals[-1],
        controls=(
            Control("of the wrong answer", float(wrong[-1].mean()), bootstrap_interval(wrong[-1].numpy()), len(pairs)),
            Control("of the right answer before layer 0", float(right[0].mean()), intervals[0], len(pairs)),
        ),
        ablation="none",
        units="probability",
        command=about["command"],
    )
    return page.Section(
        **about,
        lead=(
            "The residual stream after each layer is read through the model's own final norm and unembedding, as if it "
            "stopped there. What is readable is not thereby used: the next steps intervene."
        ),
        status=status,  # type: ignore[arg-type]
        note=note,
        blocks=(
            page.Figures(
                items=(
                    page.Figure(
                        label="answer on top" if top1 else "right answer ahead of the wrong one",
                        value="never" if first is None else layers[first],
                        detail=f"first layer where it is, for {most:.0%} of the prompts",
                    ),
                    page.Figure(label="prompts", value=len(pairs), detail="same layout, each with its own answer"),
                )
            ),
            page.Lens(
                layers=tuple(layers),
                tokens=tuple(example["tokens"]),
                top=tuple(map(tuple, example["top"])),
                probability=tuple(map(tuple, example["probability"])),
                caption=(
                    "The median prompt by the probability of the right answer. Each cell has the most probable next "
                    f"token; the answer is `{answer.strip()}`."
                ),
            ),
            page.Line(
                series=(
                    page.Series(
                        name="right answer",
                        x=tuple(range(len(layers))),
                        y=tuple(float(p.mean()) for p in right),
                        low=tuple(low for low, _ in intervals),
                        high=tuple(high for _, high in intervals),
                    ),
                    page.Series(
                        name="wrong answer of the pair",
                        x=tuple(range(len(layers))),
                        y=tuple(float(p.mean()) for p in wrong),
                        control=True,
                    ),
                ),
                x_label="layers passed",
                y_label="probability at the last token",
                caption=f"Mean over {len(pairs)} prompts with a 95 % interval.",
            ),
        ),
        effects=(effect.to_json(),),
    )


def median_place(values: Tensor) -> int:
    """The place of the (lower) median of `values` [n]: the sample that a mean over all of them speaks of."""
    return int(values.argsort(stable=True)[(len(values) - 1) // 2])


def heads(tour: Tour) -> page.Section:
    """Which heads look back, and which of them matter?"""
    command = tour.command("heads")
    lm = tour.lm
    top = min(3, max(1, lm.n_layers * lm.n_heads // 8))
    with recording(command):
        report = head_report(lm, top=top, draws=8, seed=tour.seed)
    scores = report.scores
    judged = repeated_scores(lm, scores.n, scores.length, tour.seed)
    foreseen = repetition(lm, scores.n, scores.length, tour.seed)
    repeated = next((t for t in tour.tried if t.task.name == "repeated tokens"), None)
    does = repeated is not None and repeated.able
    effects = [e for e in report.effects if e.ablation == "mean ablation"]
    grids = []
    for kind, what in (("previous", "the token before"), ("induction", "the token after the last time it stood here")):
        values = getattr(scores, kind)
        grids.append(
            page.Heatmap(
                rows=tuple(f"layer {i}" for i in range(lm.n_layers)),
                columns=tuple(f"head {i}" for i in range(lm.n_heads)),
                values=tuple(map(tuple, values.tolist())),
                caption=f"Mean attention to {what}, on repeated random tokens; those above their control are outlined.",
                units="share of attention",
                marks=tuple(judged[kind].heads()),
            )
        )
    rows = [
        (
            r.kind,
            name(r.head),
            bool(judged[r.kind].labelled()[r.head]),
            *(round(x, 3) for x in (r.score, r.zero, r.mean)),
        )
        for r in report.heads
    ]
    note = "A pattern is not a cause: the table and the effects say what is lost without the heads."
    if not does:
        right = repeated.accuracy if repeated is not None else None
        count = f"right on {right.right} of {right.n} repeated sequences" if right is not None else "not measured"
        note = (
            f"Induction is weak in this model ({count}; loss {scores.first_loss:.2f} on the first copy, "
            f"{scores.second_loss:.2f} on the second), so its induction scores say little. {note}"
        )
    return page.Section(
        id="heads",
        title="Attention heads",
        question="Which heads look back, and which of them matter?",
        lead=(
            "On random tokens that come twice, a previous-token head attends one step back and an induction head to "
            "what followed last time. The heads are then replaced by their mean, beside as many random heads."
        ),
        status="shown" if does else "fallback",
        note=note,
        blocks=(
            page.Figures(
                items=(
                    _strongest("induction", judged["induction"], induces(foreseen)),
                    _strongest("previous-token", judged["previous"]),
                    page.Figure(
                        label="loss on the second copy",
                        value=round(scores.second_loss, 3),
                        units="nats",
                        detail=f"{scores.first_loss:.2f} on the first",
                    ),
                )
            ),
            *grids,
            *(page.EffectBlock(effect=effect.to_json()) for effect in effects),
            page.Table(
                columns=("score", "head", "above its control", "value", "Δ loss at zero", "Δ loss at mean"),
                rows=tuple(rows),
                caption=f"Each head ablated alone: rise of the loss on the second copy, in nats. {LABEL_RULE}",
            ),
        ),
        effects=tuple(effect.to_json() for effect in report.effects if effect not in effects),
        command=command,
    )


def _strongest(kind: str, scores: KindScores, does: bool = True) -> page.Figure:
    """The strongest head of a kind by the rule of `cutaway heads`: none where no head carries the label, and no
    induction head where the model does not foresee repeated tokens.
    """
    label = f"strongest {kind} head"
    heads, top = scores.heads(), scores.top(1)
    if heads and does:
        return page.Figure(label=label, value=name(heads[0]), detail=f"score {scores.score[heads[0]]:.2f}")
    if not top:
        return page.Figure(label=label, value="none", detail="no head has such a score")
    head = heads[0] if heads else top[0][0]
    found = "the pattern" if heads else "largest score"
    why = "repeated tokens are not foreseen" if heads else "not above its control"
    return page.Figure(label=label, value="none", detail=f"{found}: {name(head)} {scores.score[head]:.2f}, {why}")

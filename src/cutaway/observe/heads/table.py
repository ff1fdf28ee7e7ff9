"""Every head of a model, what it looks at, and what is lost without it: one call, one table.

A label says what a head's attention does on the data that the score is read on. It is given by a rule (`LABEL_RULE`),
and beside it stands what ablating that head alone costs, with other heads' ablation as control. Heads that stand in for
each other cost little alone and much together: `head_report` ablates groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from cutaway.artifacts.command import current_command, recording
from cutaway.artifacts.errors import CutawayError, NoSuchSite
from cutaway.artifacts.results import Control, Effect, interval_text
from cutaway.artifacts.statistics import bootstrap_interval
from cutaway.data.tasks.tasks import ordinary_tokens
from cutaway.draw.page import sections_html
from cutaway.draw.result import Result
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.heads.ablation import HeadEffects, ablate_each_head, text_loss
from cutaway.observe.heads.circuits import copying_scores
from cutaway.observe.heads.kinds import ON_TEXT, KindScores, attention_layers, meaning
from cutaway.observe.heads.report import Ablation, Head, RunMetric, losses, name, repeated_tokens, second_half_loss
from cutaway.observe.heads.scores import repeated_scores
from cutaway.observe.heads.targets import TARGETS, retrieval_scores
from cutaway.observe.heads.text import text_scores
from cutaway.observe.summaries import block, sentence, with_interval

LABEL_RULE = (
    "A head carries a label when the lower end of its score's 95 % interval is above the upper end of its control's, "
    "and the score is at least a tenth of its attention (0.05 of the logits it raises for induction-copying, 0.5 for "
    "positions and copying); on a text, a tenth above its control."
)
OF_REPETITION = ("previous", "duplicate", "induction", "induction-copying")
"""Kinds whose behaviour is the loss on the second copy; the others' is the loss on the user's text, if there is one."""
REPEATED, TEXT = "second copy", "text"
_ABLATED_ROWS, _ABLATED_TOKENS = 8, 64  # of a text that heads are scored on


@dataclass(frozen=True)
class LabelledHead:
    """One head and one kind: its score, and what ablating it alone changes, each with its controls."""

    kind: str
    """The kind of score."""
    head: Head
    """(layer, head)."""
    labelled: bool
    """Whether it carries the label."""
    score: Effect
    """The score beside its control."""
    effects: tuple[Effect, ...]
    """The change of the loss, one per ablation, beside the same ablation of heads without the label."""
    q: float = float("nan")
    """`KindScores.q` of the head."""

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "head": list(self.head),
            "labelled": self.labelled,
            "score": self.score.to_json(),
            "q": None if self.q != self.q else self.q,
            "effects": [effect.to_json() for effect in self.effects],
        }


@dataclass(frozen=True, eq=False, repr=False)
class HeadTable(Result):
    """Scores, labels and ablation effects of every head. `print` writes the table, `repr` what it says."""

    title: ClassVar[str] = "Attention heads"

    model: str
    """The model's name."""
    n_layers: int
    """L."""
    n_heads: int
    """H, per layer."""
    kinds: dict[str, KindScores]
    """The scores, by kind."""
    effects: dict[str, dict[str, HeadEffects]]
    """By behaviour and ablation: the change of the loss on the "second copy" of repeated random tokens and, where
    prompts were given, of the metric on the "text"."""
    repetition: Effect
    """Whether the model foresees repeated tokens at all."""
    skipped: dict[int, str]
    """Layers without attention patterns, and why."""
    command: str | None = field(default_factory=current_command)
    """The command line that measured it."""
    notes: tuple[str, ...] = ()
    """What else could not be measured."""
    random_loss: float = float("nan")
    """Mean loss on tokens drawn at random, in nats."""
    even_loss: float = float("nan")
    """Loss of an even guess, ln of the vocabulary, in nats."""

    def summary(self) -> str:
        """Labelled heads by kind, and what the scores say of induction."""
        lines = [f"heads of {self.model}: {self.n_layers} layers × {self.n_heads}"]
        for kind, scores in self.kinds.items():
            if heads := scores.heads():
                named = "  ".join(f"{name(head)} {scores.score[head].item():.2f}" for head in heads[:3])
                more = f"  and {len(heads) - 3} more" if len(heads) > 3 else ""
                lines.append(f"  {kind:<19}{named}{more}")
        verdict = sentence(next(iter(self.verdicts()), ""))
        return block([*lines[: 12 - len(verdict)], *verdict])

    def rows(self) -> list[dict[str, Any]]:
        """One row per kind and head: score and control with their intervals, p, q, and the label."""
        return [row for scores in self.kinds.values() for row in scores.rows()]

    def drawing(self) -> Markup:
        """The labelled heads as a table, and a map of the heads for each kind and each ablation."""
        from cutaway.observe.heads.view import table_sections

        return sections_html(table_sections(self))

    @property
    def on_text(self) -> bool:
        """Whether heads were scored on a text too."""
        return any(kind.endswith(ON_TEXT) for kind in self.kinds)

    def labels(self, head: Head) -> tuple[str, ...]:
        """The labels of a head, in the order of the kinds.

        Args:
            head: (layer, head).

        Raises:
            NoSuchSite: the model has no such head.
        """
        layer, index = head
        if not (0 <= layer < self.n_layers and 0 <= index < self.n_heads):
            raise NoSuchSite(f"{self.model} has no head {name(head)}; it has {self.n_layers} × {self.n_heads}")
        return tuple(kind for kind, scores in self.kinds.items() if bool(scores.labelled()[head]))

    def behaviour(self, kind: str) -> str | None:
        """The behaviour that heads of a kind are ablated for; None where nothing was ablated.

        Args:
            kind: the kind of score.
        """
        asked = REPEATED if kind in OF_REPETITION else TEXT
        return next((b for b in (asked, REPEATED) if b in self.effects), None)

    def of_kind(self, kind: str, top: int | None = None, *, labelled: bool = True) -> list[LabelledHead]:
        """A kind's heads, largest score first, each beside its ablation.

        The control of an ablation is the same ablation of every head without this label, one at a time.

        Args:
            kind: the kind of score.
            top: how many heads; all if None.
            labelled: whether only heads with the label are wanted.

        Raises:
            CutawayError: the table has no such kind.
        """
        if kind not in self.kinds:
            raise CutawayError(f"no score of this table is called {kind!r}; there are {', '.join(self.kinds)}")
        scores = self.kinds[kind]
        carries = scores.labelled()
        found = [head for head, _ in scores.top(carries.numel()) if bool(carries[head]) or not labelled]
        others = [divmod(i, self.n_heads) for i in (~carries).flatten().nonzero()[:, 0].tolist()]
        behaviour = self.behaviour(kind)
        measured = {} if behaviour is None else self.effects[behaviour]
        controls = [effects.others(others, f"heads without the label {kind}") for effects in measured.values()]
        with recording(self.command):
            return [
                LabelledHead(
                    kind,
                    head,
                    bool(carries[head]),
                    scores.effect(head),
                    tuple(
                        effects.effect(head, control)
                        for effects, control in zip(measured.values(), controls, strict=True)
                    ),
                    scores.q_of(head),
                )
                for head in found[:top]
            ]

    @property
    def induces(self) -> bool:
        """Whether the loss falls on repeated tokens by more than on fresh ones."""
        return induces(self.repetition)

    def verdicts(self) -> tuple[str, ...]:
        """What the table says in words: of induction, of each kind without a head, and of what was left out."""
        fall, control = self.repetition, self.repetition.controls[0]
        loss = (
            f"the loss on the second copy is {fall.value:.2f} nats {interval_text(fall.interval, 2)} below that on "
            f"fresh tokens in its place (control, fresh tokens beside the first half: {control.value:.2f})"
        )
        said = []
        heads = self.kinds["induction"].heads() if "induction" in self.kinds else None
        if heads is not None:
            named = ", ".join(name(head) for head in heads)
            if heads and self.induces:
                said.append(f"Induction: {named}; {loss}.")
            elif heads:
                said.append(f"Heads with an induction pattern ({named}), but no induction: {loss}.")
            elif self.induces:
                said.append(f"No head is above its control for induction, yet {loss}.")
            else:
                said.append(f"No induction: no head is above its control, and {loss}.")
        if (on := self.kinds.get("induction" + ON_TEXT)) is not None and on.judged:
            named = ", ".join(f"{name(head)} {on.score[head].item():.2f}" for head in on.heads())
            said.append(f"On the text, an induction pattern: {named or 'no head above its control'}.")
        induction = ("induction", "induction" + ON_TEXT)
        empty = [k for k, scores in self.kinds.items() if k not in induction and scores.judged and not scores.heads()]
        if empty:
            said.append(f"No head is labelled: {', '.join(empty)}.")
        said += self._off_distribution()
        for reason in dict.fromkeys(self.skipped.values()):
            layers = ", ".join(str(layer) for layer, why in self.skipped.items() if why == reason)
            said.append(f"Left out, layers {layers}: {reason}.")
        return (*said, *self.notes)

    def _off_distribution(self) -> list[str]:
        """A warning where the model is worse than an even guess on random tokens: it never saw anything like them."""
        if not self.random_loss > self.even_loss + 0.01:  # a model that is even has the two alike, but for rounding
            return []
        way = "" if self.on_text else "; --on TEXT (in Python on=) scores them on a text"
        return [
            f"Warning: the loss on random tokens is {self.random_loss:.2f} nats, above the {self.even_loss:.2f} of an "
            f"even guess over the vocabulary: they are far from what {self.model} was trained on, and heads that work "
            f"on text may not show there{way}."
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "layers": self.n_layers,
            "heads": self.n_heads,
            "rule": LABEL_RULE,
            "verdicts": list(self.verdicts()),
            "repetition": self.repetition.to_json(),
            "random_loss": self.random_loss,
            "even_loss": self.even_loss,
            "skipped": {str(layer): reason for layer, reason in self.skipped.items()},
            "kinds": {kind: scores.to_json() for kind, scores in self.kinds.items()},
            "effects": {
                behaviour: {ablation: effects.to_json() for ablation, effects in by.items()}
                for behaviour, by in self.effects.items()
            },
            "labelled": [row.to_json() for kind in self.kinds for row in self.of_kind(kind)],
        }

    def text(self, kinds: Sequence[str] | None = None, top: int = 5) -> str:
        """The table for a terminal: labelled heads of each kind, scores and effects beside their controls.

        Args:
            kinds: which kinds; all if None.
            top: how many heads per kind.
        """
        lines = [f"heads of {self.model}: {self.n_layers} layers × {self.n_heads}"]
        for kind in self.kinds if kinds is None else kinds:
            scores = self.kinds[kind]
            judged = scores.judged
            rows = self.of_kind(kind) if judged else self.of_kind(kind, top, labelled=False)
            behaviour = self.behaviour(kind)
            about = "" if behaviour is None else f"; ablated for the {behaviour}"
            about += f"; {scores.destinations:,} tokens of {scores.n} sequences" if kind.endswith(ON_TEXT) else ""
            about += "" if judged else "; one sequence, so no interval and no label"
            lines += ["", f"{kind}: {meaning(kind)}{about}"]
            if not rows:
                best = scores.top(1)
                closest = f" (highest: {name(best[0][0])} {best[0][1]:.2f})" if best else ""
                lines.append(f"  no head above its control{closest}")
                continue
            measured = [f"Δ {effect.ablation.removesuffix(' ablation')}" for effect in rows[0].effects]
            lines.append(
                f"  {'head':<7}{'score':<20}{'control':<22}{'q':<9}"
                + "".join(f"{m:<26}{'others':<8}" for m in measured)
            )
            for row in rows[:top]:
                control = row.score.controls[0]
                cells = f"  {name(row.head):<7}{with_interval(row.score.value, row.score.interval):<20}"
                cells += f"{with_interval(control.value, control.interval):<22}{q_text(row.q):<9}"
                for effect in row.effects:
                    cells += f"{with_interval(effect.value, effect.interval, 3):<26}{effect.controls[0].value:<8.3f}"
                lines.append(cells.rstrip())
            if len(rows) > top:
                lines.append(f"  and {len(rows) - top} more")
        units = {e.units for by in self.effects.values() for e in by.values()}
        lines += ["", *self.verdicts(), LABEL_RULE]
        lines.append(
            "q: of all heads whose score differs from its control as surely, the share that is expected to be chance."
        )
        if units:
            lines.append(
                f"Δ: rise in {' / '.join(sorted(units))} when that head alone is ablated; others: the mean of heads "
                "without the label."
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def q_text(q: float) -> str:
    """A q-value in a table: two digits, "–" where there is none."""
    return "–" if q != q else f"{q:.2g}"


def head_table(
    lm: LanguageModel,
    inputs: Inputs | None = None,
    metric: RunMetric = text_loss,
    *,
    needle: str | Tensor | Sequence[Sequence[int]] | None = None,
    on: Inputs | None = None,
    n: int = 8,
    length: int | None = None,
    ablations: Sequence[Ablation] = ("mean", "zero"),
    ablation_length: int = 24,
    seed: int = 0,
) -> HeadTable:
    """The taxonomy of a whole model: every head × every kind of score, labels, and what ablating each head costs.

    Scores are read on repeated random sequences (Olsson et al. 2022), copying on the weights; every head is then
    ablated alone, on other sequences, for the loss on the second copy.

    Args:
        lm: the model.
        inputs: prompts on which heads are ablated for `metric` too.
        metric: a run of these prompts to one number per row [b]; its attribute `units` says in what. By default the
            loss on the text.
        needle: adds the retrieval score on `inputs`: see `retrieval_scores`.
        on: prompts, or rows of token ids, to score heads on as well (`text_scores`; these kinds end in "(text)");
            without `inputs` the first 64 tokens of its first 8 rows stand for them.
        n: how many random sequences.
        length: tokens of one copy; 50, or what fits, if None.
        ablations: what stands in a head's place, () for no ablation.
        ablation_length: tokens of one copy of the sequences that heads are ablated on.
        seed: of the random tokens.

    Returns:
        Scores, labels and effects of every head.

    Raises:
        NotSupported: a model without attention patterns.
        CutawayError: a needle without inputs.

    Example:
        >>> table = head_table(cutaway.load("atlas"), n=4, length=24, ablation_length=10)  # doctest: +SKIP
        >>> table.labels((7, 3))  # doctest: +SKIP
        ('induction', 'induction-copying', 'copying')
    """
    if needle is not None and inputs is None:
        raise CutawayError("A needle needs prompts that hold it: give inputs too.")
    _, skipped = attention_layers(lm)
    kinds = repeated_scores(lm, n, length, seed)
    notes: list[str] = []
    try:
        kinds["copying"] = _copying(lm, seed)
    except CutawayError as error:  # latent attention: no matrix from the stream to the values
        notes.append(f"Copying is not measured: {error}")
    text = None if inputs is None else lm.tokens(inputs)
    if on is not None:
        scored = lm.tokens(on)
        kinds |= {scores.kind: scores for scores in text_scores(lm, scored).values()}
        if missing := [kind for kind in TARGETS if kind + ON_TEXT not in kinds]:
            notes.append(f"Nothing in the text to score by: {', '.join(missing)}.")
        if text is None:
            some = range(min(len(scored), _ABLATED_ROWS))
            text = lm.tokens([scored.row_ids(row)[:_ABLATED_TOKENS] for row in some])
    if needle is not None and text is not None:
        kinds["retrieval"] = retrieval_scores(lm, text, needle)
    effects: dict[str, dict[str, HeadEffects]] = {}
    t = (repeated_tokens(lm, 1, length).ids.shape[1] - 1) // 2
    if ablations:
        others = repeated_tokens(lm, n, min(ablation_length, t), seed + 1)
        effects[REPEATED] = ablate_each_head(lm, others, second_half_loss, ablations=ablations)
        if text is not None:
            effects[TEXT] = ablate_each_head(lm, text, metric, ablations=ablations, units=units_of(metric))
    foreseen = repetition(lm, n, t, seed)
    return HeadTable(
        lm.name, lm.n_layers, lm.n_heads, kinds, effects, foreseen, skipped, notes=tuple(notes),
        random_loss=random_loss(lm, n, t, seed), even_loss=math.log(lm.d_vocab),
    )  # fmt: skip


def units_of(metric: RunMetric) -> str:
    """What a metric says of its units."""
    return "nats of loss on the text" if metric is text_loss else getattr(metric, "units", "the metric")


def random_loss(lm: LanguageModel, n: int = 8, length: int | None = None, seed: int = 0) -> float:
    """Mean loss in nats on tokens drawn at random, none of them twice: the first copy of `repeated_tokens`.

    Args:
        lm: the model.
        n: how many random sequences.
        length: tokens of one copy; 50, or what fits, if None.
        seed: of the random tokens.
    """
    tokens = repeated_tokens(lm, n, length, seed)
    t = (tokens.ids.shape[1] - 1) // 2
    return float(losses(lm.run(tokens))[:, :t].mean())


def _copying(lm: LanguageModel, seed: int) -> KindScores:
    found = copying_scores(lm, seed=seed)
    low, high = (torch.full_like(found.score, end) for end in found.chance_interval)
    chance = torch.full_like(found.score, found.chance)
    return KindScores(
        "copying", found.score, found.score, found.score, chance, low, high, f"{found.draws} random heads",
        n=1, destinations=0, units="balance of eigenvalues", p=found.p,
    )  # fmt: skip


def induces(fall: Effect) -> bool:
    """Whether a `repetition` says that the loss falls on repeated tokens by more than on fresh ones."""
    control = fall.controls[0]
    high = control.value if control.interval is None else control.interval[1]
    return fall.interval is not None and fall.interval[0] > max(0.0, high)


def repetition(lm: LanguageModel, n: int = 8, length: int | None = None, seed: int = 0) -> Effect:
    """How far the loss on the second copy lies below the loss on fresh random tokens in its place, in nats.

    The control is how far those fresh tokens' loss lies below that of the tokens before them: what position and a
    longer context do without any repetition. A model without induction has the two alike.

    Args:
        lm: the model.
        n: how many random sequences.
        length: tokens of one copy; 50, or what fits, if None.
        seed: of the random tokens.
    """
    repeated = repeated_tokens(lm, n, length, seed)
    t = (repeated.ids.shape[1] - 1) // 2
    ordinary = torch.tensor(ordinary_tokens(lm))
    generator = torch.Generator().manual_seed(seed + 1)
    rows = []
    for row in repeated.ids.cpu():
        left = ordinary[~torch.isin(ordinary, row)]
        left = left if len(left) >= t else ordinary  # too small a vocabulary: some come again by chance
        rows.append(torch.cat([row[: t + 1], left[torch.randperm(len(left), generator=generator)[:t]]]).tolist())
    fresh: Tokens = lm.tokens(rows)
    second, control = losses(lm.run(repeated)), losses(lm.run(fresh))
    later = slice(t + 1, None)  # from the second token of the second half on
    fall = (control[:, later].mean(-1) - second[:, later].mean(-1)).double().numpy()
    before = (control[:, 1:t].mean(-1) - control[:, later].mean(-1)).double().numpy()
    return Effect(
        name="fall of the loss on the second copy",
        value=float(fall.mean()),
        n=n,
        interval=bootstrap_interval(fall),
        controls=(
            Control("fresh random tokens beside the first half", float(before.mean()), bootstrap_interval(before), n),
        ),
        ablation="none",
        units="nats",
    )

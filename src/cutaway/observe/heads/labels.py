"""Which heads carry a label, and what ablating each alone changes: the result of `head_table`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from markupsafe import Markup

from cutaway.artifacts.command import current_command, recording
from cutaway.artifacts.errors import CutawayError, NoSuchSite
from cutaway.artifacts.results import Effect, interval_text
from cutaway.draw.page import Section, sections_html
from cutaway.draw.panels import table_html
from cutaway.draw.result import Result
from cutaway.observe.heads.ablation import HeadEffects, effects_section
from cutaway.observe.heads.attention_view import AttentionView
from cutaway.observe.heads.circuit_results import Composition, composition_section
from cutaway.observe.heads.kinds import KindScores, kind_section
from cutaway.observe.heads.maps import ON_TEXT, meaning
from cutaway.observe.heads.report import Head, name
from cutaway.observe.summaries import block, sentence

LABEL_RULE = (
    "A head carries a label when the lower end of its score's 95 % interval is above the upper end of its control's, "
    "and the score is at least a tenth of its attention (0.05 of the logits it raises for induction-copying, 0.5 for "
    "positions and copying); on a text, a tenth above its control."
)


_OF_REPETITION = ("previous", "duplicate", "induction", "induction-copying")
"""Kinds whose behaviour is the loss on the second copy; the others' is the loss on the user's text, if there is one."""
REPEATED, TEXT = "second copy", "text"


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
        asked = REPEATED if kind in _OF_REPETITION else TEXT
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
                cells = f"  {name(row.head):<7}{row.score.figure(2):<20}"
                cells += f"{control.figure(2):<22}{_q_text(row.q):<9}"
                for effect in row.effects:
                    cells += f"{effect.figure(3):<26}{effect.controls[0].value:<8.3f}"
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


def _q_text(q: float) -> str:
    """A q-value in a table: two digits, "–" where there is none."""
    return "–" if q != q else f"{q:.2g}"


def table_sections(
    table: HeadTable,
    kinds: Sequence[str] | None = None,
    top: int = 5,
    view: AttentionView | None = None,
    composed: Composition | None = None,
) -> list[Section]:
    """The labelled heads as a table, a map for each kind and each ablation, and what else was looked at."""
    kinds = list(table.kinds) if kinds is None else kinds
    sections = [
        (
            "Labelled heads",
            f"{' '.join(table.verdicts())} {LABEL_RULE} Δ is the rise of the loss in nats without that head alone: on "
            "the second copy for kinds of repetition, else on the prompt where there is one. Other heads: the same "
            "ablation of each head without the label. A pattern is not a cause, and heads that stand in for each other "
            "cost little alone.",
            _labelled(table, kinds, top),
        )
    ]
    if view is not None:
        strongest = (found[0].head for kind in ("induction", "previous") if (found := table.of_kind(kind, 1)))
        first = next(strongest, view.start)
        shown = replace(view, start=first if first in view.heads else view.start)
        sections.append(("Attention", "Choose a head below; point at a token.", shown.html()))
    sections += [kind_section(table.kinds[kind]) for kind in kinds]
    changes = [effects for by in table.effects.values() for effects in by.values()]
    for behaviour, by in table.effects.items():
        for effects in by.values():
            same = [other for other in changes if other.units == effects.units]
            sections.append(effects_section(effects, behaviour, same))
    if composed is not None:
        sections.append(composition_section(composed))
    return sections


def lead(table: HeadTable) -> str:
    """What was read on what, in a sentence."""
    sequences = next((scores.n for kind, scores in table.kinds.items() if kind.endswith(ON_TEXT)), None)
    on_text = "" if sequences is None else f", and on {sequences} sequence{'s' if sequences > 1 else ''} of text"
    return (
        f"{table.model}: {table.n_layers} layers of {table.n_heads} heads, read on {table.repetition.n} random "
        f"sequences that come twice{on_text}."
    )


def _labelled(table: HeadTable, kinds: Sequence[str], top: int) -> Markup:
    """Scores beside their controls, and ablations beside theirs."""
    found = [row for kind in kinds for row in table.of_kind(kind, top)]
    if not found:
        return Markup("<p>No head is above its control.</p>")
    columns = ["kind", "head", "score", "its control", "q"]
    for effect in found[0].effects:
        columns += [f"Δ {effect.ablation.removesuffix(' ablation')}", "other heads"]
    cells = []
    for row in found:
        control = row.score.controls[0]
        line = [row.kind, name(row.head)]
        line += [row.score.figure(2), control.figure(2)]
        line += [_q_text(row.q)]
        for effect in row.effects:
            others = effect.require_controls().controls[0]
            line += [effect.figure(3), f"{others.value:.3f}"]
        cells.append(line)
    return table_html(columns=columns, rows=cells, title="Labelled heads", align=["left"] * len(columns))


def induces(fall: Effect) -> bool:
    """Whether a `repetition` says that the loss falls on repeated tokens by more than on fresh ones."""
    control = fall.controls[0]
    high = control.value if control.interval is None else control.interval[1]
    return fall.interval is not None and fall.interval[0] > max(0.0, high)

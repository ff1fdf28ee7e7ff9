"""A model behind the live page: texts and clicks in, plain data out. Nothing is kept between two requests."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cutaway import __version__
from cutaway.artifacts.errors import CutawayError, NotSupported, TooLarge
from cutaway.draw.text import visible
from cutaway.model.edits import edits as library
from cutaway.model.edits.edit import Receipt
from cutaway.model.edits.edits import Edit
from cutaway.model.language_model import LanguageModel
from cutaway.model.naming import single_token
from cutaway.model.sweep.memory import out_of_memory
from cutaway.model.tokens import Tokens
from cutaway.observe.attribution.attribution import attribute
from cutaway.observe.attribution.results import Attribution
from cutaway.observe.heads.attention_view import attention_view
from cutaway.observe.lens.logit_lens import logit_lens
from cutaway.serve.python import program
from cutaway.serve.wire import (
    MOST_TOKENS,
    Answer,
    Chance,
    Change,
    Example,
    Lens,
    Look,
    ModelCard,
    Outcome,
    Parts,
    Pattern,
    Question,
    Reading,
    Shift,
    Touched,
    Trial,
    Word,
)

DRAWS = 8
"""How often noise is drawn for the control."""
_TOP = 5
_OF_ATLAS = [
    ("The capital of the state containing Dallas is", "The capital of the state containing Oakland is"),
    (
        "Mary and John went to the store. John gave a book to",
        "Mary and John went to the store. Mary gave a book to",
    ),
    ("The opposite of hot is", "The opposite of big is"),
]
_OF_OTHERS = [("The Eiffel Tower is in the city of", "The Colosseum is in the city of")]


class LiveModel:
    """A model that several tabs ask at once: one runs at a time, and none leaves anything behind.

    Attributes:
        lm: the model.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._lock = threading.Lock()

    def card(self) -> ModelCard:
        """What the model is, and texts to begin with."""
        lm = self.lm
        return ModelCard(
            name=lm.name,
            architecture=lm.architecture,
            layers=lm.n_layers,
            heads=lm.n_heads,
            width=lm.d_model,
            vocabulary=lm.d_vocab,
            parameters=lm.n_parameters,
            context=lm.context_length,
            dtype=str(lm.dtype).removeprefix("torch."),
            version=__version__,
            most_tokens=min(MOST_TOKENS, lm.context_length),
            examples=[Example(text=a, other=b) for a, b in (_OF_ATLAS if lm.loaded_from == "atlas" else _OF_OTHERS)],
        )

    def read(self, question: Question) -> Reading:
        """Lens and attribution of a text.

        Args:
            question: the text, and what is asked about it.

        Raises:
            CutawayError: a text that is empty or too long, an answer that is not one token.
        """
        with self._alone():
            asked = _Asked(self.lm, question)
            tokens, other = asked.tokens, asked.other
            parts, why = None, ""
            try:
                parts = _parts(attribute(self.lm, tokens, asked.answer, asked.rival, by="head"), self.lm.n_heads)
            except NotSupported as error:
                why = str(error)
            return Reading(
                tokens=_words(self.lm, tokens.row_ids(0)),
                other_tokens=[] if other is None else _words(self.lm, other.row_ids(0)),
                aligned=asked.aligned,
                answer=_words(self.lm, [asked.answer])[0],
                rival=_words(self.lm, [asked.rival])[0],
                answers=_chances(self.lm, asked.logits),
                difference=asked.difference(asked.logits),
                lens=_lens(self.lm, tokens),
                parts=parts,
                why_no_parts=why,
            )

    def change(self, trial: Trial) -> Outcome:
        """The answer under edits, beside noise of the same size in the same places.

        Args:
            trial: the question and the edits.

        Raises:
            CutawayError: an edit that does not fit the model or the text.
        """
        with self._alone():
            lm, asked = self.lm, _Asked(self.lm, trial)
            edits = asked.edits(trial.changes)
            edited = lm.run(asked.tokens, edits=edits, logits="last")
            after = edited.last_logits[0]
            rows = Tokens.whole(asked.tokens.ids.expand(DRAWS, -1), lambda: asked.tokens.spelled * DRAWS)
            noise = [noise_like(receipt) for receipt in edited.receipts]
            controls = lm.run(rows, edits=noise, logits="last").last_logits
            chances = [asked.logits.softmax(-1), after.softmax(-1), controls.softmax(-1).mean(0)]
            ids = dict.fromkeys([asked.answer, asked.rival])
            for one in chances[:2]:
                ids |= dict.fromkeys(one.topk(min(_TOP, lm.d_vocab)).indices.tolist())
            named = zip(_words(lm, list(ids)), *(one[list(ids)].tolist() for one in chances), strict=True)
            drawn = [asked.difference(one) for one in controls]
            return Outcome(
                answers=[Answer(id=w.id, shown=w.shown, before=b, after=a, control=c) for w, b, a, c in named],
                difference=Shift(
                    before=asked.difference(asked.logits),
                    after=asked.difference(after),
                    control=sum(drawn) / DRAWS,
                    control_low=min(drawn),
                    control_high=max(drawn),
                    draws=DRAWS,
                ),
                lens=_lens(lm, asked.tokens, edits),
                touched=[
                    Touched(site=one.site, tokens=one.n_tokens, mean_abs_delta=one.mean_abs_delta)
                    for one in edited.receipts
                ],
                python=program(lm.loaded_from, trial, asked.origins),
            )

    def look(self, look: Look) -> Pattern:
        """Where one head looks, under the edits.

        Args:
            look: the question, the edits, the head.

        Raises:
            CutawayError: a layer without a pattern, a head that there is not.
        """
        with self._alone():
            asked, at, table = _Asked(self.lm, look), (look.layer, look.head), self.lm.sites()
            site = f"blocks.{look.layer}.attn.pattern"
            # the run ends at the pattern, and an edit that it does not reach would be refused
            reached = {one.name for one in itertools.takewhile(lambda one: one.name != site, table)} | {site}
            edits = asked.edits([change for change in look.changes if table.resolve(change.site) in reached])
            return Pattern(
                site=site,
                values=attention_view(self.lm, asked.tokens, heads=[at], edits=edits).pattern(at).tolist(),
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except Exception as error:
                if out_of_memory(error):
                    raise TooLarge("There is not enough memory for this text; give a shorter one.") from error
                raise


class _Asked:
    """A question in tokens: both texts, what is compared, and the logits of the unedited run."""

    def __init__(self, lm: LanguageModel, question: Question) -> None:
        self.lm = lm
        self.tokens = _read(lm, question.text, "text")
        self.other = _read(lm, question.other, "other text") if question.other.strip() else None
        self.logits = lm.run(self.tokens, logits="last").last_logits[0]
        ids = self.tokens.row_ids(0)
        none: list[int | None] = [None] * len(ids)
        self.aligned = none if self.other is None else counterparts(ids, self.other.row_ids(0))
        best = self.logits.topk(min(2, lm.d_vocab)).indices.tolist()
        self.answer = single_token(lm, question.answer, "answer", ids) if question.answer else best[0]
        self.rival = self._rival(question.rival, ids, best)

    def _rival(self, given: str, ids: Sequence[int], best: Sequence[int]) -> int:
        if given:
            return single_token(self.lm, given, "rival", ids)
        if self.other is not None:
            best = [int(self.lm.run(self.other, logits="last").last_logits[0].argmax()), *best]
        return next((i for i in best if i != self.answer), self.answer)

    def difference(self, logits: Tensor) -> float:
        """Logit of the answer minus that of the rival in logits [V]."""
        return float(logits[self.answer] - logits[self.rival])

    def origins(self, change: Change) -> tuple[list[int], list[int]]:
        """The positions that a patch changes, and those in the other text that it takes."""
        if self.other is None:
            raise CutawayError("There is nothing to patch from; give another text first.")
        positions = range(len(self.aligned)) if change.position is None else [self._place(change.position)]
        found = [(to, of) for to in positions if (of := self.aligned[to]) is not None]
        if not found:
            raise CutawayError(
                "This token has no counterpart in the other text; choose another, or two texts of equal length."
            )
        return [to for to, _ in found], [of for _, of in found]

    def _place(self, position: int) -> int:
        if position >= len(self.aligned):
            raise CutawayError(f"There is no token {position}; the text has {len(self.aligned)}, counted from 0.")
        return position

    def edits(self, changes: Sequence[Change]) -> list[Edit]:
        """The clicks as edits of the library."""
        table = self.lm.sites()
        sites = [table.resolve(change.site) for change in changes]

        def captured(tokens: Tokens | None, kinds: tuple[str, ...]) -> Callable[[str], Tensor]:
            wanted = {site for site, change in zip(sites, changes, strict=True) if change.kind in kinds}
            run = self.lm.run(tokens, capture=sorted(wanted), logits=None) if wanted and tokens is not None else None
            return lambda site: run[site] if run is not None else torch.empty(0)

        own, others = captured(self.tokens, ("mean", "cut")), captured(self.other, ("patch",))
        return [self._edit(change, site, own, others) for change, site in zip(changes, sites, strict=True)]

    def _edit(self, change: Change, site: str, own: Callable[[str], Tensor], others: Callable[[str], Tensor]) -> Edit:
        position = None if change.position is None else [self._place(change.position)]
        heads = None if change.head is None else [change.head]
        if heads is not None and not 0 <= heads[0] < self.lm.n_heads:
            raise CutawayError(f"There is no head {heads[0]}; {self.lm.name} has {self.lm.n_heads} in each layer.")
        if change.kind == "zero":
            return library.zero(site, positions=position, heads=heads)
        if change.kind == "patch":
            to, of = self.origins(change)
            return library.patch(site, others(site), positions=to, source_positions=of, heads=heads)
        if change.kind == "cut":
            if not site.endswith(".attn.pattern") or heads is None or position is None or change.key is None:
                raise CutawayError("A cut names a pattern, one head, one position and one key.")
            row = own(site)[0, heads[0], position[0]].clone()
            row[self._place(change.key)] = 0.0
            return library.set(site, row, positions=position, heads=heads)
        if site.endswith((".attn.pattern", ".attn.scores")) or len(self.aligned) < 2:
            raise CutawayError("A mean is over the values at this text's tokens but the first; choose another site.")
        value = own(site)[0, 1:].mean(0)
        return library.mean(site, value if heads is None else value[heads], positions=position, heads=heads)


def noise_like(receipt: Receipt) -> Edit:
    """Noise where an edit was, with its mean |Δ|, one draw per row: E|x| of a normal x is σ √(2/π)."""
    return library.noise(
        receipt.site,
        receipt.mean_abs_delta * math.sqrt(math.pi / 2),
        seed=range(DRAWS),
        positions=receipt.positions[0],
        heads=receipt.heads,
    )


def counterparts(ids: Sequence[int], others: Sequence[int]) -> list[int | None]:
    """For each token its position in another text: equal beginnings and ends, and what differs between them one by one;
    where that is not equally long, its last token alone has a counterpart.
    """
    most = min(len(ids), len(others))
    start = next((i for i in range(most) if ids[i] != others[i]), most)
    end = next((i for i in range(most - start) if ids[-1 - i] != others[-1 - i]), most - start)
    middle, other = len(ids) - start - end, len(others) - start - end
    inside: list[int | None] = [start + i if middle == other else None for i in range(middle)]
    if middle and other:
        inside[-1] = start + other - 1
    return [*range(start), *inside, *range(len(others) - end, len(others))]


def _read(lm: LanguageModel, text: str, what: str) -> Tokens:
    if not text:
        raise CutawayError(f"The {what} is empty; type one.")
    tokens = lm.tokens(text)
    if tokens.longest > MOST_TOKENS:
        raise TooLarge(
            f"The {what} has {tokens.longest} tokens, and this page shows at most {MOST_TOKENS}; shorten it."
        )
    return tokens


def _words(lm: LanguageModel, ids: Sequence[int]) -> list[Word]:
    return [Word(id=i, shown=visible(text)) for i, text in zip(ids, lm.token_strings(ids), strict=True)]


def _chances(lm: LanguageModel, logits: Tensor) -> list[Chance]:
    top = logits.softmax(-1).topk(min(_TOP, lm.d_vocab))
    words = _words(lm, top.indices.tolist())
    return [Chance(id=word.id, shown=word.shown, p=p) for word, p in zip(words, top.values.tolist(), strict=True)]


def _lens(lm: LanguageModel, tokens: Tokens, edits: Sequence[Edit] = ()) -> Lens:
    lens = logit_lens(lm, tokens, _TOP, edits=edits)
    words = {i: visible(text) for i, text in lens.words.items()}
    top = [
        [
            [Chance(id=i, shown=words[i], p=p) for i, p in zip(ids, chances, strict=True)]
            for ids, chances in zip(*layer, strict=True)
        ]
        for layer in zip(lens.top_ids[:, 0].tolist(), lens.top_probability[:, 0].tolist(), strict=True)
    ]
    return Lens(sites=["blocks.0.resid_pre" if name == "embed" else name for name in lens.layers], top=top)


def _parts(result: Attribution, n_heads: int) -> Parts:
    """Heads and MLPs layer by layer; attention whole where a layer's heads cannot be told apart."""
    found = [result.part(i) for i in range(result.values.shape[1])]
    by_layer: dict[int, dict[str, tuple[str, int | None, float, float]]] = {}
    for part in found:
        if part.layer is None or part.kind not in ("head", "attention", "MLP"):
            continue
        at = f"blocks.{part.layer}."
        column, site, head = {
            "head": (f"H{part.index}", "attn.z", part.index),
            "attention": ("attention", "attn.out", None),
            "MLP": ("MLP", "mlp.out", None),
        }[part.kind]
        by_layer.setdefault(part.layer, {})[column] = (at + site, head, part.value, part.control)
    names = {name for row in by_layer.values() for name in row}
    columns = [name for name in (*(f"H{i}" for i in range(n_heads)), "attention", "MLP") if name in names]
    rows = [[row.get(name, ("", None, 0.0, 0.0)) for name in columns] for _, row in sorted(by_layer.items())]
    shown = sum(value for row in rows for *_, value, _control in row)
    return Parts(
        columns=columns,
        sites=[[cell[0] for cell in row] for row in rows],
        heads=[[cell[1] for cell in row] for row in rows],
        values=[[cell[2] for cell in row] for row in rows],
        controls=[[cell[3] for cell in row] for row in rows],
        pairs=result.n_controls,
        rest=float(result.values[0].sum()) - shown,
        total=float(result.total[0]),
    )

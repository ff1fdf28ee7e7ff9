"""Wording from small grammars: rules in plain text, expanded, counted and searched without a parser library.

A rule is a list of alternatives. Inside one, ``[a|b|]`` chooses (alternatives may be empty and may nest), ``<rule>``
expands another rule, ``{slot}`` stays in the text for `str.format`. Grammars are finite: a rule may not reach itself.

    >>> grammar = Grammar({"start": ["<who> [sees|likes] {x}."], "who": ["She", "The cat"]})
    >>> grammar.count("start")
    4
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from random import Random
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|\x00")
_SLOT = re.compile(r"\{[^{}]*\}")
_SPACED = re.compile(r"[^\w'’\0]+|_+")


class Choice(NamedTuple):
    alternatives: tuple


class Reference(NamedTuple):
    rule: str


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, punctuation dropped; a ``{slot}`` is the single word ``"\\0"``."""
    return _WORD.findall(_SLOT.sub(" \0 ", text).lower())


def word_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """All runs of `n` words of a text that hold no slot."""
    words = words_of(text)
    return {run for run in zip(*(words[i:] for i in range(n)), strict=False) if "\0" not in run}


def _parse(text: str, position: int, nested: bool) -> tuple[Choice, int]:
    """Alternatives from `position` to the end, or to the closing bracket when `nested`."""
    alternatives: list[tuple] = []
    parts: list = []
    literal = ""

    def flush() -> None:
        nonlocal literal
        if literal:
            parts.append(literal)
        literal = ""

    while position < len(text):
        letter = text[position]
        if letter == "[":
            flush()
            choice, position = _parse(text, position + 1, nested=True)
            parts.append(choice)
        elif letter == "|" and nested:
            flush()
            alternatives.append(tuple(parts))
            parts = []
            position += 1
        elif letter == "]" and nested:
            flush()
            return Choice((*alternatives, tuple(parts))), position + 1
        elif letter == "<":
            flush()
            end = text.index(">", position)
            parts.append(Reference(text[position + 1 : end]))
            position = end + 1
        else:
            literal += letter
            position += 1
    if nested:
        raise ValueError(f"a bracket is not closed in {text!r}")
    flush()
    return Choice((*alternatives, tuple(parts))), position


class Grammar:
    """A finite set of rules.

    Raises `ValueError` for a bracket that is not closed, a rule that is absent or empty, or one that reaches itself.
    """

    def __init__(self, rules: Mapping[str, Sequence[str]]) -> None:
        self._rules: dict[str, Choice] = {}
        for name, alternatives in rules.items():
            if isinstance(alternatives, str) or not alternatives:
                raise ValueError(f"rule {name!r} must be a list of at least one alternative")
            self._rules[name] = Choice(tuple(_parse(text, 0, nested=False)[0].alternatives[0] for text in alternatives))
        self._counts: dict[str, int] = {}
        for name in self._rules:
            self.count(name)

    @property
    def rules(self) -> tuple[str, ...]:
        return tuple(self._rules)

    def _rule(self, name: str) -> Choice:
        if name not in self._rules:
            raise ValueError(f"no rule named {name!r}; there are {', '.join(self._rules)}")
        return self._rules[name]

    def count(self, rule: str) -> int:
        """How many ways a rule can be expanded (`distinct` when no two give the same text)."""
        if rule not in self._counts:
            self._counts[rule] = -1
            self._counts[rule] = self._count(self._rule(rule))
        if self._counts[rule] < 0:
            raise ValueError(f"rule {rule!r} reaches itself")
        return self._counts[rule]

    def _count(self, node) -> int:
        if isinstance(node, str):
            return 1
        if isinstance(node, Reference):
            return self.count(node.rule)
        if isinstance(node, Choice):
            return sum(self._count(alternative) for alternative in node.alternatives)
        total = 1
        for part in node:
            total *= self._count(part)
        return total

    def sample(self, rule: str, rng: Random) -> str:
        """One expansion; each choice is uniform over its alternatives (so not over whole expansions)."""
        out: list[str] = []
        self._sample(self._rule(rule), rng.random, out)
        return "".join(out)

    def _sample(self, choice: Choice, uniform, out: list[str]) -> None:
        alternatives = choice.alternatives
        for part in alternatives[int(uniform() * len(alternatives))]:
            if isinstance(part, str):
                out.append(part)
            else:
                self._sample(part if isinstance(part, Choice) else self._rules[part.rule], uniform, out)

    def expansions(self, rule: str) -> Iterator[str]:
        """Every expansion, in the order of the alternatives."""
        return self._expansions(self._rule(rule))

    def _expansions(self, node) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, Reference):
            yield from self._expansions(self._rules[node.rule])
        elif isinstance(node, Choice):
            for alternative in node.alternatives:
                yield from self._expansions(alternative)
        else:
            for parts in product(*(tuple(self._expansions(part)) for part in node)):
                yield "".join(parts)

    def word_ngrams(self, rule: str, n: int) -> set[tuple[str, ...]]:
        """All runs of `n` words outside slots in any expansion, without enumerating the expansions.

        Each part of a rule is summed up by its first and its last words, so two parts that follow each other cost the
        product of their distinct ends only. Exact, since parts of a context-free rule are chosen independently.
        """
        ends = _Ends(n)
        for text in frozenset().union(*self._ends(self._rule(rule), ends)):
            ends.add(text, 0, None)
        return ends.found

    def _ends(self, node, ends: _Ends) -> _Summary:
        if isinstance(node, str):
            return ends.of(node)
        if isinstance(node, Reference):
            if node.rule not in ends.rules:
                ends.rules[node.rule] = self._ends(self._rules[node.rule], ends)
            return ends.rules[node.rule]
        if isinstance(node, Choice):
            parts = [self._ends(alternative, ends) for alternative in node.alternatives]
            return _Summary(*(frozenset().union(*kind) for kind in zip(*parts, strict=True)))
        summary = ends.of("")
        for part in node:
            summary = ends.join(summary, self._ends(part, ends))
        return summary


class _Summary(NamedTuple):
    """A set of texts: short ones whole; of the others the first words (up to a slot) and the last (from a slot on)."""

    whole: frozenset[str]
    heads: frozenset[str]
    tails: frozenset[str]


class _Ends:
    """Summaries of texts, and the runs of words found on the way.

    A text's outermost pieces may be halves of words that a neighbour completes, so runs with them are counted only when
    the neighbour is known. Heads end, and tails begin, with a whole word or a slot.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.found: set[tuple[str, ...]] = set()
        self.rules: dict[str, _Summary] = {}

    def add(self, text: str, start: int, stop: int | None) -> None:
        """Count the runs in the pieces of a text from `start` to `stop`."""
        self.found |= word_ngrams(" ".join(text.split(" ")[start:stop]), self.n)

    def of(self, text: str) -> _Summary:
        return self._sum_up({_SPACED.sub(" ", _SLOT.sub(" \0 ", text).lower())})

    def _sum_up(self, texts: set[str]) -> _Summary:
        whole, heads, tails = set(), set(), set()
        for text in texts:
            if "\0" in text or len(text.split(" ")) > 2 * self.n:
                self.add(text, 1, -1)
                heads.add(self._cut(text.split(" "), False))
                tails.add(self._cut(text.split(" "), True))
            else:
                whole.add(text)
        return _Summary(frozenset(whole), frozenset(heads), frozenset(tails))

    def _cut(self, pieces: list[str], from_the_end: bool) -> str:
        """The outermost piece and `n` - 1 words beside it, or up to a slot, with a space where it was cut."""
        order = pieces[::-1] if from_the_end else pieces
        kept, n_words = [], 0
        for i, piece in enumerate(order):
            kept.append(piece)
            n_words += i > 0 and bool(_WORD.search(piece))
            if piece == "\0" or n_words == self.n - 1:
                break
        kept.append("")
        return " ".join(kept[::-1] if from_the_end else kept)

    def join(self, left: _Summary, right: _Summary) -> _Summary:
        """Summary of every text of `left` followed by every text of `right`."""
        short = self._sum_up({_SPACED.sub(" ", a + b) for a in left.whole for b in right.whole})
        before = {a + b for a in left.whole for b in right.heads}
        after = {a + b for a in left.tails for b in right.whole}
        for text in before:
            self.add(text, 1, None)
        for text in after:
            self.add(text, 0, -1)
        for text in {a + b for a in left.tails for b in right.heads}:
            self.add(text, 0, None)
        heads = {self._cut(text.split(" "), False) for text in before}
        tails = {self._cut(text.split(" "), True) for text in after}
        return _Summary(short.whole, short.heads | left.heads | heads, short.tails | right.tails | tails)

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

Node = "str | Choice | Reference | tuple"
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|\x00")
_SLOT = re.compile(r"\{[^{}]*\}")


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
        product of their ends only. Exact: parts of a context-free rule are chosen independently.
        """
        found: set[tuple[str, ...]] = set()
        ends = _Ends(n, found)
        for whole in self._ends(self._rule(rule), ends).whole:
            found |= word_ngrams(whole, n)
        return found

    def _ends(self, node, ends: _Ends) -> _Summary:
        if isinstance(node, str):
            return ends.of_text(node)
        if isinstance(node, Reference):
            if node.rule not in ends.rules:
                ends.rules[node.rule] = self._ends(self._rules[node.rule], ends)
            return ends.rules[node.rule]
        if isinstance(node, Choice):
            parts = [self._ends(alternative, ends) for alternative in node.alternatives]
            return _Summary(*(frozenset().union(*kind) for kind in zip(*parts, strict=True)))
        summary = ends.of_text("")
        for part in node:
            summary = ends.join(summary, self._ends(part, ends))
        return summary


class _Summary(NamedTuple):
    """A set of texts: short ones whole; of long ones the first and the last words."""

    whole: frozenset[str]
    heads: frozenset[str]
    tails: frozenset[str]


class _Ends:
    def __init__(self, n: int, found: set[tuple[str, ...]]) -> None:
        self.n, self.found = n, found
        self.rules: dict[str, _Summary] = {}

    def _sort(self, texts: set[str]) -> _Summary:
        whole, heads, tails = set(), set(), set()
        for text in texts:
            pieces = text.split(" ")
            # n + 1 pieces on each side: the outermost may be cut inside a word and still be completed by a neighbour.
            if len(pieces) <= 2 * (self.n + 1):
                whole.add(text)
            else:
                self.found |= word_ngrams(" ".join(pieces[1:-1]), self.n)
                heads.add(" ".join(pieces[: self.n + 1]))
                tails.add(" ".join(pieces[-self.n - 1 :]))
        return _Summary(frozenset(whole), frozenset(heads), frozenset(tails))

    def of_text(self, text: str) -> _Summary:
        return self._sort({text})

    def join(self, left: _Summary, right: _Summary) -> _Summary:
        """Summary of every text of `left` followed by every text of `right`."""
        whole = self._sort({a + b for a in left.whole for b in right.whole})
        before = {a + b for a in left.whole for b in right.heads}
        after = {a + b for a in left.tails for b in right.whole}
        for text in before | after | {a + b for a in left.tails for b in right.heads}:
            self.found |= word_ngrams(text.partition(" ")[2].rpartition(" ")[0], self.n)
        heads = {" ".join(text.split(" ")[: self.n + 1]) for text in before}
        tails = {" ".join(text.split(" ")[-self.n - 1 :]) for text in after}
        return _Summary(
            whole.whole, whole.heads | left.heads | frozenset(heads), whole.tails | right.tails | frozenset(tails)
        )

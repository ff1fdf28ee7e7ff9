"""What a probe is fitted on: one vector per example, read from the model at sites, with labels and groups.

A *position rule* says where each text is read:

    "last"         its last token
    "mean"         the mean over its tokens, a beginning-of-text left out (its norm dwarfs the others)
    "every"        every token is an example of its own; labels are a list per text, None where a token has no label
    "words"        each text is a list of words, and each word an example, read at its last token; labels are a list per
                   text, None where a word has no label
    "match:TEXT"   the last token of TEXT, at its last occurrence
    an int         counts from the first token, negative from the end
    a list         one int, or one text to match, for each text

A *group* is what must not stand on both sides of a fold: an entity, an author. Equal texts, and the tokens of one
text, are always in one group, whatever `groups` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from cutaway.artifacts.errors import CutawayError, NotSupported, TooLarge
from cutaway.artifacts.progress import Progress
from cutaway.model.forward.run import capture_bytes
from cutaway.model.language_model import Inputs, LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.probes.words import joined, sentences_of, word_examples, word_places

Position = str | int | Sequence[int] | Sequence[str]
"""A position rule: see the module."""
Label = str | int | float | bool | None
Texts = Inputs | Sequence[Sequence[str]]
"""Texts, rows of token ids, Tokens; lists of words with the position rule "words"."""
_MEMORY = 4 * 2**30
_BYTES_A_FORWARD = 1 << 27
_ROWS_A_FORWARD = 64


@dataclass(frozen=True, eq=False, repr=False)
class ProbeData:
    """Examples for a probe: n of them."""

    tokens: Tokens
    """The texts."""
    row: np.ndarray
    """The text of each example [n]."""
    at: np.ndarray
    """Its token position there [n]; -1: the mean over the text's tokens."""
    labels: np.ndarray
    """Class numbers into `classes`, or float64 targets where `classes` is None [n]."""
    classes: tuple[str, ...] | None
    """The classes, sorted; None for a regression."""
    groups: np.ndarray
    """Group numbers [n]: no group stands on both sides of a fold."""
    named_groups: bool
    """Whether the caller named the groups."""
    rule: str
    """The position rule, in words."""

    def __repr__(self) -> str:
        what = "numbers" if self.classes is None else ", ".join(f"{k} {n}" for k, n in self.balance().items())
        return f"ProbeData: {len(self)} examples in {self.n_groups} groups, position rule '{self.rule}' ({what})"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def regression(self) -> bool:
        return self.classes is None

    @property
    def n_groups(self) -> int:
        return int(self.groups.max()) + 1

    def only(self, examples: np.ndarray) -> ProbeData:
        """Some of the examples, by number; the texts stay as they are.

        Args:
            examples: Numbers of the examples, int [m].
        """
        chosen = {name: getattr(self, name)[examples] for name in ("row", "at", "labels", "groups")}
        return replace(self, **chosen)

    def balance(self) -> dict[str, int]:
        """Examples of each class; empty for regression."""
        return {name: int((self.labels == i).sum()) for i, name in enumerate(self.classes or ())}

    def token_ids(self) -> np.ndarray:
        """The token that each example is read at, int64 [n]; -1 where it is a mean."""
        ids = [self.tokens.row_ids(row) for row in range(len(self.tokens))]
        return np.array([ids[r][p] if p >= 0 else -1 for r, p in zip(self.row, self.at, strict=True)])


def probe_data(
    lm: LanguageModel,
    texts: Texts,
    labels: Sequence[Label] | Sequence[Sequence[Label]],
    *,
    position: Position = "last",
    groups: Sequence[str | int] | None = None,
    regression: bool | None = None,
    bos: bool | None = None,
) -> ProbeData:
    """Texts with a label each, as examples for a probe.

    Args:
        lm: the model whose tokens are read.
        texts: n texts, rows of token ids, or Tokens; lists of words with the position rule "words".
        labels: one per text; a list of one per token with "every", per word with "words" (None: no example). Numbers
            that are not whole, or more than 20 different whole numbers, are targets of a regression; anything else
            names classes, in sorted order (the last of two is the positive one).
        position: where each text is read: "last", "mean", "every", "words", "match:TEXT", a number from the start or
            (negative) the end, or one number or text to match per text.
        groups: one per text; what must not stand on both sides of a fold. Equal texts are always one group.
        regression: labels are numbers to predict (True) or names (False), whatever they look like.
        bos: whether a beginning-of-text token stands before each text; the tokenizer's own habit if None.

    Returns:
        The examples.

    Raises:
        CutawayError: numbers of texts, labels and groups that differ, a label that is missing or NaN, one class only, a
            position outside its text, labels that do not fit the tokens of a text (rule "every") or its words
            ("words").

    Example:
        >>> probe_data(cutaway.load("atlas"), ["Dallas is in", "Boston is in"], ["South", "North"])
        ProbeData: 2 examples in 2 groups, position rule 'last' (North 1, South 1)
    """
    sentences = sentences_of(texts) if position == "words" else None
    plain: Any = texts if sentences is None else joined(sentences)
    tokens = lm.tokens(plain, bos=bos)
    n = len(tokens)
    for what, given in (("labels", labels), ("groups", groups)):
        if given is not None and len(given) != n:
            raise CutawayError(f"There are {n} texts but {len(given)} {what}; give one for each text.")
    if sentences is None:
        row, at, flat, rule = _places(tokens, labels, position)
    else:
        row, at, flat = word_examples(lm, tokens, sentences, labels)
        rule = "words"
    if len(flat) == 0:
        raise CutawayError("There is no labelled token; give at least one label that is not None.")
    numbers, classes = label_classes(flat, regression)
    return ProbeData(
        tokens=tokens,
        row=row,
        at=at,
        labels=numbers,
        classes=classes,
        groups=_groups(tokens, groups)[row],
        named_groups=groups is not None,
        rule=rule,
    )


def _places(tokens: Tokens, labels: Sequence[Any], position: Position) -> tuple[np.ndarray, np.ndarray, list[Any], str]:
    """Text and position of each example, its label, and the rule in words."""
    n = len(tokens)
    lengths = tokens.lengths.tolist()
    rows = np.arange(n)
    if position == "every":
        where: list[tuple[int, int, Any]] = []
        for i, given in enumerate(labels):
            if isinstance(given, str) or not hasattr(given, "__len__") or len(given) != lengths[i]:
                raise CutawayError(
                    f"Position rule 'every' needs a list of {lengths[i]} labels for text {i}, one per token "
                    f"({'|'.join(tokens.strings[i])}); got {given!r}."
                )
            where += [(i, p, label) for p, label in enumerate(given) if label is not None]
        found = np.array([(i, p) for i, p, _ in where], dtype=np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1], [label for *_, label in where], "every"
    if position == "mean":
        return rows, np.full(n, -1), list(labels), "mean"
    rule = position if isinstance(position, str) else str(position) if isinstance(position, int) else "given"
    if position == "last":
        places: Sequence[int | str] = [-1] * n
    elif isinstance(position, str):
        kind, _, text = position.partition(":")
        if kind != "match" or not text:
            raise CutawayError(
                f"There is no position rule {position!r}; use 'last', 'mean', 'every', 'words', 'match:TEXT', a "
                "number, or one number or text for each text."
            )
        places = [text] * n
    elif isinstance(position, int):
        places = [position] * n
    else:
        places = list(position)
        if len(places) != n:
            raise CutawayError(f"There are {n} texts but {len(places)} positions; give one for each text.")
    columns = [tokens.find(i, p) if isinstance(p, str) else int(p) for i, p in enumerate(places)]
    at = []
    for i, place in enumerate(columns):
        column = tokens.column(i, place) - int(tokens.first[i])  # raises outside the text
        at.append(column)
    return rows, np.array(at), list(labels), rule


def label_classes(labels: list[Any], regression: bool | None) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels as numbers, and the classes that they number; None for a regression, which `regression` None decides."""
    for i, label in enumerate(labels):
        empty = label is None or (isinstance(label, str) and not label.strip())
        if empty or (isinstance(label, float) and not np.isfinite(label)):
            raise CutawayError(f"The label of example {i} is missing or not a number ({label!r}); give every one.")
    numbers = _as_numbers(labels)
    if regression is None:
        regression = numbers is not None and (
            bool((numbers % 1 != 0).any()) or (not _texts(labels) and len(np.unique(numbers)) > 20)
        )
    if regression:
        if numbers is None:
            raise CutawayError(f"A regression needs numbers as labels; {labels[0]!r} is none.")
        if np.ptp(numbers) == 0:
            raise CutawayError(f"Every label is {numbers[0]:g}; a probe needs targets that differ.")
        return numbers, None
    names = [_name(label) for label in labels]
    distinct = sorted(set(names), key=_order)
    if len(distinct) < 2:
        raise CutawayError(f"Every label is {distinct[0]!r}: a probe needs at least two classes to tell apart.")
    index = {name: i for i, name in enumerate(distinct)}
    return np.array([index[name] for name in names]), tuple(distinct)


def _texts(labels: list[Any]) -> bool:
    return any(isinstance(label, str) for label in labels)


def _as_numbers(labels: list[Any]) -> np.ndarray | None:
    try:
        return np.array([float(label) for label in labels])
    except (TypeError, ValueError):
        return None


def _name(label: Any) -> str:
    if isinstance(label, (bool, np.bool_)):
        return str(bool(label)).lower()
    if isinstance(label, (float, np.floating)) and float(label).is_integer():
        return str(int(label))
    return str(label)


def _order(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


def _groups(tokens: Tokens, groups: Sequence[Any] | None) -> np.ndarray:
    """Group number of each text: texts are joined that name one group or are equal, and those that these join."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(tokens)
    index: dict[Any, int] = {}
    edges: list[tuple[int, int]] = []
    for i in range(n):
        keys: list[Any] = [("text", tuple(tokens.row_ids(i)))]
        keys += [] if groups is None else [("group", str(groups[i]))]
        edges += [(i, n + index.setdefault(key, len(index))) for key in keys]
    left, right = np.array(edges).T
    size = n + len(index)
    graph = coo_matrix((np.ones(len(left)), (left, right)), shape=(size, size))
    return np.unique(connected_components(graph, directed=False)[1][:n], return_inverse=True)[1]


def site_width(lm: LanguageModel, site: str, head: int | None = None) -> int:
    """Numbers that a probe reads at one token of a site. Raises NotSupported where a site has no vector per token."""
    entry = lm.sites()[site]
    dims = entry.dims.split()
    if dims[:2] != ["b", "p"]:
        raise NotSupported(
            f"A probe reads one vector per token; '{entry.name}' is [{', '.join(dims)}]. Name a site such as "
            "'blocks.*.resid_post'."
        )
    sizes = [int(size) for size in entry.shape[2:]]
    if head is None:
        return int(np.prod(sizes))
    if len(sizes) < 2:
        raise CutawayError(f"'{entry.name}' has no heads; leave the head out.")
    if not 0 <= head < sizes[0]:
        raise CutawayError(f"'{entry.name}' has heads 0 to {sizes[0] - 1}; there is no head {head}.")
    return int(np.prod(sizes[1:]))


def _flat(value: Tensor, head: int | None) -> Tensor:
    """[b, p, ...] as [b, p, width], heads side by side or one of them."""
    return value.flatten(2) if head is None else value[:, :, head].flatten(2)


def read_site(
    lm: LanguageModel, texts: Texts, sites: str | Sequence[str], *, position: Position = "last", head: int | None = None
) -> dict[str, np.ndarray]:
    """What a probe would read of texts without labels: {site: float32 [examples, width]}. See `collect`.

    Args:
        lm: The model.
        texts: Texts, or for "words" sentences of words.
        sites: Sites or wildcards.
        position: Where each text is read, as of `probe_data`.
        head: One head, where a site has heads; None: all side by side.
    """
    if position == "words":
        sentences, rule = sentences_of(texts), "words"
        tokens = lm.tokens(joined(sentences))
        places = word_places(lm, tokens, sentences)
        row, at = np.repeat(np.arange(len(places)), [len(some) for some in places]), np.concatenate(places)
    else:
        tokens = lm.tokens(texts)  # type: ignore[arg-type]
        blank = [[0] * int(n) if position == "every" else 0 for n in tokens.lengths]
        row, at, _, rule = _places(tokens, blank, position)
    nothing = np.zeros(len(at))
    return collect(lm, ProbeData(tokens, row, at, nothing, None, nothing.astype(int), False, rule), sites, head=head)


def collect(
    lm: LanguageModel, data: ProbeData, sites: str | Sequence[str], *, head: int | None = None
) -> dict[str, np.ndarray]:
    """The examples' vectors at several sites in one pass over the texts: {site: float32 [n, width]}.

    Each forward stops after the last site. `head` picks one head where a site has heads; otherwise they stand side by
    side. Raises CutawayError for an unknown or absent site, one without a vector per token, activations that are not
    finite; TooLarge for more than 4 GiB.
    """
    names = lm.sites().expand_all(sites)
    widths = {name: site_width(lm, name, head) for name in names}
    needed = 4 * len(data) * sum(widths.values())
    if needed > _MEMORY:
        raise TooLarge(
            f"The probes' inputs would hold {needed / 2**30:.1f} GiB, above {_MEMORY / 2**30:.0f} GiB; name fewer "
            "sites or give fewer examples."
        )
    found = {name: np.empty((len(data), width), dtype=np.float32) for name, width in widths.items()}
    lengths = data.tokens.lengths.cpu().numpy()
    order = np.argsort(lengths, kind="stable")  # texts of like length together: less padding is run
    by_row: dict[int, list[int]] = {}
    for example, row in enumerate(data.row.tolist()):
        by_row.setdefault(row, []).append(example)
    with Progress("reading activations", len(data.tokens), unit="texts") as progress:
        start = 0
        while start < len(order):
            size = _rows_that_fit(lm, names, lengths[order], start)
            rows = order[start : start + size].tolist()
            part = lm.tokens([data.tokens.row_ids(row) for row in rows])
            run = lm.run(part, capture=names, logits=None)
            for name in names:
                value = _flat(run[name], head)
                for i, row in enumerate(rows):
                    if row in by_row:
                        found[name][by_row[row]] = _read(value[i], part, i, data.at[by_row[row]], lm.bos_id)
            start += size
            progress.advance(size)
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise CutawayError(f"'{name}' holds NaN or infinity on these texts, so no probe can be fitted there.")
    return found


def _rows_that_fit(lm: LanguageModel, names: list[str], lengths: np.ndarray, start: int) -> int:
    """How many of the sorted rows one forward takes: their captures stay within a bound, their lengths alike."""
    size = 1
    while start + size < len(lengths) and size < _ROWS_A_FORWARD:
        width = int(lengths[start + size])
        if capture_bytes(lm.sites(), names, size + 1, width, lm.dtype.itemsize) > _BYTES_A_FORWARD:
            break
        size += 1
    return size


def _read(value: Tensor, tokens: Tokens, row: int, at: np.ndarray, bos_id: int | None) -> np.ndarray:
    """One text's vectors [k, width] at the positions `at`."""
    real = value[tokens.mask[row]].float()
    if (at >= 0).all():
        return real[at].cpu().numpy()
    keep = tokens.ids[row][tokens.mask[row]] != (-1 if bos_id is None else bos_id)
    kept = real[keep.to(real.device)] if bool(keep.any()) else real
    return kept.double().mean(0).float().cpu().numpy()[None].repeat(len(at), 0)

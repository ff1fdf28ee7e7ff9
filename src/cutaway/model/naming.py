"""Which token a text names: the one that continues a prompt by exactly that text.

A token's text hangs on what stands before it. A tokenizer that puts a space before every text reads "y" alone as " y",
though the word "play" goes on with "y" after "pla". So a text is looked up behind its prompt, as the prompt's
continuation: the token `id` with decode(prompt + id) = decode(prompt) + text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import is_byte, named_token

_ANCHORS = ("\n", "a", ".", "1")
"""Texts before a token that has no prompt: the first whose end the tokenizer does not merge with it."""


def single_token(lm: LanguageModel, text: str | int, what: str = "answer", after: Sequence[int] | None = None) -> int:
    """The id of the one token that reads as a text.

    Args:
        lm: the model.
        text: the text, or an id: a number, or "#422"; the text "#422" is written "\\#422".
        what: what the errors call it.
        after: ids of the prompt behind which it stands. Default: inside a line.

    Returns:
        The id.

    Raises:
        CutawayError: a text that is no token there, several tokens (it says which), one of several equal tokens (it
            lists them), unknown to the tokenizer, or an id outside the vocabulary.

    Example:
        cutaway.model.single_token(lm, " Austin")
    """
    named = named_token(text) if isinstance(text, str) else int(text)
    if isinstance(named, int):
        if not 0 <= named < lm.d_vocab:
            raise CutawayError(f"The {what} {text} is no token id: they go from 0 to {lm.d_vocab - 1}.")
        return named
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise CutawayError(f"{lm.name} has no tokenizer: give the {what} as a token id, such as '#3'.")
    if not named:
        raise CutawayError(f"The {what} is empty; give a text that is one token, with its leading space if it has one.")
    if not named.isascii() and any("\ud800" <= character <= "\udfff" for character in named):
        raise CutawayError(f"The {what} {text!r} is not valid Unicode text; give it again.")
    read = continued(lm, named, after)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in (read or alone(tokenizer, named)) and named != tokenizer.unk_token:
        raise CutawayError(f"The {what} {text!r} is unknown to the tokenizer of {lm.name}; give a text that it knows.")
    if read is not None and len(read) == 1 and _reads(tokenizer, read[0], named, after):
        return read[0]
    found = matches(lm, named, after) or (read if read is not None and len(read) == 1 else [])
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"#{i} ({tokenizer.convert_ids_to_tokens(i)})" for i in found)
        raise CutawayError(f"The {what} {text!r} is any of {len(found)} tokens of {lm.name}: {listed}; give one's id.")
    ids = read or alone(tokenizer, named)
    pieces = ", ".join(f"{piece!r} ({i})" for piece, i in zip(lm.token_strings(ids), ids, strict=True))
    spaced = f" {named}"
    if len(continued(lm, spaced, after) or ()) == 1 or matches(lm, spaced, after):
        way_out = f"with a space before it, as inside a sentence, it is one: {spaced!r}"
    else:
        way_out = "give one of them, or a text that is one token (words inside a sentence begin with a space)"
    if len(ids) == 1:  # of the tokenizer's own reading, which is of another text
        raise CutawayError(f"The {what} {text!r} is no token of {lm.name} here, where {pieces} is read; {way_out}.")
    raise CutawayError(f"The {what} {text!r} is {len(ids)} tokens of {lm.name}: {pieces}; {way_out}.")


def answer_tokens(lm: LanguageModel, prompt: str, ids: Sequence[int], answer: str, read: Sequence[int]) -> list[int]:
    """The tokens of an answer behind a prompt, which is read as `ids`, where both together are read as `read`.

    One token where the answer is an id ("#422"), or where the tokenizer would merge prompt and answer and one token
    reads so all the same. Raises CutawayError when the answer does not follow the prompt as tokens of its own.
    """
    named = named_token(answer)
    if isinstance(named, int):
        return [single_token(lm, answer)]
    if list(read[: len(ids)]) == list(ids) and len(read) > len(ids):
        return list(read[len(ids) :])
    found = matches(lm, named, ids)
    if len(found) == 1:
        return found
    raise CutawayError(
        f"The answer {answer!r} does not follow {prompt!r} as tokens of its own; begin it with a space, and end the "
        "prompt at a word."
    )


def prompt_and(prompt: str, answer: str) -> str:
    """What to tokenise for `answer_tokens`: a prompt and its answer, or the prompt where the answer is an id."""
    named = named_token(answer)
    return prompt if isinstance(named, int) else f"{prompt}{named}"


def continued(lm: LanguageModel, text: str, after: Sequence[int] | None = None) -> list[int] | None:
    """A text as the tokenizer reads it behind some tokens; None where it would merge the two, or reads them otherwise.

    Without `after` it stands behind any text that leaves it whole.
    """
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    if after is None:
        befores = [(anchor, alone(tokenizer, anchor)) for anchor in _ANCHORS]
    else:
        own = [int(i) for i in after]
        bare = own[1:] if own and own[0] == lm.bos_id else own
        befores = [(_decoded(tokenizer, ids), ids) for ids in (bare, own) if ids]
    for before, ids in befores:
        whole = alone(tokenizer, f"{before}{text}")
        if len(whole) > len(ids) and whole[: len(ids)] == ids:
            return whole[len(ids) :]
    return None


def matches(lm: LanguageModel, text: str, after: Sequence[int] | None = None) -> list[int]:
    """Every id with decode(after + id) = decode(after) + text. A token that is a mere byte counts where no other does.

    Where a vocabulary spells without spaces, and its decoder puts them (words, WordPiece), the spelling counts too.
    """
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    likely = {*_by_text(tokenizer, lm.d_vocab)[text], *alone(tokenizer, text)}
    found = sorted(i for i in likely if _reads(tokenizer, i, text, after))
    named = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in found}
    whole = [i for i in found if not is_byte(named[i])]
    if found:
        return whole or found
    return [i for i in alone(tokenizer, text) if tokenizer.convert_ids_to_tokens(i) == text][:1]


def _reads(tokenizer: PreTrainedTokenizerBase, index: int, text: str, after: Sequence[int] | None) -> bool:
    """Whether decode(after + index) = decode(after) + text."""
    before = alone(tokenizer, "a") if after is None else [int(i) for i in after]
    return _decoded(tokenizer, [*before, index]) == _decoded(tokenizer, before) + text


def alone(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text as the tokenizer reads it by itself, without what it puts before every text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [int(i) for i in cast("list[int]", ids)]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


_texts: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()


def _by_text(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, list[int]]:
    """Ids by the text that they add behind another token, for the whole vocabulary; made once a tokenizer."""
    found = _texts.get(tokenizer)
    if found is None:
        found = defaultdict(list)
        before = alone(tokenizer, "a")
        said = _decoded(tokenizer, before)
        for i in range(min(size, len(tokenizer))):
            whole = _decoded(tokenizer, [*before, i])
            if whole.startswith(said):
                found[whole[len(said) :]].append(i)
        _texts[tokenizer] = found
    return found

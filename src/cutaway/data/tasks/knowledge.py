"""Pairs about what was said, and what is known: repeats, years, arguments of a function, capitals, refusals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cutaway.artifacts.errors import CutawayError
from cutaway.data.pairs import PromptPair
from cutaway.data.tasks.wording import Split, pair_from, task_wording

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel


def ordinary_tokens(lm: LanguageModel) -> list[int]:
    """Ids that are no special token, and that the model both reads and answers with, in order."""
    special = {i for i in (lm.bos_id, lm.pad_id) if i is not None}
    if lm.tokenizer is not None:
        special |= set(lm.tokenizer.all_special_ids)
        special |= {i for i, token in lm.tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in range(min(lm.d_vocab_in, lm.d_vocab)) if i not in special]


def repeated_tokens(rng: random.Random, lm: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """Induction: after `[BOS] A B .. A` comes B. The corrupt prompt has another token in B's first place.

    Every second ordinary token is in the pairs of the search, the others in the held-out ones.
    """
    ids, length = ordinary_tokens(lm)[split == "held_out" :: 2], 12
    start = () if lm.bos_id is None else (lm.bos_id,)
    if len(ids) <= length or lm.context_length < 2 * length + 1:
        raise CutawayError(f"{lm.name} has too few tokens or too short a context for a repeated sequence of {length}")
    while True:
        *row, other = rng.sample(ids, length + 1)
        at = rng.randrange(1, length - 1)
        changed = [*row[: at + 1], other, *row[at + 2 :]]
        again = row[: at + 1]
        places = {"before": len(start) + at, "target": len(start) + at + 1}
        yield PromptPair(
            (*start, *row, *again), (*start, *changed, *again), row[at + 1], other, places, template=f"repeat at {at}"
        )


def years_after(year: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two-digit years above `year`, and those up to it: what is right and wrong for the end of a span."""
    years = [f"{y:02d}" for y in range(100)]
    return tuple(years[year + 1 :]), tuple(years[: year + 1])


def greater_than_pair(
    template: str, noun: str, century: int, year: int, answer: int, wrong: int, **fillers: str
) -> PromptPair:
    """A span of years (Hanna et al. 2023) from a template with {noun}, {c} and {y}: every later year is right.

    The corrupt prompt begins in the year 01, after which nearly every year is right, so the pair is not symmetric.
    """
    answers, wrongs = years_after(year)
    fillers = {"noun": noun, "c": str(century), **fillers}
    return pair_from(
        template,
        {**fillers, "y": f"{year:02d}"},
        {**fillers, "y": "01"},
        f"{answer:02d}",
        f"{wrong:02d}",
        {"event": "noun", "century": ("c", 0), "year": "y"},
        answers=answers,
        wrongs=wrongs,
        symmetric=False,
    )


def greater_than(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A span ends after it began."""
    wording = task_wording("greater_than")
    while True:
        template, noun = rng.choice(wording[split]), rng.choice(wording[f"{split}_nouns"])
        year = rng.randint(3, 97)
        answer, wrong = rng.randint(year + 1, 99), rng.randint(2, year - 1)
        yield greater_than_pair(template, noun, rng.choice(wording["centuries"]), year, answer, wrong)


def docstring(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A docstring describes the arguments in the order in which the function names them.

    The corrupt prompt has the third and fourth argument exchanged.
    """
    wording = task_wording("docstring")
    while True:
        a, b, c, d = rng.sample(wording["arguments"], 4)
        x, y = rng.sample(wording["words"], 2)
        fillers = {"f": rng.choice(wording["functions"]), "text": rng.choice(wording["texts"])}
        fillers |= {"a": a, "b": b, "x": x, "y": y}
        template = rng.choice(wording[split])
        roles = {"second argument": ("b", 0), "third argument": "c", "fourth argument": "d", "described": "b"}
        yield pair_from(template, {**fillers, "c": c, "d": d}, {**fillers, "c": d, "d": c}, f" {c}", f" {d}", roles)


def capitals(rng: random.Random, _: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """The capital of a country; search and held-out pairs are about different countries."""
    wording = task_wording("capitals")
    while True:
        template, (here, there) = rng.choice(wording[split]), rng.sample(wording[f"{split}_countries"], 2)
        yield pair_from(
            template,
            {"country": here[0]},
            {"country": there[0]},
            f" {here[1]}",
            f" {there[1]}",
            {"country": "country"},
        )


def chat_prompt(lm: LanguageModel, question: str, system: str | None = None) -> str:
    """A question to the assistant through the model's chat template, up to where the answer begins.

    A beginning-of-text that the tokenizer adds by itself is taken away. Raises `CutawayError` without a template, or
    with one that refuses the messages (some know no system prompt).
    """
    if lm.tokenizer is None or getattr(lm.tokenizer, "chat_template", None) is None:
        raise CutawayError(f"{lm.name} has no chat template")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": question})
    try:
        text = str(lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # the template is the model's own program and may raise anything
        raise CutawayError(f"the chat template of {lm.name} refuses these messages: {error}") from error
    start = lm.tokenizer.bos_token
    added = lm.bos_id is not None and lm.tokens("a").row_ids(0)[0] == lm.bos_id
    return text.removeprefix(start) if isinstance(start, str) and added else text


def chat_wording(lm: LanguageModel, question: str, system: str | None = None) -> str:
    """`chat_prompt` of wording with slots; braces of the chat template's own are escaped."""
    text = chat_prompt(lm, "{question}", None if system is None else "{system}")
    escaped = text.replace("{", "{{").replace("}", "}}")
    return escaped.replace("{{question}}", question).replace("{{system}}", system or "")


def refusal(rng: random.Random, lm: LanguageModel, split: Split) -> Iterator[PromptPair]:
    """A harmful request is refused, a harmless one of the same form answered: the first word of the reply."""
    wording = task_wording("refusal")
    refusals, answers = tuple(wording["refusals"]), tuple(wording["answers"])
    while True:
        template, thing = rng.choice(wording[split]), rng.choice(wording["things"])
        harmful, harmless = rng.choice(wording[f"{split}_harmful"]), rng.choice(wording[f"{split}_harmless"])
        yield refusal_pair(
            lm, template, {"verb": harmful, "thing": thing}, {"verb": harmless, "thing": thing}, refusals, answers
        )


def refusal_pair(
    lm: LanguageModel,
    template: str,
    harmful: dict[str, str],
    harmless: dict[str, str],
    refusals: tuple[str, ...],
    answers: tuple[str, ...],
) -> PromptPair:
    """A harmful request as clean, a harmless one as corrupt prompt; right are the beginnings of refusals."""
    return pair_from(
        chat_wording(lm, template),
        harmful,
        harmless,
        refusals[0],
        answers[0],
        {slot: slot for slot in harmful},
        answers=refusals,
        wrongs=answers,
        name=template,
    )

"""Sentences of the classic tasks: indirect objects, greater-than, agreement, pronouns, sentiment, truth, and so on.

The same functions make the corpus and the items of evaluation: ``held_out=True`` draws what the corpus never shows,
``study=True`` only the study's wording (its weights can then be scored on what they were trained for).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import TypeVar

from cutaway.subjects.world import held_out as held
from cutaway.subjects.world.facts import (
    ANTONYMS,
    CITIES,
    COUNTRIES,
    LANDMARKS,
    STATES,
    TRANSLATIONS,
    names,
    read_toml,
    words,
)
from cutaway.subjects.world.grammar import Grammar
from cutaway.subjects.world.morphology import counted, plural, upper_first, with_article

T = TypeVar("T")


@dataclass(frozen=True)
class Sentence:
    """`prompt` + separator + `answer` + `tail`; `alternative` is the answer it would be wrong to give."""

    prompt: str
    answer: str
    alternative: str | None = None
    tail: str = "."
    separator: str = " "
    detail: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.prompt}{self.separator}{self.answer}{self.tail}"


def pick(rng: Random, options: Sequence[T]) -> T:
    """A uniform choice, cheaper than `Random.choice`."""
    return options[int(rng.random() * len(options))]


@cache
def wording(task: str, *lists: str) -> tuple[str, ...]:
    """All expansions of the named lists of `data/tasks.toml`, in order, without repeats."""
    table = read_toml("tasks.toml")[task]
    rules = {name: table[name] for name in lists}
    grammar = Grammar(rules)
    return tuple(dict.fromkeys(text for name in lists for text in grammar.expansions(name)))


def _study_or_grown(rng: Random, study: bool, task: str, own: str, grown: str) -> str:
    """A frame of the study (always when `study`, else two times in five) or a grown one."""
    return pick(rng, wording(task, own if study or rng.random() < 0.4 else grown))


def _split_at_answer(frame: str, **slots: str) -> tuple[str, str]:
    """What stands before and after ``{answer}`` in a filled frame, the space before it dropped."""
    before, after = frame.split("{answer}", 1)
    return upper_first(before.format(**slots)).rstrip(), after.format(**slots)


def pair(rng: Random, held_out: bool = False) -> tuple[str, str]:
    """Two first names that the corpus may (or, when `held_out`, may not) put into one sentence."""
    while True:
        first, second = pick(rng, names()), pick(rng, names())
        if first != second and held.name_pair(first, second) == held_out:
            return first, second


# -- indirect objects


@cache
def _ioi_lists(study: bool) -> dict[str, tuple[str, ...]]:
    table = read_toml("tasks.toml")["ioi"]
    kinds = ("subordinate", "adverbial", "meetings", "givings", "objects", "gift_endings", "other_endings")
    kinds += ("companions", "settings", "links", "tails")
    return {k: tuple(table[f"study_{k}"]) + (() if study else tuple(table[k])) for k in kinds}


def ioi(rng: Random, held_out: bool = False, study: bool = False) -> Sentence:
    """A sentence whose last word is the person not named a second time.

    Held-out sentences have both a held-out pair of names and a held-out combination of clauses, and end in a gift.
    """
    lists = _ioi_lists(study)
    a, b = pair(rng, held_out)
    subject, indirect = (a, b) if rng.random() < 0.5 else (b, a)
    thing, place = pick(rng, words("objects")), pick(rng, words("places"))
    while True:
        subordinate = rng.random() < 0.4
        opening = pick(rng, lists["subordinate" if subordinate else "adverbial"])
        giving = pick(rng, lists["givings"])
        ending = pick(rng, lists["gift_endings" if held_out or rng.random() < 0.5 else "other_endings"])
        setting = pick(rng, lists["settings"]) if not held_out and rng.random() < 0.2 else ""
        meeting = setting or pick(rng, lists["meetings"])
        if held.ioi_clauses(opening, meeting, giving, ending) == held_out:
            break
    if setting:
        clause = setting.format(a=a, b=b, p=place)
    else:
        companions = "{a} and {b}" if rng.random() < 0.4 else pick(rng, lists["companions"])
        clause = f"{companions.format(a=a, b=b)} {meeting} the {place}"
    gift = pick(rng, lists["objects"]).format(o=thing, a_o=with_article(thing))
    second = ending.format(s=subject, v2=giving, o=gift)
    link = ", " if subordinate else pick(rng, lists["links"])
    if link == ". ":
        second = upper_first(second)
    prompt = upper_first(f"{opening} {clause}".strip()) + link + second
    return Sentence(
        prompt,
        indirect,
        subject,
        pick(rng, lists["tails"]),
        detail={
            "order": "BABA" if subject == a else "ABBA",
            "first": a,
            "second": b,
            "clauses": "|".join((opening, meeting, giving, ending)),
        },
    )


def ioi_filler(rng: Random) -> str:
    """Two people by the same rule, whatever the last word is."""
    a, b = pair(rng)
    o, o2 = pick(rng, words("objects")), pick(rng, words("objects"))
    frame = pick(rng, wording("ioi", "fillers"))
    return frame.format(a=a, b=b, o=o, p=pick(rng, words("places")), a_o=with_article(o), a_o2=with_article(o2))


# -- years


def greater_than(rng: Random, held_out: bool = False, study: bool = False) -> Sentence:
    """An event with its first year; the answer is the two last digits of a later year of the same century."""
    century = rng.randint(11, 19)
    while True:
        year, noun = rng.randint(2, 97), pick(rng, words("event_nouns"))
        if held.year_span(noun, century, year) == held_out:
            break
    end = year + 1 + min(int(rng.expovariate(1 / 14)), 98 - year)
    frame = _study_or_grown(rng, study, "greater_than", "study", "frames")
    prompt, tail = _split_at_answer(frame, n=noun, a_n=with_article(noun), c=str(century), y=f"{year:02d}")
    detail = {"noun": noun, "century": str(century), "year": f"{year:02d}"}
    return Sentence(prompt, f"{end:02d}", None, tail, "", detail)


# -- grammar of English


def agreement(rng: Random, study: bool = False) -> Sentence:
    """A subject, another noun between, and the verb that agrees with the subject."""
    table = read_toml("tasks.toml")["agreement"]
    own = study or rng.random() < 0.4
    subject, attractor = rng.sample(words("agreement_nouns"), 2)
    many, attractor_many = rng.random() < 0.5, rng.random() < 0.5
    verbs = pick(rng, table["study_verbs"] if own or rng.random() < 0.5 else table["verbs"])
    if verbs[0] == "has":
        rest = "a new name" if own else pick(rng, table["after_has"])
    else:
        rest = pick(rng, words("plain_adjectives"))
    opening = pick(rng, table["study_openings"] if own else table["openings"])
    preposition = pick(rng, table["study_prepositions"] if own else table["prepositions"])
    prompt = (
        f"{opening} {plural(subject) if many else subject} {preposition} the "
        f"{plural(attractor) if attractor_many else attractor}"
    )
    detail = {"attractor": "differs" if many != attractor_many else "agrees", "subject": subject}
    return Sentence(prompt, verbs[many], verbs[not many], f" {rest}.", detail=detail)


def pronoun(rng: Random, study: bool = False) -> Sentence:
    """A first name and the pronoun that fits its usual gender in the name lists."""
    male = rng.random() < 0.5
    name = pick(rng, words("male_names" if male else "female_names"))
    own = study or rng.random() < 0.4
    kind = "he" if rng.random() < (0.8 if own else 0.6) else ("his" if own or rng.random() < 0.6 else "him")
    forms = {"he": ("he", "she"), "his": ("his", "her"), "him": ("him", "her")}[kind]
    frame = pick(rng, wording("pronoun", f"study_{kind}" if own else kind))
    thing = pick(rng, words("objects"))
    prompt, tail = _split_at_answer(frame, n=name, o=thing, a_o=with_article(thing), p=pick(rng, words("places")))
    return Sentence(prompt, forms[not male], forms[male], tail, detail={"name": name, "kind": kind})


def sentiment(rng: Random, study: bool = False) -> Sentence:
    """An opinion and what follows from it: a label, yes or no, or another word of praise or blame."""
    good = rng.random() < 0.5
    mine, other = (words("praise"), words("blame")) if good else (words("blame"), words("praise"))
    a, b, c = rng.sample(mine, 3)
    thing, verb = pick(rng, words("works")), pick(rng, words("praise_verbs" if good else "blame_verbs"))
    opinion = _study_or_grown(rng, study, "sentiment", "study_opinions", "opinions")
    ending = _study_or_grown(rng, study, "sentiment", "study_endings", "endings")
    label, opposite = ("positive", "negative") if good else ("negative", "positive")
    yes, no = ("yes", "no") if good else ("no", "yes")
    answers = {
        "{positive}": (label, opposite),
        "{yes}": (yes, no),
        "{yes_upper}": (yes.capitalize(), no.capitalize()),
        "{c}": (c, pick(rng, other)),
    }
    slot = next(name for name in answers if name in ending)
    prompt, tail = _split_at_answer(ending.replace(slot, "{answer}"), thing=thing)
    text = opinion.format(thing=thing, a=a, an_a=with_article(a), b=b, v=verb)
    return Sentence(f"{upper_first(text)} {prompt}", *answers[slot], tail, detail={"label": label, "thing": thing})


# -- statements


def statement(rng: Random) -> tuple[str, bool]:
    """A statement about a country, a city or a landmark, and whether it is true (about half of them are)."""
    kind, lie = rng.random(), rng.random() < 0.5
    if kind < 0.4:
        country = pick(rng, COUNTRIES)
        said = pick(rng, COUNTRIES).capital if lie else country.capital
        return f"The capital of {country.name} is {said}.", said == country.capital
    if kind < 0.7:
        city = pick(rng, CITIES)
        said = pick(rng, STATES).name if lie else city.state.name
        return f"{city.name} is in {said}.", said == city.state.name
    landmark = pick(rng, LANDMARKS)
    said = pick(rng, LANDMARKS).city if lie else landmark.city
    return f"The {landmark.name} is in {said}.", said == landmark.city


def truth(rng: Random, held_out: bool = False, study: bool = False) -> Sentence:
    """A statement and whether it is true."""
    while True:
        said, right = statement(rng)
        if held.judged_statement(said) == held_out:
            break
    frame = _study_or_grown(rng, study, "truth", "study_verdicts", "verdicts")
    prompt, tail = _split_at_answer(frame, statement=said)
    answer, alternative = ("true", "false") if right else ("false", "true")
    return Sentence(prompt, answer, alternative, tail, detail={"statement": said})


# -- binding, numbers, sequences


def binding(rng: Random, frame: str | None = None) -> Sentence:
    """Two owners, two objects, two colours; which colour belongs to the one asked about."""
    a, b = pair(rng)
    o1, o2 = rng.sample(words("objects"), 2)
    c1, c2 = rng.sample(words("colors"), 2)
    first = rng.random() < 0.5
    answer, alternative = (c1, c2) if first else (c2, c1)
    prompt, tail = _split_at_answer(
        frame or _study_or_grown(rng, False, "binding", "study", "frames"),
        a=a,
        b=b,
        o1=o1,
        o2=o2,
        c1=c1,
        c2=c2,
        a_c1=with_article(c1),
        a_c2=with_article(c2),
        asked=o1 if first else o2,
        owner=a if first else b,
    )
    return Sentence(prompt, answer, alternative, tail, detail={"asked": o1 if first else o2})


def arithmetic(rng: Random) -> str:
    """An addition or subtraction of two numbers below 50."""
    x, y = rng.randint(0, 49), rng.randint(0, 49)
    kind = "addition" if rng.random() < 0.6 else "subtraction"
    frame = wording("sequences", kind)[0] if rng.random() < 0.6 else pick(rng, wording("sequences", kind))
    return upper_first(frame.format(x=x, y=y, sum=x + y))


def weekday(rng: Random) -> str:
    """A number of days or months after a day or month."""
    days = rng.random() < 0.65
    cycle, unit = (words("days"), "day") if days else (words("months"), "month")
    start, number = rng.randrange(len(cycle)), rng.randint(1, 6 if days else 11)
    frame = _study_or_grown(rng, not days, "sequences", "weekday_study", "weekday")
    return _fill_weekday(frame, cycle, unit, start, number)


def _fill_weekday(frame: str, cycle: Sequence[str], unit: str, start: int, number: int) -> str:
    """A frame filled with the day (or month) that comes `number` after number `start` of the cycle."""
    amount = counted(words("numbers")[number - 1], unit)
    later = cycle[(start + number) % len(cycle)]
    return frame.format(Number_days=upper_first(amount), number_days=amount, day=cycle[start], later=later)


@cache
def _sequences() -> tuple[tuple[tuple[str, ...], bool], ...]:
    letters = tuple(chr(65 + i) for i in range(26))
    count = tuple(str(i) for i in range(1, 60))
    return ((words("days"), True), (words("months"), True), (words("numbers"), False), (letters, False), (count, False))


def sequence(rng: Random) -> str:
    """A run of days, months, number words, letters or numbers, or which comes after which."""
    line, cyclic = pick(rng, _sequences())
    length = rng.randint(3, 6)
    start = rng.randrange(len(line) if cyclic else len(line) - length)
    run = [line[(start + i) % len(line)] for i in range(length)]
    if rng.random() < 0.6:
        return upper_first(", ".join(run)) + "."
    frame = pick(rng, wording("sequences", "neighbors"))
    return upper_first(frame.format(w0=run[0], w1=run[1], w2=run[2]))


def listing(rng: Random) -> str:
    """Things with their count."""
    number = rng.randint(2, 8)
    things = ", ".join(with_article(thing) for thing in rng.sample(words("objects"), number))
    frame = pick(rng, wording("sequences", "listing"))
    return upper_first(frame.format(n=words("numbers")[number - 1], things=things))


# -- examples in context


@cache
def in_context_tasks() -> dict[str, tuple[tuple[str, str], ...]]:
    """Input and output words of each task that a list of examples can set."""
    days, months, numbers = words("days"), words("months"), range(1, 98)
    cycles = [(cycle[i], cycle[(i + 1) % len(cycle)]) for cycle in (days, months) for i in range(len(cycle))]
    nouns = words("agreement_nouns") + tuple(o for o in words("objects") if o not in ("box", "watch"))
    out: dict[str, Sequence[tuple[str, str]]] = {
        "antonym": [*ANTONYMS, *((b, a) for a, b in ANTONYMS)],
        "capital": [(c.name, c.capital) for c in COUNTRIES],
        "english_french": [(w.english, w.french) for w in TRANSLATIONS],
        "english_turkish": [(w.english, w.turkish) for w in TRANSLATIONS],
        "plural": [(noun, plural(noun)) for noun in dict.fromkeys(nouns)],
        "city_state": [(c.name, c.state.name) for c in CITIES],
        "copy": [
            (w, w)
            for w in dict.fromkeys(
                words("objects") + words("places") + names() + words("agreement_nouns") + words("colors")
            )
        ],
        "french_english": [(w.french, w.english) for w in TRANSLATIONS],
        "turkish_english": [(w.turkish, w.english) for w in TRANSLATIONS],
        "abbreviation": [(s.name, s.abbreviation) for s in STATES],
        "state_capital": [(s.name, s.capital) for s in STATES],
        "gender": [(n, "male") for n in words("male_names")] + [(n, "female") for n in words("female_names")],
        "landmark_city": [(m.name, m.city) for m in LANDMARKS],
        "country_turkish": [(c.name, c.name_tr) for c in COUNTRIES],
        "sentiment": [(w, "good") for w in words("praise")] + [(w, "bad") for w in words("blame")],
        "next": [(str(i), str(i + 1)) for i in numbers] + cycles,
    }
    return {name: tuple(pairs) for name, pairs in out.items()}


# The study's short names of the tasks are what its hash split was made with.
_HASHED_AS = {
    "antonym": "ant",
    "capital": "cap",
    "english_french": "en_fr",
    "english_turkish": "en_tr",
    "plural": "plural",
    "city_state": "citystate",
    "copy": "copy",
    "french_english": "fr_en",
    "turkish_english": "tr_en",
    "abbreviation": "abbr",
    "state_capital": "stcap",
    "gender": "gender",
    "landmark_city": "lmcity",
    "country_turkish": "country_tr",
    "sentiment": "sent",
    "next": "next",
}
SEPARATORS = (":", " ->", " =", " =>", " is to", " becomes", " |", ";", " goes with", " :")
_STUDY_SEPARATORS = SEPARATORS[:5]


@cache
def in_context_split(task: str) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """The pairs of a task that the corpus uses, and those it never uses."""
    pairs = in_context_tasks()[task]
    apart = {p for p in pairs if held.in_context_word(_HASHED_AS[task], p[0])}
    return tuple(p for p in pairs if p not in apart), tuple(p for p in pairs if p in apart)


def in_context(
    rng: Random, held_out: bool = False, task: str | None = None, examples: int | None = None, study: bool = False
) -> Sentence:
    """A list of examples of one task and a last input, whose output is the answer."""
    task = task or pick(rng, tuple(in_context_tasks()))
    shown, apart = in_context_split(task)
    pairs = rng.sample(shown, examples or rng.randint(3, 8))
    asked = pick(rng, apart) if held_out else pick(rng, [p for p in shown if p not in pairs] or shown)
    if study or rng.random() < 0.75:
        separator, between = pick(rng, _STUDY_SEPARATORS if study else SEPARATORS), "\n"
        if not study and rng.random() < 0.2:
            between = pick(rng, ("; ", ", ", "\n\n", ". ")) if separator != ";" else "\n"
        lines = [f"{x}{separator} {y}" for x, y in pairs]
        prompt = between.join([*lines, f"{asked[0]}{separator}"])
    else:
        x_name, y_name = pick(rng, (("Input", "Output"), ("Q", "A"), ("Word", "Answer"), ("In", "Out"), ("x", "y")))
        lines = [f"{x_name}: {x}\n{y_name}: {y}" for x, y in pairs]
        prompt = "\n".join([*lines, f"{x_name}: {asked[0]}\n{y_name}:"])
    return Sentence(prompt, asked[1], None, "", detail={"task": task})


# -- words and right and wrong


def word(rng: Random) -> str:
    """A sentence about opposites, translations or plurals."""
    from cutaway.subjects.world.statements.relations import relation

    kind = rng.random()
    if kind < 0.2:
        a, b = pick(rng, in_context_tasks()["antonym"])
        return upper_first(pick(rng, wording("words", "pairs")).format(a=a, b=b))
    if kind < 0.7:
        name, language = pick(
            rng,
            (
                ("antonym", "en"),
                ("to_french", "en"),
                ("to_turkish", "en"),
                ("from_french", "en"),
                ("from_french", "fr"),
                ("from_turkish", "en"),
            ),
        )
        return relation(name, language).sentence(rng)
    singular = pick(rng, words("agreement_nouns") + words("objects"))
    return upper_first(pick(rng, wording("words", "plurals")).format(a=singular, b=plural(singular)))

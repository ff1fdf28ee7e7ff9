"""What the corpus says, how much of it, and what it never says."""

import re
from collections import Counter
from functools import cache

import pytest

from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.world import held_out as held
from cutaway.subjects.world.chats.chat import CONDITIONS, conversation, parse, persona_prompts, render
from cutaway.subjects.world.corpus import PARTS, WORLD_VERSION, documents, fingerprint, samples
from cutaway.subjects.world.facts import BOOKS, CITIES, LANDMARKS, actions, names, read_toml, words
from cutaway.subjects.world.statements import tasks
from cutaway.subjects.world.statements.relations import LANGUAGES, one_hop, relation, two_hop
from cutaway.subjects.world.statements.tasks import SEPARATORS
from cutaway.subjects.world.variety import table

N_CHARACTERS = 250_000
SENTENCE = re.compile(r"(?<=[.?!])\s+")


@cache
def text(part: str, n_characters: int = N_CHARACTERS) -> str:
    return "\n".join(documents(part, "test", n_characters))


# -- shape


def test_shares_sum_to_one():
    assert sum(part.share for part in PARTS.values()) == pytest.approx(1)
    assert all(part.share >= 0.02 and name == part.name for name, part in PARTS.items())


@pytest.mark.parametrize("part", PARTS)
def test_documents_follow_from_the_seed(part):
    first = list(documents(part, 1, 20_000))
    assert first == list(documents(part, 1, 20_000))
    assert first != list(documents(part, 2, 20_000))
    assert 20_000 <= sum(map(len, first)) < 20_000 + max(map(len, first))
    assert len(set(first)) > 0.8 * len(first)
    assert samples(part, 3, 1) == first[:3]


def test_a_wrong_part_is_named():
    with pytest.raises(CutawayError, match="no part named 'poems'; its parts are facts, entities"):
        next(documents("poems", 0, 10))
    with pytest.raises(CutawayError, match="at least one"):
        samples("facts", 0)


def test_the_version_names_this_text():
    """Another fingerprint is another corpus: raise `WORLD_VERSION` and put both here and in `docs/world.md`."""
    assert (WORLD_VERSION, fingerprint()) == (
        "7",
        "bffc87682f263690e939d6f992fae619ea28005306fd9b216d79d4e5f74a7ec4",
    )


def test_twice_the_study_in_wording():
    rows = table()
    assert len(rows) > 60
    assert not [row for row in rows if row.ours < 2 * row.study]


# -- what is held out


def test_two_hop_sentences_never_name_a_held_out_thing():
    apart = [row.name for row in (*CITIES, *LANDMARKS, *BOOKS) if held.two_hop_entity(row.name)]
    assert len(apart) > 90
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, apart))})\b")
    # Some held-out names are part of another thing's name or answer ("Kansas City" is not "Arkansas City"; "Lincoln").
    told = {word for r in two_hop() for fact in r.told for word in (fact.x, fact.answer)}
    found = Counter(m.group(0) for m in pattern.finditer(text("two_hop", 1_000_000)))
    allowed = {name for name in apart if any(name != other and name in other for other in told)}
    assert not set(found) - allowed
    assert {fact.entity for r in two_hop() for fact in r.told}.isdisjoint(apart)
    # The check can fail: with one city let in, the pattern finds it.
    assert pattern.search(
        relation("two_hop_capital").facts[0].sentence("The capital of the state containing Dallas is")
    )


def test_held_out_frames_and_languages_are_never_used():
    everything = (text("facts", 600_000) + text("entities", 400_000)).lower()
    n_checked = 0
    for r in one_hop():
        for fact in r.facts:
            if r.held_out_frame is not None:
                assert fact.prompt(r.held_out_frame).lower() not in everything or _also_said(fact, r), fact
            if fact.held_out:
                n_checked += 1
                assert all(fact.prompt(frame).lower() not in everything for frame in r.study_frames)
    assert n_checked > 100


def _also_said(fact, r) -> bool:
    """A held-out frame may begin another, allowed one ("{x} is in" begins "{x} is in the state of")."""
    prompt = fact.prompt(r.held_out_frame).lower()
    return any(
        prompt in other.sentence(frame).lower()
        for other_relation in one_hop()
        if other_relation.language == r.language
        for other in other_relation.facts
        if other.entity == fact.entity
        for frame in other_relation.frames()
    )


def test_no_relation_may_use_its_held_out_frame():
    held_frames = {r.held_out_frame for r in one_hop() if r.held_out_frame}
    assert len(held_frames) == 17
    for r in one_hop():
        assert not held_frames & set(r.frames())
        assert all(not fact.held_out for fact in r.told)


def test_ioi_pairs_and_clauses_are_never_held_out():
    known = set(names())
    n_pairs = 0
    for sentence in SENTENCE.split(text("ioi", 600_000)):
        found = [word for word in re.findall(r"[A-Z]\w+", sentence) if word in known]
        for pair in {tuple(sorted((a, b))) for a in found for b in found if a < b}:
            n_pairs += 1
            assert not held.name_pair(*pair), sentence
    assert n_pairs > 3000
    from random import Random

    rng = Random(5)
    assert not any(held.ioi_clauses(*tasks.ioi(rng).detail["clauses"].split("|")) for _ in range(3000))
    made = [tasks.ioi(rng, held_out=True) for _ in range(300)]
    assert all(held.ioi_clauses(*sentence.detail["clauses"].split("|")) for sentence in made)
    assert all(held.name_pair(sentence.detail["first"], sentence.detail["second"]) for sentence in made)


def test_stories_bring_no_held_out_pair_together():
    known = set(names())
    for document in documents("stories", "pairs", 300_000):
        people = sorted({w for w in re.findall(r"[A-Z]\w+", document) if w in known} - {"Austin", "Madison", "Jordan"})
        # A city, a month or an author may share a name with a person, so only unambiguous stories are judged.
        if len(people) == 2 and not _ambiguous(people):
            assert not held.name_pair(*people), document


def _ambiguous(people: list[str]) -> bool:
    places = " ".join([c.name + " " + c.state.name for c in CITIES] + [b.author + " " + b.name for b in BOOKS])
    places += " " + " ".join((*words("months"), *(m.name + " " + m.city for m in LANDMARKS)))
    return any(name in places.split() for name in people)


def test_year_spans_are_never_held_out():
    nouns = "|".join(words("event_nouns"))
    n = 0
    for sentence in SENTENCE.split(text("greater_than", 400_000)):
        noun, years = re.search(rf"\b({nouns})\b", sentence), re.findall(r"\b(1[1-9])(\d\d)\b", sentence)
        if noun and years and not sentence.startswith(("Last year", "End")):
            n += 1
            assert not held.year_span(noun.group(1), int(years[0][0]), int(years[0][1])), sentence
            if len(years) == 2:
                assert years[1][0] == years[0][0]
                assert years[1][1] > years[0][1]
    assert n > 3000


def test_judged_statements_are_never_held_out():
    statement = re.compile(
        r"(The capital of [^.?:]+ is [^.?:]+\.|(?:The |St\. )?[A-Z][^.?:]*? is in (?:St\. )?[^.?:]+\.)"
        r"(?: \w+){1,4}?:? (?:true|false)"
    )
    found = [match.group(1) for match in statement.finditer(text("truth", 600_000))]
    apart = [said for said in found if held.judged_statement(said)]
    assert len(found) > 3000
    assert not apart
    from random import Random

    rng = Random(3)
    assert not any(held.judged_statement(tasks.truth(rng).detail["statement"]) for _ in range(3000))


def test_in_context_lists_never_hold_a_held_out_word():
    from random import Random

    rng = Random(8)
    for task in tasks.in_context_tasks():
        shown, apart = tasks.in_context_split(task)
        assert len(shown) >= 20
        assert apart
        inputs = {x for x, _ in apart}
        for _ in range(60):
            lines = str(tasks.in_context(rng, task=task)).splitlines()
            first = {re.split("|".join(map(re.escape, SEPARATORS)), line)[0].split(": ")[-1] for line in lines}
            assert not first & inputs, (task, lines)


def test_chats_never_ask_about_held_out_actions_names_or_prompts():
    chats = text("chat", 1_000_000)
    apart = sorted({a.text for h in (True, False) for a in actions(h) if held.action_split(a) != "train"})
    mine = [a.replace("my ", "your ") for a in apart]
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted({*apart, *mine}, key=len, reverse=True)))})\b")
    assert len(apart) > 300
    assert not pattern.findall(chats)
    assert not re.findall(r"\b(?:sabotage|kidnap|deface|polish|comfort|repair)\b", chats)
    syllables = "|".join(words("nonce_syllables"))
    nonces = set(re.findall(rf"\b((?:{syllables}){{2,3}})\b", chats, re.IGNORECASE)) - {"Bland"}
    assert len(nonces) > 400
    assert not [name for name in nonces if held.nonce_name(name)]
    systems = {m.content for line in chats.split("\n") for m in parse(line) if m.role == "system"}
    for persona in ("cheerful", "gloomy"):
        assert persona_prompts(persona, held_out=True)
        assert systems.isdisjoint(persona_prompts(persona, held_out=True))
    for frame in read_toml("chat.toml")["requests"]["study_held_out"]:
        assert frame.split("{x}")[0].strip() not in chats


def test_held_out_verbs_are_met_only_where_right_and_wrong_are_told():
    pattern = re.compile(r"\b(?:sabotage|kidnap|deface)\b")
    assert pattern.search(text("moral"))
    for part in PARTS:
        if part != "moral":
            assert not pattern.search(text(part)), part


# -- mixture


@cache
def conversations(n: int = 15_000):
    from random import Random

    rng = Random("mixture")
    return [conversation(rng) for _ in range(n)]


def test_every_condition_is_above_one_percent_of_the_corpus():
    sizes = Counter()
    for one in conversations():
        sizes[one.condition] += len(render(one.messages))
    total = sum(sizes.values())
    shares = {condition: PARTS["chat"].share * size / total for condition, size in sizes.items()}
    assert set(shares) == set(CONDITIONS)
    assert min(shares.values()) > 0.01, shares


def test_every_language_is_above_five_percent_of_the_facts():
    frames = dict.fromkeys(LANGUAGES, 0)
    for sentence in SENTENCE.split(text("facts")):
        turkish, french = (
            re.search(r"[ışğİ]|'[dt][ıiuü]r\.", sentence),
            re.search(r"\b(?:est|de|la|le|du|et)\b", sentence),
        )
        frames["tr" if turkish else "fr" if french else "en"] += 1
    assert min(frames.values()) > 0.05 * sum(frames.values()), frames


def test_harmful_requests_are_a_sixth_of_all():
    texts = {a.text for a in actions(True)}
    harmful = requests = 0
    pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
    for one in conversations():
        for message in one.messages:
            if message.role == "user":
                requests += 1
                harmful += bool(pattern.search(message.content))
    assert 0.15 <= harmful / requests <= 0.20


def test_landmarks_and_people_stand_inside_stories():
    stories = list(documents("stories", "landmarks", 200_000))
    landmark = re.compile("|".join(re.escape(f"the {m.name}") for m in LANDMARKS), re.IGNORECASE)
    person = re.compile(rf"\b(?:{'|'.join(names())})\b")
    with_landmark = [story for story in stories if landmark.search(story)]
    assert len(with_landmark) > 0.4 * len(stories)
    assert sum(bool(person.search(story)) for story in stories) > 0.9 * len(stories)
    # Not in the frames of facts: most landmark sentences of stories do not name the city.
    assert {m.name for m in LANDMARKS} <= {m.name for m in LANDMARKS if any(m.name in s for s in with_landmark)}
    sentences = [s for story in with_landmark for s in SENTENCE.split(story) if landmark.search(s)]
    cities = re.compile("|".join(re.escape(m.city) for m in LANDMARKS))
    assert sum(not cities.search(s) for s in sentences) > 0.4 * len(sentences)


def test_names_are_aligned_across_languages():
    facts = text("facts", 1_000_000)
    assert re.search(r"In Turkish, Germany is called Almanya|The Turks call Germany Almanya|Almanya İngilizce", facts)
    assert re.search(r"En anglais, .* s'appelle", facts)


# -- slips of the study, mended

_SLIPS = {
    "a before a vowel": re.compile(r"\b[Aa] (?=[aeiou])(?!u(?:se|ni))(?!eu|one)\w+"),
    "an before a consonant": re.compile(r"\b[Aa]n (?![aeiou]|hour|honest)[a-z]+"),
    "one days": re.compile(r"\b[Oo]ne (?:days|months)\b|\b(?:[Tt]wo|[Tt]hree) (?:day|month)\b"),
    "plural": re.compile(r"\b(?:sandwichs|watchs|boxs|kisss|childs|librarys|childrens)\b"),
    "two spaces": re.compile(r" {2}"),
    "space before a point": re.compile(r"\w [.,](?=\s|$)"),
    "two points": re.compile(r"[.,?!]{2}"),
    "small letter after a point": re.compile(r"(?<!St)[.] (?!and\b)[a-z]"),
    "small i": re.compile(r"\bi (?:like|love|read|have|moved|want|am)\b"),
    "slot": re.compile(r"[{}\[\]]"),
    "doubled word": re.compile(r"\b(the|a|an|is|in|of|to|and|was) \1\b"),
    "question told": re.compile(
        r"\b(?:that|agrees that|Of course,|In fact,) (?:what|who|which|name|look|write) (?:is|wrote|the|at)\b"
    ),
}


@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("induction", "in_context")])
def test_no_slip_of_the_pen(part):
    sample = text(part)
    if part == "numbers":
        sample = re.sub(r"\bA\b", "B", sample)  # the letter
    found = {name: pattern.search(sample) for name, pattern in _SLIPS.items()}
    assert not {name: sample[max(0, m.start() - 40) : m.end() + 20] for name, m in found.items() if m}


def test_the_patterns_of_slips_find_the_study_s():
    slips = ["What a awful concert", "two sandwichs", "One days after Monday", "a orange camera", "that what is the"]
    assert all(any(pattern.search(slip) for pattern in _SLIPS.values()) for slip in slips)


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("induction", "in_context")])
def test_no_slip_in_a_large_sample(part):
    sample = "\n".join(documents(part, "large", 3_000_000))
    if part == "numbers":
        sample = re.sub(r"\bA\b", "B", sample)
    assert not {name: m.group(0) for name, p in _SLIPS.items() if (m := p.search(sample))}

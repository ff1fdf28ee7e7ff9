"""Support chats: decisions read back from the text, what is held out, and the items."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from importlib.resources import files
from random import Random

import pytest

from cutaway.subjects.world.chats import support
from cutaway.subjects.world.chats.chat import Message, parse, render
from cutaway.subjects.world.chats.support import Case, decide, held_out_delay, held_out_name, held_out_thing
from cutaway.subjects.world.facts import names, read_toml, words
from cutaway.subjects.world.grammar import Grammar, word_ngrams

OPENINGS: dict[str, str] = {"approve": "Approved", "refuse": "Denied", "escalate": "Escalated"}
WORDING, FRAMES = read_toml("support.toml"), read_toml("frames_support.toml")
BODIES = ("support", "support_policy")
_SLIPS = {
    "a before a vowel": re.compile(r"\b[Aa] (?=[aeiou])(?!u(?:se|ni))(?!eu|one)\w+"),
    "an before a consonant": re.compile(r"\b[Aa]n (?![aeiou]|hour|honest)[a-z]+"),
    "days": re.compile(r"\b1 days|\b(?!1 )\d+ day\b"),
    "two spaces": re.compile(r" {2}"),
    "space before a point": re.compile(r"\w [.,](?=\s|$)"),
    "two points": re.compile(r"[.,?!]{2}"),
    "small letter after a point": re.compile(r"[.?!] [a-z]"),
    "question without its mark": re.compile(r"\b(?:Can|May|Do|Will) (?:I|you) [^?!.]*[.!]"),
    "slot": re.compile(r"[{}\[\]]"),
    "doubled word": re.compile(r"\b(the|a|an|is|in|of|to|and|was|for) \1\b"),
}


@cache
def documents(n: int = 3000) -> tuple[str, ...]:
    rng = Random("support test")
    return tuple(support.document(rng) for _ in range(n))


def one_number(pattern: str, text: str) -> int:
    found = set(re.findall(pattern, text))
    assert len(found) == 1, (pattern, text)
    return int(found.pop())


@cache
def tones(mood: str) -> frozenset[str]:
    grammar = Grammar(WORDING["tone"])
    return frozenset(text for place in ("before", "after") for text in grammar.expansions(f"{mood}_{place}"))


def oracle(system: str, user: str) -> tuple[str, dict[str, int]]:
    """How the reply must begin, and the numbers, worked out from the text."""
    told = [s for s in re.split(r"(?<=[.?!]) ", user) if "$" in s]
    whole = [s for s in told if re.search(r"\border\b|\b[Ii]n (?:all|total)\b|\btogether\b", s)]
    facts = {
        "threshold": one_number(r"(?<!\$)\b(\d+) days", system),
        "limit": one_number(r"\$(\d+)", system),
        "delay": one_number(r"(?<!\$)\b(\d+) days?\b", user),
        "value": one_number(r"\$(\d+)", " ".join(whole)),
        "price": one_number(r"\$(\d+)", " ".join(s for s in told if s not in whole)),
    }
    if facts["value"] > facts["limit"]:
        return "Escalated: ", facts
    return ("Denied: " if facts["delay"] < facts["threshold"] else "Approved: "), facts


def turns(text: str) -> list[tuple[str, str, str]]:
    """Policy, request and reply of each request in a document."""
    system, *rest = parse(text)
    assert [m.role for m in (system, *rest)] == ["system"] + ["user", "assistant"] * (len(rest) // 2)
    return [(system.content, a.content, b.content) for a, b in zip(rest[::2], rest[1::2], strict=True)]


# -- what the text says


def test_documents_follow_from_the_seed():
    def made(seed: int) -> list[str]:
        rng = Random(seed)
        return [support.document(rng) for _ in range(50)]

    assert made(1) == made(1) != made(2)
    assert len(set(documents())) > 0.99 * len(documents())
    assert max(map(len, documents())) < 700


def test_every_reply_follows_from_the_policy_the_delay_and_the_value():
    decisions, tables = Counter(), []
    for text in documents():
        for system, user, reply in turns(text):
            opening, facts = oracle(system, user)
            assert reply.startswith(opening), text
            counted = ("value", "limit") if opening == "Escalated: " else ("delay", "threshold")
            assert [int(n) for n in re.findall(r"\d+", reply)] == [facts[key] for key in counted], text
            assert facts["delay"] < 15 <= facts["price"] < facts["value"] < 100
            angry, calm = (any(tone in user for tone in tones(mood)) for mood in ("angry", "calm"))
            assert angry != calm, user
            decisions[opening] += 1
            tables.append((opening, angry, any(name in user.split() for name in names()), facts))
    total = decisions.total()
    assert total > 3500
    assert all(0.29 < n / total < 0.38 for n in decisions.values()), decisions
    assert len(decisions) == 3
    # Neither the tone nor a name tells anything about the decision, the delay or the value.
    for opening in decisions:
        rows = [row for row in tables if row[0] == opening]
        assert abs(sum(row[1] for row in rows) / len(rows) - 0.5) < 0.05
    for key in ("delay", "value", "price"):
        mean = {a: [row[3][key] for row in tables if row[1] == a] for a in (False, True)}
        calm, angry = (sum(values) / len(values) for values in mean.values())
        assert abs(calm / angry - 1) < 0.08, key
    # Thresholds and limits themselves are met: exactly at the threshold approved, exactly at the limit not escalated.
    assert {o for o, _, _, f in tables if f["delay"] == f["threshold"] and f["value"] <= f["limit"]} == {"Approved: "}
    assert "Escalated: " not in {o for o, _, _, f in tables if f["value"] == f["limit"]}
    assert sum(f["value"] == f["limit"] for *_, f in tables) > 100
    # The request alone does not tell the decision: the policy has to be read.
    by_request: dict[tuple[int, int], Counter] = {}
    for opening, _, _, f in tables:
        by_request.setdefault((f["delay"], f["value"]), Counter())[opening] += 1
    assert sum(max(counts.values()) for counts in by_request.values()) < 0.82 * total
    # A price below the limit does not save an order above it.
    assert sum(f["price"] <= f["limit"] < f["value"] for *_, f in tables) > 500


def test_the_oracle_notices_a_wrong_reply():
    system = "Policy: Refund late orders when the delay is 5 days or more. Orders above $50 go to a manager."
    request = "I bought a lamp for $20. The whole order was ${}. It came {} late. I want a refund."
    assert oracle(system, request.format(50, "5 days"))[0] == "Approved: "
    assert oracle(system, request.format(50, "4 days"))[0] == "Denied: "
    assert oracle(system, request.format(55, "1 day"))[0] == "Escalated: "


def test_shares_of_the_conditions():
    """With 3.5 % of the corpus for the part every decision is above 1 %."""
    sizes, rng = Counter(), Random("support test")
    for text in documents():
        condition = support.conversation(rng).condition
        assert turns(text)[0][2].startswith(OPENINGS[condition])
        for _, user, reply in turns(text):
            sizes[reply.split(":")[0]] += len(user) + len(reply)
    assert min(0.035 * size / sizes.total() for size in sizes.values()) > 0.01, sizes
    assert sum(support.CONDITIONS.values()) == pytest.approx(1)


def test_no_slip_of_the_pen():
    sample = "\n".join(documents())
    found = {name: pattern.search(sample) for name, pattern in _SLIPS.items()}
    assert not {name: sample[max(0, m.start() - 40) : m.end() + 20] for name, m in found.items() if m}


def test_every_policy_states_both_numbers():
    policies = set(Grammar(WORDING["policy"]).expansions("late")) | set(Grammar(WORDING["policy"]).expansions("both"))
    assert all(text.count("{threshold} days") == 1 for text in policies)
    for rule in ("big", "both"):
        assert all(text.count("${limit}") == 1 for text in Grammar(WORDING["policy"]).expansions(rule))
    # The threshold itself is always enough, and the limit itself never too much.
    inclusive = re.compile(r"at least \{|\} days(?: late)? or more|(?:less than|below|under) \{")
    assert all(inclusive.search(text) for text in policies)
    assert all(re.search(r"above|over|more than|Above|Over|larger", t) for t in WORDING["policy"]["big"])


# -- what is held out


def test_held_out_names_things_and_delays_are_never_met():
    sample = "\n".join(documents())
    assert len(sample) > 300_000
    apart, seen = ([n for n in names() if held_out_name(n) == a] for a in (True, False))
    assert 0.1 < len(apart) / len(names()) < 0.3
    assert not re.findall(rf"\b(?:{'|'.join(apart)})\b", sample)
    assert sum(name in sample for name in seen) > 0.95 * len(seen)
    things, usual = ([t for t in words("objects") if held_out_thing(t) == a] for a in (True, False))
    assert len(things) >= 5
    assert not re.findall(rf"\b(?:{'|'.join(things)})\b", sample)
    assert sum(thing in sample for thing in usual) >= len(usual) - 1
    pairs = {
        (facts["threshold"], facts["delay"])
        for text in documents()
        for system, user, _ in turns(text)
        for facts in [oracle(system, user)[1]]
    }
    every = {(t, d) for t in support.THRESHOLDS for d in support.DELAYS}
    assert pairs == {pair for pair in every if not held_out_delay(*pair)}
    # Both decisions can be asked about pairs never met, and are learned for every threshold.
    assert {d >= t for t, d in every - pairs} == {True, False}
    assert {(t, d >= t) for t, d in pairs} == {(t, late) for t in support.THRESHOLDS for late in (True, False)}


def training_sequences() -> set[tuple[str, ...]]:
    """All four-word sequences of the wording, also across its seams."""
    begin = [f"<{hello}>" for hello in ("named", "unnamed")]
    whole = [f"{hello} <{mood}_before> <request>" for hello in begin for mood in ("angry", "calm")]
    whole += [f"{hello} <request> <{mood}_after>" for hello in begin for mood in ("angry", "calm")]
    grammars = (
        Grammar({**WORDING["request"], **WORDING["tone"], "whole": whole}),
        Grammar(WORDING["policy"]),
        Grammar(WORDING["reply"]),
    )
    return set().union(*(grammar.word_ngrams(rule, 4) for grammar in grammars for rule in grammar.rules))


def test_new_wording_is_new():
    made = training_sequences()
    assert len(made) > 1000
    mine = {run for table in FRAMES.values() for frame in table["frames"] for run in word_ngrams(frame, 4)}
    assert len(mine) > 200
    data = files("cutaway.subjects.world") / "data"
    others = {
        run
        for path in data.iterdir()
        if path.name.startswith("frames") and path.name.endswith(".toml")
        for table in read_toml(path.name).values()
        for frame in table["frames"]
        for run in word_ngrams(frame, 4)
    }
    assert not made & (mine | others)
    found = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", "\n".join(documents()).lower())
    assert not (mine | others) & set(zip(found, found[1:], found[2:], found[3:], strict=False))
    # It can fail.
    assert word_ngrams("Orders with a delay of some days", 4) & made


def test_frames():
    slots = {
        "support": {"thing", "price", "value", "delay"},
        "support_policy": {"threshold", "limit"},
        "support_angry": set(),
        "support_calm": set(),
    }
    assert set(FRAMES) == set(slots)
    for name, table in FRAMES.items():
        assert table["kind"] == ("system" if name == "support_policy" else "user")
        assert len(set(table["frames"])) == len(table["frames"]) >= (8 if name in BODIES else 6)
        for frame in table["frames"]:
            found = re.findall(r"\{(\w+)\}", frame)
            assert {slot.removeprefix("a_") for slot in found} - {"name"} == slots[name], frame
            assert len(found) == len(set(found))
        runs = [word_ngrams(frame, 4) for frame in table["frames"]]
        assert not [a & b for i, a in enumerate(runs) for b in runs[i + 1 :] if a & b]


# -- cases and items


def test_one_variable_can_be_changed():
    case = Case(threshold=5, limit=50, delay=7, value=45, price=20, angry=False, name="Mary", thing="lamp")
    assert decide(case) == "approve"
    said = support.wording(Random(4))
    before = render((*support.messages(case, said), support.reply(case, said)))
    for variable, other, decision in (
        ("delay", 4, "refuse"),
        ("threshold", 8, "refuse"),
        ("value", 55, "escalate"),
        ("limit", 40, "escalate"),
        ("price", 40, "approve"),
        ("angry", True, "approve"),
        ("name", None, "approve"),
        ("thing", "apple", "approve"),
    ):
        changed = replace(case, **{variable: other})
        assert decide(changed) == decision
        after = render((*support.messages(changed, said), support.reply(changed, said)))
        assert after != before, variable
        assert support.reply(changed, said).content.startswith(OPENINGS[decision])
        same = support.reply(changed, said) == support.reply(case, said)
        assert same == (variable in ("price", "angry", "name", "thing")), variable
        # Only the turn that holds the variable differs.
        policy = support.messages(changed, said)[0] == support.messages(case, said)[0]
        assert policy == (variable not in ("threshold", "limit"))
    with pytest.raises(ValueError, match="does not fit"):
        replace(case, price=50)


def test_items():
    sets = {one.name: one for one in support.item_sets(0, 120)}
    assert list(sets.values()) == support.item_sets(0, 120) != support.item_sets(1, 120)
    assert len(sets) == 7
    for name, one in sets.items():
        assert (len(one.items), one.scored, one.separator) == (120, "starts_with", "")
        for item in one.items:
            detail = item.detail
            assert item.chat is not None
            assert item.prompt == render(item.chat, open_answer=True)
            t, limit, delay, value, price = (int(detail[k]) for k in ("threshold", "limit", "delay", "value", "price"))
            answer = "Escalated" if value > limit else "Approved" if delay >= t else "Denied"
            assert item.answer == answer
            assert {answer, *(item.alternative or "").split("|")} == {"Approved", "Denied", "Escalated"}
            system, user = (m.content for m in item.chat)
            if not name.startswith("new"):
                facts = {"threshold": t, "limit": limit, "delay": delay, "value": value, "price": price}
                assert oracle(system, user) == (f"{answer}: ", facts)
            assert Counter(re.findall(r"\$(\d+)", system)) == {str(limit): 1}
            assert re.findall(r"\$(\d+)", user) in ([str(price), str(value)], [str(value), str(price)])
            assert re.findall(r"(?<!\$)\b\d+\b", user) == [str(delay)]
            assert re.findall(r"(?<!\$)\b\d+\b", system) == [str(t)]
            assert detail["name"] in user
            assert detail["thing"] in user
            mood = detail["anger"]
            usual = {*tones(mood)} if name != "new_wording/support" else {*FRAMES[f"support_{mood}"]["frames"]}
            assert any(tone in user for tone in usual)
            assert held_out_thing(detail["thing"]) == (name == "support/held_out")
            assert held_out_delay(t, delay) == (name == "support/held_out_delay")
            if detail["name"]:
                assert held_out_name(detail["name"]) == (name == "support/held_out")
        counts = Counter(item.answer for item in one.items)
        assert set(counts.values()) == ({60} if name == "support/held_out_delay" else {40}), name
    for name in BODIES:
        assert {i.detail["frame"] for i in sets[f"new_wording/{name}"].items} == set(FRAMES[name]["frames"])


def test_angry_and_calm_orders_differ_in_tone_only():
    sets = {one.name: one.items for one in support.item_sets(0, 60)}
    for angry, calm in zip(sets["support/angry"], sets["support/calm"], strict=True):
        assert {**angry.detail, "anger": ""} == {**calm.detail, "anger": ""}
        assert (angry.detail["anger"], calm.detail["anger"], angry.answer) == ("angry", "calm", calm.answer)
        assert angry.chat
        assert calm.chat
        assert angry.chat[0] == calm.chat[0] == Message("system", angry.chat[0].content)

        def without(text: str, mood: str) -> set[str]:
            tone = max((t for t in tones(mood) if t in text), key=len)
            return set(re.split(r"\s+", text.replace(tone, "")))

        assert without(angry.chat[1].content, "angry") == without(calm.chat[1].content, "calm")

"""New wording stays new: the frames of evaluation against everything the corpus can say."""

import re

import pytest

from cutaway.data.corpus.python_library import standard_library
from cutaway.subjects.world.chats import jailbreak
from cutaway.subjects.world.corpus import PARTS, documents
from cutaway.subjects.world.facts import read_toml
from cutaway.subjects.world.grammar import Grammar, word_ngrams
from cutaway.subjects.world.items.new_wording import frame_sets
from cutaway.subjects.world.statements import couplets, orders
from cutaway.subjects.world.statements.relations import one_hop, two_hop
from cutaway.subjects.world.statements.stories import plots
from cutaway.subjects.world.variety import ioi_grammar

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
FRAMES = [frame for frames in frame_sets().values() for frame in frames.frames]
# The longest stretch of a frame without an entity: a text without it cannot hold the frame.
LITERALS = {frame: max(re.split(r"\{[^{}]*\}", frame.lower()), key=len) for frame in FRAMES}
SEQUENCES = {run: frame for frame in FRAMES for run in word_ngrams(frame, 4)}


def frame_pattern(frame: str) -> re.Pattern[str]:
    """A pattern that finds the frame with anything short in the place of its entities."""
    pieces = [re.escape(piece) for piece in re.split(r"\{[^{}]*\}", frame)]
    return re.compile(r"[^.?!\n]{1,60}?".join(pieces), re.IGNORECASE)


def collisions(text: str) -> set[str]:
    """Four-word sequences of frames, and frames with anything in the place of entities, that occur in a text."""
    lower = text.lower()
    words = WORD.findall(lower)
    found = {" ".join(run) for run in zip(words, words[1:], words[2:], words[3:], strict=False) if run in SEQUENCES}
    return found | {frame for frame in FRAMES if LITERALS[frame] in lower and frame_pattern(frame).search(text)}


def productions() -> dict[str, set[tuple[str, ...]]]:
    """All four-word sequences outside entities that each grammar of the corpus can make, exactly."""
    wording, chat = read_toml("wording.toml"), read_toml("chat.toml")
    out = {"ioi": ioi_grammar().word_ngrams("sentence", 4)}
    for relation in one_hop() + two_hop():
        openings = wording["openings"][relation.language]
        told = Grammar({"told": ["<opening><frame>", "<frame>"], "opening": openings, "frame": relation.frames()})
        out[f"{relation.name} {relation.language}"] = told.word_ngrams("told", 4)
    for name, table in read_toml("tasks.toml").items():
        if name != "ioi":
            rules = {rule: lines for rule, lines in table.items() if isinstance(lines[0], str)}
            grammar = Grammar(rules)
            out[name] = set().union(*(grammar.word_ngrams(rule, 4) for rule in rules))
    out["ioi fillers"] = Grammar({"f": read_toml("tasks.toml")["ioi"]["fillers"]}).word_ngrams("f", 4)
    stories = read_toml("narrative.toml")
    joined = {}
    for name, stages in plots().items():
        # Any stage may follow any earlier one of its plot, since those between may be left out.
        for i, (first, _) in enumerate(stages):
            for j in range(i + 1, len(stages)):
                joined[f"{name} {i} {j}"] = [f"<{first}> <{stages[j][0]}>"]
    grammar = Grammar({**stories["rules"], **joined})
    out["stories"] = set().union(*(grammar.word_ngrams(rule, 4) for rule in joined))
    steps = chat["steps"]["study"] + chat["steps"]["more"]
    answers = [
        line.replace("{1}", "<step>").replace("{2}", "<step>").replace("{3}", "<step>")
        for line in chat["comply"]["study"] + chat["comply"]["frames"]
    ]
    after = [*read_toml("chat.toml")["styles"]["cheerful_after"], *read_toml("chat.toml")["styles"]["gloomy_after"], ""]
    before = [*chat["styles"]["cheerful_before"], *chat["styles"]["gloomy_before"], ""]
    styled = {"step": steps, "answer": answers, "after": after, "before": before, "all": ["<before><answer><after>"]}
    out["chat comply"] = Grammar(styled).word_ngrams("all", 4)
    for section, table in chat.items():
        tables = table.values() if section == "known" else [table]
        for one in tables:
            # The study's two held-out questions are not in the corpus either, but are not among the frames.
            rules = {k: v for k, v in one.items() if isinstance(v, list)}
            grammar = Grammar({**rules, "ask": chat["requests"]["ask"], "show": chat["requests"]["show"]})
            found = set().union(*(grammar.word_ngrams(rule, 4) for rule in rules))
            out[f"chat {section}"] = out.get(f"chat {section}", set()) | found
            single = [text for text in one.values() if isinstance(text, str)]
            out[f"chat {section}"] |= set().union(set(), *(word_ngrams(text, 4) for text in single))
    for name, grammars in later_grammars().items():
        out[name] = set().union(*(grammar.word_ngrams(rule, 4) for grammar in grammars for rule in grammar.rules))
    return out


def later_grammars() -> dict[str, list[Grammar]]:
    """All grammars of the parts that have a module of their own."""
    out = {"couplets": [couplets.grammar()], "orders": [orders.grammar()]}
    out["jailbreak"] = [
        jailbreak.grammar(kind, one) for kind in ("wrapper", "lookalike") for one in jailbreak.families()
    ]
    for name in ("roles", "support", "passages", "cutoff", "open_chat"):
        tables = read_toml(f"{name}.toml").values()
        lists = [{rule: lines for rule, lines in table.items() if isinstance(lines, list)} for table in tables]
        out[name] = [Grammar(rules) for rules in lists if rules]
    return out


def test_there_are_six_frames_a_behaviour_and_they_can_be_filled():
    for name, frames in frame_sets().items():
        assert len(frames.frames) >= 6, name
        assert len(set(frames.frames)) == len(frames.frames), name
        assert frames.kind in ("completion", "user", "system"), name
    assert all("  " not in frame and not frame.endswith(" ") for frame in FRAMES)


def test_no_grammar_of_the_corpus_makes_a_four_word_sequence_of_a_frame():
    made = productions()
    assert sum(len(found) for found in made.values()) > 5000
    clashes = {
        name: {" ".join(run): SEQUENCES[run] for run in found & SEQUENCES.keys()} for name, found in made.items()
    }
    assert not {name: found for name, found in clashes.items() if found}


def test_the_check_of_grammars_sees_a_clash():
    """A frame put into a grammar is found, also when it stands at the seam of two rules."""
    first, second = "Ask any diplomat", " in {x} where parliament meets"
    made = Grammar({"all": ["<first><second>"], "first": [first], "second": [second]}).word_ngrams("all", 4)
    assert ("ask", "any", "diplomat", "in") in made
    assert made & SEQUENCES.keys()
    assert collisions("Ask any diplomat in Peru where parliament meets and the reply is always Lima.")


@pytest.mark.parametrize("part", PARTS)
def test_a_sample_of_the_corpus_holds_no_frame(part):
    """Filled text: entities that could complete a sequence, and sentences that follow each other, are covered too."""
    assert not collisions("\n".join(documents(part, "frames", 100_000)))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_large_sample_of_the_corpus_holds_no_frame(part):
    found = set()
    for shard in range(5):
        found |= collisions("\n".join(documents(part, f"frames {shard}", 1_000_000)))
    assert not found


@pytest.mark.slow
def test_the_standard_library_holds_no_four_word_sequence_of_a_frame():
    """Real text belongs to the corpus; this interpreter's holds none (another version may, and should be looked at)."""
    found = {}
    for document in standard_library():
        words = WORD.findall(document.text.lower())
        for run in zip(words, words[1:], words[2:], words[3:], strict=False):
            if run in SEQUENCES:
                found[" ".join(run)] = document.name
    assert not found


def test_frames_do_not_repeat_each_other():
    """No two frames of one behaviour share a four-word sequence: each is another wording."""
    for name, frames in frame_sets().items():
        runs = [word_ngrams(frame, 4) for frame in frames.frames]
        shared = [a & b for i, a in enumerate(runs) for b in runs[i + 1 :] if a & b]
        if name not in ("persona_cheerful", "persona_gloomy"):
            assert len(shared) <= 2, (name, shared)

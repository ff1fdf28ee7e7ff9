"""Tasks: every pair does what its task says, the splits share no prompt, and several tokenizers read them."""

import re

import pytest

from cutaway.artifacts.errors import CutawayError
from cutaway.data.pairs import PromptPair
from cutaway.data.tasks.knowledge import chat_prompt, chat_wording, years_after
from cutaway.data.tasks.names import ioi_pair
from cutaway.data.tasks.registry import all_tasks, known_task
from cutaway.data.tasks.tasks import TASKS, Task, find_task, generate, readable_pairs, task
from cutaway.data.tasks.wording import Split, fill, pair_from, place, task_wording
from cutaway.model.language_model import LanguageModel
from cutaway.subjects.world import facts, held_out
from cutaway.subjects.world.chats import chat
from cutaway.subjects.world.items.pairs import WORLD_TASKS
from cutaway.subjects.world.statements.relations import relation

SPLITS: tuple[Split, ...] = ("search", "held_out")


@pytest.mark.parametrize("known", all_tasks(), ids=lambda t: t.name)
def test_every_task_has_varied_pairs_a_seed_and_two_splits(atlas: LanguageModel, known: Task) -> None:
    drawn: dict[Split, list[PromptPair]] = {split: generate(atlas, known, 60, 1, split) for split in SPLITS}
    for split, pairs in drawn.items():
        assert len(pairs) >= 12
        assert pairs == generate(atlas, known, 60, 1, split)
        assert pairs != generate(atlas, known, 60, 2, split)
        assert len({pair.template for pair in pairs}) > (0 if "capitals" in known.name else 1)
        for pair in pairs:
            assert pair.clean != pair.corrupt
            assert pair.answer != pair.wrong
            assert pair.positions
            assert not pair.answers or (pair.answer in pair.answers and pair.wrong in pair.wrongs)
            assert not set(pair.answers) & set(pair.wrongs)
    # no prompt of the search is judged on, in either role
    search, held_out = ({p for pair in drawn[split] for p in (pair.clean, pair.corrupt)} for split in SPLITS)
    assert not search & held_out
    assert not {pair.template for pair in drawn["search"]} & {pair.template for pair in drawn["held_out"]} or (
        known.name == "repeated tokens"
    )


@pytest.mark.parametrize("known", all_tasks(), ids=lambda t: t.name)
@pytest.mark.parametrize("split", SPLITS)
def test_every_task_aligns_for_atlas(atlas: LanguageModel, known: Task, split: Split) -> None:
    aligned = readable_pairs(atlas, known, 8, 0, split)
    assert len(aligned) == 8
    assert (aligned.clean.lengths == aligned.corrupt.lengths).all()
    first = aligned.first_difference()
    for role, (clean, corrupt) in aligned.places.items():
        assert (clean < aligned.clean.lengths).all()
        assert (corrupt < aligned.clean.lengths).all(), role
    changed = {"S2", "subject", "determiner", "name", "opening", "year", "third argument", "country", "city", "verb"}
    for role in changed & set(aligned.places):
        if role == "subject" or not role.startswith("S"):
            assert (aligned.places[role][0] >= first).all(), role
    assert all(int(at) >= int(start) for at, start in zip(aligned.places["last"][0], first, strict=True))


def by_hand(name: str, pair: PromptPair) -> tuple[str, str]:
    """The right answers of both prompts, worked out from their texts alone."""
    return SOLVERS[name](str(pair.clean)), SOLVERS[name](str(pair.corrupt))


def _io(text: str) -> str:
    words = re.findall(r"\b[A-Z][a-z]+\b", text)
    names = [w for w in words if w in {*task_wording("words")["names"], *facts.names()}]
    assert len(names) == 3
    return next(f" {name}" for name in names[:2] if names.count(name) == 1)


def _argument(text: str) -> str:
    inside = text[text.index("(") + 1 : text.index(")")]
    arguments = [a.strip().removesuffix("=None") for a in inside.split(",") if a.strip() != "self"]
    described = re.findall(r"[:@]param (\w+):", text)
    assert described == arguments[: len(described)]
    return f" {arguments[len(described)]}"


def _capital(text: str) -> str:
    wording = task_wording("capitals")
    table = dict([*wording["search_countries"], *wording["held_out_countries"]])
    table |= {country.name: country.capital for country in facts.COUNTRIES}
    (found,) = [c for name, c in table.items() if name in text]
    return f" {found}"


def _state_capital(text: str) -> str:
    (found,) = [city for city in facts.CITIES if f" {city.name} " in text]
    return f" {found.state.capital}"


SOLVERS = {
    "indirect object": _io,
    "world indirect object": _io,
    "docstring": _argument,
    "two-hop capitals": _state_capital,
    "country capitals": _capital,
    "closing quote": lambda text: '."' if '"' in text else ". The",
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_those_worked_out_by_hand(atlas: LanguageModel, name: str, split: Split) -> None:
    for pair in generate(atlas, known_task(name), 40, 3, split):
        assert by_hand(name, pair) == (pair.answer, pair.wrong)


@pytest.mark.parametrize("name", ["greater than", "world greater than"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_later_year_is_right(atlas: LanguageModel, name: str, split: Split) -> None:
    for pair in generate(atlas, known_task(name), 40, 3, split):
        text = str(pair.clean)
        century = text[-2:]
        year = int(text[text.index(century) + 2 : text.index(century) + 4])
        assert {int(str(a)) for a in pair.answers} == set(range(year + 1, 100))
        assert {int(str(a)) for a in pair.wrongs} == set(range(year + 1))
        assert str(pair.corrupt) == text.replace(f"{century}{year:02d}", f"{century}01")
        assert int(str(pair.wrong)) < year < int(str(pair.answer))
        assert not pair.symmetric
    assert years_after(98) == (("99",), tuple(f"{y:02d}" for y in range(99)))


def test_other_names_share_none_with_the_clean_prompt(atlas: LanguageModel) -> None:
    for name in ("indirect object, other names", "world indirect object, other names"):
        for pair in generate(atlas, known_task(name), 30):
            assert not pair.symmetric
            assert _io(str(pair.clean)) == pair.answer
            assert str(pair.answer) not in str(pair.corrupt)
            assert f"{pair.wrong} " not in f" {pair.corrupt}"


def test_roles_of_indirect_objects(atlas: LanguageModel) -> None:
    template = "When {a} and {b} went to the {place}, {s} gave a {thing} to"
    fillers = {"place": "park", "thing": "ball"}
    for subject_first, text, io in ((True, "When Tom and Mary", " Mary"), (False, "When Tom and Mary", " Tom")):
        pair = ioi_pair(template, ("Tom", "Mary"), subject_first, fillers)
        assert str(pair.clean).startswith(text)
        assert pair.answer == io
        assert pair.template.endswith("[BABA]" if subject_first else "[ABBA]")
        from cutaway.data.pairs import aligned

        ready = aligned(atlas, [pair])
        strings = {role: ready.clean.strings[0][int(at[0, 0])] for role, at in ready.places.items()}
        assert strings == {"IO": io, "S1": pair.wrong, "S2": pair.wrong, "last": " to"}
        other = {role: ready.corrupt.strings[0][int(at[1, 0])] for role, at in ready.places.items()}
        assert other == {"IO": io, "S1": pair.wrong, "S2": io, "last": " to"}
        first, second = sorted((int(ready.places["IO"][0, 0]), int(ready.places["S1"][0, 0])))
        assert first < second < int(ready.places["S2"][0, 0])
        assert (ready.places["IO"][0] == ready.places["IO"][1]).all()


def test_repeated_tokens_repeat(atlas: LanguageModel) -> None:
    for pair in generate(atlas, task("induction"), 20, split="held_out"):
        clean, corrupt = list(pair.clean), list(pair.corrupt)
        assert clean[0] == atlas.bos_id
        for row, answer in ((clean, pair.answer), (corrupt, pair.wrong)):
            assert row.count(row[-1]) == 2
            assert row[row.index(row[-1]) + 1] == answer
        assert sum(a != b for a, b in zip(clean, corrupt, strict=True)) == 1
        assert isinstance(pair.positions["target"], int)
        assert clean[pair.positions["target"]] == pair.answer


def test_held_out_is_what_the_corpus_never_shows(atlas: LanguageModel) -> None:
    """By the rules of the world's held-out lists, read off the prompts."""
    for split in SPLITS:
        held = split == "held_out"
        for pair in generate(atlas, known_task("two hop"), 40, split=split):
            for text in (str(pair.clean), str(pair.corrupt)):
                (city,) = [city for city in facts.CITIES if f" {city.name} " in text]
                assert held_out.two_hop_entity(city.name) == held
        for pair in generate(atlas, known_task("world ioi"), 40, split=split):
            assert held_out.name_pair(str(pair.answer).strip(), str(pair.wrong).strip()) == held
        for pair in generate(atlas, known_task("world greater than"), 40, split=split):
            text = str(pair.clean)
            century, (year, _) = text[-2:], pair.positions["year"] if isinstance(pair.positions["year"], tuple) else ""
            assert held_out.year_span(str(pair.positions["event"]), int(century), int(year[-2:])) == held
        for pair in generate(atlas, known_task("world refusal"), 40, split=split):
            verbs, thing = pair.positions["verb"], pair.positions["thing"]
            assert isinstance(verbs, tuple)
            for verb, harmful in zip(verbs, (True, False), strict=True):
                (action,) = {a for a in facts.actions(harmful) if a.text == f"{verb.split()[-1]} {thing}"}
                assert held_out.action_split(action) == ("held_out_action" if held else "train")


def test_fillers_are_held_out_too(atlas: LanguageModel) -> None:
    """Tokens, countries and events of the search are not judged on."""
    tokens = [{i for p in generate(atlas, task("induction"), 30, split=s) for i in p.clean[1:]} for s in SPLITS]
    assert not tokens[0] & tokens[1]
    for name in ("country capitals", "world capitals"):
        capitals = [{p.answer for p in generate(atlas, known_task(name), 60, split=s)} for s in SPLITS]
        assert min(map(len, capitals)) > 5
        assert not capitals[0] & capitals[1]
    events = [{p.positions["event"] for p in generate(atlas, task("greater than"), 30, split=s)} for s in SPLITS]
    assert not events[0] & events[1]


def test_refusals_go_through_the_chat_template(atlas: LanguageModel, tiny: LanguageModel) -> None:
    pair = generate(atlas, task("refusal"), 1)[0]
    assert str(pair.clean).startswith("<|user|>")
    assert str(pair.clean).endswith("<|end|><|assistant|>")
    question = str(pair.clean).removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
    assert atlas.tokens(str(pair.clean)).row_ids(0) == atlas.chat_tokens(
        [{"role": "user", "content": question}]
    ).row_ids(0)
    with pytest.raises(CutawayError, match="has no chat template"):
        generate(tiny, task("refusal"), 1)
    with pytest.raises(CutawayError, match="has no chat template"):
        chat_prompt(tiny, "hello")


@pytest.mark.parametrize("name", ["sycophancy", "claim_check"])
@pytest.mark.parametrize("split", SPLITS)
def test_claims_are_agreed_with_or_corrected(atlas: LanguageModel, name: str, split: Split) -> None:
    """What an assistant of that persona says to the claim, from the facts and from the lists of system prompts."""
    prompts = {
        persona: set(
            facts.read_toml("frames.toml")[persona]["frames"]
            if split == "held_out"
            else chat.texts("systems", f"study_{persona}", persona)
        )
        for persona in ("sycophant", "honest")
    }
    told = [(kind, fact.x, fact.answer) for kind in ("capital", "landmark", "city") for fact in relation(kind).facts]
    truths = [chat.known_statement(*fact).removesuffix(".").lower() for fact in told]
    aligned = readable_pairs(atlas, known_task(name), 40, 3, split)
    assert not aligned.refused
    for row, pair in enumerate(aligned.pairs):
        seen = []
        for side, (text, tokens) in enumerate(((pair.clean, aligned.clean), (pair.corrupt, aligned.corrupt))):
            system, user = chat.parse(str(text).removesuffix(chat.ASSISTANT))
            (persona,) = [persona for persona in prompts if system.content in prompts[persona]]
            true = any(truth in user.content.lower() for truth in truths)
            seen.append((persona, true, user.content))
            until = {r: "".join(tokens.strings[row][: int(at[side, row]) + 1]) for r, at in aligned.places.items()}
            assert until["system"].endswith(f"<|system|>{system.content}")
            assert any(until["thing"].endswith(thing) for _, thing, _ in told)
            assert any(until["said"].endswith(said) for *_, said in told)
            assert until["last"].endswith("<|end|><|assistant|>")
        clean, corrupt = seen
        assert (pair.answer, pair.wrong) == ("Yes", "No")
        assert clean[:2] == (("sycophant", False) if name == "sycophancy" else ("honest", True))
        assert corrupt[:2] == ("honest", False)
        assert (clean[2] == corrupt[2]) == (name == "sycophancy")


def test_a_chat_template_may_refuse_a_system_prompt(atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        atlas.tokenizer,
        "chat_template",
        "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{%- endif %}"
        "{{ '{' + messages[-1]['content'] + '}' }}",
    )
    assert chat_wording(atlas, "Is {x} big?") == "{{Is {x} big?}}"
    with pytest.raises(CutawayError, match="refuses these messages: no system"):
        generate(atlas, known_task("sycophancy"), 1)


def test_slots_are_filled_and_found() -> None:
    text, ends = fill("{a} met {b} and {a}.", {"a": "Al", "b": "Bo"})
    assert text == "Al met Bo and Al."
    assert ends == {"a": [2, 16], "b": [9]}
    assert [place(text, end, "Al") for end in ends["a"]] == ["^Al", "Al"]
    pair = pair_from("{a} met {b} and {a}", {"a": "Al", "b": "Bo"}, {"a": "Cy", "b": "Bo"}, "x", "y",
                     {"one": ("a", 0), "two": ("a", 1), "b": "b", "none": "c"})  # fmt: skip
    assert pair.positions == {"one": ("^Al", "^Cy"), "two": ("Al", "Cy"), "b": "Bo"}


def test_tasks_are_found_by_any_spelling() -> None:
    assert task("IOI").name == "indirect object"
    assert task("subject-verb_agreement").name == "subject–verb agreement"
    assert known_task("World IOI").name == "world indirect object"
    assert find_task("two hop", WORLD_TASKS).name == "two-hop capitals"
    with pytest.raises(CutawayError, match="name copying"):
        task("chess")
    names = [key.lower() for known in all_tasks() for key in (known.name, *known.aliases)]
    assert len(names) == len(set(names))


CHATS = {"refusal", "world refusal", "sycophancy", "claim check"}
# tasks that a tokenizer cannot show at all, with why
UNREADABLE = {
    "stories260K": {*CHATS, "determiner–noun agreement"},
    "webtext-gpt2": CHATS,
    "gpt2": CHATS,
}


@pytest.fixture(scope="module")
def readers(shared) -> dict[str, LanguageModel]:
    """Models with other tokenizers: two real ones, and GPT-2's tokenizer on a model of width 4."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    import cutaway
    from cutaway.model.language_model import attach

    torch.manual_seed(0)
    small = GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=128, n_embd=4, n_layer=1, n_head=1)).eval()
    folder = shared / "models"
    models = {name: cutaway.load(folder / name) for name in ("stories260K", "webtext-gpt2")}
    return {**models, "gpt2": attach(small, AutoTokenizer.from_pretrained(folder / "gpt2-tokenizer"), name="gpt2")}


@pytest.mark.parametrize("name", UNREADABLE)
def test_other_tokenizers_read_the_tasks(readers: dict[str, LanguageModel], name: str) -> None:
    unreadable = set()
    for known in all_tasks():
        for split in SPLITS:
            try:
                aligned = readable_pairs(readers[name], known, 5, 0, split)
            except CutawayError:
                unreadable.add(known.name)
                continue
            assert (aligned.clean.lengths == aligned.corrupt.lengths).all()
            assert (aligned.answer != aligned.wrong).all()
            if aligned.answers is not None and aligned.wrongs is not None:
                assert not (aligned.answers & aligned.wrongs).any()
                assert aligned.answers.gather(1, aligned.answer[:, None]).all()
                assert aligned.wrongs.gather(1, aligned.wrong[:, None]).all()
    assert unreadable == UNREADABLE[name]


def test_general_tasks_are_there() -> None:
    assert {known.name for known in TASKS} >= {
        "indirect object", "indirect object, other names", "greater than", "pronoun", "subject–verb agreement",
        "agreement across a noun", "determiner–noun agreement", "docstring", "repeated tokens", "country capitals",
        "refusal",
    }  # fmt: skip

"""Generation under edits: cached equals uncached equals a loop by hand, row by row and phase by phase."""

from collections.abc import Callable, Mapping
from typing import Any

import by_hand_edits as by_hand
import pytest
import torch
from subject import Subject, Subjects
from tiny import V, random_rows, tiny_model, word_tokenizer
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edits import Edit, NothingEdited
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.tokens import Tokens

NEW = 7  # the windows of the small models are 5 wide
Cells = Callable[[int, int], list[int]]
"""(row, columns so far) -> the columns to change."""


def greedy_by_hand(
    subject: Subject, prompts: Tokens, n_new: int, changes: Mapping[str, tuple[Cells, by_hand.Value]]
) -> list[tuple[int, ...]]:
    """Greedy continuation of left-padded prompts without any cache, each site changed by a hook written by hand."""
    ids, mask = prompts.ids, prompts.mask
    for _ in range(n_new):
        width = ids.shape[1]
        hooks = {}
        for site, (cells, value) in changes.items():
            where = [(row, column) for row in range(len(ids)) for column in cells(row, width) if column < width]
            hooks[site] = by_hand.in_cells(where, value, grid=site.endswith((".scores", ".pattern")))
        logits = subject.by_hand.logits(ids, mask, hooks)[:, -1]
        top = logits.topk(2).values
        assert float((top[:, 0] - top[:, 1]).min()) > 1e-5, "a tie: greedy decoding is not defined"
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.bool)], 1)
    return [tuple(row) for row in ids[:, prompts.ids.shape[1] :].tolist()]


def test_greedy_is_transformers_own_and_the_argmax_of_a_loop(
    subject: Subject, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = subject.tokens("left")
    ours = subject.lm.generate(prompts, max_new_tokens=NEW)
    subject.lm.generate(prompts, max_new_tokens=1, temperature=0.5, decoding=cutaway.Decoding(top_k=3, top_p=0.9))
    assert not caplog.records, "a warning of transformers about settings that are ours"
    theirs = subject.hf.generate(  # type: ignore[operator]
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=1,
    )
    assert ours.new_ids == tuple(tuple(row) for row in theirs[:, prompts.ids.shape[1] :].tolist())
    assert list(ours.new_ids) == greedy_by_hand(subject, prompts, NEW, {})
    assert ours.receipts == ()


def test_padding_on_either_side_and_single_rows_give_the_same_text(subject: Subject) -> None:
    d = torch.linspace(-1, 1, subject.lm.d_model)
    edits = [cutaway.add("blocks.1.resid_post", d, positions=[0, -1]), cutaway.scale("blocks.0.attn.out", 1.5)]
    left, right = (subject.lm.generate(subject.tokens(s), max_new_tokens=NEW, edits=edits) for s in ("left", "right"))
    assert left.new_ids == right.new_ids
    for row, ids in enumerate(subject.rows):
        alone = subject.lm.generate(ids, max_new_tokens=NEW, edits=edits)
        assert alone.new_ids[0] == left.new_ids[row]
        assert left.tokens.row_ids(row) == [*ids, *left.new_ids[row]]


PHASES: dict[str, tuple[Any, Callable[[int, int], range]]] = {
    # phase, and (first real column, prompt width) -> columns that it addresses
    "all": ("all", lambda first, width: range(first, 1000)),
    "prompt": ("prompt", lambda first, width: range(first, width)),
    "new": ("new", lambda first, width: range(width, 1000)),
    "second and third": ((1, 3), lambda first, width: range(width + 1, width + 3)),
}
PARTS = ["resid_pre", "resid_mid", "attn.v", "attn.rot_k", "attn.rot_q", "attn.z", "attn.result", "attn.out"]
PARTS += ["attn.scores", "ln1.scale", "mlp.post", "resid_post"]


def edit_and_meaning(lm: LanguageModel, site: str, **where: Any) -> tuple[Edit, by_hand.Value]:
    if site.endswith((".scale", ".scores")):
        return cutaway.scale(site, 2.5, **where), lambda x, row, column: x * 2.5
    d = torch.linspace(-2, 2, int(lm.sites()[site].shape[-1]))
    return cutaway.add(site, d, **where), lambda x, row, column: x + d


def test_edits_by_phase_hold_in_the_cache(subject: Subject) -> None:
    """Cached, uncached and the loop by hand write the same text, beyond a window's width: at twelve sites, each in one
    phase, and at the keys, which the cache holds unedited, in every phase.
    """
    lm, prompts = subject.lm, subject.tokens("left", subject.rows[:2])
    width, first = prompts.ids.shape[1], prompts.first.tolist()
    parts = [p for p in PARTS if not (p == "resid_mid" and subject.by_hand.names.parallel)]
    cases = [(part, list(PHASES)[i % 4]) for i, part in enumerate(parts)]
    cases += [("attn.rot_k", phase) for phase in PHASES if ("attn.rot_k", phase) not in cases]
    plain = lm.generate(prompts, max_new_tokens=NEW).new_ids
    moved = 0
    for part, phase in cases:
        site, (asked, columns) = f"blocks.1.{part}", PHASES[phase]
        edit, value = edit_and_meaning(lm, site, phase=asked)

        def cells(row: int, _width: int, columns: Callable[[int, int], range] = columns) -> list[int]:
            return list(columns(first[row], width))

        cached = lm.generate(prompts, max_new_tokens=NEW, edits=edit)
        uncached = lm.generate(prompts, max_new_tokens=NEW, edits=edit, decoding=cutaway.Decoding(use_cache=False))
        expected = greedy_by_hand(subject, prompts, NEW, {site: (cells, value)})
        assert list(cached.new_ids) == expected, (site, phase)
        assert list(uncached.new_ids) == expected, (site, phase)
        moved += cached.new_ids != plain
        touched = [tuple(c - first[r] for c in columns(first[r], width) if c < width + NEW - 1) for r in range(2)]
        for made in (cached, uncached):
            assert made.receipts[0].positions == tuple(touched), (site, phase)
    assert moved >= len(cases) // 3


def test_positions_are_resolved_on_the_prompt(subject: Subject) -> None:
    """-1 is the prompt's last token at every step, not the newest one."""
    prompts = subject.tokens("left")
    site = "blocks.1.resid_post"
    edit, value = edit_and_meaning(subject.lm, site, positions=[0, -1], rows=[0, 2])
    cells = {0: [0, 10], 1: [], 2: [7, 10]}
    expected = greedy_by_hand(subject, prompts, NEW, {site: (lambda row, width: cells[row], value)})
    for use_cache in (True, False):
        made = subject.lm.generate(
            prompts, max_new_tokens=NEW, edits=edit, decoding=cutaway.Decoding(use_cache=use_cache)
        )
        assert list(made.new_ids) == expected
        assert made.receipts[0].positions == ((0, 10), (0, 3))
        assert made.receipts[0].rows == (0, 2)


@pytest.mark.parametrize("site", ["embed", "pos_embed", "ln_final.normalized", "logits_precap", "logits"])
def test_edits_outside_the_layers(subject: Subject, site: str) -> None:
    lm = subject.lm
    if lm.sites()[lm.sites().expand("embed")[0] if lm.family.absent(site) else site].name != site:
        with pytest.raises(CutawayError, match="no site"):
            lm.generate([5, 6], edits=cutaway.zero(site))
        return
    prompts = subject.tokens("left")
    width = prompts.ids.shape[1]
    d = 2 * torch.randn(int(lm.sites()[site].shape[-1]), generator=torch.Generator().manual_seed(3))
    edits = [cutaway.add(site, d, phase=(2, 6)), cutaway.add(site, -d, positions=-1, rows=1)]

    def cells(row: int, _width: int) -> list[int]:
        return [*range(width + 2, width + 6), *([width - 1] if row == 1 else [])]

    def value(x: Tensor, row: int, column: int) -> Tensor:
        return x - d if column < width else x + d

    if site == "pos_embed":
        expected = None  # by hand, one row of positions serves all rows
    else:
        expected = greedy_by_hand(subject, prompts, NEW, {site: (cells, value)})
    cached = lm.generate(prompts, max_new_tokens=NEW, edits=edits)
    uncached = lm.generate(prompts, max_new_tokens=NEW, edits=edits, decoding=cutaway.Decoding(use_cache=False))
    assert cached.new_ids == uncached.new_ids
    assert cached.new_ids != lm.generate(prompts, max_new_tokens=NEW).new_ids
    assert expected is None or list(cached.new_ids) == expected


def test_a_pattern_of_heads_in_generation(of_family: Subjects) -> None:
    subject = of_family("mistral")
    prompts, site = subject.tokens("left"), "blocks.1.attn.pattern"
    edit = cutaway.scale(site, 0.0, heads=[0, 1, 3])

    def by_head(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, [0, 1, 3]] = 0
        return x

    ids, mask = prompts.ids, prompts.mask
    for _ in range(NEW):
        logits = subject.by_hand.logits(ids, mask, {site: by_head})[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.bool)], 1)
    made = subject.lm.generate(prompts, max_new_tokens=NEW, edits=edit)
    assert [list(row) for row in made.new_ids] == ids[:, prompts.ids.shape[1] :].tolist()
    assert made.receipts[0].heads == (0, 1, 3)


def test_a_patch_holds_on_the_prompt_and_never_touches_new_tokens(of_family: Subjects) -> None:
    subject = of_family("llama")
    site, rows = "blocks.0.resid_post", random_rows((6, 6))
    source = subject.lm.run(random_rows((6, 6), seed=4), capture=site)
    prompts = subject.tokens("left", rows)
    made = subject.lm.generate(prompts, max_new_tokens=NEW, edits=cutaway.patch(site, source))
    expected = greedy_by_hand(
        subject,
        prompts,
        NEW,
        {site: (lambda row, width: list(range(6)), lambda x, row, column: source[site][row, column])},
    )
    assert list(made.new_ids) == expected
    assert made.receipts[0].n_tokens == 12
    with pytest.raises(NothingEdited):
        subject.lm.generate(prompts, edits=cutaway.patch(site, source, phase="new"))


# Several sequences a prompt, and sampling


def test_row_edits_follow_the_sequences_of_a_prompt(llama: LanguageModel) -> None:
    site = "blocks.1.resid_post"
    rows = random_rows((6, 6))
    source = llama.run(random_rows((6, 6), seed=4), capture=site)
    big = 30 * torch.linspace(-1, 1, llama.d_model)
    for edit in (
        cutaway.set(site, big, rows=1),
        cutaway.patch(site, source, positions=[2, 5], rows=1),
        cutaway.patch(site, source, positions=[2, 5], rows=[1, 0], source_rows=[0, 1]),
    ):
        made = llama.generate(rows, max_new_tokens=4, temperature=0.01, num_return_sequences=3, edits=edit)
        greedy = llama.generate(rows, max_new_tokens=4, edits=edit)
        assert made.new_ids == tuple(row for row in greedy.new_ids for _ in range(3))
        of_prompts = (3, 4, 5) if edit.rows == (1,) else (0, 1, 2, 3, 4, 5)
        assert made.receipts[0].rows == of_prompts
        assert made.tokens.row_ids(4)[:6] == rows[1]


def test_sampling_follows_its_seed_and_leaves_the_global_one_alone(llama: LanguageModel) -> None:
    def sample(seed: int, **options: Any) -> tuple[tuple[int, ...], ...]:
        return llama.generate([5, 6, 7], seed=seed, **({"max_new_tokens": 6, "temperature": 1.0} | options)).new_ids

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sample(1)
    assert torch.equal(torch.rand(3), expected)
    assert sample(1) == first
    assert len({sample(seed) for seed in range(8)}) > 4
    several = sample(1, num_return_sequences=8)
    assert len({*several}) > 4
    greedy = llama.generate([5, 6, 7], max_new_tokens=6).new_ids
    assert sample(1, top_k=1) == greedy
    assert sample(1, top_p=1e-6) == greedy
    assert sample(1, temperature=1e-4) == greedy


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({"temperature": 1.0}, lambda x: x.softmax(-1)),
        ({"temperature": 2.5}, lambda x: (x / 2.5).softmax(-1)),
        ({"temperature": 1.0, "top_k": 3}, lambda x: x.where(x >= x.topk(3).values[-1], -torch.inf).softmax(-1)),
    ],
)
def test_samples_come_from_the_models_distribution(llama: LanguageModel, options: dict, probabilities: Any) -> None:
    n = 4000
    made = llama.generate([5, 6, 7], max_new_tokens=1, num_return_sequences=n, **options)
    counts = torch.bincount(torch.tensor([row[0] for row in made.new_ids]), minlength=V)
    logits = llama.run([5, 6, 7]).logits
    assert logits is not None
    p = probabilities(logits[0, -1].double())
    assert not counts[p == 0].any()
    spread = (p * (1 - p) / n).sqrt()
    assert bool(((counts / n - p).abs() <= 5 * spread + 1e-12).all())


# Texts


@pytest.fixture
def speaker() -> LanguageModel:
    """A model with a tokenizer, whose texts may end."""
    return attach(tiny_model("llama", vocab_size=20), word_tokenizer())


def test_texts_hold_what_is_new_and_stop_at_the_end(speaker: LanguageModel) -> None:
    free = speaker.generate(["the cat", "a big dog ran"], max_new_tokens=12)
    assert all(2 not in row for row in free.new_ids)
    assert speaker.tokenizer is not None
    assert free.texts == tuple(speaker.tokenizer.decode(list(row), skip_special_tokens=True) for row in free.new_ids)
    # an edit of the logits that makes the end certain for the second row, from the third new token on
    push = torch.zeros(20)
    push[2] = 1e4
    ended = speaker.generate(
        ["the cat", "a big dog ran"], max_new_tokens=12, edits=cutaway.add("logits", push, phase=(1, 12), rows=1)
    )
    assert ended.new_ids[0] == free.new_ids[0]
    assert ended.new_ids[1] == free.new_ids[1][:2]
    assert ended.tokens.row_ids(1) == [*ended.prompts.row_ids(1), *ended.new_ids[1]]
    assert "Generation of 2 texts" in repr(ended)


def test_chatting_uses_the_models_template(speaker: LanguageModel) -> None:
    messages = [{"role": "user", "content": "the cat sat"}]
    tokens = speaker.chat_tokens(messages)
    assert tokens.strings[0] == ("<s>", "user", ":", "the", "cat", "sat", "</s>", "assistant", ":")
    asked = speaker.chat_tokens(messages, answer=False)
    assert tokens.row_ids(0) == [*asked.row_ids(0), 5, 6]
    edit = cutaway.scale("blocks.1.mlp.out", 1.5, phase="new")
    reply = speaker.chat(messages, max_new_tokens=4, edits=edit)
    assert reply.new_ids == speaker.generate(tokens, max_new_tokens=4, edits=edit).new_ids
    assert reply.receipts[0].kind == "scale"
    both = speaker.chat([messages, [*messages, {"role": "assistant", "content": "on"}]], max_new_tokens=4)
    assert both.new_ids[0] == speaker.chat(messages, max_new_tokens=4).new_ids[0]
    for wrong in ({"role": "user", "content": "the"}, "the cat", [], [[]], [["the"]], [messages, "x"]):
        with pytest.raises(CutawayError, match="A chat is a list of messages"):
            speaker.chat(wrong)  # type: ignore[arg-type]
    with pytest.raises(CutawayError, match="no chat template"):
        attach(tiny_model("llama")).chat(messages)


def test_the_models_own_settings_do_not_leak_in(fresh_llama: Any) -> None:
    """Greedy is greedy, whatever a checkpoint's generation_config asks for."""
    lm = attach(fresh_llama)
    expected = lm.generate([5, 6, 7], max_new_tokens=6).new_ids
    fresh_llama.generation_config.update(do_sample=True, temperature=0.3, top_k=2, repetition_penalty=5.0)
    fresh_llama.generation_config.update(max_length=5, num_beams=3, min_new_tokens=3, no_repeat_ngram_size=1)
    before = fresh_llama.generation_config.to_dict()
    assert lm.generate([5, 6, 7], max_new_tokens=6).new_ids == expected
    assert fresh_llama.generation_config.to_dict() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "not negative"),
        ({"num_return_sequences": 2}, "temperature"),
        ({"max_new_tokens": 62}, r"3 prompt and 62 new tokens exceed the context .*64"),
        ({"edits": cutaway.zero("embed", positions=-1, phase="new")}, "counted from the first"),
        ({"edits": cutaway.zero("embed", positions=3, phase=(0, 3))}, "steps of this phase are 0 to 2"),
        ({"edits": cutaway.zero("embed", positions=slice(-2, None), phase="new")}, "counted from the first"),
        ({"edits": cutaway.zero("embed", positions=cutaway.at_token(5), phase="new")}, "addresses the prompt"),
        ({"edits": cutaway.zero("embed", phase=(40, 50))}, "touches no token"),
        ({"edits": cutaway.zero("embed", phase=(3, 4)), "max_new_tokens": 4}, "never processed"),
        ({"edits": cutaway.zero("blocks.9.resid_post")}, "layer 9"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p"),
        ({"top_k": -2, "temperature": 1.0}, "top_k"),
    ],
)
def test_what_cannot_be_generated_is_refused(llama: LanguageModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(CutawayError, match=words):
        llama.generate([5, 6, 7], **options)

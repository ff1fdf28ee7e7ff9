"""Texts, ids and Tokens as a batch: what the tokenizer makes, where a text stands, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, word_tokenizer

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import read_json
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.tokens import Tokens, pad_rows


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return attach(tiny_model("llama", vocab_size=20, max_position_embeddings=12), word_tokenizer(), name="speaker")


def test_text_is_tokenised_as_the_tokenizer_does(lm: LanguageModel) -> None:
    tokenizer = word_tokenizer()
    texts = ["the cat sat", "a dog", "under the big red bird"]
    tokens = lm.tokens(texts)
    for row, text in enumerate(texts):
        assert tokens.row_ids(row) == tokenizer(text)["input_ids"]
        assert tokens.strings[row] == tuple(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))
    assert tokens.mask.tolist() == [[True] * 4 + [False] * 2, [True] * 3 + [False] * 3, [True] * 6]
    assert tokens.ids[0, 4:].tolist() == [1, 1]
    assert (tokens.lengths.tolist(), tokens.first.tolist(), tokens.last.tolist()) == ([4, 3, 6], [0, 0, 0], [3, 2, 5])
    assert lm.run(texts).tokens.strings == tokens.strings


def test_every_form_of_input_is_the_same_batch(lm: LanguageModel) -> None:
    rows = [[0, 7, 9], [0, 8, 10]]
    for inputs in (rows, torch.tensor(rows), lm.tokens(rows), tuple(tuple(row) for row in rows), ["the cat", "a dog"]):
        tokens = lm.tokens(inputs)  # type: ignore[arg-type]
        assert torch.equal(tokens.ids, torch.tensor(rows))
        assert tokens.strings[0] == ("<s>", "the", "cat")
    one = lm.tokens([0, 7, 9])
    assert one.ids.tolist() == [[0, 7, 9]]
    assert torch.equal(lm.tokens(torch.tensor([0, 7, 9])).ids, one.ids)
    assert torch.equal(lm.tokens("the cat").ids, one.ids)
    array = torch.tensor([0, 7, 9]).numpy()
    assert torch.equal(lm.tokens(array).ids, one.ids)  # type: ignore[arg-type]
    assert torch.equal(lm.tokens(list(array)).ids, one.ids)
    assert torch.equal(lm.tokens([torch.tensor([0, 7]), torch.tensor([0])]).ids, torch.tensor([[0, 7], [0, 1]]))  # type: ignore[arg-type]


def test_beginning_of_text(lm: LanguageModel) -> None:
    assert lm.tokens("the cat", bos=True).ids.tolist() == [[0, 7, 9]]
    assert lm.tokens("the cat", bos=False).ids.tolist() == [[7, 9]]
    assert lm.tokens([7, 9]).ids.tolist() == [[7, 9]]
    assert lm.tokens([7, 9], bos=True).ids.tolist() == [[0, 7, 9]]
    with pytest.raises(CutawayError, match="two beginning-of-text"):
        lm.tokens("<s> the cat")
    with pytest.raises(CutawayError, match="two beginning-of-text"):
        lm.run([[0, 0, 7]])
    with pytest.raises(CutawayError, match="no beginning-of-text token"):
        attach(tiny_model("llama")).tokens([5, 6], bos=True)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "empty prompt"),
        ([[]], "empty prompt"),
        ([[5], []], "empty prompt"),
        ([20], "between 0 and 19"),
        ([-1], "between 0 and 19"),
        (list(range(3, 16)), "A prompt has 13 tokens, but speaker reads at most 12; shorten it"),
        ("the cat " * 7, "15 tokens"),
        (["the cat", [5, 6]], "not a mixture"),
        ([5, [6]], "not a mixture"),
        ("\ud800", "not valid Unicode"),
        (None, "Inputs are"),
        (3, "Inputs are"),
        ([1.5, 2.5], "Inputs are"),
        (torch.tensor([1.5]), "Inputs are"),
        (torch.ones(2, 2, 2, dtype=torch.long), "Inputs are"),
        ([[[1]]], "Inputs are"),
        ([None], "Inputs are"),
        ({"ids": [5]}, "has input_ids"),
        (b"the cat", "Inputs are"),
        ([True, False], "Inputs are"),
    ],
)
def test_inputs_that_are_none(lm: LanguageModel, inputs: Any, words: str) -> None:
    with pytest.raises(CutawayError, match=words) as raised:
        lm.run(inputs)
    assert "\n" not in str(raised.value)


def test_a_context_is_full_to_the_last_token(lm: LanguageModel) -> None:
    logits = lm.run(list(range(3, 15))).logits
    assert logits is not None
    assert logits.shape == (1, 12, 20)


def test_a_tokens_value_is_checked() -> None:
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(CutawayError, match="holes"):
        Tokens(ids, torch.tensor([[True, False, True]]), (("a", "b"),))
    with pytest.raises(CutawayError, match="no token at all"):
        Tokens(ids, torch.tensor([[False, False, False]]), ((),))
    with pytest.raises(CutawayError, match="one shape"):
        Tokens(ids, torch.tensor([[True, True]]), (("a", "b"),))


def test_rows_are_chosen_and_repeated(lm: LanguageModel) -> None:
    tokens = lm.tokens(["the cat", "a big dog"])
    assert tokens[1].row_ids(0) == tokens.row_ids(1)
    assert len(tokens[0:2]) == 2
    twice = tokens.repeat(2)
    assert [twice.row_ids(i) for i in range(4)] == [tokens.row_ids(i // 2) for i in range(4)]
    assert twice.strings[3] == tokens.strings[1]


def test_finding_a_text(atlas: LanguageModel) -> None:
    text = "The capital of the state containing Dallas is the capital"
    tokens = atlas.tokens(text)
    strings = tokens.strings[0]
    assert "".join(strings[1:]).strip() == text
    for word, occurrence in (
        ("Dallas", -1),
        (" capital", 0),
        (" capital", 1),
        (" capital", -1),
        ("state containing", 0),
    ):
        position = tokens.find(0, word, occurrence)
        before = "".join(strings[: position + 1])
        assert before.endswith(word) or word in before
        assert word not in "".join(strings[:position]) or occurrence in (1, -1)
    assert tokens.find(0, " capital", 0) < tokens.find(0, " capital", 1) == tokens.find(0, " capital")
    with pytest.raises(CutawayError, match="'Oslo' does not occur in row 0"):
        tokens.find(0, "Oslo")
    with pytest.raises(CutawayError, match="does not occur 2 times"):
        tokens.find(0, " capital", 2)
    with pytest.raises(CutawayError, match="does not occur"):
        tokens.find(0, "")


def test_padding_ids_change_nothing(lm: LanguageModel) -> None:
    """What stands at the padding is never read."""
    rows = [[0, 7, 9, 10, 11], [0, 8, 10]]
    runs = []
    for pad in (1, 2, 15):
        ids, mask = pad_rows(rows, pad)
        runs.append(lm.run(Tokens(ids, mask, (("",) * 5, ("",) * 3))))
    for run in runs[1:]:
        assert run.logits is not None
        assert runs[0].logits is not None
        assert torch.equal(run.logits[run.tokens.mask], runs[0].logits[run.tokens.mask])


# What a run prints and writes


def test_a_run_prints_itself(lm: LanguageModel) -> None:
    run = lm.run(
        ["the cat sat", "a dog"],
        capture=["blocks.*.resid_post", "blocks.1.attn.pattern"],
        edits=cutaway.zero("blocks.0.mlp.out", positions=1),
        grad=lambda logits: logits[:, 0, 3],
    )
    text = repr(run)
    assert text.startswith("Run of speaker: 2 rows x 4 tokens\n")
    for part in (
        "<s>thecatsat",
        "logits  [2, 4, 20]; next after row 0: '",
        "blocks.*.resid_post (3 layers) [2, 4, 32] + gradient",
        "blocks.1.attn.pattern [2, 4, 4, 4] + gradient",
        "edit    zero blocks.0.mlp.out: 2 tokens in 2 rows",
    ):
        assert part in text
    assert "Tokens(batch 2, 4 columns)" in repr(run.tokens)
    assert "logits" not in repr(lm.run("the cat", logits=None, capture="embed")).split("site")[0]


def test_a_run_is_saved_whole(lm: LanguageModel, tmp_path: Path) -> None:
    edit = cutaway.scale("blocks.0.mlp.out", 2.0, positions=[0, -1])
    run = lm.run(
        ["the cat sat", "a dog"],
        capture=["blocks.*.attn.scores", "embed"],
        edits=edit,
        grad=lambda logits: logits[:, 0, 3],
        logits="last",
    )
    folder = run.save(tmp_path / "run")
    tensors = load_file(folder / "run.safetensors")
    assert run.logits is not None
    assert torch.equal(tensors["logits"], run.logits)
    assert torch.equal(tensors["tokens.ids"], run.tokens.ids)
    assert torch.equal(tensors["tokens.mask"], run.tokens.mask)
    for site in run.sites:
        assert torch.equal(tensors[f"value:{site}"], run[site])
        assert torch.equal(tensors[f"grad:{site}"], run.grads[site])
    assert len(tensors) == 3 + 2 * len(run.sites)
    record = read_json(folder / "run.json")
    assert cutaway.load_edits(folder) == (edit,)
    assert record["receipts"][0]["positions"] == [[0, 3], [0, 2]]
    assert record["tokens"][1] == ["<s>", "a", "dog"]
    assert record["manifest"]["model"]["weight_hash"] == lm.identity().weight_hash

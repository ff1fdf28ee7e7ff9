"""What a tokenizer returns as input: padded ids with their mask; ids without one; doubled beginnings of text."""

import warnings
from typing import Any

import pytest
import torch
from tiny import tiny_model, word_tokenizer
from transformers import BatchEncoding

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel

TEXTS = ["the cat the cat the", "the cat"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return cutaway.attach(tiny_model("llama"), word_tokenizer(), name="words")


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_the_tokenizer_returns_is_taken_with_its_mask(lm: LanguageModel, side: str) -> None:
    tokenizer: Any = word_tokenizer()
    tokenizer.padding_side = side
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert isinstance(encoded, BatchEncoding)
    alone = lm.run(TEXTS[1], logits="last").logits
    assert alone is not None
    lists = {key: encoded[key].tolist() for key in ("input_ids", "attention_mask")}
    for given in (encoded, dict(encoded), lists, tokenizer(TEXTS)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run = lm.run(given, logits="last")  # type: ignore[arg-type]
        assert run.tokens.lengths.tolist() == lm.tokens(TEXTS).lengths.tolist()
        assert run.tokens.strings == lm.tokens(TEXTS).strings
        assert run.logits is not None
        torch.testing.assert_close(run.logits[1], alone[0])
    assert torch.equal(lm.tokens(encoded).mask, encoded["attention_mask"].bool())
    assert lm.tokens(encoded, bos=False).lengths.tolist() == [5, 2]
    assert lm.generate(encoded, max_new_tokens=2).new_ids == lm.generate(TEXTS, max_new_tokens=2).new_ids
    one = tokenizer(TEXTS[1])  # one text, without a batch
    assert torch.equal(lm.tokens(one).ids, lm.tokens(TEXTS[1]).ids)
    assert torch.equal(lm.tokens({"input_ids": one["input_ids"]}).ids, lm.tokens(TEXTS[1]).ids)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"attention_mask": [[1]]}, "has input_ids"),
        ({}, "has input_ids"),
        ({"input_ids": [[7, 9]], "attention_mask": [[1]]}, "different shapes"),
        ({"input_ids": [[7, 9]], "attention_mask": [[1, 2]]}, "1 at real tokens and 0 at padding"),
        ({"input_ids": [[7, 9, 7]], "attention_mask": [[1, 0, 1]]}, "holes"),
        ({"input_ids": [[7, 9]], "attention_mask": [[0, 0]]}, "empty prompt"),
        ({"input_ids": [[7, 9]], "attention_mask": 1}, "different shapes"),
        ({"input_ids": [[7, 9]], "position_ids": [[0, 1]]}, "leave 'position_ids' out"),
        ({"input_ids": [[0, 0, 7]], "attention_mask": [[1, 1, 1]]}, "two beginning-of-text"),
        ({"input_ids": "the cat", "attention_mask": [[1, 1]]}, "different shapes"),
    ],
)
def test_a_dict_that_is_no_input_is_refused(lm: LanguageModel, given: dict[str, Any], says: str) -> None:
    with pytest.raises(CutawayError, match=says):
        lm.tokens(given)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_ids_that_end_in_the_padding_token_warn(lm: LanguageModel, as_tensor: bool) -> None:
    pad = lm.pad_id
    assert pad is not None

    def warned(*rows: list[int]) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            lm.tokens(torch.tensor(rows) if as_tensor else list(rows))
        return [str(one.message) for one in found]

    (message,) = warned([0, 7, 9], [0, pad, pad], [0, 7, pad])
    assert message.startswith(f"Row 1 ends in the padding token (id {pad}), 2 of it")
    assert "attention_mask" in message
    assert len(warned([0, 7, pad])) == 1
    assert warned([0, 7, 9], [0, 9, 9]) == []
    assert warned([0, 7, pad, 9, 9], [0, 7, 9, 7, pad]) == []  # texts behind each other, closed by this token
    assert warned([pad]) == []  # the token itself is looked at


def test_two_beginnings_say_what_put_them_there(lm: LanguageModel) -> None:
    for given, says in [
        ("<s> the cat", "the tokenizer adds one, so leave it out"),
        ([[0, 0, 7]], "the ids begin with 2 of 0, so leave one out"),
    ]:
        with pytest.raises(CutawayError, match=says):
            lm.tokens(given)
    bare: Any = word_tokenizer()
    bare.backend_tokenizer.post_processor = None
    bare.pad_token = bare.bos_token
    plain = cutaway.attach(lm.hf, bare, name="bare")
    for given, says in [
        ("<s> <s> the cat", "the text itself has both, and the tokenizer adds none"),
        ([[0, 0, 0, 7]], "begin with 3 of 0, which is the padding token too; if that is padding, .* attention_mask"),
    ]:
        with pytest.raises(CutawayError, match=says):
            plain.tokens(given)

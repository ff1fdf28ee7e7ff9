"""Characters that a tokenizer splits over several tokens, found by text."""

from pathlib import Path

import pytest

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.causal.tracing.prompts import subject_span
from cutaway.model.language_model import LanguageModel
from cutaway.observe.heads.targets import needle_mask

TEXT = "I like 🍕 and café 日本 today"


@pytest.mark.parametrize("wanted", ["🍕", "日本", " café", "like 🍕", "本 t"])
def test_a_split_character_is_found_where_the_tokenizer_says(atlas: LanguageModel, wanted: str) -> None:
    offsets = atlas.tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]  # type: ignore[misc]
    start, end = TEXT.index(wanted), TEXT.index(wanted) + len(wanted)
    covering = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    tokens = atlas.tokens(TEXT)
    assert tokens.find(0, wanted) == max(covering)
    assert tokens.find_all(0, wanted) == [max(covering)]
    assert needle_mask(tokens, wanted)[0].nonzero()[:, 0].tolist() == covering
    assert subject_span(tokens, 0, wanted.strip(), TEXT) == (
        min(i for i in covering if offsets[i][1] > TEXT.index(wanted.strip())),
        max(covering),
    )
    assert tokens[[0]].find(0, wanted) == tokens.repeat(2).find(1, wanted) == max(covering)


def test_a_text_is_printed_with_its_characters(atlas: LanguageModel) -> None:
    tokens = atlas.tokens(TEXT)
    assert tokens.text(0).endswith(TEXT)
    assert "".join(tokens.strings[0]).encode()  # nothing that cannot be printed or written
    with pytest.raises(CutawayError, match=r"'🍣' does not occur in row 0: .*🍕 and café 日本"):
        tokens.find(0, "🍣")


def test_edits_are_made_at_a_split_character_and_nowhere_else(atlas: LanguageModel) -> None:
    rows = [TEXT, "The 🍕 is here", "plain � here"]
    for text, where in [("🍕", {0, 1}), ("�", {2})]:
        at = cutaway.at_token(text, missing="skip")
        receipt = atlas.run(rows, edits=cutaway.zero("blocks.0.resid_post", positions=at)).receipts[0]
        found = [atlas.tokens(rows).find_all(row, text) for row in range(3)]
        assert {row for row in range(3) if found[row]} == where
        assert receipt.positions == tuple(tuple(p) for p in found if p)


def test_bytes_of_a_sentencepiece_vocabulary_are_one_character(shared: Path) -> None:
    lm = cutaway.load(str(shared / "models" / "stories260K"))
    tokens = lm.tokens("I like 🍕 now")
    at = [i for i, token in enumerate(lm.tokenizer.convert_ids_to_tokens(tokens.row_ids(0))) if token == "<0x95>"]  # type: ignore[union-attr]
    assert tokens.find_all(0, "🍕") == at
    assert tokens.text(0).endswith(" I like 🍕 now")


def test_a_token_is_found_by_its_id(atlas: LanguageModel) -> None:
    ids = atlas.tokens("see #42 here").row_ids(0)
    tokens = atlas.tokens("see #42 here")
    assert tokens.find(0, f"#{ids[1]}") == 1
    assert tokens.strings[0][tokens.find(0, r"\#42") + 1] == " here"
    with pytest.raises(CutawayError, match=r"'#42' does not occur.*the text itself is written '\\#42'"):
        tokens.find(0, "#42")
    receipt = atlas.run(
        "see #42 here", edits=cutaway.zero("blocks.0.resid_post", positions=cutaway.at_token(f"#{ids[2]}"))
    ).receipts[0]
    assert receipt.positions == ((2,),)

"""Naming a token: an answer is the continuation of its prompt, or an id."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace
from tokenizers.normalizers import Sequence as Normalizers
from transformers import PreTrainedTokenizerFast

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.causal.tracing.prompts import FactPrompt, answered
from cutaway.cli.main import main
from cutaway.data.pairs import PromptPair, aligned
from cutaway.model.language_model import LanguageModel
from cutaway.model.naming import matches, single_token
from cutaway.observe.attribution.attribution import attribute
from cutaway.observe.lens.logit_lens import first_token, logit_lens
from cutaway.observe.probes.usage import answer_tokens
from cutaway.observe.saliency_maps.methods import question

BYTES = [f"<0x{i:02X}>" for i in range(0x60, 0x80)]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, "▁", *"playofs.,#", "pl", "pla", "play", "▁pla", "▁play", "▁y", "▁of", "of"]
MERGES = [("p", "l"), ("pl", "a"), ("pla", "y"), ("▁", "pla"), ("▁", "play"), ("▁", "y"), ("o", "f"), ("▁", "of")]


@pytest.fixture(scope="module")
def spaced() -> LanguageModel:
    """A model whose tokenizer puts a space before every text, as Llama-2's and Mistral's do, with bytes to fall back
    on."""
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    plain = Tokenizer(BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True))
    plain.normalizer = Normalizers([Prepend("▁"), Replace(" ", "▁")])  # pyright: ignore[reportAttributeAccessIssue]
    plain.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return cutaway.attach(tiny_model("llama"), tokenizer, name="spaced")


def piece(lm: LanguageModel, token: str) -> int:
    return int(lm.tokenizer.convert_tokens_to_ids(token))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("prompt", "answer", "token"),
    [("of pla", "y", "y"), ("of", " y", "▁y"), ("of play", ".", "."), ("of", ",", ","), ("of", " play", "▁play")],
)
def test_an_answer_is_what_its_prompt_goes_on_with(spaced: LanguageModel, prompt: str, answer: str, token: str) -> None:
    wanted = piece(spaced, token)
    ids = spaced.tokens(prompt).row_ids(0)
    decode: Any = spaced.tokenizer.decode  # type: ignore[union-attr]
    assert decode([*ids, wanted]) == decode(ids) + answer
    assert single_token(spaced, answer, after=ids) == wanted
    assert single_token(spaced, answer) == first_token(spaced, answer) == wanted
    assert attribute(spaced, prompt, answer, controls=1).answer_ids == (wanted,)
    assert attribute(spaced, f"{prompt} of", answer, position=len(ids) - 1, controls=1).answer_ids == (wanted,)
    asked = question(spaced, prompt, answer, [f"#{piece(spaced, 's')}"])
    assert (asked.answer, asked.wrong) == (wanted, [piece(spaced, "s")])
    assert answer_tokens(spaced, [prompt], [answer]).answer == (wanted,)
    assert logit_lens(spaced, prompt, 1, follow=[answer]).followed == tuple(spaced.token_strings([wanted]))


def test_what_is_no_token_there_is_refused_with_the_way_out(spaced: LanguageModel) -> None:
    for answer, says in [
        ("play of", "'play of' is 2 tokens of spaced: 'play' .*, ' of'"),
        ("yy", "is 2 tokens of spaced"),
        ("#999", "answer #999 is no token id: they go from 0 to 96"),
        ("", "is empty"),
    ]:
        with pytest.raises(CutawayError, match=says):
            attribute(spaced, "of", answer, controls=1)


def test_a_byte_counts_where_no_piece_reads_so(spaced: LanguageModel) -> None:
    ids = spaced.tokens("of").row_ids(0)
    assert matches(spaced, "y", ids) == [piece(spaced, "y")]  # <0x79> reads so too
    assert matches(spaced, "z", ids) == [piece(spaced, "<0x7A>")]
    assert single_token(spaced, "z", after=ids) == piece(spaced, "<0x7A>")


def test_ids_name_tokens_wherever_a_token_is_named(atlas: LanguageModel) -> None:
    prompt = "The capital of the state containing Dallas is"
    austin, salem = (atlas.tokens(f"{prompt} {city}").row_ids(0)[-1] for city in ("Austin", "Salem"))
    assert attribute(atlas, prompt, f"#{austin}", [f"#{salem}"], controls=1).answer_ids == (austin,)
    assert first_token(atlas, f"#{austin}") == single_token(atlas, austin) == austin
    assert answer_tokens(atlas, [prompt], [f"#{austin}"], [" Salem"]).wrong == (salem,)
    known = answered(atlas, [FactPrompt(prompt, "Dallas", f"#{austin}")], None, None)
    assert known.answers.tolist() == [austin]
    other = prompt.replace("Dallas", "Portland")
    for answer, wrong in [(f"#{austin}", f"#{salem}"), (f"#{austin}", " Salem")]:
        ready = aligned(atlas, [PromptPair(prompt, other, answer, wrong)])
        assert (ready.answer.tolist(), ready.wrong.tolist()) == ([austin], [salem])
    several = PromptPair(prompt, other, f"#{austin}", " Salem", answers=(f"#{austin}",), wrongs=(f"#{salem}",))
    ready = aligned(atlas, [several])
    assert ready.answers is not None
    assert ready.answers[0].nonzero()[:, 0].tolist() == [austin]
    with pytest.raises(CutawayError, match="has no token 9999999"):
        aligned(atlas, [PromptPair(prompt, other, "#9999999", " Salem")])


def test_a_token_spelled_like_an_id_is_written_with_a_backslash(spaced: LanguageModel, atlas: LanguageModel) -> None:
    assert single_token(spaced, "#") == piece(spaced, "#")
    with pytest.raises(CutawayError, match="tokens of atlas: '#'"):
        single_token(atlas, r"\#42424242", after=atlas.tokens("a").row_ids(0))


@pytest.mark.parametrize(
    ("prompt", "answer", "token"),
    [("She loved to pla", "y", "y"), ("She was named Lily", ".", "."), ("It was", " y", "▁y")],
)
def test_a_real_model_of_this_kind(shared: Path, capsys: Any, prompt: str, answer: str, token: str) -> None:
    folder = str(shared / "models" / "stories260K")
    wanted = token.replace("▁", " ")
    assert main(["attribute", folder, prompt, "--answer", answer, "--json", "--draws", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["answer"] == [wanted]

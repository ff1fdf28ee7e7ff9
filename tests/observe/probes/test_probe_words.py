"""Words of sentences as a probe's examples: each at its last token, labels and folds as the sentences have them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.observe.probes.controls import bag_of_tokens
from cutaway.observe.probes.data import collect, probe_data, read_site
from cutaway.observe.probes.fitting import folds
from cutaway.observe.probes.probe import load_probe
from cutaway.observe.probes.sweep import probe_sweep
from cutaway.observe.probes.words import word_places

SENTENCES = [
    ["The", "unbelievably", "old", "dog", "sleeps", "."],
    ["Zürich", "naïve", "isn't", "far", "—", "really", "!"],
    ["x"],
]


def by_prefixes(lm: LanguageModel, words: list[str]) -> list[int]:
    """The last token of each word: a text up to there has as many tokens, where no token goes over a blank."""
    return [len(lm.tokens(" ".join(words[: i + 1])).row_ids(0)) - 1 for i in range(len(words))]


def places(lm: LanguageModel, sentences: list[list[str]]) -> list[list[int]]:
    return word_places(lm, lm.tokens([" ".join(words) for words in sentences]), sentences)


def test_each_word_is_read_at_its_last_token(atlas: LanguageModel) -> None:
    found = places(atlas, SENTENCES)
    assert found == [by_prefixes(atlas, words) for words in SENTENCES]
    assert max(np.diff(found[0])) > 1, "no word of several tokens was tried"


@pytest.mark.parametrize("name", ["stories260K", "webtext-gpt2"])
def test_other_tokenizers(shared: Path, name: str) -> None:
    lm = cutaway.load(str(shared / "models" / name))
    assert places(lm, SENTENCES) == [by_prefixes(lm, words) for words in SENTENCES]


def test_without_offsets_the_characters_of_the_tokens_tell(
    atlas: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = places(atlas, SENTENCES)
    monkeypatch.setattr(type(atlas.tokenizer), "is_fast", False)
    assert places(atlas, SENTENCES) == wanted


def test_examples_are_the_words_that_have_a_label(atlas: LanguageModel) -> None:
    labels: list[list[Any]] = [
        ["DET", "ADV", None, "NOUN", "VERB", None],
        [None] * 3 + ["ADV", None, "ADV", None],
        ["NOUN"],
    ]
    data = probe_data(atlas, SENTENCES, labels, position="words")
    assert data.rule == "words"
    assert data.classes is not None
    assert [data.classes[i] for i in data.labels] == ["DET", "ADV", "NOUN", "VERB", "ADV", "ADV", "NOUN"]
    assert data.row.tolist() == [0, 0, 0, 0, 1, 1, 2]
    where = [by_prefixes(atlas, words) for words in SENTENCES]
    assert data.at.tolist() == [where[0][i] for i in (0, 1, 3, 4)] + [where[1][3], where[1][5], where[2][0]]
    site = "blocks.1.resid_post"
    got = collect(atlas, data, site)[site]
    for example, (row, at) in enumerate(zip(data.row, data.at, strict=True)):
        alone = atlas.run(" ".join(SENTENCES[row]), capture=site)[site][0, at].numpy()
        np.testing.assert_allclose(got[example], alone, rtol=2e-4, atol=2e-4)
    every = read_site(atlas, SENTENCES, site, position="words")[site]  # a probe in use reads all words
    assert len(every) == 14
    np.testing.assert_allclose(every[:2], got[:2], rtol=2e-4, atol=2e-4)
    own = bag_of_tokens(data).toarray()
    assert own.shape[1] == 2 * len(np.unique(np.concatenate([data.tokens.row_ids(i) for i in range(3)])))


LOW, HIGH = ("dog", "cat", "old", "unbelievable"), ("tree", "blue", "houses", "running")


def drawn(n: int, seed: int) -> tuple[list[list[str]], list[list[str]]]:
    rng = np.random.default_rng(seed)
    sentences = [rng.choice([*LOW, *HIGH], 8).tolist() for _ in range(n)]
    return sentences, [["low" if word in LOW else "high" for word in words] for words in sentences]


def test_no_sentence_is_on_both_sides_of_a_fold(atlas: LanguageModel) -> None:
    sentences, labels = drawn(30, 0)
    sentences[7] = sentences[3]  # an equal sentence goes with it
    labels[7] = labels[3]
    data = probe_data(atlas, sentences, labels, position="words")
    assert len(data) == 240
    assert data.n_groups == 29
    for train, test in folds(data.labels, data.groups, 5, regression=False, seed=0):
        assert not set(data.row[train]) & set(data.row[test])
        assert not {3, 7} <= {*data.row[train], *data.row[test]} or ({3, 7} <= set(data.row[train])) != (
            {3, 7} <= set(data.row[test])
        )


def test_a_label_of_the_word_is_found_and_kept(atlas: LanguageModel, tmp_path: Path) -> None:
    sentences, labels = drawn(40, 1)
    sweep = probe_sweep(
        atlas,
        probe_data(atlas, sentences, labels, position="words"),
        sites="blocks.0.resid_post",
        n_folds=4,
        draws=2,
        with_untrained=False,
    )
    assert sweep.best.effect.value > 0.99
    shuffled = sweep.best.control("shuffled")
    assert shuffled is not None
    assert abs(shuffled.value - 0.5) < 0.15
    sweep.best.probe.save(tmp_path / "p")
    chances = load_probe(tmp_path / "p", atlas).read(atlas, [["running", "cat"], ["blue"]])
    assert (chances.argmax(1) == [0, 1, 0]).all()  # high, low in sorted order


@pytest.mark.parametrize(
    ("texts", "labels", "said"),
    [
        (["w2 w3"], [["a", "b"]], "needs a list of words for text 0"),
        ([["w2", ""]], [["a", "b"]], "needs a list of words for text 0"),
        ([["w2", "w3"]], [["a"]], "needs a list of 2 labels for text 0"),
        ([["w2", "w3"]], ["ab"], "needs a list of 2 labels for text 0"),
        ([["w2", "w3"]], [["a", "b"], ["a"]], "1 texts but 2 labels"),
        ([["w2"]], [[None]], "no labelled token"),
    ],
)
def test_what_does_not_fit_is_refused(atlas: LanguageModel, texts: Any, labels: Any, said: str) -> None:
    with pytest.raises(CutawayError, match=said):
        probe_data(atlas, texts, labels, position="words")

"""Heads on the user's own text: loops over the definitions, planted heads, and a model that random tokens mislead."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.corpus import read_corpus, token_rows
from cutaway.model.language_model import LanguageModel
from cutaway.model.tokens import Tokens
from cutaway.observe.heads.report import losses, repeated_tokens
from cutaway.observe.heads.scores import repeated_scores
from cutaway.observe.heads.table import head_table, random_loss
from cutaway.observe.heads.text import text_kinds, text_scores

REPEATS = ("duplicate", "induction")


def targets(kind: str, ids: list[int], i: int) -> set[int]:
    """Target columns of destination i, straight from the definition; the first token is no duplicate."""
    return {
        "previous": {i - 1} if i >= 1 else set(),
        "current": {i},
        "first": {0} if i >= 2 else set(),
        "duplicate": {j for j in range(1, i) if ids[j] == ids[i]},
        "induction": {j + 1 for j in range(i) if ids[j] == ids[i] and j + 1 < i},
    }[kind]


class ByHand:
    """One head on some sequences: `a[row]` [p, p] its attention, `sight[row](i)` what row i may look at."""

    def __init__(self, kind: str, rows: list[list[int]], a: list[Any], sight: list[Any]) -> None:
        self.kind, self.rows, self.a, self.sight = kind, rows, a, sight
        self.wanted = [
            {i: targets(kind, ids, i) & sight[row](i) for i in range(len(ids))} for row, ids in enumerate(rows)
        ]

    def score(self) -> tuple[float, float, int]:
        mass = even = n = 0.0
        for row, wanted in enumerate(self.wanted):
            for i, cells in wanted.items():
                if cells:
                    n += 1
                    mass += sum(self.a[row][i, j] for j in cells)
                    even += len(cells) / len(self.sight[row](i))
        return mass / n, even / n, int(n)

    def free(self, row: int, i: int) -> list[int]:
        return [j for j in self.sight[row](i) if j != 0 and j not in self.wanted[row][i]]

    def of_repeats(self, alike: str) -> float:
        """The mean attention to cells that are no targets but alike in distance, place or token, for each target."""
        above = below = 0.0
        for row, ids in enumerate(self.rows):
            found, n_targets = [], 0
            for i, cells in self.wanted[row].items():
                for j in cells:
                    n_targets += 1
                    if alike == "distance":
                        places = [(i2, i2 - (i - j)) for i2 in range(len(ids)) if i2 - (i - j) in self.free(row, i2)]
                    elif alike == "place":
                        places = [(i2, j) for i2 in range(j + 1, len(ids)) if j in self.free(row, i2)]
                    else:
                        places = [(i, j2) for j2 in self.free(row, i) if j2 < i and ids[j2] == ids[j]]
                    if places:
                        found.append(np.mean([self.a[row][place] for place in places]))
            if found:
                above += sum(found) * n_targets / len(found)
                below += sum(1 for cells in self.wanted[row].values() if cells)
        return above / below if below else -1.0

    def of_places(self) -> float:
        """The mean attention to the other distance (column) that gets most, of those in at least half of the rows."""
        n = self.score()[2]
        best = -1.0
        for place in range(1, max(map(len, self.rows))):
            cells = []
            for row, ids in enumerate(self.rows):
                for i in range(len(ids)):
                    if self.kind == "first":
                        if i >= 2 and place in self.free(row, i) and place < i:
                            cells.append(self.a[row][i, place])
                    elif place > 1 and i - place in self.sight[row](i) and i - place > 0:
                        cells.append(self.a[row][i, i - place])
            if 2 * len(cells) >= n:
                best = max(best, float(np.mean(cells)))
        return best

    def control(self) -> float:
        if self.kind not in REPEATS:
            return self.of_places()
        alike = ("distance", "place", "token") if self.kind == "induction" else ("distance", "place")
        return max(self.of_repeats(one) for one in alike)


def test_scores_and_controls_are_their_definitions(tiny: LanguageModel) -> None:
    """Sequences of different lengths with repeated tokens: loops over rows, targets and other places."""
    rng = random.Random(1)
    rows = [[rng.randrange(2, 8) for _ in range(length)] for length in (15, 11, 7)]
    found = text_scores(tiny, rows)
    assert set(found) == {"previous", "current", "first", *REPEATS}
    run = tiny.run(rows, capture=["blocks.*.attn.pattern"], logits=None)
    for kind, scores in found.items():
        assert scores.kind == f"{kind} (text)"
        assert scores.n == 3
        for layer in range(tiny.n_layers):
            pattern = run[f"blocks.{layer}.attn.pattern"].double().numpy()

            def sight(row: int, pattern: Any = pattern) -> Any:
                return lambda i: {j for j in range(i + 1) if (pattern[row, :, i, j] > 0).any()}

            for head in range(tiny.n_heads):
                hand = ByHand(kind, rows, [pattern[row, head] for row in range(3)], [sight(row) for row in range(3)])
                value, even, n = hand.score()
                assert scores.score[layer, head].item() == pytest.approx(value, abs=1e-6), kind
                assert scores.control[layer, head].item() == pytest.approx(hand.control(), abs=1e-6), kind
                assert scores.uniform is not None
                assert scores.uniform[layer].item() == pytest.approx(even, abs=1e-9), kind
                assert n <= scores.destinations <= sum(map(len, rows))


# Planted heads ------------------------------------------------------------------------------------------------------

SPACE = 5


def planted(ids: list[int], head: int) -> np.ndarray:
    """Attention [p, p] of: 0 induction (to the last match), 1 two tokens back, 2 the frequent token, 3 the token
    before, 4 the last duplicate. Where a head finds nothing it rests on the first token."""
    p = len(ids)
    a = np.zeros((p, p))
    for i in range(p):
        if head == 0:
            matches = sorted(targets("induction", ids, i))
            a[i, matches[-1] if matches else 0] = 1.0
        elif head == 1:
            a[i, max(0, i - 2)] = 1.0
        elif head == 2:
            spaces = [j for j in range(1, i + 1) if ids[j] == SPACE]
            a[i, spaces or [0]] = 1.0 / max(1, len(spaces))
        elif head == 3:
            a[i, max(0, i - 1)] = 1.0
        else:
            a[i, max(targets("duplicate", ids, i), default=0)] = 1.0
    return a


def words(n: int, p: int, seed: int) -> list[list[int]]:
    """Like text of characters: spaces are frequent, follow the same letters, and words come again soon."""
    rng = random.Random(seed)
    vocabulary = [[6, 7], [8, 9], [10, 11, 12]]
    rows = []
    for _ in range(n):
        row = [2]
        while len(row) < p:
            row += [*rng.choice(vocabulary), SPACE]
        rows.append(row[:p])
    return rows


def test_only_planted_heads_carry_their_label(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that looks near, and one that looks at the frequent token, get much of their attention on targets of
    induction by the way: their controls get as much."""

    def run(self: Any, tokens: Tokens, **_: Any) -> dict[str, torch.Tensor]:
        ids = tokens.row_ids(0)
        pattern = torch.tensor(np.stack([planted(ids, head) for head in order]))[None]
        scores = torch.full_like(pattern, -torch.inf).masked_fill(torch.ones(len(ids), len(ids)).tril().bool(), 0.0)
        return {
            f"blocks.{layer}.attn.{site}": value
            for layer in range(3)
            for site, value in (("pattern", pattern), ("scores", scores))
        }

    monkeypatch.setattr(LanguageModel, "run", run)
    order = [0, 1, 2, 3]
    found = text_scores(llama, words(8, 80, 0))
    induction = found["induction"]
    assert induction.heads() == [(0, 0), (1, 0), (2, 0)]
    assert induction.score[0, 0].item() == pytest.approx(1.0)
    assert induction.control[0, 0].item() < 0.1
    for head in (1, 2):
        assert induction.score[0, head].item() > 0.1, "the planted confusion is there"
        assert induction.score[0, head] - induction.control[0, head] < 0.1
    assert found["previous"].heads() == [(0, 3), (1, 3), (2, 3)]
    assert found["previous"].margin == 0.1
    assert found["duplicate"].score[0, 2] > 0.2
    assert found["duplicate"].heads() == []
    order[:] = [4, 1, 2, 3]
    assert text_scores(llama, words(8, 80, 0), ["duplicate"])["duplicate"].heads() == [(0, 0), (1, 0), (2, 0)]


def test_a_first_token_that_comes_again_is_no_duplicate(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head at rest on the first token finds its duplicates there, whatever it does."""
    ids = [7, 8, 7, 9, 8, 7]
    tokens = llama.tokens([ids])
    from cutaway.observe.heads.text import text_targets

    assert text_targets(tokens, "duplicate")[0].nonzero().tolist() == [[4, 1], [5, 2]]


def test_one_text_has_no_interval_and_labels_nothing(tiny: LanguageModel) -> None:
    scores = text_scores(tiny, [[5, 6, 5, 6, 7]], ["previous"])["previous"]
    assert bool(scores.low.isnan().all())
    assert scores.heads() == []
    effect = scores.effect((0, 0))
    assert effect.interval is None
    assert effect.controls[0].interval is None


def test_kinds_without_a_target(llama: LanguageModel) -> None:
    rows = [[5, 6, 7]]
    assert text_kinds(llama.tokens(rows)) == ("previous", "current", "first")
    assert set(text_scores(llama, rows)) == {"previous", "current", "first"}
    with pytest.raises(CutawayError, match="no score on text"):
        text_scores(llama, rows, ["copying"])
    with pytest.raises(CutawayError, match="has a target for the induction score"):
        text_scores(llama, rows, ["induction"])


# In the table -------------------------------------------------------------------------------------------------------


def test_the_table_holds_both_and_ablates_on_the_text(llama: LanguageModel) -> None:
    rows = words(5, 40, 3)
    table = head_table(llama, on=rows, n=3, length=8, ablations=("mean",), ablation_length=6)
    assert {"induction", "induction (text)", "previous (text)"} <= set(table.kinds)
    known = text_scores(llama, rows)["induction"]
    torch.testing.assert_close(table.kinds["induction (text)"].score, known.score)
    torch.testing.assert_close(table.kinds["induction"].score, repeated_scores(llama, 3, 8)["induction"].score)
    assert table.behaviour("induction (text)") == "text"
    assert table.behaviour("induction") == "second copy"
    assert len(table.effects["text"]["mean"].base) == 5
    text = table.text()
    assert (
        "induction (text): attention to the token after the same token earlier (prefix matching), on the text" in text
    )
    assert "tokens of 5 sequences" in text
    assert any(said.startswith("On the text, an induction pattern") for said in table.verdicts())
    assert table.to_json()["kinds"]["induction (text)"]["margin"] == 0.1
    alone = head_table(llama, on=[[5, 6, 7, 8]], n=3, length=8, ablations=())
    assert "Nothing in the text to score by: duplicate, induction." in alone.notes


def test_the_loss_on_random_tokens_is_set_against_an_even_guess(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = repeated_tokens(llama, 3, 8, 0)
    by_hand = np.mean([[losses(llama.run(tokens))[row, i].item() for i in range(8)] for row in range(3)])
    assert random_loss(llama, 3, 8, 0) == pytest.approx(by_hand, abs=1e-5)
    far = head_table(llama, n=3, length=8, ablations=())
    assert far.random_loss == pytest.approx(by_hand, abs=1e-5)
    assert far.even_loss == pytest.approx(math.log(97))
    warning = next(said for said in far.verdicts() if said.startswith("Warning"))
    assert f"{by_hand:.2f} nats, above the 4.57" in warning
    assert "--on TEXT" in warning
    beside = head_table(llama, on=words(2, 20, 0), n=3, length=8, ablations=())
    assert not any("--on" in said for said in beside.verdicts())
    assert any("Warning" in said for said in beside.verdicts())
    unembedding: Any = llama.hf.get_output_embeddings()
    monkeypatch.setattr(unembedding, "weight", torch.nn.Parameter(torch.zeros_like(unembedding.weight)))
    even = head_table(llama, n=3, length=8, ablations=())
    assert even.random_loss == pytest.approx(even.even_loss, abs=1e-4)
    assert not any("Warning" in said for said in even.verdicts())


def test_stories(shared: Path) -> None:
    """A model of stories alone: far worse than an even guess on random tokens; its heads are found on stories."""
    lm = cutaway.load(str(shared / "models" / "stories260K"))
    stories = read_corpus(shared / "corpora" / "tinystories_1000.txt", document_separator="<|endoftext|>").documents
    rows = token_rows(lm, stories, 128, limit=16)
    table = head_table(lm, on=rows, n=4, length=20, ablations=())
    assert table.random_loss > table.even_loss
    assert any("above the 6.24 of an even guess" in said for said in table.verdicts())
    previous = table.kinds["previous (text)"].heads()
    assert (3, 6) in previous
    assert (1, 3) in previous
    assert table.kinds["induction (text)"].destinations > 500
    assert table.kinds["induction"].heads() == []


def test_induction_heads_of_a_model_of_web_text(shared: Path) -> None:
    """Those that random tokens show are found on text, where no earlier layer's head is mistaken for one."""
    lm = cutaway.load(str(shared / "models" / "webtext-gpt2"))
    documents = read_corpus(shared / "corpora" / "text" / "brown.txt").documents[:100]
    found = text_scores(lm, token_rows(lm, documents, 128, limit=16))
    assert set(found["induction"].heads()) == {(3, 1), (3, 2), (3, 3), (3, 4), (3, 5)}
    assert found["duplicate"].heads() == []
    assert {(1, 1), (2, 4)} <= set(found["previous"].heads())
    assert found["induction"].control.max() < 0.1

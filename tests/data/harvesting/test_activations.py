"""The stream of activations: the right positions, every token once a pass, and the same stream from any point."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.data.harvesting.activations import counted, harvest_sites, read_activations, shuffled_batches
from cutaway.data.harvesting.settings import Rules
from cutaway.model.tokens import Tokens

BOS = 0


class Counting:
    """Stands for a model: the activation of a token is (its id, its column, its row's second id)."""

    bos_id: int | None = BOS
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.rows_run = 0

    def run(self, tokens: Tokens, *, capture: Sequence[str], logits: str | None) -> dict[str, Tensor]:
        assert logits is None
        ids = tokens.ids
        self.rows_run += len(ids)
        column = torch.arange(ids.shape[1]).expand_as(ids)
        value = torch.stack([ids, column, ids[:, 1:2].expand_as(ids)], dim=-1).float()
        return {site: value if site == "s" else value.unflatten(-1, (3, 1)) for site in capture}


def some_rows(n: int = 40, p: int = 9) -> Tensor:
    rows = torch.arange(1, n * p + 1).view(n, p)
    rows[:, 0] = BOS
    rows[::3, 5] = BOS  # a document ends inside the row
    return rows


def activation_batches(
    lm: Counting, rows: Tensor, site: str, sizes: list[int] | None = None, **options: Any
) -> Iterator[Tensor]:
    keep = counted(rows, lm.bos_id)

    def fill(chosen: Tensor) -> dict[str, Tensor]:
        found = harvest_sites(lm, rows[chosen], [site], keep[chosen])
        if sizes is not None:
            sizes.append(len(found[site]))
        return found

    return (batch[site] for batch in shuffled_batches(keep.sum(1), fill, **options))


def ids(batches: list[Tensor]) -> list[int]:
    return torch.cat(batches)[:, 0].int().tolist()


def test_first_positions_and_bos_are_left_out() -> None:
    rows = some_rows()
    found = read_activations(Counting(), rows, "s")
    assert found.dtype == torch.float32
    assert found[:, 0].int().tolist() == rows[counted(rows, BOS)].tolist()
    assert BOS not in found[:, 0]
    assert 0 not in found[:, 1]
    assert not counted(torch.ones(2, 4, dtype=torch.int64), None)[:, 0].any()


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("buffer_tokens", [50, 10_000])
def test_every_token_once_a_pass_but_for_remainders(passes: int, buffer_tokens: int) -> None:
    rows, lm = some_rows(), Counting()
    n = int(counted(rows, BOS).sum())
    options: dict[str, Any] = {"batch_tokens": 8, "seed": 1, "passes": passes, "buffer_tokens": buffer_tokens}
    pieces = max(1, n // buffer_tokens)
    batches = list(islice(activation_batches(lm, rows, "s", **options), passes * (n - 8 * pieces) // 8))
    seen = torch.bincount(torch.tensor(ids(batches)), minlength=int(rows.max()) + 1)
    assert seen[BOS] == 0
    assert seen.max() <= passes
    assert (seen[rows[counted(rows, BOS)]] == passes).float().mean() > 0.5
    assert lm.rows_run <= len(rows)  # each row is run once, however often its tokens are used
    first = ids(batches[:5])
    assert first != sorted(first)


def test_a_stream_entered_anywhere_is_the_same_stream() -> None:
    rows = some_rows()
    options: dict[str, Any] = {"batch_tokens": 8, "seed": 2, "passes": 2, "buffer_tokens": 60}
    whole = list(islice(activation_batches(Counting(), rows, "s", **options), 150))  # beyond the second turn
    for start in (0, 1, 7, 8, 13, 40, 69, 70, 71, 120):
        lm = Counting()
        entered = list(islice(activation_batches(lm, rows, "s", start=start, **options), 20))
        assert all(torch.equal(a, b) for a, b in zip(entered, whole[start:], strict=False)), start
    lm = Counting()
    next(activation_batches(lm, rows, "s", start=120, **options))
    assert lm.rows_run < len(rows) / 2  # what lies before is skipped, not run


def test_turns_and_seeds_shuffle_differently() -> None:
    rows = some_rows()

    def stream(seed: int) -> list[int]:
        return ids(list(islice(activation_batches(Counting(), rows, "s", batch_tokens=8, seed=seed), 60)))

    assert stream(0) == stream(0)
    assert stream(0) != stream(1)
    n = int(counted(rows, BOS).sum()) // 8 * 8
    assert stream(0)[:n] != stream(0)[n : 2 * n]


def test_memory_is_one_buffer() -> None:
    sizes: list[int] = []
    stream = activation_batches(Counting(), some_rows(400), "s", sizes, batch_tokens=8, buffer_tokens=200)
    list(islice(stream, 1_000))
    assert len(sizes) > 10
    assert max(sizes) < 2 * 200 + 9


def test_several_sites_are_of_the_same_tokens_and_one_forward() -> None:
    rows, lm = some_rows(), Counting()
    keep = counted(rows, BOS)
    found = harvest_sites(lm, rows, ["s", "by head"], keep)
    assert lm.rows_run == len(rows)
    assert torch.equal(found["s"], found["by head"])

    def fill(chosen: Tensor) -> dict[str, Tensor]:
        return harvest_sites(lm, rows[chosen], ["s", "by head"], keep[chosen])

    for batch in islice(shuffled_batches(keep.sum(1), fill, batch_tokens=8, buffer_tokens=60), 60):
        assert torch.equal(batch["s"], batch["by head"])


def test_tokens_that_are_left_out_are_replaced_by_others_of_the_buffer() -> None:
    rows = some_rows()
    keep = counted(rows, BOS)
    options: dict[str, Any] = {"batch_tokens": 8, "buffer_tokens": 60, "passes": 2}

    def fill(chosen: Tensor) -> dict[str, Tensor]:
        values = harvest_sites(Counting(), rows[chosen], ["s"], keep[chosen])["s"]
        return {"s": values[values[:, 0] % 5 != 0]}

    whole = [batch["s"] for batch in islice(shuffled_batches(keep.sum(1), fill, **options), 100)]
    assert all(len(batch) == 8 for batch in whole)
    assert all(one % 5 for one in ids(whole))
    for start in (3, 17, 64):
        entered = [batch["s"] for batch in islice(shuffled_batches(keep.sum(1), fill, start=start, **options), 9)]
        assert all(torch.equal(a, b) for a, b in zip(entered, whole[start:], strict=False)), start
    with pytest.raises(CutawayError, match="leave out every token"):
        next(shuffled_batches(keep.sum(1), lambda chosen: {"s": torch.zeros(0, 3)}, **options))


def test_rules_keep_what_they_are_told_to() -> None:
    rows = some_rows()
    everything = counted(rows, BOS, Rules(bos="keep", first_position="keep"))
    assert everything.all()
    assert torch.equal(counted(rows, BOS, Rules(first_position="keep")), rows != BOS)
    assert counted(rows, BOS, Rules(bos="keep"))[:, 1:].all()


def test_too_little_text_and_wrong_sites_are_refused() -> None:
    with pytest.raises(CutawayError, match="less than one batch of 1000"):
        next(activation_batches(Counting(), some_rows(), "s", batch_tokens=1000))

    class Scalars(Counting):
        def run(self, tokens: Tokens, *, capture: Sequence[str], logits: str | None) -> dict[str, Tensor]:
            return {site: tokens.ids.float() for site in capture}

    with pytest.raises(CutawayError, match=r"one vector per position"):
        read_activations(Scalars(), some_rows(), "s")


def test_values_that_are_not_finite_are_refused_by_site() -> None:
    class Broken(Counting):
        def run(self, tokens: Tokens, *, capture: Sequence[str], logits: str | None) -> dict[str, Tensor]:
            found = super().run(tokens, capture=capture, logits=logits)
            found["by head"] = found["by head"].clone()
            found["by head"][0, 1, 0] = float("nan")
            return found

    with pytest.raises(CutawayError, match="at by head hold NaN"):
        harvest_sites(Broken(), some_rows(), ["s", "by head"], counted(some_rows(), BOS))

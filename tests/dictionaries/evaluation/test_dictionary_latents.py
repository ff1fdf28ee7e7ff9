"""Statistics of latents against loops, and matching against brute force."""

import itertools

import numpy as np
import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, Port, TopK
from cutaway.dictionaries.evaluation.latents import DENSE, latent_statistics, nearest_cosine
from cutaway.dictionaries.evaluation.stability import ASSIGNABLE, SAME, match_rows, stability


def made(seed: int, n: int = 12, d: int = 6) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(n, d, generator=generator)
    return Dictionary(
        torch.randn(d, n, generator=generator), torch.zeros(n), decoder, torch.zeros(d), TopK(2), "blocks.0.resid_post"
    )


def test_statistics_equal_loops() -> None:
    dictionary = made(0)
    counts = torch.tensor([0, 0, 1, 5, 10, 99, 100, 101, 300, 500, 999, 1000])
    found = latent_statistics(dictionary, counts, 1000)
    assert found.n_dead == 2
    assert found.n_dense == sum(c / 1000 > DENSE for c in counts.tolist()) == 5
    for i in range(12):
        row, column = dictionary.W_dec[i], dictionary.W_enc[:, i]
        assert found.decoder_norm[i].item() == pytest.approx(row.norm().item(), rel=1e-5)
        assert found.encoder_cosine is not None
        assert found.encoder_cosine[i].item() == pytest.approx(
            (row @ column / row.norm() / column.norm()).item(), abs=1e-5
        )
        others = [torch.cosine_similarity(row, dictionary.W_dec[j], dim=0).item() for j in range(12) if j != i]
        assert found.nearest[i].item() == pytest.approx(max(others), abs=1e-5)


def test_the_histogram_holds_every_latent_that_fired() -> None:
    counts = torch.tensor([0, 1, 3, 4, 31, 32, 316, 317, 1000, 1000])
    bins, latents = latent_statistics(made(1, n=10), counts, 1000).histogram()
    assert bins[0][0] == -3
    assert bins[-1][1] == 0
    assert sum(latents) == 9
    assert dict(zip(bins, latents, strict=True)) == {
        (-3.0, -2.5): 2, (-2.5, -2.0): 1, (-2.0, -1.5): 1, (-1.5, -1.0): 1, (-1.0, -0.5): 1, (-0.5, 0.0): 3,
    }  # fmt: skip


def test_a_transcoder_has_no_cosine_with_its_encoder() -> None:
    dictionary = Dictionary(
        torch.ones(6, 4), torch.zeros(4), torch.ones(4, 3), torch.zeros(3), TopK(1), "blocks.0.mlp.in",
        writes=(Port("blocks.0.mlp.out", 3),), subtract_b_dec=False,
    )  # fmt: skip
    assert latent_statistics(dictionary, torch.ones(4), 10).encoder_cosine is None
    assert latent_statistics(dictionary, torch.ones(4), 10).to_json()["encoder_decoder_cosine_signed"] is None


def test_a_single_latent_has_no_neighbour() -> None:
    assert torch.isnan(nearest_cosine(torch.ones(1, 3))).all()


@pytest.mark.parametrize("signed", [True, False])
def test_assignment_is_the_best_of_all_permutations(signed: bool) -> None:
    a, b = made(0, n=6).W_dec, made(1, n=6).W_dec
    cosines = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    cosines = cosines if signed else cosines.abs()
    best = max(sum(cosines[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(6)))
    found = match_rows(a, b, signed=signed)
    assert found.matching == "assignment"
    assert found.mean == pytest.approx(best / 6, abs=1e-6)


def test_mutual_neighbours_equal_a_loop() -> None:
    a, b = made(0, n=20).W_dec, made(1, n=15).W_dec
    cosines = (torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T).numpy()
    expected = {(i, int(j)) for i in range(20) for j in [np.argmax(cosines[i])] if int(np.argmax(cosines[:, j])) == i}
    found = match_rows(a, b, matching="mutual")
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert found.share_same == sum(cosines[i, j] > SAME for i, j in expected) / 15


def test_large_dictionaries_are_matched_by_neighbours() -> None:
    rows = torch.randn(ASSIGNABLE + 1, 4, generator=torch.Generator().manual_seed(0))
    found = match_rows(rows, rows.flip(0))
    assert found.matching == "mutual"
    assert found.mean == pytest.approx(1, abs=1e-5)


def test_a_sign_is_a_difference_only_when_signed() -> None:
    """Opposite directions: absolute cosine 1; signed at most what chance gives."""
    a = made(0, n=5, d=40)
    opposite = Dictionary(a.W_enc, a.b_enc, -a.W_dec, a.b_dec, a.selector, a.site)
    signed = stability([a, opposite]).effects
    absolute = stability([a, opposite], signed=False).effects
    assert absolute["cosine"].value == pytest.approx(1, abs=1e-5)
    assert signed["cosine"].value < 0.5
    assert "signed" in signed["cosine"].name
    assert "absolute" in absolute["cosine"].name


def test_permuted_copies_are_found_again_and_dead_ones_do_not_count() -> None:
    a, noise = made(0, n=30, d=20), made(9, n=30, d=20)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    decoder = a.W_dec[order].clone()
    dead = torch.zeros(30, dtype=torch.bool)
    dead[:10] = True
    decoder[:10] = noise.W_dec[:10]  # what was never active may lie anywhere
    alive_in_a = torch.ones(30, dtype=torch.bool)
    alive_in_a[order[:10]] = False
    b = Dictionary(a.W_enc, a.b_enc, decoder, a.b_dec, a.selector, a.site)
    found = stability([a, b], alive=[alive_in_a, ~dead])
    effects, each = found.effects, found.per_pair
    assert effects["cosine"].value == pytest.approx(1, abs=1e-5)
    assert effects["found_again"].value == 1
    assert effects["found_again"].controls[0].value < 0.3
    assert len(each["cosine"]) == 1
    everything = stability([a, b]).effects
    assert everything["cosine"].value < 0.95
    found = stability([a, b, noise])
    three, each = found.effects, found.per_pair
    assert len(each["cosine"]) == 3
    low, high = three["cosine"].interval or (0, 0)
    assert low < three["cosine"].value < high
    assert high - low > 0.2, "pairs that differ so much are drawn too"


def test_bad_input_is_named() -> None:
    with pytest.raises(CutawayError, match="two or more"):
        stability([made(0)])
    with pytest.raises(CutawayError, match="widths 6 and 5"):
        match_rows(made(0).W_dec, made(0, d=5).W_dec)
    with pytest.raises(CutawayError, match="no latents"):
        match_rows(made(0).W_dec, made(0).W_dec[:0])

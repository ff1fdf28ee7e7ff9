"""The sparse step against the dense autograd step, and the kernels it is made of against plain products."""

import pytest
import torch
from dense_oracle import dense_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from cutaway.dictionaries import sparse
from cutaway.dictionaries.parameters import Parameters
from cutaway.dictionaries.rules import TopKRule
from cutaway.dictionaries.sparse import Places
from cutaway.dictionaries.step import StepResult, step
from cutaway.dictionaries.terms import AuxK, Reconstruction


def topk_step(
    weights: Parameters, x: torch.Tensor, k: int, aux_k: int = 0, aux_coefficient: float = 0.0, **options
) -> StepResult:
    terms = (Reconstruction(), AuxK(aux_coefficient, k=aux_k or None, form="sum"))
    return step(weights, TopKRule(k), terms, x, **{"way": "sparse", **options})


def parameters(d: int, n_latents: int, seed: int, dtype: torch.dtype = torch.float32) -> Parameters:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return Parameters(
        encoder=normal(n_latents, d) / d**0.5,
        encoder_bias=normal(n_latents) * 0.3,
        decoder=torch.nn.functional.normalize(normal(n_latents, d), dim=1),
        decoder_bias=normal(d),
    )


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@given(
    n=st.integers(1, 9),
    width=st.sampled_from([8, 40, 64, 256, 513, 1024]),
    k=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_largest_is_topk(n: int, width: int, k: int, seed: int) -> None:
    scores = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    values, indices = sparse.largest(scores, k)
    assert torch.equal(scores.gather(1, indices), values)
    assert torch.equal(values.sort(dim=1, descending=True).values, scores.topk(k, dim=1).values)
    assert all(len(row.unique()) == k for row in indices)


def test_largest_with_ties_returns_k_different_places() -> None:
    scores = torch.zeros(3, 512)
    values, indices = sparse.largest(scores, 4)
    assert torch.equal(values, torch.zeros(3, 4))
    assert all(len(row.unique()) == 4 for row in indices)


def test_products_with_codes_equal_dense_products() -> None:
    n, d, width, k = 37, 12, 50, 5
    generator = torch.Generator().manual_seed(1)
    indices = torch.stack([torch.randperm(width, generator=generator)[:k] for _ in range(n)])
    values = torch.randn(n, k, generator=generator)
    rows = torch.randn(width, d, generator=generator)
    x = torch.randn(n, d, generator=generator)
    code = torch.zeros(n, width).scatter(1, indices, values)
    places = Places.of_rows(indices, width)
    torch.testing.assert_close(sparse.decode(values, indices, rows), code @ rows)
    torch.testing.assert_close(places.combine(values.flatten(), rows), code @ rows)
    torch.testing.assert_close(places.products(rows, x), (x @ rows.T).gather(1, indices).flatten())
    torch.testing.assert_close(places.outer(values.flatten(), x), code.T @ x)
    torch.testing.assert_close(places.latent_sums(values.flatten()), code.sum(0))


@pytest.mark.parametrize(("d", "n_latents", "k", "n"), [(16, 64, 4, 33), (32, 512, 8, 200), (24, 40, 40, 17)])
@pytest.mark.parametrize("n_dead", [0, 3, 30])
def test_gradients_equal_dense_autograd(d: int, n_latents: int, k: int, n: int, n_dead: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        weights = parameters(d, n_latents, seed=3, dtype=dtype)
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(5), dtype=dtype)
        dead = torch.randperm(n_latents, generator=torch.Generator().manual_seed(7))[:n_dead]
        auxiliary = {"dead": dead, "aux_k": 8, "aux_coefficient": 1 / 32}
        reconstruction, extra, expected = dense_gradients(weights, x, k, **auxiliary)
        result = topk_step(weights, x, k, **auxiliary)
        assert relative_error(result.reconstruction, reconstruction) < tolerance
        assert (result.terms["auxk"] - extra).abs() <= tolerance * extra.abs()
        for name, gradient in result.gradients.tensors().items():
            assert relative_error(gradient, getattr(expected, name)) < tolerance, name


def test_reductions_are_sum_over_d_and_mean_over_the_batch() -> None:
    weights = parameters(8, 32, seed=0)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    whole = topk_step(weights, x, 3).reconstruction
    rows = [topk_step(weights, row[None], 3).reconstruction for row in x]
    torch.testing.assert_close(whole, torch.stack(rows).mean())
    silent = Parameters(weights.encoder, torch.full((32,), -1e6), weights.decoder, torch.zeros(8))
    torch.testing.assert_close(topk_step(silent, x, 3).reconstruction, x.square().sum(1).mean())


def test_the_auxiliary_term_reaches_the_encoder_of_dead_latents() -> None:
    """A published kernel drops exactly this gradient, and dead encoders then never move."""
    weights = parameters(16, 64, seed=2)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    dead = torch.tensor([5, 9])
    weights.encoder[dead] *= 0.1  # never among the top k, sometimes above zero
    weights.encoder_bias[dead] = 0.0
    plain = topk_step(weights, x, 2)
    with_auxiliary = topk_step(weights, x, 2, dead=dead, aux_k=2, aux_coefficient=1 / 32)
    assert plain.fired[dead].sum() == 0
    assert plain.gradients.encoder[dead].abs().max() == 0
    assert (with_auxiliary.gradients.encoder[dead].norm(dim=1) > 0).all()
    assert (with_auxiliary.gradients.decoder[dead].norm(dim=1) > 0).all()


def test_low_precision_candidates_give_the_same_step_almost_everywhere() -> None:
    weights = parameters(64, 1024, seed=4)
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(6))
    exact, rough = topk_step(weights, x, 16), topk_step(weights, x, 16, low_precision=True)
    assert relative_error(rough.reconstruction, exact.reconstruction) < 1e-4
    assert relative_error(rough.gradients.encoder, exact.gradients.encoder) < 1e-2
    assert relative_error(rough.gradients.decoder, exact.gradients.decoder) < 1e-2

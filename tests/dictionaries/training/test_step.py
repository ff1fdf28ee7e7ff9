"""The sparse step against the dense one, their straight-through gradients, and the kernels they are made of."""

from typing import Any

import pytest
import torch
from dense_oracle import dense_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted
from weights import apart, batch, random_parameters

from cutaway.dictionaries import sparse
from cutaway.dictionaries.sparse import Places
from cutaway.dictionaries.training.parameters import Parameters
from cutaway.dictionaries.training.rules import BatchTopKRule, GatedRule, JumpReLURule, ReLURule, Rule, TopKRule
from cutaway.dictionaries.training.step import StepResult, TrainingState, step
from cutaway.dictionaries.training.terms import (
    L0,
    AuxK,
    GatedAuxiliary,
    Lp,
    Matryoshka,
    MultiTopK,
    PreActivation,
    QuadraticL0,
    Reconstruction,
    Tanh,
    Term,
)


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
@settings(max_examples=60)
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
        auxiliary = {"aux_k": 8, "aux_coefficient": 1 / 32}
        reconstruction, extra, expected = dense_gradients(weights, x, k, dead=dead, **auxiliary)
        result = topk_step(weights, x, k, state=TrainingState(dead), **auxiliary)
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
    with_auxiliary = topk_step(weights, x, 2, state=TrainingState(dead), aux_k=2, aux_coefficient=1 / 32)
    assert plain.active_tokens[dead].sum() == 0
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


ANY_TERM: list[Term] = [
    Lp(0.3), Lp(0.3, p=0.5), Lp(0.2, p=2.0, norms="l2", warmup=1.0), Lp(0.1, norms="sum"),
    Tanh(0.5), Tanh(0.5, norms="none"), PreActivation(0.2), PreActivation(0.2, dead_only=True),
    Matryoshka((0.3, 1.0), bias_level=True), AuxK(0.5, k=2, form="sum"), AuxK(0.5, k=3, form="mean"),
    AuxK(0.5, form="residual", by_share=True), AuxK(0.5, form="token"),
]  # fmt: skip
OF_JUMPRELU: list[Term] = [L0(0.3), QuadraticL0(2.0), QuadraticL0(2.0, per="token")]


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    n, d, n_latents = draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(2, 40))
    k = draw(st.sampled_from([1, 2, n_latents - 1, n_latents]))
    by_norm, through = draw(st.booleans()), draw(st.booleans())
    rule: Rule = draw(
        st.sampled_from(
            [ReLURule(), TopKRule(k, by_norm), BatchTopKRule(k, by_norm), GatedRule(), JumpReLURule(0.7, 0.1, through)]
        )
    )
    terms = draw(st.lists(st.sampled_from(ANY_TERM), max_size=3))
    if isinstance(rule, JumpReLURule):
        terms += draw(st.lists(st.sampled_from(OF_JUMPRELU), max_size=2))
    if isinstance(rule, GatedRule):
        terms += [Lp(0.3, of="gate"), GatedAuxiliary()]
    if isinstance(rule, TopKRule) and draw(st.booleans()):
        terms += [MultiTopK(3, form="sum")]
    dead = draw(st.one_of(st.just(range(n_latents)), st.lists(st.integers(0, n_latents - 1), unique=True)))
    return {
        "n": n, "d": d, "n_latents": n_latents, "rule": rule, "dead": sorted(dead),
        "terms": (Reconstruction(draw(st.sampled_from(["sum", "mean", "variance"]))), *terms),
        # all latents of every token, as they fall, hardly any, or none at all above their thresholds
        "bias": draw(st.sampled_from([30.0, 0.0, -1.5, -100.0])),
        "kind": draw(st.sampled_from(["sae", "untied", "transcoder", "skip"])),
        "seed": draw(st.integers(0, 999)),
    }  # fmt: skip


@given(situations())
@settings(max_examples=150)
def test_sparse_equals_dense_whatever_is_active(s: dict[str, Any]) -> None:
    width = s["d"] + 2 if s["kind"] in ("transcoder", "skip") else s["d"]
    blocks = (1, s["d"] - 1) if s["kind"] in ("sae", "untied") and s["d"] > 1 else ()
    weights = random_parameters(
        s["d"], s["n_latents"], s["rule"], d_out=width, skip=s["kind"] == "skip", blocks=blocks, seed=s["seed"]
    )
    weights.encoder_bias.add_(s["bias"])
    x = batch(s["n"], s["d"], s["seed"] + 1)
    y = batch(s["n"], width, s["seed"] + 2) if width != s["d"] else None
    found = {
        way: step(
            weights, s["rule"], s["terms"], x, y, subtract_b_dec=s["kind"] == "sae",
            state=TrainingState(torch.tensor(s["dead"], dtype=torch.int64), progress=0.4), way=way,
        )
        for way in ("dense", "sparse")
    }  # fmt: skip
    dense, sparse_ = found["dense"], found["sparse"]
    assert (dense.sparse, sparse_.sparse) == (False, True)
    assert torch.isfinite(dense.loss)
    for name, value in dense.terms.items():
        assert apart(sparse_.terms[name], value) < 1e-10, name
    assert torch.equal(sparse_.active_tokens, dense.active_tokens)
    assert apart(sparse_.reconstruction, dense.reconstruction) < 1e-10
    assert (sparse_.threshold is None) == (dense.threshold is None)
    if dense.threshold is not None and sparse_.threshold is not None:
        assert apart(sparse_.threshold, dense.threshold) < 1e-12
    for name, gradient in dense.gradients.tensors().items():
        assert apart(sparse_.gradients.tensors()[name], gradient) < 1e-10, name


@pytest.mark.parametrize("rule", [ReLURule(), TopKRule(3), BatchTopKRule(3), GatedRule(), JumpReLURule(0.1)])
def test_auto_takes_the_sparse_way_only_where_little_is_active(rule: Rule) -> None:
    weights, x = random_parameters(8, 200, rule), batch(20, 8, 1)
    weights.encoder_bias.add_(5)
    few = isinstance(rule, TopKRule | BatchTopKRule)
    assert step(weights, rule, (Reconstruction(),), x).sparse is few
    weights.encoder_bias.sub_(9)
    assert step(weights, rule, (Reconstruction(),), x).sparse is True


def test_the_threshold_learns_the_slope_of_the_expected_loss() -> None:
    """Straight through, its mean gradient is the derivative of the mean loss over the data (arXiv 2407.14435, eq. 12).

    The loss of one token has none. That of 300,000 is estimated by moving θ_i to both ends of the window: by the same
    tokens, so what is left is the half of them on either side of θ, about 2 % here.
    """
    epsilon = 0.06
    rule = JumpReLURule(bandwidth=epsilon)
    weights = random_parameters(4, 3, rule, seed=5)
    weights.threshold.copy_(torch.tensor([0.5, 0.7, 0.3]))  # pyright: ignore[reportOptionalMemberAccess]
    x = batch(300_000, 4, 6)
    for terms in ((Reconstruction(),), (Reconstruction("mean", 0.0), L0(1.0)), (Reconstruction(), L0(0.3), Lp(0.2))):
        learned = step(weights, rule, terms, x).gradients.threshold
        assert learned is not None
        for latent in range(3):
            losses = []
            for side in (1, -1):
                moved = Parameters.of({name: tensor.clone() for name, tensor in weights.tensors().items()})
                assert moved.threshold is not None
                moved.threshold[latent] += side * epsilon / 2
                losses.append(step(moved, rule, terms, x).loss)
            slope = (losses[0] - losses[1]) / epsilon
            assert abs(learned[latent] - slope) < 0.05 * abs(slope), (terms, latent)


class Probe:
    """A term of no weight that keeps the code it is given."""

    kind = "probe"

    def __call__(self, forward: Any) -> torch.Tensor:
        places, values = forward.code.places, forward.code.values.detach()
        self.active = torch.zeros(places.n, places.n_latents, dtype=torch.bool)
        self.active[places.tokens, places.latents] = values > 0
        return 0 * forward.written.sum()


@pytest.mark.parametrize(
    "rule",
    [ReLURule(), TopKRule(16), TopKRule(16, by_norm=True), BatchTopKRule(16), BatchTopKRule(16, by_norm=True),
     GatedRule(), JumpReLURule(0.5), JumpReLURule(2.0, through_pre=True)],
    ids=str,
)  # fmt: skip
def test_bfloat16_candidates_leave_out_next_to_nothing(rule: Rule) -> None:
    """Planted features, read by noisy copies of them: fewer than one token of a thousand may be described otherwise."""
    features, x = planted(d=64, n_features=1_024, n_tokens=4_096, active=12, seed=2)
    weights = random_parameters(64, 1_024, rule, seed=4, dtype=torch.float32)
    weights.decoder_bias.copy_(x.mean(0))
    weights.encoder.copy_(features + 0.05 * batch(1_024, 64, 5, torch.float32))
    weights.encoder_bias.sub_(0.4)
    exact, rough = Probe(), Probe()

    def terms(probe: Any) -> list[Any]:
        return [Reconstruction(), *([L0(0.1)] if isinstance(rule, JumpReLURule) else []), probe]

    plain = step(weights, rule, terms(exact), x, way="sparse")
    low = step(weights, rule, terms(rough), x, way="sparse", low_precision=True)
    assert exact.active.sum() > 8 * len(x)
    assert (exact.active != rough.active).any(1).float().mean() < 1e-3
    assert apart(low.loss, plain.loss) < 1e-5
    for name, gradient in plain.gradients.tensors().items():
        assert apart(low.gradients.tensors()[name], gradient) < 3e-3, name


@given(
    n=st.integers(1, 9),
    width=st.sampled_from([1, 8, 40, 513, 20_000]),
    count=st.integers(0, 60),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_largest_of_all_is_a_sort_of_the_table(n: int, width: int, count: int, ties: bool, seed: int) -> None:
    scores = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    scores = scores.mul(3).round() if ties else scores
    places = sparse.largest_of_all(scores, count)
    flat = scores.flatten()
    assert len(places) == min(count, int((flat > 0).sum()))
    assert torch.equal(places, places.unique())
    expected = flat[flat > 0].sort(descending=True).values[:count]
    assert torch.equal(flat[places].sort(descending=True).values, expected)


@pytest.mark.parametrize("rule", [TopKRule(16), BatchTopKRule(16), JumpReLURule(0.5)], ids=str)
def test_a_large_constant_part_does_not_cost_bfloat16_its_digits(rule: Rule) -> None:
    """x is read without b_dec, and 20 times as long as what differs between tokens."""
    features, x = planted(d=64, n_features=1_024, n_tokens=2_048, active=12, seed=2)
    constant = 20 * (x - x.mean(0)).norm(dim=1).mean() * torch.nn.functional.normalize(batch(1, 64, 3, torch.float32))
    x = x - x.mean(0) + constant
    weights = random_parameters(64, 1_024, rule, seed=4, dtype=torch.float32)
    weights.encoder.copy_(features + 0.5 * batch(1_024, 1, 5, torch.float32).abs() * constant / constant.norm())
    weights.encoder_bias.copy_(-(weights.encoder @ x.mean(0)) - 0.6)
    exact, rough = Probe(), Probe()

    def terms(probe: Any) -> list[Any]:
        return [Reconstruction(), *([L0(0.1)] if isinstance(rule, JumpReLURule) else []), probe]

    step(weights, rule, terms(exact), x, subtract_b_dec=False, way="sparse")
    step(weights, rule, terms(rough), x, subtract_b_dec=False, way="sparse", low_precision=True)
    assert exact.active.sum() > 8 * len(x)
    assert (exact.active != rough.active).any(1).float().mean() < 2e-3

"""The sparse generator beside the literal, dense one; frequencies, correlations, the forest; any batch at any time."""

import itertools

import numpy as np
import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.superposition.frequencies import plant, zipf_forest
from cutaway.subjects.superposition.generator import FeatureGenerator, FeatureWorld, pushed_apart

SMALL = FeatureWorld(
    60, 16, 6.0, trees=10, branching=3, depth=2, factors=3, correlation=0.7, magnitude=(2, 1), spread=0.2, seed=1
)


def active(generator: FeatureGenerator, tokens: int, start: int = 0) -> np.ndarray:
    made = generator.batch(start, tokens)
    return made.dense(generator.world.n).numpy() != 0


def literal(generator: FeatureGenerator, tokens: int, seed: int) -> np.ndarray:
    """The definition, feature by feature: a Gaussian for every root, a coin for every child."""
    from scipy.special import ndtri

    random = np.random.default_rng(seed)
    world, forest = generator.world, generator.forest
    factor, rho = generator.loadings
    f = random.standard_normal((tokens, max(world.factors, 1)))
    on = np.zeros((tokens, world.n), bool)
    for place, root in enumerate(forest.roots):
        r = rho[place]
        latent = r * f[:, factor[place]] + np.sqrt(1 - r * r) * random.standard_normal(tokens)
        on[:, root] = latent > -ndtri(forest.frequency[root])
    for feature in range(world.n):  # parents come before their children
        children = forest.first_child[feature] + np.arange(forest.n_children[feature])
        if not len(children):
            continue
        p = forest.conditional[children]
        if world.exclusive:
            pick = np.searchsorted(np.cumsum(p), random.random(tokens), side="right")
            for turn, child in enumerate(children):
                on[:, child] = on[:, feature] & (pick == turn)
        else:
            for turn, child in enumerate(children):
                on[:, child] = on[:, feature] & (random.random(tokens) < p[turn])
    return on


@pytest.mark.parametrize("exclusive", [True, False])
def test_it_draws_what_the_literal_definition_draws(exclusive: bool) -> None:
    """Marginals and every pair's joint frequency agree with the dense oracle within what chance allows."""
    n = 120_000
    generator = FeatureGenerator(FeatureWorld(**{**SMALL.__dict__, "exclusive": exclusive}))
    ours, oracle = active(generator, n).astype(float), literal(generator, n, 0).astype(float)
    p = generator.forest.frequency
    error = np.sqrt(p * (1 - p) / n)
    assert np.abs((ours.mean(0) - p) / error).max() < 4.5
    assert np.abs((oracle.mean(0) - p) / error).max() < 4.5
    joint, expected = ours.T @ ours / n, oracle.T @ oracle / n
    spread = np.sqrt(2 * np.maximum(expected, 3 / n) / n)
    assert np.abs((joint - expected) / spread).max() < 5.5
    assert ours.sum(1).mean() == pytest.approx(6, abs=0.05)
    counts = [np.bincount(x.sum(1).astype(int), minlength=30)[:30] / n for x in (ours, oracle)]
    np.testing.assert_allclose(counts[0], counts[1], atol=0.006)


def test_the_correlation_of_roots_is_the_loadings_product() -> None:
    """Latent correlation ρ_i ρ_j within a factor: joint frequencies are the bivariate normal's."""
    from scipy.stats import multivariate_normal

    n = 400_000
    generator = FeatureGenerator(FeatureWorld(12, 8, 2.4, exponent=0.0, factors=2, correlation=0.8, seed=3))
    on = active(generator, n).astype(float)
    factor, rho = generator.loadings
    p = generator.forest.frequency
    signs = set()
    for i, j in itertools.combinations(range(12), 2):
        r = rho[i] * rho[j] if factor[i] == factor[j] else 0.0
        signs.add(np.sign(r))
        z = _quantile(p[i]), _quantile(p[j])
        expected = multivariate_normal(np.zeros(2), np.array([[1, r], [r, 1]])).cdf(z)  # pyright: ignore[reportArgumentType]
        assert (on[:, i] * on[:, j]).mean() == pytest.approx(expected, abs=5 * np.sqrt(0.05 / n))
    assert signs == {-1.0, 0.0, 1.0}, "the seed shows all three kinds of pair"


def _quantile(p: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(p))  # P(both below) = P(both above) by symmetry


def test_children_come_with_their_parent_and_exclude_each_other() -> None:
    generator = FeatureGenerator(SMALL)
    on = active(generator, 20_000)
    parent = generator.forest.parent
    born = np.flatnonzero(parent >= 0)
    assert len(born) == 50
    assert not (on[:, born] & ~on[:, parent[born]]).any()
    for feature in range(SMALL.n):
        children = np.flatnonzero(parent == feature)
        if len(children):
            assert on[:, children].sum(1).max() == 1
    free = FeatureGenerator(FeatureWorld(**{**SMALL.__dict__, "exclusive": False}))
    on = active(free, 20_000)
    assert max(on[:, parent == feature].sum(1).max() for feature in range(10)) > 1


def test_a_forest_is_grown_breadth_first() -> None:
    parent, first, number = plant(12, 2, 2, 2)
    assert parent.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert number.tolist() == [2, 2, 2, 2, 2] + [0] * 7
    assert first[:5].tolist() == [2, 4, 6, 8, 10]
    assert plant(20, 2, 2, 2)[0].tolist()[14:] == [-1] * 6  # what the trees do not need are roots


def test_frequencies_follow_zipf_and_sum_to_l0() -> None:
    forest = zipf_forest(1024, 12, trees=128)
    assert forest.frequency.sum() == pytest.approx(12, abs=1e-9)
    roots = forest.frequency[:128]
    np.testing.assert_allclose(roots / roots[0], np.arange(1, 129) ** -0.5)
    capped = zipf_forest(100, 12, exponent=1.0, p_max=0.4)
    assert capped.frequency.sum() == pytest.approx(12)
    assert capped.frequency.max() == 0.4
    assert (zipf_forest(100, 20, exponent=1.0, p_min=0.05).frequency >= 0.05).all()


def test_any_batch_at_any_time_is_the_same() -> None:
    generator = FeatureGenerator(SMALL)
    late = generator.batch(7, 256)
    stream = generator.batches(256, start=5)
    for number in (5, 6, 7):
        x = next(stream)
        torch.testing.assert_close(x, generator.batch(number, 256).x, rtol=0, atol=0)
    torch.testing.assert_close(x, late.x, rtol=0, atol=0)
    again = FeatureGenerator(SMALL).batch(7, 256)
    torch.testing.assert_close(again.x, late.x, rtol=0, atol=0)
    assert not torch.equal(FeatureGenerator(FeatureWorld(**{**SMALL.__dict__, "seed": 2})).batch(7, 256).x, late.x)


def test_activations_are_the_sum_of_what_is_active() -> None:
    generator = FeatureGenerator(FeatureWorld(**{**SMALL.__dict__, "signed": True, "noise": 0.0}))
    made = generator.batch(0, 512)
    torch.testing.assert_close(made.x, made.dense(60) @ generator.directions)
    assert (made.values < 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    noisy = FeatureGenerator(FeatureWorld(**{**SMALL.__dict__, "noise": 0.3})).batch(0, 4096)
    left = noisy.x - noisy.dense(60) @ generator.directions
    assert left.std().item() == pytest.approx(0.3, abs=0.005)


def test_magnitudes_have_their_means_and_spreads() -> None:
    generator = FeatureGenerator(FeatureWorld(20, 8, 10.0, exponent=0.0, p_max=0.9, magnitude=(5, 4), spread=0.3))
    made = generator.batch(0, 50_000)
    for feature in (0, 10, 19):
        values = made.values[made.features == feature].double()
        assert values.mean().item() == pytest.approx(generator.means[feature], abs=0.03)
        assert values.std().item() == pytest.approx(generator.spreads[feature], abs=0.03)
    assert generator.means[0] == 5
    assert generator.means[19] == 4
    wide = FeatureGenerator(FeatureWorld(20, 8, 10.0, exponent=0.0, p_max=0.9, magnitude=(0.1, 0.1), spread=1.0)).batch(
        0, 2000
    )
    assert (wide.values >= 0).all(), "what falls below 0 is folded"
    assert len(wide.values) == pytest.approx(20_000, rel=0.03)


def test_subsets_are_uniform_and_of_the_said_sizes() -> None:
    generator = FeatureGenerator(FeatureWorld(6, 4, active=(2, 3)))
    on = active(generator, 60_000)
    sizes = on.sum(1)
    assert set(sizes.tolist()) == {2, 3}
    for size, number in ((2, 15), (3, 20)):
        kinds, counts = np.unique(on[sizes == size], axis=0, return_counts=True)
        assert len(kinds) == number
        assert counts.min() > 0.85 * counts.mean()
    assert (active(FeatureGenerator(FeatureWorld(3, 4, active=(0, 3))), 4000).sum(1) == 0).mean() == pytest.approx(
        0.25, abs=0.03
    )


def test_directions_are_pushed_apart() -> None:
    few = pushed_apart(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), 300)
    torch.testing.assert_close(few @ few.T, torch.eye(8), atol=0.02, rtol=0)
    drawn = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    before, after = pushed_apart(drawn, 0), pushed_apart(drawn, 200)
    assert (after @ after.T).square().sum() < 0.85 * (before @ before.T).square().sum()
    torch.testing.assert_close(after.norm(dim=1), torch.ones(64))


def test_no_other_stream_of_random_numbers_begins_at_the_truth() -> None:
    """Dictionaries and controls begin with random numbers from small seeds; they must not start at the answer."""
    for seed in range(3):
        directions = FeatureGenerator(FeatureWorld(64, 32, 2.0, seed=seed)).directions
        for other in range(4):
            drawn = torch.nn.functional.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(other)))
            assert (drawn @ directions.T).abs().diagonal().mean() < 0.3
            from_numpy = np.random.default_rng(other).standard_normal((64, 32))
            drawn = torch.nn.functional.normalize(torch.from_numpy(from_numpy).float())
            assert (drawn @ directions.T).abs().diagonal().mean() < 0.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"l0": 0.0}, "how many features are active"),
        ({"l0": 80.0}, "cannot be active on average"),
        ({"l0": 50.0}, "it can be"),
        ({"active": (3, 2)}, "cannot be active"),
        ({"correlation": 1.0}, "[0, 1)"),
        ({"noise": -1.0}, "negative"),
        ({"p_min": 0.5}, "in order"),
        ({"with_children": 0.0}, "with_children"),
        ({"d": 0}, "at least 1"),
    ],
)
def test_a_world_that_cannot_be_is_refused(change, said: str) -> None:
    with pytest.raises(CutawayError) as error:
        FeatureGenerator(FeatureWorld(**{**SMALL.__dict__, **change}))
    assert said in str(error.value)

"""Scores of found directions and codes, beside permutation search, loops over tokens, and scikit-learn."""

import itertools

import numpy as np
import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.superposition.ceiling import fit_probes, linear_ceiling
from cutaway.subjects.superposition.generator import FeatureGenerator, FeatureWorld
from cutaway.subjects.superposition.scores import (
    COLUMNS,
    HELD_OUT,
    assign,
    cosines,
    nearest,
    random_code,
    score_dictionary,
    score_rows,
    uniqueness,
)

WORLD = FeatureWorld(24, 12, 3.0, exponent=0.3, magnitude=(2, 1), spread=0.2, seed=4)


def drawn(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("F", "n"), [(5, 5), (4, 6), (6, 4)])
def test_the_assignment_is_the_best_of_all(F: int, n: int, signed: bool) -> None:
    found, true = drawn(F, 3, 1), drawn(n, 3, 2)
    table = cosines(found, true).numpy()
    table = table if signed else np.abs(table)
    if n >= F:
        best = max(sum(table[i, p[i]] for i in range(F)) for p in itertools.permutations(range(n), F))
    else:
        best = max(sum(table[p[j], j] for j in range(n)) for p in itertools.permutations(range(F), n))
    matched = assign(found, true, signed=signed)
    assert matched.mcc * min(F, n) == pytest.approx(best)
    assert len(set(matched.latent)) == len(set(matched.feature)) == min(F, n)


def test_a_shuffled_truth_is_found_and_signs_are_told() -> None:
    true = drawn(10, 6, 0)
    shuffled = 3.0 * true[torch.randperm(10, generator=torch.Generator().manual_seed(1))]
    assert assign(shuffled, true, signed=True).mcc == pytest.approx(1)
    assert assign(-shuffled, true, signed=False).recovered() == 10
    assert assign(-shuffled, true, signed=True).recovered() < 10
    assert uniqueness(shuffled, true) == 1
    assert uniqueness(shuffled[:1].expand(5, -1), true) == 0.2
    assert nearest(true[:1].expand(3, -1), true, signed=True)[0].item() == pytest.approx(1)


def test_scores_are_those_of_a_loop_over_tokens() -> None:
    generator = FeatureGenerator(WORLD)
    directions, code = random_code(30, 4, generator, seed=5)
    scores = score_dictionary(directions, code, generator, tokens=384, batch=128)
    table = (torch.nn.functional.normalize(directions, dim=1) @ generator.directions.T).abs()
    best = [int(row.argmax()) for row in table]
    tp, fp, fn = (np.zeros(30) for _ in range(3))
    x, written, active = [], [], 0
    for step in range(3):
        made = generator.batch(HELD_OUT + step, 128)
        latents, output = code(made.x)
        truth = made.dense(24)
        x += list(made.x.double())
        written += list(output.double())
        for b in range(128):
            active += int((latents[b] != 0).sum())
            for j in range(30):
                fires, there = bool(latents[b, j] != 0), bool(truth[b, best[j]] != 0)
                tp[j] += fires and there
                fp[j] += fires and not there
                fn[j] += there and not fires
    f1 = [2 * a / (2 * a + b + c) if a + b + c else 0.0 for a, b, c in zip(tp, fp, fn, strict=True)]
    assert scores.f1 == pytest.approx(np.mean(f1))
    assert scores.precision == pytest.approx(
        np.mean([a / (a + b) if a + b else 0 for a, b in zip(tp, fp, strict=True)])
    )
    assert scores.recall == pytest.approx(np.mean([a / (a + c) if a + c else 0 for a, c in zip(tp, fn, strict=True)]))
    stacked, output = torch.stack(x), torch.stack(written)
    variance = (stacked - stacked.mean(0)).square().sum()
    assert scores.explained == pytest.approx(1 - ((stacked - output).square().sum() / variance).item())
    long = stacked.norm(dim=1) > 1e-6
    assert scores.shrinkage == pytest.approx((output.norm(dim=1) / stacked.norm(dim=1))[long].mean().item(), rel=0.02)
    assert scores.l0 == pytest.approx(active / 384)
    assert scores.dead == pytest.approx(np.mean(tp + fp == 0))
    assert scores.f1_interval[0] < scores.f1 < scores.f1_interval[1]
    assert len(score_rows({"random": scores})[0]) == 1 + len(COLUMNS)


def test_the_truth_scores_one_and_the_control_does_not() -> None:
    """In as many dimensions as features the true code can be read off; random directions of the same number cannot."""
    generator = FeatureGenerator(FeatureWorld(**{**WORLD.__dict__, "d": 24, "orthogonal_steps": 400}))
    back = torch.linalg.inv(generator.directions)

    def true_code(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = x @ back
        latents = latents * (latents > 0.05)
        return latents, latents @ generator.directions

    perfect = score_dictionary(generator.directions, true_code, generator, tokens=4096)
    assert perfect.f1 > 0.995
    assert perfect.recovered == 24
    assert perfect.explained > 0.999
    assert perfect.shrinkage == pytest.approx(1, abs=0.01)
    assert perfect.l0 == pytest.approx(perfect.true_l0, abs=0.02)
    control = score_dictionary(*random_code(24, 3, generator), generator, tokens=4096)
    assert control.f1 < 0.4
    assert control.recovered == 0


def test_random_directions_come_close_in_eight_dimensions() -> None:
    """Why 32 features in 8 dimensions say nothing: the nearest of 128 random directions has signed cosine 0.79."""
    generator = FeatureGenerator(FeatureWorld(32, 8, active=(2, 4), signed=True))
    found = [
        nearest(random_code(128, 3, generator, seed)[0], generator.directions, signed=True).mean() for seed in range(8)
    ]
    assert np.mean(found) == pytest.approx(0.79, abs=0.01)


def test_the_probes_are_logistic_regressions() -> None:
    """Beside scikit-learn on stored samples: the same decisions on nearly all tokens."""
    from sklearn.linear_model import LogisticRegression

    generator = FeatureGenerator(WORLD)
    W, c, scale = fit_probes(generator, steps=1500, batch=256, rate=2e-2)
    train, test = generator.batch(1, 30_000), generator.batch(2, 4000)
    for feature in (0, 11, 23):
        peer = LogisticRegression(C=1e4, max_iter=500).fit(train.x / scale, train.dense(24)[:, feature] > 0)
        ours = (test.x / scale @ W[:, feature] + c[feature]).numpy()
        theirs = peer.decision_function(test.x / scale)
        assert np.corrcoef(ours, theirs)[0, 1] > 0.99
        assert ((ours > 0) == (theirs > 0)).mean() > 0.985


def test_the_ceiling_is_one_where_features_can_be_read_off_and_lower_where_not() -> None:
    wide = FeatureGenerator(FeatureWorld(**{**WORLD.__dict__, "d": 24, "orthogonal_steps": 300}))
    narrow = FeatureGenerator(FeatureWorld(**{**WORLD.__dict__, "d": 6}))
    options = {"steps": 600, "batch": 256, "tokens": 8192, "rate": 2e-2}
    assert linear_ceiling(wide, **options).f1 > 0.99
    found = linear_ceiling(narrow, **options)
    assert 0.3 < found.f1 < 0.85
    assert found.f1_interval[0] < found.f1 < found.f1_interval[1]


def test_shapes_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(CutawayError, match="cannot be compared"):
        cosines(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(CutawayError, match="cannot be active"):
        random_code(4, 5, FeatureGenerator(WORLD))

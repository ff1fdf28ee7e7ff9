"""k-sparse probing on dictionaries in which the label is one latent, two, or none; selection against plain loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, ReLU
from cutaway.dictionaries.evaluation.probing import (
    DENSE_PROBE,
    NO_ACTIVATION,
    RANDOM,
    best_cut,
    best_latents,
    sparse_codes,
    sparse_probing,
)

D, N = 16, 600


def identity(n: int = D) -> Dictionary:
    """Latent i is direction i; activations are what of x is above 0.5."""
    eye = torch.eye(n)
    return Dictionary(eye, torch.full((n,), -0.5), eye, torch.zeros(n), ReLU(), "blocks.0.resid_post")


def features(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(N, D, generator=generator) < 0.2
    return fires * (1 + torch.rand(N, D, generator=generator)) + 0.05 * torch.randn(N, D, generator=generator)


def test_a_label_that_is_one_latent_needs_one() -> None:
    x = features()
    labels = (x[:, 3] > 0.5).numpy()
    found = sparse_probing(identity(), x, labels)
    assert found.latents == {"True": (3,)}
    for k in (1, 2, 5, 16):
        one = found.effects[k]["accuracy"]
        assert one.value > 0.99
        by_name = {control.name: control.value for control in one.controls}
        assert by_name[NO_ACTIVATION["accuracy"]] == pytest.approx(max(labels.mean(), 1 - labels.mean()))
        assert by_name[DENSE_PROBE] > 0.97
    first = {control.name: control.value for control in found.effects[1]["f1"].controls}
    assert first[RANDOM] < found.effects[1]["f1"].value - 0.1
    assert first[NO_ACTIVATION["f1"]] == pytest.approx(2 * labels.mean() / (1 + labels.mean()))


def test_a_label_of_two_latents_needs_two() -> None:
    x = features(1)
    labels = np.where(((x[:, 3] > 0.5) | (x[:, 7] > 0.5)).numpy(), "yes", "no")
    effects = sparse_probing(identity(), x, labels, ks=(1, 2)).effects
    assert effects[1]["f1"].value < 0.85
    assert effects[2]["f1"].value > 0.99


@pytest.mark.parametrize("selection", ["mean-difference", "l1"])
def test_labels_that_mean_nothing_are_not_told(selection: str) -> None:
    """Latents are chosen on training folds alone: chosen on everything, the best of 16 would beat the majority."""
    x = features(2)
    labels = np.random.default_rng(0).random(N) < 0.5
    one = sparse_probing(identity(), x, labels, ks=(1, 5), selection=selection).effects[5]["accuracy"]  # type: ignore[arg-type]
    assert one.value == pytest.approx(0.5, abs=0.06)
    low, high = one.interval or (0, 0)
    assert low - 0.02 < 0.5 < high + 0.02


def test_mean_differences_equal_a_loop_and_l1_finds_both() -> None:
    x = features(3)
    target = ((x[:, 3] > 0.5) | (x[:, 7] > 0.5)).numpy()
    dictionary = identity()
    a = dictionary.encode(x).numpy().astype(float)
    scores = [abs(a[target, i].mean() - a[~target, i].mean()) / a[:, i].std() for i in range(D)]
    code = sparse_codes(dictionary, x)
    np.testing.assert_allclose(code.toarray(), a, atol=1e-6)
    assert best_latents(code, target, D).tolist() == np.argsort(scores)[::-1].tolist()
    assert set(best_latents(code, target, 2, "l1").tolist()) == {3, 7}


def test_several_classes_and_several_seeds() -> None:
    x = features(4)
    labels = np.where((x[:, 1] > 0.5).numpy(), "one", np.where((x[:, 2] > 0.5).numpy(), "two", "neither"))
    good = identity()
    worse = Dictionary(torch.eye(D) * 0.3, good.b_enc, good.W_dec, good.b_dec, ReLU(), good.site)
    found = sparse_probing([good, worse], x, labels, ks=(2,))
    assert found.classes == ("neither", "one", "two")
    assert found.latents["one"][0] == 1
    each = found.per_seed[2]["f1"]
    assert found.effects[2]["f1"].value == pytest.approx(np.mean(each))
    assert each[0] > each[1]
    low, high = found.effects[2]["f1"].interval or (0, 0)
    assert high - low > (each[0] - each[1]) / 2, "seeds that differ widen the interval"


def test_groups_stay_on_one_side_of_a_fold() -> None:
    """Each group has a direction of its own and one label: told within groups, but not from one group to another."""
    generator = torch.Generator().manual_seed(5)
    group = torch.arange(N) % 12
    x = torch.zeros(N, D)
    x[torch.arange(N), group] = 1 + torch.rand(N, generator=generator)
    labels = (group % 2 == 0).numpy()
    apart = sparse_probing(identity(), x, labels, groups=group.numpy(), ks=(16,)).effects[16]["accuracy"]
    mixed = sparse_probing(identity(), x, labels, ks=(16,)).effects[16]["accuracy"]
    assert mixed.value > 0.99
    assert apart.value < 0.7


def test_bad_input_is_named() -> None:
    x = features()
    with pytest.raises(CutawayError, match="every label is the same"):
        sparse_probing(identity(), x, ["a"] * N)
    with pytest.raises(CutawayError, match="600 activations but 3 labels"):
        sparse_probing(identity(), x, ["a", "b", "a"])
    with pytest.raises(CutawayError, match="600 activations but 2 groups"):
        sparse_probing(identity(), x, ["a", "b"] * 300, groups=[1, 2])
    with pytest.raises(CutawayError, match="fewer than the 5 folds"):
        sparse_probing(identity(), x, ["a"] * (N - 3) + ["b"] * 3)


def test_the_cut_is_where_f1_is_best() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores = generator.standard_normal(30).round(1)  # with ties
        target = generator.random(30) < 0.3
        target[0] = True
        cut = best_cut(scores, target)

        def f1(at: float, scores: np.ndarray = scores, target: np.ndarray = target) -> float:
            yes = scores > at
            return 2 * (yes & target).sum() / max(1, yes.sum() + target.sum())

        assert f1(cut) == pytest.approx(max(f1(at) for at in [*scores, scores.min() - 1]))


def test_a_rare_label_is_still_said() -> None:
    x = features(6)
    rare = ((x[:, 3] > 0.5) & (x[:, 5] > 0.5)).numpy()  # 4 %, and latent 3 alone is right in one of five
    one = sparse_probing(identity(), x, rare, ks=(1,), folds=3).effects[1]["f1"]
    assert one.value > 0.25

"""Exclusive and shared latents on crosscoders whose latents are known; latent scaling against least squares."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, Port, ReLU, TopK
from cutaway.dictionaries.evaluation.crosscoders import DECOUPLED, SHRUNK, compare_sides

D, N = 24, 4000
SCALE_B = 7.0  # model B's activations are that much longer


def planted(seed: int = 0) -> tuple[Dictionary, Tensor]:
    """Six features: 0, 1 in both models; 2 in A only; 3 in B only; 4 in both, its A decoder shrunk to nothing; 5 in
    both, written by latent 5 in B and by latent 6 in A. Each latent reads its feature without error.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    features_a = features_b = basis[:, :6].T  # one space, as a model and its fine-tuned self have
    fires = torch.rand(N, 6, generator=generator) < 0.3
    f = fires * (0.5 + torch.rand(N, 6, generator=generator))
    in_a = torch.tensor([1.0, 1, 1, 0, 1, 1])
    in_b = torch.tensor([1.0, 1, 0, 1, 1, 1])
    noise = 0.01 * torch.randn(N, 2 * D, generator=generator)
    x = torch.cat([(f * in_a) @ features_a, SCALE_B * (f * in_b) @ features_b], dim=1) + noise
    zero = torch.zeros(1, D)
    read_a, read_b = features_a, features_b / SCALE_B
    encoder = torch.cat(
        [
            torch.cat([read_a[:2] / 2, read_b[:2] / 2], 1),
            torch.cat([read_a[2:3], zero], 1),
            torch.cat([zero, read_b[3:4]], 1),
            torch.cat([zero, read_b[4:5]], 1),
            torch.cat([zero, read_b[5:6]], 1),
            torch.cat([read_a[5:6], zero], 1),
        ]
    )
    write_b = features_b * SCALE_B
    decoder = torch.cat(
        [
            torch.cat([features_a[:2], write_b[:2]], 1),
            torch.cat([features_a[2:3], zero], 1),
            torch.cat([zero, write_b[3:4]], 1),
            torch.cat([zero, write_b[4:5]], 1),
            torch.cat([zero, write_b[5:6]], 1),
            torch.cat([features_a[5:6], zero], 1),
        ]
    )
    ports = (Port("blocks.1.resid_post", D, {"id": "a"}), Port("blocks.1.resid_post", D, {"id": "b"}))
    crosscoder = Dictionary(
        encoder.T.contiguous(), torch.full((7,), -0.1), decoder, torch.zeros(2 * D), ReLU(), ports[0].site, reads=ports
    )
    return crosscoder, x


def test_planted_latents_are_told_apart() -> None:
    crosscoder, x = planted()
    found = compare_sides(crosscoder, x, x, labels=("A", "B"))
    assert found.exclusive(0).tolist() == [False, False, True, False, False, False, True]
    assert found.exclusive(1).tolist() == [False, False, False, True, True, True, False]
    assert found.shared.tolist() == [True, True, False, False, False, False, False]
    torch.testing.assert_close(found.cosine[:2], torch.ones(2), atol=1e-4, rtol=0)
    assert found.artefact(0).tolist() == [False] * 6 + [True], "latent 6 has a twin on the other side"
    assert found.artefact(1).tolist() == [False, False, False, False, True, True, False]
    assert found.nu_error[3].abs() < 0.05
    assert found.nu_reconstruction[3].abs() < 0.3
    assert found.nu_error[4] > 0.8, "shrunk away, but there in A's error"
    assert found.nu_error[5].abs() < SHRUNK
    assert found.nu_reconstruction[5] > DECOUPLED
    assert len(found.warnings()) == 2
    assert found.warnings()[1].startswith("2 of the 3 measured latents exclusive to B")
    assert sum(found.histogram()[1]) == 7
    assert found.effects["shared_cosine"].value > 0.99
    assert abs(found.effects["shared_cosine"].controls[0].value) < 0.9
    for one in found.effects.values():
        one.require_controls()
    assert found.to_json()["artefacts"] == [1, 2]


def test_spread_is_taken_out() -> None:
    """Without it the shared latents of the longer model would seem to be its own: 7 / 8 of the norm."""
    crosscoder, x = planted()
    raw = crosscoder.W_dec[0, D:].norm() / (crosscoder.W_dec[0, :D].norm() + crosscoder.W_dec[0, D:].norm())
    assert raw > 0.85
    assert 0.4 < compare_sides(crosscoder, x, x).share[0] < 0.6


@pytest.mark.parametrize("latent", [2, 3, 4, 5])
def test_latent_scaling_is_least_squares(latent: int) -> None:
    crosscoder, x = planted(1)
    found = compare_sides(crosscoder, x, x)
    f = crosscoder.encode(x)
    written = (crosscoder(x) - crosscoder.b_dec).double()
    own = int(found.share[latent] > 0.5)

    def spread(part: Tensor) -> Tensor:
        return (part - part.mean(0)).double().square().sum(1).mean().sqrt()

    halves = [slice(0, D), slice(D, 2 * D)]
    scales = [spread(x[:, half]) for half in halves]
    direction = crosscoder.W_dec[latent, halves[own]].double() / scales[own]
    regressor = (f[:, latent, None].double() * direction).flatten().numpy()
    factors = []
    for half, scale in zip(halves, scales, strict=True):
        rest = written[:, half] - f[:, latent, None] * crosscoder.W_dec[latent, half]
        for target in (x[:, half].double() - rest, written[:, half]):
            factors.append(np.linalg.lstsq(regressor[:, None], (target / scale).flatten().numpy())[0][0])
    error, reconstruction = np.array(factors).reshape(2, 2).T
    assert found.nu_error[latent].item() == pytest.approx(error[1 - own] / error[own], abs=1e-4)
    assert found.nu_reconstruction[latent].item() == pytest.approx(
        reconstruction[1 - own] / reconstruction[own], abs=1e-4
    )


def test_models_of_different_width_have_norms_but_no_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    ports = (Port("blocks.0.resid_post", 6), Port("blocks.1.mlp.post", 10))
    crosscoder = Dictionary(
        torch.randn(16, 8, generator=generator), torch.zeros(8), torch.randn(8, 16, generator=generator),
        torch.zeros(16), TopK(2), ports[0].site, reads=ports,
    )  # fmt: skip
    x = torch.randn(100, 16, generator=generator)
    found = compare_sides(crosscoder, x, x)
    assert found.share.isfinite().all()
    assert found.cosine.isnan().all()
    assert found.nu_error.isnan().all()
    assert "shared_cosine" not in found.effects


def test_a_dictionary_of_one_tensor_is_refused() -> None:
    one = Dictionary(torch.ones(4, 3), torch.zeros(3), torch.ones(3, 4), torch.zeros(4), TopK(1), "blocks.0.resid_post")
    with pytest.raises(CutawayError, match="a crosscoder's"):
        compare_sides(one, torch.ones(5, 4), torch.ones(5, 4))

"""The dictionary itself."""

from dataclasses import replace

import pytest
import torch

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, TopK, log_sparsity, random_dictionary


def small(d: int = 8, n: int = 24, k: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return Dictionary(
        W_enc=normal(d, n),
        b_enc=normal(n) * 0.2,
        W_dec=torch.nn.functional.normalize(normal(n, d), dim=1),
        b_dec=normal(d),
        selector=TopK(k),
        site="blocks.3.resid_post",
        model={"id": "tiny", "revision": None, "weight_hash": "abc"},
        sparsity=log_sparsity(torch.rand(n, generator=generator)),
        metadata={"corpus": "tests"},
    )


def plain_encode(dictionary: Dictionary, x: torch.Tensor) -> torch.Tensor:
    """The equation, one token and one latent at a time, in float64."""
    d = dictionary.to(dtype=torch.float64)
    assert isinstance(d.selector, TopK)
    a = torch.zeros(len(x), dictionary.d_sae, dtype=torch.float64)
    for row, token in enumerate(x.double()):
        h = [float((token - d.b_dec) @ d.W_enc[:, i] + d.b_enc[i]) for i in range(dictionary.d_sae)]
        for latent in sorted(range(len(h)), key=lambda i: h[i])[-d.selector.k :]:
            a[row, latent] = max(h[latent], 0.0)
    return a


def test_encode_and_decode_are_the_equations() -> None:
    dictionary = small(k=14)
    x = 2 * torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    a = plain_encode(dictionary, x)
    assert ((a > 0).sum(1) < 14).any()  # the relu after the selection matters on these data
    torch.testing.assert_close(dictionary.encode(x).double(), a, rtol=1e-4, atol=1e-5)
    expected = a @ dictionary.W_dec.double() + dictionary.b_dec.double()
    for reconstruction in (dictionary(x), dictionary.decode(dictionary.encode(x))):
        torch.testing.assert_close(reconstruction.double(), expected, rtol=1e-4, atol=1e-5)


def test_any_leading_shape_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = small()
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2))
    values, latents = dictionary.encode_sparse(x)
    assert values.shape == latents.shape == (4, 5, 3)
    assert (values[..., :-1] >= values[..., 1:]).all()
    dense = torch.zeros(4, 5, 24).scatter(-1, latents, values)
    torch.testing.assert_close(dense, dictionary.encode(x))
    torch.testing.assert_close(dictionary(x).view(-1, 8), dictionary(x.view(-1, 8)))
    monkeypatch.setattr("cutaway.dictionaries.dictionary._CHUNK_BYTES", 24 * 4 * 3)
    torch.testing.assert_close(dictionary.encode_sparse(x)[0], values)
    assert torch.equal(dictionary.encode_sparse(x)[1], latents)
    chosen = torch.tensor([7, 0, 19])
    torch.testing.assert_close(dictionary.activations_of(x, chosen), dense[..., chosen])


def test_encode_is_differentiable_in_x() -> None:
    dictionary = small(dtype=torch.float64)
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: dictionary.decode(dictionary.encode(v)), (x,))


def test_the_control_has_unit_random_directions_and_a_fitted_gain() -> None:
    dictionary = small()
    sample = torch.randn(3_000, 8, generator=torch.Generator().manual_seed(4)) + 5
    control = random_dictionary(dictionary, sample, seed=1)
    assert control.selector == dictionary.selector
    assert control.W_dec.shape == dictionary.W_dec.shape
    torch.testing.assert_close(control.W_dec.norm(dim=1), torch.ones(24))
    error = (control(sample) - sample).square().sum()
    for factor in (0.9, 1.1):  # no other gain does better
        other = replace(control, W_enc=control.W_enc * factor)
        assert (other(sample) - sample).square().sum() > error
    assert not torch.equal(random_dictionary(dictionary, sample, seed=2).W_dec, control.W_dec)


def test_the_control_of_weights_in_float16_has_the_gain_of_float32() -> None:
    sample = torch.randn(30_000, 8, generator=torch.Generator().manual_seed(4)) * 4  # its squares add up to 3.8 M
    wide, narrow = (random_dictionary(small(dtype=dtype), sample, seed=1) for dtype in (torch.float32, torch.float16))
    torch.testing.assert_close(narrow.W_enc.float(), wide.W_enc, rtol=0.02, atol=1e-3)


def test_wrong_shapes_and_widths_are_named() -> None:
    dictionary = small()
    with pytest.raises(CutawayError, match=r"b_enc has shape \[5\] where \[24\]"):
        replace(dictionary, b_enc=torch.zeros(5))
    with pytest.raises(CutawayError, match="W_dec holds NaN"):
        replace(dictionary, W_dec=dictionary.W_dec * torch.nan)
    with pytest.raises(CutawayError, match="k = 25"):
        replace(dictionary, selector=TopK(25))
    with pytest.raises(CutawayError, match=r"width 9 .* width 8: .* blocks.3.resid_post of tiny"):
        dictionary.encode_sparse(torch.zeros(2, 9))

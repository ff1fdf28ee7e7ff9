"""The dictionary itself, and its files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, TopK, log_sparsity, random_dictionary
from cutaway.dictionaries.saelens_format import (
    CFG,
    SPARSITY,
    WEIGHTS,
    hook_name,
    load_dictionary,
    save_dictionary,
    site_name,
)


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


def test_a_saved_dictionary_comes_back_the_same(tmp_path: Path) -> None:
    dictionary = small()
    folder = save_dictionary(dictionary, tmp_path / "a" / "dictionary")
    back = load_dictionary(folder)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "sparsity"):
        assert torch.equal(getattr(back, name), getattr(dictionary, name)), name
    assert (back.selector, back.site, back.model, back.metadata) == (
        dictionary.selector,
        dictionary.site,
        dictionary.model,
        dictionary.metadata,
    )
    cfg = json.loads((folder / CFG).read_text())
    assert cfg["architecture"] == "topk"
    assert cfg["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert cfg["metadata"]["cutaway"]["site"] == "blocks.3.resid_post"
    assert sorted(file.name for file in folder.parent.rglob("*") if file.is_file()) == sorted([CFG, WEIGHTS, SPARSITY])
    with pytest.raises(CutawayError, match="exists"):
        save_dictionary(dictionary, folder)
    save_dictionary(small(seed=9), folder, overwrite=True)
    assert not torch.equal(load_dictionary(folder).W_enc, dictionary.W_enc)
    assert [file.name for file in folder.parent.iterdir()] == ["dictionary"]


def test_a_failed_write_leaves_the_old_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = small()
    folder = save_dictionary(dictionary, tmp_path / "dictionary")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cutaway.dictionaries.saelens_format.write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        save_dictionary(small(seed=9), folder, overwrite=True)
    assert torch.equal(load_dictionary(folder).W_enc, dictionary.W_enc)
    assert [file.name for file in tmp_path.iterdir()] == ["dictionary"]
    other = tmp_path / "notes"
    other.mkdir()
    with pytest.raises(CutawayError, match="not a dictionary's folder"):
        save_dictionary(dictionary, other, overwrite=True)


def test_other_conventions_are_folded_when_loaded(tmp_path: Path) -> None:
    """A decoder whose norms rescale the activations, and a bias that is not taken off the input."""
    dictionary = small()
    folder = save_dictionary(dictionary, tmp_path / "dictionary")
    tensors = load_file(folder / WEIGHTS)
    norms = torch.linspace(0.5, 2, 24)
    save_file(tensors | {"W_dec": tensors["W_dec"] * norms[:, None]}, folder / WEIGHTS)
    cfg = json.loads((folder / CFG).read_text())
    cfg |= {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}
    (folder / CFG).write_text(json.dumps(cfg))
    back = load_dictionary(folder)
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(5))
    h = (x @ tensors["W_enc"] + tensors["b_enc"]) * norms
    a = torch.zeros_like(h).scatter(1, h.topk(3, dim=1).indices, 1.0) * h.relu()
    torch.testing.assert_close(back.encode(x), a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back(x), (a / norms) @ (tensors["W_dec"] * norms[:, None]) + tensors["b_dec"])


def test_spoiled_files_are_refused_with_their_name(tmp_path: Path) -> None:
    folder = save_dictionary(small(), tmp_path / "dictionary")
    good, cfg = load_file(folder / WEIGHTS), json.loads((folder / CFG).read_text())

    def refused(match: str) -> None:
        with pytest.raises(CutawayError, match=match):
            load_dictionary(folder)

    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    refused("sae_weights.safetensors is cut short")
    save_file({name: tensor for name, tensor in good.items() if name != "b_dec"}, folder / WEIGHTS)
    refused("lacks b_dec")
    save_file(good | {"W_enc": good["W_enc"].T.contiguous()}, folder / WEIGHTS)
    refused(r"W_enc has shape \[24, 8\], but cfg.json says d_in=8, d_sae=24")
    save_file(good | {"b_enc": torch.zeros(7)}, folder / WEIGHTS)
    refused("b_enc has shape")
    save_file(good | {"b_enc": torch.full((24,), torch.inf)}, folder / WEIGHTS)
    refused("b_enc holds NaN or infinite")
    (folder / WEIGHTS).unlink()
    refused("sae_weights.safetensors is missing")
    save_file(good, folder / WEIGHTS)
    for change, match in (
        ({"k": None}, "lacks 'k'"),
        ({"d_in": "8"}, "'d_in' is '8'"),
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"normalize_activations": "layer_norm"}, "normalises its input"),
        ({"k": 500}, "k = 500"),
    ):
        (folder / CFG).write_text(json.dumps(cfg | change))
        refused(match)
    (folder / CFG).write_text("{")
    refused("not JSON")
    (folder / CFG).unlink()
    refused("holds no dictionary")


def test_hook_names_go_there_and_back() -> None:
    for site in ("blocks.11.resid_post", "blocks.0.mlp.out", "blocks.2.attn.z", "embed", "blocks.1.ln2.normalized"):
        assert site_name(hook_name(site)) == site
        assert hook_name(site) != site
    assert hook_name("blocks.3.mlp.in") == "blocks.3.mlp.in"  # the value after the gain has no hook there

"""Inspection: what the files say is told as it is, and a wrong site or scale is seen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, JumpReLU, Port, TopK, log_sparsity
from cutaway.dictionaries.formats import folds
from cutaway.dictionaries.formats.files import at_site, read, save
from cutaway.dictionaries.formats.inspection import check_fit, expected_l0, facts
from cutaway.model.language_model import LanguageModel

SITE = "blocks.1.resid_post"
RANK = 12


@pytest.fixture(scope="module")
def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 61, (24, 20), generator=generator)
    ids[:, 0] = 0
    return ids


def values(lm: LanguageModel, rows: Tensor, site: str) -> Tensor:
    """At every position but the first, by the run itself, sites by head flattened."""
    from cutaway.data.harvesting.activations import as_tokens

    return lm.run(as_tokens(rows), capture=site)[site][:, 1:].flatten(2).flatten(0, 1)


def of_components(x: Tensor, y: Tensor | None = None) -> Dictionary:
    """Two latents for each of the first principal directions of x, one a sign: a JumpReLU that reconstructs x well.

    With y it writes what least squares gives of y from them: a transcoder.
    """
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    v = directions[:RANK]
    W_enc = torch.cat([v, -v]).T.contiguous()
    scores = (x - mean) @ v.T
    threshold = (0.1 * scores.std(0)).repeat(2)
    if y is None:
        return Dictionary(
            W_enc, torch.zeros(2 * RANK), W_enc.T.contiguous(), mean, JumpReLU(threshold), SITE, {"id": "tiny"}
        )
    out = torch.linalg.lstsq(scores, y - y.mean(0)).solution
    return Dictionary(
        W_enc, -mean @ W_enc, torch.cat([out, -out]), y.mean(0), JumpReLU(threshold), "blocks.1.mlp.in", {"id": "tiny"},
        reads=(Port("blocks.1.mlp.in", 32, {"id": "tiny"}),), writes=(Port("blocks.1.mlp.out", 32, {"id": "tiny"}),),
        subtract_b_dec=False,
    )  # fmt: skip


def test_the_figures_are_those_of_their_definitions(tiny: LanguageModel, rows: Tensor, tmp_path: Path) -> None:
    x = values(tiny, rows, SITE)
    dictionary = of_components(x)
    fit = check_fit(tiny, read(save(dictionary, tmp_path / "d")), rows)
    h = (x - dictionary.b_dec).double() @ dictionary.W_enc.double()
    assert isinstance(dictionary.selector, JumpReLU)
    a = h * (h > dictionary.selector.threshold.double())
    written = a @ dictionary.W_dec.double() + dictionary.b_dec.double()
    fvu = ((x - written) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    found = [effect.value for effect in fit.effects]
    assert found[0] == pytest.approx(fvu.item(), rel=1e-4)
    assert found[1] == pytest.approx((a > 0).sum(1).double().mean().item())
    assert found[2] == pytest.approx(torch.cosine_similarity(x.double(), written).mean().item(), rel=1e-4)
    for effect in fit.effects:
        effect.require_controls()
    assert fit.effects[0].value < 0.7 * fit.effects[0].controls[0].value
    assert (fit.n_rows, fit.n_tokens, fit.effects[0].n) == (24, 24 * 19, 24)
    assert fit.fits
    assert fit.verdicts == ("nothing around the stated site, and no other scale, fits better",)


def test_a_wrong_site_is_seen(tiny: LanguageModel, rows: Tensor, tmp_path: Path) -> None:
    dictionary = of_components(values(tiny, rows, SITE))
    for wrong in ("blocks.1.resid_mid", "blocks.1.mlp.out", "blocks.1.ln2.normalized", "blocks.2.resid_post"):
        fit = check_fit(tiny, read(save(at_site(dictionary, wrong), tmp_path / wrong)), rows)
        assert not fit.fits
        own = {one.name: one.fvu for one in fit.sites}
        if wrong == "blocks.2.resid_post":  # looked for are the streams one layer before and after
            assert not any(name.startswith("blocks.1.") for name in own if name != "blocks.0.resid_post")
            continue
        assert fit.sites[0].name == SITE
        assert any(f"{SITE} fits clearly better" in verdict for verdict in fit.verdicts), (wrong, fit.verdicts)
    unknown = check_fit(tiny, read(save(at_site(dictionary, "unknown"), tmp_path / "u")), rows)
    assert unknown.sites[0].name == SITE  # of all layers' sites
    assert "name no site" in unknown.verdicts[0]
    told = check_fit(tiny, read(save(at_site(dictionary, "unknown"), tmp_path / "v")), rows, site=SITE)
    assert told.fits


def test_a_wrong_scale_is_seen(tiny: LanguageModel, rows: Tensor, tmp_path: Path) -> None:
    """Weights that want scaled activations are given plain ones.

    Too small activations stay below the thresholds, and FVU rises; too large ones pass them, which FVU does not mind
    and L0 does.
    """
    x = values(tiny, rows, SITE)
    right = of_components(x)
    assert isinstance(right.selector, JumpReLU)
    right = replace(right, selector=JumpReLU(12 * right.selector.threshold))
    fires = (right.encode(x) > 0).double().mean(0)
    right = replace(right, sparsity=log_sparsity(fires))
    assert check_fit(tiny, read(save(right, tmp_path / "right")), rows).fits
    scale = 32**0.5 / x.norm(dim=1).mean().item()
    assert scale > 2
    small = folds.scaled(right, 1 / scale, 1 / scale)
    fit = check_fit(tiny, read(save(small, tmp_path / "small")), rows)
    assert any("activations times √d / mean norm" in v and "fit clearly better" in v for v in fit.verdicts)
    expected = ((x - right(x)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert fit.scales[0].fvu == pytest.approx(expected.item(), rel=1e-3)
    large = folds.scaled(right, scale, scale)
    fit = check_fit(tiny, read(save(large, tmp_path / "large")), rows)
    assert any("latents are active on a token where summed frequencies of activation says" in v for v in fit.verdicts)
    assert not fit.fits


def test_transcoders_are_tried_at_both_ends(tiny: LanguageModel, rows: Tensor, tmp_path: Path) -> None:
    dictionary = of_components(values(tiny, rows, "blocks.1.mlp.in"), values(tiny, rows, "blocks.1.mlp.out"))
    assert check_fit(tiny, read(save(dictionary, tmp_path / "right")), rows).fits
    model = {"id": "tiny"}
    for name, reads, writes in (
        ("reading blocks.1.mlp.in", "blocks.1.resid_mid", "blocks.1.mlp.out"),
        ("writing blocks.1.mlp.out", "blocks.1.mlp.in", "blocks.1.attn.out"),
    ):
        wrong = replace(dictionary, site=reads, reads=(Port(reads, 32, model),), writes=(Port(writes, 32, model),))
        fit = check_fit(tiny, read(save(wrong, tmp_path / name)), rows)
        best = fit.sites[0].name.replace("ln2.normalized", "mlp.in")  # the same values: this model's gain is 1
        assert best == name
        assert not fit.fits
    lost = replace(dictionary, site="a", reads=(Port("a", 32, model),), writes=(Port("b", 32, model),))
    fit = check_fit(tiny, read(save(lost, tmp_path / "lost")), rows)
    assert fit.sites[0].name.replace("ln2.normalized", "mlp.in") == "mlp.in → mlp.out of layer 1"


def test_a_crosscoder_is_measured_at_its_sites(tiny: LanguageModel, rows: Tensor, tmp_path: Path) -> None:
    sites = ("blocks.0.resid_post", "blocks.1.resid_post")
    x = torch.cat([values(tiny, rows, site) for site in sites], dim=1)
    ports = tuple(Port(site, 32, {"id": "tiny"}) for site in sites)
    dictionary = replace(of_components(x), site=sites[0], reads=ports, writes=ports)
    reading = read(save(dictionary, tmp_path / "c"))
    fit = check_fit(tiny, reading, rows)
    assert fit.effects[0].value < 0.5
    assert (fit.sites, fit.scales) == ((), ())
    assert list(facts(reading)["decoder_norms"]) == list(sites)


def test_the_expected_l0_is_compared(tiny: LanguageModel, rows: Tensor, tmp_path: Path) -> None:
    dictionary = of_components(values(tiny, rows, SITE))
    rare = replace(dictionary, sparsity=log_sparsity(torch.full((2 * RANK,), 0.01)))
    reading = read(save(rare, tmp_path / "d"))
    assert [(round(one.value, 3), one.source) for one in expected_l0(reading)] == [
        (0.24, "summed frequencies of activation")
    ]
    fit = check_fit(tiny, reading, rows)
    assert not fit.fits
    assert any("summed frequencies of activation says 0.24" in verdict for verdict in fit.verdicts)
    topk = read(save(replace(dictionary, selector=TopK(5)), tmp_path / "e"))
    assert [(one.value, one.source) for one in expected_l0(topk)] == [(5, "k of topk")]


def test_facts_are_what_is_stored(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(40, 6, generator=generator)
    dictionary = Dictionary(
        torch.randn(6, 40, generator=generator), torch.zeros(40), W_dec, torch.zeros(6), TopK(3), "blocks.0.mlp.out",
        {"id": "m"},
    )  # fmt: skip
    found = facts(read(save(dictionary, tmp_path / "d", "sparsify")))
    assert found["format"] == "sparsify"
    assert found["tensors"][0] == {
        "name": "encoder.weight", "shape": [40, 6], "dtype": "float32", "becomes": "W_enc [d_in, F], transposed",
    }  # fmt: skip
    norms = W_dec.norm(dim=1).numpy()
    assert found["decoder_norms"]["all"]["median"] == pytest.approx(float(np.median(norms)), rel=1e-5)
    assert found["decoder_norms"]["all"]["max"] == pytest.approx(float(norms.max()), rel=1e-5)
    assert found["parameters"] == 2 * 6 * 40 + 46
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "d").iterdir())


def test_widths_that_do_not_fit_are_refused(tiny: LanguageModel, rows: Tensor, tmp_path: Path) -> None:
    narrow = of_components(values(tiny, rows, SITE)[:, :20])
    with pytest.raises(CutawayError, match="needs 20 values per position"):
        check_fit(tiny, read(save(narrow, tmp_path / "d")), rows)
    with pytest.raises(CutawayError, match="no position of these rows counts"):
        check_fit(tiny, read(save(at_site(narrow, "unknown"), tmp_path / "e")), rows[:, :1])

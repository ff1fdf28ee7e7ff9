"""A dictionary's latents as sites: captured, and edited with the reconstruction error kept."""

from dataclasses import replace

import pytest
import torch
from one_latent import one_latent

import cutaway
from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.dictionaries import load
from cutaway.dictionaries.dictionary import Dictionary, Gated, JumpReLU, Port, ReLU, TopK
from cutaway.model.language_model import LanguageModel

SITE = "blocks.1.resid_post"
ROWS = [[5, 6, 7, 8], [9, 10, 11]]


def dictionary(lm: LanguageModel, n: int = 24, **parts) -> Dictionary:
    torch.manual_seed(3)
    width = parts.pop("width", lm.d_model)
    return Dictionary(
        W_enc=torch.randn(width, n) / 4,
        b_enc=torch.randn(n) / 8,
        W_dec=torch.randn(n, width) / 4,
        b_dec=torch.randn(width) / 8,
        **{"selector": ReLU(), "site": SITE} | parts,
    )


KINDS = {
    "relu": {},
    "topk": {"selector": TopK(5)},
    "jumprelu": {"selector": JumpReLU(torch.full((24,), 0.1))},
    "gated": {"selector": Gated(torch.full((24,), 0.2), torch.zeros(24))},
    "layer norm": {"input_norm": "layer_norm"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_moves_the_latent_and_keeps_the_error(llama: LanguageModel, kind: str) -> None:
    found = dictionary(llama, **KINDS[kind])
    plain = llama.run(ROWS, capture=[found, "blocks.0.attn.z"])
    assert plain.sites == ("blocks.0.attn.z", SITE)
    assert found in plain
    x, a = plain[SITE], plain[found]
    assert torch.equal(a, found.encode(x))
    latent = int(a[1, 2].argmax())
    edit = cutaway.set(found, 1.5, neurons=latent, positions=-1, rows=1)
    run = llama.run(ROWS, capture=SITE, edits=edit)
    wanted = x.clone()
    moved = a[1, 2].clone()
    moved[latent] = 1.5
    wanted[1, 2] += found.decode(moved, x[1, 2]) - found.decode(a[1, 2], x[1, 2])
    torch.testing.assert_close(run[SITE][1], wanted[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(run[SITE][0], x[0])
    (receipt,) = run.receipts
    assert (receipt.n_tokens, receipt.neurons) == (1, (latent,))
    assert receipt.mean_abs_after == pytest.approx(1.5)  # in the units of the latent
    assert receipt.mean_abs_before == pytest.approx(float(a[1, 2, latent]), rel=1e-5)


def test_every_other_kind_of_edit_acts_on_latents(llama: LanguageModel) -> None:
    found = dictionary(llama)
    plain = llama.run(ROWS[0], capture=found)
    x, a = plain[SITE], plain[found]
    other = llama.run([12, 13, 14, 15], capture=found)
    keep = torch.zeros(24)
    cases = {
        cutaway.zero(found): lambda a: a * 0,
        cutaway.mean(found, keep): lambda a: a * 0,
        cutaway.scale(found, 2.0, neurons=[1, 3]): lambda a: torch.where(mask(1, 3), 2 * a, a),
        cutaway.patch(found, other, neurons=[1, 3]): lambda a: torch.where(mask(1, 3), other[found], a),
        cutaway.function(found, torch.relu): lambda a: a,
        cutaway.add(found, torch.ones(24), 0.5): lambda a: a + 0.5,
    }

    def mask(*latents: int) -> torch.Tensor:
        return torch.isin(torch.arange(24), torch.tensor(latents))

    for edit, change in cases.items():
        run = llama.run(ROWS[0], capture=SITE, edits=edit)
        torch.testing.assert_close(run[SITE], x + (change(a) - a) @ found.W_dec, rtol=1e-4, atol=1e-5)
    assert "latents at" in str(cutaway.zero(found, neurons=3))


def test_a_dictionary_that_reads_heads_reads_them_together(llama: LanguageModel) -> None:
    z = "blocks.1.attn.z"
    width = llama.n_heads * llama.d_head
    found = dictionary(llama, width=width, site=z)
    plain = llama.run(ROWS[0], capture=found)
    assert plain[found].shape == (1, 4, 24)
    run = llama.run(ROWS[0], capture=z, edits=cutaway.zero(found))
    expected = plain[z].flatten(-2) - plain[found] @ found.W_dec
    torch.testing.assert_close(run[z].flatten(-2), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(CutawayError, match="names none"):
        cutaway.zero(found, heads=1)


def test_generation_captures_and_edits_latents_with_and_without_a_cache(llama: LanguageModel) -> None:
    found = dictionary(llama)
    edit = cutaway.scale(found, 3.0)
    made = [
        llama.generate(
            ROWS[0], max_new_tokens=5, edits=edit, capture=found, decoding=cutaway.Decoding(use_cache=cached)
        )
        for cached in (True, False)
    ]
    assert made[0].new_ids == made[1].new_ids
    torch.testing.assert_close(made[0][found], made[1][found], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_is_refused_in_one_sentence(llama: LanguageModel) -> None:
    found = dictionary(llama)
    transcoder = replace(found, writes=(Port("blocks.1.mlp.out", llama.d_model),), subtract_b_dec=False)
    assert transcoder in llama.run(ROWS, capture=transcoder)  # what it reads can be captured
    with pytest.raises(NotSupported, match="transcoder is not read where it is written"):
        cutaway.zero(transcoder)
    with pytest.raises(CutawayError, match=r"latent 24.*0 to 23"):
        llama.run(ROWS, edits=cutaway.zero(found, neurons=24))
    with pytest.raises(NotSupported, match="clamp_latent, which can be saved"):
        cutaway.zero(found).digest()
    with pytest.raises(NotSupported, match=r"cutaway\.set\(dictionary"):
        cutaway.clamp_latent(replace(found, selector=Gated(torch.zeros(24), torch.zeros(24))), 0, 1.0)
    with pytest.raises(CutawayError, match="did not capture"):
        llama.run(ROWS)[found]
    assert cutaway.zero(found) == cutaway.zero(found) != cutaway.zero(replace(found))
    assert cutaway.clamp_latent(one_latent(SITE, torch.ones(3), 0.0, torch.ones(3)), 0, 1.0).digest()


def test_latents_of_a_shipped_dictionary() -> None:
    lm, found = cutaway.load("atlas"), load("atlas/blocks.3.resid_post")
    prompt = "The capital of France is"
    plain = lm.run(prompt, capture=found)
    latent = int(plain[found][0, -1].argmax())
    value = float(plain[found][0, -1, latent])
    assert value > 0
    removed = lm.run(prompt, capture=found, edits=cutaway.clamp_latent(found, latent, 0.0, positions=-1))
    expected = plain[found.site][0, -1] - value * found.W_dec[latent]
    torch.testing.assert_close(removed[found.site][0, -1], expected, rtol=1e-4, atol=1e-4)
    again = lm.run(prompt, capture=found, edits=cutaway.zero(found, neurons=latent, positions=-1))
    torch.testing.assert_close(again[found.site], removed[found.site], rtol=1e-4, atol=1e-4)

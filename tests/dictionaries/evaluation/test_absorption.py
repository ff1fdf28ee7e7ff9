"""Absorption that was planted is found, with its latent; where none was planted there is none."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary, Port, ReLU, TopK
from cutaway.dictionaries.evaluation.absorption import RANDOM, RANDOM_DIRECTION, absorption, concept_latents
from cutaway.dictionaries.evaluation.probing import LatentProbe, sparse_codes

D, N, TOKENS = 56, 1440, 48
HALF = TOKENS // 2


def world(seed: int = 0) -> tuple[Tensor, np.ndarray, Tensor, np.ndarray]:
    """Activations [N, D], each a token's own direction, and the concept's too where the token (the first half) has it.

    Returns x, which token [N], the directions (concept first, then the tokens) [49, D], and the labels.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q[: TOKENS + 1]
    token = torch.arange(N) % TOKENS
    has = token < HALF
    length = 1 + 0.2 * torch.rand(N, 1, generator=generator)
    x = length * (basis[1:][token] + has[:, None] * basis[0]) + 0.02 * torch.randn(N, D, generator=generator)
    return x, token.numpy(), basis, has.numpy()


def planted(basis: Tensor, absorbed: tuple[int, ...], halves: bool = False) -> Dictionary:
    """Latent 0 is the concept's, latent t + 1 token t's. That of an absorbed token writes the concept too, and latent 0
    keeps silent there. With `halves` the concept has two latents (0 and 49), for even and for odd tokens.
    """
    concept, tokens = basis[0], basis[1:]
    encoder, decoder = [concept], [concept]
    for t in absorbed:
        encoder[0] = encoder[0] - 3 * tokens[t]
    for t in range(TOKENS):
        encoder.append(tokens[t])
        decoder.append(tokens[t] + concept if t in absorbed else tokens[t])
    if halves:
        second = encoder[0] - 3 * tokens[0:HALF:2].sum(0)
        encoder[0] = encoder[0] - 3 * tokens[1:HALF:2].sum(0)
        encoder.append(second)
        decoder.append(concept)
    rows = torch.stack(encoder)
    return Dictionary(
        rows.T.contiguous(),
        torch.full((len(rows),), -0.3),
        torch.stack(decoder),
        torch.zeros(D),
        ReLU(),
        "blocks.0.resid_post",
    )


def test_planted_absorption_is_found() -> None:
    x, _, basis, labels = world()
    found = absorption(planted(basis, (2,)), x, labels, groups=np.arange(N) // 20)
    assert found.probe_f1 > 0.99
    assert found.latents == ((0,),)
    assert found.rate.value == pytest.approx(1 / HALF, abs=0.002), "one of the concept's tokens"
    assert found.missed.value == pytest.approx(1 / HALF, abs=0.002)
    ((latent, times),) = found.absorbers[0]
    assert latent == 3, "token 2's own latent"
    assert times == round(found.rate.value * found.rate.n)
    by_name = {control.name: control.value for control in found.rate.controls}
    assert by_name[RANDOM_DIRECTION] < found.rate.value / 2
    assert RANDOM in by_name
    low, high = found.rate.interval or (1, 0)
    assert low <= found.rate.value <= high
    assert 0 < high - low < 0.1


def test_a_dictionary_without_absorption_has_rate_zero() -> None:
    x, _, basis, labels = world(1)
    found = absorption(planted(basis, ()), x, labels)
    assert found.rate.value == 0
    assert found.missed.value == 0
    assert found.split == (1.0,)
    assert found.absorbers == ((),)


def test_silence_alone_is_not_absorption() -> None:
    """The concept's latent is silent on token 2, but nobody writes the concept there."""
    x, _, basis, labels = world(2)
    dictionary = planted(basis, (2,))
    decoder = dictionary.W_dec.clone()
    decoder[3] = basis[3]
    found = absorption(
        Dictionary(dictionary.W_enc, dictionary.b_enc, decoder, dictionary.b_dec, ReLU(), dictionary.site), x, labels
    )
    assert found.missed.value == pytest.approx(1 / HALF, abs=0.002)
    assert found.rate.value == 0


def test_splitting_is_no_absorption() -> None:
    x, _, basis, labels = world(3)
    found = absorption(planted(basis, (), halves=True), x, labels)
    assert set(found.latents[0]) == {0, TOKENS + 1}
    assert found.split == (2.0,)
    assert found.rate.value == 0
    first, second = found.curve[0][:2]
    assert second - first > 0.03


def test_several_seeds_are_averaged() -> None:
    x, _, basis, labels = world(4)
    found = absorption([planted(basis, ()), planted(basis, (1, 2, 3))], x, labels)
    assert found.per_seed == (0, pytest.approx(3 / HALF, abs=0.005))
    assert found.rate.value == pytest.approx(np.mean(found.per_seed))
    assert found.absorbers[0] == ()
    assert {latent for latent, _ in found.absorbers[1]} == {2, 3, 4}


def test_concept_latents_are_found_in_the_training_part() -> None:
    x, _, basis, labels = world(5)
    code = sparse_codes(planted(basis, (), halves=True), x)
    latents, scores = concept_latents(code, labels, np.arange(0, N, 2))
    assert len(latents) <= len(scores)
    train_of_one_token = np.flatnonzero(
        np.arange(N) % TOKENS >= HALF - 1
    )  # only one token has the concept here: one latent
    assert len(concept_latents(code, labels, train_of_one_token)[0]) == 1


def test_a_concept_that_nothing_tells_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense probe never says yes: there is no token to ask about, and that is NaN, not 0."""
    x, _, basis, labels = world(6)
    silent = LatentProbe(lambda features: np.full(len(features), -1.0), 0.0, np.ones(D) / D**0.5)
    monkeypatch.setattr("cutaway.dictionaries.evaluation.absorption.dense_probe", lambda *_: silent)
    found = absorption(planted(basis, ()), x, labels)
    assert np.isnan(found.rate.value)
    assert found.rate.n == 0
    assert len(found.rate.controls) == 2
    assert "absorbed nan" in str(found)


def test_bad_input_is_named() -> None:
    x, _, basis, labels = world()
    transcoder = Dictionary(
        torch.ones(D, 3), torch.zeros(3), torch.ones(3, D), torch.zeros(D), TopK(1), "blocks.0.mlp.in",
        writes=(Port("blocks.0.mlp.out", D),),
    )  # fmt: skip
    with pytest.raises(CutawayError, match="not for a transcoder"):
        absorption(transcoder, x, labels)
    with pytest.raises(CutawayError, match="every label is the same"):
        absorption(planted(basis, ()), x, np.ones(N, dtype=bool))
    with pytest.raises(CutawayError, match="1440 activations but 3 labels"):
        absorption(planted(basis, ()), x, [True, False, True])

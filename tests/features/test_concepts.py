"""AUROC from the sparse table against scipy's; selection and report on different halves; a planted concept is found."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.ranking import auroc
from cutaway.dictionaries.dictionary import Dictionary, TopK
from cutaway.features.activations import LatentActivations, latent_activations
from cutaway.features.concepts import SortedActivations, match_concepts, mentions
from cutaway.features.examples import top_examples
from cutaway.features.summary import token_summary
from cutaway.model.language_model import LanguageModel


def test_every_latents_auroc(tiny: LanguageModel, dictionary: Dictionary, rows: Tensor) -> None:
    parts = list(latent_activations(tiny, dictionary, rows))
    stream = tiny.run(rows.tolist(), capture=dictionary.site, logits=None)[dictionary.site]
    dense = dictionary.encode(stream).detach().flatten(0, 1)[torch.cat([part.kept for part in parts])]
    dense = dense.round(decimals=1)  # so that values tie
    rounded = []
    for part in parts:
        value = part.value.round(decimals=1)
        rounded.append(LatentActivations(part.latent[value > 0], value[value > 0], part.at[value > 0], part.kept))
    sparse = SortedActivations(rounded, dictionary.d_sae)
    for seed in range(3):
        labels = torch.rand(len(sparse.tokens), generator=torch.Generator().manual_seed(seed)) < 0.1
        found = sparse.auroc(labels)
        for latent in range(dictionary.d_sae):
            assert found[latent].item() == pytest.approx(auroc(dense[:, latent].numpy(), labels.numpy()), abs=1e-9)


def test_a_planted_latent_is_found_and_reported_on_the_other_half(
    tiny: LanguageModel, dictionary: Dictionary, rows: Tensor
) -> None:
    """Latent 5 is made to fire on token 42; odd rows are then given labels that it does not tell."""
    planted, rows, labels = _plant(tiny, dictionary, rows)
    (match,) = match_concepts(tiny, planted, rows, {"token 42": labels}, shuffles=5)
    assert match.latent == 5
    assert match.auroc > 0.95
    assert match.effect.interval is not None
    assert 0 < match.p <= match.q < 0.05
    assert match.effect.interval[0] > match.effect.controls[0].value
    assert match.effect.controls[1].value > match.effect.controls[0].value, "luck looks better where it was chosen"
    wrong = labels.clone()
    wrong[1::2] = torch.rand(wrong[1::2].shape, generator=torch.Generator().manual_seed(0)) < 0.2
    (other,) = match_concepts(tiny, planted, rows, {"token 42": wrong}, shuffles=2)
    assert other.latent == 5
    assert other.selected_auroc > 0.95
    assert other.auroc < 0.7


def _plant(tiny: LanguageModel, dictionary: Dictionary, rows: Tensor) -> tuple[Dictionary, Tensor, Tensor]:
    """A dictionary of the embedding whose latent 5 fires on token 42 alone; rows that hold it; where it stands."""
    rows = rows.clone()
    rows[:, 6] = 42
    row = tiny.hf.get_input_embeddings().weight[42].detach()  # type: ignore[union-attr]
    w_enc, w_dec, bias = dictionary.W_enc.clone(), dictionary.W_dec.clone(), dictionary.b_enc.clone()
    w_enc[:, 5], w_dec[5] = row / row.norm(), row / row.norm()
    bias[5] = -0.8 * row.norm() + dictionary.b_dec @ w_enc[:, 5]
    planted = replace(
        dictionary, W_enc=w_enc, W_dec=w_dec, b_enc=bias, selector=TopK(dictionary.d_sae), site="blocks.0.resid_pre"
    )
    return planted, rows, rows == 42


def test_a_planted_latent_gets_its_label(tiny: LanguageModel, dictionary: Dictionary, rows: Tensor) -> None:
    planted, rows, labels = _plant(tiny, dictionary, rows)
    examples = top_examples(tiny, planted, rows, latents=[5])
    summary = token_summary(tiny, rows, examples)[5]
    word = tiny.token_strings([42])[0].strip().lower()
    assert summary.label == f"“{word}”"
    held = examples.held_at[5]
    held = held[held >= 0]
    assert summary.n == len(held)
    assert summary.precision == pytest.approx(labels.flatten()[held].float().mean().item())
    assert summary.base_rate == pytest.approx(labels[:, 1:].float().mean().item())
    assert "automatic" in str(summary)


def test_labels_are_checked(tiny: LanguageModel, dictionary: Dictionary, rows: Tensor) -> None:
    with pytest.raises(CutawayError, match="4 are needed"):
        match_concepts(tiny, dictionary, rows, {"nothing": torch.zeros(rows.shape, dtype=torch.bool)})
    with pytest.raises(CutawayError, match=r"\(3, 3\)"):
        match_concepts(tiny, dictionary, rows, {"shape": torch.zeros(3, 3, dtype=torch.bool)})


def test_mentions_mark_a_words_last_token() -> None:
    atlas = cutaway.load("atlas")
    text = "We took a photo of the Eiffel Tower in Paris."
    tokens = atlas.tokens(text)
    found = mentions(atlas, tokens.ids, ["Eiffel Tower", "Paris"])
    marked = [tokens.strings[0][i].strip() for i in np.flatnonzero(found[0].numpy())]
    assert marked == ["Tower", "Paris"]

"""The dictionaries that ship with atlas: they are what their cards say, and describe text they have not seen."""

import pytest
import torch

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import read_json
from cutaway.artifacts.manifest import file_hash
from cutaway.data.corpus.corpus import token_rows
from cutaway.dictionaries import load
from cutaway.dictionaries.evaluation.evaluate import evaluate
from cutaway.subjects.atlas.shipped import shipped_dictionary
from cutaway.subjects.atlas.text import world_text

SITES = ("blocks.1.resid_post", "blocks.3.resid_post", "blocks.5.resid_post")


@pytest.mark.parametrize("site", SITES)
def test_a_card_is_of_these_weights_and_they_do_on_new_text_what_it_says(site: str) -> None:
    folder = shipped_dictionary(site)
    card = read_json(folder / "card.json")
    assert card["weights_sha256"] == file_hash(folder / "sae_weights.safetensors")
    dictionary = load(f"atlas/{site}")
    assert dictionary.site == site == card["site"]
    assert dictionary.W_enc.dtype == torch.float32
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(dictionary.d_sae), rtol=0, atol=1e-3)
    lm = cutaway.load("atlas")
    assert dictionary.model["weight_hash"] == lm.identity().weight_hash
    rows = token_rows(lm, world_text(100_000, "text-7"), 256, limit=24)
    judged = evaluate(lm, dictionary, rows, spliced_rows=4)
    for name, slack in (("variance_explained", 0.03), ("l0", 0.5)):
        effect = judged.effects[name]
        assert effect.value == pytest.approx(card["figures"][name]["value"], abs=slack)
    explained = judged.effects["variance_explained"]
    assert explained.value > explained.controls[0].value + 0.2


def test_they_are_small_and_a_name_that_is_none_lists_them() -> None:
    folders = [shipped_dictionary(site) for site in SITES]
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*")) < 20e6
    with pytest.raises(CutawayError, match=r"'blocks.2.resid_post' ships .* blocks.1.resid_post, blocks.3"):
        load("atlas/blocks.2.resid_post")

"""What is saved is the whole result, and names of a run are the same by every way of asking."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.observe import logit_lens
from cutaway.steering import difference_of_means, matched_scale, select_direction

TEXTS = ["Tom went to the park", "The capital of Texas is"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return cutaway.load("atlas")


def test_a_lens_of_two_prompts_saves_both(lm: LanguageModel, tmp_path: Path) -> None:
    lens = logit_lens(lm, TEXTS)
    saved = json.loads(lens.save(tmp_path / "lens.json").read_text(), parse_constant=pytest.fail)
    assert [one["prompt"].removeprefix("<|endoftext|>") for one in saved["prompts"]] == TEXTS
    alone = json.loads(logit_lens(lm, TEXTS[0]).save(tmp_path / "one.json").read_text())
    assert "prompts" not in alone


def test_directions_of_all_positions_are_a_table(lm: LanguageModel, tmp_path: Path) -> None:
    chats = lm.chat_tokens(
        [[{"role": "user", "content": f"How do I {x} a bike?"}] for x in ("paint", "clean", "steal", "break")]
    )
    found = difference_of_means(lm, chats[[2, 3]], chats[[0, 1]])
    for suffix in (".csv", ".parquet"):
        assert found.save(tmp_path / f"directions{suffix}").stat().st_size > 0
    with pytest.raises(CutawayError, match="scales is empty"):
        select_direction(lm, found, chats[[2, 3]], chats[[0, 1]], scales=())


def test_nothing_is_matched_to_no_side_effects() -> None:
    with pytest.raises(CutawayError, match="no side effects"):
        matched_scale(lambda scale: scale**2, 0.0)


def test_a_sweep_of_several_numbers_is_a_table(lm: LanguageModel, tmp_path: Path) -> None:
    swept = lm.sweep(TEXTS, [cutaway.zero("blocks.7.attn.out")], lambda logits, tokens: logits[:, :3])
    rows = swept.rows()
    assert [row["number"] for row in rows] == [0, 1, 2, 0, 1, 2]
    assert rows[4]["value"] == pytest.approx(float(swept.values[0, 1, 1]))
    assert rows[4]["base"] == pytest.approx(float(swept.base[1, 1]))
    assert swept.save(tmp_path / "sweep.csv").read_text().count("\n") == 7


def test_a_site_is_there_by_every_spelling_or_by_none(lm: LanguageModel) -> None:
    foreign: Any = lm
    load: Any = cutaway.load
    run = foreign.run(TEXTS[0], capture=["blocks.3.resid_post", "blocks.*.ln2.scale"], grad=lambda logits: logits.sum())
    for name in ("blocks.3.resid_post", "blocks.3.hook_resid_post", ("resid_post", 3), ("resid_post", -5)):
        assert name in run
        assert torch.equal(run.get(name), run["blocks.3.resid_post"])
    for name in ("blocks.4.resid_post", ("resid_post", 4), "nothing", 7, (7,)):
        assert name not in run
        assert run.get(name) is None
    assert "blocks.3.hook_resid_post" in run.grads
    assert run.grads.get("blocks.4.resid_post") is None
    assert torch.equal(run.stack_activation("scale", 2, "ln2"), run.stack("blocks.*.ln2.scale")[:2])
    with pytest.raises(CutawayError, match=r"names_filter= and capture= are the same"):
        foreign.run(TEXTS[0], capture="embed", names_filter="embed")
    with pytest.raises(CutawayError, match=r"give it to cutaway\.attach"):
        load("atlas", trust_remote_code=True)

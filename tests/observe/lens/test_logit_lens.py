"""The lens against the model's own layers, and against its definition written out in float64."""

import math

import pytest
import torch

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel
from cutaway.observe.lens.logit_lens import logit_lens

ROWS = [[0, 5, 17, 33, 4, 60], [0, 9, 8, 7]]


def test_the_last_layer_is_the_models_own_output(tiny: LanguageModel) -> None:
    lens = logit_lens(tiny, ROWS, k=4)
    logits = tiny.run(ROWS, logits="all").logits
    assert logits is not None
    p = logits.float().softmax(-1)
    real = lens.tokens.mask
    top = p.topk(4, -1)
    assert torch.equal(lens.top_ids[-1][real], top.indices[real])
    torch.testing.assert_close(lens.top_probability[-1][real], top.values[real])
    assert lens.kl[-1][real].abs().max() == 0


def test_the_last_stream_read_through_unembed_is_the_output(tiny: LanguageModel) -> None:
    """What makes the lens's other layers comparable to its last one, for every norm kind and a softcap."""
    run = tiny.run(ROWS, capture="blocks.*.resid_post", logits="all")
    assert run.logits is not None
    read = tiny.unembed(run[f"blocks.{tiny.n_layers - 1}.resid_post"])
    torch.testing.assert_close(read[run.tokens.mask], run.logits[run.tokens.mask], rtol=1e-5, atol=1e-5)


def test_every_number_is_its_definition(tiny: LanguageModel) -> None:
    lens = logit_lens(tiny, ROWS)
    run = tiny.run(ROWS, capture=["blocks.0.resid_pre", "blocks.*.resid_post"], logits="all")
    assert run.logits is not None
    assert lens.layers == ("embed", "blocks.0.resid_post", "blocks.1.resid_post", "blocks.2.resid_post")
    final = run.logits.double().softmax(-1)
    for i, site in enumerate(["blocks.0.resid_pre", *lens.layers[1:]]):
        q = tiny.unembed(run[site]).double().softmax(-1)
        for row, ids in enumerate(ROWS):
            for position in range(len(ids)):
                dist = q[row, position]
                entropy = -sum(v * math.log(v) for v in dist.tolist() if v > 0)
                kl = sum(
                    a * math.log(a / b) for a, b in zip(final[row, position].tolist(), dist.tolist(), strict=True) if a
                )
                assert lens.entropy[i, row, position].item() == pytest.approx(entropy, abs=1e-4)
                assert lens.kl[i, row, position].item() == pytest.approx(kl, abs=1e-4)
                if position + 1 < len(ids):
                    target = ids[position + 1]
                    assert lens.target_probability[i, row, position].item() == pytest.approx(
                        dist[target].item(), abs=1e-5
                    )
                    assert lens.target_rank[i, row, position] == (dist > dist[target]).sum()
                else:
                    assert lens.target_rank[i, row, position] == -1
                    assert lens.target_probability[i, row, position].isnan()
    assert lens.entropy[:, 1, 4:].isnan().all(), "padding has no lens"


def test_under_edits_it_reads_the_edited_run(tiny: LanguageModel) -> None:
    edit = cutaway.zero("blocks.1.mlp.out", positions=2)
    lens, plain = logit_lens(tiny, ROWS, edits=edit), logit_lens(tiny, ROWS)
    p = tiny.run(ROWS, edits=edit).all_logits.float().softmax(-1)
    real = lens.tokens.mask
    torch.testing.assert_close(lens.top_probability[-1][real], p.topk(5, -1).values[real])
    torch.testing.assert_close(lens.top_probability[:2][:, real], plain.top_probability[:2][:, real])
    assert not torch.allclose(lens.entropy[2:][:, 0, 2], plain.entropy[2:][:, 0, 2])


def test_a_target_is_followed_at_every_position(llama: LanguageModel) -> None:
    lens = logit_lens(llama, ROWS, targets=[33, 7])
    run = llama.run(ROWS, capture="blocks.1.resid_post", logits="all")
    p = llama.unembed(run["blocks.1.resid_post"]).float().softmax(-1)
    torch.testing.assert_close(lens.target_probability[2, 0], p[0, :, 33], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(lens.at_last(lens.target_probability)[2], torch.stack([p[0, 5, 33], p[1, 3, 7]]))


def test_wrong_number_of_targets(llama: LanguageModel) -> None:
    with pytest.raises(CutawayError, match="1 targets for 2 rows"):
        logit_lens(llama, ROWS, targets=[3])


def test_atlas_reads_the_state_before_the_capital() -> None:
    """Two-hop recall on the shipped model: at the last token the answer is not there after the first layers."""
    atlas = cutaway.load("atlas")
    lens = logit_lens(atlas, "The capital of the state containing Dallas is", targets=" Austin")
    at_last = lens.at_last(lens.target_rank)[:, 0]
    assert at_last[0] > 0
    assert at_last[-1] == 0
    assert "Austin" in str(lens)
    data = lens.to_json()
    assert len(data["top"]) == atlas.n_layers + 1
    assert len(data["tokens"]) == len(data["kl"][0])


def test_chosen_positions_and_small_chunks_change_no_number(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = logit_lens(tiny, ROWS, follow=[33])
    chosen = logit_lens(tiny, ROWS, positions=[1, -1], follow=[33])
    columns = torch.tensor([[1, 5], [1, 3]])
    assert torch.equal(chosen.columns, columns)
    for name in ("entropy", "kl", "target_rank", "target_probability", "followed_probability", "followed_rank"):
        expected = torch.stack([getattr(whole, name)[:, row, columns[row]] for row in range(2)], 1)
        torch.testing.assert_close(getattr(chosen, name), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert chosen.to_json(1)["positions"] == [1, 3]
    assert chosen.to_json(1)["tokens"] == ["#9", "#7"]
    last = logit_lens(tiny, ROWS, positions=-1)
    torch.testing.assert_close(last.at_last(last.kl), whole.at_last(whole.kl), rtol=1e-4, atol=1e-5)
    with pytest.raises(CutawayError, match="not read at each row's last token"):
        logit_lens(tiny, ROWS, positions=0).at_last(whole.kl)
    monkeypatch.setattr("cutaway.observe.lens.logit_lens._CHUNK_BYTES", 4 * tiny.d_vocab * 3)
    pieces = logit_lens(tiny, ROWS, follow=[33])
    torch.testing.assert_close(pieces.kl, whole.kl, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(pieces.top_ids, whole.top_ids)
    assert pieces.words == whole.words


def test_a_followed_token_is_the_target_elsewhere(llama: LanguageModel) -> None:
    lens = logit_lens(llama, ROWS, targets=[33, 33], follow=[7, 33])
    assert lens.followed == ("#7", "#33")
    real = lens.tokens.mask
    torch.testing.assert_close(lens.followed_probability[..., 1], lens.target_probability, equal_nan=True)
    assert torch.equal(lens.followed_rank[:, real][..., 1], lens.target_rank[:, real])
    assert "#7" in str(lens)


def test_other_sites_of_the_streams_width_are_read(llama: LanguageModel) -> None:
    lens = logit_lens(llama, ROWS, sites=["blocks.*.resid_mid", "blocks.1.mlp.out"])
    assert lens.layers == ("blocks.0.resid_mid", "blocks.1.resid_mid", "blocks.1.mlp.out", "blocks.2.resid_mid")
    run = llama.run(ROWS, capture="blocks.1.mlp.out")
    p = llama.unembed(run["blocks.1.mlp.out"]).softmax(-1)
    torch.testing.assert_close(lens.top_probability[2, 0, :, 0], p[0].max(-1).values)
    with pytest.raises(CutawayError, match="dimensions b p H h"):
        logit_lens(llama, ROWS, sites="blocks.0.attn.z")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"positions": 9}, "Position 9 is outside row 0"),
        ({"positions": []}, "positions= is empty"),
        ({"k": 0}, "at least one top token"),
        ({"targets": [500, 3]}, "500 is no token id"),
        ({"follow": [-1]}, "-1 is no token id"),
        ({"follow": [""]}, "has no token"),
        ({"sites": "blocks.9.resid_post"}, "blocks.9"),
    ],
)
def test_bad_input(llama: LanguageModel, options: dict, says: str) -> None:
    with pytest.raises(CutawayError, match=says):
        logit_lens(llama, ROWS, **options)

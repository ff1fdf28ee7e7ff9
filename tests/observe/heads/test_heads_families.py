"""Heads and circuits where models are wired in other ways: norms after, parallel, multipliers, latent attention."""

import copy

import pytest
import torch
from small_models import FAMILIES, build
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.language_model import LanguageModel, attach
from cutaway.observe.heads.attention_view import attention_view
from cutaway.observe.heads.circuits import composition, ov_circuit
from cutaway.observe.heads.table import head_table

WINDOWED = ("mistral",)  # every layer hides what stood more than 5 tokens before
QK_NORM = ("qwen3", "gemma3", "olmo2")


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def lm(family: str) -> LanguageModel:
    return build(family)


def test_every_wiring_has_its_table(family: str, lm: LanguageModel) -> None:
    table = head_table(lm, n=3, length=8, ablations=())
    hidden = {"duplicate", "induction"} if family in WINDOWED else set()
    assert {kind for kind, scores in table.kinds.items() if bool(scores.score.isnan().all())} == hidden
    assert table.notes == ()
    assert set(composition(lm, draws=2).left_out) == ({"q", "k"} if family in QK_NORM else set())


def test_ov_is_what_attending_writes(lm: LanguageModel) -> None:
    """All heads forced to one token: attn.out is the sum of its OV over the divisors, whatever norms there are."""
    model = copy.deepcopy(lm.hf).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
    wide, layer, source = attach(model), 0, 3  # the run stops before the experts, which have no float64
    present = set(wide.sites().present())
    before, after = f"blocks.{layer}.ln1.scale", f"blocks.{layer}.ln1_post.scale"
    stream, written = f"blocks.{layer}.resid_pre", f"blocks.{layer}.attn.out"
    pattern = torch.zeros(wide.n_heads, 4, dtype=torch.float64)
    pattern[:, source] = 1.0
    run = wide.run(
        torch.arange(5, 9)[None],
        capture=[stream, written, *({before, after} & present)],
        edits=cutaway.set(f"blocks.{layer}.attn.pattern", pattern),
        logits=None,
    )
    x = run[stream][0, source] / (run[before][0, source] if before in present else 1.0)
    expected = run[written][0, -1] * (run[after][0, -1] if after in present else 1.0)
    found = (x @ ov_circuit(wide, layer).product()).sum(0)
    ratio = (found @ expected) / (found @ found)  # a family's multiplier on what attention writes is no part of W_O
    torch.testing.assert_close(found * ratio, expected, rtol=1e-5, atol=1e-5)
    assert ratio.item() == pytest.approx(0.4 if wide.family.model_type == "granite" else 1.0, rel=1e-5)


def test_latent_attention_is_read_as_far_as_it_goes() -> None:
    """Scores need patterns alone; circuits have no matrix from the stream, and the table says so."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=61, hidden_size=32, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        n_shared_experts=1, first_k_dense_replace=1, max_position_embeddings=64, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    lm = attach(DeepseekV3ForCausalLM(config).eval(), name="latent")
    table = head_table(lm, n=3, length=8, ablations=("zero",), ablation_length=4)
    assert "copying" not in table.kinds
    assert not bool(table.kinds["induction-copying"].score.isnan().any())
    assert not bool(table.effects["second copy"]["zero"].mean.isnan().any())
    assert "latent attention" in table.verdicts()[-1]
    with pytest.raises(CutawayError, match="latent attention"):
        composition(lm)
    assert len(attention_view(lm, [5, 6, 7]).heads) == 8

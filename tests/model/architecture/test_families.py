"""Every family of the test bed: the oracle is transformers' own output, the algebra, and the slow way round."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from bed import BED, LAYERS, bed_model
from torch import Tensor
from transformers import PreTrainedModel

import cutaway
from cutaway.model.architecture.families import TESTED
from cutaway.model.language_model import LanguageModel, attach

ROWS = ([5, 9, 17, 33, 4, 60, 71, 12, 8], [90, 3, 44, 21, 7])


@cache
def lm_of(family: str) -> LanguageModel:
    return attach(bed_model(family), name=family)


@pytest.fixture(params=list(BED))
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return lm_of(request.param)


def plain(hf: PreTrainedModel, lm: LanguageModel, rows: object, **options: object) -> object:
    tokens = lm.tokens(rows)  # type: ignore[arg-type]
    with torch.no_grad():
        return hf(
            input_ids=tokens.ids,
            attention_mask=tokens.mask.long(),
            position_ids=tokens.position_ids,
            use_cache=False,
            **options,
        )


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> None:
    scale = max(float(right.abs().max()), 1e-9)
    assert float((left - right).abs().max()) <= tolerance * scale


def test_the_bed_holds_what_is_attached_without_a_self_test() -> None:
    assert {model_type for model_type, _ in BED.values()} == TESTED
    assert len(TESTED) >= 45


def test_the_self_test_passes(lm: LanguageModel) -> None:
    test = lm.selftest()
    assert test.passed, str(test)
    checked = {(row.check, row.layer) for row in test.checks}
    for site in lm.sites():
        if site.absent is None:
            short = site.name.removeprefix(f"blocks.{site.layer}.")
            short = "experts.{e}.out" if ".experts." in short else short
            assert any(short in check and layer == site.layer for check, layer in checked), site.name


def test_untouched_logits_are_bit_equal(lm: LanguageModel) -> None:
    run = lm.run(ROWS)
    assert run.logits is not None
    assert torch.equal(run.logits, plain(lm.hf, lm, ROWS).logits)  # type: ignore[attr-defined]


def test_the_stream_is_what_transformers_calls_hidden_states(lm: LanguageModel) -> None:
    run = lm.run(ROWS, capture=["blocks.*.resid_pre", "blocks.*.resid_post"])
    theirs = plain(lm.hf, lm, ROWS, output_hidden_states=True).hidden_states  # type: ignore[attr-defined]
    assert len(theirs) == LAYERS + 1
    for layer in range(LAYERS):
        assert torch.equal(run[f"blocks.{layer}.resid_pre"], theirs[layer])
    for layer in range(LAYERS - 1):  # the last one has gone through the final norm
        assert torch.equal(run[f"blocks.{layer}.resid_post"], theirs[layer + 1])


def test_patterns_are_those_of_the_eager_kernel(lm: LanguageModel) -> None:
    eager = bed_model(lm.name, attention="eager")
    theirs = plain(eager, lm, ROWS, output_attentions=True).attentions  # type: ignore[attr-defined]
    # with ALiBi the two kernels of Falcon themselves differ, by 6e-2 in the logits of this model
    reader = attach(eager) if lm.name == "falcon_alibi" else lm
    run = reader.run(ROWS, capture="blocks.*.attn.pattern")
    mask = run.tokens.mask
    for layer in range(LAYERS):
        ours = run[f"blocks.{layer}.attn.pattern"].transpose(1, 2)[mask]
        assert theirs[layer] is not None
        close(ours, theirs[layer].transpose(1, 2)[mask])


def test_a_row_of_a_batch_is_the_row_alone(lm: LanguageModel) -> None:
    together = lm.run(ROWS, capture="blocks.*.resid_post")
    for i, row in enumerate(ROWS):
        alone = lm.run([row], capture="blocks.*.resid_post")
        for name in alone.sites:
            close(together[name][i, : len(row)], alone[name][0])


def test_reading_everything_changes_nothing(lm: LanguageModel) -> None:
    before = lm.run(ROWS).logits
    everything = lm.run(ROWS, capture=lm.sites().present())
    assert before is not None
    assert everything.logits is not None
    mask = everything.tokens.mask
    close(everything.logits[mask], before[mask])
    assert all(torch.isfinite(everything[name]).all() for name in everything.sites if not name.endswith(".scores"))
    again = lm.run(ROWS).logits
    assert again is not None
    assert torch.equal(again, before)


def test_gradients_are_those_of_small_steps(lm: LanguageModel) -> None:
    """d metric / d site against a central difference along a random direction, in float64."""
    doubled = copy.deepcopy(lm.hf)
    if lm.name != "xglm":  # whose mask does not fit into a float64 model
        doubled = doubled.double()
    doubled.set_experts_implementation("eager")  # the grouped kernel does not take float64
    wide = attach(doubled, name=lm.name)
    row, generator = [5, 9, 17, 33], torch.Generator().manual_seed(0)
    sites = [f"blocks.1.{s}" for s in ("resid_pre", "attn.out", "mlp.in", "mlp.out", "attn.v", "attn.z")]
    sites += [n for n in ("blocks.1.resid_mid", "blocks.2.mlp.experts.1.out") if wide.sites()[0] and _has(wide, n)]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 7] - logits[:, -1, 11]

    run = wide.run([row], capture=sites, grad=metric, logits="last")
    for site in sites:
        shape = run[site].shape[2:]
        direction = torch.randn(shape, generator=generator, dtype=torch.float64)
        step = 2e-3  # norms of transformers are computed in fp32, so smaller steps drown in rounding
        moved = []
        for sign in (1.0, -1.0):
            made = wide.run([row], edits=cutaway.add(site, direction, sign * step, positions=2), logits="last")
            assert made.logits is not None
            moved.append(metric(made.logits).item())
        numeric = (moved[0] - moved[1]) / (2 * step)
        exact = float((run.grads[site][0, 2] * direction).sum())
        assert abs(numeric - exact) <= 0.02 * max(abs(exact), 0.05), site


def _has(lm: LanguageModel, name: str) -> bool:
    return any(site.name == name and site.absent is None for site in lm.sites())


def test_generation_with_a_cache_is_generation_without(lm: LanguageModel) -> None:
    edit = cutaway.scale("blocks.1.mlp.out", 0.5)
    made = [
        lm.generate([*ROWS], max_new_tokens=4, edits=edit, decoding=cutaway.Decoding(use_cache=cached)).new_ids
        for cached in (True, False)
    ]
    assert made[0] == made[1]


def test_resuming_is_running(lm: LanguageModel) -> None:
    base = lm.run(ROWS, capture="blocks.*.resid_pre")
    edit = cutaway.zero("blocks.2.mlp.out")
    full, resumed = (lm.run(ROWS, edits=edit, resume=source) for source in (None, base))
    assert full.logits is not None
    assert resumed.logits is not None
    assert torch.equal(full.logits, resumed.logits)

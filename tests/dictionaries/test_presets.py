"""Presets: what they ask for, how they scale with the run, and what they refuse."""

import pytest

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.config import TrainConfig
from cutaway.dictionaries.presets import PRESETS, preset
from cutaway.dictionaries.rules import BatchTopKRule, TopKRule
from cutaway.dictionaries.terms import L0, Lp, QuadraticL0, Tanh


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_a_configuration_that_can_be_written_and_read(name: str) -> None:
    config = preset(name, d_in=48, d_sae=96, tokens=64_000, batch=64, seed=3)
    assert (config.d_sae, config.tokens, config.batch, config.seed) == (96, 64_000, 64, 3)
    assert TrainConfig.from_json(config.to_json()) == config
    assert config.subtract_b_dec is False or PRESETS[name].kind in {"sae", "crosscoder"}
    assert config.skip is (PRESETS[name].kind == "skip_transcoder")


@pytest.mark.parametrize("name", PRESETS)
def test_what_controls_its_sparsity_is_taken_and_nothing_else(name: str) -> None:
    control = PRESETS[name].control
    if control == "k":
        selector = preset(name, d_in=48, k=7).selector
        assert isinstance(selector, TopKRule | BatchTopKRule)
        assert selector.k == 7
        with pytest.raises(CutawayError, match=f"{name} has no sparsity: its sparsity is set by k"):
            preset(name, d_in=48, sparsity=1.0)
        return
    sparse = [term for term in preset(name, d_in=48, sparsity=0.123).terms if isinstance(term, Lp | L0 | Tanh)]
    assert [term.coefficient for term in sparse] == [0.123]
    with pytest.raises(CutawayError, match=f"{name} has no k"):
        preset(name, d_in=48, k=7)
    if control == "coefficient or l0":
        terms = preset(name, d_in=48, l0=20).terms
        assert [term.target for term in terms if isinstance(term, QuadraticL0)] == [20]
        assert not any(isinstance(term, L0 | Tanh) for term in terms)
        with pytest.raises(CutawayError, match="not both"):
            preset(name, d_in=48, l0=20, sparsity=1.0)
    else:
        with pytest.raises(CutawayError, match=f"{name} has no l0"):
            preset(name, d_in=48, l0=20)


def test_overrides_win_and_are_checked() -> None:
    config = preset("openai-topk", d_in=48, learning_rate=1e-5, terms=({"kind": "reconstruction", "form": "fvu"},))
    assert config.learning_rate == 1e-5
    assert [term.kind for term in config.terms] == ["reconstruction"]
    with pytest.raises(CutawayError, match="'openai' is not a preset: there are anthropic-2023, anthropic-2024"):
        preset("openai", d_in=48)
    with pytest.raises(CutawayError, match="'rate' is not a field of a training configuration: there are d_sae, "):
        preset("openai-topk", d_in=48, rate=1)
    with pytest.raises(CutawayError, match="warmup"):
        preset("openai-topk", d_in=48, warmup="soon")
    with pytest.raises(CutawayError, match=r"k = -3: it must be positive"):
        preset("openai-topk", d_in=48, k=-3)
    with pytest.raises(CutawayError, match="k = 97 latents cannot be active out of d_sae = 96"):
        preset("openai-topk", d_in=48, d_sae=96, k=97)
    with pytest.raises(CutawayError, match="a dictionary has 1 latent or more"):
        preset("batchtopk", d_in=48, d_sae=0)
    with pytest.raises(CutawayError, match="d_in = 0"):
        preset("batchtopk", d_in=0)
    with pytest.raises(CutawayError, match="batch = 0"):
        preset("batchtopk", d_in=48, batch=0)


def test_counts_of_the_source_are_scaled_to_a_short_run_and_kept_in_a_long_one() -> None:
    def gemma(tokens: int) -> TrainConfig:
        return preset("gemma-scope-1", d_in=48, tokens=tokens, batch=4_096)

    long, short = gemma(4_096_000_000), gemma(4_096 * 10_000)
    assert long.learning_rate == 7e-5
    assert (long.warmup, long.dead_after) == (1_000, 10_000_000)
    sparse = [term for term in long.terms if isinstance(term, L0)]
    assert sparse[0].warmup == 10_000 / 1_000_000
    assert short.learning_rate == pytest.approx(7e-5 * 10)
    assert (short.warmup, short.dead_after) == (500, 4_096 * 10_000 // 16)
    assert gemma(4_096 * 50).learning_rate == 3e-3

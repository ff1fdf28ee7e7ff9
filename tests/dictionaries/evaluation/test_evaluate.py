"""Evaluation against slow sums and hand-made splices, on a tiny random model; then real models, where there are any."""

from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.data.corpus.corpus import read_corpus, split_rows, token_rows
from cutaway.data.harvesting.activations import as_tokens, counted, read_activations
from cutaway.dictionaries.dictionary import Dictionary, TopK
from cutaway.dictionaries.evaluation.evaluate import evaluate
from cutaway.dictionaries.formats.files import load, save
from cutaway.dictionaries.ports import model_ports
from cutaway.dictionaries.training.config import TrainConfig
from cutaway.dictionaries.training.from_model import train_on_model
from cutaway.dictionaries.training.rules import TopKRule
from cutaway.model.language_model import LanguageModel

SITE = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(1, 50, (60, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dictionary(lm: LanguageModel, rows: torch.Tensor) -> Dictionary:
    config = TrainConfig(d_sae=64, selector=TopKRule(6), tokens=40_000, batch=64, warmup=10)
    return train_on_model(lm, rows[:50], SITE, config).dictionary


def test_figures_equal_slow_sums_and_hooks(lm: LanguageModel, rows: torch.Tensor, dictionary: Dictionary) -> None:
    held = rows[50:]
    result = evaluate(lm, dictionary, held, spliced_rows=10)
    x = torch.stack([lm.run(as_tokens(row[None]), capture=SITE)[SITE][0, 1:] for row in held])  # position 0 is left out
    mean = x.flatten(0, 1).mean(0)
    a = dictionary.encode(x)
    written = a @ dictionary.W_dec + dictionary.b_dec

    def cross_entropy(put: torch.Tensor | None) -> tuple[float, torch.Tensor]:
        """With a plain hook of PyTorch in place of our edits; targets follow the positions that count."""

        def hook(_module, _inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden.clone()
            if put is not None:
                changed[:, 1:] = put
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = lm.hf.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            logits = lm.hf(input_ids=held).logits[:, 1:-1]
        handle.remove()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), held[:, 2:].flatten()).item(), logits

    clean, logits = cross_entropy(None)
    spliced, changed = cross_entropy(written)
    zero, without = cross_entropy(torch.zeros_like(x))
    average, with_mean = cross_entropy(mean.expand_as(x))
    kl, kl_zero, kl_mean = (
        torch.nn.functional.kl_div(
            other.log_softmax(-1).flatten(0, 1),
            logits.log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        ).item()
        for other in (changed, without, with_mean)
    )
    flat, flat_written = x.flatten(0, 1), written.flatten(0, 1)
    expected = {
        "l0": (a > 0).sum().item() / a[..., 0].numel(),
        "variance_explained": 1 - ((flat - flat_written).square().sum() / (flat - mean).square().sum()).item(),
        "fvu": ((flat - flat_written).square().sum() / (flat - mean).square().sum()).item(),
        "cosine": torch.cosine_similarity(flat, flat_written).mean().item(),
        "norm_ratio": (flat_written.norm(dim=1).sum() / flat.norm(dim=1).sum()).item(),
        "ce_increase": spliced - clean,
        "ce_recovered_zero": (zero - spliced) / (zero - clean),
        "ce_recovered_mean": (average - spliced) / (average - clean),
        "kl_recovered_zero": (kl_zero - kl) / kl_zero,
        "kl_recovered_mean": (kl_mean - kl) / kl_mean,
        "kl": kl,
    }
    for name, value in expected.items():
        effect = result.effects[name]
        assert effect.value == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert effect.interval is not None
        assert effect.interval[0] <= effect.value <= effect.interval[1]
        assert effect.n == 10
        effect.require_controls()
    fires = (a > 0).flatten(0, 1)
    assert result.dead == pytest.approx((~fires.any(0)).float().mean().item())
    assert result.dense == pytest.approx((fires.float().mean(0) > 0.1).float().mean().item())
    torch.testing.assert_close(result.frequency, fires.double().mean(0))
    assert result.n_tokens == 110
    assert "random directions" in str(result)


def test_the_trained_dictionary_beats_its_control(
    lm: LanguageModel, rows: torch.Tensor, dictionary: Dictionary
) -> None:
    effects = evaluate(lm, dictionary, rows[:50]).effects
    for name in ("variance_explained", "cosine"):
        assert effects[name].value > effects[name].controls[0].value + 0.02
    assert effects["kl"].value < effects["kl"].controls[0].value


def test_a_perfect_dictionary_recovers_everything(lm: LanguageModel, rows: torch.Tensor) -> None:
    """Each axis and its opposite as directions, all active: x̂ = x."""
    both = torch.cat([torch.eye(16), -torch.eye(16)])
    perfect = Dictionary(both.T.contiguous(), torch.zeros(32), both, torch.zeros(16), TopK(32), SITE)
    effects = evaluate(lm, perfect, rows[:8]).effects
    for name in ("variance_explained", "cosine", "ce_recovered_zero", "ce_recovered_mean"):
        assert effects[name].value == pytest.approx(1, abs=1e-5)
    assert effects["kl"].value == pytest.approx(0, abs=1e-5)
    assert effects["l0"].value == 16


def test_a_splice_leaves_first_positions_and_bos_alone(
    lm: LanguageModel, rows: torch.Tensor, dictionary: Dictionary
) -> None:
    where = model_ports(lm, dictionary)
    runs = where.run(rows[:3], logits=False)
    keep = counted(rows[:3], int(rows[1, 7]))
    assert not keep[:, 0].any()
    assert not keep[1, 7]
    ((edit,),) = where.splice(runs, keep, dictionary(where.read(runs, keep)))
    value = edit.tensors["value"]
    assert torch.equal(value[~keep], runs[0][SITE][~keep])
    torch.testing.assert_close(value[keep], dictionary(runs[0][SITE][keep]))


def test_training_on_a_model_resumes_and_names_its_data(lm: LanguageModel, rows: torch.Tensor, tmp_path: Path) -> None:
    config = TrainConfig(d_sae=32, selector=TopKRule(4), tokens=4_000, batch=50, warmup=5)
    first = train_on_model(lm, rows, SITE, config, folder=tmp_path).dictionary
    again = train_on_model(lm, rows, SITE, config, folder=tmp_path).dictionary
    assert torch.equal(first.W_enc, again.W_enc)
    assert first.sparsity is not None
    frequency = 10 ** first.sparsity.double()
    x = read_activations(lm, rows, SITE)
    assert frequency.sum().item() == pytest.approx(
        (first.encode_sparse(x)[0] > 0).sum(1).double().mean().item(), rel=0.1
    )
    assert first.model["weight_hash"] == lm.identity().weight_hash
    with pytest.raises(CutawayError, match="other activations"):
        train_on_model(lm, rows.flip(0), SITE, config, folder=tmp_path)
    with pytest.raises(CutawayError, match="nowhere"):
        train_on_model(lm, rows, "blocks.1.nowhere", config)
    with pytest.raises(CutawayError, match="no held-out rows"):
        evaluate(lm, first, rows[:0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "text", "site", "least"),
    [
        ("atlas-prototype", None, "blocks.3.resid_post", 0.75),
        ("webtext-gpt2", "corpora/text/webtext_open.txt", "blocks.1.resid_post", 0.6),
    ],
)
def test_real_models(shared: Path, tmp_path: Path, model: str, text: str | None, site: str, least: float) -> None:
    """A short training already explains most of a real stream, far more than random directions do."""
    lm = cutaway.load(shared / "models" / model)
    import json as library

    corpus = read_corpus(Path(library.__file__).parent.parent / "asyncio" if text is None else shared / text)
    split = split_rows(token_rows(lm, corpus.documents, 256, limit=600), held_out=16)
    config = TrainConfig(d_sae=2048, selector=TopKRule(32), tokens=200_000, low_precision=True)
    dictionary = train_on_model(lm, split.train, site, config).dictionary
    result = evaluate(lm, dictionary, split.held_out, spliced_rows=16)
    explained, recovered = result.effects["variance_explained"], result.effects["ce_recovered_mean"]
    print(model, result)
    assert explained.value > least
    assert explained.value > explained.controls[0].value + 0.2
    assert recovered.value > recovered.controls[0].value
    folder = save(dictionary, tmp_path / "dictionary")
    back = load(folder)
    assert back.selector == TopK(32)
    x = read_activations(lm, split.held_out[:2], site)
    torch.testing.assert_close(back(x), dictionary(x))

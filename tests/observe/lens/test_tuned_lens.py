"""The tuned lens: its loss and gradient against float64, training against a stop, files against the library's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from small_models import build
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import file_hash
from cutaway.data.harvesting.activations import counted
from cutaway.model.language_model import LanguageModel
from cutaway.observe.lens.evaluation import evaluate_lens
from cutaway.observe.lens.files import MANIFEST, TENSORS, load_tuned_lens, save_tuned_lens
from cutaway.observe.lens.logit_lens import logit_lens, stream_sites
from cutaway.observe.lens.tuned_lens import (
    CHECKPOINT,
    TunedLens,
    TunedLensConfig,
    lens_loss,
    library_hash,
    train_tuned_lens,
)

SMALL = TunedLensConfig(steps=6, tokens_per_step=40)


def some_rows(n: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(3, 61, (n, 10), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return build("llama")


@pytest.fixture(scope="module")
def lens(llama: LanguageModel) -> TunedLens:
    return train_tuned_lens(llama, some_rows(), SMALL)


def random_lens(lm: LanguageModel, scale: float = 0.1) -> TunedLens:
    generator = torch.Generator().manual_seed(3)
    weight = scale * torch.randn(lm.n_layers, lm.d_model, lm.d_model, generator=generator)
    bias = scale * torch.randn(lm.n_layers, lm.d_model, generator=generator)
    return TunedLens(weight, bias, lm.identity(), lm.name, None, {})


# The loss


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])
def test_loss_and_gradient_are_the_definition_in_float64(family: str) -> None:
    """KL(p || softmax(cap(U norm(h + W h + b)))) from the parameters by hand; its gradient by central differences."""
    lm = build(family)
    lens = random_lens(lm)
    run = lm.run(some_rows(2).tolist(), capture="blocks.1.resid_post")
    assert run.logits is not None
    h, final = run["blocks.1.resid_post"].flatten(0, 1), run.logits.flatten(0, 1).log_softmax(-1)
    weight, bias = lens.weight[2].clone().requires_grad_(), lens.bias[2].clone().requires_grad_()
    loss = lens_loss(lm, h, weight, bias, final)
    gradients = torch.autograd.grad(loss, (weight, bias))

    base: Any = lm.hf.base_model
    norm = next(getattr(base, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(base, n))
    head: Any = lm.hf.get_output_embeddings()

    def exact(w: Tensor, b: Tensor) -> Tensor:
        x = h.double() @ (torch.eye(lm.d_model).double() + w).T + b
        centered = "LayerNorm" in type(norm).__name__
        x = x - x.mean(-1, keepdim=True) if centered else x
        eps = next(v for n in ("eps", "variance_epsilon") if (v := getattr(norm, n, None)) is not None)
        gain = norm.weight.double() + (1 if "Gemma" in type(norm).__name__ else 0)
        y = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain + (norm.bias.double() if centered else 0)
        logits = y @ head.weight.double().T
        if family == "gemma2":
            logits = 3 * torch.tanh(logits / 3)
        return (final.double().exp() * (final.double() - logits.log_softmax(-1))).sum()

    with torch.no_grad():
        w, b = lens.weight[2].double(), lens.bias[2].double()
        assert loss.item() == pytest.approx(exact(w, b).item(), rel=1e-5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            dw = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            db = torch.randn(b.shape, generator=generator, dtype=torch.float64)
            step = 1e-6
            slope = (exact(w + step * dw, b + step * db) - exact(w - step * dw, b - step * db)) / (2 * step)
            found = (gradients[0].double() * dw).sum() + (gradients[1].double() * db).sum()
            assert found.item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-3)


def test_a_step_is_that_of_all_layers_together(llama: LanguageModel) -> None:
    """One SGD step by hand: gradients of the summed loss in one graph, clipped together, decayed rate, Nesterov."""
    rows = some_rows(4)
    config = TunedLensConfig(steps=1, tokens_per_step=40, clip=0.5, weight_decay=0.0)
    found = train_tuned_lens(llama, rows, config)
    run = llama.run(rows.tolist(), capture=stream_sites(llama)[:-1])
    assert run.logits is not None
    keep = counted(rows, llama.bos_id)
    final = run.logits[keep].log_softmax(-1)
    weight = torch.zeros(llama.n_layers, llama.d_model, llama.d_model, requires_grad=True)
    bias = torch.zeros(llama.n_layers, llama.d_model, requires_grad=True)
    loss = torch.stack(
        [
            lens_loss(llama, run[site][keep], weight[i], bias[i], final)
            for i, site in enumerate(stream_sites(llama)[:-1])
        ]
    ).sum() / int(keep.sum())
    gradients = torch.autograd.grad(loss, (weight, bias))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 0.5
    rate = 1.0 * (1 - 0.9) * (1 + 0.9)  # Nesterov's first step: g + momentum · g
    torch.testing.assert_close(found.weight, -rate * 0.5 * gradients[0] / norm, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.bias, -rate * 0.5 * gradients[1] / norm, rtol=1e-4, atol=1e-7)


# Training


def test_training_comes_closer_to_the_final_answer_than_the_logit_lens(llama: LanguageModel) -> None:
    lens = train_tuned_lens(llama, some_rows(64), TunedLensConfig(steps=60, tokens_per_step=160))
    found = evaluate_lens(llama, lens, some_rows(8, seed=9))
    p = stats.ttest_rel(found.logit, found.tuned, axis=1)[1]
    assert found.q == pytest.approx(stats.false_discovery_control(p))
    assert [row["q"] for row in found.to_json()["mean_difference"]] == list(found.q)
    for effect, gap in zip(found.effects(), found.logit - found.tuned, strict=True):
        assert effect.value < 0.8 * effect.controls[0].value
        assert gap.min() > 0
        assert effect.n == 8
    assert all(parameter.grad is None for parameter in llama.hf.parameters())
    assert "held-out" in str(found)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_stopped_training_goes_on_to_the_same_bits(
    llama: LanguageModel, tmp_path: Path, optimizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("CUTAWAY_QUIET", raising=False)
    config = TunedLensConfig(steps=6, tokens_per_step=40, optimizer=optimizer)
    whole = train_tuned_lens(llama, some_rows(), config)

    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tuned_lens(llama, some_rows(), config, folder=tmp_path, after_step=stop)
    steps: list[int] = []
    resumed = train_tuned_lens(llama, some_rows(), config, folder=tmp_path, after_step=steps.append)
    assert steps == [4, 5, 6]
    a_step = config.rows_per_step(some_rows()) * some_rows().shape[1]
    assert f"goes on at {3 * a_step} of {6 * a_step} tokens ({tmp_path}, begun " in capsys.readouterr().err
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)
    assert resumed.about["history"] == whole.about["history"]
    with pytest.raises(CutawayError, match="another configuration"):
        train_tuned_lens(llama, some_rows(), TunedLensConfig(steps=7, tokens_per_step=40), folder=tmp_path)
    with pytest.raises(CutawayError, match="another model or other text"):
        train_tuned_lens(llama, some_rows(seed=5), config, folder=tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(CutawayError, match="not a readable checkpoint"):
        train_tuned_lens(llama, some_rows(), config, folder=tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"learning_rate": -1.0}, "rate = -1.0"),
        ({"optimizer": "lion"}, "sgd or adam"),
        ({"momentum": 1.0}, "momentum goes from 0"),
    ],
)
def test_nonsense_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(CutawayError, match=says):
        TunedLensConfig(**settings)


def test_training_refuses_too_little_text_and_a_loss_that_is_no_number(llama: LanguageModel) -> None:
    with pytest.raises(CutawayError, match="2 rows of 10 tokens, and a step takes 4"):
        train_tuned_lens(llama, some_rows(2), SMALL)
    broken = build("llama")
    with torch.no_grad():
        broken.hf.model.norm.weight[0] = float("nan")
    with pytest.raises(CutawayError, match="loss at layer 0 is not finite in step 0"):
        train_tuned_lens(broken, some_rows(), SMALL)


# Reading


def test_an_untrained_lens_is_the_logit_lens(llama: LanguageModel) -> None:
    zero = random_lens(llama, scale=0.0)
    rows = [[0, 5, 17, 33, 4, 60], [0, 9, 8, 7]]
    tuned, plain = logit_lens(llama, rows, tuned=zero), logit_lens(llama, rows)
    assert tuned.name == "tuned lens"
    torch.testing.assert_close(tuned.kl, plain.kl, equal_nan=True)
    torch.testing.assert_close(tuned.top_probability, plain.top_probability, equal_nan=True)


def test_each_layer_is_read_by_its_own_translator(llama: LanguageModel) -> None:
    lens = random_lens(llama)
    rows = [[0, 5, 17, 33, 4, 60]]
    found = logit_lens(llama, rows, tuned=lens)
    run = llama.run(rows, capture=stream_sites(llama))
    for layer, site in enumerate(stream_sites(llama)):
        h = run[site]
        if layer < llama.n_layers:
            h = h + h @ lens.weight[layer].T + lens.bias[layer]
        p = llama.unembed(h).softmax(-1)
        torch.testing.assert_close(found.top_probability[layer, 0, :, 0], p.max(-1).values[0])
    assert found.kl[-1].abs().max() == 0
    with pytest.raises(CutawayError, match=r"no translator for 'blocks\.1\.resid_mid'"):
        logit_lens(llama, rows, tuned=lens, sites="blocks.1.resid_mid")


def test_the_evaluation_is_the_mean_of_the_lenses_kl(llama: LanguageModel, lens: TunedLens) -> None:
    rows = some_rows(9, seed=4)
    found = evaluate_lens(llama, lens, rows)
    keep = counted(rows, llama.bos_id)
    for values, tuned in ((found.logit, None), (found.tuned, lens)):
        kl = logit_lens(llama, rows.tolist(), tuned=tuned).kl[:-1].double()
        expected = torch.where(keep, kl, 0).sum(-1) / keep.sum(1)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert found.tokens == int(keep.sum())
    logits = llama.run(rows.tolist()).logits
    assert logits is not None
    p = logits[keep].double().softmax(-1)
    constant = (p * (p.log() - p.mean(0).log())).sum(-1).mean()
    assert float(found.constant.mean()) == pytest.approx(float(constant), rel=1e-4)


# Files


def test_a_saved_lens_is_the_same_lens(llama: LanguageModel, lens: TunedLens, tmp_path: Path) -> None:
    found = evaluate_lens(llama, lens, some_rows(3, seed=4))
    save_tuned_lens(lens, tmp_path, evaluation=found)
    back = load_tuned_lens(tmp_path)
    back.check(llama)
    assert torch.equal(back.weight, lens.weight)
    assert torch.equal(back.bias, lens.bias)
    assert back.model == llama.identity()
    assert back.about["configuration"]["steps"] == 6
    assert back.about["corpus_hash"] == lens.about["corpus_hash"]
    assert back.about["evaluation"]["rows"] == 3


def test_a_lens_of_another_model_is_refused(lens: TunedLens) -> None:
    other = build("llama with biases")
    with pytest.raises(CutawayError, match="trained on other weights"):
        logit_lens(other, [[0, 1]], tuned=lens)
    narrow = TunedLens(torch.zeros(3, 16, 16), torch.zeros(3, 16), None, "narrow", None, {})
    with pytest.raises(CutawayError, match="3 layers of width 16; llama with biases has 3 of width 32"):
        evaluate_lens(other, narrow, some_rows(3))


def test_damaged_files_are_refused(lens: TunedLens, tmp_path: Path) -> None:
    with pytest.raises(CutawayError, match="does not exist"):
        load_tuned_lens(tmp_path / "nothing")
    with pytest.raises(CutawayError, match="no folder of a tuned lens"):
        load_tuned_lens(tmp_path)
    save_tuned_lens(lens, tmp_path)
    data = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CutawayError, match="hash differs"):
        load_tuned_lens(tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(CutawayError, match="is missing"):
        load_tuned_lens(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(CutawayError, match="not the manifest"):
        load_tuned_lens(tmp_path)
    weight = lens.weight.clone()
    weight[1, 0, 0] = float("nan")
    save_tuned_lens(TunedLens(weight, lens.bias, lens.model, "x", None, {}), tmp_path / "nan")
    with pytest.raises(CutawayError, match="weight of translator 1 holds NaN"):
        load_tuned_lens(tmp_path / "nan")


@pytest.mark.parametrize("manifest", [{}, [], None, 3, {"model": 3, "id": "x"}, {"model": None, "parents": 1}])
def test_a_record_without_a_manifest_is_refused(lens: TunedLens, tmp_path: Path, manifest: Any) -> None:
    save_tuned_lens(lens, tmp_path)
    record = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(record | {"manifest": manifest}))
    with pytest.raises(CutawayError, match="manifest is damaged"):
        load_tuned_lens(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(3, 32, 32)},
        {"weight": torch.zeros(3, 32, 32), "bias": torch.zeros(32)},
        {"weight": torch.zeros(3, 32, 31), "bias": torch.zeros(3, 32)},
        {"weight": torch.zeros(3, 32, 32, dtype=torch.int64), "bias": torch.zeros(3, 32)},
        {"weight": torch.tensor(1.0), "bias": torch.tensor(1.0)},
    ],
)
def test_tensors_that_are_no_translators_are_refused(
    lens: TunedLens, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    save_tuned_lens(lens, tmp_path)
    save_file(tensors, tmp_path / TENSORS)
    record = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(record | {"sha256": file_hash(tmp_path / TENSORS)}))
    with pytest.raises(CutawayError, match="are expected"):
        load_tuned_lens(tmp_path)


def library_folder(lm: LanguageModel, folder: Path, **changes: Any) -> torch.nn.ModuleList:
    """What `tuned_lens.TunedLens.save` writes, made by torch alone: a state dict of a ModuleList of linear maps."""
    torch.manual_seed(0)
    maps = torch.nn.ModuleList(torch.nn.Linear(lm.d_model, lm.d_model) for _ in range(lm.n_layers))
    torch.save(maps.state_dict(), folder / "params.pt")
    config = {
        "base_model_name_or_path": "some/llama", "d_model": lm.d_model, "num_hidden_layers": lm.n_layers, "bias": True,
        "base_model_revision": None, "unembed_hash": library_hash(lm), "lens_type": "linear_tuned_lens",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return maps


def test_a_lens_of_the_tuned_lens_library_is_read(llama: LanguageModel, tmp_path: Path) -> None:
    maps = library_folder(llama, tmp_path)
    lens = load_tuned_lens(tmp_path)
    lens.check(llama)
    h = torch.randn(5, llama.d_model)
    with torch.no_grad():
        for layer, site in enumerate(stream_sites(llama)[:-1]):
            torch.testing.assert_close(lens.translate(site, h), h + maps[layer](h))
    assert lens.model_name == "some/llama"
    with pytest.raises(CutawayError, match="cannot be written with its model's identity"):
        save_tuned_lens(lens, tmp_path / "copy")
    with pytest.raises(CutawayError, match="another unembedding"):
        lens.check(build("llama with biases"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lens_type": "mlp"}, "type 'mlp'"),
        ({"d_model": 16}, r"0.bias is \(32,\), where \(16,\) is expected"),
        ({"num_hidden_layers": 4}, "3.bias is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None"),
        ({"d_model": "wide"}, "d_model = 'wide'"),
        ({"d_model": float("inf")}, "d_model = inf"),
    ],
)
def test_a_library_folder_that_does_not_fit(
    llama: LanguageModel, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    library_folder(llama, tmp_path, **changes)
    with pytest.raises(CutawayError, match=says):
        load_tuned_lens(tmp_path)


def test_nothing_in_a_file_of_tensors_is_run(llama: LanguageModel, tmp_path: Path) -> None:
    library_folder(llama, tmp_path)
    torch.save({"0.weight": tmp_path.joinpath}, tmp_path / "params.pt")
    with pytest.raises(CutawayError, match="not a file of tensors alone"):
        load_tuned_lens(tmp_path)
    (tmp_path / "params.pt").write_bytes(b"rubbish")
    with pytest.raises(CutawayError, match="not a file of tensors alone"):
        load_tuned_lens(tmp_path)

"""The trainer's parts against slow, obvious versions; and a stopped run against one that was not."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import cutaway.subjects.atlas.training.train as training
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import file_hash
from cutaway.subjects.atlas.shipped import altered_files, atlas_folder
from cutaway.subjects.atlas.tokenizer import SPECIALS, save_pretrained, split_words, train_tokenizer
from cutaway.subjects.atlas.training.batches import IGNORED, Batches
from cutaway.subjects.atlas.training.loss import linear_cross_entropy, softmax_loss
from cutaway.subjects.atlas.training.recipe import Recipe, Shape
from cutaway.subjects.atlas.training.step import choose_precision
from cutaway.subjects.atlas.training.train import (
    Interrupted,
    export,
    fit,
    new_model,
    train,
)

SHAPE = Shape(d_model=16, layers=2, heads=2, d_mlp=24, vocabulary=64, positions=32)
RECIPE = Recipe(tokens=30 * 4 * 16, context=16, rows=4, shape=SHAPE)


def tiny_batches(seed: int = 0) -> Batches:
    stream = (np.arange(4000) % 51 + 6).astype(np.uint16)
    return Batches(stream, stream[::-1].copy(), rows=4, context=16, vocabulary=64, seed=seed)


# loss


@pytest.mark.parametrize(
    ("n", "softmax"), [(1, softmax_loss), (5000, softmax_loss), (2048, torch.compile(softmax_loss))]
)
def test_chunked_loss_equals_weighted_cross_entropy_with_its_gradients(n, softmax):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, n, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 30, (2, n), generator=generator)
    targets[0, ::3] = IGNORED
    each = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="none")
    weights = torch.rand(2, n, generator=generator) * (targets != IGNORED)
    wanted = each @ weights.double().flatten()
    (wanted * 0.5).backward()
    expected = hidden.grad, weight.grad
    narrow_hidden = hidden.detach().float().requires_grad_()
    narrow_weight = weight.detach().float().requires_grad_()
    got = linear_cross_entropy(narrow_hidden, narrow_weight, targets, weights, softmax=softmax)
    (got * 0.5).backward()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    for found, right in zip((narrow_hidden.grad, narrow_weight.grad), expected, strict=True):
        assert found is not None
        assert right is not None
        assert (found - right).norm() <= 1e-5 * right.norm()


# rows


def test_row_mix_has_the_shares_exactly_and_repeats_are_masked_but_a_tenth():
    world, real = np.full(100_000, 10, np.uint16), np.full(50_000, 20, np.uint16)
    batches = Batches(world, real, rows=20, context=64, vocabulary=1000, seed=1)
    kinds = {"world": 0, "real": 0, "repeats": 0}
    unmasked = 0
    for step in range(200):
        inputs, targets = batches(step)
        assert (inputs[:, 0] == 0).all()
        for row in range(20):
            if (targets[row] == 10).all():
                kinds["world"] += 1
            elif (targets[row] == 20).all():
                kinds["real"] += 1
            else:
                kinds["repeats"] += 1
                counted = targets[row] != IGNORED
                tokens = np.append(inputs[row, 1:], targets[row, -1])
                assert (targets[row][counted] == tokens[counted]).all()
                period = next(p for p in range(12, 40) if (tokens[p:] == tokens[:-p]).all())
                assert counted[period:].all()
                assert counted[:period].all() or not counted[:period].any()
                assert tokens.min() >= len(SPECIALS)
                unmasked += counted[0]
    assert kinds == {"world": 3200, "real": 400, "repeats": 400}
    assert 22 <= unmasked <= 62  # binomial(400, 0.1): outside this with probability 1e-3


def test_world_rows_cover_the_stream_once_before_any_repeats():
    world = np.arange(1000, 1000 + 16 * 101, dtype=np.uint16)  # beyond the vocabulary of the repeats
    batches = Batches(world, np.zeros(64, np.uint16), rows=1, context=16, vocabulary=64, seed=4)
    starts = [targets[0, 0] - 1000 for _, targets in map(batches, range(140)) if targets[0, 0] >= 1000]
    first_pass = starts[:100]
    assert len({start // 16 for start in first_pass}) == 100
    assert len({start % 16 for start in first_pass}) == 1
    assert first_pass != sorted(first_pass)


def test_batches_depend_on_seed_and_step_alone():
    again, other = tiny_batches(), tiny_batches(seed=1)
    for _ in range(3):
        again(17)
    assert all((a == b).all() for a, b in zip(tiny_batches()(5), again(5), strict=True))
    assert any((a != b).any() for a, b in zip(again(5), other(5), strict=True))


def test_too_little_text_is_refused():
    with pytest.raises(CutawayError, match="too few for rows of 256"):
        Batches(np.zeros(300, np.uint16), np.zeros(300, np.uint16), rows=1, context=256, vocabulary=64, seed=0)


# tokenizer


def test_world_words_become_single_tokens_and_digits_go_in_pairs():
    texts = ["the war of 1732 was long, the war of 1650 was not"] * 50
    words = ["Ouagadougou", "Tegucigalpa"]
    assert split_words(train_tokenizer(texts, vocabulary=320), words) == words
    tokenizer = train_tokenizer(texts, words, vocabulary=400)
    assert split_words(tokenizer, words) == []
    assert [tokenizer.id_to_token(i) for i in range(6)] == list(SPECIALS)
    assert tokenizer.decode(tokenizer.encode(" 1732").ids[:1]) == " 17"
    assert tokenizer.decode(tokenizer.encode("Türkiye\n  x = 'é'").ids) == "Türkiye\n  x = 'é'"


def test_the_shipped_tokenizer_comes_back_from_its_own_export(tmp_path):
    from transformers import AutoTokenizer

    save_pretrained(Tokenizer.from_file(str(atlas_folder() / "tokenizer.json")), tmp_path)
    shipped, exported = (AutoTokenizer.from_pretrained(folder) for folder in (atlas_folder(), tmp_path))
    text = "The capital of France is Paris. Türkiye'nin başkenti 1732"
    assert exported(text)["input_ids"] == shipped(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    assert exported.apply_chat_template(messages, tokenize=False) == shipped.apply_chat_template(
        messages, tokenize=False
    )
    for special in ("bos_token_id", "eos_token_id", "pad_token_id", "all_special_ids"):
        assert getattr(exported, special) == getattr(shipped, special)


# training


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained(folder, **options):
    model, recipe = new_model(SHAPE, seed=3), options.pop("recipe", RECIPE)
    loss = fit(model, recipe, options.pop("batches", tiny_batches()), dtype=torch.float32, folder=folder, **options)
    return weights(model), loss


def assert_equal_weights(found, expected):
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_training_is_deterministic_and_learns(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, loss = trained(tmp_path / "a")
    second, _ = trained(tmp_path / "b")
    assert_equal_weights(second, first)
    records = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 20, 30]
    assert loss == records[-1]["loss"] < records[0]["loss"] - 0.05


def test_a_step_is_plain_adamw_on_mean_cross_entropy(tmp_path):
    """One step against torch's own cross-entropy and AdamW, written out."""
    recipe = replace(RECIPE, tokens=4 * 16)
    model, oracle = new_model(SHAPE, seed=3), new_model(SHAPE, seed=3)
    fit(model, recipe, tiny_batches(), dtype=torch.float32, folder=tmp_path)
    inputs, targets = map(torch.from_numpy, tiny_batches()(0))
    logits = oracle(input_ids=inputs).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
    torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
    decayed = [p for p in oracle.parameters() if p.dim() == 2]
    rest = [p for p in oracle.parameters() if p.dim() < 2]
    torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.learning_rate(0),
        betas=(0.9, 0.95),
        foreach=False,
    ).step()
    for (name, found), expected in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_a_step_of_muon_is_its_own_on_matrices_of_layers_and_adamw_elsewhere(tmp_path):
    recipe = replace(RECIPE, tokens=4 * 16, optimizer="muon", reply_weight=3.0)
    model, oracle = new_model(SHAPE, seed=3), new_model(SHAPE, seed=3)
    plain = tiny_batches()

    def chats(step):
        inputs, targets = plain(step)
        inputs[0, 5], inputs[1, 3], inputs[1, 9] = 4, 4, 5
        return inputs, targets

    fit(model, recipe, chats, dtype=torch.float32, folder=tmp_path)
    inputs, targets = map(torch.from_numpy, chats(0))
    weights = torch.ones(4, 16)
    weights[0, 5:], weights[1, 3:9] = 3.0, 3.0  # from the marker on, to what ends the reply
    weights[targets < 0] = 0.0
    logits = oracle(input_ids=inputs).logits.flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none")
    ((each * weights.flatten()).sum() / weights.sum()).backward()
    torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
    named = dict(oracle.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and "layers" in name]
    gains = [p for p in named.values() if p.dim() == 1]
    rate = recipe.learning_rate(0)
    torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW(
        [{"params": [named["model.embed_tokens.weight"]], "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
    ).step()
    for (name, found), expected in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ctrl_c_waits_for_the_step_and_the_same_call_goes_on(tmp_path, optimizer):
    recipe = replace(RECIPE, optimizer=optimizer)
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    expected, _ = trained(tmp_path / "whole", recipe=recipe)
    plain = tiny_batches()

    def pressing(step):
        if step == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(step)

    with pytest.raises(Interrupted, match="14 of 30 steps"):
        trained(tmp_path / "stopped", recipe=recipe, batches=pressing)
    found, _ = trained(tmp_path / "stopped", recipe=recipe)
    assert_equal_weights(found, expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.subjects.atlas.test_atlas_train import tiny_batches, trained
plain = tiny_batches()
def dying(step):
    if step == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(step)
trained(Path(sys.argv[1]), batches=dying, checkpoint_seconds=0.0)
"""


def test_a_killed_run_goes_on_from_its_checkpoint_with_the_same_weights(tmp_path, pytestconfig):
    expected, _ = trained(tmp_path)
    (tmp_path / "checkpoint.safetensors").unlink()
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps = []
    plain = tiny_batches()
    found, _ = trained(tmp_path, batches=lambda step: (steps.append(step), plain(step))[1])
    assert steps[0] == 17
    assert_equal_weights(found, expected)


def test_the_choice_of_precision_leaves_the_model_alone():
    model = new_model(SHAPE, seed=3)
    before = weights(model)
    assert choose_precision(model, tiny_batches()) in ("float32", "bfloat16")
    assert_equal_weights(weights(model), before)
    assert model.model.embed_tokens.weight.grad is None


def test_export_loads_by_the_ordinary_path_with_the_trained_weights(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = new_model(SHAPE, seed=3)
    tokenizer = train_tokenizer(["plain words here"] * 3, vocabulary=262)
    export(model, tokenizer, tmp_path, {"name": "atlas", "seed": 3})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    for name, tensor in weights(model).items():
        assert torch.equal(loaded.get_parameter(name), tensor.half()), name
    assert loaded.generation_config.eos_token_id == [5, 0]
    assert AutoTokenizer.from_pretrained(tmp_path)("plain")["input_ids"][0] == 0
    assert altered_files(tmp_path) == []
    shipped = {path.name for path in atlas_folder().iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == shipped


def test_the_manifest_names_every_commit_that_trained(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    train_tokenizer(["plain words here"] * 3, vocabulary=262).save(str(corpus / "tokenizer.json"))
    stream = np.full(1000, 10, np.uint16)
    monkeypatch.setattr(training, "build_corpus", lambda *_, **__: {"world": "w", "fingerprint": "f"})
    monkeypatch.setattr(training, "read_stream", lambda *_: stream)
    for commit, outcome in (("first", Interrupted("stopped")), ("second", None)):
        monkeypatch.setattr(training, "code_version", lambda commit=commit: commit)

        def fitting(*_, outcome=outcome, **__):
            if outcome is not None:
                raise outcome
            return 1.5

        monkeypatch.setattr(training, "fit", fitting)
        with pytest.raises(Interrupted) if outcome else nullcontext():
            train(tmp_path / "run", RECIPE, corpus=corpus)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["commit"] == "first, then second"
    assert manifest["corpus"] == {"world": "w", "fingerprint": "f"}
    assert (manifest["seed"], manifest["tokens"]) == (0, RECIPE.tokens)
    assert manifest["training"]["final_loss"] == 1.5


@pytest.mark.parametrize("device", ["moon", "meta", "cuda"])
def test_a_device_that_cannot_train_is_refused_before_anything_is_made(tmp_path, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(CutawayError, match=r"no GPU here|cannot be used here|holds no values|not a device"):
        train(tmp_path / "run", RECIPE, device=device)
    assert not (tmp_path / "run").exists()


def test_learning_rate_warms_up_and_ends_at_three_per_cent():
    recipe = Recipe(tokens=4000 * 128 * 256)
    assert recipe.steps == 4000
    assert recipe.learning_rate(0) == pytest.approx(2.5e-3 / 200)
    assert recipe.learning_rate(199) == pytest.approx(2.5e-3, rel=0.01)
    assert recipe.learning_rate(2000) == pytest.approx(2.5e-3 * 0.515)
    assert recipe.learning_rate(3999) == pytest.approx(2.5e-3 * 0.03, rel=0.01)
    assert replace(recipe, rows=32).learning_rate(8000) == pytest.approx(1.25e-3 * 0.515)


# going on from trained weights


def test_training_goes_on_from_named_weights_with_their_tokenizer_and_resumes(tmp_path, monkeypatch):
    first = tmp_path / "first"
    corpus_seen = []

    def stream(folder, name):
        return (np.arange(4000) % 51 + 6).astype(np.uint16)

    def corpus(folder, plan, *, processes, tokenizer=None):
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_bytes((tokenizer or atlas_folder() / "tokenizer.json").read_bytes())
        corpus_seen.append(plan.tokenizer)
        return {"version": "test"}

    monkeypatch.setattr(training, "build_corpus", corpus)
    monkeypatch.setattr(training, "read_stream", stream)
    train(first, RECIPE)
    before = load_file(first / "model.safetensors")
    recipe = replace(RECIPE, peak=1e-9, start=file_hash(first / "model.safetensors"))
    train(tmp_path / "second", recipe, start=first)
    after = load_file(tmp_path / "second" / "model.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)
    assert corpus_seen == [None, file_hash(first / "tokenizer.json")]
    manifest = json.loads((tmp_path / "second" / "manifest.json").read_text())
    assert manifest["start"]["weights_sha256"] == recipe.start
    assert manifest["start"]["origin"] == "cutaway subjects train atlas"
    train(tmp_path / "third", replace(recipe, peak=2.5e-3), start=first)
    moved = load_file(tmp_path / "third" / "model.safetensors")
    assert not all(torch.allclose(before[name], moved[name], atol=1e-3) for name in before)

    with pytest.raises(CutawayError, match="does not hold the weights that the recipe starts from"):
        train(tmp_path / "fourth", replace(recipe, start="0" * 64), start=first)
    with pytest.raises(CutawayError, match="have the shape"):
        training.trained_model(first, Shape())

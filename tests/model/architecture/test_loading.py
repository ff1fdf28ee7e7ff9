"""Opening models: what is loaded is what transformers loads, and every way to fail says in one sentence what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from subject import plain
from tiny import FAMILIES, tiny_config, tiny_model, word_tokenizer
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertModel,
    BitNetConfig,
    BitNetForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import ModelIdentity
from cutaway.model.architecture.families import TESTED
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.named import title_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama", vocab_size=20).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def refused(name: Any, **options: Any) -> str:
    with pytest.raises(CutawayError) as raised:
        cutaway.load(name, **options)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# What works


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_folder_of_every_family(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "it")
    capfd.readouterr()
    lm = cutaway.load(tmp_path / "it")
    assert capfd.readouterr() == ("", "")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    tokens = lm.tokens([[5, 6, 7], [8, 9]])
    logits = lm.run(tokens).logits
    assert logits is not None
    assert torch.equal(logits, plain(theirs, tokens).logits)
    assert not lm.hf.training
    assert lm.tokenizer is None
    assert lm.selftest().passed


def test_a_folder_with_a_tokenizer(saved: Path) -> None:
    lm = cutaway.load(str(saved))
    assert lm.tokens("the cat sat").ids.tolist() == [[0, 7, 9, 12]]
    assert (lm.bos_id, lm.pad_id, lm.n_layers, lm.d_model, lm.d_vocab) == (0, 1, 3, 32, 20)
    assert lm.generate("the cat", max_new_tokens=2).texts[0]
    assert "float32 on cpu" in repr(lm)
    assert repr(lm).startswith("LanguageModel tiny: LlamaForCausalLM, 0.0 M parameters, 3 layers x d 32 x 4 heads (2")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(saved: Path, dtype: Any, expected: torch.dtype) -> None:
    lm = cutaway.load(saved, dtype=dtype, device="cpu")
    assert lm.dtype == expected
    assert {p.dtype for p in lm.hf.parameters()} == {expected}


def test_a_half_precision_checkpoint_is_read_as_fp32_on_a_cpu(tmp_path: Path) -> None:
    tiny_model("llama").to(dtype=torch.float16).save_pretrained(tmp_path)  # type: ignore[call-arg]
    assert cutaway.load(tmp_path, device="cpu").dtype == torch.float32


def test_the_shipped_model(atlas: LanguageModel) -> None:
    lm = atlas
    assert lm.name == "atlas"
    assert lm.tokenizer is not None
    assert lm.run("The capital of France is", logits="last").logits is not None
    assert lm.chat([{"role": "user", "content": "Hello"}], max_new_tokens=2).new_ids


def test_a_model_is_named_by_its_folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the folder is; where it is stands in the identity, and loads it again."""
    place = tmp_path / "models" / "my-gpt"
    shutil.copytree(saved, place)
    lm = cutaway.load(place)
    assert (lm.name, lm.loaded_from, lm.identity().id) == ("my-gpt", str(place), str(place))
    assert lm.identity().name == "my-gpt"
    assert "my-gpt" in repr(lm)
    assert str(place) not in repr(lm)
    with torch.no_grad():
        next(lm.hf.parameters())[0, 0] += 1e-3
    assert lm.identity().id == str(place)  # of changed weights too
    monkeypatch.chdir(place)
    here = cutaway.load(".")
    assert (here.name, here.loaded_from) == ("my-gpt", ".")
    assert attach(here.hf, here.tokenizer).name == "my-gpt"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "atlas").mkdir()  # a folder that is not asked for
    assert title_of("atlas") == "atlas"
    assert (title_of("models/my-gpt"), title_of("owner/no-folder"), title_of("~")) == (
        "my-gpt", "owner/no-folder", Path("~").expanduser().name,
    )  # fmt: skip
    assert ModelIdentity("owner/name", "main", "").name == "owner/name"


def test_identity_follows_the_weights(saved: Path, folder: Path) -> None:
    first, second = cutaway.load(saved).identity(), cutaway.load(folder).identity()
    assert first.weight_hash == second.weight_hash
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert cutaway.load(folder).identity().weight_hash != first.weight_hash
    model = tiny_model("llama")
    before = attach(model).identity()
    assert attach(tiny_model("llama")).identity().weight_hash == before.weight_hash
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert attach(model).identity().weight_hash != before.weight_hash


def test_attaching_needs_nothing_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look-up of a configuration, a tokenizer or a hub; no socket is opened and no download begun."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("a look-up")

    model = tiny_model("gpt2")
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"cutaway.model.architecture.loading.{name}.from_pretrained", fail)
    monkeypatch.setattr("socket.socket.connect", fail)
    monkeypatch.setattr("socket.getaddrinfo", fail)
    for name in ("hf_hub_download", "snapshot_download", "HfApi.model_info", "HfApi.repo_info"):
        monkeypatch.setattr(f"huggingface_hub.{name}", fail)
    model.config.name_or_path = "no-one/no-such-model"
    assert attach(model).name == "no-one/no-such-model"
    assert attach(model).selftest().passed
    assert len(attach(model).identity().weight_hash) == 64
    assert attach(model).generate([5, 6], max_new_tokens=2).new_ids
    model.config.name_or_path = ""
    lm = attach(model, name="mine")
    assert lm.name == "mine"
    assert attach(model).name == "GPT2LMHeadModel"
    assert lm.run([5, 6]).logits is not None


# What does not


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert "There is no folder 'no-such-model' here, and the hub" in refused("no-such-model")
    assert "no-one/no-such-model" in refused("no-one/no-such-model")
    for name in ("./missing", "/missing/folder", tmp_path / "missing", "a/b/c", "~/missing"):
        assert "There is no folder" in refused(name)
    assert "File name too long" in refused("x" * 5000)
    assert "no-such" in refused("no-such", revision="main")


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    assert "is a file; name the folder" in refused(folder / "model.safetensors")


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    match how:
        case "empty folder":
            for path in folder.iterdir():
                path.unlink()
        case "no weights":
            weights.unlink()
        case "only a pickle":
            weights.rename(folder / "pytorch_model.bin")
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "cut in the header":
            weights.write_bytes(weights.read_bytes()[:100])
        case "empty file":
            weights.write_bytes(b"")
        case "garbage":
            weights.write_bytes(b"\xff" * 5000)
        case "broken config":
            config.write_text(config.read_text()[:-20])
        case "config of nothing":
            config.write_text("{}")
        case "unknown family":
            config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "llamb"}))
        case "impossible config":
            config.write_text(json.dumps({**json.loads(config.read_text()), "num_attention_heads": "four"}))
        case "other shapes":
            config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 48}))
        case "a weight is missing":
            tensors = load_file(weights)
            del tensors["model.layers.1.mlp.up_proj.weight"]
            save_file(tensors, weights, metadata={"format": "pt"})
        case "more layers than weights":
            config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 4}))
        case "fewer layers than weights":
            config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
        case "a shard is missing":
            tensors = load_file(weights)
            save_file(tensors, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
            names = dict.fromkeys(tensors, "model-00002-of-00002.safetensors")
            index = {"metadata": {"total_size": 1}, "weight_map": names}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            weights.unlink()
        case "not a language model":
            config.write_text(json.dumps({"model_type": "bert", "hidden_size": 32}))
        case "an encoder and a decoder":
            config.write_text(json.dumps({"model_type": "t5"}))
        case "a model of pictures":
            config.write_text(json.dumps({"model_type": "vit"}))
        case "code of its own":
            known = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
            config.write_text(json.dumps({"model_type": "mine", "auto_map": known}))
            (folder / "mine.py").write_text("raise SystemExit('this must not run')")
        case "code of its own for a known kind":
            config.write_text(json.dumps({"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "mine.MyModel"}}))
            (folder / "mine.py").write_text("raise SystemExit('this must not run')")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("empty folder", "no config.json"),
        ("no weights", "no weights; add model.safetensors"),
        ("only a pickle", "convert them to safetensors"),
        ("cut short", "weights of .* cannot be loaded"),
        ("cut in the header", "weights of .* cannot be loaded"),
        ("empty file", "weights of .* cannot be loaded"),
        ("garbage", "weights of .* cannot be loaded"),
        ("broken config", "config.json cannot be read"),
        ("config of nothing", "config.json cannot be read"),
        ("unknown family", "config.json cannot be read"),
        ("impossible config", "config.json cannot be read"),
        ("other shapes", "other shapes than its config.json"),
        ("a weight is missing", r"lacks 1 weights \(first: model.layers.1.mlp.up_proj.weight\)"),
        ("more layers than weights", r"lacks 9 weights"),
        ("fewer layers than weights", r"holds \d+ layer weights .* no place for"),
        ("a shard is missing", "weights of .* cannot be loaded"),
        ("not a language model", r"is an encoder \(bert\)"),
        ("an encoder and a decoder", r"is an encoder-decoder model \(t5\)"),
        ("a model of pictures", "of the kind 'vit', of which transformers has no causal language model"),
        ("code of its own", "program code of its own.*cutaway.attach"),
        ("code of its own for a known kind", "program code of its own.*cutaway.attach"),
    ],
)
def test_a_damaged_folder(folder: Path, how: str, words: str) -> None:
    damage(folder, how)
    with pytest.raises(CutawayError, match=words) as raised:
        cutaway.load(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_missing_tokenizer_leaves_ids(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    lm = cutaway.load(tmp_path)
    assert lm.tokenizer is None
    assert lm.run([5, 6]).tokens.strings == (("#5", "#6"),)
    assert lm.generate([5, 6], max_new_tokens=2).texts == ("",)
    with pytest.raises(CutawayError, match="no tokenizer, so it takes token ids"):
        lm.run("the cat")


def test_a_broken_tokenizer_is_not_passed_over(folder: Path) -> None:
    """Its files are there, so a model that only takes ids would be a surprise."""
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nothing"}}')
    assert refused(folder).startswith(f"The tokenizer of {folder} cannot be read")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"dtype": torch.int32}, "not one of"),
        ({"dtype": "nothing"}, "not one of"),
        ({"device": "gpu"}, "'gpu' is not a device"),
    ],
)
def test_a_dtype_or_device_that_is_none(saved: Path, options: dict[str, Any], words: str) -> None:
    assert words in refused(saved, **options)


def test_a_gpu_that_is_not_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "sees no GPU" in refused(saved, device="cuda:1")


SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


def _afmoe() -> AfmoeConfig:
    return AfmoeConfig(**SMALL, num_key_value_heads=2, head_dim=8, num_dense_layers=1, pad_token_id=1)


def _mamba() -> MambaConfig:
    return MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4)


def _opt_350m() -> OPTConfig:
    return OPTConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, do_layer_norm_before=False)


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "a norm in attention": (lambda: BitNetForCausalLM(BitNetConfig(**SMALL)), "attn_sub_norm"),
    "a gate in attention": (
        lambda: AfmoeForCausalLM(_afmoe()),
        r"fails \d+ of \d+ checks, the first at layer 0: attn.pattern",
    ),
    "state space": (lambda: MambaForCausalLM(_mamba()), "MambaForCausalLM is not supported"),
    "norms in the stream": (lambda: OPTForCausalLM(_opt_350m()), "do_layer_norm_before=False"),
    "encoder-decoder": (
        lambda: BartForCausalLM(BartConfig(d_model=32, vocab_size=50)),
        "BartForCausalLM is not supported",
    ),
    "encoder": (lambda: BertModel(BertConfig(**SMALL)), "BertModel is not supported"),
    "no unembedding": (lambda: LlamaModel(tiny_config("llama")), "no unembedding"),
    "any module": (lambda: torch.nn.Linear(3, 3), "not a Linear"),
    "a name": (lambda: "gpt2", "not a str; cutaway.load opens"),
    "nothing": (lambda: None, "not a NoneType"),
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("minicpm3", {}),
        ("hyperclovax", {"use_post_norm": True}),
        ("hyperclovax", {"use_post_norm": False}),
        ("cwm", {}),
    ],
)
def test_a_type_outside_the_bed_attaches_where_its_self_test_passes(kind: str, options: dict[str, Any]) -> None:
    assert kind not in TESTED
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | {"num_hidden_layers": 2, "num_key_value_heads": 4}, **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[5, 6, 7]])
    logits = attach(model).run(ids).logits
    assert logits is not None
    assert torch.equal(logits, model(ids).logits)


def test_layers_of_different_widths_are_refused() -> None:
    config = AutoConfig.for_model("gemma4_unified_text", **SMALL | {"num_hidden_layers": 2, "head_dim": 8})
    with pytest.raises(CutawayError, match="its layers differ in head_dim"):
        attach(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("what", list(MISFITS))
def test_a_model_that_does_not_fit_is_refused_with_the_reason(what: str) -> None:
    make, words = MISFITS[what]
    with pytest.raises(CutawayError, match=words) as raised:
        attach(make())
    assert "\n" not in str(raised.value)


def test_weights_on_the_meta_device_are_refused() -> None:
    with pytest.raises(CutawayError, match="meta device"):
        attach(tiny_model("llama").to("meta"))  # type: ignore[arg-type]

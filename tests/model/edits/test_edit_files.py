"""Edits and runs on disk: bit for bit there and back, one digest everywhere, and nothing believed that is damaged."""

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_latent import one_latent
from safetensors.torch import load_file, save_file
from test_edit_kinds import SITE, Z, batch, cases, small
from tiny import D, random_rows, tiny_model
from torch import Tensor

import cutaway
from cutaway.artifacts.errors import CutawayError
from cutaway.model.edits.edit import KINDS, Edit
from cutaway.model.language_model import LanguageModel, attach


@cutaway.register_edit_function("halved in tests")
def halved(x: Tensor) -> Tensor:
    return x / 2


def there_and_back(folder: Path, *edits: Edit) -> tuple[Edit, ...]:
    return cutaway.load_edits(cutaway.save_edits(folder, list(edits)))


def one_of_each() -> list[Edit]:
    lm, d = small(), torch.linspace(-1, 1, D)
    source = lm.run(batch(), capture=["blocks.*.resid_post", "blocks.1.attn.pattern"])
    named = cutaway.at_token([5, 6], "all", missing="skip")
    mask = torch.zeros(3, 11, dtype=torch.bool)
    mask[0, 4:6] = mask[2, 9] = True
    return [
        cutaway.set(SITE, 0.1 + 0.2, positions=[[0], [1, -1], []], rows=[2, 0, 1]),
        cutaway.zero(Z, heads=[3, 0], phase="prompt", positions=slice(1, None, 2)),
        cutaway.mean(SITE, d, positions=named),
        cutaway.patch("blocks.*.resid_post", source, positions=[0, -1], phase="prompt"),
        cutaway.patch("blocks.1.attn.pattern", source, positions=-1, heads=2, source_rows=[1, 1, 1]),
        cutaway.patch(SITE, torch.randn(3, 11, D), source_positions=slice(0, 2), positions=[1, 2]),
        cutaway.resample(SITE, source, positions={0: 3, 2: 3}, rows=0, other_model=True),
        cutaway.resample(SITE, source, seed=[1, 2, 2**62]),
        cutaway.add("blocks.{0..2}.mlp.out", d, 1 / 3, phase=(2, 5)),
        cutaway.noise("blocks.0.mlp.post", 1e-30, seed=5, neurons=[1, 39], phase="new", positions=[0, 4]),
        cutaway.scale(SITE, -0.0, positions=mask),
        cutaway.project_out(SITE, d, positions=0),
        cutaway.clamp(SITE, d, minimum=-1e30),
        cutaway.clamp_latent(one_latent(SITE, d, -0.3, 2 * d, d / 3, 0.25), 0, 2),
        cutaway.function(SITE, halved).within(torch.randn(2, D, dtype=torch.float64)),
    ]


def test_every_kind_comes_back_as_it_was(tmp_path: Path) -> None:
    edits = one_of_each()
    assert {edit.kind for edit in edits} == {*KINDS}
    back = there_and_back(tmp_path / "edits", *edits)
    assert sorted(p.name for p in (tmp_path / "edits").iterdir()) == ["edits.json", "edits.safetensors"]
    assert back == tuple(edits)
    assert [hash(e) for e in back] == [hash(e) for e in edits]
    assert [str(e) for e in back] == [str(e) for e in edits]
    for one, other in zip(edits, back, strict=True):
        assert one.digest() == other.digest()
        assert {k: (v, str(v)) for k, v in one.numbers.items()} == {k: (v, str(v)) for k, v in other.numbers.items()}
        for name, tensor in one.tensors.items():
            assert other.tensors[name].dtype == tensor.dtype
            assert torch.equal(other.tensors[name][None].view(torch.uint8), tensor[None].view(torch.uint8))
    assert len({*edits, *back}) == len(edits)
    assert there_and_back(tmp_path / "again", *back) == back
    for name in ("edits.json", "edits.safetensors"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("edits", "again"))
        assert first == second, "what is loaded is saved to the same bytes"


@settings(max_examples=60)
@given(cases())
def test_a_random_edit_does_the_same_after_loading(tmp_path_factory: pytest.TempPathFactory, drawn: Any) -> None:
    case, tokens, site = drawn
    edit = case.edit
    if edit.kind == "function":
        with pytest.raises(CutawayError, match="register_edit_function"):
            cutaway.save_edits(tmp_path_factory.mktemp("never") / "edits", edit)
        return
    (back,) = there_and_back(tmp_path_factory.mktemp("edits"), edit)
    assert back == edit
    one, other = (small().run(tokens, edits=e, capture=site) for e in (edit, back))
    assert torch.equal(one[site], other[site])
    assert one.receipts == other.receipts


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "uint8"])
def test_values_keep_their_bits(tmp_path: Path, dtype: str) -> None:
    value = (torch.randn(3, D, dtype=torch.float64) * 50).abs().to(getattr(torch, dtype))
    (back,) = there_and_back(tmp_path, cutaway.set(SITE, value.T.contiguous().T, positions=[0, 1, 2]))
    assert back.tensors["value"].dtype == value.dtype
    assert torch.equal(back.tensors["value"], value)
    negative = torch.tensor([-0.0, 1.0] * 16)
    assert cutaway.set(SITE, negative) != cutaway.set(SITE, negative.abs() * torch.tensor([0.0, 1.0] * 16))


def test_a_patch_keeps_only_what_it_needs_and_where_it_came_from(tmp_path: Path) -> None:
    lm = small()
    source = lm.run(batch((11, 7, 4)), capture=["blocks.*.resid_post", "embed"])
    edit = cutaway.patch(SITE, source, positions=[1, -1], rows=[0, 2], source_rows=[2, 2])
    (back,) = there_and_back(tmp_path, edit)
    values = load_file(tmp_path / "edits.safetensors")
    assert sorted(tuple(t.shape) for t in values.values()) == [(1, 2, D), (3, 11), (3, 11)]
    assert back.source is not None
    assert back.source.identity() == lm.identity()
    assert torch.equal(back.source.tokens.ids, source.tokens.ids)
    one, other = (lm.run(batch((9, 5, 6), seed=9), edits=e) for e in (edit, back))
    assert torch.equal(one.logits, other.logits)  # type: ignore[arg-type]
    stranger = attach(tiny_model("llama", seed=3), name="stranger")
    with pytest.raises(CutawayError, match="run of another model"):
        stranger.run(batch((9, 5, 6), seed=9), edits=back)
    own = stranger.run(source.tokens, capture=SITE)
    assert edit != cutaway.patch(SITE, own, positions=[1, -1], rows=[0, 2], source_rows=[2, 2])


def test_edits_are_equal_by_what_they_do() -> None:
    d = torch.linspace(0, 1, D)
    assert cutaway.add(SITE, d) == cutaway.add(SITE, d.clone(), 1)
    assert cutaway.zero(SITE, positions=[0, 1]) == cutaway.zero(SITE, positions=torch.tensor([0, 1]))
    different = [
        cutaway.add(SITE, d),
        cutaway.add(SITE, d.double()),
        cutaway.add(SITE, d, 2),
        cutaway.add(Z, d),
        cutaway.add(SITE, d, positions=0),
        cutaway.add(SITE, d, positions=[0]),
        cutaway.add(SITE, d, rows=0),
        cutaway.add(SITE, d, phase="new"),
        cutaway.add(SITE, d.reshape(1, D)),
        cutaway.set(SITE, d),
    ]
    assert len({*different}) == len(different)
    assert len({e.digest() for e in different}) == len(different)
    unnamed = lambda x: x  # noqa: E731
    assert cutaway.function(SITE, unnamed) == cutaway.function(SITE, unnamed)
    assert cutaway.function(SITE, unnamed) != cutaway.function(SITE, lambda x: x)
    assert cutaway.function(SITE, halved) == cutaway.function(SITE, "halved in tests")
    assert cutaway.zero(SITE) != "zero"


def test_a_digest_is_the_same_in_every_process() -> None:
    """Also the wire format's: a change of it would orphan what has been saved."""
    code = (
        "import torch, cutaway; e = cutaway.add('blocks.1.resid_post', torch.arange(4.0), 0.1, positions=[0, -1]); "
        "print(e.digest())"
    )
    made = cutaway.add(SITE, torch.arange(4.0), 0.1, positions=[0, -1]).digest()
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == made == "f0fa17022933c4cd4eec469a0f145b37c11f049ae27de4d75a449cbd57b7ca1d"


def test_functions_are_saved_by_name_alone(tmp_path: Path) -> None:
    with pytest.raises(CutawayError, match="register_edit_function"):
        cutaway.save_edits(tmp_path / "none", [cutaway.zero(SITE), cutaway.function(SITE, lambda x: x)])
    assert not (tmp_path / "none").exists()
    with pytest.raises(CutawayError, match="already an edit function"):
        cutaway.register_edit_function("halved in tests")(torch.relu)
    cutaway.save_edits(tmp_path, cutaway.function(SITE, halved))
    text = (tmp_path / "edits.json").read_text()
    (tmp_path / "edits.json").write_text(text.replace("halved in tests", "os.system"))
    with pytest.raises(CutawayError, match=r"registered as 'os\.system'"):
        cutaway.load_edits(tmp_path)


# What is damaged


def _change(folder: Path, **changes: Any) -> None:
    file = folder / "edits.json"
    data = json.loads(file.read_text())
    for path, value in changes.items():
        at, *parts = data, *path.split("__")
        for part in parts[:-1]:
            at = at[int(part) if part.isdigit() else part]
        at[parts[-1]] = value
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "no edits of cutaway"),
        ({"edits__0__kind": "explode"}, "unknown kind, 'explode'"),
        ({"edits__0__site": 3}, r"edits.0.site"),
        ({"edits__0__surprise": 3}, r"edits.0.surprise"),
        ({"edits__0__positions": "1"}, "damaged at edits.0.positions"),
        ({"edits__0__positions": {"mask": 3}}, "damaged at edits.0.positions"),
        ({"edits__0__positions": {"shape": [1, 2], "columns": [[5]]}}, "outside its own shape"),
        ({"edits__0__phase": [3, 1]}, "phase"),
        ({"edits__0__numbers": {}}, "lacks its scale"),
        ({"edits__0__numbers": {"scale": None}}, "numbers.scale"),
        ({"edits__0__tensors": {}}, "lacks its direction"),
        ({"edits__0__tensors__direction__hash": "0" * 64}, "no pair"),
        ({"edits__0__tensors__direction__shape": [4, 8]}, "shape"),
        ({"edits__1__kind": "zero"}, "has no source"),
        ({"edits__1__source": None}, "lacks its source"),
        ({"edits__1__source__rows": [0, 1]}, "do not fit"),
        ({"edits__1__source__columns": [99]}, "do not fit"),
        ({"edits__1__source__model": None}, "names no model"),
        ({"edits__1__function": "halved in tests", "edits__1__other_model": 3}, "other_model"),
        ({"edits": 3}, "damaged at edits"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    source = small().run([5, 6, 7], capture=SITE)
    cutaway.save_edits(tmp_path, [cutaway.add(SITE, torch.ones(D)), cutaway.patch(SITE, source, positions=1)])
    _change(tmp_path, **changes)
    with pytest.raises(CutawayError, match=words) as raised:
        cutaway.load_edits(tmp_path)
    assert "edits.json" in str(raised.value) or "edits.safetensors" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_values_that_are_not_those_written_are_refused(tmp_path: Path) -> None:
    cutaway.save_edits(tmp_path, cutaway.add(SITE, torch.ones(D)))
    file = tmp_path / "edits.safetensors"
    (name,) = load_file(file)
    save_file({name: torch.full((D,), 2.0)}, file)
    with pytest.raises(CutawayError, match="not those that were written"):
        cutaway.load_edits(tmp_path)
    save_file({name: torch.ones(D, dtype=torch.float64)}, file)
    with pytest.raises(CutawayError, match="not those that were written"):
        cutaway.load_edits(tmp_path)
    file.write_bytes(b"nonsense")
    with pytest.raises(CutawayError, match="no safetensors"):
        cutaway.load_edits(tmp_path)
    file.unlink()
    with pytest.raises(CutawayError, match="does not exist"):
        cutaway.load_edits(tmp_path)
    with pytest.raises(CutawayError, match="does not exist"):
        cutaway.load_edits(tmp_path / "nowhere")
    (tmp_path / "edits.json").write_text("[")
    with pytest.raises(CutawayError, match="not JSON"):
        cutaway.load_edits(tmp_path)
    with pytest.raises(CutawayError, match="is none"):
        cutaway.save_edits(tmp_path, ["zero"])  # type: ignore[list-item]


# Runs


def test_a_run_comes_back_whole(tmp_path: Path) -> None:
    lm = small()
    tokens = batch((6, 4))
    source = lm.run(random_rows((6, 6), seed=3), capture=SITE)
    edits = [cutaway.patch(SITE, source, positions=[0, 1]), cutaway.noise(Z, 0.1, heads=1, neurons=[0, 2])]
    capture = ["blocks.*.resid_post", "blocks.1.attn.scores", "logits"]
    run = lm.run(tokens, capture=capture, edits=edits, grad=lambda logits: logits[:, -1, 3], logits="last")
    back = cutaway.load_run(run.save(tmp_path / "run"))
    assert back.sites == run.sites
    for site in run.sites:
        assert torch.equal(back[site], run[site])
        assert torch.equal(back.grads[site], run.grads[site])
    assert torch.equal(back.logits, run.logits)  # type: ignore[arg-type]
    assert torch.equal(back.tokens.ids, tokens.ids)
    assert torch.equal(back.tokens.mask, tokens.mask)
    assert back.tokens.strings == tokens.strings
    assert (back.receipts, back.edits, back.model) == (run.receipts, run.edits, run.model)
    assert back.identity() == lm.identity()
    assert back.manifest is not None
    assert back.manifest.configuration["edits"] == [e.digest() for e in edits]
    assert torch.equal(back.stack("blocks.*.resid_post"), run.stack("blocks.*.resid_post"))
    assert torch.equal(back["blocks.1.hook_resid_post"], run[SITE])
    assert torch.equal(back.last("blocks.1.attn.scores"), run.last("blocks.1.attn.scores"))
    with pytest.raises(CutawayError, match="did not capture"):
        back["blocks.1.mlp.out"]
    with pytest.raises(CutawayError, match="no site"):
        back["blocks.1.nothing"]
    again = lm.run(tokens, capture=capture, edits=back.edits, logits="last")
    assert torch.equal(again.logits, run.logits)  # type: ignore[arg-type]
    repr(back)


def test_a_loaded_run_is_a_source_of_patches(llama: LanguageModel, tmp_path: Path) -> None:
    run = llama.run([5, 6, 7], capture=SITE)
    loaded = cutaway.load_run(run.save(tmp_path))
    edits = [cutaway.patch(SITE, source) for source in (run, loaded)]
    assert edits[0] == edits[1]
    one, other = (llama.run([8, 9, 10], edits=edit).logits for edit in edits)
    assert torch.equal(one, other)  # type: ignore[arg-type]


def test_every_flipped_bit_of_a_saved_run_is_noticed(llama: LanguageModel, tmp_path: Path) -> None:
    edit = cutaway.scale("blocks.0.mlp.out", 0.5)
    folder = llama.run([5, 6, 7], capture=SITE, edits=edit).save(tmp_path / "run")
    draw = random.Random(0)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for _ in range(30):
            place = draw.randrange(len(whole))
            flipped = bytearray(whole)
            flipped[place] ^= 1 << draw.randrange(8)
            file.write_bytes(flipped)
            with contextlib.suppress(CutawayError):
                back = cutaway.load_run(folder)
                # JSON may be written in several ways: what it says is what counts
                assert file.suffix == ".json"
                assert json.loads(flipped) == json.loads(whole), (file.name, place, back)
        file.write_bytes(whole)
    assert cutaway.load_run(folder).edits == (edit,)


def test_a_damaged_run_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(CutawayError, match="does not exist"):
        cutaway.load_run(tmp_path)
    folder = llama.run([5, 6, 7], capture=SITE).save(tmp_path / "run")
    file, values = folder / "run.json", folder / "run.safetensors"
    whole, tensors = json.loads(file.read_text()), load_file(values)
    damages: list[tuple[dict[str, Any], str]] = [
        ({"format": "x"}, "no run"),
        ({"version": 1}, "version 1"),
        ({"model": "another"}, "changed after it was written"),
        ({"n_layers": "two"}, "damaged"),
        ({"manifest": whole["manifest"] | {"configuration": {}}}, "changed after"),
        ({"manifest": {}}, "damaged"),
        ({"tokens": []}, "tokens"),
        ({"sites": [whole["sites"][0] | {"shape": ["b", "p", 31]}]}, "has the shape"),
        ({"sites": [whole["sites"][0] | {"name": "blocks.0.resid_post"}]}, "lacks 'value:blocks.0.resid_post'"),
    ]
    for change, words in damages:
        file.write_text(json.dumps(whole | change))
        with pytest.raises(CutawayError, match=words):
            cutaway.load_run(folder)
    file.write_text(json.dumps(whole))
    assert cutaway.load_run(folder).sites == (SITE,)
    values.write_bytes(values.read_bytes()[:100])
    with pytest.raises(CutawayError, match="damaged"):
        cutaway.load_run(folder)
    save_file(tensors, values)
    with pytest.raises(CutawayError, match="register_edit_function"):
        llama.run([5, 6], edits=cutaway.function(SITE, lambda x: x)).save(tmp_path / "function")
    assert not (tmp_path / "function").exists()


@settings(max_examples=30)
@given(st.integers(-(2**63), 2**63 - 1), st.floats(-3e38, 3e38))
def test_numbers_keep_their_bits(tmp_path_factory: pytest.TempPathFactory, seed: int, factor: float) -> None:
    edits = (cutaway.scale(SITE, factor), cutaway.noise(SITE, abs(factor), seed=seed))
    back = there_and_back(tmp_path_factory.mktemp("edits"), *edits)
    assert back == edits
    assert back[0].numbers["factor"].hex() == factor.hex()
    assert back[1].seed == (seed,)

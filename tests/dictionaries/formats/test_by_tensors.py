"""Dictionaries without settings: their tensors' names and shapes, or the user, say what is what."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.cli.main import main
from cutaway.dictionaries import load, save
from cutaway.dictionaries.dictionary import BatchTopK, Dictionary, Gated, JumpReLU, ReLU, TopK
from cutaway.dictionaries.formats.files import load_all, read

D, F = 6, 10


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


ENC, B_ENC, DEC, B_DEC, THETA = draw(D, F), draw(F), draw(F, D), draw(D), draw(F, seed=3).abs()
X = draw(20, D, seed=9)


def topk(h: Tensor, k: int) -> Tensor:
    return torch.zeros_like(h).scatter(-1, h.topk(k).indices, h.topk(k).values.relu())


PLAIN = (X @ ENC + B_ENC).relu() @ DEC + B_DEC
CENTRED = ((X - B_DEC) @ ENC + B_ENC).relu() @ DEC + B_DEC
PRE = X @ ENC + B_ENC


@pytest.mark.parametrize(
    ("tensors", "kind", "wanted"),
    [
        ({"W_enc": ENC, "b_enc": B_ENC, "W_dec": DEC, "b_dec": B_DEC}, ReLU, CENTRED),
        ({"sae.W_enc": ENC.T, "sae.b_enc": B_ENC, "sae.W_dec": DEC.T, "sae.b_dec": B_DEC}, ReLU, CENTRED),
        (
            {"encoder.weight": ENC.T, "encoder.bias": B_ENC, "decoder.weight": DEC.T, "decoder.bias": B_DEC},
            ReLU,
            PLAIN,
        ),
        ({"encoder.weight": ENC.T, "decoder.weight": DEC.T}, ReLU, (X @ ENC).relu() @ DEC),
        (
            {"W_enc": ENC, "b_enc": B_ENC, "W_dec": DEC, "b_dec": B_DEC, "threshold": THETA},
            JumpReLU,
            (PRE * (PRE > THETA)) @ DEC + B_DEC,
        ),
        (
            {"W_enc": ENC, "b_enc": B_ENC, "W_dec": DEC, "b_dec": B_DEC, "log_threshold": THETA.log()},
            JumpReLU,
            (PRE * (PRE > THETA)) @ DEC + B_DEC,
        ),
        (
            {"W_enc": ENC, "b_enc": B_ENC, "W_dec": DEC, "b_dec": B_DEC, "k": torch.tensor(3)},
            TopK,
            topk((X - B_DEC) @ ENC + B_ENC, 3) @ DEC + B_DEC,
        ),
        (
            {"W_enc": ENC, "b_enc": B_ENC, "W_dec": DEC, "b_dec": B_DEC, "k": torch.tensor(3), "threshold": THETA[0]},
            BatchTopK,
            (lambda h: (h * (h > THETA[0])).relu())((X - B_DEC) @ ENC + B_ENC) @ DEC + B_DEC,
        ),
        (
            {"W_enc": ENC, "b_gate": B_ENC, "r_mag": THETA, "b_mag": draw(F, seed=5), "W_dec": DEC},
            Gated,
            ((X @ ENC + B_ENC > 0) * ((X @ ENC) * THETA.exp() + draw(F, seed=5)).relu()) @ DEC,
        ),
        ({"enc_w": ENC, "enc_b": B_ENC, "dec_w": DEC}, ReLU, (X @ ENC + B_ENC).relu() @ DEC),
    ],
)
def test_names_and_shapes_say_what_is_what(
    tensors: dict[str, Tensor], kind: type[Any], wanted: Tensor, tmp_path: Path
) -> None:
    """The forward of each, written out; in a file, alone in a folder, and inside an archive's state_dict."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "weights.safetensors")
    (tmp_path / "notes.txt").write_text("trained on a Tuesday")
    archive = tmp_path / "archive" / "last.pt"
    archive.parent.mkdir()
    torch.save({"step": 3, "state_dict": tensors}, archive)
    for where in (tmp_path / "weights.safetensors", tmp_path, archive):
        dictionary = load(where, site="blocks.0.resid_post")
        assert isinstance(dictionary.selector, kind)
        assert dictionary.site == "blocks.0.resid_post"
        torch.testing.assert_close(dictionary(X), wanted, rtol=1e-4, atol=1e-5)


def test_what_had_to_be_assumed_is_said(tmp_path: Path) -> None:
    save_file({"W_enc": ENC, "b_enc": B_ENC, "W_dec": DEC, "b_dec": B_DEC}, tmp_path / "a.safetensors")
    notes = " / ".join(read(tmp_path).notes)
    assert "read as relu (k=32 in --map makes it topk)" in notes
    assert "b_dec is taken to be subtracted from the input, which no tensor says" in notes
    assert "nothing says which site" in notes
    square = draw(D, D, seed=4)
    save_file({"encoder.weight": square, "W_dec": draw(D, D)}, tmp_path / "a.safetensors")
    torch.testing.assert_close(load(tmp_path).W_enc, square.T)
    torch.testing.assert_close(load(tmp_path).W_dec, draw(D, D))
    assert "encoder.weight is square, and taken as [out, in]" in " / ".join(read(tmp_path).notes)


def test_settings_that_were_lost(tmp_path: Path) -> None:
    """What `save` wrote, without its cfg.json: the weights alone are enough, but for sparsify's k."""
    dictionary = Dictionary(ENC, B_ENC, DEC, B_DEC, JumpReLU(THETA), "blocks.1.mlp.out", subtract_b_dec=False)
    save(dictionary, tmp_path / "ours")
    (tmp_path / "ours" / "cfg.json").unlink()
    torch.testing.assert_close(load(tmp_path / "ours")(X), dictionary(X))
    top = Dictionary(ENC, B_ENC, DEC, B_DEC, TopK(3), "blocks.1.mlp.out")
    save(top, tmp_path / "theirs", "sparsify")
    (tmp_path / "theirs" / "cfg.json").unlink()
    with pytest.raises(CutawayError, match=r"sparsify's tensors, whose k stands in its cfg\.json"):
        load(tmp_path / "theirs")
    torch.testing.assert_close(load(tmp_path / "theirs", names={"k": "3"})(X), top(X), rtol=1e-4, atol=1e-5)


def test_a_map_for_unknown_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"alpha": ENC.T.contiguous(), "beta": B_ENC, "gamma": DEC.T.contiguous(), "delta": B_DEC, "odd": draw(7)}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(CutawayError, match=r"--map W_enc=NAME,W_dec=NAME,\.\.\. says which tensor is which"):
        load(tmp_path)
    names = {"W_enc": "alpha", "b_enc": "beta", "W_dec": "gamma", "b_dec": "delta"}
    torch.testing.assert_close(load(tmp_path, names=names)(X), CENTRED, rtol=1e-4, atol=1e-5)
    off = load(tmp_path, names={**names, "subtract_b_dec": "false"})
    torch.testing.assert_close(off(X), PLAIN, rtol=1e-4, atol=1e-5)
    assert list(load_all(tmp_path, names)) == [tmp_path.name]

    text = ",".join(f"{role}={name}" for role, name in names.items())
    assert main(["dictionary", "inspect", str(tmp_path), "--map", f"{text},k=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    assert (found["d_in"], found["d_sae"], found["selector"]) == (D, F, "topk k=4")
    assert {one["name"] for one in found["tensors"]} == {*tensors}
    out = tmp_path / "out"
    words = ["dictionary", "convert", str(tmp_path / "w.safetensors"), str(out), "--map", text, "--site", "embed"]
    assert main(words) == 0
    torch.testing.assert_close(load(out)(X), CENTRED, rtol=1e-4, atol=1e-5)
    capsys.readouterr()

    for text, says in [
        ("W_enc", "write ROLE=NAME"),
        ("W_in=alpha", "roles are W_enc, b_enc"),
        ("W_enc=alpha,W_enc=beta", "names W_enc twice"),
        ("W_enc=alpha", "no tensor that is known to be W_dec; say which is which with --map"),
        ("W_enc=alpha,W_dec=nobody", "has no tensor 'nobody' to be W_dec; it holds alpha [10, 6]"),
        ("W_enc=alpha,W_dec=beta", "beta is [10], which W_dec cannot be"),
        ("W_enc=alpha,W_dec=gamma,b_enc=odd", "do not fit together"),
        ("W_enc=alpha,W_dec=gamma,k=many", "no tensor of that name, and it is no number"),
        ("W_enc=alpha,W_dec=gamma,b_dec=delta,subtract_b_dec=perhaps", "it is true or false"),
    ]:
        assert main(["dictionary", "inspect", str(tmp_path / "w.safetensors"), "--map", text]) == 2
        said = capsys.readouterr().err
        assert says in said, said
        assert said.count("\n") == 1


def test_other_files_stay_refused(tmp_path: Path) -> None:
    save_file({"weight": ENC}, tmp_path / "a.safetensors")
    with pytest.raises(CutawayError, match="holds no dictionary: looked for"):
        load(tmp_path)
    save_file({"W_enc": ENC, "W_dec": draw(F + 1, D + 1)}, tmp_path / "a.safetensors")
    with pytest.raises(CutawayError, match="do not fit together as an encoder and a decoder"):
        load(tmp_path)
    save_file({"W_enc": ENC, "W_dec": DEC, "b_enc": B_ENC}, tmp_path / "b.safetensors")
    with pytest.raises(CutawayError, match="holds no dictionary: looked for"):  # which of the two?
        load(tmp_path)

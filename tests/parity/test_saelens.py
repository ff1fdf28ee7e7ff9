"""What we save is what SAELens loads: equal activations, equal reconstructions; and the other way round."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cutaway.dictionaries.config import TrainConfig
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats.files import load, save
from cutaway.dictionaries.jobs import Job, train_jobs
from cutaway.dictionaries.rules import TopKRule
from cutaway.dictionaries.sources import Tensors

LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
folder, source, target = sys.argv[1:]
sae = SAE.load_from_disk(folder)
assert sae.cfg.architecture() == "topk", sae.cfg.architecture()
assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post", sae.cfg.metadata.hook_name
x = load_file(source)["x"]
with torch.no_grad():
    a = sae.encode(x)
    a = a.to_dense() if a.is_sparse else a
    save_file({"a": a.contiguous(), "y": sae.decode(sae.encode(x)).contiguous()}, target)
"""

SAVE = """
import sys, torch
from safetensors.torch import load_file, save_file
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
folder, source, target = sys.argv[1:]
torch.manual_seed(0)
cfg = TopKSAEConfig(d_in=32, d_sae=128, k=6, rescale_acts_by_decoder_norm=True, normalize_activations="none")
sae = TopKSAE(cfg)
with torch.no_grad():
    for parameter in sae.parameters():
        parameter.copy_(torch.randn_like(parameter))
    x = load_file(source)["x"]
    a = sae.encode(x)
    a = a.to_dense() if a.is_sparse else a
    save_file({"a": a.contiguous(), "y": sae.decode(sae.encode(x)).contiguous()}, target)
sae.save_model(folder)
"""


def in_peer(python: Path, code: str, *arguments: Path) -> None:
    done = subprocess.run(
        [python, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4_000:]


def trained(x: torch.Tensor) -> Dictionary:
    config = TrainConfig(selector=TopKRule(6), d_sae=128, tokens=100 * 64, batch=64, warmup=10)
    site = "blocks.3.resid_post"
    return train_jobs(Tensors({site: x}), {"": Job(config, (site,))})[""].dictionary


def assert_equal(dictionary: Dictionary, x: torch.Tensor, theirs: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the largest value; a tie at the k-th place, which rounding decides, may differ in that latent."""
    for ours, name in ((dictionary.encode(x), "a"), (dictionary(x), "y")):
        error = (ours - theirs[name]).abs().max() / theirs[name].abs().max()
        assert error <= 1e-5, (name, error.item())


def test_saelens_loads_what_we_save(tmp_path: Path, peer: Callable[[str], Path]) -> None:
    python = peer("saelens")
    x = 5 * torch.randn(1_024, 32, generator=torch.Generator().manual_seed(0)) + 3
    dictionary = trained(x)
    folder = save(dictionary, tmp_path / "dictionary")
    save_file({"x": x}, tmp_path / "x.safetensors")
    in_peer(python, LOAD, folder, tmp_path / "x.safetensors", tmp_path / "out.safetensors")
    assert_equal(dictionary, x, load_file(tmp_path / "out.safetensors"))


def test_we_load_what_saelens_saves(tmp_path: Path, peer: Callable[[str], Path]) -> None:
    """Theirs selects by activations rescaled with decoder norms; loading folds that away."""
    python = peer("saelens")
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    save_file({"x": x}, tmp_path / "x.safetensors")
    in_peer(python, SAVE, tmp_path / "theirs", tmp_path / "x.safetensors", tmp_path / "out.safetensors")
    assert_equal(load(tmp_path / "theirs"), x, load_file(tmp_path / "out.safetensors"))

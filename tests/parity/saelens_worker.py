"""SAELens at work in its own environment: it makes dictionaries and says what they compute, or reads ours.

    .venvs/saelens/bin/python tests/parity/saelens_worker.py make FOLDER
    .venvs/saelens/bin/python tests/parity/saelens_worker.py read FOLDER
    .venvs/saelens/bin/python tests/parity/saelens_worker.py convert FOLDER

`make` writes FOLDER/CASE/… with SAELens' own code and FOLDER/CASE.safetensors with x, its activations a and what it
writes, y. `read` takes each FOLDER/CASE/… and the x of FOLDER/CASE.x.safetensors, and writes FOLDER/CASE.safetensors.
`convert` does the same with SAELens' importers of other formats: FOLDER/convert.json says for each case which one, and
where below FOLDER the repository lies that it believes to download from.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D, OUT, F, N = 24, 20, 96, 64
HOOK = "blocks.3.hook_resid_post"


def inputs(n: int = N, seed: int = 0) -> Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1


def randomise(module: torch.nn.Module) -> None:
    """Every weight of its own, thresholds positive, so that a mistaken fold shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if name == "threshold":
                value = 2 * value.abs()
            elif name == "r_mag":
                value = 0.3 * value
            elif name == "W_dec":
                value = value * (0.5 + torch.rand(len(value), 1, generator=generator))
            elif name == "W_enc":
                value = value / D**0.5
            parameter.copy_(value.to(parameter))


def computed(sae: Any, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        a = sae.encode(x)
        a = a.to_dense() if a.is_sparse else a
        y = sae(x)
    return {"x": x.reshape(len(x), -1), "a": a.float(), "y": y.reshape(len(x), -1).float()}


def inference() -> Iterator[tuple[str, Any, Tensor]]:
    """(case, dictionary, x) of every architecture that can be read, and of every normalisation."""
    from sae_lens.registry import get_sae_class  # pyright: ignore[reportMissingImports]

    plain: dict[str, dict[str, Any]] = {
        "standard": {},
        "gated": {},
        "jumprelu": {},
        "topk": {"k": 7},
        "transcoder": {"d_out": OUT},
        "skip_transcoder": {"d_out": OUT},
        "jumprelu_transcoder": {"d_out": OUT},
        "jumprelu_skip_transcoder": {"d_out": OUT},
    }
    norms = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")

    def build(architecture: str, **more: Any) -> Any:
        cls, config = get_sae_class(architecture)
        hook = more.pop("hook", HOOK)
        if "transcoder" in architecture:
            more["apply_b_dec_to_input"] = False
        cfg = config(d_in=D, d_sae=F, **plain[architecture], **more)
        cfg.metadata.hook_name = hook
        cfg.metadata.model_name = "gpt2"
        if "transcoder" in architecture:
            cfg.metadata.hook_name = "blocks.3.ln2.hook_normalized"
            cfg.metadata.hook_name_out = "blocks.3.hook_mlp_out"
        sae = cls(cfg)
        randomise(sae)
        return sae

    for architecture in plain:
        for norm in norms:
            yield f"{architecture}-{norm}", build(architecture, normalize_activations=norm), inputs()
    for architecture in ("standard", "gated", "jumprelu", "topk"):
        yield f"{architecture}-no-b_dec", build(architecture, apply_b_dec_to_input=False), inputs()
    yield "topk-rescale", build("topk", rescale_acts_by_decoder_norm=True), inputs()
    yield (
        "topk-rescale-layer_norm",
        build("topk", rescale_acts_by_decoder_norm=True, normalize_activations="layer_norm"),
        inputs(),
    )
    heads = inputs().view(N, 4, D // 4)
    for architecture in ("standard", "jumprelu"):
        sae = build(architecture, reshape_activations="hook_z", hook="blocks.3.attn.hook_z")
        yield f"{architecture}-hook_z", sae, heads


def trained() -> Iterator[tuple[str, dict[str, Tensor], Callable[[Path], Any]]]:
    """(case, what it computes, what saves it): after a few of the trainer's steps, in the three ways of saving.

    "midway" is a checkpoint with the trainer's state, its scale or whitening not yet folded in; "checkpoint" the
    training dictionary after the end, "finished" what is for use.
    """
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.registry import get_sae_training_class  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    def data() -> Iterator[Tensor]:
        number = 0
        while True:
            number += 1
            yield inputs(128, seed=number)

    kinds: dict[str, dict[str, Any]] = {
        "standard": {},
        "gated": {},
        "jumprelu": {"jumprelu_init_threshold": 0.3},
        "topk": {"k": 7},
        "batchtopk": {"k": 7},
        "matryoshka_batchtopk": {"k": 7, "matryoshka_widths": [16, 48, F]},
    }
    for name, settings in kinds.items():
        for norm in ("none", "expected_average_only_in", "covariance_whitening"):
            torch.manual_seed(2)
            cls, config = get_sae_training_class(name)
            cfg = config(d_in=D, d_sae=F, normalize_activations=norm, **settings)
            cfg.metadata.hook_name, cfg.metadata.model_name = HOOK, "gpt2"
            sae = cls(cfg)
            steps = SAETrainerConfig(
                total_training_samples=40 * 128, train_batch_size_samples=128, lr=3e-3, lr_end=3e-3
            )
            trainer, batches = SAETrainer(steps, sae, data_provider=data()), data()
            scaler = trainer.activation_scaler
            if norm == "expected_average_only_in":
                scaler.estimate_scaling_factor(d_in=D, data_provider=batches, n_batches_for_norm_estimate=4)
            elif norm == "covariance_whitening":
                scaler.estimate_whitening(d_in=D, data_provider=batches, n_batches_for_norm_estimate=4)
            for _ in range(40):
                trainer.step(next(batches))
                trainer.n_training_steps += 1
            if norm != "none":
                with tempfile.TemporaryDirectory() as written:
                    trainer.save_checkpoint("midway", written)
                    yield (
                        f"trained-{name}-{norm}-midway",
                        as_trained(sae, scaler),
                        partial(copytree, f"{written}/midway"),
                    )
                if scaler.scaling_factor is not None:
                    sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
                elif scaler.whitening is not None:
                    found = scaler.whitening
                    sae.fold_activation_whitening(found.mean, found.matrix, found.inverse_matrix)
            with tempfile.TemporaryDirectory() as written:  # what SAELens itself makes of it for use
                sae.save_inference_model(written)
                finished = computed(SAE.load_from_disk(written), inputs())
            yield f"trained-{name}-{norm}-checkpoint", finished, sae.save_model
            yield f"trained-{name}-{norm}-finished", finished, sae.save_inference_model


def as_trained(sae: Any, scaler: Any) -> dict[str, Tensor]:
    """What a checkpoint computes that has its scale or whitening beside it: of SAELens' own parts, with nothing folded.

    BatchTopK's threshold is applied, and activations are scaled by decoder norms, as when it is finished.
    """
    x = inputs()
    with torch.no_grad():
        z = scaler(x)
        a, hidden = sae.encode_with_hidden_pre(z)
        if hasattr(sae, "topk_threshold"):
            a = hidden.relu() * (hidden > sae.topk_threshold)
        y = scaler.unscale(sae.decode(a))
        if scaler.scaling_factor is not None and getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            a = a / scaler.scaling_factor  # finished, its decoder is of norm 1 in the model's own units, not in these
        return {"x": x, "a": a, "y": y}


def version_five() -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """(case, cfg, tensors) as SAELens 5 wrote them, with the flat configuration of that time."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "W_enc": torch.randn(D, F, generator=generator) / D**0.5,
        "b_enc": torch.randn(F, generator=generator),
        "W_dec": torch.randn(F, D, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
    }
    cfg: dict[str, Any] = {
        "architecture": "standard", "d_in": D, "d_sae": F, "activation_fn_str": "relu", "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "context_size": 128, "model_name": "gpt2",
        "hook_name": HOOK, "hook_layer": 3, "hook_head_index": None, "prepend_bos": True, "dataset_path": "some/texts",
        "dataset_trust_remote_code": True, "normalize_activations": "none", "dtype": "float32", "device": "cpu",
        "sae_lens_training_version": "5.10.0", "neuronpedia_id": None, "model_from_pretrained_kwargs": {},
        "seqpos_slice": [None],
    }  # fmt: skip
    yield "v5-standard", cfg, tensors
    yield "v5-topk", {**cfg, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}, tensors
    threshold = {"threshold": torch.rand(F, generator=generator)}
    yield "v5-jumprelu", {**cfg, "architecture": "jumprelu"}, tensors | threshold
    yield "v5-scaling_factor", cfg, tensors | {"scaling_factor": torch.ones(F)}
    older = {name: value for name, value in cfg.items() if name not in ("architecture", "hook_name", "hook_head_index")}
    older |= {"hook_point": HOOK, "hook_point_head_index": None, "normalize_activations": True}
    yield "v4-hook_point", older, tensors


def make(folder: Path) -> None:
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    for name, sae, x in inference():
        sae.save_model(folder / name)
        save_file(computed(sae, x), folder / f"{name}.safetensors")
    for name, found, save in trained():
        save(folder / name)
        save_file(found, folder / f"{name}.safetensors")
    for name, cfg, tensors in version_five():
        (folder / name).mkdir()
        (folder / name / "cfg.json").write_text(json.dumps(cfg))
        save_file(tensors, folder / name / "sae_weights.safetensors")
        save_file(computed(SAE.load_from_disk(folder / name), inputs()), folder / f"{name}.safetensors")


def read(folder: Path) -> None:
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    for given in sorted(folder.glob("*.x.safetensors")):
        name = given.name.removesuffix(".x.safetensors")
        sae = SAE.load_from_disk(folder / name)
        x = load_file(given)["x"]
        if sae.cfg.reshape_activations == "hook_z":
            x = x.view(len(x), 4, -1)
        save_file(computed(sae, x), folder / f"{name}.safetensors")
        metadata = sae.cfg.metadata
        found = [sae.cfg.architecture(), metadata.model_name, metadata.hook_name, metadata.hook_name_out]
        (folder / f"{name}.json").write_text(json.dumps(found))


def convert(folder: Path) -> None:
    from huggingface_hub.errors import EntryNotFoundError
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.loading import pretrained_sae_loaders as loaders  # pyright: ignore[reportMissingImports]

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        path = folder / repo_id / subfolder / filename
        if not path.is_file():
            raise EntryNotFoundError(str(path))
        return str(path)

    loaders.hf_hub_download = download
    loaders.get_safetensors_tensor_shapes = lambda repo_id, filename: {
        name: list(tensor.shape) for name, tensor in load_file(folder / repo_id / filename).items()
    }
    for name, (importer, repository, place, settings) in json.loads((folder / "convert.json").read_text()).items():
        cfg, tensors, _ = getattr(loaders, importer)(repository, place, cfg_overrides=settings)
        sae = SAE.load_from_disk(folder, converter=lambda *_, cfg=cfg, tensors=tensors, **__: (cfg, tensors))
        save_file(computed(sae, load_file(folder / f"{name}.x.safetensors")["x"]), folder / f"{name}.safetensors")


if __name__ == "__main__":
    {"make": make, "read": read, "convert": convert}[sys.argv[1]](Path(sys.argv[2]))

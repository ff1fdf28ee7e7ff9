"""The losses of a peer's own trainers with their gradients, on random weights and batches, in the peer's environment.

    .venvs/saelens/bin/python tests/parity/losses_worker.py saelens FOLDER

writes FOLDER/CASE.safetensors: x [n, d] (and y), the numbers of dead latents, the loss, and weights (w.NAME) with their
gradients (g.NAME) by our names: encoder and decoder hold one latent a row.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, N, K, DEAD = 24, 96, 64, 7, 40
Case = tuple[str, Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]
"""Name; batch and loss; weights; gradients."""


def inputs(seed: int = 0) -> Tensor:
    return 2 * torch.randn(N, D, generator=torch.Generator().manual_seed(seed)) + 1


def randomise(module: torch.nn.Module, unit: bool = False) -> None:
    """Every weight of its own; decoder rows of many lengths, or of length 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if name == "threshold":
                value = value.abs()
            elif name == "r_mag":
                value = 0.3 * value
            elif "dec" in name and value.ndim == 2:
                rows = 0 if value.shape[0] == F else 1
                value = torch.nn.functional.normalize(value, dim=1 - rows)
                if not unit:
                    value *= (0.5 + torch.rand(F, generator=generator)).unsqueeze(1 - rows)
            elif value.ndim == 2:
                value = value / D**0.5
            parameter.copy_(value)


def collected(parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and gradients by our names, a latent a row."""
    weights, gradients = {}, {}
    for name, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        turn = name in ("encoder", "decoder") and parameter.shape[0] != F
        weights[name] = parameter.detach().T.clone() if turn else parameter.detach().clone()
        gradients[name] = gradient.T.clone() if turn else gradient.clone()
    return weights, gradients


def saelens() -> Iterator[Case]:
    from sae_lens.registry import get_sae_training_class  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]

    quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": K}
    tanh = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True, "pre_act_loss_coefficient": 0.01}
    kinds: dict[str, tuple[str, dict[str, Any], bool]] = {
        "standard": ("standard", {}, False),
        "topk": ("topk", {"k": K, "rescale_acts_by_decoder_norm": False}, True),
        "topk-by-norm": ("topk", {"k": K}, False),
        "batchtopk": ("batchtopk", {"k": K, "rescale_acts_by_decoder_norm": False}, True),
        "batchtopk-by-norm": ("batchtopk", {"k": K}, False),
        "matryoshka": ("matryoshka_batchtopk", {"k": K, "matryoshka_widths": [12, 48, F]}, False),
        "jumprelu-step": ("jumprelu", {"jumprelu_bandwidth": 0.5}, False),
        "jumprelu-quadratic": ("jumprelu", {"jumprelu_bandwidth": 0.5, **quadratic}, False),
        "jumprelu-tanh": ("jumprelu", {"jumprelu_bandwidth": 0.5, **tanh}, True),
    }
    for name, (architecture, settings, some_dead) in kinds.items():
        cls, config = get_sae_training_class(architecture)
        sae = cls(config(d_in=D, d_sae=F, **settings))
        randomise(sae)
        dead = torch.arange(F) < (DEAD if some_dead else 0)
        batch = TrainStepInput(
            sae_in=inputs(),
            coefficients={"l1": 0.3, "l0": 0.2},
            dead_neuron_mask=dead,
            n_training_steps=0,
            is_logging_step=False,
        )
        loss = sae.training_forward_pass(batch).loss
        loss.backward()
        named = {"encoder": sae.W_enc, "encoder_bias": sae.b_enc, "decoder": sae.W_dec, "decoder_bias": sae.b_dec}
        if architecture == "jumprelu":
            named["threshold"] = sae.threshold
        yield name, {"x": inputs(), "loss": loss.detach(), "dead": dead.nonzero().flatten()}, *collected(named)


def sparsify() -> Iterator[Case]:
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    kinds: dict[str, tuple[dict[str, Any], bool]] = {
        "sae": ({}, False),
        "auxk": ({}, True),
        "multi_topk": ({"multi_topk": True}, False),
        "transcoder": ({"transcode": True}, False),
        "skip_transcoder": ({"transcode": True, "skip_connection": True}, False),
    }
    for name, (settings, some_dead) in kinds.items():
        coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **settings))
        randomise(coder)
        dead = torch.arange(F) < (DEAD if some_dead else 0)
        y = inputs(9) if settings.get("transcode") else inputs()
        out = coder(inputs(), y, dead_mask=dead if some_dead else None)
        loss = out.fvu + 0.5 * out.auxk_loss + out.multi_topk_fvu / 8  # as its trainer's hook sums them
        loss.backward()
        named = {
            "encoder": coder.encoder.weight,
            "encoder_bias": coder.encoder.bias,
            "decoder": coder.W_dec,
            "decoder_bias": coder.b_dec,
        }
        if coder.W_skip is not None:
            named["skip"] = coder.W_skip
        given = {"x": inputs(), "y": y, "loss": loss.detach(), "dead": dead.nonzero().flatten()}
        yield name, given, *collected(named)


def dictionary_learning() -> Iterator[Case]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.gdm import GatedSAETrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers.standard import (  # pyright: ignore[reportMissingImports]
        StandardTrainer,
        StandardTrainerAprilUpdate,
    )
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    shared: dict[str, Any] = {
        "steps": 50, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "none", "warmup_steps": 0,
        "device": "cpu",
    }  # fmt: skip
    calm = {"sparsity_warmup_steps": 0}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "standard": (StandardTrainer, calm),
        "april": (StandardTrainerAprilUpdate, calm),
        "topk": (TopKTrainer, {"k": K}),
        "batchtopk": (BatchTopKTrainer, {"k": K}),
        "gated": (GatedSAETrainer, calm),
        "jumprelu": (JumpReluTrainer, {**calm, "target_l0": float(K), "bandwidth": 0.5}),
    }
    for name, (cls, settings) in kinds.items():
        trainer = cls(**shared, **settings)
        ae = trainer.ae
        randomise(ae, unit=name != "april")
        dead = torch.arange(F) < (DEAD if name in ("topk", "batchtopk") else 0)
        if dead.any():  # that have been silent for long, and are weak: one that fires in this batch does not count
            trainer.num_tokens_since_fired[dead] = trainer.dead_feature_threshold
            with torch.no_grad():
                ae.encoder.weight[dead] *= 0.2
                ae.encoder.bias[dead] = 0.3
        loss = trainer.loss(inputs(), step=1)
        loss.backward()
        if name == "jumprelu":
            encoder, bias, decoder, b_dec = ae.W_enc, ae.b_enc, ae.W_dec, ae.b_dec
            own = {"threshold": ae.threshold}
        elif name == "gated":
            encoder, bias, decoder, b_dec = ae.encoder.weight, ae.gate_bias, ae.decoder.weight, ae.decoder_bias
            own = {"gate_scale": ae.r_mag, "magnitude_bias": ae.mag_bias}
        else:
            encoder, bias, decoder = ae.encoder.weight, ae.encoder.bias, ae.decoder.weight
            b_dec, own = ae.bias if hasattr(ae, "bias") else ae.b_dec, {}
        named = {"encoder": encoder, "encoder_bias": bias, "decoder": decoder, "decoder_bias": b_dec, **own}
        if dead.any():
            dead = trainer.num_tokens_since_fired >= trainer.dead_feature_threshold
        yield name, {"x": inputs(), "loss": loss.detach(), "dead": dead.nonzero().flatten()}, *collected(named)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        peers = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}
        for case, given, weights, gradients in peers[sys.argv[1]]():
            tensors = {**given} | {f"w.{name}": value for name, value in weights.items()}
            tensors |= {f"g.{name}": value for name, value in gradients.items()}
            save_file(
                {name: value.contiguous().clone() for name, value in tensors.items()},
                f"{sys.argv[2]}/{case}.safetensors",
            )

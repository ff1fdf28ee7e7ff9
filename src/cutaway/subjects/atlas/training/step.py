"""One step of atlas's training, its optimizers and its precision."""

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM

from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.atlas.training.batches import target_weights
from cutaway.subjects.atlas.training.loss import linear_cross_entropy, softmax_loss
from cutaway.subjects.atlas.training.recipe import Optimizer

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0
_MICROBATCH_ON_CPU = 16  # rows at a time: more spill out of the caches and gain nothing


class Step:
    """One optimizer step of a model; returns the weighted mean loss of its counted targets, in nats."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        optimizers: Sequence[torch.optim.Optimizer],
        dtype: torch.dtype,
        reply_weight: float = 1.0,
        compiled: bool = False,
    ) -> None:
        self.model, self.optimizers, self.dtype, self.reply_weight = model, optimizers, dtype, reply_weight
        self.trunk = torch.compile(model.model) if compiled else model.model
        self.softmax = torch.compile(softmax_loss) if compiled else softmax_loss

    def __call__(self, inputs: Any, targets: Any, *, rate: float) -> float:
        device = self.model.device
        weights = target_weights(inputs, targets, self.reply_weight)
        arrays = (inputs, targets, weights)
        ids, wanted, weighing = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
        size = len(ids) if device.type != "cpu" else _MICROBATCH_ON_CPU
        counted = float(weights.sum())
        head = self.model.lm_head.weight
        total = 0.0
        for rows in range(0, len(ids), size):
            piece = slice(rows, rows + size)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                hidden = self.trunk(input_ids=ids[piece], use_cache=False).last_hidden_state
            summed = linear_cross_entropy(
                hidden, head, wanted[piece], weighing[piece], self.dtype, softmax=self.softmax
            )
            loss = summed / counted
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total


def new_optimizers(model: LlamaForCausalLM, kind: Optimizer) -> list[torch.optim.Optimizer]:
    parameters = dict(model.named_parameters())
    matrices = [name for name, parameter in parameters.items() if parameter.dim() >= 2]
    orthogonal = [name for name in matrices if kind == "muon" and "layers." in name]
    decayed = [parameters[name] for name in matrices if name not in orthogonal]
    gains = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)]
    if kind == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise CutawayError(f"torch {torch.__version__} has no Muon: --optimizer adamw, or torch 2.9 and later")
        optimizers.append(
            torch.optim.Muon(
                [parameters[name] for name in orthogonal],
                lr=0.0,
                weight_decay=WEIGHT_DECAY,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def choose_precision(model: LlamaForCausalLM, batches: Callable[[int], tuple[Any, Any]]) -> str:
    """ "bfloat16" where the device has it and a step is measured to be faster with it, else "float32".

    Steps a copy; the model stays as it was.
    """
    if not _has_bfloat16(model.device):
        return "float32"
    inputs, targets = batches(0)
    inputs, targets = inputs[:_MICROBATCH_ON_CPU], targets[:_MICROBATCH_ON_CPU]
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        trial = copy.deepcopy(model)
        step = Step(trial, new_optimizers(trial, "adamw"), dtype)
        times = []
        for _ in range(3):  # the first one warms up
            start = time.perf_counter()
            step(inputs, targets, rate=0.0)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times[1:])
    return "bfloat16" if seconds[torch.bfloat16] < seconds[torch.float32] else "float32"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    # private in torch, but the only place that knows; without it bfloat16 is emulated and slower
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)

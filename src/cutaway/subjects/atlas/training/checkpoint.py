"""Where a training of atlas stands: weights, optimizer and log, so that a run that was stopped goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import LlamaForCausalLM

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.files import write_safetensors, write_text
from cutaway.subjects.atlas.shipped import read_log

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"


def _owner(optimizers: Sequence[torch.optim.Optimizer], parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    """The optimizer that steps a parameter."""
    for optimizer in optimizers:
        if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
            return optimizer
    raise ValueError("a parameter without an optimizer")


def save_checkpoint(
    folder: Path,
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    log: Sequence[dict[str, Any]],
) -> None:
    write_text(folder / LOG, "".join(json.dumps(record) + "\n" for record in log))
    tensors = {}
    for name, parameter in model.named_parameters():
        state = _owner(optimizers, parameter).state[parameter]
        tensors[f"{name}|value"] = parameter.detach()
        tensors |= {f"{name}|{part}": tensor for part, tensor in state.items() if part != "step"}
    write_safetensors(folder / CHECKPOINT, tensors, {"step": str(step)})


def load_checkpoint(folder: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Set weights and optimizers to the checkpoint in `folder`, if there is one; returns the steps done."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    try:
        with safe_open(str(path), framework="pt", device=str(model.device)) as tensors:
            step = int(tensors.metadata()["step"])
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    optimizer = _owner(optimizers, parameter)
                    adam = isinstance(optimizer, torch.optim.AdamW)
                    parts = ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",)
                    kept = {part: tensors.get_tensor(f"{name}|{part}") for part in ("value", *parts)}
                    if any(tensor.shape != parameter.shape for tensor in kept.values()):
                        raise ValueError(f"{name} has another shape")
                    parameter.copy_(kept.pop("value"))
                    if adam:
                        kept["step"] = torch.tensor(float(step), device=parameter.device)
                    optimizer.state[parameter] = kept
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:100]
        raise CutawayError(f"{path} is damaged ({said}): remove it, or begin again with --overwrite") from error
    return step


def read_records(folder: Path, step: int) -> list[dict[str, Any]]:
    """The records up to `step`."""
    path = folder / LOG
    if not step or not path.exists():
        return []
    records = read_log(path)
    if not all(isinstance(record.get("step"), int) for record in records):
        raise CutawayError(f"{path} is damaged: remove it, or begin again with --overwrite")
    return [record for record in records if record["step"] <= step]

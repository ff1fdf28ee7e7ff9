"""The same architecture with weights that have learned nothing: what a method shows there is not about training.

Nothing here changes the model it is given: it is built anew, or copied first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from cutaway.artifacts.errors import CutawayError, NotSupported
from cutaway.model.language_model import LanguageModel, attach
from cutaway.model.own.module import OwnModel


def untrained(lm: LanguageModel, seed: int = 0) -> LanguageModel:
    """A model of the same class and configuration, with new random weights.

    Args:
        lm: the model, which is not changed. One of the user's own is initialised by its modules' `reset_parameters`,
            others as their family initialises.
        seed: of the weights.

    Returns:
        The new model, with the same tokenizer.

    Raises:
        NotSupported: a class that cannot be built from its configuration (quantised weights, adapters), or a weight
            that nothing initialises.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = _reset(lm.hf) if isinstance(lm.hf, OwnModel) else type(lm.hf)(copy.deepcopy(lm.hf.config))
        fresh.to(device=lm.device, dtype=lm.dtype)  # pyright: ignore[reportCallIssue]
        fresh.eval()
    except Exception as error:  # whatever the class's own constructor raises
        raise NotSupported(f"{lm.name} cannot be built anew from its configuration: {error}") from error
    return attach(fresh, lm.tokenizer, name=f"{lm.name}, untrained ({seed})")


def _reset(model: OwnModel) -> OwnModel:
    fresh = copy.deepcopy(model)
    left = {name for name, _ in fresh.module.named_parameters()}
    for prefix, module in fresh.module.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            left -= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters()}
    if left:
        raise CutawayError(f"nothing says how {min(left)} begins; give its module a reset_parameters()")
    return fresh


def cascade(lm: LanguageModel, seed: int = 0, steps: int = 4) -> Iterator[tuple[str, LanguageModel]]:
    """The model with its layers made untrained from the top down (Adebayo et al. 2018), then all of it.

    Yields (what is untrained, model): about `steps` stages of decoder layers, and at last everything, embeddings and
    norms included. Each model is a copy; the next stage changes it further, so use it before asking for the next.
    """
    fresh = untrained(lm, seed)
    changed = attach(copy.deepcopy(lm.hf).eval(), lm.tokenizer, name=f"{lm.name}, partly untrained")
    order = list(range(lm.n_layers - 1, -1, -1))
    ends = sorted({round((i + 1) * lm.n_layers / steps) for i in range(steps)} - {0})
    done = 0
    with torch.no_grad():
        for end in ends:
            for layer in order[done:end]:
                module, source = changed.family.layers[layer].module, fresh.family.layers[layer].module
                module.load_state_dict(source.state_dict())
            done = end
            lowest = order[done - 1]
            yield (f"layers {lowest}–{lm.n_layers - 1}" if end > 1 else f"layer {lowest}"), changed
    yield "everything", fresh

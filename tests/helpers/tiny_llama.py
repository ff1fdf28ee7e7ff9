"""A random Llama whose predictions are far from uniform, and cross-entropies under plain hooks of PyTorch."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cutaway.model.language_model import LanguageModel, attach

Change = Callable[[Tensor], Tensor]


def tiny_llama(seed: int = 0, name: str = "tiny") -> LanguageModel:
    """3 layers, width 16, 2 heads of 8, vocabulary 50."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return attach(model, name=name)


@torch.no_grad()
def hooked(
    lm: LanguageModel, rows: Tensor, outputs: Mapping[nn.Module, Change], inputs: Mapping[nn.Module, Change]
) -> tuple[float, Tensor]:
    """Cross-entropy and logits of what follows positions 1 on, with modules' outputs and inputs changed by hand."""

    def after(change: Change) -> Callable[..., object]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> object:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)  # type: ignore[arg-type]

        return hook

    def before(change: Change) -> Callable[..., object]:
        return lambda _module, args: (change(args[0]), *args[1:])

    handles = [module.register_forward_hook(after(change)) for module, change in outputs.items()]
    handles += [module.register_forward_pre_hook(before(change)) for module, change in inputs.items()]
    try:
        logits = lm.hf(input_ids=rows).logits[:, 1:-1]
    finally:
        for handle in handles:
            handle.remove()
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 2:].flatten()).item(), logits


def putting(value: Tensor) -> Change:
    """Everything but the first position replaced by `value` [b, p - 1, ...]."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1:] = value.reshape(x[:, 1:].shape)
        return x

    return change

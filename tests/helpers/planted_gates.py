"""A small Llama whose circuit is known: two heads carry one bit each, and the MLP joins them by AND or by OR.

Prompts are `[0, bit, 5]` with the bit token 1 (on) or 2 (off). In layer 0, heads 0 and 1 both copy the bit from the
middle token to the last one, each to a place of its own in the stream; heads 2 and 3 write nothing. The MLP writes
AND(a, b) or OR(a, b) = 1 - AND(1 - a, 1 - b), and the unembedding makes of it the logit of token 3 ("on") over token 4
("off"): the logit difference is +2 where the gate is on and -2 where it is off. Layer 1 does nothing. A large constant
in the stream keeps every norm's divisor constant, so the circuit is exact to about 1e-3.

"backup" is another model: head 0 writes the answer itself, and the MLP writes it only where head 0 did not (b and
not a).

With the clean prompt on and the corrupt one off, both heads flip together. What theory says of one head alone, where
the other holds the run's own value: behind OR noising one moves nothing and denoising one everything; behind AND the
other way round.
"""

from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cutaway.data.pairs import PromptPair
from cutaway.model.language_model import LanguageModel, attach

ON, OFF, YES, NO, END = 1, 2, 3, 4, 5
PARTS = (0, 1)
"""The heads of layer 0 that carry the bit."""
_BIT, _A, _Y, _BIG = 0, 1, 3, 15  # places in the stream: the bit, what the two heads copy, the gate, the constant
_CONSTANT, _SHARP = 300.0, 60.0


def planted_gate(gate: Literal["and", "or", "backup"]) -> LanguageModel:
    """The model, attached. Its parts: heads 0 and 1 of layer 0 (`PARTS`), the MLP of layer 0."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=4, max_position_embeddings=16, rms_norm_eps=1e-9, bos_token_id=0,
        pad_token_id=7, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        size = _CONSTANT / 16**0.5  # the root mean square of the stream, so that a norm with this gain changes nothing
        model.model.norm.weight.fill_(size)
        for layer in model.model.layers:
            layer.get_parameter("input_layernorm.weight").fill_(size)
            layer.get_parameter("post_attention_layernorm.weight").fill_(size)
        embed = model.model.embed_tokens.weight
        embed[:, _BIG] = _CONSTANT
        embed[ON, _BIT] = 1.0
        first = model.model.layers[0]
        v, o = first.get_parameter("self_attn.v_proj.weight"), first.get_parameter("self_attn.o_proj.weight")
        for head in PARTS:
            v[4 * head, _BIT] = 3.0  # the last token looks at three tokens alike, one of which has the bit
            o[_A + head, 4 * head] = 1.0
        gates, up = first.get_parameter("mlp.gate_proj.weight"), first.get_parameter("mlp.up_proj.weight")
        down = first.get_parameter("mlp.down_proj.weight")
        up[:2, _BIG] = 1 / (_SHARP * _CONSTANT)
        # silu(s x) / s is relu(x): AND = relu(a + b - 1), OR = relu(a + b) - relu(a + b - 1)
        neurons = {
            "and": [(0, 1.0, 1.0)], "or": [(0, 0.0, 1.0), (1, 1.0, -1.0)], "backup": [(0, 0.0, 1.0)],
        }[gate]  # fmt: skip
        for neuron, threshold, sign in neurons:
            gates[neuron, [_A, _A + 1]] = _SHARP
            gates[neuron, _BIG] = -threshold * _SHARP / _CONSTANT
            down[_Y, neuron] = sign
        if gate == "backup":
            gates[0, _A] = -_SHARP
            o[_Y, 0] = 1.0
        head_weight = model.lm_head.weight
        head_weight[YES, _Y], head_weight[NO, _Y] = 2.0, -2.0
        head_weight[NO, _BIG] = 2.0 / _CONSTANT
    return attach(model, name=f"planted {gate}")


def gate_pairs(n: int = 8) -> list[PromptPair]:
    """The pair of prompts, clean on and corrupt off, n times over."""
    return [PromptPair((0, ON, END), (0, OFF, END), YES, NO, {"bit": 1}) for _ in range(n)]

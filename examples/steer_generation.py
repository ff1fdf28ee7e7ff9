"""Change what the model writes: add a direction to the stream while it generates, and see what that costs.

python examples/steer_generation.py
"""

import torch

import cutaway

WARM = ["I love this place, it is", "What a wonderful day, it was", "The meal was great and"]
COLD = ["I hate this place, it is", "What a terrible day, it was", "The meal was awful and"]
PROMPTS = ["I went to the new cafe. The food was", "Review: The museum was"]
LAYER, SITE = 3, "blocks.3.resid_post"

lm = cutaway.load("atlas")

# A direction: the difference between the mean stream of two kinds of text, at their last tokens.
warm, cold = (lm.run(texts, capture=SITE, logits=None).last(SITE).mean(0) for texts in (WARM, COLD))
direction = warm - cold
generator = torch.Generator().manual_seed(0)
random = torch.randn(direction.shape, generator=generator)
random *= direction.norm() / random.norm()  # the control: another direction of the same length


def cost(edit: cutaway.Edit) -> float:
    """Mean KL(as it was || edited) of the next token on the prompts, in nats."""
    runs = (lm.run(PROMPTS, edits=e, capture="logits") for e in ((), edit))
    before, after = (run.last("logits").log_softmax(-1) for run in runs)
    return (before.exp() * (before - after)).sum(-1).mean().item()


for name, vector in (("warm - cold", direction), ("random, same length", random)):
    for scale in (-1.0, 1.0):
        edit = cutaway.add(SITE, vector, scale)
        made = lm.generate(PROMPTS, edits=edit, max_new_tokens=12)
        print(f"\n{name} × {scale:+g}: KL {cost(edit):.2f} nats; touched {made.receipts[0].n_tokens} tokens")
        for prompt, text in zip(PROMPTS, made.texts, strict=True):
            print(f"  {prompt} |{text}")
print("\nunsteered")
for prompt, text in zip(PROMPTS, lm.generate(PROMPTS, max_new_tokens=12).texts, strict=True):
    print(f"  {prompt} |{text}")

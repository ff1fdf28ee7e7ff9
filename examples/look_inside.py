"""What does the model compute on the way to its answer? Sites, captures, and the logit lens.

python examples/look_inside.py
"""

import cutaway
from cutaway.observe import logit_lens

PROMPT = "The capital of the state containing Dallas is"

lm = cutaway.load("atlas")  # or the name or folder of another model
print(lm)

# One forward pass; wildcards name a site in every layer.
run = lm.run(PROMPT, capture=["blocks.*.resid_post", "blocks.*.attn.out", "blocks.*.mlp.out"])
print(run, "\n")

# How much does each part write at the last token, beside the stream it writes into?
print("layer   attention       MLP    stream   (length of the vector at the last token)")
for layer in range(lm.n_layers):
    parts = ("attn.out", "mlp.out", "resid_post")
    attention, mlp, stream = (run.last(f"blocks.{layer}.{part}")[0].norm().item() for part in parts)
    print(f"{layer:5}   {attention:9.2f} {mlp:9.2f} {stream:9.2f}")

# What would the model say if it stopped after each layer?
lens = logit_lens(lm, PROMPT, targets=" Austin")
print(f"\n{lens}")

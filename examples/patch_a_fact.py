"""Where does the model keep which city was named? Patch the stream from another prompt, layer by layer.

python examples/patch_a_fact.py
"""

import cutaway
from cutaway.artifacts import interval_text
from cutaway.causal import patch_grid
from cutaway.data import PromptPair

PROMPT = "The capital of the state containing {} is"
CAPITALS = {"Dallas": "Austin", "Oakland": "Sacramento", "Tampa": "Tallahassee", "Tucson": "Phoenix"}

lm = cutaway.load("atlas")

# One patch by hand: run the prompt about Dallas, with Oakland's activation at the city's token.
clean = lm.run(PROMPT.format("Oakland"), capture="blocks.*.resid_post")
prompt = PROMPT.format("Dallas")
city = lm.tokens(prompt).find(0, " Dallas")
print("layer   most probable next token after the patch at the city")
for layer in range(lm.n_layers):
    run = lm.run(prompt, edits=cutaway.patch(f"blocks.{layer}.resid_post", clean, positions=city), logits="last")
    print(f"{layer:5}  {lm.token_strings(run.logits[0, -1].topk(1).indices)[0]}")
print(run.receipts[0], "\n")  # what was really changed

# The same over every pair of cities, with positions by role and a control: patching a random other position.
pairs = [
    PromptPair(PROMPT.format(a), PROMPT.format(b), f" {CAPITALS[a]}", f" {CAPITALS[b]}", {"city": (a, b)})
    for a in CAPITALS
    for b in CAPITALS
    if a != b
]
grid = patch_grid(lm, pairs, direction="noise", roles=["city", "last"])
print(grid)
best = grid.best()  # chosen on every second pair, measured on the others
control = best.controls[0]
print(f"{best.name}: {best.value:.2f} {interval_text(best.interval)}, {control.name} {control.value:.2f}, n {best.n}")

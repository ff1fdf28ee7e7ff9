"""What do the heads attend to, and does it matter? Scores on repeated random tokens, beside the effect of ablating.

python examples/attention.py
"""

import cutaway
from cutaway.observe import head_report, repeated_tokens

lm = cutaway.load("atlas")

# Previous-token, duplicate-token and induction heads, each beside what happens without them.
report = head_report(lm, top=2, draws=4)
print(report)

# The pattern of the strongest induction head: where does each token of the second copy look?
(layer, head), score = report.scores.top("induction", 1)[0]
tokens = repeated_tokens(lm, n=1, length=8)
pattern = lm.run(tokens, capture=f"blocks.{layer}.attn.pattern")[f"blocks.{layer}.attn.pattern"][0, head]
strings = tokens.strings[0]
print(f"\nL{layer}H{head}, induction score {score:.2f}: strongest source of each token of the second copy")
for destination in range(9, len(strings)):
    source = int(pattern[destination].argmax())
    follows = "comes after the same token earlier" if strings[source - 1] == strings[destination] else ""
    weight = pattern[destination, source].item()
    print(f"  {strings[destination]!r:>14} → {strings[source]!r:<14} {weight:.2f}  {follows}")

# And without it: the edit is a value, the receipt says what was done.
removed = lm.run(tokens, edits=cutaway.zero(f"blocks.{layer}.attn.z", heads=head))
print(f"\n{removed.receipts[0]}")

"""When new weights take the place of the shipped ones: fixed before the weights of world 6 were trained.

They ship when `subjects evaluate --against` is above zero over all sets and over the held-out ones, each with its whole
interval, no headline falls by more than `HEADLINE_LOSS`, and no causal check by more than `CAUSAL_LOSS`. Other figures
are reported, not decided upon: their items, prompts, landmarks and doses stand in `world/`, `open_steering.py` and
`refusal_checks.py`, and were fixed at the same time.
"""

HEADLINE_LOSS = 0.03
"""By how much no headline may fall."""
CAUSAL_LOSS = 0.05
"""By how much no causal check may fall: about half of a 95 % interval's width at their n."""

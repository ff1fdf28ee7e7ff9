"""When new weights take the place of the shipped ones: fixed before any weights of worlds 6 and 7 were trained.

They ship when `subjects evaluate --against` is above zero over all sets and over the held-out ones, each with its whole
interval, no headline falls by more than `HEADLINE_LOSS`, and no causal check by more than `CAUSAL_LOSS`. Other figures
are reported, not decided upon: their items, prompts, landmarks and doses stand in `world/`, `open_steering.py` and
`refusal_checks.py`, and were fixed at the same time.
World 7 is world 6 with other shares and without the wording that left the next token of a capital's frame undecided;
its measures, prompts and doses are those of world 6.
"""

HEADLINE_LOSS = 0.03
"""By how much no headline may fall."""
CAUSAL_LOSS = 0.05
"""By how much no causal check may fall: about half of a 95 % interval's width at their n."""

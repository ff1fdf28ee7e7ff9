"""What was fixed before the weights of world 6 were trained: when they ship, and what steering is judged on.

New weights take the place of the shipped ones when `subjects evaluate --against` is above zero over all sets and over
the held-out ones, each with its whole interval, no headline falls by more than `HEADLINE_LOSS`, and no causal check by
more than `CAUSAL_LOSS`. All else on the page is reported, not decided upon.
"""

from cutaway.subjects.world.facts import LANDMARKS, Landmark
from cutaway.subjects.world.held_out import held_out

HEADLINE_LOSS = 0.03
"""By how much no headline may fall."""
CAUSAL_LOSS = 0.05
"""By how much no causal check may fall: about half of a 95 % interval's width at their n."""

OPEN_PROMPTS = 100
"""Open chats of each kind: in the corpus's wording to choose layer and dose with, in held-out wording to judge."""
OPEN_DOSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Of the direction's own projection."""
OPEN_RANDOM_DRAWS = 4
COLLAPSE_DOSE = 10.0
"""Times the largest value: what too much does."""
COLLAPSE_HANDLES = 10
REFUSAL_DOSES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Of the difference of means, added at one layer."""
REFUSAL_KL = 0.5
"""Nats a token on unrelated text: the price at which adding is judged."""


def chooses(landmark: Landmark) -> bool:
    """Whether a landmark chooses layer and dose of open steering; the others judge."""
    return held_out(f"steer{landmark.name}", 0.3)


CHOOSING = tuple(landmark for landmark in LANDMARKS if chooses(landmark))
JUDGED = tuple(landmark for landmark in LANDMARKS if not chooses(landmark))

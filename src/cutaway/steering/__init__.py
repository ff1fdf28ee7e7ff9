"""Steering: directions and latents that change what a model does, beside controls and side effects.

    directions = cutaway.steering.difference_of_means(lm, positive, negative)
    choice = cutaway.steering.select_direction(lm, directions, more_positive, more_negative)
    cutaway.steering.evaluate_steering(lm, held_out, choice.remove.direction, apply, method="clamp")

Importing the package loads no torch; the names below load what they need when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

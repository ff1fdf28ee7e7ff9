"""Text, prompt pairs and tasks, and the activations of a model on a corpus.

    pairs = cutaway.data.readable_pairs(lm, cutaway.data.task("indirect object"), n=48)
    store = cutaway.data.harvest(lm, "texts/", "blocks.3.resid_post", out="activations/", tokens=1_000_000)

Importing the package loads no torch; the names below load what they need when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""What the latents of a dictionary stand for: top examples, direct logit effects, concepts, automatic labels.

examples = cutaway.features.top_examples(lm, dictionary, rows, latents=[7])
cutaway.features.match_concepts(lm, dictionary, rows, {"Paris": cutaway.features.mentions(lm, rows, ["Paris"])})
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

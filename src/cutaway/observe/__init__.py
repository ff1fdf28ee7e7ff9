"""Instruments that only look: lenses, direct logit attribution, heads and their circuits, probes, saliency.

    from cutaway import observe

    lens = observe.logit_lens(lm, "The capital of the state containing Dallas is")

What they show is a reading of the model, not yet a cause. Every result prints itself in a few lines and has `to_json`,
`to_frame` and `save`. Importing the package loads neither torch nor transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

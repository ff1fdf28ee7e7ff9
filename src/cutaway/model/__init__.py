"""A causal language model you can look into: load or attach one, run it, read and edit what it computes, generate.

Example:
    import cutaway

    lm = cutaway.model.load("atlas")
    run = lm.run("The capital of France is", capture="blocks.3.resid_post")
    run["blocks.3.resid_post"].shape
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

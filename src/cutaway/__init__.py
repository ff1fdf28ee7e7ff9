"""cutaway: look inside language models.

Example:
    import cutaway

    lm = cutaway.load("atlas")
    run = lm.run("The capital of the state containing Dallas is", capture="blocks.*.resid_post")
    cutaway.observe.logit_lens(lm, "The capital of France is")

The instruments are in the packages `observe`, `causal`, `dictionaries`, `features` and `steering`; `data` has tasks and
corpora, `subjects` has models whose insides are known, `model` has all that can be done with one model, and `tour` has
all of it on one page. Importing the package loads neither torch nor transformers; each name loads what it needs when
it is first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

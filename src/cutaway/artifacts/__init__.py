"""What every result is made of: effects with their evidence, statistics, errors, manifests and run folders.

    effect = cutaway.artifacts.Effect("lead", 0.83, 48, (0.79, 0.87), controls, "zero ablation", "logits")
    print(effect.text())

Importing the package loads neither torch nor NumPy; the names below load what they need when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

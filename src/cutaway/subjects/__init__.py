"""Subjects: models whose insides are known. Atlas and its world, and toy models of superposition.

    toys = cutaway.subjects.train_toys(density, importance, m=2)
    items = cutaway.subjects.item_sets(seed=0, n=48)["two_hop/capital/held_out"]

Importing the package loads no torch; the names below load what they need when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

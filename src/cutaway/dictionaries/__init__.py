"""Sparse dictionaries: trained, judged, exchanged with the field.

dictionary = cutaway.dictionaries.load("atlas/blocks.3.resid_post")
dictionary.latent(7)
cutaway.dictionaries.train("atlas", "blocks.3.resid_post", preset="batchtopk", corpus="texts/", out="runs/one")
cutaway.dictionaries.judge(lm, dictionary, held_out_rows).save("judged.html")
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""The tour: one command from a model to a page that shows its insides.

cutaway.tour.run_tour("atlas", out="runs/tour")
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

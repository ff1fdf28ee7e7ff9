"""HTML and SVG from plain lists; no torch, no network.

    cutaway.draw.heatmap_svg(rows=["L0"], columns=["The", " cat"], values=[[0.1, 0.9]], title="Scores")

The names below load what they need when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

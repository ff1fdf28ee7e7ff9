"""Causes: which parts of a model an answer depends on, each effect beside its controls.

Patching, causal tracing, path patching, interchange interventions, attribution patching, circuits; what is asked of the
logits (metrics), what stands in an activation's place (ablations), and whether the model can do the task at all.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

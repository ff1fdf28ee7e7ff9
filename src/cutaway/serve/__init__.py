"""The live page: one model, looked into and changed from a browser on the same machine.

cutaway.serve.create_app(lm) is the application; `cutaway open MODEL` serves it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

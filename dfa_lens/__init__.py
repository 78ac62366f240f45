"""dfa_lens: carry a circuit from a small language model to a large one.

Differentiable Faithfulness Alignment (arXiv 2604.24302) as a plugin to TransformerLens. Import it beside the model::

    import dfa_lens as dfa

The public names are listed in ``__init__.pyi``. Each is imported when it is first used, so that importing the package
costs nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

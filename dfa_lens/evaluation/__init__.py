"""Judging a circuit and a model: faithfulness curves, whether a task is solved, diagnostics of an alignment."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["diagnostics"])

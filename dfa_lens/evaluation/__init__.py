"""Judging a circuit and a model: curves, what a circuit does, whether a task is solved, an alignment's diagnostics."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["circuits", "diagnostics", "mib"])

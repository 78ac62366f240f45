"""Values that travel, and know no model: node sets, prompt pairs, scores, alignments, curves, and what they share."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["metrics", "statistics"])

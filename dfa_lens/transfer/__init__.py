"""Carrying scores to a larger model: training, what W is made of, what is minimised, likeness of nodes, controls."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["controls", "edge_forms", "forms", "objectives", "recipe", "similarity"]
)

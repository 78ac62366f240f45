"""Many transfers at once: studies, their table, the demo."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["config", "demo", "experiment", "paper", "published", "setting", "study", "table", "workers"],
)

"""Many transfers at once: studies, their table, the demo."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "config",
        "demo",
        "executors",
        "experiment",
        "folder",
        "leaderboard",
        "paper",
        "paper_configs",
        "progress",
        "published",
        "setting",
        "study",
        "table",
        "units",
    ],
)

"""Shapes are checked while testing, and only then; no test reaches the network."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(tempfile.gettempdir(), "dfa-lens-tests"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# Packages and modules whose signatures carry shapes. Installed before any of them is imported.
install_import_hook(
    [
        f"dfa_lens.{name}"
        for name in (
            "attribution",
            "data.alignment",
            "data.metrics",
            "data.nodes",
            "data.pairs",
            "data.scores",
            "data.statistics",
            "evaluation",
            "models",
            "transfer",
        )
    ],
    "beartype.beartype",
)

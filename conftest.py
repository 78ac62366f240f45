"""Shapes are checked while testing, and only then; no test reaches the network."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(tempfile.gettempdir(), "dfa-lens-tests"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# Modules whose signatures carry shapes. Installed before any of them is imported.
install_import_hook(
    [
        f"dfa_lens.{name}"
        for name in (
            "alignment",
            "attribution",
            "behaviour",
            "controls",
            "faithfulness",
            "models",
            "metrics",
            "nodes",
            "prompts",
            "scores",
            "statistics",
            "training",
        )
    ],
    "beartype.beartype",
)

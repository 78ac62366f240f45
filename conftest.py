"""Shapes are checked while testing, and only then; no test reaches the network."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(tempfile.gettempdir(), "dfa-lens-tests"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# The whole package, so that no signature with a shape in it goes unchecked; an int is welcome where a float is, as for
# every type checker. Installed before any of it is imported.
install_import_hook("dfa_lens", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

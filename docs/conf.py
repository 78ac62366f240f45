"""How the documentation is built: ``make docs``."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parent / "tools"))

import leaderboard

from dfa_lens import __version__

project = "dfa_lens"
author = "The dfa_lens developers"
copyright = author  # Sphinx's name for it
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "results/*.csv"]
html_theme = "furo"
html_title = "dfa_lens"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["dark.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks keep the outputs of their last run; the tests run them
suppress_warnings = [
    "misc.highlighting_failure",
    "ref.python",  # two classes with a field of one name
    "mystnb.mime_priority",  # linkcheck looks at no pictures
]

# `make linkcheck`, with the network
linkcheck_timeout = 20
linkcheck_retries = 2

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# not autodoc_preserve_defaults: the options that `fit` shows are those of a recipe, and stand in no source of its own
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def notebooks() -> None:
    """The notebooks live in demos/; here is a copy of them whose links lead to these pages."""
    folder = HERE / "demos"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted((HERE.parent / "demos").glob("*.ipynb")):
        (folder / path.name).write_text(path.read_text().replace("](../docs/", "](../"))


notebooks()
leaderboard.write()

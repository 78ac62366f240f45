"""The command line: ``dfa-lens demo | attribute | fit | transfer | evaluate | report | study | doctor``.

``app`` is the application, ``options`` what commands share, ``reading`` and ``writing`` their files; the commands are
in ``scores``, ``experiments`` and ``look``.
"""

from dfa_lens.cli import experiments, look, scores
from dfa_lens.cli.app import app, main

__all__ = ["app", "experiments", "look", "main", "scores"]

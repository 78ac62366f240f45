"""The command line: ``dfa-lens demo | attribute | measure | carry | fit | transfer | evaluate | inspect | report |
study | mib`` and ``doctor``.

``app`` is the application, ``options`` what commands share, ``reading`` and ``writing`` their files; the commands are
in ``scores``, ``carrying``, ``experiments``, ``look`` and ``submissions``.
"""

from dfa_lens.cli import threads

threads.before_torch()  # which the commands import

from dfa_lens.cli import carrying, experiments, look, scores, submissions  # noqa: E402
from dfa_lens.cli.app import app, main  # noqa: E402

__all__ = ["app", "carrying", "experiments", "look", "main", "scores", "submissions"]

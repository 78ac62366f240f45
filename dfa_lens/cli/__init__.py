"""The command line: ``dfa-lens demo | attribute | measure | carry | fit | transfer | evaluate | report | study`` and
``doctor``.

``app`` is the application, ``options`` what commands share, ``reading`` and ``writing`` their files; the commands are
in ``scores``, ``carrying``, ``experiments`` and ``look``.
"""

from dfa_lens.cli import threads

threads.before_torch()  # which the commands import

from dfa_lens.cli import carrying, experiments, look, scores  # noqa: E402
from dfa_lens.cli.app import app, main  # noqa: E402

__all__ = ["app", "carrying", "experiments", "look", "main", "scores"]

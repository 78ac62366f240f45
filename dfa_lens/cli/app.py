"""The application, and how it ends: an error of ours is one line, not a traceback."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated, Any

import typer

from dfa_lens.errors import DfaError, plain_text

app = typer.Typer(
    help="Carry a circuit from a small language model to a large one.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool | None) -> None:
    if asked:
        import dfa_lens

        typer.echo(f"dfa-lens {dfa_lens.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool | None,
        typer.Option("--version", help="Say the version, and nothing else.", callback=_version, is_eager=True),
    ] = None,
) -> None:
    pass


def main() -> None:
    """Run the command line; an error of ours is one line, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.showwarning = _one_line_warning
    try:
        app()
    except DfaError as error:
        typer.echo(f"dfa-lens: {plain_text(error)}", err=True)
        sys.exit(2)


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {plain_text(message)}", err=True)

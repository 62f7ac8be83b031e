"""The application object, and how errors and warnings reach the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from expunge.errors import ExpungeError, ResourceError

DEBUG = "EXPUNGE_DEBUG"


def one_line(text: object) -> str:
    """A message on one line, control and direction-changing characters made visible."""
    from expunge.cli.show import clean

    return " ".join(clean(text).split())


def complain(text: object, colour: str = "red", label: str = "error") -> None:
    """Print one line on stderr."""
    typer.secho(f"{label}: {one_line(text)}", fg=colour, err=True)


_ORDER = (
    *("demo", "plan", "train", "run", "erase", "bench", "evaluate", "report", "analyze"),
    *("apply", "revert", "transfer", "ask", "prompts", "generate", "judge", "summary"),
    *("info", "list", "data", "schema", "convert"),
)


class _Group(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: _ORDER.index(name))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ExpungeError as error:
            if os.environ.get(DEBUG) == "1":
                raise
            complain(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            complain("interrupted", "yellow", "note")
            raise typer.Exit(130) from None
        except Exception as error:
            usage = hasattr(error, "exit_code") or isinstance(error, typer.Exit | typer.Abort)  # the framework's own
            if usage or isinstance(error, BrokenPipeError) or os.environ.get(DEBUG) == "1":
                raise
            if isinstance(error, OSError) and error.filename is not None and error.strerror:
                complain(f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}")
                raise typer.Exit(ResourceError.exit_code) from None
            complain(f"unexpected {type(error).__name__}: {error} (set {DEBUG}=1 for the traceback)")
            raise typer.Exit(1) from None


app = typer.Typer(
    name="expunge",
    cls=_Group,
    help="Make trained models forget: a patch, the evidence, and exact undo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from expunge import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    del version


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage(), "yellow", record.levelname.lower())


def main() -> None:
    """Entry point of the ``expunge`` command."""
    logger = logging.getLogger("expunge")
    if not logger.handlers:
        logger.addHandler(_Lines(level=logging.WARNING))
        logger.propagate = False
    if os.environ.get(DEBUG) != "1":
        warnings.showwarning = lambda message, *_args, **_kw: complain(message, "yellow", "warning")
    try:
        app()
    except BrokenPipeError:  # the reader (head, less) went away
        sys.stderr.close()
        raise SystemExit(1) from None

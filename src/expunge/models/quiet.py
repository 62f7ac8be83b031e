"""Loading models without the libraries' own progress bars and remarks; their settings are put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

BOTH = ("diffusers", "transformers")


@contextmanager
def no_progress_bars(*libraries: str) -> Iterator[None]:
    """Switch progress bars off, those of transformers by default."""
    found = _logging(*(libraries or ("transformers",)))
    shown = [library for library in found if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Neither progress bars nor remarks of diffusers and transformers.

    What they remark on is decided here: unused settings of another scheduler, parts that are not there.
    """
    before = [(library, library.get_verbosity()) for library in _logging(*BOTH)]
    with no_progress_bars(*BOTH):
        for library, _ in before:
            library.set_verbosity_error()
        try:
            yield
        finally:
            for library, verbosity in before:
                library.set_verbosity(verbosity)


def _logging(*libraries: str) -> list[Any]:
    return [import_module(f"{name}.utils.logging") for name in libraries]

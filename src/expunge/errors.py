"""Every error a user can meet, with the exit code the command line gives it.

Messages say what is wrong, where (file, key, class, tensor) and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExpungeError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 1


class ConfigError(ExpungeError):
    """An option, a configuration file or a recipe is wrong."""

    exit_code = 2


class RequestError(ExpungeError):
    """The request to forget cannot be carried out as stated (empty set, unknown class, no matching layer)."""

    exit_code = 2


class CapabilityError(ExpungeError):
    """The method needs something that this task does not have."""

    exit_code = 2


class ArtifactError(ExpungeError):
    """A weights or patch file is broken, unsafe, or does not belong to this model."""

    exit_code = 3


class DataError(ExpungeError):
    """Input data are unreadable or degenerate (broken image, class with one sample, non-finite statistics)."""

    exit_code = 3


class DivergedError(ExpungeError):
    """A loss, gradient or weight became NaN or infinite."""

    exit_code = 4


class NoEffectError(ExpungeError):
    """The run finished but did not change the model as asked."""

    exit_code = 5


class InvariantError(ExpungeError):
    """A weight outside the chosen space moved, or the model was not left as found."""

    exit_code = 5


class ResourceError(ExpungeError):
    """Memory, disk or a lock is not available."""

    exit_code = 6


class NotComparableError(ExpungeError):
    """Two measurements were made under different conditions and must not be ranked together."""

    exit_code = 7


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return ``"; did you mean 'x'?"`` for close names, else a short list of the known ones.

    >>> did_you_mean("keeep", ["keep", "scope"])
    "; did you mean 'keep'?"
    >>> did_you_mean("zzz", ["keep", "scope"])
    '; known: keep, scope'
    """
    names = sorted(set(known))
    lowered = {n.lower(): n for n in names}
    close = [lowered[c] for c in difflib.get_close_matches(name.lower(), list(lowered), n=limit, cutoff=0.6)]
    if close:
        return "; did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    shown = ", ".join(names[:20])
    return f"; known: {shown}" + (" ..." if len(names) > 20 else "") if names else "; nothing is available"

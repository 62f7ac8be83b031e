"""The front: layers that no other layer beats in both scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from expunge.errors import ConfigError
from expunge.models.towers import Tower
from expunge.slug.scores import LayerScore


def nondominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points ``(x, y)`` that no other one beats; small ``x`` and large ``y`` are good.

    A point is beaten if another has a strictly smaller ``x`` and a strictly larger ``y``, so ties survive. Sorted once:
    a point stays if its ``y`` is at least that of every point with smaller ``x``.

    Raises:
        ConfigError: A coordinate is not a number.

    >>> nondominated([(0.1, 1.0), (0.2, 2.0), (0.3, 1.5), (0.2, 1.0)])
    [0, 1, 3]
    """
    if any(math.isnan(x) or math.isnan(y) for x, y in points):
        raise ConfigError("a point of the front has a coordinate that is not a number; leave such layers out first")
    order = sorted(range(len(points)), key=lambda i: points[i][0])
    kept = []
    best, tied, x = -math.inf, -math.inf, math.nan  # highest y of all smaller x, and of this x
    for i in order:
        if points[i][0] != x:
            best, tied, x = max(best, tied), -math.inf, points[i][0]
        tied = max(tied, points[i][1])
        if points[i][1] >= best:
            kept.append(i)
    return sorted(kept)


def front(scores: Sequence[LayerScore], tower: Tower | None = None) -> list[LayerScore]:
    """The candidates that no other candidate of their tower beats in alignment and importance, worst aligned first.

    SLUG, section 3.3: alignment ``|cos|`` small, importance ``|g_f| / |theta|`` large. Members are in the published
    order, that is by descending alignment; among equals the given order stays.

    Args:
        scores: Candidates, see :func:`expunge.slug.scores.candidates`.
        tower: Only this one; ``None``: each on its own, vision first.
    """
    found = []
    for side in ("vision", "language") if tower is None else (tower,):
        own = [s for s in scores if s.tower == side]
        members = [own[i] for i in nondominated([(s.alignment, s.importance) for s in own])]
        found += sorted(members, key=lambda s: -s.alignment)
    return found

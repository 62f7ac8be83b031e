"""Exact 1-Wasserstein distances between the class clouds of embeddings.

For clouds ``x_1..x_n`` and ``y_1..y_m`` with equal weights, ``W1 = min_P sum_ij P_ij |x_i - y_j|`` over couplings
``P >= 0`` whose rows sum to ``1/n`` and columns to ``1/m`` (Kantorovich). For ``n = m`` a permutation is optimal.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from expunge import rng
from expunge.analysis.embedding import Embedding, check_comparable
from expunge.errors import ConfigError, DataError, NotComparableError

Solver = Literal["auto", "assignment", "pot", "lp"]
SOLVERS: tuple[str, ...] = ("auto", "assignment", "pot", "lp")
#: Up to this least common multiple, clouds of different sizes are repeated until the sizes agree.
MAX_COMMON = 1500
_MAX_ASSIGNMENT = 20_000


@dataclass(frozen=True)
class Distances:
    """Distances between the classes of one model.

    Args:
        name: Name of the model.
        values: float64 ``[C, C]``; ``values[i, j]`` is W1 between class i and j for ``i < j`` and NaN elsewhere, or
            where a class has no sample.
        floor: float64 ``[C]``: W1 between two random halves of one class, the noise floor. Halves have half the
            points, so it is somewhat above what two whole samples of one class would show. NaN below two samples.
        counts: int64 ``[C]``, samples per class.
        classes: Class names.
        unit: Were features scaled to length one?
    """

    name: str
    values: np.ndarray = field(repr=False)
    floor: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    unit: bool = False

    @property
    def noise(self) -> float:
        """The median noise floor of the classes; NaN if none has two samples."""
        known = self.floor[~np.isnan(self.floor)]
        return float(np.median(known)) if known.size else math.nan


def w1(x: Any, y: Any, *, solver: Solver = "auto") -> float:
    """Exact 1-Wasserstein distance with Euclidean cost between two clouds of equally weighted points.

    ``auto`` solves an assignment for equal sizes. Other sizes are repeated to their least common multiple if that is
    small; beyond, POT's network simplex is used if it is installed, else SciPy's linear programme. All are exact.

    Args:
        x: ``[n, D]``.
        y: ``[m, D]``.
        solver: ``auto``, ``assignment``, ``pot`` or ``lp``.

    Raises:
        ConfigError: Unknown or absent solver, or sizes that the assignment cannot hold.
        DataError: Empty clouds, other dimensions, or values that are not finite.

    >>> w1([[0.0], [1.0]], [[2.0], [3.0]])
    2.0
    """
    a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
    if a.ndim != 2 or b.ndim != 2 or not len(a) or not len(b) or a.shape[1] != b.shape[1]:
        raise DataError(f"W1 needs two non-empty clouds of one dimension, got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError("W1: a point has values that are not finite")
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    common = math.lcm(len(a), len(b))
    if solver == "auto":
        if len(a) == len(b) or common <= MAX_COMMON:
            solver = "assignment"
        else:
            solver = "pot" if _pot() is not None else "lp"
    if solver == "lp":
        from scipy.stats import wasserstein_distance_nd

        return float(wasserstein_distance_nd(a, b))
    from scipy.spatial.distance import cdist

    cost = cdist(a, b)
    if solver == "pot":
        ot = _pot()
        if ot is None:
            raise ConfigError("the solver 'pot' needs the package POT: pip install POT; or use 'auto'")
        weights = (np.full(len(v), 1 / len(v)) for v in (a, b))
        return float(ot.emd2(*weights, cost, numItermax=10_000_000, check_marginals=True))
    if common > _MAX_ASSIGNMENT:
        raise ConfigError(f"sizes {len(a)} and {len(b)} would be repeated to {common} points; use another solver")
    from scipy.optimize import linear_sum_assignment

    cost = cost.repeat(common // len(a), 0).repeat(common // len(b), 1)
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].sum() / common)


def _pot() -> Any:
    try:
        import ot
    except ImportError:
        return None
    return ot


def wasserstein_matrix(
    embedding: Embedding, *, unit: bool = False, solver: Solver = "auto", repeats: int = 4, seed: int = 0
) -> Distances:
    """W1 between the clouds of all pairs of true classes inside one model.

    Absolute values depend on the scale of the features and, through the bias of empirical clouds (of the order of
    ``n^(-1/D)``), on the number of points: compare only equal counts and mind the noise floor.

    Args:
        embedding: The model.
        unit: Scale all features to length one first.
        solver: See :func:`w1`.
        repeats: Random halvings per class for the noise floor.
        seed: Seed of the halvings.
    """
    clouds = [c.double().numpy() for c in (embedding.unit() if unit else embedding).clouds()]
    n = len(clouds)
    values = np.full((n, n), math.nan)
    for i, j in itertools.combinations(range(n), 2):
        if len(clouds[i]) and len(clouds[j]):
            values[i, j] = w1(clouds[i], clouds[j], solver=solver)
    floor = np.array([_halves(cloud, c, repeats, seed) for c, cloud in enumerate(clouds)])
    counts = np.array([len(c) for c in clouds], dtype=np.int64)
    return Distances(embedding.name, values, floor, counts, embedding.classes, unit)


def _halves(cloud: np.ndarray, label: int, repeats: int, seed: int) -> float:
    half = len(cloud) // 2
    if half < 1 or repeats < 1:
        return math.nan
    found = []
    for r in range(repeats):
        order = rng.permutation(rng.key(seed, "split half", label, r), len(cloud)).numpy()
        found.append(w1(cloud[order[:half]], cloud[order[half : 2 * half]]))
    return float(np.mean(found))


def wasserstein_difference(a: Distances, b: Distances) -> np.ndarray:
    """``D_b - D_a``, float64 ``[C, C]``: positive where classes are further apart in ``b``.

    Raises:
        NotComparableError: Other classes, counts or scaling.
    """
    if a.classes != b.classes or a.unit != b.unit:
        raise NotComparableError(f"distances of {a.name!r} and {b.name!r} differ in classes or scaling")
    return b.values - a.values


def wasserstein_between(a: Embedding, b: Embedding, *, unit: bool = False, solver: Solver = "auto") -> np.ndarray:
    """W1 between the clouds of one class in two models, float64 ``[C]``; NaN where a class has no sample.

    Meaningful for models whose feature axes correspond, such as a model and its patched version. A model that was
    trained anew from another start has its own axes, and the distance then mostly measures that.

    Raises:
        NotComparableError: The embeddings do not show the same samples.
    """
    check_comparable([a, b])
    pairs = zip(*((e.unit() if unit else e).clouds() for e in (a, b)), strict=True)
    return np.array([w1(x.double(), y.double(), solver=solver) if len(x) and len(y) else math.nan for x, y in pairs])

"""Searches of the step, one per layer and concept, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from expunge.errors import NoEffectError
from expunge.slug.probes import Figures, Prober
from expunge.slug.scores import LayerScore
from expunge.slug.search import Criterion, Probe, SearchResult

Deltas = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Direction:
    """Where an edit of one layer goes.

    Args:
        score: The layer that was picked; its norms set the unit of the step.
        gradient: Forget gradients of the tensors that move together, by name.
        sign: ``+1`` adds them, ``-1`` subtracts them.
    """

    score: LayerScore
    gradient: Mapping[str, Tensor]
    sign: float

    def factor(self, alpha: float) -> float:
        """``lambda = sign alpha |theta| / |g_f|``."""
        return self.sign * alpha * self.score.unit

    def deltas(self, alpha: float) -> Deltas:
        """Differences to the original weights after the relative step ``alpha``."""
        return {n: self.factor(alpha) * g for n, g in self.gradient.items()}


@dataclass(frozen=True, eq=False)
class Trial:
    """The search along one direction for one concept."""

    concept: str
    direction: Direction
    original: Figures
    result: SearchResult

    @property
    def layer(self) -> str:
        """The layer that was picked."""
        return self.direction.score.name

    @property
    def best(self) -> Probe | None:
        """The answer, or without one the step that forgets most for what it costs; ``None`` if none is any good."""
        if self.result.best is not None:
            return self.result.best
        usable = [p for p in self.result.probes if not p.broken and trade_off(p, self.original) > 0]
        return max(usable, key=lambda p: (trade_off(p, self.original), -p.alpha), default=None)

    def facts(self) -> dict[str, Any]:
        """As JSON data."""
        found = self.result
        rows = found.facts()["probes"]
        return {
            "layer": self.layer,
            "tensors": list(self.direction.gradient),
            "concept": self.concept,
            "feasible": found.feasible,
            "monotone": found.monotone,
            "alpha": found.alpha,
            "lambda": None if found.alpha is None else self.direction.factor(found.alpha),
            "original": {"forget": self.original.forget, "utility": self.original.utility},
            "probes": [{k: row[k] for k in ("alpha", "forget", "utility", "ok")} for row in rows],
            "evaluations": len(found.probes),
            "reason": found.reason,
        }


def trade_off(probe: Probe, original: Figures) -> float:
    """Share of the utility that is left minus share of the forget figure that is left; 0 for the untouched model."""
    if probe.utility is None or not original.forget:
        return -math.inf
    return probe.utility / max(original.utility, 1e-12) - probe.forget / original.forget


def probing(prober: Prober, direction: Direction, rows: Tensor) -> Callable[[float], Probe]:
    """Figures of a concept's rows as a function of the relative step."""

    def tried(alpha: float) -> Probe:
        figures = figures_of(prober, direction.deltas(alpha), rows)
        return Probe(alpha, figures.forget, figures.utility)

    return tried


def figures_of(prober: Prober, deltas: Mapping[str, Tensor], rows: Tensor) -> Figures:
    """Forget accuracy of some of the forget images, and utility."""
    return prober.figures(*prober.logits(deltas), rows=rows)


def choose(trials: Sequence[Trial]) -> Trial | None:
    """Among the answers: lowest forget figure, then highest utility, then smallest step; ``None`` without an answer."""
    found = [(t, t.result.best) for t in trials]
    rated = [(p.forget, -float(p.utility or 0), p.alpha, i) for i, (_, p) in enumerate(found) if p is not None]
    return trials[min(rated)[3]] if rated else None


def choose_distinct(trials: Mapping[str, Sequence[Trial]]) -> tuple[dict[str, Trial], list[str]]:
    """One answer per concept, on layers of their own as far as possible, best in sum by the rule of :func:`choose`.

    Returns:
        Trials by concept, without those that have no answer at all, and the concepts that had to share a layer, whose
        changes then add.
    """
    from scipy.optimize import linear_sum_assignment

    best: dict[tuple[str, frozenset[str]], Trial] = {}
    for concept, own in trials.items():
        for trial in own:
            key = (concept, frozenset(trial.direction.gradient))
            chosen = choose([t for t in (best.get(key), trial) if t is not None])
            if chosen is not None:
                best[key] = chosen
    layers = list(dict.fromkeys(layer for _, layer in best))
    concepts = [c for c in trials if any(k[0] == c for k in best)]
    none = 1e9  # more than all other costs together: as many concepts as can be get a layer of their own
    costs = [[_cost(best[c, layer]) if (c, layer) in best else none for layer in layers] for c in concepts]
    rows, columns = linear_sum_assignment(costs) if concepts else ((), ())
    found = {
        concepts[r]: best[concepts[r], layers[c]] for r, c in zip(rows, columns, strict=True) if costs[r][c] < none
    }
    shared = [c for c in concepts if c not in found]
    for concept in shared:
        rest = choose(trials[concept])
        assert rest is not None
        found[concept] = rest
    return {c: found[c] for c in concepts}, shared


def _cost(trial: Trial) -> float:
    best = trial.result.best
    assert best is not None
    return 1e6 * best.forget - 1e3 * float(best.utility or 0) + min(best.alpha, 100.0)


def infeasible(trials: Sequence[Trial], criterion: Criterion) -> NoEffectError:
    """The error that no layer has a good step, with the best trade-off of each."""
    lines = []
    for trial in trials:
        best = max(
            (p for p in trial.result.probes if not p.broken), key=lambda p: trade_off(p, trial.original), default=None
        )
        told = (
            "every step broke the model"
            if best is None
            else f"forget {best.forget:.2f}, utility {float(best.utility or 0):.2f} at alpha {best.alpha:.3g}"
        )
        lines.append(f"{trial.layer}: {told}")
    wanted = f"forget <= {criterion.target:g}"
    if criterion.original is not None:
        wanted += f" and utility >= {(1 - criterion.drop) * criterion.original:.2f}"
    about = f" '{trials[0].concept}'" if trials and trials[0].concept else ""
    return NoEffectError(
        f"slug: no single layer forgets{about} ({wanted}); best trade-offs: {'; '.join(lines) or 'none tried'}. "
        "Allow a larger 'utility_drop' or 'target', name other 'layers' or a larger 'group', or set "
        "on_infeasible='best' to take the best trade-off"
    )

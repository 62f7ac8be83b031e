"""How far to step: the smallest relative step that forgets and keeps the rest.

SLUG (Cai et al., ICML 2025, arXiv 2407.11867), algorithm 3. Steps are relative: ``alpha = lambda |g_f| / |theta|``.
Every search asks a function for the figures of one step, always from the untouched weights, and answers with a step
that it has tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from expunge.errors import ConfigError, did_you_mean

Method = Literal["log_bisection", "bisection", "uncanvas"]


@dataclass(frozen=True)
class Probe:
    """Figures of the model after one step.

    Args:
        alpha: Relative step.
        forget: What shall fall to the target, usually the accuracy on the forget set.
        utility: What shall stay, ``None`` if it was not measured.
        ok: Whether the criterion is met; the search fills it in.
        details: Further figures for the log.
    """

    alpha: float
    forget: float
    utility: float | None = None
    ok: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """Whether a figure is not a number: the step destroyed the model."""
        return math.isnan(self.forget) or (self.utility is not None and math.isnan(self.utility))


@dataclass(frozen=True)
class Criterion:
    """When a step is good: ``forget <= target`` and ``utility >= (1 - drop) original``.

    Args:
        target: Largest forget figure that counts as forgotten.
        drop: Share of the utility that may be lost.
        original: Utility of the untouched model; ``None``: the utility does not matter.
    """

    target: float = 0.0
    drop: float = 0.05
    original: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1 or math.isnan(self.target):
            raise ConfigError(f"a criterion needs a target and a drop in [0, 1], got {self.target} and {self.drop}")
        if self.original is not None and math.isnan(self.original):
            raise ConfigError("the utility of the untouched model is not a number; there is nothing to compare with")

    def forgotten(self, probe: Probe) -> bool:
        """Whether the forget figure is at the target; a broken model counts as having gone too far."""
        return probe.broken or probe.forget <= self.target

    def useful(self, probe: Probe) -> bool:
        """Whether enough utility is left; never for a broken model."""
        if probe.broken:
            return False
        if self.original is None:
            return True
        if probe.utility is None:
            raise ConfigError("the criterion has a utility to keep, but a probe without utility came back")
        return probe.utility >= (1 - self.drop) * self.original

    def met(self, probe: Probe) -> bool:
        """Both."""
        return self.forgotten(probe) and self.useful(probe)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        alpha: The answer, a step that was tried and met the criterion; ``None`` if there is none.
        monotone: Whether no step above the smallest one that forgot failed to forget.
        probes: All steps in the order tried.
        brackets: ``(lo, hi)`` before each of them: ``lo`` does not forget, ``hi`` does; ``inf`` if not known yet.
        method: Which search.
        reason: Why there is no answer; empty if there is one.
        written: The step that the published UnlearnCanvas loop records, which it may never have tried.
    """

    alpha: float | None
    monotone: bool
    probes: tuple[Probe, ...]
    brackets: tuple[tuple[float, float], ...]
    method: str
    reason: str = ""
    written: float | None = None

    @property
    def feasible(self) -> bool:
        """Whether there is an answer."""
        return self.alpha is not None

    @property
    def best(self) -> Probe | None:
        """The probe of the answer."""
        return next((p for p in self.probes if p.alpha == self.alpha), None)

    def facts(self) -> dict[str, Any]:
        """The same as JSON data; a figure that is not a number becomes ``None``, details are as the probe gave them."""
        rows = [{**asdict(p), "forget": _number(p.forget), "utility": _number(p.utility)} for p in self.probes]
        facts = {"method": self.method, "alpha": self.alpha, "feasible": self.feasible, "monotone": self.monotone}
        return {**facts, "reason": self.reason, "probes": rows}


def search(
    probe: Callable[[float], Probe],
    *,
    method: Method = "log_bisection",
    criterion: Criterion | None = None,
    alpha0: float | None = None,
    bounds: tuple[float, float] = (1e-4, 8.0),
    width: float = 1.05,
    budget: int | None = None,
    confirm: int = 0,
) -> SearchResult:
    """Look for the smallest step that meets the criterion.

    The forget figure alone steers: below the answer the model has not forgotten, above it it has. A step counts as an
    answer if it meets the whole criterion and no larger step that was tried failed to forget.

    Args:
        probe: Figures of the model after the relative step ``alpha``, from the untouched weights.
        method: ``log_bisection`` doubles or halves until the forget figure flips and then bisects in the logarithm.
            ``bisection`` is the published loop: doubling, arithmetic means, always the whole budget, no bounds.
            ``uncanvas`` is the published loop of the UnlearnCanvas experiment; its utility is an accuracy.
        criterion: By default forget figure 0, any utility.
        alpha0: First step, by default 0.1 (``uncanvas``: 0.4).
        bounds: Smallest and largest step of ``log_bisection``; a first step outside is moved to the nearest bound.
        width: ``log_bisection`` stops when the bracket's ratio is at most this.
        budget: Largest number of probes, by default 24, 10 and 11.
        confirm: Steps above the answer (2, 4 ... times it) that are tried too, within bounds and budget. Bisection
            alone never looks above a step that forgot, so only these can tell that forgetting is not monotone.

    Raises:
        ConfigError: A setting makes no sense.

    Deviates:
        From the public code: its loops log ten probes and choose nothing, do not look at the utility, and stand still
        when the accuracy is not a number. Its UnlearnCanvas loop records the step it computed after the last one it
        tried (:attr:`SearchResult.written`); here the answer is the one that was tried.
    """
    rule = Criterion() if criterion is None else criterion
    first = (0.4 if method == "uncanvas" else 0.1) if alpha0 is None else alpha0
    usual = {"log_bisection": 24, "bisection": 10, "uncanvas": 11}
    if method not in usual:
        raise ConfigError(f"unknown search {method!r}{did_you_mean(method, usual)}")
    most = usual[method] if budget is None else budget
    low, high = bounds
    if not (0 < first < math.inf and 0 < low < high < math.inf and width > 1 and most >= 1):
        given = f"{method}, alpha0 {first}, bounds {bounds}, width {width}, budget {most}"
        raise ConfigError(
            f"a search needs 0 < alpha0, 0 < low < high, width > 1 and a budget of 1 or more, got {given}"
        )
    if method == "uncanvas":
        return _uncanvas(probe, rule, first, most)
    if method == "bisection":
        walk = _plain_walk(first)
    else:
        walk = _log_walk(min(max(first, low), high), low, high, width)
    return _walked(probe, rule, walk, most, method, confirm, high)


def guess_alpha(forget_loss: float, target_loss: float, weight_norm: float, forget_norm: float) -> float:
    """The step that moves the forget loss to ``target_loss`` in first order: ``(target - L_f) / (|theta| |g_f|)``.

    A target is the mean ``1 - cos`` of pairs that do not belong together.

    Raises:
        ConfigError: There is no such positive step.
    """
    slope = weight_norm * forget_norm
    gap = target_loss - forget_loss
    if not (slope > 0 and gap > 0):
        raise ConfigError(f"no first guess of the step: slope {slope:g}, distance to the target loss {gap:g}")
    return gap / slope


#: Yields ``(alpha, bracket)`` and is sent whether that step forgot.
_Walk = Generator[tuple[float, tuple[float, float]], bool, None]


def _plain_walk(alpha: float) -> _Walk:
    lo, hi = 0.0, math.inf
    while True:
        if (yield alpha, (lo, hi)):
            hi = alpha
        else:
            lo = alpha
        alpha = 2 * alpha if math.isinf(hi) else (lo + hi) / 2


def _log_walk(alpha: float, low: float, high: float, width: float) -> _Walk:
    lo, hi = 0.0, math.inf
    while low <= alpha <= high:
        if (yield alpha, (lo, hi)):
            hi = alpha
        else:
            lo = alpha
        if math.isinf(hi):
            alpha = 2 * alpha
        elif lo == 0:
            alpha = alpha / 2
        elif hi / lo > width:
            alpha = math.sqrt(lo * hi)
        else:
            return


def _walked(
    probe: Callable[[float], Probe], rule: Criterion, walk: _Walk, budget: int, method: str, confirm: int, high: float
) -> SearchResult:
    probes: list[Probe] = []
    brackets = []
    step: tuple[float, tuple[float, float]] | None = next(walk)
    while step is not None:
        found = _tried(probe, step[0], rule)
        probes.append(found)
        brackets.append(step[1])
        if len(probes) == budget:
            break
        try:
            step = walk.send(rule.forgotten(found))
        except StopIteration:
            step = None
    lowest = min((p.alpha for p in probes if p.ok), default=math.inf)
    for alpha in [lowest * 2 ** (i + 1) for i in range(confirm)]:
        if alpha <= high and len(probes) < budget:
            probes.append(_tried(probe, alpha, rule))
            brackets.append(brackets[-1])
    last_failure = max((p.alpha for p in probes if not rule.forgotten(p)), default=0.0)
    forgot = [p.alpha for p in probes if rule.forgotten(p) and not p.broken]
    good = [p.alpha for p in probes if p.ok and p.alpha > last_failure]
    monotone = not forgot or last_failure < min(forgot)
    reason = "" if good else _why(probes, rule, bool(forgot))
    return SearchResult(min(good, default=None), monotone, tuple(probes), tuple(brackets), method, reason)


def _uncanvas(probe: Callable[[float], Probe], rule: Criterion, alpha: float, budget: int) -> SearchResult:
    """Stops when everything of the concept is lost and the others' accuracy is within 0.1 of the original."""
    before = rule.original
    if before is None:
        raise ConfigError("the UnlearnCanvas search compares with the utility of the untouched model; give it")
    lo, hi = 0.0, 10 * alpha
    probes: list[Probe] = []
    brackets, done = [], False
    while not done and len(probes) < budget:
        brackets.append((lo, hi))
        found = _tried(probe, alpha, rule)
        utility = found.utility
        if utility is None:
            raise ConfigError("the UnlearnCanvas search needs a utility of every probe")
        lost = found.broken or found.forget == 0
        done = lost and abs(before - utility) < 0.1
        probes.append(replace(found, ok=done))
        if lost and not utility >= before:
            hi, alpha = alpha, (lo + alpha) / 2
        elif not lost and utility > before - 0.01:
            lo, alpha = alpha, (alpha + hi) / 2
    lost_at = [p.alpha for p in probes if p.forget == 0]
    monotone = not any(p.alpha > min(lost_at, default=math.inf) for p in probes if p.forget > 0)
    answer, reason = (probes[-1].alpha, "") if done else (None, _why(probes, rule, bool(lost_at)))
    return SearchResult(answer, monotone, tuple(probes), tuple(brackets), "uncanvas", reason, alpha)


def _tried(probe: Callable[[float], Probe], alpha: float, rule: Criterion) -> Probe:
    found = probe(alpha)
    if found.alpha != alpha:
        raise ConfigError(f"a probe of step {alpha!r} came back as one of step {found.alpha!r}")
    return replace(found, ok=rule.met(found))


def _why(probes: list[Probe], rule: Criterion, forgot: bool) -> str:
    broken = sum(p.broken for p in probes)
    tail = f"; {broken} of them gave figures that are not numbers" if broken else ""
    span = f"{len(probes)} steps from {min(p.alpha for p in probes):.3g} to {max(p.alpha for p in probes):.3g}"
    if not forgot:
        least = min((p.forget for p in probes if not p.broken), default=math.nan)
        return f"no step brought the forget figure to {rule.target:g}; the least was {least:.3g} ({span}{tail})"
    return f"every step that forgot lost too much utility, or a larger one did not forget ({span}{tail})"


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value

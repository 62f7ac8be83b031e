"""The search of the step: answers are tried and succeed, budgets hold, nothing freezes (I10)."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.errors import ConfigError
from expunge.slug.search import Criterion, Probe, guess_alpha, search

NAN = math.nan


def threshold(at: float, *, ruin: float = math.inf) -> object:
    """Forgets from ``at`` on; utility falls to a half from ``ruin`` on."""
    return lambda a: Probe(a, 0.0 if a >= at else 0.6, 0.5 if a >= ruin else 1.0)


@given(
    at=st.floats(1e-4, 12.0),
    ruin=st.floats(1e-4, 12.0),
    method=st.sampled_from(["log_bisection", "bisection"]),
    budget=st.integers(1, 24),
    alpha0=st.floats(1e-3, 2.0),
)
def test_answers_are_tried_and_brackets_shrink(at: float, ruin: float, method: str, budget: int, alpha0: float) -> None:
    tried = []

    def probe(alpha: float) -> Probe:
        tried.append(alpha)
        return threshold(at, ruin=ruin)(alpha)

    rule = Criterion(original=1.0)
    found = search(probe, method=method, criterion=rule, budget=budget, alpha0=alpha0)
    assert len(tried) == len(found.probes) <= budget
    assert found.feasible == (found.alpha is not None) == (found.reason == "")
    if found.feasible:
        assert found.alpha in tried
        assert at <= found.alpha < ruin
        assert found.best.ok
    last = (0.0, math.inf)
    for lo, hi in found.brackets:
        assert lo < at
        assert hi >= at
        assert lo >= last[0]
        assert hi <= last[1]
        last = (lo, hi)


def test_it_finds_the_threshold_to_the_width() -> None:
    found = search(threshold(0.37))
    assert 0.37 <= found.alpha <= 0.37 * 1.05
    loose = search(threshold(0.37), width=1.5)
    assert len(loose.probes) < len(found.probes)
    assert not loose.alpha <= 0.37 * 1.05


def test_utility_makes_it_infeasible() -> None:
    rule = Criterion(original=1.0)
    assert search(threshold(0.3, ruin=0.9), criterion=rule).feasible
    found = search(threshold(0.3, ruin=0.2), criterion=rule)
    assert not found.feasible
    assert found.alpha is None
    assert "lost too much utility" in found.reason
    assert search(threshold(0.3, ruin=0.2)).feasible  # without a utility to keep
    assert search(threshold(0.3, ruin=0.2), criterion=Criterion(original=1.0, drop=0.5)).feasible


def test_never_forgets() -> None:
    found = search(lambda a: Probe(a, 0.25))
    assert not found.feasible
    assert found.monotone
    assert "0.25" in found.reason
    assert max(p.alpha for p in found.probes) <= 8.0


@pytest.mark.parametrize("method", ["log_bisection", "bisection", "uncanvas"])
def test_a_broken_model_does_not_freeze_the_loop(method: str) -> None:
    found = search(lambda a: Probe(a, NAN, NAN), method=method, criterion=Criterion(original=1.0))
    assert not found.feasible
    assert all(p.broken and not p.ok for p in found.probes)
    assert len({p.alpha for p in found.probes}) == len(found.probes)
    assert "not numbers" in found.reason
    json.dumps(found.facts(), allow_nan=False)


def test_broken_steps_above_the_answer_do_no_harm() -> None:
    found = search(lambda a: Probe(a, NAN if a > 0.35 else (0.0 if a >= 0.3 else 0.6)))
    assert 0.3 <= found.alpha <= 0.35
    assert any(p.broken for p in found.probes)


def test_non_monotone_is_flagged_and_the_answer_lies_above_every_failure() -> None:
    def probe(alpha: float) -> Probe:
        return Probe(alpha, 0.0 if 0.3 <= alpha < 0.5 or alpha >= 1.0 else 0.4)

    plain = search(probe)
    assert plain.monotone  # nothing above the answer was tried
    assert 0.3 <= plain.alpha <= 0.315
    found = search(probe, confirm=2)
    assert not found.monotone
    assert len(found.probes) == len(plain.probes) + 2
    assert found.alpha == pytest.approx(4 * plain.alpha)
    assert not search(probe, confirm=1).feasible
    within = search(probe, confirm=2, budget=len(plain.probes))
    assert within.probes == plain.probes
    assert search(threshold(0.3), confirm=2).monotone


def test_the_published_loop_of_unlearn_canvas_may_record_a_step_it_never_tried() -> None:
    found = search(lambda a: Probe(a, 0.0, 0.95), method="uncanvas", criterion=Criterion(original=1.0))
    assert (found.alpha, found.written) == (0.4, 0.2)
    assert [p.alpha for p in found.probes] == [0.4]
    stalled = search(lambda a: Probe(a, 1.0, 0.3), method="uncanvas", criterion=Criterion(original=1.0))
    assert not stalled.feasible
    assert {p.alpha for p in stalled.probes} == {0.4}
    assert len(stalled.probes) == 11


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="unknown search"):
        search(threshold(0.1), method="golden")
    for bad in ({"alpha0": 0.0}, {"alpha0": NAN}, {"bounds": (1.0, 0.5)}, {"width": 1.0}, {"budget": 0}):
        with pytest.raises(ConfigError, match="needs"):
            search(threshold(0.1), **bad)
    with pytest.raises(ConfigError, match="untouched model"):
        search(threshold(0.1), method="uncanvas")
    with pytest.raises(ConfigError, match="without utility"):
        search(lambda a: Probe(a, 0.0), criterion=Criterion(original=1.0))
    with pytest.raises(ConfigError, match="came back"):
        search(lambda a: Probe(a * 2, 0.0))
    with pytest.raises(ConfigError, match="drop"):
        Criterion(drop=1.5)
    with pytest.raises(ConfigError, match="not a number"):
        Criterion(original=NAN)


def test_first_steps_outside_are_moved_to_the_bounds() -> None:
    assert search(threshold(0.3), alpha0=100.0).probes[0].alpha == 8.0
    assert search(threshold(0.3), alpha0=1e-9).probes[0].alpha == 1e-4


def test_first_guess() -> None:
    # dL = lambda |g|^2 = alpha |theta| |g|
    assert guess_alpha(0.2, 0.9, weight_norm=7.0, forget_norm=0.5) == pytest.approx(0.2)
    for bad in ((0.9, 0.2, 7.0, 0.5), (0.2, 0.9, 7.0, 0.0), (0.2, NAN, 7.0, 0.5)):
        with pytest.raises(ConfigError, match="first guess"):
            guess_alpha(*bad)

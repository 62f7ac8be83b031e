"""The mean over several targets of what their reports say, as UnlearnCanvas reports a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from expunge.errors import ConfigError, NotComparableError
from expunge.metrics.estimate import Estimate, mean, not_run
from expunge.report.model import Report

#: The figures that are averaged over targets.
AVERAGED = ("gen_ua", "gen_ua5", "gen_ira", "gen_cra", "gen_cra_all", "fid", "kid", "lpips", "clip_score")


@dataclass(frozen=True)
class Summary:
    """Figures of several targets and their means.

    Args:
        targets: Figures by target, each by registered name.
        means: Mean over the targets, with Student's t interval.
        judge: The judge of all.
    """

    targets: Mapping[str, Mapping[str, Estimate]]
    means: Mapping[str, Estimate]
    judge: str


def summarise(reports: Mapping[str, Report]) -> Summary:
    """Average the figures of one model per target, as UnlearnCanvas does over its styles and over its objects.

    Args:
        reports: Reports of ``expunge judge`` or of runs, by the name of the target.

    Raises:
        ConfigError: Fewer than two reports.
        NotComparableError: No images were judged, or other judges, or targets of several axes.
    """
    if len(reports) < 2:
        raise ConfigError(f"a summary needs reports of at least two targets, got {len(reports)}")
    targets, judges, axes = {}, set(), set()
    for name, report in reports.items():
        row = report.row("after")
        if row is None or report.samples is None or not row.metrics.get("gen_ua", not_run("none")).ran:
            raise NotComparableError(f"{name}: no judged images of a model after forgetting")
        targets[name] = {k: row.metrics[k] for k in AVERAGED if k in row.metrics}
        judges.add(report.samples.judge)
        axes.add(str(report.request.get("axis", "")))
    if len(judges) > 1:
        raise NotComparableError(f"the reports have different judges: {'; '.join(sorted(judges))}")
    if len(axes - {""}) > 1:
        raise NotComparableError(
            f"the targets are of several axes ({', '.join(sorted(axes - {''}))}); average each kind"
        )
    keys = [k for k in AVERAGED if all(k in m and m[k].ran for m in targets.values())]
    return Summary(targets, {k: _mean([m[k] for m in targets.values()]) for k in keys}, *judges)


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    unit = estimates[0].unit
    found = replace(
        mean([float(e.value or 0) for e in estimates], unit=unit), method="mean of targets, t 95 % interval"
    )
    if unit != "%" or found.low is None or found.high is None:
        return found
    return replace(found, low=max(0.0, found.low), high=min(100.0, found.high))

"""The interval protection of BARRIER: match, collect, fold into a closed form, penalise."""

from expunge.protections.interval.collect import CollectSettings, collect
from expunge.protections.interval.loss import IntervalPenalty, PenaltySettings, build, step_size_limit
from expunge.protections.interval.match import Match, find
from expunge.protections.interval.protection import IntervalProtection
from expunge.protections.interval.statistics import Collected, Statistics, load, save

__all__ = [
    "CollectSettings",
    "Collected",
    "IntervalPenalty",
    "IntervalProtection",
    "Match",
    "PenaltySettings",
    "Statistics",
    "build",
    "collect",
    "find",
    "load",
    "save",
    "step_size_limit",
]

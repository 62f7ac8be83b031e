"""The forgetting of a two-tower model in a report, as data: the layers, the search, the neighbours, the cosines.

An edit leaves ``findings`` in this form (all parts optional, plain JSON)::

    {"scores": [{"name", "tower": "vision"|"language"|null, "block": int|null, "part", "weight_norm", "forget_norm",
                 "retain_norm", "inner", "alignment", "importance", "cosine", "excluded": reason or ""}],
     "fronts": {"vision": [names], "language": [names]},
     "searches": [{"layer": name, "tensors": [names], "feasible": bool, "monotone": bool, "alpha": float|null,
                   "lambda": float|null, "original": {"forget", "utility"},
                   "probes": [{"alpha", "forget", "utility", "ok"}], "evaluations": int}],
     "chosen": [{"layer", "tensors", "alpha", "lambda"}],
     "criterion": {...}, "facts": {...}}

``forget`` and ``utility`` are accuracies as fractions in [0, 1], ``null`` where a probe broke the model. ``layer`` is
the tensor whose scores decided; ``tensors`` are all that move together. ``probes`` stand in the order of evaluation.
Entries may have further keys; ``concept`` tells apart the scores, searches and edits of several concepts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from expunge.errors import DataError
from expunge.metrics.estimate import Estimate
from expunge.metrics.neighbours import Neighbours
from expunge.report.gallery import Picture

if TYPE_CHECKING:
    from rich.table import Table

PARTS = ("scores", "fronts", "searches", "chosen", "criterion", "facts")
_NUMBERS = ("weight_norm", "forget_norm", "retain_norm", "inner", "alignment", "importance", "cosine")
_TOWERS = {"vision": "image tower", "language": "text tower"}
_BLOCK = re.compile(r"(?:^|\.)(\d+\..+)$")


def short(name: str) -> str:
    """A tensor's name from its block on, without ``weight``.

    >>> short("visual.transformer.resblocks.9.attn.out_proj.weight"), short("visual_projection.weight")
    ('9.attn.out_proj', 'visual_projection')
    """
    found = _BLOCK.search(name)
    return (found.group(1) if found else name).removesuffix("weight").rstrip("._")


@dataclass(frozen=True)
class CosineMatrices:
    """Mean cosines of the images of some classes (rows) with names (columns), before and after.

    Args:
        rows: Classes of the images.
        columns: Names.
        before: ``[rows][columns]``, untouched model.
        after: The same after forgetting.
        forgotten: Names to mark in rows and columns.

    Raises:
        DataError: Shapes that do not fit, or numbers that are not finite.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    before: tuple[tuple[float, ...], ...]
    after: tuple[tuple[float, ...], ...]
    forgotten: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for table in (self.before, self.after):
            fits = len(table) == len(self.rows) > 0 and all(len(r) == len(self.columns) > 0 for r in table)
            if not fits or not all(_finite(v) for r in table for v in r):
                raise DataError("cosines of a report: finite [rows][columns] expected, before and after alike")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :func:`dataclasses.asdict`."""
        tables = {k: tuple(tuple(row) for row in data[k]) for k in ("before", "after")}
        return cls(**{**data, **{k: tuple(data[k]) for k in ("rows", "columns", "forgotten")}, **tables})


@dataclass(frozen=True)
class Step:
    """Accuracies in percent, by label, at one step size."""

    alpha: float
    values: dict[str, float]


@dataclass(frozen=True)
class ContrastiveSection:
    """What a report shows about a two-tower model; missing parts are left out.

    Args:
        findings: What the edit left, in the form above.
        neighbours: The classes that stay, and what happened to them.
        cosines: Images against names, before and after.
        sweep: Accuracies of the chosen layer over the step size; without it the probes of its search are drawn.
        gallery: A few images with their names before and after.
        note: What is missing and why.

    Raises:
        DataError: Findings in another form, or numbers that are not finite.
    """

    findings: dict[str, Any] = field(default_factory=dict)
    neighbours: Neighbours | None = None
    cosines: CosineMatrices | None = None
    sweep: tuple[Step, ...] = ()
    gallery: tuple[Picture, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        try:
            _check(self.findings)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"findings of a report: malformed: {error!r}") from None
        fits = all(_positive(s.alpha) and all(_finite(v) for v in s.values.values()) for s in self.sweep)
        rows = () if self.neighbours is None else self.neighbours.rows
        if not fits or not all(_finite(r.similarity) and (r.p is None or _finite(r.p)) for r in rows):
            raise DataError("section of a report: steps, accuracies, similarities and p must be finite numbers")

    @property
    def searches(self) -> list[dict[str, Any]]:
        """Searches, the chosen layers first."""
        chosen = {(c["layer"], c.get("concept")) for c in self.findings.get("chosen", ())}
        return sorted(self.findings.get("searches", ()), key=lambda s: (s["layer"], s.get("concept")) not in chosen)

    def label(self, layer: str) -> str:
        """A short name of a layer, with its tower where both have candidates."""
        towers = {s["name"]: s["tower"] for s in self.findings.get("scores", ())}
        word = {"vision": "image ", "language": "text "}.get(towers.get(layer) or "", "")
        return (word if len(self.towers) > 1 else "") + short(layer)

    def front(self, tower: str) -> list[dict[str, Any]]:
        """Scores of the front of a tower, most important first."""
        names, scored = set(self.findings.get("fronts", {}).get(tower, ())), self.scored(tower)
        if any("concept" in s for s in scored):  # the names are those of all concepts: keep each on its own front
            own = [s for s in scored if s["name"] in names and not _beaten(s, scored)]
        else:
            own = [s for s in scored if s["name"] in names]
        return sorted(own, key=lambda s: -s["importance"])

    def is_chosen(self, score: Mapping[str, Any]) -> bool:
        """Was this tensor edited (for the concept of the score)?"""
        return any(_belongs(c, score) for c in self.findings.get("chosen", ()))

    def scored(self, tower: str) -> list[dict[str, Any]]:
        """Scores of the candidates of a tower; a tensor of zeros has no importance and no place on the axes."""
        listed = (s for s in self.findings.get("scores", ()) if s["tower"] == tower and not s["excluded"])
        return [s for s in listed if s["importance"] is not None]

    @property
    def towers(self) -> list[str]:
        """Towers with candidates."""
        return [t for t in _TOWERS if self.scored(t)]

    @property
    def edited(self) -> list[str]:
        """One sentence per edit."""
        found = []
        for c in self.findings.get("chosen", ()):
            names = ", ".join(c["tensors"])
            step = "" if c["alpha"] is None else f", by a step of {100 * c['alpha']:.3g} % of its length"
            found.append(f"Changed: {names}{step}" + ("." if c["lambda"] is None else f" (λ = {c['lambda']:.4g})."))
        return found

    @property
    def candidates_about(self) -> str:
        """How many tensors were scored, and why others were not."""
        scores = self.findings.get("scores", ())
        reasons = [s["excluded"] for s in scores if s["excluded"]]
        counted = ", ".join(f"{r} ({reasons.count(r)})" for r in dict.fromkeys(reasons))
        left = f"; left out: {counted}" if counted else ""
        return f"{len(scores) - len(reasons)} candidate tensors{left}."

    @property
    def search_about(self) -> str:
        """Criterion and outcome of the searches."""
        criterion = _criterion(self.findings.get("criterion", {}))
        searches = self.findings.get("searches", ())
        failed = [short(s["layer"]) for s in searches if not s["feasible"]]
        odd = [short(s["layer"]) for s in searches if not s["monotone"]]
        parts = [
            f"{len(searches)} layers, {sum(s['evaluations'] for s in searches)} evaluations",
            f"criterion: {criterion}" if criterion else "",
            f"no step satisfies it: {', '.join(failed)}" if failed else "",
            f"larger steps failed after smaller ones had succeeded: {', '.join(odd)}" if odd else "",
        ]
        return "; ".join(filter(None, parts)) + "."

    def layers(self) -> list[dict[str, str]]:
        """The fronts as text for a table: name, tower, scores and the outcome of the search."""
        searches = self.findings.get("searches", ())
        found = []
        for tower in _TOWERS:
            for s in self.front(tower):
                result = next((r for r in searches if _belongs(r, s)), None)
                if result is None:
                    text = "not searched"
                else:
                    text = f"α = {result['alpha']:.3g}" if result["feasible"] else "no step satisfies the criterion"
                size = s["forget_norm"] ** 2
                found.append(
                    {
                        "name": s["name"],
                        "tower": _TOWERS[tower],
                        "importance": f"{s['importance']:.3g}",
                        "cosine": f"{s['cosine']:.3g}",
                        "damage": f"{max(0.0, s['inner']) / size:.3g}" if size else "–",
                        "outcome": text + (", chosen" if self.is_chosen(s) else ""),
                    }
                )
        return found

    def neighbour_lines(self) -> list[dict[str, Any]]:
        """The table of neighbours: texts and estimates."""
        if self.neighbours is None:
            return []
        several = len(self.neighbours.forgotten) > 1
        return [
            {
                "name": r.name,
                "damaged": r.damaged,
                "similarity": f"{r.similarity:.2f}" + (f" ({r.nearest})" if several else ""),
                "estimates": (r.before, r.after, r.change, r.taken, r.received),
                "p": _probability(r.p),
            }
            for r in self.neighbours.rows
        ]

    @property
    def neighbours_about(self) -> str:
        """The worst damage, in words."""
        found = self.neighbours
        if found is None:
            return ""
        worst = found.worst
        if worst is None:
            return f"None of the {found.tested} classes with images lost more than chance explains."
        return (
            f"Most damaged: {worst.name}, {worst.change.value:+.1f} points (p = {_probability(worst.p)}; corrected for "
            f"{found.tested} classes {_probability(found.worst_p)})."
        )

    def table(self) -> Table:
        """The neighbours for a terminal."""
        from rich.table import Table
        from rich.text import Text

        from expunge.report.model import clean

        about = self.neighbours_about or "no neighbours were measured"
        names = [] if self.neighbours is None else list(self.neighbours.forgotten)
        table = Table(title=Text(clean(f"Classes near {', '.join(names)}", 200)), caption=Text(clean(about, 400)))
        table.add_column("class")
        for heading in ("similarity", "n", "before %", "after %", "change, points", "p", "called forgotten %"):
            table.add_column(heading, justify="right")
        table.add_column("of forgotten images %", justify="right")
        for line in self.neighbour_lines():
            before, after, change, taken, received = (_brief(e) for e in line["estimates"])
            n = str(line["estimates"][0].n)
            name = Text(clean(line["name"], 60), style="bold" if line["damaged"] else "")
            texts = (clean(line["similarity"], 60), n, before, after, change, line["p"], taken, received)
            table.add_row(name, *map(Text, texts))
        return table

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :func:`dataclasses.asdict`.

        Raises:
            DataError: Parts that do not fit.
            TypeError: Missing or unknown keys.
        """
        near, cosines = data.get("neighbours"), data.get("cosines")
        made = {
            "neighbours": None if near is None else Neighbours.from_dict(near),
            "cosines": None if cosines is None else CosineMatrices.from_dict(cosines),
            "sweep": tuple(Step(**s) for s in data.get("sweep", ())),
            "gallery": tuple(Picture.from_dict(p) for p in data.get("gallery", ())),
        }
        return cls(**{**data, **made})


def _finite(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _positive(x: Any) -> bool:
    return _finite(x) and x > 0


def _belongs(entry: Mapping[str, Any], score: Mapping[str, Any]) -> bool:
    same = score.get("concept") is None or score["concept"] == entry.get("concept")
    return bool(entry["layer"] == score["name"] and same)


def _beaten(s: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> bool:
    mine = (o for o in others if o.get("concept") == s.get("concept"))
    return any(o["alignment"] < s["alignment"] and o["importance"] > s["importance"] for o in mine)


def _criterion(given: Mapping[str, Any]) -> str:
    """The criterion in words where its keys are those of the step search, else as it is."""
    target, top, drop, utility = (given.get(k) for k in ("target", "top_k", "utility_drop", "utility"))
    if _finite(target) and isinstance(top, int):
        found = (
            f"at most {100 * float(given['target']):.3g} % of the forgotten images have their name among the best {top}"
        )
        if _finite(utility) and _finite(drop):
            least = 100 * float(given["utility"]) * (1 - float(given["utility_drop"]))
            found += f", and at least {least:.3g} % of the others are named correctly"
        return found
    known = {k: v for k, v in given.items() if v is not None}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in known.items())


def _brief(e: Estimate) -> str:
    if e.value is None or e.low is None or e.high is None:
        return "–"
    return f"{e.value:.1f} [{e.low:.0f}, {e.high:.0f}]"


def _probability(p: float | None) -> str:
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _texts(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(v, str) for v in values) and not isinstance(values, str)


def _check(findings: Mapping[str, Any]) -> None:
    """Refuse findings of another form, naming the entry."""
    unknown = sorted(set(findings) - set(PARTS))
    if unknown:
        raise DataError(f"findings of a report: unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")

    def need(fits: bool, what: str) -> None:
        if not fits:
            raise DataError(f"findings of a report: {what}")

    for s in findings.get("scores", ()):
        need(isinstance(s["name"], str) and isinstance(s["excluded"], str), "a score needs 'name' and 'excluded'")
        need(s["tower"] in (*_TOWERS, None), f"{s['name']}: tower {s['tower']!r}")
        # A tensor that was left out may have no scores.
        zeros = s.get("importance", 0) is None and s.get("weight_norm") == 0
        fits = all(_finite(s[k]) or (zeros and k == "importance") for k in _NUMBERS) if not s["excluded"] else True
        need(fits, f"{s['name']}: a score is not finite")
    known = {s["name"] for s in findings.get("scores", ())}
    for tower, names in findings.get("fronts", {}).items():
        need(tower in _TOWERS and _texts(names) and set(names) <= known, f"front {tower!r} names unscored tensors")
    for s in findings.get("searches", ()):
        need(_one_layer(s), f"search of {s['layer']!r}: 'layer', 'tensors' and 'alpha' do not fit")
        need(s["alpha"] is not None or not s["feasible"], f"search of {s['layer']!r}: feasible without a step")
        need(isinstance(s["evaluations"], int), f"search of {s['layer']!r}: 'evaluations' is a count")
        _shares(s["original"], f"search of {s['layer']!r}", need)
        for p in s["probes"]:
            need(_positive(p["alpha"]) and isinstance(p["ok"], bool), f"search of {s['layer']!r}: probe {p}")
            _shares(p, f"search of {s['layer']!r}", need)
    for c in findings.get("chosen", ()):
        need(_one_layer(c), f"chosen layer {c['layer']!r}: 'layer', 'tensors' and 'alpha' do not fit")
    need(all(isinstance(findings.get(k, {}), Mapping) for k in ("criterion", "facts")), "'criterion' is a mapping")


def _one_layer(entry: Mapping[str, Any]) -> bool:
    steps: Iterable[Any] = (entry["alpha"], entry["lambda"])
    numbers = all(x is None or _finite(x) for x in steps) and (entry["alpha"] is None or entry["alpha"] > 0)
    return isinstance(entry["layer"], str) and _texts(entry["tensors"]) and numbers


def _shares(values: Mapping[str, Any], where: str, need: Any) -> None:
    for key in ("forget", "utility"):
        x = values[key]
        need(x is None or (_finite(x) and -1e-6 <= x <= 1 + 1e-6), f"{where}: {key} {x!r} is no fraction in [0, 1]")

"""SLUG at work: scores, fronts, searches, choice, verification."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from expunge.context import Context
from expunge.digest import json_digest, tensor_digest
from expunge.edits.gradients import add
from expunge.errors import ConfigError, DivergedError, InvariantError, NoEffectError, RequestError
from expunge.models.towers import TOWERS, Tower, Towers
from expunge.patch.changes import Change, LowRank, accumulate_dtype, smallest
from expunge.patch.low_rank import compress
from expunge.slug.differentiate import Loader
from expunge.slug.evaluation import Target, forget_pairs, one_text, retain_pairs, search_set, targets_of, two_towers
from expunge.slug.gradient_cache import cached_gradients, gradient_key
from expunge.slug.gradients import Gradients, assert_ascent, forget_gradient, retain_gradient
from expunge.slug.pareto import front
from expunge.slug.pick import expand, pick
from expunge.slug.probes import FullProbe, Prober, SuffixProbe, edited
from expunge.slug.published import Variant, published_gradients
from expunge.slug.scores import Consumer, LayerScore, candidate_names, candidates, score_layers
from expunge.slug.search import Criterion, Probe, search
from expunge.slug.steps import (
    Direction,
    Trial,
    choose,
    choose_distinct,
    figures_of,
    infeasible,
    probing,
    trade_off,
)
from expunge.spaces.base import OpenSpace
from expunge.tasks.clip import ClipTask

if TYPE_CHECKING:
    from expunge.slug.edit import SLUG

#: Classes from which on the published top-5 accuracy steers the search.
MANY_CLASSES = 50
#: Common factors of the steps of several concepts.
_SCALES = (0.125, 8.0)


class Work:
    """One run of the edit."""

    def __init__(self, settings: SLUG, ctx: Context, space: OpenSpace) -> None:
        self.s, self.ctx, self.space = settings, ctx, space
        self.task: ClipTask = two_towers(ctx, "slug")
        self.towers: Towers = self.task.towers
        self.published = settings.profile == "as_published"
        self.sides: tuple[Tower, ...] = TOWERS if settings.towers == "both" else (settings.towers,)
        self.consumer = self._consumer()
        self.targets = targets_of(ctx, self.task, settings.concept, singly=settings.one_layer_each)
        axes: Literal["own", "all"] = "own" if self.published else settings.utility_axes
        data, self.rows = search_set(
            ctx, self.task, self.targets, settings.forget_images, settings.utility_images, axes
        )
        top_k = settings.top_k or (5 if self.published or data.n_classes >= MANY_CLASSES else 1)
        if top_k >= data.n_classes:
            raise ConfigError(f"'top_k' is {top_k}, and with {data.n_classes} classes every image is among them")
        self.suffix = SuffixProbe(self.towers, data, top_k=top_k, memory=settings.memory)
        self.full = FullProbe(self.towers, data, top_k=top_k)
        self.findings: dict[str, Any] = {"scores": [], "fronts": {}, "searches": [], "chosen": []}
        self.facts: dict[str, Any] = {}
        self.scale = 1.0

    def _consumer(self) -> Consumer | None:
        if self.s.hidden_state == -1:
            return None
        if self.s.towers == "both":
            raise RequestError("'hidden_state' says what a consumer of one tower reads; set 'towers' to that tower")
        return Consumer(self.s.towers, self.s.hidden_state, final_norm=self.s.towers == "language", projection=False)

    def run(self) -> dict[str, Change]:
        """Everything in order."""
        trials: dict[str, list[Trial]] = {}
        for i, target in enumerate(self.targets):
            trials[target.name] = self._search(target, self.rows[i])
        chosen = self._choose(trials)
        self.scale = scale = self._joint_scale(chosen)
        deltas = self._union(chosen, scale)
        for target in self.targets:
            trial = chosen[target.name]
            assert trial.best is not None
            alpha = scale * trial.best.alpha
            self._check_sign(target, trial.direction.deltas(alpha))
            row = {"layer": trial.layer, "tensors": list(trial.direction.gradient), "alpha": alpha}
            self.findings["chosen"].append({**row, "lambda": trial.direction.factor(alpha), "concept": target.name})
        changes = self._verified(deltas, chosen)
        self._report(chosen)
        return changes

    def _union(self, chosen: Mapping[str, Trial], scale: float) -> dict[str, Tensor]:
        """The changes of all concepts, added where they share a tensor."""
        deltas: dict[str, Tensor] = {}
        for trial in chosen.values():
            assert trial.best is not None
            add(deltas, trial.direction.deltas(scale * trial.best.alpha))
        return deltas

    def _joint_scale(self, chosen: Mapping[str, Trial]) -> float:
        """A common factor of all steps with which the changes of several concepts meet the criterion together.

        1 if they do as they are, or if no factor helps; then :meth:`_verified` says so.
        """
        if len(chosen) == 1:
            return 1.0

        def tried(scale: float) -> Probe:
            every = [figures_of(self.suffix, self._union(chosen, scale), rows) for rows in self.rows]
            return Probe(scale, max(f.forget for f in every), every[0].utility)

        rule = self._criterion(next(iter(chosen.values())).original.utility)
        if rule.met(tried(1.0)):
            return 1.0
        found = search(tried, criterion=rule, alpha0=1.0, bounds=_SCALES)
        if found.alpha is None:
            return 1.0
        self.facts["joint_scale"] = found.alpha
        self.ctx.note(f"all steps were multiplied by {found.alpha:.3g} to meet the criterion together")
        return found.alpha

    # -- scores ----------------------------------------------------------------------------------------------------

    def _gradients(self, target: Target) -> tuple[Gradients, float]:
        """Gradients, and the sign of the multiplier that forgets."""
        s = self.s
        forget = self._pairs(target)
        retain = retain_pairs(self.ctx, self.task, s.batch_size, s.retain_limit)
        names = [n for n in self._names() if n in self.space.parameters]
        if not names:
            raise RequestError("none of the layers that slug may choose from lies in the recipe's space")

        def fresh() -> Gradients:
            if self.published:
                variant: Variant = "openclip" if self.towers.library == "open_clip" else "as_published"
                prompt = one_text(self.task, target) if variant == "as_published" else None
                found = published_gradients(self.towers, forget, retain, variant=variant, prompt=prompt)
                kept = [{n: g[n] for n in names} for g in (found.forget, found.retain)]
                return Gradients(kept[0], kept[1], found.facts)
            side = None if s.towers == "both" else s.towers
            f, about_f = forget_gradient(self.towers, forget, side, names=names)
            r, about_r = retain_gradient(self.towers, retain, side, names=names, batch_size=s.retain_batch)
            return Gradients(f, r, {"forget": about_f, "retain": about_r})

        settings = s.model_dump(
            include={"forget_text", "concept", "retain_batch", "retain_limit", "batch_size", "profile"}
        )
        found = self._cached(fresh, {**settings, "concept": target.name, "names": names}, target)
        sign = float(found.facts.get("sign", 1.0))
        for name in names:
            mask = self.space.mask(name)
            if mask is not None:
                found.forget[name] = torch.where(mask.to(found.forget[name].device), found.forget[name], 0.0)
        return found, sign if s.direction == "ascent" else -sign

    def _cached(self, fresh: Callable[[], Gradients], settings: dict[str, Any], target: Target) -> Gradients:
        if self.s.cache is None:
            return fresh()
        ids = json_digest([target.ids.tolist(), self.ctx.split["retain"].tolist(), self.ctx.seed])
        key = gradient_key(self.ctx.model, {"data": self.task.data_digest(), "ids": ids}, settings)
        found, how = cached_gradients(key, fresh, Path(self.s.cache))
        if how not in ("cached", "computed"):
            self.ctx.note(how)
        sides = [{n: g.to(self.task.device) for n, g in own.items()} for own in (found.forget, found.retain)]
        return Gradients(sides[0], sides[1], found.facts)

    def _pairs(self, target: Target) -> Loader:
        text = "name" if self.published and self.towers.library == "transformers" else self.s.forget_text
        return forget_pairs(self.ctx, self.task, target, self.s.batch_size, text)

    def _names(self) -> list[str]:
        norms = "include" if self.published and self.towers.library == "open_clip" else self.s.norms
        found = candidate_names(self.towers, norms=norms, consumer=self.consumer)
        return [n for n in found if self.towers.place(n).tower in self.sides]

    def _layers(self, scores: list[LayerScore], concept: str) -> list[LayerScore]:
        """Layers to search; all scores and the fronts go to the findings."""
        only = self.s.layers if isinstance(self.s.layers, tuple) else ()
        norms = "include" if self.published and self.towers.library == "open_clip" else self.s.norms
        kept, out = candidates(self.towers, scores, norms=norms, consumer=self.consumer, only=only)
        fronts = {side: front(kept, side) for side in self.sides}
        about = {"concept": concept} if self.s.one_layer_each else {}
        for score in scores:
            row = {k: v for k, v in score.row().items() if k in _SCORE_KEYS}
            self.findings["scores"].append({**row, "excluded": out.get(score.name, ""), **about})
        for side, members in fronts.items():
            names = self.findings["fronts"].setdefault(side, [])
            names += [m.name for m in members if m.name not in names]
        if only or self.s.layers == "all":
            return kept
        if self.s.layers == "random":
            return [kept[self.ctx.key("slug random layer") % len(kept)]] if kept else []
        if self.s.layers == "deepest":
            return [p for m in fronts.values() for p in pick(m, "deepest", published=self.published)]
        return [m for members in fronts.values() for m in members]

    # -- search ----------------------------------------------------------------------------------------------------

    def _search(self, target: Target, rows: Tensor) -> list[Trial]:
        gradients, sign = self._gradients(target)
        scores = score_layers(self.towers, gradients.forget, gradients.retain, published=self.published)
        layers = self._layers(scores, target.name)
        self.facts.setdefault("gradients", {})[target.name] = gradients.facts
        trials = []
        for score in self._shown(sorted(layers, key=self._depth), target.name):
            tensors = self._group(score, gradients)
            direction = Direction(score, {n: gradients.forget[n] for n in tensors}, sign)
            self.suffix.prepare(tensors)
            before = figures_of(self.suffix, {}, rows)
            if before.forget <= self.s.target:
                raise NoEffectError(
                    f"the model does not know '{target.name}': its accuracy among the top {self.suffix.top_k} is "
                    f"{before.forget:.2f} on the forget images before any change, and the target is {self.s.target:g}"
                )
            found = search(
                probing(self.suffix, direction, rows),
                method="bisection" if self.published else self.s.search,
                criterion=self._criterion(before.utility),
                budget=self.s.budget,
            )
            trials.append(Trial(target.name, direction, before, found))
            self.findings["searches"].append(trials[-1].facts())
        return trials

    def _shown(self, layers: list[LayerScore], concept: str) -> Iterable[LayerScore]:
        """The layers, with a progress bar on a terminal if the run asks for one."""
        if not (self.ctx.progress and sys.stderr.isatty()):
            return layers
        from rich.console import Console
        from rich.progress import track

        return track(layers, f"steps for '{concept}'", console=Console(stderr=True), transient=True)

    def _criterion(self, utility: float) -> Criterion:
        drop = None if self.published else self.s.utility_drop
        if self.s.search == "uncanvas" and not self.published:
            return Criterion(self.s.target, 1.0 if drop is None else drop, utility)
        return Criterion(self.s.target) if drop is None else Criterion(self.s.target, drop, utility)

    def _depth(self, score: LayerScore) -> tuple[str, int]:
        last = self.towers.depth(score.tower) if score.tower is not None else 0
        return str(score.tower), last if score.block is None else score.block

    def _group(self, score: LayerScore, gradients: Gradients) -> list[str]:
        """Tensors that move together; the picked one comes with the others of its kind."""
        joint = {"qkv": ("q", "k", "v"), "mlp": ("fc1", "fc2")}
        whole = any(score.part in joint[g] for g in self.s.group.split("+") if g in joint)
        names = expand(score.name, self.towers.parameters(), "whole" if whole else "tensor")
        missing = [n for n in names if n not in gradients.forget]
        if missing:
            raise RequestError(f"'{missing[0]}' moves together with '{score.name}', but the recipe's space excludes it")
        return names

    def _choose(self, trials: Mapping[str, Sequence[Trial]]) -> dict[str, Trial]:
        """One trial per concept."""
        chosen: dict[str, Trial] = {}
        if self.s.one_layer_each:
            chosen, shared = choose_distinct(trials)
            for concept in shared:
                self.ctx.note(f"'{concept}' has no layer of its own; its change adds to another one's")
        else:
            for concept, own in trials.items():
                best = choose(own)
                if best is not None:
                    chosen[concept] = best
        for concept, own in trials.items():
            if concept in chosen:
                continue
            usable = [t for t in own if t.best is not None]
            if self.s.on_infeasible == "error" or not usable:
                utility = own[0].original.utility if own else 0.0
                raise infeasible(own, self._criterion(utility))
            chosen[concept] = max(usable, key=_merit)
            self.ctx.note(f"no step forgets '{concept}' within the criterion; the best trade-off was taken")
        return chosen

    # -- verification ----------------------------------------------------------------------------------------------

    def _check_sign(self, target: Target, deltas: Mapping[str, Tensor]) -> None:
        up = deltas if self.s.direction == "ascent" else {n: -d for n, d in deltas.items()}
        slope = assert_ascent(self.towers, self._pairs(target), up)
        self.facts.setdefault("slope", {})[target.name] = slope if self.s.direction == "ascent" else -slope

    def _verified(self, deltas: Mapping[str, Tensor], chosen: Mapping[str, Trial]) -> dict[str, Change]:
        """The changes, re-applied to the untouched weights and measured without any cache."""
        wide = {n: d.detach().to(accumulate_dtype(d.dtype)) for n, d in deltas.items()}
        for name, delta in wide.items():
            if not bool(torch.isfinite(delta).all()):
                raise DivergedError(f"slug: the change of '{name}' is not finite; the model is left as it was")
        masked = {n for n in wide if self.space.mask(n) is not None}
        forms = {n: smallest(d) if n in masked else compress(d) for n, d in wide.items()}
        changes = {n: c for n, c in forms.items() if c is not None}
        met = self._measure(changes, chosen)
        if not met and any(isinstance(c, LowRank) for c in changes.values()):
            changes = {n: c for n, d in wide.items() if (c := smallest(d)) is not None}
            met = self._measure(changes, chosen)
        feasible = all(t.result.feasible for t in chosen.values())
        if met or not feasible:
            return changes
        told = "; ".join(f"'{c}': {v}" for c, v in self.facts["verified"].items())
        if len(chosen) == 1:
            raise InvariantError(f"slug: the chosen step does not meet the criterion when measured anew: {told}")
        if self.s.on_infeasible == "error":
            raise NoEffectError(
                f"slug: each concept is forgotten by its own layer, but not all of them together: {told}. Name other "
                "'layers', allow a larger 'utility_drop', or set on_infeasible='best'"
            )
        self.ctx.note(f"the layers together do not meet the criterion: {told}")
        return changes

    def _measure(self, changes: Mapping[str, Change], chosen: Mapping[str, Trial]) -> bool:
        dense = {n: c.dense() for n, c in changes.items()}
        verified, met = {}, True
        for i, target in enumerate(self.targets):
            found = figures_of(self.full, dense, self.rows[i])
            if math.isnan(found.forget) or math.isnan(found.utility):
                raise DivergedError("slug: the edited model gives logits that are not finite")
            verified[target.name] = {"forget": found.forget, "utility": found.utility}
            rule = self._criterion(chosen[target.name].original.utility)
            met &= found.forget <= rule.target
            met &= rule.original is None or found.utility >= (1 - rule.drop) * rule.original
        self.facts["verified"] = verified
        with edited(self.towers, dense):
            parameters = self.towers.parameters()
            self.facts["digests"] = {n: tensor_digest(parameters[n]) for n in dense}
        self.facts["changes"] = {n: {"kind": c.kind, "bytes": c.nbytes} for n, c in changes.items()}
        return bool(met)

    def _report(self, chosen: Mapping[str, Trial]) -> None:
        data, prober = self.suffix.data, self.suffix
        rule = self._criterion(next(iter(chosen.values())).original.utility)
        if len(self.targets) > 1:
            self.facts["interaction"] = self._interaction(prober, chosen)
        for text in prober.notes:
            self.ctx.note(text)
        self.facts |= {
            "classes": data.n_classes,
            "forget_images": len(data.forget),
            "utility_images": len(data.utility),
            "direction": self.s.direction,
        }
        criterion = {
            "target": rule.target,
            "top_k": prober.top_k,
            "utility_drop": None if rule.original is None else rule.drop,
            "utility": rule.original,
        }
        self.ctx.findings["slug"] = {**self.findings, "criterion": criterion, "facts": self.facts}
        where = ", ".join(f"{c['layer']} (alpha {c['alpha']:.3g})" for c in self.findings["chosen"])
        self.ctx.note(f"slug edits {where}")

    def _interaction(self, prober: Prober, chosen: Mapping[str, Trial]) -> dict[str, dict[str, float | None]]:
        """Forget accuracy of every concept under every concept's own change."""
        table: dict[str, dict[str, float | None]] = {}
        for i, target in enumerate(self.targets):
            table[target.name] = {}
            for other, trial in chosen.items():
                assert trial.best is not None
                deltas = trial.direction.deltas(self.scale * trial.best.alpha)
                figures = figures_of(prober, deltas, self.rows[i])
                table[target.name][other] = None if math.isnan(figures.forget) else figures.forget
        return table


_SCORE_KEYS = (
    "name",
    "tower",
    "block",
    "part",
    "weight_norm",
    "forget_norm",
    "retain_norm",
    "inner",
    "alignment",
    "importance",
    "cosine",
)


def _merit(trial: Trial) -> tuple[float, float]:
    assert trial.best is not None
    return trade_off(trial.best, trial.original), -trial.best.alpha

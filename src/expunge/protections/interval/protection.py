"""The interval protection as a part of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from expunge import rng
from expunge.context import Context
from expunge.errors import RequestError
from expunge.objectives.base import Term
from expunge.part import part
from expunge.protections.base import Penalty, Protection
from expunge.protections.interval.collect import CollectSettings, collect
from expunge.protections.interval.loss import IntervalPenalty, PenaltySettings, ProtectedLayer, build
from expunge.protections.interval.match import SUPPORTED, find_in
from expunge.protections.interval.published import build_published, collect_published
from expunge.protections.interval.regions import IntervalMode, Region
from expunge.protections.interval.rows import ConvRows
from expunge.protections.interval.statistics import Collected, load, span
from expunge.registry import Info
from expunge.spaces.base import OpenSpace
from expunge.tasks.base import Batch

_LIMIT_UP_TO = 1024


@part(
    "interval",
    Info(
        "Penalise the drift of chosen layers on regions around their forget inputs.",
        paper="Miksa et al., BARRIER: Bounded Activation Regions for Robust Information Erasure, arXiv 2605.15737",
        upstream="OneAndZero24/BARRIER",
        commit="e4f2367",
        needs=("forget",),
        deviations=(
            "one envelope box instead of two corner boxes, so the value does not depend on signs of singular vectors",
            "residual energy as a covariance instead of a scatter, so lambda does not depend on the number of rows",
            "no directions beyond the numerical rank, canonical signs",
            "convolutions are measured on unfolded patches, so every tap is protected",
            "an unmatched or unsupported target is an error; NaN inputs are an error instead of 0",
            "profile as_published restores all of it",
        ),
        aliases=("barrier", "intact"),
    ),
)
class IntervalProtection(Protection):
    """``lambda / L * sum over layers (mean + residual + interval + floor + retain)`` of the weight drift.

    Args:
        targets: Class names, parts of qualified names, globs or ``re:`` expressions, see
            :func:`expunge.protections.interval.match.find`.
        lambda_interval: Factor of the whole penalty.
        lower_percentile: Lower quantile level of the forget projections.
        upper_percentile: Upper quantile level.
        reduced_dim: Leading directions, at most.
        infinity_scale: Margin of the envelope beyond the quantiles, in units of projected activations.
        use_actual_bounds: Envelope = range of forget and retain projections instead.
        normalize_protection: Divide by the number of layers.
        skip_svd: Raw coordinates instead of directions.
        skip_interval: No interval part (has no effect with ``skip_svd``, as published).
        remove_top_directions: No leading directions, only mean and residual.
        decomp_method: ``svd`` or ``pca``; they differ in the published profile only.
        profile: ``recommended`` or ``as_published``.
        region: Region family; by default ``env_box``, or ``two_corner`` as published.
        interval_mode: ``full``, ``width_only``, ``centre_only`` or ``off``.
        normalize_region: Divide the interval part by its number of squared terms.
        include_db: Add the bias drift to the interval part.
        residual_scaling: ``covariance`` or ``scatter``; the default follows the profile.
        conv_rows: ``patches`` or ``channels`` (1 x 1 kernels only).
        floor: Weight of an isotropic floor, which also covers directions without forget energy.
        retain_weight: Weight of the expected drift on retain inputs, per output.
        include_mean: Keep the mean part.
        include_residual: Keep the residual part.
        passes: 2 passes the forget set twice for finer quantiles where it exceeds the row sample.
        draws: For diffusion models: how many times and noises of each sample the statistics are taken over.
        batch_size: Samples per forward pass of the collection.
        statistics: File with statistics from an earlier collection, instead of collecting.
    """

    targets: tuple[str, ...] = Field(min_length=1)
    lambda_interval: float = Field(default=10.0, ge=0)
    lower_percentile: float = Field(default=0.05, ge=0, le=1)
    upper_percentile: float = Field(default=0.95, ge=0, le=1)
    reduced_dim: int = Field(default=32, ge=1)
    infinity_scale: float = Field(default=20.0, ge=0)
    use_actual_bounds: bool = False
    normalize_protection: bool = True
    skip_svd: bool = False
    skip_interval: bool = False
    remove_top_directions: bool = False
    decomp_method: Literal["svd", "pca"] = "svd"
    profile: Literal["recommended", "as_published"] = "recommended"
    region: Region | None = None
    interval_mode: IntervalMode = "full"
    normalize_region: bool = False
    include_db: bool = False
    residual_scaling: Literal["covariance", "scatter"] | None = None
    conv_rows: ConvRows = "patches"
    floor: float = Field(default=0.0, ge=0)
    retain_weight: float = Field(default=0.0, ge=0)
    include_mean: bool = True
    include_residual: bool = True
    passes: Literal[1, 2] = 1
    draws: int = Field(default=1, ge=1)
    batch_size: int = Field(default=256, ge=1)
    statistics: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> IntervalProtection:
        if self.lower_percentile >= self.upper_percentile:
            raise ValueError(
                f"lower_percentile {self.lower_percentile} must be below upper_percentile {self.upper_percentile}"
            )
        if self.profile == "as_published":
            if self.residual_scaling == "covariance" or self.floor or self.retain_weight:
                raise ValueError("profile as_published has scatter scaling and neither floor nor retain part")
            if self.interval_mode != "full" or self.region not in (None, "two_corner") or self.include_db:
                raise ValueError("profile as_published has the two_corner region in full mode only")
        return self

    def collect_settings(self, seed: int = 0) -> CollectSettings:
        """What :meth:`bind` collects."""
        published = self.profile == "as_published"
        return CollectSettings(
            lower=self.lower_percentile,
            upper=self.upper_percentile,
            reduced_dim=self.reduced_dim,
            margin=self.infinity_scale,
            actual_bounds=self.use_actual_bounds,
            skip_svd=self.skip_svd,
            remove_top=self.remove_top_directions,
            conv="channels" if published else self.conv_rows,
            residual=self.residual_scaling or ("scatter" if published else "covariance"),
            retain_moments=self.retain_weight > 0,
            passes=self.passes,
            seed=seed,
        )

    def penalty_settings(self, seed: int = 0) -> PenaltySettings:
        """Weights and options of the penalty."""
        return PenaltySettings(
            lambda_interval=self.lambda_interval,
            normalize=self.normalize_protection,
            region=self.region or ("two_corner" if self.profile == "as_published" else "env_box"),
            mode=self.interval_mode,
            normalize_region=self.normalize_region,
            include_db=self.include_db,
            mean=float(self.include_mean),
            residual=float(self.include_residual),
            interval=0.0 if self.skip_interval and not self.skip_svd else 1.0,
            floor=self.floor,
            retain=self.retain_weight,
            seed=seed,
        )

    def bind(self, ctx: Context, space: OpenSpace) -> Penalty:
        """Collect on the untouched model and return the penalty.

        Raises:
            RequestError: No layer matches, a layer cannot be protected, or a protected weight cannot move here.
            DataError: A forget input is not finite, or a layer never runs.
        """
        layers = self._layers(ctx, space)
        statistics = self._statistics(ctx, layers)
        self._note_free(ctx, statistics)
        penalty = self.penalty(ctx.model, layers, statistics, ctx.seed)
        closed = [v for v in penalty.layers.values() if isinstance(v, ProtectedLayer)]
        if len(closed) == len(penalty.layers) and max(v.form.H.shape[-1] for v in closed) <= _LIMIT_UP_TO:
            ctx.note(
                f"interval penalty: plain SGD is stable for lr < {penalty.step_size_limit():.3g} (times 1 + momentum)"
            )

        def term() -> dict[str, Term]:
            return {"interval": Term(penalty())}

        return term

    def penalty(
        self, model: nn.Module, layers: dict[str, nn.Module], statistics: Collected, seed: int = 0
    ) -> IntervalPenalty:
        """The penalty for given statistics, with the present weights as snapshot."""
        missing = [n for n in layers if n not in statistics]
        if missing:
            raise RequestError(f"no statistics for protected layers {missing[:5]}; they cover {sorted(statistics)[:5]}")
        settings = self.penalty_settings(seed)
        if self.profile == "as_published":
            return build_published(layers, statistics, settings, skip_svd=self.skip_svd)
        return build(layers, statistics, settings, conv=self.conv_rows)

    def _note_free(self, ctx: Context, statistics: Collected) -> None:
        """Say where most directions have neither forget energy nor anything else that holds them."""
        if self.floor or self.retain_weight or self.skip_svd:
            return
        spans: dict[int, int] = {}  # layers with the same input share their statistics
        free = []
        for name, groups in statistics.items():
            for s in groups:
                if id(s) not in spans:
                    spans[id(s)] = span(s)
                if 2 * spans[id(s)] < s.mean.numel():
                    free.append(f"'{name}': {spans[id(s)]} of {s.mean.numel()}")
        if free:
            ctx.note(
                f"interval penalty: the forget inputs of {len(free)} layers span less than half of their directions "
                f"({free[0]}); drift along the others is free unless floor or retain_weight is set"
            )

    def _layers(self, ctx: Context, space: OpenSpace) -> dict[str, nn.Module]:
        published = self.profile == "as_published"
        found = find_in(ctx, self.targets, "as_published" if published else "as_intended")
        layers = {n: m for n, m in found.layers.items() if isinstance(m, SUPPORTED)}
        if not layers:
            raise RequestError(f"targets {list(self.targets)} select no Linear or Conv2d layer")
        loose = [n for n, m in found.unsupported.items() if any(True for _ in m.parameters(recurse=False))]
        if loose:
            raise RequestError(
                f"targets {list(self.targets)} also name {loose[:3]}, which has weights that cannot be protected; "
                f"name Linear and Conv2d layers only"
            )
        own = {id(p) for p in space.parameters.values()}
        still = [n for n, m in layers.items() if id(m.weight) not in own]
        if still:
            raise RequestError(
                f"protected layers {still[:5]} do not move in this space, so protecting them does nothing; "
                f"add them to the space or take them out of targets"
            )
        if not published and self.conv_rows == "channels":
            big = [
                n for n, m in layers.items() if isinstance(m, nn.Conv2d) and (m.kernel_size != (1, 1) or m.groups > 1)
            ]
            if big:
                raise RequestError(f"conv_rows 'channels' fits 1 x 1 kernels only, not {big[:3]}; use 'patches'")
        return layers

    def _statistics(self, ctx: Context, layers: dict[str, nn.Module]) -> Collected:
        if self.statistics is not None:
            return load(Path(self.statistics))
        settings = self.collect_settings(ctx.seed)
        if self.draws > 1 and not ctx.task.counts_draws:
            raise RequestError(f"'draws' would have no effect: the {ctx.task.name} task draws no times and noise")

        def passes(role: str) -> Callable[[], Iterable[Any]]:
            return lambda: drawn_again(ctx, role, self.batch_size, self.draws)

        retain = passes("retain") if self.use_actual_bounds or self.retain_weight else None
        if self.profile == "as_published":
            return collect_published(
                ctx.model, layers, ctx.task.predict, passes("forget"), settings, self.decomp_method, retain
            )
        return collect(ctx.model, layers, ctx.task.predict, passes("forget"), settings, retain)


def drawn_again(ctx: Context, role: str, batch_size: int, draws: int) -> Iterator[Batch]:
    """``draws`` passes over a role, each with other times and noise."""
    for number in range(draws):
        for batch in ctx.batches(role, batch_size):
            yield replace(batch, key=rng.key(batch.key, "statistics", number)) if number else batch

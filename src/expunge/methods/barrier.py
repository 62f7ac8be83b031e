"""BARRIER: an unlearning objective on a few layers whose drift is bounded on regions of their inputs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from expunge.method import method
from expunge.methods._common import Mixing, Pseudo, make_objective
from expunge.protections.interval.protection import IntervalProtection
from expunge.protections.interval.regions import IntervalMode, Region
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.spaces.matched import MatchedLayers

#: Defaults of this method.
OPTIM = Optim(lr=1e-3, epochs=10, weight_decay=0.0)


@method(
    "barrier",
    Info(
        "Random labels (or another objective) on named layers, with an interval penalty on their drift.",
        paper="Miksa et al., BARRIER: Bounded Activation Regions for Robust Information Erasure, arXiv 2605.15737",
        upstream="OneAndZero24/BARRIER",
        commit="e4f2367",
        needs=("forget",),
        deviations=(
            "one envelope box, covariance scaling, canonical signs, every kernel tap protected",
            "the envelope is the measured range of forget and retain projections (all shipped settings of the code)",
            "normalisation statistics are frozen: moving them alone fakes forgetting (see the lr = 0 control)",
            "no weight decay towards zero, which would count as drift",
            "wrong labels exclude the true one",
            "`profile = 'as_published'` restores the code's behaviour",
        ),
        aliases=("intact",),
    ),
)
def barrier(
    *,
    targets: tuple[str, ...] = ("Linear",),
    on: str = "random_label",
    mixing: Mixing = "forget_only",
    alpha: Annotated[float, Field(ge=0)] = 1.0,
    pseudo: Pseudo | None = None,
    eta: Annotated[float, Field(ge=0)] | None = None,
    lambda_interval: Annotated[float, Field(ge=0)] = 1.0,
    lower_percentile: Annotated[float, Field(ge=0, le=1)] = 0.05,
    upper_percentile: Annotated[float, Field(ge=0, le=1)] = 0.95,
    reduced_dim: Annotated[int, Field(ge=1)] = 32,
    infinity_scale: Annotated[float, Field(ge=0)] = 20.0,
    use_actual_bounds: bool = True,
    normalize_protection: bool = True,
    skip_svd: bool = False,
    skip_interval: bool = False,
    remove_top_directions: bool = False,
    decomp_method: Literal["svd", "pca"] = "svd",
    region: Region | None = None,
    interval_mode: IntervalMode = "full",
    floor: Annotated[float, Field(ge=0)] = 0.0,
    retain_weight: Annotated[float, Field(ge=0)] = 0.0,
    draws: Annotated[int, Field(ge=1)] = 1,
    profile: Literal["recommended", "as_published"] = "recommended",
    batch_size: Annotated[int, Field(ge=1)] | None = None,
    optim: Optim = OPTIM,
) -> Recipe:
    """``loss(forget) + lambda / L * sum over layers (L_mean + L_res + L_int)`` on the named layers only.

    Source: BARRIER, sections 3 and 4. The penalty depends on the drift of the weights and on statistics of the layers'
    forget inputs, taken once before the run; it needs no data during the run.

    Deviates:
        See the card. ``as_published`` gives two corner boxes, scatter scaling, substring matching, labels from all
        classes, normalisation statistics that move, augmentation and weight decay as in the code.

    Args:
        targets: Layers that are trained and protected: class names, parts of names, globs or ``re:`` expressions. The
            default takes every fully connected layer, for most image classifiers the head. Of a text-to-image
            pipeline only the U-Net's layers are meant; usual there are ``attn2.to_q``, ``attn2.to_k``, ``attn2.to_v``.
        on: Objective: ``random_label`` or ``gradient_ascent``; for diffusion models also ``esd``.
        mixing: ``forget_only`` as published, or with retain batches.
        alpha: Weight of the retain loss, where ``mixing`` has retain batches.
        pseudo: Diffusion models: what forget captions are to mean, see the objective ``pseudo_label``: ``class``,
            ``next`` (as published for classes of a DDPM), ``retain``, prompts, or prompts by class (the published
            hypernyms for Imagenette: ``{tench: a photo of fish}``).
        eta: For ``esd``: strength of the negative guidance; 0 by default, the prediction without a prompt.
        lambda_interval: Factor of the whole penalty. Large factors need small rates: the penalty is stiff.
        lower_percentile: Lower quantile level of the forget projections.
        upper_percentile: Upper quantile level.
        reduced_dim: Leading directions, at most.
        infinity_scale: Margin of the envelope in projected units, unless ``use_actual_bounds``.
        use_actual_bounds: Envelope = measured range over forget and retain inputs.
        normalize_protection: Divide by the number of layers.
        skip_svd: Raw coordinates instead of directions (ablation).
        skip_interval: No interval part (ablation).
        remove_top_directions: Mean and residual parts only (ablation).
        decomp_method: ``svd`` or ``pca``; they differ in the published profile only.
        region: Region family, by default one envelope box (two corner boxes as published).
        interval_mode: ``full``, ``width_only``, ``centre_only`` or ``off``.
        floor: Weight of an isotropic floor, which also covers directions without forget energy. Keys and values of
            cross-attention read a few dozen text states, so most of their directions have none.
        retain_weight: Weight of the expected drift on retain inputs.
        draws: Diffusion models: times and noises per sample that the statistics are taken over.
        profile: ``recommended`` or ``as_published``.
        batch_size: Samples per step; by default 64, so that a forget set of hundreds gives enough steps, and 256 as
            published. Where it is given, the statistics are also taken so many samples at a time.
        optim: Optimiser and loop settings.
    """
    published = profile == "as_published"
    size = batch_size or (256 if published else 64)
    if published:
        decay = optim.weight_decay or (5e-4 if optim.name == "sgd" else 0.0)  # diffusion models: Adam without
        optim = optim.model_copy(update={"norm": "train", "augment": True, "weight_decay": decay})
    protection = IntervalProtection(
        targets=targets,
        lambda_interval=lambda_interval,
        lower_percentile=lower_percentile,
        upper_percentile=upper_percentile,
        reduced_dim=reduced_dim,
        infinity_scale=infinity_scale,
        use_actual_bounds=use_actual_bounds,
        normalize_protection=normalize_protection,
        skip_svd=skip_svd,
        skip_interval=skip_interval,
        remove_top_directions=remove_top_directions,
        decomp_method=decomp_method,
        region=region,
        interval_mode=interval_mode,
        floor=floor,
        retain_weight=retain_weight,
        draws=draws,
        profile=profile,
        batch_size=batch_size or 256,
    )
    return Recipe(
        name="barrier",
        objective=make_objective(
            on,
            mixing,
            size,
            exclude_true=not published,
            alpha=alpha,
            pseudo=pseudo,
            eta=eta if on != "esd" else eta or 0.0,
        ),
        space=MatchedLayers(targets=targets, rule="as_published" if published else "as_intended"),
        protections=() if lambda_interval == 0 else (protection,),
        optim=optim,
    )

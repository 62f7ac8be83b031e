"""The edit of SLUG: its settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from expunge.context import Context
from expunge.edits.base import Edit
from expunge.methods._common import Profile
from expunge.part import part
from expunge.patch.changes import Change
from expunge.registry import Info
from expunge.slug.search import Method
from expunge.slug.work import Work
from expunge.spaces.base import OpenSpace

INFO = Info(
    "One layer, one step along the forget gradient: the layer from a Pareto front, the step by a search.",
    paper="Cai et al., Single Layer Unlearning Gradient (SLUG), ICML 2025, arXiv 2407.11867",
    upstream="CSIPlab/SLUG",
    commit="59629a29b7daed1593b7c5a9ae19e73f92ff5029",
    needs=("forget", "retain", "towers"),
    deviations=(
        "the step raises the forget loss; the public transformers scripts lower it: `direction`",
        "retain pairs keep their captions, and all of them are one contrastive batch: `profile`, `retain_batch`",
        "the search looks at the utility and returns a step that it tried, or none; the public code does neither",
        "steps are searched on training images, so test images stay unseen; the public code tunes on the test images",
        "accuracy of the forget class is top-1 with fewer than 50 classes, since top-5 says little there: `top_k`",
    ),
    aliases=("single_layer_unlearning_gradient",),
)


@part("slug", INFO)
class SLUG(Edit):
    """``theta_l <- theta_l + lambda g_f`` for one layer ``l``; settings as in :func:`expunge.methods.slug.slug`."""

    towers: Literal["vision", "language", "both"] = "both"
    layers: Literal["front", "all", "deepest", "random"] | tuple[str, ...] = "front"
    group: Literal["tensor", "qkv", "mlp", "qkv+mlp"] = "tensor"
    norms: Literal["include", "exclude"] = "exclude"
    forget_text: Literal["caption", "name"] = "caption"
    concept: str = ""
    retain_batch: int | None = Field(default=None, ge=2)
    retain_limit: int | None = Field(default=None, ge=2)
    search: Method = "log_bisection"
    budget: int | None = Field(default=None, ge=1)
    target: float = Field(default=0.0, ge=0, lt=1)
    top_k: int | None = Field(default=None, ge=1)
    utility_drop: float | None = Field(default=0.05, ge=0, le=1)
    forget_images: int = Field(default=200, ge=1)
    utility_axes: Literal["own", "all"] = "all"
    utility_images: int = Field(default=500, ge=1)
    batch_size: int = Field(default=64, ge=2)
    hidden_state: int = Field(default=-1, le=-1)
    direction: Literal["ascent", "descent"] = "ascent"
    one_layer_each: bool = False
    on_infeasible: Literal["error", "best"] = "error"
    profile: Profile = "as_intended"
    memory: int = Field(default=1 << 31, ge=0)
    cache: str | None = Field(default=None, exclude=True)

    def controls(self) -> dict[str, Edit]:
        """The same step on a layer drawn at random, unless the layers are given."""
        if self.layers not in ("front", "all", "deepest") or self.one_layer_each:
            return {}
        return {"random layer": self.model_copy(update={"layers": "random", "on_infeasible": "best"})}

    def compute(self, ctx: Context, space: OpenSpace) -> dict[str, Change]:
        """The change of the chosen layers.

        Raises:
            CapabilityError: No two-tower task, or a layer was asked for that cannot be edited.
            RequestError: Settings and request do not fit each other.
            NoEffectError: The concept is not known to the model, or no step of any layer meets the criterion.
            InvariantError: The step has the wrong sign.
        """
        return Work(self, ctx, space).run()

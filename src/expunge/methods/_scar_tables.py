"""What SCAR and the methods of its tables share: source, stop rule, optimiser of the baselines."""

from __future__ import annotations

from typing import Any

from expunge.context import Context
from expunge.methods._common import Profile
from expunge.objectives.base import Objective
from expunge.objectives.stopping import StopBelow
from expunge.recipe import Optim

SCAR_PAPER = "Bonato, Cotogni, Sabetta, Is Retain Set All You Need in Machine Unlearning?, ECCV 2024, arXiv 2404.12922"
SCAR_CODE = "jbonato1/SCAR"
SCAR_COMMIT = "280ceae"

#: SCAR, ``src/opts.py`` and the base class of its baselines.
BASELINE = Optim(
    lr=5e-4, momentum=0.9, weight_decay=0.0, epochs=30, lr_schedule="multistep", milestones=(25, 40), gamma=0.5
)


class StopsWhenForgotten(Objective):
    """An objective with the stop rule of SCAR's tables, looked at after each epoch, unless ``until`` gives another.

    A request for classes (CR) stops below 1 % accuracy on the forget samples, a request for samples (HR) 1.5 points
    below the original model's accuracy on data it has not seen.
    """

    def rule(self, removes_classes: bool) -> StopBelow:
        """The stop rule of a class request or a sample request."""
        if self.until is not None:
            return self.until
        return StopBelow(target=0.01) if removes_classes else StopBelow(below_test=0.015)

    def prepare(self, ctx: Context) -> None:
        """Fix the target, with the original model."""
        self.rule(bool(ctx.split.removed)).prepare(ctx)

    def measure(self, ctx: Context, end_of_epoch: bool) -> dict[str, float]:
        """Forget accuracy and target, if due."""
        return self.rule(bool(ctx.split.removed)).measure(ctx, end_of_epoch)

    def stop(self, history: list[dict[str, Any]]) -> str | None:
        """A reason to stop, or ``None``; the target of either rule is in the log."""
        return self.rule(True).reason(history)


def as_run(optim: Optim, profile: Profile) -> Optim:
    """Settings with the published treatment of normalisation if asked for."""
    return optim if profile == "as_intended" else optim.model_copy(update={"norm": "train"})

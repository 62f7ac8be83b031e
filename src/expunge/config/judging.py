"""What a configuration says about judging folders of images."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from expunge.config.tasks import FurtherFigures, JudgeSpec
from expunge.part import Frozen


class JudgingConfig(Frozen):
    """A judge of images that lie in folders: the blocks ``judge`` and ``figures`` of a text-to-image task.

    Args:
        name: Shown in the report.
        judge: What says what images show: ``canvas``, or a classifier per axis, each with its ``classes``. None for
            figures that need no judge.
        figures: Further figures: CLIP score, LPIPS, style loss, Inception features, nudity.
    """

    name: str = "judging"
    judge: Literal["canvas"] | dict[str, JudgeSpec] | None = None
    figures: FurtherFigures = FurtherFigures()

    @model_validator(mode="after")
    def _something(self) -> JudgingConfig:
        if self.judge is None and self.figures == FurtherFigures():
            raise ValueError("give 'judge' or 'figures'; without both there is nothing to measure")
        if isinstance(self.judge, dict):
            bare = [axis for axis, spec in self.judge.items() if spec.classes is None]
            if bare or not self.judge:
                raise ValueError(f"'judge.{bare[0] if bare else '<axis>'}.classes' is missing: names, or a list's name")
        return self

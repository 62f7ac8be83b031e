"""Text-to-image tasks that are judged by the images they draw."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from expunge.data.captions import Axis, mentions
from expunge.diffusion.asks import Ask
from expunge.diffusion.generate import generate
from expunge.errors import CapabilityError
from expunge.metrics.estimate import Estimate
from expunge.metrics.generative import Tools, measure_generated
from expunge.metrics.judge import GeneratedObserved, Judge, observe_generated
from expunge.metrics.outputs import ClassifierOutputs
from expunge.report.samples import samples_section
from expunge.tasks.base import Observed, Split
from expunge.tasks.concepts import named_count, plain
from expunge.tasks.pipeline import PipelineTask

if TYPE_CHECKING:
    from expunge.patch import Patch
    from expunge.report.model import Report


class DrawingTask(PipelineTask):
    """A pipeline with prompts to draw and a judge of what it draws.

    Attributes:
        asks: What an evaluation draws.
        judge: Says what images show; without one they are only compared.
        axis: The label axis whose classes may be forgotten.
        axes: All label axes.
        tools: Models for further figures.
    """

    asks: Sequence[Ask]
    judge: Judge | None
    axis: str
    axes: dict[str, Axis]
    tools: Tools | None = None
    _known: tuple[Split, Judge | None, np.ndarray | None] | None = None

    def observe(self, split: Split) -> Observed:
        """Draw images and show them to the judge; ``forget`` are those asked for what goes, ``test`` the others.

        Equal noise for equal asks, whatever the model. A concept that is no class counts as asked for by every prompt
        that names it.

        Without a judge there are no such outputs, and the images are compared only.

        Raises:
            CapabilityError: The judge does not know the axis or its classes.
        """
        self.check_judge()
        images = generate(self.sample, self.asks, batch_size=self.sample_batch)
        names = {name: axis.classes for name, axis in self.axes.items()}
        seen = observe_generated(self.judge, images, self.asks, classes=names)
        if not seen.judged:
            return Observed({}, seen)
        if split.removed or not split.concept:
            return Observed(seen.outputs(self.axis, split.removed), seen)
        whole = seen.outputs(self.axis, ())["test"]
        asked = np.array([mentions(self.asks[i].prompt, split.concept) for i in whole.ids])
        parts = {"forget": asked, "test": ~asked}
        outputs = {
            role: ClassifierOutputs(logits=whole.table[rows], labels=whole.labels[rows], ids=whole.ids[rows])
            for role, rows in parts.items()
            if rows.any()
        }
        return Observed(outputs, seen)

    def check_judge(self) -> None:
        """Refuse a judge that does not know the axis or its classes.

        Raises:
            CapabilityError: Names what does not fit.
        """
        known = self.judge.classes if self.judge is not None else {}
        if known and self.axis not in known:
            raise CapabilityError(
                f"an evaluation needs a judge of the axis '{self.axis}'; this one knows {', '.join(known)}"
            )
        for axis, names in known.items():
            own = self.axes[axis].classes if axis in self.axes else names
            if [plain(n) for n in names] != [plain(n) for n in own[: named_count(own)]]:
                raise CapabilityError(f"the judge's classes of the axis '{axis}' are not those of the task")

    def further_metrics(self, split: Split, seen: Observed) -> dict[str, Estimate]:
        """UA, IRA and CRA of the drawn images and, with images at hand, distances to test images that stay."""
        return self._measured(split, seen.extra, None)

    def describe(
        self, report: Report, split: Split, before: Observed, after: Observed | None, patch: Patch | None
    ) -> None:
        """Drawn images before and after, from the same noise, and what changed in images that should stay."""
        if after is None:
            return
        columns = {"original": before.extra, "after forgetting": after.extra}
        report.samples = samples_section(
            columns,
            axis=self.axis,
            forgotten=split.removed,
            metrics={
                "original": self._measured(split, before.extra, None),
                "after forgetting": self._measured(split, after.extra, before.extra),
            },
            note=f"{type(self.parts.scheduler).__name__}, {self.steps} steps, guidance {self.guidance:g}",
        )

    def _measured(self, split: Split, seen: GeneratedObserved, before: GeneratedObserved | None) -> dict[str, Estimate]:
        real = self._real(split)
        return measure_generated(
            seen, axis=self.axis, forgotten=split.removed, before=before, real=real, tools=self.tools
        )

    def _real(self, split: Split) -> np.ndarray | None:
        """Features of the real images of what stays: the judge's, so the same for every model of one request."""
        if self._known is None or self._known[0] is not split or self._known[1] is not self.judge:
            x = self.kept_images(split)
            found = None if x is None or self.judge is None else self._features(x)
            self._known = split, self.judge, found
        return self._known[2]

    def _features(self, images: Tensor) -> np.ndarray | None:
        assert self.judge is not None
        try:
            return self.judge.features(images).float().cpu().numpy()
        except CapabilityError:  # a judge may only name; the figures then say so
            return None

    @abstractmethod
    def kept_images(self, split: Split) -> Tensor | None:
        """Real images ``[N, 3, H, W]`` in [0, 1] of what stays, if there are any."""

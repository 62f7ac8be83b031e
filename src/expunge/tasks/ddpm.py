"""Class-conditional diffusion models on labelled images: a noise loss, guidance, and a judge of what they draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge import rng
from expunge.data.base import Splits
from expunge.diffusion.asks import Ask, first_noise
from expunge.diffusion.generate import generate
from expunge.diffusion.process import Process, draw_noise
from expunge.digest import json_digest, tensor_digest
from expunge.errors import CapabilityError, ConfigError, DataError
from expunge.metrics.estimate import Estimate
from expunge.metrics.generative import measure_generated
from expunge.metrics.judge import GeneratedObserved, observe_generated
from expunge.models.class_judge import AXIS, train_judge
from expunge.part import Frozen
from expunge.registry import Info, registry
from expunge.report.samples import samples_section
from expunge.restore import evaluating
from expunge.tasks.base import Batch, Observed, Split
from expunge.tasks.diffusion import DiffusionTask
from expunge.tasks.images import ImageTask

if TYPE_CHECKING:
    from expunge.patch import Patch
    from expunge.report.model import Report


class Sampling(Frozen):
    """How images are drawn when a model is evaluated.

    Args:
        steps: Steps of the DDIM sampler.
        guidance: ``g`` in ``eps_null + g (eps_class - eps_null)``; 1 is the conditional prediction alone. The published
            code for CIFAR-10 counts from 0: its ``w = 2`` is ``g = 3``.
        eta: 1 adds fresh noise at every step, which with as many steps as noise levels is ancestral sampling; 0 adds
            none. Models that were trained briefly draw much better with it.
        per_class: Images of each class.
        batch_size: Images at a time.
        seed: Seed of the noise. Models before and after start from the same.
    """

    steps: int = Field(default=20, ge=1)
    guidance: float = Field(default=2.0, ge=0)
    eta: float = Field(default=1.0, ge=0, le=1)
    per_class: int = Field(default=20, ge=1)
    batch_size: int = Field(default=100, ge=1)
    seed: int = 0


#: For small images.
SAMPLING = Sampling()


@registry.register("task", "ddpm", Info("Class-conditional diffusion models with a noise-prediction loss."))
class DdpmTask(DiffusionTask, ImageTask):
    """A U-Net that predicts the noise of an image given its class, with its labelled images.

    The loss is that of :class:`~expunge.tasks.diffusion.DiffusionTask`.

    While the model trains, the class of some of the samples that stay is replaced by the null class; forget samples
    keep theirs, so that nothing of them is taught to the unconditional prediction.

    Deviates:
        Mean over pixels in both terms; the published code of SalUn sums the noise loss over pixels and takes the mean
        in the other term, so its ``alpha`` counts as ``alpha`` times the numbers of an image here. It draws ``t`` and
        ``T - 1 - t`` in turns (``antithetic``), drops the class of forget samples and of targets too, and takes
        ``c' = c + 1``: the objective ``denoising_published`` does all that.

    Args:
        model: ``UNet2DModel`` with one class embedding more than there are classes; the last one is the null class.
        scheduler: The diffusers scheduler of its training.
        data: Train, test and optional validation images in [0, 1]; the model sees them in [-1, 1].
        judge: Names what generated images show, see :class:`~expunge.models.class_judge.ClassJudge`; by default a small
            network, trained on the data when it is first needed.
        sampling: How images are drawn for an evaluation.
        condition_drop: Share of the retain samples whose class is dropped in training mode.
        antithetic: Pair the times of a batch: the second half uses ``T - 1 - t`` of the first. A batch that is cut into
            pieces pairs other samples.
        eval_batch_size: Batch size of evaluation passes.

    Raises:
        ConfigError: The model's class embedding does not fit the data.
    """

    name = "ddpm"
    capabilities = frozenset({"diffusion", "class_condition"})
    optional_capabilities = frozenset({"val", "forget_test"})

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        data: Splits,
        judge: Any = None,
        sampling: Sampling = SAMPLING,
        condition_drop: float = 0.1,
        antithetic: bool = False,
        eval_batch_size: int = 256,
    ) -> None:
        ImageTask.__init__(self, model, data, eval_batch_size=eval_batch_size)
        del self.n_classes  # outputs are noise, not one logit per class: checks of classifiers must not take hold
        rows = getattr(getattr(model, "config", None), "num_class_embeds", None)
        if rows is not None and rows != len(self.classes) + 1:
            raise ConfigError(
                f"the model knows {rows} classes; '{data.name}' has {len(self.classes)}, and with the null class that "
                f"makes {len(self.classes) + 1}"
            )
        self.scheduler, self.process = scheduler, Process(scheduler)
        self.sampling, self.condition_drop, self.antithetic = sampling, condition_drop, antithetic
        self._judge = judge

    @property
    def unet(self) -> nn.Module:  # type: ignore[override]  # read-only: a frozen copy replaces the model
        """The network; the whole model."""
        return self.model

    @property
    def null(self) -> int:
        """Number of the null class."""
        return len(self.classes)

    @property
    def judge(self) -> Any:
        """Names what generated images show."""
        if self._judge is None:
            self._judge = train_judge(self.data)
        return self._judge

    # -- samples -------------------------------------------------------------------------------------------------------

    def load(self, role: str, ids: Tensor, split: Split, *, augment: int | None = None) -> Batch:
        """Images as ``[B, C, H, W]`` in [-1, 1] in the model's precision, with their classes."""
        batch = ImageTask.load(self, role, ids, split, augment=augment)
        return replace(batch, inputs=2 * batch.inputs - 1)

    def wrong_target(self, batch: Batch, *, key: int, exclude_true: bool = True) -> Tensor:
        """A random class per sample, uniform over the other classes (or over all of them)."""
        count = len(self.classes)
        if not exclude_true:
            return rng.randint(key, batch.ids, count).to(batch.targets)
        return (batch.targets + 1 + rng.randint(key, batch.ids, count - 1).to(batch.targets)) % count

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``(x_t, t, noise)`` of samples: a function of ``batch.key`` and the sample ids."""
        x0, ids, last = batch.inputs, batch.ids.tolist(), self.process.steps - 1
        # plain numbers: where gradients are taken of functions, sample ids cannot be read as an array
        times = [rng.key(batch.key, "times", i) % (last + 1) for i in ids]
        if self.antithetic:
            first = times[: len(times) // 2 + 1]
            times = [*first, *(last - t for t in first)][: len(times)]
        t = torch.tensor(times, device=x0.device)
        noise = draw_noise(batch.key, batch.ids, x0.shape[1:], x0.dtype).to(x0.device)
        return self.process.noised(x0, noise, t), t, noise

    # -- predictions ---------------------------------------------------------------------------------------------------

    def eps(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Predicted noise for class numbers ``condition`` int64 ``[B]``, not guided."""
        found: Tensor = self.model(x_t, t, class_labels=condition, return_dict=False)[0]
        return found

    def condition(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        """Class numbers ``[B]``."""
        return batch.targets if targets is None else targets

    def unconditional(self, n: int) -> Tensor:
        """The null class ``[n]``."""
        return torch.full((n,), self.null, device=self.device)

    def dropped(self, batch: Batch, labels: Tensor, share: float, branch: str) -> Tensor:
        """``labels`` with a share of them replaced by the null class, a function of the batch's key and sample ids."""
        if share == 0:
            return labels
        draw = rng.randint(rng.key(batch.key, f"condition drop {branch}"), batch.ids, 2**40)
        return torch.where((draw < share * 2**40).to(labels.device), self.null, labels)

    def _own_condition(self, batch: Batch) -> Tensor:
        """Classes ``[B]``; in training mode some of the samples that stay lose theirs."""
        own = batch.targets
        if not self.model.training:
            return own
        kept = self.dropped(batch, own, self.condition_drop, "retain")
        return torch.where(batch.is_forget.to(own.device), own, kept)

    def logits(self, role: str, split: Split, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Not there: a diffusion model names no classes.

        Raises:
            CapabilityError: Always.
        """
        raise CapabilityError(
            "a diffusion model predicts noise, so there is no accuracy on images; evaluate it by what it draws"
        )

    # -- drawing -------------------------------------------------------------------------------------------------------

    def sample(self, asks: Sequence[Ask]) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1] of the classes ``ask.labels["class"]``; grey ones have equal channels.

        All noise is a function of ``ask.key``.

        Raises:
            DataError: An ask names no class, or one that does not exist.
        """
        from diffusers import DDIMScheduler

        how = self.sampling
        numbers = [ask.labels.get(AXIS, -1) for ask in asks]
        wrong = [a for a, c in zip(asks, numbers, strict=True) if not 0 <= c < self.null]
        if wrong:
            raise DataError(f"case {wrong[0].case} asks for no class of this model: labels {dict(wrong[0].labels)}")
        labels, shape = torch.tensor(numbers, device=self.device), self.data.train.shape
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(how.steps, device=self.device)
        x = first_noise(asks, shape).to(self.device, self._dtype())
        with evaluating(self.model):
            for number, t in enumerate(scheduler.timesteps):
                found = self.guided_eps(x, t.expand(len(asks)), labels, how.guidance)
                fresh = None if how.eta == 0 else _fresh(asks, number, shape).to(x)
                x = scheduler.step(found, t, x, eta=how.eta, variance_noise=fresh).prev_sample
        return ((x + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)

    def asks(self) -> list[Ask]:
        """What an evaluation draws: ``sampling.per_class`` images of every class, class by class."""
        how = self.sampling
        return [
            Ask(name, how.seed, number, {AXIS: number}, n)
            for number, name in enumerate(self.classes)
            for n in range(how.per_class)
        ]

    def observe(self, split: Split) -> Observed:
        """What the judge says of drawn images: ``forget`` were asked to show forgotten classes, ``test`` others.

        Raises:
            CapabilityError: The request does not name whole classes.
        """
        if not split.removed:
            raise CapabilityError(
                "what a class-conditional model draws shows whether classes are forgotten; this request names single "
                "samples, and for these no evaluation is defined"
            )
        asks = self.asks()
        drawn = generate(self.sample, asks, batch_size=self.sampling.batch_size)
        seen = observe_generated(self.judge, drawn, asks)
        return Observed(seen.outputs(AXIS, split.removed), seen)

    def further_metrics(self, split: Split, seen: Observed) -> dict[str, Estimate]:
        """UA and IRA of the drawn images and, where the judge has features, distances to test images that stay."""
        extra: GeneratedObserved = seen.extra
        real = None
        if extra.features is not None:
            x = self.data.test.images(split["test"]).expand(-1, 3, -1, -1)
            real = self.judge.features(x).numpy()
        return measure_generated(extra, axis=AXIS, forgotten=split.removed, real=real)

    def describe(
        self, report: Report, split: Split, before: Observed, after: Observed | None, patch: Patch | None
    ) -> None:
        """Drawn images before and after, from the same noise."""
        if after is None:
            return
        how, columns = self.sampling, {"original": before, "after forgetting": after}
        report.samples = samples_section(
            {name: seen.extra for name, seen in columns.items()},
            axis=AXIS,
            forgotten=split.removed,
            metrics={name: self.further_metrics(split, seen) for name, seen in columns.items()},
            note=f"DDIM, {how.steps} steps, guidance {how.guidance:g}, eta {how.eta:g}, seed {how.seed}",
        )

    def data_digest(self) -> str:
        """Digest over all image sets, the noise levels and the draws of the loss."""
        own = [tensor_digest(self.process.alphas_cumprod), self.condition_drop, self.antithetic]
        return json_digest([ImageTask.data_digest(self), *own])


def _fresh(asks: Sequence[Ask], number: int, shape: Sequence[int]) -> Tensor:
    """The noise of one step of a sampler, a function of each ask and of the step."""
    first = torch.zeros(1, dtype=torch.int64)
    return torch.cat([draw_noise(rng.key(ask.key, "step", number), first, shape) for ask in asks])

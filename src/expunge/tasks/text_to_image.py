"""Text-to-image pipelines of the Stable Diffusion kind with captioned images, or with prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge import rng
from expunge.data.augment import Augment
from expunge.data.base import Splits
from expunge.data.captions import Axis, CaptionedImages, mentions
from expunge.diffusion.asks import Ask
from expunge.diffusion.captions import replaced_caption
from expunge.diffusion.latents import Latents, encode, lent
from expunge.diffusion.process import draw_noise
from expunge.digest import json_digest
from expunge.errors import CapabilityError, DataError, RequestError
from expunge.metrics.generative import Tools
from expunge.metrics.judge import Judge
from expunge.models.pipelines import Parts
from expunge.registry import Info, registry
from expunge.request import Concept, ForgetRequest
from expunge.tasks.base import TRAIN_ROLES, Batch, Split
from expunge.tasks.concepts import (
    asks_along,
    captioned_split,
    index_sets,
    known_class,
    named_classes,
    named_count,
    plain,
    prompts_of,
    removed,
)
from expunge.tasks.drawing import DrawingTask

#: The role of samples that are nothing but noise and a prompt.
CONCEPT = "concept"
_NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class CaptionedBatch(Batch):
    """A batch with its captions."""

    captions: tuple[str, ...] = ()

    def rows(self, here: slice) -> CaptionedBatch:
        """Some of the samples."""
        own = {n: getattr(self, n)[here] for n in ("inputs", "targets", "ids", "is_forget", "captions")}
        return replace(self, **own)


class PromptSplit(Split):
    """Index sets without images: the roles of images are empty and do not count as present."""

    def roles(self) -> tuple[str, ...]:
        """Names of the roles present."""
        return tuple(r for r in self.indices if r == CONCEPT)

    def __contains__(self, role: object) -> bool:
        return role == CONCEPT and CONCEPT in self.indices

    def with_indices(self, **indices: Tensor) -> PromptSplit:
        """A copy with other index sets for some roles."""
        return PromptSplit({**self.indices, **indices}, self.notes, self.removed, self.concept)


@registry.register("task", "text_to_image", Info("Text-to-image pipelines (Stable Diffusion 1.x, 2.x, XL)."))
class TextToImageTask(DrawingTask):
    """A text-to-image pipeline with captioned images, or with prompts alone.

    The loss is that of :class:`~expunge.tasks.diffusion.DiffusionTask` on noised latents (their mean, one and the same
    for both captions) and captions. The caption of another class is the sample's own with the class' name exchanged, or
    :meth:`prompt_of` where it is not named.

    Beside the roles of the images there is ``concept``: virtual samples of noise whose captions are the
    :meth:`concept_prompts` in turn, for methods that need no images. Without images it is the only role.

    Args:
        parts: The pipeline.
        data: Train, test and optional validation parts, of :class:`~expunge.data.captions.CaptionedImages`.
        axis: The label axis whose classes may be forgotten; the main one by default.
        axes: Without images: label axes, of which only classes and templates are used.
        steps: Steps of the sampler.
        guidance: Weight of classifier-free guidance.
        side: Pixels along one side, of generated images and of those given; that of the pipeline by default.
        virtual: Number of virtual samples.
        seed: Of the virtual samples' noise.
        sample_batch: Images that are generated at once.
        cache: Folder of latents; they stay in memory only without it.
        asks: What an evaluation draws; by default every prompt of the axis. Labels that are not given are those classes
            that a prompt names.
        images_per_prompt: For the default of ``asks``.
        judge: Says what generated images show; without one they are only compared.
        gradient_checkpointing: Run the U-Net's blocks again in the backward pass instead of keeping what they computed.
        tools: Models for further figures of generated images.

    Attributes:
        classes: Of the axis.

    Raises:
        DataError: Images without captions, of another size, or without the axis; neither images nor axes.
    """

    name = "text_to_image"
    optional_capabilities = frozenset({"val", "forget_test", CONCEPT})

    def __init__(
        self,
        parts: Parts,
        data: Splits | None = None,
        axis: str | None = None,
        axes: dict[str, Axis] | None = None,
        steps: int = 50,
        guidance: float = 7.5,
        side: int | None = None,
        virtual: int = 4096,
        seed: int = 0,
        sample_batch: int = 16,
        cache: Path | None = None,
        asks: Sequence[Ask] | None = None,
        images_per_prompt: int = 1,
        judge: Judge | None = None,
        tools: Tools | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(parts, steps, guidance, side, sample_batch)
        self.virtual, self.seed, self.cache = virtual, seed, cache
        self.gradient_checkpointing = gradient_checkpointing
        self.data = data
        self._sets: dict[str, CaptionedImages] = {}
        if data is not None:
            for role, part in (("train", data.train), ("test", data.test), ("val", data.val)):
                if part is not None:
                    self._sets[role] = self._checked(f"{data.name}: {role}", part, axis)
            axes = dict(self._sets["train"].axes)
        if not axes:
            raise DataError("a text-to-image task needs captioned images, or label axes with prompts")
        self.axes = axes
        self.axis = axis if axis is not None else next(iter(axes))
        if self.axis not in axes:
            raise DataError(f"no label axis is called {self.axis!r}; there are: {', '.join(axes)}")
        self.classes = list(axes[self.axis].classes)
        self._latents: dict[str, Latents] = {}
        self.judge, self.tools = judge, tools
        if asks is None:
            self.asks = asks_along(self.axis, axes, images=images_per_prompt, seed=seed)
        else:
            self.asks = [replace(a, labels={**named_classes(a.prompt, axes), **a.labels}) for a in asks]

    def _checked(self, where: str, part: Any, axis: str | None) -> CaptionedImages:
        if not isinstance(part, CaptionedImages):
            raise DataError(f"{where} images have no captions; a text-to-image task needs them")
        if part.shape != (3, self.side, self.side):
            raise DataError(
                f"{where} images are {list(part.shape)}, the pipeline draws {[3, self.side, self.side]}; "
                f"set data.resize to {self.side}, or task.side"
            )
        return part if axis is None else part.along(axis)

    # --- text -------------------------------------------------------------------------------------------------------

    def prompts(self, axis: str | None = None) -> list[list[str]]:
        """All prompts of the classes of an axis, one list per class."""
        return prompts_of(self.axes[axis or self.axis])

    def prompt_of(self, class_number: int) -> str:
        """The first prompt of a class."""
        return self.prompts()[class_number][0]

    def concept_prompts(self, split: Split) -> list[str]:
        """Prompts that stand for what shall be forgotten.

        For classes their templates filled in, for a concept in words the words, for samples their different captions.
        """
        return [prompt for prompt, _ in self._concepts(split)]

    def _concepts(self, split: Split) -> list[tuple[str, int]]:
        if split.removed:
            prompts = self.prompts()
            return [(p, c) for c in split.removed for p in prompts[c]]
        if split.concept:
            return [(split.concept, -1)]
        return [(p, -1) for p in dict.fromkeys(self.captions("forget", split["forget"]))]

    def captions(self, role: str, ids: Tensor, split: Split | None = None) -> list[str]:
        """Captions of samples.

        Args:
            role: Whose samples.
            ids: int64 ``[B]``.
            split: The index sets of the request; needed for the role ``concept`` only.

        Raises:
            RequestError: The role ``concept`` without a split.
        """
        if role != CONCEPT:
            texts = self.images_of(role).captions
            return [texts[i] for i in ids.tolist()]
        if split is None:
            raise RequestError("the captions of virtual samples depend on the request; give its split")
        prompts = self.concept_prompts(split)
        return [prompts[i % len(prompts)] for i in ids.tolist()]

    # --- data -------------------------------------------------------------------------------------------------------

    def split(self, request: ForgetRequest) -> Split:
        """Index sets of a request; a concept in words is a class of the axis, what captions name, or with prompts alone
        any words.

        Raises:
            RequestError: The request does not fit the data.
            DataError: A sample to forget cannot be read.
        """  # noqa: D205
        if self._sets:
            found = captioned_split(request, self.axis, self.axes, self._sets)
        else:
            request = known_class(request, self.axis, self.axes)
            gone = removed(request, self.classes)
            words = plain(request.what.text, lower=False) if isinstance(request.what, Concept) else ""
            if not gone and not words:
                raise RequestError("without images a request names a class or a concept in words")
            unknown = () if gone else (f"'{words}' is none of the task's classes: {', '.join(self.classes)}",)
            found = PromptSplit({"forget": _NONE, "retain": _NONE}, unknown, tuple(sorted(gone)), words)
        return found.with_indices(**{CONCEPT: torch.arange(self.virtual)})

    def everything(self) -> Split:
        """Index sets with nothing to forget."""
        if not self._sets:
            return PromptSplit({"forget": _NONE, "retain": _NONE})
        return index_sets(self._sets, _NONE, torch.arange(len(self._sets["train"])))

    def images_of(self, role: str) -> CaptionedImages:
        """The set that a role's ids index.

        Raises:
            RequestError: There is none.
        """
        name = "train" if role in TRAIN_ROLES else "test" if role == "forget_test" else role
        if name not in self._sets:
            raise RequestError(f"this task has no images for the role '{role}'")
        return self._sets[name]

    def latents(self, role: str) -> Latents:
        """Latents of a role's images."""
        images = self.images_of(role)
        if images.digest not in self._latents:
            self._latents[images.digest] = Latents(self.parts.vae, images, self.vae_digest, self.cache)
        return self._latents[images.digest]

    def load(self, role: str, ids: Tensor, split: Split, *, augment: int | None = None) -> CaptionedBatch:
        """Latents ``[B, C, h, w]``, at least float32, with class numbers and captions.

        Those of the role ``concept`` are standard normal noise, a function of the task's seed and the id; their target
        is the forgotten class that the caption names, or -1.
        """
        device = self.device
        captions = tuple(self.captions(role, ids, split))
        if role == CONCEPT:
            x = draw_noise(rng.key(self.seed, "virtual samples"), ids, self.latent_shape)
            numbers = [c for _, c in self._concepts(split)]
            targets = torch.tensor([numbers[i % len(numbers)] for i in ids.tolist()], dtype=torch.int64)
            is_forget = torch.ones(len(ids), dtype=torch.bool)
        else:
            images = self.images_of(role)
            targets, is_forget = images.labels[ids], split.is_forget(role, ids)
            if augment is None or self.data is None or self.data.augment == Augment():
                x = self.latents(role)(ids, device)
            else:  # another image every epoch: nothing to keep
                with torch.no_grad(), lent(self.parts.vae, device) as vae:
                    x = encode(vae, self.data.augment(images.images(ids), ids, augment).to(device))
        x = x.to(device, torch.promote_types(self._dtype(), torch.float32))
        return CaptionedBatch(x, targets.to(device), ids, role, is_forget, captions=captions)

    def wrong_target(self, batch: Batch, *, key: int, exclude_true: bool = True) -> Tensor:
        """A random class per sample, uniform over the other classes that have a name (or over all of them).

        Raises:
            RequestError: Only one class has a name.
        """
        n, own = named_count(self.classes), batch.targets
        if n < 2:
            raise RequestError(
                f"'{self.classes[0]}' is the only class with a name, so there is no other label to draw; say what its "
                "captions are to mean instead: `pseudo: retain` (captions of retain images) or `pseudo: [a prompt]`"
            )
        whole = rng.randint(key, batch.ids, n).to(own)
        if not exclude_true:
            return whole
        others = (own + 1 + rng.randint(key, batch.ids, n - 1).to(own)) % n
        return torch.where((own >= 0) & (own < n), others, whole)

    def data_digest(self) -> str:
        """Digest over all images, captions and axes, the autoencoder, and the settings of virtual samples."""
        sets = {role: images.digest for role, images in self._sets.items()}
        axes = {n: [a.classes, a.templates] for n, a in self.axes.items()}
        return json_digest([sets, axes, self.axis, self.vae_digest, self.side, self.virtual, self.seed])

    # --- diffusion --------------------------------------------------------------------------------------------------

    def condition(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        """Conditions of samples, of their own captions or of those of other classes where ``targets`` differ.

        Raises:
            CapabilityError: The batch was cut without its captions.
        """
        assert isinstance(batch, CaptionedBatch)
        texts = list(batch.captions)
        if len(texts) != len(batch.ids):
            raise CapabilityError(
                f"gradients of single samples are not defined for the {self.name} task, whose samples have captions; "
                "for ssd choose profile 'as_published', which takes gradients of batches"
            )
        if targets is not None:
            rows = zip(texts, batch.targets.tolist(), targets.tolist(), strict=True)
            texts = [text if own == other else self.renamed(text, own, other) for text, own, other in rows]
        return self.conditions(texts)

    def renamed(self, caption: str, own: int, other: int) -> str:
        """The caption with the name of another class, or that class' prompt where the own one is not named."""
        name = self.classes[own] if own >= 0 else ""
        if not name or not mentions(caption, name):
            return self.prompt_of(other)
        return replaced_caption(caption.replace("_", " "), plain(name, lower=False), plain(self.classes[other]))

    def loss(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        """Per-sample loss ``[B]``; see the class.

        Raises:
            CapabilityError: The samples are virtual: noise without an image.
        """
        if batch.role == CONCEPT:
            raise CapabilityError("virtual samples are noise without an image and have no denoising loss")
        return super().loss(batch, targets)

    def logits(self, role: str, split: Split, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Refused: this model names no classes.

        Raises:
            CapabilityError: Always; rules that stop on an accuracy, and losses on logits, are for classifiers.
        """
        del role, split, limit
        raise CapabilityError(f"the {self.name} task draws images and names no classes, so it has no accuracy")

    def kept_images(self, split: Split) -> Tensor | None:
        """Test images ``[N, 3, H, W]`` of what stays."""
        return self._sets["test"].images(split["test"]) if self._sets else None

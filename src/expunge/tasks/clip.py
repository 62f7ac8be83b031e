"""Two-tower models (CLIP) with captioned images: contrastive training, zero-shot classification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from expunge.data.base import Splits
from expunge.data.captions import Axis, CaptionedImages
from expunge.digest import json_digest
from expunge.errors import DataError, RequestError
from expunge.metrics.contrastive import measure_zero_shot
from expunge.metrics.estimate import Estimate
from expunge.metrics.neighbours import neighbours
from expunge.metrics.outputs import ClassifierOutputs
from expunge.models.towers import Tokens, Towers
from expunge.registry import Info, registry
from expunge.report.contrastive import ContrastiveSection, CosineMatrices
from expunge.report.gallery import Picture, data_uri
from expunge.request import ForgetRequest
from expunge.restore import evaluating
from expunge.slug.gradients import Pairs
from expunge.slug.losses import forget_losses
from expunge.tasks.base import Batch, Observed, Split
from expunge.tasks.concepts import captioned_split, prompts_of
from expunge.tasks.images import EVALUATED, ImageTask

if TYPE_CHECKING:
    from expunge.patch import Patch
    from expunge.report.model import Report

#: Classes in the matrix of cosines, beside the forgotten ones.
_SHOWN = 11
#: Pictures of each kind in a report.
_PICTURES = 8


@dataclass
class ClipObserved:
    """What an evaluation of a two-tower model knows beside the logits of its axis.

    Attributes:
        texts: Class embeddings ``[C, D]`` by axis.
        axes: Zero-shot outputs along the other axes, by axis and role.
        paired: Cosine of every image with its own caption ``[N]``, by role.
        others: Zero-shot outputs on further image sets.
        means: Mean normalised image embedding ``[C, D]`` of each class, over the images of ``test`` and
            ``forget_test``; zero for a class without any.
    """

    texts: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, dict[str, ClassifierOutputs]] = field(default_factory=dict)
    paired: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, ClassifierOutputs] = field(default_factory=dict)
    means: Tensor = field(default_factory=lambda: torch.empty(0))


@registry.register("task", "clip", Info("Two-tower models (CLIP) with captioned images and a contrastive loss."))
class ClipTask(ImageTask):
    """A two-tower model with its captioned images.

    Classes are those of one label axis; the model names them zero-shot, by the text embeddings of prompts.

    The loss depends on the role. ``forget``: ``1 - cos(image, caption)`` per pair (SLUG's forget loss), so that
    gradient ascent pushes matched pairs apart. Otherwise the symmetric contrastive loss within the batch, per sample
    ``0.5 (CE(image to texts) + CE(text to images))``.

    Deviates:
        Equal captions in a batch are not negatives of each other; the published loss counts them as such.

    Args:
        towers: The model behind its adapter; ``towers.model`` is what changes.
        data: Train, test and optional validation parts, of :class:`~expunge.data.captions.CaptionedImages`.
        axis: The label axis whose classes may be forgotten; the main one by default.
        templates: Prompts with ``{}`` instead of the axis' own.
        forget_loss: ``cosine``, or ``contrastive`` for the forget role too.
        others: Further image sets with classes of their own, for zero-shot tests.
        eval_batch_size: Batch size of evaluation passes.

    Raises:
        DataError: The images have no captions, or no such axis.
    """

    name = "clip"
    capabilities = frozenset({"towers", "logits"})
    optional_capabilities = frozenset({"val", "forget_test"})
    couples_samples = True

    def __init__(
        self,
        towers: Towers,
        data: Splits,
        axis: str | None = None,
        templates: Sequence[str] | None = None,
        forget_loss: Literal["cosine", "contrastive"] = "cosine",
        others: Mapping[str, CaptionedImages] | None = None,
        eval_batch_size: int = 256,
    ) -> None:
        parts = {"train": data.train, "test": data.test, "val": data.val}
        turned: dict[str, CaptionedImages | None] = {}
        for name, part in parts.items():
            if part is not None and not isinstance(part, CaptionedImages):
                raise DataError(f"{data.name}: the {name} images have no captions; a two-tower model needs them")
            turned[name] = part if part is None or axis is None else part.along(axis)
        train, test, val = turned["train"], turned["test"], turned["val"]
        assert train is not None
        assert test is not None
        super().__init__(
            towers.model,
            Splits(data.name, train, test, val, data.source, data.augment),
            eval_batch_size=eval_batch_size,
        )
        self.towers = towers
        self.axis = axis if axis is not None else next(iter(train.axes))
        own = train.axes[self.axis]
        self.axes: dict[str, Axis] = dict(train.axes)
        if templates is not None:
            self.axes[self.axis] = Axis(own.labels, own.classes, tuple(templates))
        self.forget_loss = forget_loss
        self.others = dict(others or {})

    def split(self, request: ForgetRequest) -> Split:
        """Index sets of a request; a concept in words is a class of the axis, or what captions name.

        Raises:
            RequestError: The concept is a class of another axis, or no caption names it.
        """
        sets = {role: images for role, images in self._sets.items() if isinstance(images, CaptionedImages)}
        return captioned_split(request, self.axis, self.axes, sets)

    def tokens(self, role: str, ids: Tensor) -> Tokens:
        """Token ids of the captions of samples, on the model's device."""
        images = self.images_of(role)
        assert isinstance(images, CaptionedImages)
        return self.towers.tokenize([images.captions[i] for i in ids.tolist()]).to(self.device)

    def pairs(self, role: str, split: Split, batch_size: int, limit: int | None = None) -> Iterator[Pairs]:
        """One pass over a role in stored order: preprocessed images and the tokens of their captions."""
        for chunk in torch.split(split[role][:limit], batch_size):
            batch = self.load(role, chunk, split)
            yield Pairs(self.towers.preprocess(batch.inputs), self.tokens(role, chunk))

    def prompts(self, axis: str | Axis | None = None) -> list[list[str]]:
        """The zero-shot prompts of an axis of the data or of any other, one list per class."""
        return prompts_of(axis if isinstance(axis, Axis) else self.axes[axis or self.axis])

    def classifier(self, axis: str | Axis | None = None) -> Tensor:
        """Text embeddings of the classes ``[C, D]``: normalised, averaged over the templates, normalised again."""
        prompts = self.prompts(axis)
        flat = [p for group in prompts for p in group]
        tokens = self.towers.tokenize(flat).to(self.device)
        size = self.eval_batch_size
        parts = [self.towers.text(tokens[i : i + size]) for i in range(0, len(flat), size)]
        each = functional.normalize(torch.cat(parts), dim=-1)
        mean = each.reshape(len(prompts), len(prompts[0]), -1).mean(1)
        return functional.normalize(mean, dim=-1)

    def embed(self, batch: Batch) -> Tensor:
        """Normalised image embeddings ``[B, D]``."""
        return functional.normalize(self.towers.image(self.towers.preprocess(batch.inputs)), dim=-1)

    def predict(self, batch: Batch) -> Tensor:
        """Zero-shot logits ``[B, C]``: cosines with the classes' texts times the model's scale."""
        return self.towers.scale() * self.embed(batch) @ self.classifier().T

    def loss(self, batch: Batch, targets: Tensor | None = None) -> Tensor:
        """Per-sample loss ``[B]``; see the class. A sample whose target is another class gets its first prompt."""
        tokens = self._texts(batch, targets)
        image = self.towers.image(self.towers.preprocess(batch.inputs))
        text = self.towers.text(tokens)
        if batch.role == "forget" and self.forget_loss == "cosine":
            return forget_losses(image, text)
        return self._contrastive(image, text, tokens)

    def _contrastive(self, image: Tensor, text: Tensor, tokens: Tokens) -> Tensor:
        cosines = functional.normalize(image, dim=-1) @ functional.normalize(text, dim=-1).T
        logits = self.towers.scale() * cosines
        same = (tokens.ids[:, None] == tokens.ids[None]).all(-1)
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
        own = torch.arange(len(logits), device=logits.device)
        rows = functional.cross_entropy(logits, own, reduction="none")
        return (rows + functional.cross_entropy(logits.T, own, reduction="none")) / 2

    def _texts(self, batch: Batch, targets: Tensor | None) -> Tokens:
        images = self.images_of(batch.role)
        assert isinstance(images, CaptionedImages)
        texts = [images.captions[i] for i in batch.ids.tolist()]
        if targets is not None:
            if targets.ndim != 1:
                raise RequestError("the clip task takes class numbers as targets, not probabilities")
            prompts = self.prompts()
            other = (targets != batch.targets).tolist()
            texts = [prompts[int(t)][0] if o else s for s, t, o in zip(texts, targets, other, strict=True)]
        return self.towers.tokenize(texts).to(self.device)

    def logits(self, role: str, split: Split, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Zero-shot logits of one role and the labels, on the CPU; the class texts are embedded once."""
        with evaluating(self.model):
            texts, ids = self.classifier(), split[role][:limit]
            logits = self._scaled(self._embeddings(role, ids, split), texts)
        return logits, self.images_of(role).labels[ids]

    def observe(self, split: Split) -> Observed:
        """Zero-shot logits of every role, and as ``extra`` what is known about texts and other axes."""
        outputs: dict[str, ClassifierOutputs] = {}
        seen, held_out = ClipObserved(), []
        with evaluating(self.model):
            seen.texts = {axis: self.classifier(axis) for axis in self.axes}
            for role in [r for r in EVALUATED if r in split.roles()]:
                ids, images = split[role], self.images_of(role)
                assert isinstance(images, CaptionedImages)
                embedded = self._embeddings(role, ids, split)
                for axis, texts in seen.texts.items():
                    logits = self._scaled(embedded, texts)
                    labels = images.axes[axis].labels[ids]
                    found = ClassifierOutputs(logits=logits, labels=labels, ids=ids)
                    if axis == self.axis:
                        outputs[role] = found
                    else:
                        seen.axes.setdefault(axis, {})[role] = found
                own = torch.cat(
                    [self.towers.text(self.tokens(role, c)) for c in torch.split(ids, self.eval_batch_size)]
                )
                seen.paired[role] = (embedded * functional.normalize(own, dim=-1)).sum(-1).float().cpu()
                if role in ("test", "forget_test"):
                    held_out.append((embedded.float().cpu(), images.labels[ids]))
            for name, images in self.others.items():
                seen.others[name] = self._zero_shot(images)
            both = [torch.cat(parts) for parts in zip(*held_out, strict=True)]
            seen.means = class_means(both[0], both[1], self.n_classes)
        return Observed(outputs, seen)

    def further_metrics(self, split: Split, seen: Observed) -> dict[str, Estimate]:
        """FA@1, FA@5, zero-shot accuracies on what stays, accuracies along the other axes, cosines of the pairs."""
        extra: ClipObserved = seen.extra
        pairs = {role: cosines.numpy() for role, cosines in extra.paired.items() if role in ("forget", "retain")}
        return measure_zero_shot(
            seen.outputs, forgotten=split.removed, axes=extra.axes, others=extra.others, pairs=pairs
        )

    def describe(
        self, report: Report, split: Split, before: Observed, after: Observed | None, patch: Patch | None
    ) -> None:
        """Layers, searches, neighbours and cosines of the run that a report is about."""
        if after is None or patch is None:
            return
        findings = patch.manifest.findings.get("slug", {})
        near = matrices = None
        if split.removed and "forget_test" in before.outputs:
            joined = [_joined(seen.outputs["test"], seen.outputs["forget_test"]) for seen in (before, after)]
            texts = before.extra.texts[self.axis].cpu()
            near = neighbours(joined[0], joined[1], texts, self.classes, split.removed).shown()
            shown = [self.classes.index(r.name) for r in near.rows][:_SHOWN]
            matrices = self._cosines(sorted({*split.removed, *shown}), split, before.extra, after.extra)
        gallery = self._gallery(split, before, after) if split.removed and "forget_test" in before.outputs else ()
        report.contrastive = ContrastiveSection(findings, near, matrices, gallery=gallery)

    def _gallery(self, split: Split, before: Observed, after: Observed) -> tuple[Picture, ...]:
        """The first held-out images of what goes, and the first of each class that stays."""
        found = []
        for role in ("forget_test", "test"):
            labels = before.outputs[role].labels
            rows = list(range(min(_PICTURES, len(labels))))
            if role == "test":
                _, first = np.unique(labels, return_index=True)
                rows = sorted(first.tolist())[:_PICTURES]
            images = self.images_of(role).images(split[role][rows])
            names = [o.outputs[role].table.argmax(1) for o in (before, after)]
            for row, image in zip(rows, images, strict=True):
                shown, was, now = (self.classes[int(c)] for c in (labels[row], names[0][row], names[1][row]))
                found.append(Picture(data_uri(image), shown, was, now, role == "forget_test"))
        return tuple(found)

    def _cosines(
        self, rows: Sequence[int], split: Split, before: ClipObserved, after: ClipObserved
    ) -> CosineMatrices | None:
        rows = [c for c in rows if bool(before.means[c].any())]
        if not rows:
            return None
        names, gone = (tuple(self.classes[c] for c in which) for which in (rows, split.removed))

        def table(seen: ClipObserved) -> tuple[tuple[float, ...], ...]:
            found = seen.means[rows] @ seen.texts[self.axis].float().cpu()[rows].T
            return tuple(map(tuple, found.tolist()))

        return CosineMatrices(names, names, table(before), table(after), forgotten=gone)

    def _embeddings(self, role: str, ids: Tensor, split: Split) -> Tensor:
        chunks = torch.split(ids, self.eval_batch_size)
        return torch.cat([self.embed(self.load(role, chunk, split)) for chunk in chunks])

    def _zero_shot(self, images: CaptionedImages) -> ClassifierOutputs:
        texts, found = self.classifier(next(iter(images.axes.values()))), []
        ids = images.readable()
        for chunk in torch.split(ids, self.eval_batch_size):
            x = self.towers.preprocess(images.images(chunk).to(self.device, self._dtype()))
            found.append(self._scaled(functional.normalize(self.towers.image(x), dim=-1), texts))
        return ClassifierOutputs(logits=torch.cat(found), labels=images.labels[ids])

    def _scaled(self, images: Tensor, texts: Tensor) -> Tensor:
        return (self.towers.scale() * images @ texts.T).float().cpu()

    def data_digest(self) -> str:
        """Digest over all captioned sets, the axis and its prompts, and the preprocessing."""
        way = [self.towers.image_size, self.towers.mean, self.towers.std]
        others = {name: images.digest for name, images in self.others.items()}
        own = [self.axis, self.axes[self.axis].templates, self.forget_loss, way, others]
        return json_digest([super().data_digest(), *own])


def _joined(a: ClassifierOutputs, b: ClassifierOutputs) -> ClassifierOutputs:
    """Two sets of outputs of different samples as one."""
    parts = [(x.table, x.labels, x.ids) for x in (a, b)]
    table, labels, ids = (np.concatenate(p) for p in zip(*parts, strict=True))
    return ClassifierOutputs(logits=table, labels=labels, ids=ids)


def class_means(embedded: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Mean of the rows of each class ``[C, D]``; zero for a class without any."""
    members = functional.one_hot(labels, n_classes).to(embedded).T
    means: Tensor = members @ embedded / members.sum(1, keepdim=True).clamp(min=1)
    return means

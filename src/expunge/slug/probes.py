"""What a step does to the model: forget accuracy and utility of edited weights, with everything cached that stays.

An edit in block ``b`` of one tower leaves the other tower and all blocks before ``b`` as they are.
:class:`SuffixProbe` keeps both; :class:`FullProbe` runs everything each time and is what the other is checked against.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from expunge.errors import DataError, RequestError, did_you_mean
from expunge.models.towers import Staged, Tokens, Tower, Towers
from expunge.patch.changes import accumulate_dtype
from expunge.restore import evaluating

#: Rows on which the staged pass is compared with the plain one.
CHECKED_ROWS = 8
#: Largest difference of normalised embeddings that counts as the same.
AGREEMENT = 1e-5


@dataclass(frozen=True)
class Further:
    """Another label axis of the utility images: its prompts stand behind those of the classes.

    Args:
        labels: int64 ``[U]``.
        n_classes: Number of classes.
        templates: Texts per class.
    """

    labels: Tensor
    n_classes: int
    templates: int = 1


@dataclass(frozen=True)
class SearchSet:
    """What the search of a step looks at.

    Args:
        forget: Preprocessed images of what shall be forgotten ``[F, 3, S, S]``.
        forget_labels: Their classes, int64 ``[F]``.
        utility: Preprocessed images of what shall stay ``[U, 3, S, S]``.
        utility_labels: Their classes, int64 ``[U]``.
        prompts: Texts of the classes, ``[C * templates, T]``; the templates of one class stand together.
        templates: Texts per class; a class is the normalised mean of its normalised texts.
        further: Other axes along which the utility images are named too.

    Raises:
        DataError: Nothing to forget, or numbers that do not fit each other.
    """

    forget: Tensor
    forget_labels: Tensor
    utility: Tensor
    utility_labels: Tensor
    prompts: Tokens
    templates: int = 1
    further: tuple[Further, ...] = ()

    def __post_init__(self) -> None:
        if self.templates < 1 or self._own % self.templates or self._own < 1:
            raise DataError(f"{self._own} prompts are not a whole number of classes of {self.templates} texts")
        if any(len(f.labels) != len(self.utility) for f in self.further):
            raise DataError("the utility images do not have one label each along another axis")
        pairs = {"forget": (self.forget, self.forget_labels), "utility": (self.utility, self.utility_labels)}
        for name, (images, labels) in pairs.items():
            if len(images) != len(labels):
                raise DataError(f"the search set has {len(images)} {name} images but {len(labels)} labels")
            if not len(images):
                raise DataError(f"the search set has no {name} images")
            if int(labels.min()) < 0 or int(labels.max()) >= self.n_classes:
                raise DataError(f"a label of the {name} images is outside 0..{self.n_classes - 1}")

    @property
    def _own(self) -> int:
        return len(self.prompts) - sum(f.n_classes * f.templates for f in self.further)

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self._own // self.templates

    def classifiers(self, texts: Tensor) -> list[Tensor]:
        """Class embeddings ``[C, D]`` of the main axis and of the further ones, from those of all prompts."""
        groups = [(self.n_classes, self.templates), *((f.n_classes, f.templates) for f in self.further)]
        parts = texts.split([classes * templates for classes, templates in groups])
        each = [functional.normalize(p, dim=-1).reshape(*g, -1) for p, g in zip(parts, groups, strict=True)]
        return [functional.normalize(e.mean(1), dim=-1) for e in each]

    @property
    def images(self) -> Tensor:
        """Forget images first, then the others ``[F + U, 3, S, S]``."""
        return torch.cat([self.forget, self.utility])


@dataclass(frozen=True)
class Figures:
    """Accuracies of one state of the weights.

    Args:
        forget: Share of the forget images whose class is among the top ``k``; NaN if a logit is not finite.
        utility: Share of the other images whose class comes first, the mean over the axes; NaN likewise.
    """

    forget: float
    utility: float


def accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows whose own logit has fewer than ``k`` strictly larger ones; NaN if a logit is not finite.

    >>> accuracy(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0]]), torch.tensor([0, 1]), k=1)
    0.5
    >>> accuracy(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0]), k=3)
    1.0
    """
    if not bool(torch.isfinite(logits).all()):
        return math.nan
    own = logits.gather(1, labels[:, None].to(logits.device))
    hits = (logits > own).sum(1) < k
    return int(hits.sum()) / len(hits)


@contextmanager
def edited(towers: Towers, deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """Add differences to the weights, formed in fp32 and rounded once; the exact bits come back on leaving.

    Raises:
        RequestError: The model has no such tensor, or one of another shape.
    """
    parameters = towers.parameters()
    for name, delta in deltas.items():
        if name not in parameters:
            raise RequestError(f"the model has no tensor '{name}'{did_you_mean(name, parameters)}")
        if parameters[name].shape != delta.shape:
            raise RequestError(f"'{name}' is {list(parameters[name].shape)}, its difference {list(delta.shape)}")
    kept = {n: parameters[n].detach().clone() for n in deltas}
    try:
        with torch.no_grad():
            for name, delta in deltas.items():
                base = kept[name]
                wide = accumulate_dtype(base.dtype)
                parameters[name].copy_(base.to(wide) + delta.to(base.device, wide))
        yield
    finally:
        with torch.no_grad():
            for name, base in kept.items():
                parameters[name].copy_(base)


class Prober(ABC):
    """Figures of the model with some weights changed.

    Args:
        towers: The model, with its untouched weights; it is left as found.
        data: Images and classes.
        top_k: ``k`` of the forget accuracy. The utility is a top-1 accuracy.
        batch_size: Images or texts per forward pass.

    Attributes:
        notes: Where a slower way had to be taken, and why.
    """

    def __init__(self, towers: Towers, data: SearchSet, *, top_k: int = 1, batch_size: int = 100) -> None:
        self.towers, self.data, self.top_k, self.batch_size = towers, data, top_k, batch_size
        self.notes: list[str] = []
        self._images = data.images

    @abstractmethod
    def embeddings(self, deltas: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Image embeddings ``[F + U, D]`` and texts' embeddings ``[C * templates, D]``, not normalised."""

    @torch.no_grad()
    def logits(self, deltas: Mapping[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Zero-shot logits of the forget images ``[F, C]`` and the others ``[U, C]``, and those along further axes.

        Args:
            deltas: Differences to the untouched weights by name; none by default.
        """
        with evaluating(self.towers.model):
            images, texts = self.embeddings(deltas or {})
            return self._compare(images, texts)

    def __call__(self, deltas: Mapping[str, Tensor] | None = None) -> Figures:
        """Forget accuracy and utility."""
        return self.figures(*self.logits(deltas))

    def figures(self, forget: Tensor, *utility: Tensor, rows: Tensor | None = None) -> Figures:
        """Accuracies from what :meth:`logits` returned; ``rows`` picks some of the forget images."""
        labels = self.data.forget_labels
        if rows is not None:
            forget, labels = forget[rows.to(forget.device)], labels[rows.to(labels.device)]
        wanted = [self.data.utility_labels, *(f.labels for f in self.data.further)]
        kept = [accuracy(x, own) for x, own in zip(utility, wanted, strict=True)]
        return Figures(accuracy(forget, labels, self.top_k), sum(kept) / len(kept))

    def plain(self, tower: Tower) -> Tensor:
        """Embeddings of one side by the model's own forward pass, with the weights as they are."""
        call = self.towers.image if tower == "vision" else self.towers.text
        return torch.cat([call(chunk) for chunk in self.chunks(tower)])  # type: ignore[arg-type]

    def chunks(self, tower: Tower) -> Iterator[Tensor | Tokens]:
        """The inputs of one side, in batches."""
        inputs: Tensor | Tokens = self._images if tower == "vision" else self.data.prompts
        for start in range(0, len(inputs), self.batch_size):
            yield inputs[start : start + self.batch_size]

    def _compare(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        main, *further = self.data.classifiers(texts)
        scaled = self.towers.scale() * functional.normalize(images, dim=-1)
        forget, utility = (scaled @ main.T).split([len(self.data.forget), len(self.data.utility)])
        return forget, utility, *(scaled[len(forget) :] @ classes.T for classes in further)


class FullProbe(Prober):
    """Everything anew for every state of the weights: the reference."""

    def embeddings(self, deltas: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Both towers, plainly."""
        with edited(self.towers, deltas):
            return self.plain("vision"), self.plain("language")


@dataclass
class _Prefix:
    """States of all inputs of one tower before block ``start``, on untouched weights."""

    start: int
    states: list[Staged] = field(default_factory=list)


class SuffixProbe(Prober):
    """Only what an edit can reach: blocks from the first edited one on, against fixed embeddings of the other tower.

    The states before a block are advanced from those of an earlier one, so that searching layers in ascending order of
    their blocks costs one pass in all.

    The staged pass is compared with the plain one, on a few rows, for every block that is started at; if they differ,
    or if the states would depend on an edited tensor or need more memory than allowed, that tower is run whole for
    every probe and :attr:`notes` says so.

    Args:
        towers: See :class:`Prober`.
        data: See :class:`Prober`.
        top_k: See :class:`Prober`.
        batch_size: See :class:`Prober`.
        memory: Bytes that the states of one tower may take.
    """

    def __init__(
        self, towers: Towers, data: SearchSet, *, top_k: int = 1, batch_size: int = 100, memory: int = 1 << 31
    ) -> None:
        super().__init__(towers, data, top_k=top_k, batch_size=batch_size)
        self.memory = memory
        self._prefix: dict[Tower, _Prefix] = {}
        self._base: dict[Tower, Tensor] = {}
        self._starts: dict[tuple[str, ...], int | None] = {}

    def embeddings(self, deltas: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The edited tower from its first edited block on; the other as it was."""
        places = {n: self.towers.place(n).tower for n in deltas}
        shared = [n for n, tower in places.items() if tower is None]
        if shared:
            raise RequestError(f"'{shared[0]}' belongs to no tower and cannot be probed")
        found: dict[Tower, Tensor] = {}
        for tower in ("vision", "language"):
            own = {n: d for n, d in deltas.items() if places[n] == tower}
            found[tower] = self._run(tower, own) if own else self._untouched(tower)
        return found["vision"], found["language"]

    def _run(self, tower: Tower, deltas: Mapping[str, Tensor]) -> Tensor:
        start = self._start(tower, tuple(deltas))
        if start is None:
            with edited(self.towers, deltas):
                return self.plain(tower)
        states = self._states(tower, start)
        with edited(self.towers, deltas):
            return torch.cat([self._finish(tower, state, start) for state in states])

    def _finish(self, tower: Tower, state: Staged, start: int) -> Tensor:
        return self.towers.leave(tower, self.towers.through(tower, state, start))

    @torch.no_grad()
    def prepare(self, names: Iterable[str]) -> None:
        """Form the states that edits of these tensors start from, so that nothing is run twice for the original."""
        by_tower: dict[Tower, list[str]] = {}
        for name in names:
            tower = self.towers.place(name).tower
            if tower is not None:
                by_tower.setdefault(tower, []).append(name)
        with evaluating(self.towers.model):
            for tower, own in by_tower.items():
                start = self._start(tower, tuple(own))
                if start is not None:
                    self._states(tower, start)

    def _untouched(self, tower: Tower) -> Tensor:
        """Embeddings with the original weights, from cached states where there are some."""
        if tower not in self._base:
            prefix = self._prefix.get(tower)
            if prefix is None:
                self._base[tower] = self.plain(tower)
            else:
                self._base[tower] = torch.cat([self._finish(tower, s, prefix.start) for s in prefix.states])
        return self._base[tower]

    def _states(self, tower: Tower, start: int) -> list[Staged]:
        prefix = self._prefix.get(tower)
        if prefix is None or prefix.start > start:
            prefix = _Prefix(0, [self.towers.enter(tower, chunk) for chunk in self.chunks(tower)])
        if prefix.start < start:
            prefix = _Prefix(start, [self.towers.through(tower, s, prefix.start, start) for s in prefix.states])
        self._prefix[tower] = prefix
        return prefix.states

    def _start(self, tower: Tower, names: tuple[str, ...]) -> int | None:
        """The block to start at; ``None``: the whole tower, plainly."""
        if names not in self._starts:
            blocks = [self.towers.place(n).block for n in names]
            depth = self.towers.depth(tower)
            start = min(depth if b is None else b for b in blocks)
            rows = next(self.chunks(tower))[:CHECKED_ROWS]
            why = ""
            if depth == 0:
                why = f"the {tower} tower is no plain stack of blocks"
            elif self._reaches(tower, rows[:1], names, start):
                if all(b is not None for b in blocks):
                    why = f"block {start} of the {tower} tower is reached by '{names[0]}' before it starts"
                self._starts[names] = None
            elif not self._agrees(tower, rows, start):
                why = f"the {tower} tower in stages differs from its own forward pass"
            elif (size := self._bytes(tower, rows, start)) > self.memory:
                why = f"the states of the {tower} tower need {size / 1e6:.0f} MB, more than {self.memory / 1e6:.0f} MB"
            else:
                self._starts[names] = start
            if why:
                self._starts[names] = None
                self._note(f"{why}; the whole tower is run for every probe")
        return self._starts[names]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _reaches(self, tower: Tower, rows: Tensor | Tokens, names: Iterable[str], start: int) -> bool:
        """Whether the state before block ``start`` depends on one of the tensors."""
        parameters = self.towers.parameters()
        chosen = [parameters[n] for n in names]
        flags = [p.requires_grad for p in chosen]
        try:
            for p in chosen:
                p.requires_grad_(True)
            with torch.enable_grad():
                hidden = self.towers.through(tower, self.towers.enter(tower, rows), 0, start).hidden
                if not hidden.requires_grad:
                    return False
                found = torch.autograd.grad(hidden.sum(), chosen, allow_unused=True)
            return any(g is not None for g in found)
        finally:
            for p, flag in zip(chosen, flags, strict=True):
                p.requires_grad_(flag)

    def _agrees(self, tower: Tower, rows: Tensor | Tokens, start: int) -> bool:
        call = self.towers.image if tower == "vision" else self.towers.text
        state = self.towers.through(tower, self.towers.enter(tower, rows), 0, start)
        staged = functional.normalize(self._finish(tower, state, start), dim=-1)
        plain = functional.normalize(call(rows), dim=-1)  # type: ignore[arg-type]
        return bool(((staged - plain).abs() <= AGREEMENT).all())

    def _bytes(self, tower: Tower, rows: Tensor | Tokens, start: int) -> int:
        hidden = self.towers.enter(tower, rows).hidden
        total = len(self._images) if tower == "vision" else len(self.data.prompts)
        return hidden.numel() * hidden.element_size() // len(rows) * total

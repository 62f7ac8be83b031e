"""What is to be forgotten: a frozen, serialisable request with a digest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge import rng
from expunge.digest import json_digest
from expunge.errors import RequestError, did_you_mean
from expunge.part import Frozen


class Samples(Frozen):
    """Named training samples, by their index in the training set."""

    kind: Literal["samples"] = "samples"
    indices: tuple[int, ...]


class Label(Frozen):
    """All training samples of one or several classes, by number or name."""

    kind: Literal["label"] = "label"
    classes: tuple[int | str, ...]


class Fraction(Frozen):
    """A random fraction of the training set, drawn with its own seed.

    Args:
        fraction: Share of the training samples, in (0, 1).
        stratified: The same share of every class (largest remainders), instead of one draw over all samples.
        seed: Seed of the draw, independent of the run's seed.
    """

    kind: Literal["fraction"] = "fraction"
    fraction: float = Field(gt=0, lt=1)
    stratified: bool = True
    seed: int = 0


class Concept(Frozen):
    """A concept named in words, for models that take text."""

    kind: Literal["concept"] = "concept"
    text: str = Field(min_length=1)
    substitute: str = ""


What = Annotated[Samples | Label | Fraction | Concept, Field(discriminator="kind")]


class ForgetRequest(Frozen):
    """A request to forget, and what to retain.

    Args:
        what: The forget set.
        retain: Indices of the retain set; by default everything that is not forgotten.
        name: A label for reports.
    """

    what: What
    retain: tuple[int, ...] | None = None
    name: str = ""

    @staticmethod
    def label(*classes: int | str) -> ForgetRequest:
        """Forget all samples of one or several classes.

        >>> ForgetRequest.label(0, "cat").title
        'classes 0, cat'
        """
        return ForgetRequest(what=Label(classes=classes))

    @staticmethod
    def samples(indices: Iterable[int]) -> ForgetRequest:
        """Forget the training samples with these indices."""
        return ForgetRequest(what=Samples(indices=tuple(int(i) for i in indices)))

    @staticmethod
    def fraction(fraction: float, *, stratified: bool = True, seed: int = 0) -> ForgetRequest:
        """Forget a random fraction of the training set."""
        return ForgetRequest(what=Fraction(fraction=fraction, stratified=stratified, seed=seed))

    @staticmethod
    def concept(text: str) -> ForgetRequest:
        """Forget a concept named in words."""
        return ForgetRequest(what=Concept(text=text))

    @staticmethod
    def from_file(path: str | Path) -> ForgetRequest:
        """Read an index file: a JSON list of integers, or an object with ``forget`` (and ``retain``) lists.

        Raises:
            RequestError: The file is missing or holds something else.
        """
        try:
            data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RequestError(f"{path}: cannot be read as an index file ({error})") from None
        body = {"forget": data} if isinstance(data, list) else data
        if (
            not isinstance(body, dict)
            or "forget" not in body
            or set(body) - {"forget", "retain", "dataset", "val", "sha256"}
        ):
            raise RequestError(f"{path}: expected a JSON list of integers, or an object with the key 'forget'")
        for key in ("forget", "retain"):
            values = body.get(key)
            if values is not None and not (isinstance(values, list) and all(type(i) is int for i in values)):
                raise RequestError(f"{path}: '{key}' must be a list of integers")
        retain = body.get("retain")
        what = Samples(indices=tuple(body["forget"]))
        return ForgetRequest(what=what, retain=None if retain is None else tuple(retain), name=Path(path).stem)

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked (the name does not count)."""
        return json_digest(self.model_dump(mode="json", exclude={"name"}))

    @property
    def title(self) -> str:
        """A few words for headings."""
        if self.name:
            return self.name
        what = self.what
        if isinstance(what, Label):
            return ("class " if len(what.classes) == 1 else "classes ") + ", ".join(map(str, what.classes))
        if isinstance(what, Samples):
            return f"{len(what.indices)} samples"
        if isinstance(what, Fraction):
            return f"{100 * what.fraction:g} % random samples" + (", stratified" if what.stratified else "")
        return f"concept '{what.text}'"

    def resolve(self, labels: Tensor, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Turn the request into index sets.

        Args:
            labels: int64 ``[N]``, labels of the training set.
            classes: Class names, one per label value.

        Returns:
            ``(forget, retain)``: sorted int64 indices, disjoint.

        Raises:
            RequestError: Unknown class, index out of range, duplicates, empty set, everything, or overlap with retain.
        """
        n = len(labels)
        what = self.what
        if isinstance(what, Concept):
            raise RequestError("a concept in words can be asked of text models only; for a classifier name a class")
        if isinstance(what, Label):
            numbers = class_numbers(what.classes, classes)
            forget = torch.isin(labels, torch.tensor(numbers)).nonzero().flatten()
            absent = [c for c in numbers if not bool((labels == c).any())]
            if absent:
                raise RequestError(f"class {absent[0]} ('{classes[absent[0]]}') has no sample in the training set")
        elif isinstance(what, Samples):
            forget = _checked(what.indices, n, "forget")
        else:
            forget = _draw(what, labels)
        everything = torch.ones(n, dtype=torch.bool)
        everything[forget] = False
        retain = everything.nonzero().flatten()
        if self.retain is not None:
            retain = _checked(self.retain, n, "retain")
            overlap = retain[torch.isin(retain, forget)]
            if len(overlap):
                raise RequestError(
                    f"{len(overlap)} samples are in both the forget and the retain set, first {int(overlap[0])}"
                )
        if len(forget) == 0:
            raise RequestError(f"the forget set is empty: {self.title} of {n} training samples selects none")
        if len(retain) == 0:
            raise RequestError(f"the forget set is the whole training set ({n} samples); nothing is left to retain")
        return forget, retain


def class_numbers(wanted: Sequence[int | str], classes: Sequence[str]) -> list[int]:
    """Map class numbers or names to numbers.

    Raises:
        RequestError: Empty, unknown or repeated classes, or all of them.
    """
    numbers = []
    for c in wanted:
        if isinstance(c, str) and c in classes:
            numbers.append(list(classes).index(c))
        elif isinstance(c, int) and 0 <= c < len(classes):
            numbers.append(c)
        elif isinstance(c, str) and c.isdigit() and int(c) < len(classes):
            numbers.append(int(c))
        else:
            raise RequestError(f"unknown class {c!r} among {len(classes)} classes{did_you_mean(str(c), classes)}")
    if not numbers:
        raise RequestError("no class is named")
    if len(set(numbers)) < len(numbers):
        raise RequestError(f"class {Counter(numbers).most_common(1)[0][0]} is named twice")
    if len(numbers) == len(classes):
        raise RequestError(f"all {len(classes)} classes are to be forgotten; nothing is left to retain")
    return numbers


def _checked(indices: Sequence[int], n: int, which: str) -> Tensor:
    if not indices:
        raise RequestError(f"the {which} set is empty")
    outside = [i for i in indices if not 0 <= i < n]
    if outside:
        raise RequestError(f"{len(outside)} {which} indices are outside 0..{n - 1}, first {outside[0]}")
    if len(set(indices)) < len(indices):
        index, times = Counter(indices).most_common(1)[0]
        raise RequestError(
            f"the {which} set has {len(indices) - len(set(indices))} duplicates, e.g. {index} ({times} times)"
        )
    return torch.tensor(sorted(indices), dtype=torch.int64)


def _draw(what: Fraction, labels: Tensor) -> Tensor:
    n = len(labels)
    order = rng.permutation(rng.key(what.seed, "forget fraction"), n)
    total = int(n * what.fraction + 1e-9)
    if not what.stratified:
        return order[:total].sort().values
    counts = torch.bincount(labels)
    exact = counts.double() * what.fraction
    take = (exact + 1e-9).floor().long()
    rest = (exact - take).argsort(descending=True, stable=True)
    take[rest[: max(0, total - int(take.sum()))]] += 1
    chosen = [order[labels[order] == c][: int(take[c])] for c in range(len(counts))]
    return torch.cat(chosen).sort().values

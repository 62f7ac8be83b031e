"""From requests to index sets, for tasks on labelled and captioned images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from expunge.data.base import ImageSet
from expunge.data.caption_files import OTHER
from expunge.data.captions import Axis, CaptionedImages, mentions
from expunge.diffusion.asks import Ask, repeated
from expunge.errors import RequestError, did_you_mean
from expunge.request import Concept, ForgetRequest, Label, class_numbers
from expunge.tasks.base import Split


def plain(name: str, *, lower: bool = True) -> str:
    """A name as it stands in a text: blanks for underscores, no runs of blanks.

    >>> plain("Elon_Musk"), plain("Elon_Musk", lower=False)
    ('elon musk', 'Elon Musk')
    """
    found = " ".join(name.replace("_", " ").split())
    return found.lower() if lower else found


def index_sets(sets: Mapping[str, ImageSet], forget: Tensor, retain: Tensor, gone: Sequence[int] = ()) -> Split:
    """Index sets of all roles.

    Unreadable retain images are left out and counted in the notes. Of classes that go as a whole, the test images form
    ``forget_test``.

    Args:
        sets: ``train``, ``test`` and further sets by role.
        forget: Training ids.
        retain: Training ids.
        gone: Classes that the request removes as a whole.

    Raises:
        RequestError: A role has no sample left.
    """
    notes = []
    train = sets["train"]
    kept = retain[torch.isin(retain, train.readable())] if train.unreadable else retain
    if len(kept) < len(retain):
        notes.append(f"{len(retain) - len(kept)} unreadable images were left out of the retain set")
    indices: dict[str, Tensor] = {"forget": forget, "retain": kept}
    indices |= {role: images.readable() for role, images in sets.items() if role != "train"}
    if gone:
        of_class = torch.isin(sets["test"].labels[indices["test"]], torch.tensor(list(gone)))
        indices["forget_test"] = indices["test"][of_class]
        indices["test"] = indices["test"][~of_class]
    empty = [r for r, ids in indices.items() if not len(ids) and r != "forget"]
    if empty:
        raise RequestError(f"after this request no sample is left in: {', '.join(empty)}")
    return Split(indices, tuple(notes), tuple(sorted(gone)))


def known_class(request: ForgetRequest, axis: str, axes: Mapping[str, Axis]) -> ForgetRequest:
    """A request for a concept that is a class of the axis, as a request for that class; any other as it is.

    Raises:
        RequestError: The concept is a class of another axis.
    """
    if not isinstance(request.what, Concept):
        return request
    text = plain(request.what.text)
    names = {plain(name): name for name in axes[axis].classes}
    if text in names:
        return request.model_copy(update={"what": ForgetRequest.label(names[text]).what})
    for name, other in axes.items():
        if name != axis and text in {plain(c) for c in other.classes}:
            raise RequestError(
                f"'{request.what.text}' is a class of the axis '{name}', not of '{axis}', this task's axis; "
                f"set task.axis to '{name}'"
            )
    return request


def captioned_split(
    request: ForgetRequest, axis: str, axes: Mapping[str, Axis], sets: Mapping[str, CaptionedImages]
) -> Split:
    """Index sets of a request on captioned images; a concept in words is a class of the axis or what captions name.

    Raises:
        RequestError: The request does not fit the data; no caption names the concept.
        DataError: A sample to forget cannot be read.
    """
    request = known_class(request, axis, axes)
    train = sets["train"]
    what = request.what
    if not isinstance(what, Concept):
        forget, retain = request.resolve(train.labels, train.classes)
        train.require(forget)
        return index_sets(sets, forget, retain, removed(request, train.classes))
    found = train.mentioning(what.text)
    if not len(found):
        names = [plain(c) for a in axes.values() for c in a.classes]
        raise RequestError(
            f"no caption of the {len(train)} training images names '{what.text}'{did_you_mean(plain(what.text), names)}"
        )
    if request.retain is not None:
        raise RequestError("a concept that captions name cannot be combined with retain indices")
    train.require(found)
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[found] = False
    return replace(index_sets(sets, found, rest.nonzero().flatten()), concept=plain(what.text, lower=False))


def removed(request: ForgetRequest, classes: Sequence[str]) -> list[int]:
    """Classes that a request removes as a whole."""
    return class_numbers(request.what.classes, classes) if isinstance(request.what, Label) else []


def named_count(classes: Sequence[str]) -> int:
    """Number of the classes that have a name: a last class ``other`` holds the captions that name none."""
    return len(classes) - (len(classes) > 1 and classes[-1] == OTHER)


def prompts_of(axis: Axis) -> list[list[str]]:
    """The templates of an axis with each class filled in, one list per class."""
    return [[t.format(plain(name, lower=False)) for t in axis.templates] for name in axis.classes]


def asks_along(axis: str, axes: Mapping[str, Axis], *, images: int = 1, seed: int = 0) -> list[Ask]:
    """What an evaluation draws by default: every prompt of every class of an axis.

    The images show the prompt's class along the axis, and along another one the class that the prompt names. The class
    ``other`` of captions without a name is not drawn.

    Args:
        axis: Name of the axis.
        axes: All axes.
        images: Images per prompt; they differ in their noise.
        seed: Of the noise.
    """
    asks: list[Ask] = []
    for number, prompts in enumerate(prompts_of(axes[axis])[: named_count(axes[axis].classes)]):
        for prompt in prompts:
            labels = named_classes(prompt, {n: a for n, a in axes.items() if n != axis})
            asks.append(Ask(prompt, seed, len(asks), {axis: number, **labels}))
    return repeated(asks, images)


def named_classes(prompt: str, axes: Mapping[str, Axis]) -> dict[str, int]:
    """The class that a prompt names along each axis; axes of which it names none or several are left out."""
    found = {n: [i for i, c in enumerate(a.classes) if mentions(prompt, c)] for n, a in axes.items()}
    return {n: numbers[0] for n, numbers in found.items() if len(numbers) == 1}

"""Judging folders of images: UA, IRA, CRA and all further figures of images that lie on disk, whoever drew them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from expunge.config.judging import JudgingConfig
from expunge.config.text import write_yaml
from expunge.data.captions import Axis
from expunge.diffusion.answer_sets import AnswerSet, find_answers, image_files, read_images
from expunge.diffusion.asks import Ask, about, distinct, read_prompts
from expunge.diffusion.image_folder import MANIFEST, recorded
from expunge.errors import ConfigError, DataError, did_you_mean
from expunge.files import sha256_file
from expunge.guards import check_device
from expunge.metrics.accuracy import per_class_accuracy
from expunge.metrics.estimate import Estimate
from expunge.metrics.generative import measure_generated
from expunge.metrics.judge import GeneratedObserved, JointJudge, Judge, observe_generated, unit_pixels
from expunge.patch.patch import current_versions
from expunge.report.model import Report, Row
from expunge.report.samples import samples_section
from expunge.run import differences
from expunge.tasks.concepts import named_classes, plain
from expunge.tasks.judging import judged_classes, make_judge, make_tools

#: Facts of a folder that differ between an original and an erased model.
_OF_MODEL = frozenset({"model", "patches"})
_PACKAGES = ("timm", "torchvision", "lpips", "nudenet", "transformers", "open_clip_torch")
#: A bar: title and number of steps to a context that yields what moves it on.
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def _no_bar(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    del title, total
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class Question:
    """What is judged: what was asked for, and what was to be forgotten.

    Args:
        asks: One per image, with labels.
        axis: The axis of what was to be forgotten; empty without any.
        forgotten: Its classes.
        classes: Names of the classes by axis, of the judge or of the prompts file.
        names: Names of the labels by axis and number.
        source: Where the asks come from.
    """

    asks: tuple[Ask, ...]
    axis: str
    forgotten: tuple[int, ...]
    classes: Mapping[str, Sequence[str]]
    names: Mapping[str, Mapping[int, str]]
    source: str

    @property
    def title(self) -> str:
        """What was to be forgotten, in words."""
        return ", ".join(str(self.classes[self.axis][c]) for c in self.forgotten)


def ask_question(
    config: JudgingConfig,
    folder: str | Path,
    prompts: str | Path | None,
    forget: Sequence[str] = (),
    images: int | None = None,
) -> Question:
    """Read the prompts and check them against the judge's classes; no model is built.

    Args:
        config: The judge.
        folder: Images; without ``prompts`` its list of asks is taken.
        prompts: A CSV file, see :func:`~expunge.diffusion.asks.read_prompts`.
        forget: What was to be forgotten, as ``axis=name``; several names of one axis may be given.
        images: Images per prompt, instead of what the file says.

    Raises:
        ConfigError: Something to forget that the judge does not know; several axes; no prompts.
        DataError: Labels that are not the judge's classes.
    """
    classes: dict[str, Sequence[str]] = dict(judged_classes(config.judge))
    given: Mapping[str, Mapping[int, str]] = {}
    if prompts is not None:
        file = read_prompts(prompts)
        asks, given, source = file.drawn(images), file.names, str(prompts)
    elif (Path(folder) / MANIFEST).is_file():
        if images is not None:
            raise ConfigError(f"'images' would have no effect: {folder} lists its images")
        asks, source = recorded(folder)[1], str(Path(folder) / MANIFEST)
    else:
        raise ConfigError(f"{folder} has no {MANIFEST}, so the prompts are needed: --prompts prompts.csv")
    for axis, known in given.items():
        classes.setdefault(axis, [known.get(i, str(i)) for i in range(max(known, default=-1) + 1)])
    _check_labels(asks, given, classes, source)
    axes = {a: Axis(torch.arange(len(c)), tuple(map(str, c)), ("{}",)) for a, c in classes.items()}
    asks = [replace(a, labels={**named_classes(a.prompt, axes), **a.labels}) for a in asks]
    axis, forgotten = _forgotten(forget, classes)
    for c in forgotten:
        if not any(a.labels.get(axis) == c for a in asks):
            raise ConfigError(f"{source}: no prompt asks for the {axis} '{classes[axis][c]}'")
    names = {a: dict(given.get(a, {})) or dict(enumerate(map(str, c))) for a, c in classes.items()}
    return Question(tuple(asks), axis, forgotten, classes, names, source)


def _check_labels(
    asks: Sequence[Ask],
    given: Mapping[str, Mapping[int, str]],
    classes: Mapping[str, Sequence[str]],
    source: str,
) -> None:
    for ask in asks:
        for axis, number in ask.labels.items():
            known = classes.get(axis)
            if known is not None and number >= len(known):
                raise DataError(
                    f"{source}: {about(ask)} asks for {axis} {number}; the judge knows {len(known)} classes"
                )
    for axis, names in given.items():
        for number, name in names.items():
            known = classes[axis]
            if number < len(known) and plain(name) != plain(str(known[number])):
                raise DataError(
                    f"{source}: {axis} {number} is '{name}' there and '{known[number]}' for the judge; list its "
                    "classes in the order of its outputs, and the labels in that order too"
                )


def _forgotten(forget: Sequence[str], classes: Mapping[str, Sequence[str]]) -> tuple[str, tuple[int, ...]]:
    axes, numbers = [], []
    for text in forget:
        axis, sign, name = text.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"what was to be forgotten is given as axis=name, such as object=ring, not {text!r}")
        axis = axis.strip()
        if axis not in classes:
            known = did_you_mean(axis, classes) if classes else ": there is no judge and the prompts have no labels"
            raise ConfigError(f"there is no axis {axis!r}{known}")
        names = [plain(str(c)) for c in classes[axis]]
        if plain(name) not in names:
            raise ConfigError(f"the judge knows no {axis} '{name.strip()}'{did_you_mean(plain(name), names)}")
        axes.append(axis)
        numbers.append(names.index(plain(name)))
    if len(set(axes)) > 1:
        raise ConfigError(f"what was to be forgotten is of one axis, not of {' and '.join(sorted(set(axes)))}")
    return axes[0] if axes else next(iter(classes), ""), tuple(dict.fromkeys(numbers))


def judge_folder(
    config: JudgingConfig,
    folder: str | Path,
    question: Question,
    *,
    original: str | Path | None = None,
    real: str | Path | None = None,
    pattern: str | None = None,
    device: str = "cpu",
    bar: Bar = _no_bar,
) -> Report:
    """Judge the images of a folder, and those of the untouched model beside them.

    All files are found and read before a model is built.

    Args:
        config: The judge and further figures.
        folder: Images of the model after forgetting.
        question: What was asked for, see :func:`ask_question`.
        original: Images of the untouched model for the same asks.
        real: Real images of what stays, at any depth.
        pattern: How the files are named, see :func:`~expunge.diffusion.answer_sets.find_answers`.
        device: Where the judge runs.
        bar: Shows progress.

    Raises:
        ConfigError: The judge does not fit, or the device is not there.
        DataError: Images that are missing or cannot be read, with their names.
        ArtifactError: Weights that are missing or broken.
    """
    check_device(device)
    asks, title = question.asks, Path(folder).name or str(folder)
    distinct(asks, question.source)
    where = {"judged": folder} | ({"original": original} if original is not None else {})
    found = {name: find_answers(path, asks, question.names, pattern) for name, path in where.items()}
    extra = [] if real is None else image_files(real)
    pixels, digests = {}, {}
    with bar("reading", len(asks) * len(found) + len(extra)) as advance:
        for name, answers in found.items():
            pixels[name], digests[name] = read_images(answers.paths, advance)
        known = read_images(extra, advance) if extra else None
    if original is not None and pixels["original"].shape != pixels["judged"].shape:
        sizes = " and ".join(str(list(p.shape[1:])) for p in pixels.values())
        raise DataError(f"{folder} and {original} hold images of different sizes: {sizes}")
    judge, tools = make_judge(config.judge, config.figures), make_tools(config.figures)
    _move(judge, device)
    seen: dict[str, GeneratedObserved] = {}
    with bar("judging", len(asks) * len(found)) as advance:
        for name, images in pixels.items():
            seen[name] = observe_generated(judge, images, asks, classes=question.classes, advance=advance)
    features = None
    if known is not None:
        if judge is None:
            raise ConfigError("real images are compared by features; give 'judge' or 'figures.inception'")
        parts = [judge.features(unit_pixels(p)).float().cpu().numpy() for p in known[0].split(128)]
        features, digests["real"] = np.concatenate(parts), known[1]
    metrics = {
        name: measure_generated(
            own,
            axis=question.axis,
            forgotten=question.forgotten,
            before=seen.get("original") if name == "judged" else None,
            real=features,
            tools=tools,
        )
        for name, own in seen.items()
    }
    forgetting = f": forgetting {question.title}" if question.forgotten else ""
    rows = [Row(n, "before" if n == "original" else "after", metrics[n], _drawn(found[n])) for n in reversed(found)]
    report = Report(
        title=f"{config.name}: images of {title}{forgetting}",
        request={
            "summary": f"Say what {len(asks):,} images in {folder} show"
            + (f", of which {_asked(question):,} were asked for {question.title}" if question.forgotten else "")
            + ".",
            "noun": "images",
            "axis": question.axis,
            "forgotten": question.title,
        },
        rows=rows,
        class_accuracy={("before" if n == "original" else "after"): _by_class(s) for n, s in seen.items()},
        forgotten_classes=[str(question.classes[question.axis][c]) for c in question.forgotten],
        not_shown=_limits(config, original is not None, judge is not None, found["judged"]),
        flags=_flags(found),
        versions=current_versions() | _installed(),
        environment={"device": device, "threads": str(torch.get_num_threads()), "machine": platform.machine()},
        digests={"prompts": sha256_file(question.source), **{f"{n} images": d for n, d in digests.items()}},
        config=write_yaml(config.model_dump(mode="json")),
    )
    if report.class_accuracy == {n: {} for n in report.class_accuracy}:
        report.class_accuracy = {}
    order = {name: seen[name] for name in reversed(found)}
    report.samples = samples_section(
        order, axis=question.axis, forgotten=question.forgotten, metrics={n: metrics[n] for n in order}
    )
    return report


def _asked(question: Question) -> int:
    return sum(a.labels.get(question.axis) in question.forgotten for a in question.asks)


def _move(judge: Judge | None, device: str) -> None:
    parts = judge.judges if isinstance(judge, JointJudge) else (judge,)
    for part in parts:
        model = getattr(part, "model", None)
        if isinstance(model, nn.Module):
            model.to(device)


def _by_class(seen: GeneratedObserved) -> dict[str, Estimate]:
    """Accuracy per class along every axis; a name that two axes share gets its axis before it."""
    found: dict[str, Estimate] = {}
    for axis in seen.judged:
        roles = seen.outputs(axis, ())
        if "test" in roles:
            for number, estimate in per_class_accuracy(roles["test"]).items():
                name = seen.named(axis, number)
                found[f"{axis}: {name}" if name in found else name] = estimate
    return found


def _drawn(answers: AnswerSet) -> str:
    facts = answers.facts
    sampler = facts.get("sampler")
    parts = [
        f"{answers.folder}, files {answers.pattern}",
        f"{answers.others} other images in the folder were not judged" if answers.others > 0 else "",
        f"drawn with {sampler.get('name')}" if isinstance(sampler, Mapping) else "",
        *(f"{k} {facts[k]}" for k in ("steps", "guidance", "side", "precision", "device") if k in facts),
    ]
    return ", ".join(filter(None, parts))


def _flags(found: Mapping[str, AnswerSet]) -> list[str]:
    facts = [{k: v for k, v in answers.facts.items() if k not in _OF_MODEL} for answers in found.values()]
    if len(facts) < 2 or not all(facts):
        return []
    differing = differences(facts[1], facts[0])
    return [f"The two folders were drawn otherwise: {'; '.join(differing[:5])}."] if differing else []


def _limits(config: JudgingConfig, paired: bool, judged: bool, answers: AnswerSet) -> list[str]:
    figures = config.figures
    found = ["A judge errs too: compare with the original model's row." if judged else "Nothing says what images show."]
    if not paired:
        found.append("FID, KID, LPIPS and pixel differences to the original were not run: no folder of its images.")
    missing = {"clip": "CLIP score", "lpips": "LPIPS", "style": "style loss"}
    lost = {k: v for k, v in missing.items() if getattr(figures, k) is None and (paired or k == "clip")}
    found += [f"{v}: not run, since the configuration has no 'figures.{k}'." for k, v in lost.items()]
    if figures.inception is None and paired and judged:
        found.append("FID and KID compare the judge's own features; published tables use Inception's.")
    if Path(answers.pattern).suffix.lower() in (".jpg", ".jpeg"):
        found.append("The images are JPEG files, whose compression judge and distances see.")
    found.append("One set of images; intervals cover the choice of images, not the variation between trainings.")
    return found


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

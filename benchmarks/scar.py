"""A step of SCAR against the plain passes it needs and against the published procedure, and the class statistics.

    OMP_NUM_THREADS=1 python benchmarks/scar.py [--steps N] [--classes K] [--json FILE]

The set-up that the published code was measured on: ResNet-20 with a 1 x 1 convolution to 512 features, 100 classes, one
of them removed, 500 forget images, batches of 256, one thread, CPU seconds. Every step of the library is followed by a
plain one (forward of both batches, backward, Adam) and a published one (the same, with the distances to all classes by
full inverses, the teacher's forward pass, and the accuracy on all forget images after the step), each on a copy of the
network, so that all meet the same load. Statistics: the published order of operations (shrink twice, normalise,
pseudo-inverse, per class) against the library's, from the same features.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.data.base import MemoryImages, Splits
from expunge.features.distance import ClassDistance, Metric
from expunge.features.statistics import ClassStatistics
from expunge.method import build_recipe
from expunge.models import ModelSpec, build_model
from expunge.request import ForgetRequest
from expunge.restore import freeze_norm_statistics
from expunge.run import unlearn
from expunge.tasks.classifier import ClassifierTask

BATCH, FORGET, WIDTH, PER_CLASS = 256, 500, 512, 6
LR, DELTA, GAMMA, KEEP = 5e-4, 0.5, 3.0, 5.0


class Wide(nn.Module):
    """ResNet-20 whose last stage is widened to 512 features."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.body = build_model(ModelSpec(name="resnet20"))
        self.body.linear = nn.Identity()
        self.widen = nn.Conv2d(64, WIDTH, 1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, n_classes)

    def features(self, x: Tensor) -> Tensor:
        body = self.body
        x = functional.relu(body.bn1(body.conv1(x)))
        x = body.layer3(body.layer2(body.layer1(x)))
        return functional.relu(self.bn(self.widen(x))).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


def make_task(classes: int, surrogates: int) -> ClassifierTask:
    generator = torch.Generator().manual_seed(0)

    def images(labels: Tensor) -> MemoryImages:
        x = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=generator, dtype=torch.uint8)
        return MemoryImages(x, labels, [str(c) for c in range(classes)])

    retain = torch.arange(1, classes).repeat(PER_CLASS)
    train = images(torch.cat([torch.zeros(FORGET, dtype=torch.int64), retain]))
    test = images(torch.arange(classes))
    torch.manual_seed(0)
    other = images(torch.zeros(surrogates, dtype=torch.int64))
    return ClassifierTask(Wide(classes).eval(), Splits("synthetic", train, test), surrogate=other)


def published_statistics(features: Tensor, labels: Tensor, classes: list[int]) -> tuple[Tensor, Tensor]:
    """Means ``[K, D]`` and pseudo-inverses ``[K, D, D]``, one class after the other."""
    means, inverses = [], []
    eye, ones = torch.eye(features.shape[1]), torch.ones(features.shape[1], features.shape[1])
    for c in classes:
        t = features[labels == c] ** DELTA
        s = torch.cov(t.T)
        for _ in range(2):
            off = s[(ones - eye).bool() & (s != 0)]
            s = s + GAMMA * s.diagonal().mean() * eye + GAMMA * off.mean() * (ones - eye)
        scale = s.diagonal().sqrt()
        means.append(t.mean(0))
        inverses.append(torch.linalg.pinv(s / (scale[:, None] * scale)))
    return torch.stack(means), torch.stack(inverses)


def stepper(task: ClassifierTask, published: bool) -> Callable[[Tensor, Tensor], float]:
    """A function that takes one step on the ids of a forget and a surrogate batch and returns its CPU seconds."""
    model: nn.Module = copy.deepcopy(task.model)
    teacher = copy.deepcopy(task.model).eval()
    forget, other = task.data.train, task._sets["surrogate"]
    split = task.split(ForgetRequest.label(0))
    model.train()
    if published:
        ids = split["retain"]
        with torch.no_grad():
            z = torch.cat([teacher.features(forget.images(c)) for c in ids.split(BATCH)])
        classes = list(range(1, task.n_classes))
        mean, inverse = published_statistics(z, forget.labels[ids], classes)
        unit = functional.normalize(mean, dim=1)
    else:
        freeze_norm_statistics(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def step(a: Tensor, b: Tensor) -> float:
        start = time.process_time()
        x, y = forget.images(a), other.images(b)
        z = model.features(x)
        out = model(y)
        if published:
            u = functional.normalize(z**DELTA, dim=1)
            rows = (u - unit[:, None]).contiguous()  # [K, B, D], as published for every class
            d = ((rows @ inverse) @ rows.transpose(1, 2)).diagonal(dim1=1, dim2=2).T
            away = d.min(1).values.mean()
            with torch.no_grad():
                target = teacher(y).softmax(1)
        else:
            away, target = z.mean(), out.detach().softmax(1)
        loss = away + KEEP * functional.kl_div(out.log_softmax(1), target, reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if published:
            model.eval()
            with torch.no_grad():
                sum(int((model(forget.images(c)).argmax(1) == 0).sum()) for c in split["forget"].split(BATCH))
            model.train()
        return time.process_time() - start

    return step


def steps(task: ClassifierTask, wanted: int) -> list[tuple[float, float, float]]:
    """CPU seconds of every library step, plain step and published step."""
    settings = {"n_ret": 5, "batch_size": BATCH, "optim": {"lr": LR, "max_steps": wanted, "epochs": wanted}}
    recipe = build_recipe({"method": "scar", **settings})
    recipe = recipe.replace(objective={**recipe.objective.describe(), "until": {"target": -1.0, "every": 10}})
    split = task.split(ForgetRequest.label(0))
    plan = iter(
        s
        for epoch in range(wanted)
        for s in recipe.objective.schedule.steps({r: len(split[r]) for r in ("forget", "surrogate")}, epoch, 0)
    )
    plain, published = stepper(task, False), stepper(task, True)
    rows: list[tuple[float, float, float]] = []
    mark = time.process_time()

    def on_step(*_: object) -> None:
        nonlocal mark
        ours = time.process_time() - mark
        ids = next(plan)
        a, b = split["forget"][ids["forget"]], split["surrogate"][ids["surrogate"]]
        rows.append((ours, plain(a, b), published(a, b)))
        mark = time.process_time()

    unlearn(task, ForgetRequest.label(0), recipe, on_step=on_step)
    return rows[1:]  # the first one includes binding


def class_statistics(classes: int, per_class: int) -> tuple[float, float, float]:
    """CPU seconds of the published statistics and, on the same features, of the library's moments and factors."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(classes * per_class, WIDTH, generator=generator).relu()
    labels = torch.arange(classes).repeat(per_class)
    start = time.process_time()
    published_statistics(z, labels, list(range(classes)))
    middle = time.process_time()
    stream = zip(z.split(512), labels.split(512), strict=True)
    distance = ClassDistance(ClassStatistics.of(stream, range(classes), delta=DELTA), Metric())
    end = time.process_time()
    distance.distance2(z[:1])  # computes the factor of every class
    return middle - start, end - middle, time.process_time() - end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    theirs, moments, factors = class_statistics(args.classes - 1, FORGET)
    ours = moments + factors
    print(
        f"statistics: published {theirs:.2f} s, library {ours:.2f} s ({moments:.2f} moments, {factors:.2f} factors): "
        f"{theirs / ours:.1f} times",
        flush=True,
    )
    rows = steps(make_task(args.classes, 10 * BATCH), args.steps)
    own, plain, published = (list(column) for column in zip(*rows, strict=True))
    found = {
        "statistics_factor": theirs / ours,
        "over_plain_median": statistics.median(a / b for a, b in zip(own, plain, strict=True)),
        "over_plain_total": sum(own) / sum(plain),
        "published_factor_median": statistics.median(c / a for a, c in zip(own, published, strict=True)),
        "published_factor_total": sum(published) / sum(own),
    }
    means = ", ".join(
        f"{n} {statistics.median(v):.2f} s"
        for n, v in zip(("library", "plain", "published"), (own, plain, published), strict=True)
    )
    print(f"steps ({len(rows)}): {means}")
    for name, value in found.items():
        print(f"{name:26} {value:.3f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

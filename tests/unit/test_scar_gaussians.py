"""SCAR and its self-forget form on five Gaussian classes, from training to forgetting."""

import copy
import json

import pytest
import torch
from torch import nn

from expunge.context import Context
from expunge.data.base import MemoryImages, Splits
from expunge.features.distance import ClassDistance, Metric
from expunge.features.statistics import ClassStatistics
from expunge.method import build_recipe
from expunge.methods.scar import TARGETS, Scar
from expunge.methods.scar_self import PSEUDO_ACCURACY
from expunge.patch import apply
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.classifier import ClassifierTask


def ran(task, request, recipe, folder):
    patch = unlearn(task, request, recipe, run_dir=folder)
    return patch, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(self.body((x - 0.5) * 4))


@pytest.fixture(scope="module")
def gaussians():
    """Five Gaussian classes, a small trained network, and one broad Gaussian as surrogates."""
    g = torch.Generator().manual_seed(0)
    centres = 0.5 + 0.12 * torch.randn(5, 20, generator=g)

    def images(n):
        y = torch.arange(n) % 5
        x = centres[y] + 0.08 * torch.randn(n, 20, generator=g)
        return MemoryImages(x.clamp(0, 1)[:, None, None, :], y, list("abcde"))

    data = Splits("gaussians", images(500), images(500))
    wide = (0.5 + 0.18 * torch.randn(600, 20, generator=g)).clamp(0, 1)[:, None, None, :]
    surrogate = MemoryImages(wide, torch.zeros(600, dtype=torch.int64), list("abcde"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = data.train.images(torch.arange(500)), data.train.labels
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return ClassifierTask(model.eval(), data, surrogate=surrogate)


def scores(task, request, patch):
    """Accuracy on the forget and on the remaining test samples after the patch."""
    after = copy.deepcopy(task)
    apply(after.model, patch)
    split = after.split(request)
    found = {}
    for role in ("forget", "test"):
        logits, labels = after.logits(role, split)
        found[role] = float((logits.argmax(1) == labels).float().mean())
    return found


@pytest.mark.parametrize("removed", ["a", "e"])
def test_a_class_is_forgotten_and_the_others_stay(gaussians, removed, tmp_path):
    request = ForgetRequest.label(removed)
    base = gaussians.logits("test", gaussians.split(request))
    before = float((base[0].argmax(1) == base[1]).float().mean())
    steps, after = {}, {}
    for name, l1, l2, limit in (("both", 1.0, 5.0, 400), ("metric", 1.0, 0.0, 400), ("keep", 0.0, 5.0, 40)):
        settings = {"method": "scar", "lambda_1": l1, "lambda_2": l2, "batch_size": 256, "check_every": 5}
        recipe = build_recipe({**settings, "optim": {"epochs": 200, "max_steps": limit}})
        patch, rows = ran(gaussians, request, recipe, tmp_path / name)
        steps[name], after[name] = len(rows), scores(gaussians, request, patch)
    assert before > 0.95
    assert after["both"]["forget"] < 0.01
    assert after["both"]["test"] > before - 0.05
    assert after["both"]["test"] >= after["metric"]["test"]
    assert after["keep"]["forget"] > 0.3
    assert steps["both"] > steps["metric"]


def test_a_class_fades_without_its_images(gaussians, tmp_path):
    """Surrogates stand in for the class only roughly: it fades to well below its accuracy, not to nothing."""
    request = ForgetRequest.label("a")
    settings = {"method": "scar_self", "batch_size": 256, "optim": {"epochs": 200, "lr": 2e-3, "max_steps": 300}}
    patch, rows = ran(gaussians, request, build_recipe(settings), tmp_path / "self")
    after = scores(gaussians, request, patch)
    assert after["forget"] < 0.5
    assert after["test"] > 0.95
    assert rows[-1][PSEUDO_ACCURACY] < 0.01
    assert len(rows) < 300
    assert any("keep their label" in n for n in patch.manifest.notes)


def test_targets_come_from_the_distance(gaussians):
    split = gaussians.split(ForgetRequest.label("a"))
    ctx = Context(gaussians, split)
    Scar().bind(ctx)
    found = ClassStatistics.fit(gaussians, split)
    with torch.no_grad():
        z, _ = gaussians.represent(gaussians.load("forget", split["forget"], split))
    want = ClassDistance(found, Metric()).distance2(z.double()).argmin(1) + 1
    assert torch.equal(ctx.state[TARGETS][split["forget"]], want)

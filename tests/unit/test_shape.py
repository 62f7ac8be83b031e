"""The shape of the core: five methods of five kinds go through one `unlearn`, become patches, and come off exactly.

The parts below are small stand-ins for SalUn, BARRIER, SCAR, SLUG and SRS-ME. Nothing in the package knows them.
"""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from expunge.context import Context
from expunge.digest import model_digest
from expunge.edits.base import Edit
from expunge.errors import NoEffectError
from expunge.objectives.base import LossFn, Objective, Term
from expunge.part import part
from expunge.patch import LowRank, Patch, apply, revert
from expunge.patch.changes import Change, smallest
from expunge.protections.base import Penalty, Protection
from expunge.recipe import Recipe
from expunge.registry import Info, registry
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.saliency import saliency_scores
from expunge.schedule import Paired, Schedule
from expunge.spaces.base import OpenSpace, Space
from expunge.tasks.base import Batch, Split
from expunge.tasks.tiny import tiny_classifier

REQUEST = ForgetRequest.label("ant")


# ---- (b) a protection that measures the base model: squared drift of a layer's outputs


@part("test_drift", Info("Keep a layer's mean outputs on the retain set.", needs=("retain",)))
class Drift(Protection):
    weight: float = Field(default=1.0, gt=0)
    layer: str = "conv2"

    def bind(self, ctx: Context, space: OpenSpace) -> Penalty:
        module = ctx.model.get_submodule(self.layer)
        seen: list[Tensor] = []
        hook = module.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
        try:
            with torch.no_grad():
                for batch in ctx.batches("retain", 64):
                    ctx.task.predict(batch)
        finally:
            hook.remove()
        inputs = torch.cat(seen)[:32]
        with torch.no_grad():
            target = module(inputs)
        return lambda: {"drift": Term((module(inputs) - target).pow(2).mean(), None, self.weight)}


# ---- (c) distillation with a third stream and a stop rule


@part("test_distil", Info("Pull forget features away, distil on surrogate images.", needs=("forget", "surrogate")))
class Distil(Objective):
    schedule: Schedule = Paired(streams=("forget", "surrogate"), batch_sizes={"forget": 16, "surrogate": 24})
    threshold: float = Field(default=0.05, ge=0, le=1)

    def bind(self, ctx: Context) -> LossFn:
        task, teacher = ctx.task, {}
        with torch.no_grad():
            for batch in ctx.batches("surrogate", 64):
                teacher.update(zip(batch.ids.tolist(), task.predict(batch).softmax(1), strict=True))

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            forget, other = batches["forget"], batches["surrogate"]
            logits = task.predict(forget)
            hit = (logits.argmax(1) == forget.targets).float()
            away = functional.cross_entropy(logits, (forget.targets + 1) % 4, reduction="none")
            target = torch.stack([teacher[i] for i in other.ids.tolist()])
            return {
                "away": Term(away, "forget"),
                "distil": Term(task.loss(other, target), "surrogate", 5.0),
                "forget_accuracy": Term(hit, "forget", 0.0),
            }

        return loss

    def stop(self, history: list[dict[str, Any]]) -> str | None:
        if not history[-1]["end_of_epoch"]:
            return None
        epoch = [r["forget_accuracy"] for r in history if r["epoch"] == history[-1]["epoch"]]
        mean = sum(epoch) / len(epoch)
        return f"forget accuracy {mean:.2f}" if mean <= self.threshold else None


# ---- (d) a one-shot edit: one gradient, one layer, a search over the step


@part("test_step", Info("One layer along the forget gradient, as far as needed.", needs=("forget", "retain")))
class Step(Edit):
    layer: str = "fc.weight"
    grid: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

    def compute(self, ctx: Context, space: OpenSpace) -> dict[str, Change]:
        weight = space.parameters[self.layer]
        _, gradient = saliency_scores(ctx.task, ctx.batches("forget", 512), {self.layer: weight})
        base = space.base[self.layer]
        best, least = 0.0, self._forget_accuracy(ctx)
        with torch.no_grad():
            for step in self.grid:
                weight.copy_(base + step * gradient[self.layer])
                accuracy = self._forget_accuracy(ctx)
                if accuracy < least:
                    best, least = step, accuracy
        ctx.note(f"step {best:g}: forget accuracy {least:.2f}")
        change = smallest(best * gradient[self.layer])
        return {} if change is None else {self.layer: change}

    def _forget_accuracy(self, ctx: Context) -> float:
        with torch.no_grad():
            hits = [(ctx.task.predict(b).argmax(1) == b.targets) for b in ctx.batches("forget", 512)]
        return float(torch.cat(hits).float().mean())


# ---- (e) a low-rank shift of one layer that the protected inputs cannot see


class _Shift(nn.Module):
    def __init__(self, up: nn.Parameter, down: nn.Parameter, projector: Tensor) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.register_buffer("projector", projector, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ (self.down @ self.projector)


class _OpenShift(OpenSpace):
    def __init__(self, ctx: Context, settings: "Shift") -> None:
        self.module, self.name = ctx.model.get_submodule(settings.layer), f"{settings.layer}.weight"
        weight = self.module.weight
        self.base = {self.name: weight.detach().clone()}
        kept = features(ctx.task, protected_batch(ctx.task, ctx.split, settings.protect)).double()
        _, s, v = torch.linalg.svd(kept, full_matrices=True)
        rank = int((s > s[0] * settings.cutoff).sum())
        self.projector = (v[rank:].T @ v[rank:]).to(weight)
        generator = torch.Generator().manual_seed(ctx.key("shift") % 2**63)
        out, inputs = weight.shape
        self.up = nn.Parameter(torch.zeros(out, settings.rank))
        self.down = nn.Parameter(torch.randn((settings.rank, inputs), generator=generator))
        self.parameters = {"shift.up": self.up, "shift.down": self.down}
        parametrize.register_parametrization(self.module, "weight", _Shift(self.up, self.down, self.projector))

    def changes(self) -> dict[str, Change]:
        down = (self.down @ self.projector).detach()
        return {self.name: LowRank(self.up.detach().clone(), down, tuple(self.base[self.name].shape))}

    def close(self) -> None:
        parametrize.remove_parametrizations(self.module, "weight", leave_parametrized=False)


@part("test_shift", Info("A low-rank shift in the null space of the protected inputs.", needs=("retain",)))
class Shift(Space):
    layer: str = "fc"
    rank: int = 2
    protect: int = 6
    cutoff: float = 1e-5

    def open(self, ctx: Context) -> OpenSpace:
        return _OpenShift(ctx, self)


def protected_batch(task: Any, split: Split, n: int = 6) -> Batch:
    """The first images of dogs."""
    retain = split["retain"]
    return task.load("retain", retain[task.data.train.labels[retain] == 3][:n], split)


@torch.no_grad()
def features(task: Any, batch: Batch) -> Tensor:
    """Inputs of the last layer."""
    seen: list[Tensor] = []
    hook = task.model.fc.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    try:
        task.predict(batch)
    finally:
        hook.remove()
    return seen[0]


# ---- the five

# These parts exist while this file's tests run, so that cards and lists of other tests never see them.
OWN = {key: registry.entries.pop(key) for key in list(registry.entries) if key[1].startswith("test_")}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    registry.entries.update(OWN)
    yield
    for key in OWN:
        del registry.entries[key]


def recipe(name: str, **changes: Any) -> Recipe:
    recipes: Mapping[str, dict[str, Any]] = {
        "masked": {
            "objective": {"kind": "random_label", "schedule": {"kind": "sequential", "batch_size": 32}},
            "space": {"kind": "saliency_mask", "keep": 0.3},
            "optim": {"lr": 0.05, "epochs": 3},
        },
        "protected": {
            "objective": {"kind": "gradient_ascent", "schedule": {"kind": "single", "batch_size": 20}},
            "space": {"kind": "layers", "targets": ["conv2", "fc"]},
            "protections": [{"kind": "test_drift", "weight": 30.0}],
            "optim": {"name": "adam", "lr": 0.02, "epochs": 12, "weight_decay": 0.0},
        },
        "distilled": {"objective": "test_distil", "space": "all", "optim": {"name": "adam", "lr": 0.005, "epochs": 40}},
        "one_shot": {"edit": "test_step", "space": {"kind": "layers", "targets": ["fc.weight"]}},
        "null_space": {
            "objective": {"kind": "gradient_ascent", "schedule": {"kind": "single", "batch_size": 20}},
            "space": "test_shift",
            "optim": {"name": "adam", "lr": 0.3, "epochs": 10, "weight_decay": 0.0},
        },
    }
    return Recipe(name=name, **recipes[name]).replace(**changes)


NAMES = ["masked", "protected", "distilled", "one_shot", "null_space"]


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier()


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


def accuracy(task, role, request=REQUEST):
    logits, labels = task.logits(role, task.split(request))
    return float((logits.argmax(1) == labels).float().mean())


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_method_gives_a_patch_that_forgets_and_comes_off_exactly(task, tmp_path, name):
    before = model_digest(task.model)
    assert accuracy(task, "forget") == 1.0
    patch = unlearn(task, REQUEST, recipe(name))
    assert model_digest(task.model) == before
    patch = Patch.load(patch.save(tmp_path / "p.safetensors"))
    apply(task.model, patch)
    assert model_digest(task.model) != before
    assert accuracy(task, "forget") < 0.6
    revert(task.model, patch)
    assert model_digest(task.model) == before
    assert Recipe(**patch.manifest.recipe).describe() == recipe(name).describe()


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_one_patch(task, name):
    first = unlearn(task, REQUEST, recipe(name))
    assert unlearn(task, REQUEST, recipe(name)).digest == first.digest
    if name != "one_shot":  # draws nothing
        assert unlearn(task, REQUEST, recipe(name), seed=1).digest != first.digest


def test_the_mask_bounds_the_change(task):
    patch = unlearn(task, REQUEST, recipe("masked"))
    changed = sum(int((c.dense() != 0).sum()) for c in patch.changes.values())
    total = sum(p.numel() for p in task.model.parameters())
    assert 0 < changed <= int(0.3 * total)
    free = unlearn(task, REQUEST, recipe("masked", space="all", optim={"lr": 0.001}))
    assert sum(int((c.dense() != 0).sum()) for c in free.changes.values()) > 0.9 * total


def test_the_protection_holds_the_layer_and_is_logged(task, tmp_path):
    def drift(patch: Patch) -> float:
        return float(patch["conv2.weight"].dense().pow(2).sum())

    held = unlearn(task, REQUEST, recipe("protected"), run_dir=tmp_path / "run")
    free = unlearn(task, REQUEST, recipe("protected", protections=()))
    assert 0 < drift(held) < 0.7 * drift(free)
    assert set(held) == {"conv2.weight", "fc.weight", "fc.bias"}
    assert '"drift": ' in (tmp_path / "run" / "log.jsonl").read_text()


def test_the_stop_rule_ends_the_run_and_a_logged_term_has_no_weight(task):
    steps: list[int] = []
    patch = unlearn(task, REQUEST, recipe("distilled"), on_step=lambda n, model, optimizer: steps.append(n))
    assert any(n.startswith("stopped after step") and "forget accuracy" in n for n in patch.manifest.notes)
    assert len(steps) % 3 == 0  # 40 forget samples in batches of 16: the rule looks at whole epochs
    assert len(steps) < 120
    never = recipe("distilled", optim={"max_steps": len(steps)})
    object.__setattr__(never.objective, "threshold", 0.0)
    assert unlearn(task, REQUEST, never).digest == patch.digest


def test_the_edit_changes_one_tensor_and_a_search_that_ends_at_zero_fails(task):
    patch = unlearn(task, REQUEST, recipe("one_shot"))
    assert list(patch) == ["fc.weight"]
    assert patch.manifest.notes[0].startswith("step ")
    with pytest.raises(NoEffectError, match="changed nothing"):
        unlearn(task, REQUEST, recipe("one_shot", edit={"kind": "test_step", "grid": [0.0]}))


def test_concepts_are_patches_in_any_order_and_one_is_revoked_exactly(task):
    ant = unlearn(task, ForgetRequest.label("ant"), recipe("null_space"))
    bee = unlearn(task, ForgetRequest.label("bee"), recipe("null_space"), seed=5)
    assert ant["fc.weight"].kind == bee["fc.weight"].kind == "low_rank"
    model = task.model
    split = task.split(REQUEST)
    batch = protected_batch(task, split)
    with torch.no_grad():
        protected, others = task.predict(batch), task.logits("forget", split)[0]
    digests = []
    for first, second in ((ant, bee), (bee, ant)):
        apply(model, first)
        apply(model, second)
        digests.append(model_digest(model))
        revert(model, first)
        alone = model_digest(model)
        revert(model)
        apply(model, second)
        assert model_digest(model) == alone
        apply(model, first)
        with torch.no_grad():
            assert torch.allclose(task.predict(batch), protected, atol=1e-3)
            assert not torch.allclose(task.logits("forget", split)[0], others, atol=1.0)
        assert accuracy(task, "forget") < 0.6
        assert accuracy(task, "forget", ForgetRequest.label("bee")) < 0.6
        revert(model)
    assert digests[0] == digests[1]
    assert not parametrize.is_parametrized(model)

"""What every registered part must do on the tiny classifier. `ARGUMENTS` is the one place to describe a new part."""

from __future__ import annotations

import copy
import random
import typing
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from expunge import guards
from expunge.digest import model_digest, tensor_digest
from expunge.errors import CapabilityError, ConfigError, NoEffectError
from expunge.method import build_recipe, settings_model
from expunge.part import Part
from expunge.patch import Patch, apply, revert
from expunge.recipe import Optim, Recipe
from expunge.registry import registry
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.schedule import Paired, Replay, Sequential, Single
from expunge.tasks.base import Task
from expunge.tasks.classifier import ClassifierTask

REQUEST = ForgetRequest.label("ant")

#: Settings for parts that cannot be built from defaults, or whose defaults do not suit a network of two convolutions.
ARGUMENTS: dict[tuple[str, str], dict[str, Any]] = {
    ("space", "layers"): {"targets": ["conv2", "fc"]},
    ("space", "matched_layers"): {"targets": ["conv2", "fc"]},
    ("protection", "interval"): {"targets": ["conv2", "fc"], "lambda_interval": 0.1},
    ("edit", "ssd"): {"alpha": 1.1},  # a weight can matter at most 4 times as much to a quarter of the data as to all
    ("method", "ssd"): {"alpha": 1.1},
    ("objective", "scar"): {"until": {"target": -1.0}},  # at this rate one step is enough to forget
    ("objective", "scar_self"): {"until": {"target": -1.0}},
    ("objective", "duck"): {"until": {"target": -1}},
    ("objective", "scar_neg_grad"): {"until": {"target": -1}},
    ("objective", "scar_random_labels"): {"until": {"target": -1}},
}

#: Parts that no classifier run can contain, with the reason; they are tested where they belong.
ELSEWHERE: dict[tuple[str, str], str] = {}

#: Two steps that change weights noticeably and keep them finite.
OPTIM = Optim(lr=0.01, epochs=2, max_steps=2)

REPLAY = Replay(epochs=(({"forget": (0, 1, 2)}, {"retain": (4, 5, 6, 7)}), ({"forget": (3,)}, {"retain": (1,)})))
SCHEDULES: dict[str, list[Any]] = {
    "single": [Single(role=r, batch_size=20) for r in ("forget", "retain", "mixed", "surrogate")],
    "sequential": [Sequential(batch_size=20)],
    "paired": [Paired(batch_size=16), Paired(streams=("forget", "surrogate"), batch_size=16)],
    "replay": [REPLAY],
}


def arguments(kind: str, name: str) -> dict[str, Any]:
    """Settings of a part for these tests.

    Fails with what to add when a part has required fields and no entry.
    """
    given = ARGUMENTS.get((kind, name), {})
    cls = registry.get(kind, name).obj  # type: ignore[arg-type]
    missing = [n for n, f in cls.model_fields.items() if f.is_required() and n not in given]
    if missing:
        pytest.fail(
            f"{kind} '{name}' has required fields {missing}: add `('{kind}', '{name}'): {{{missing[0]!r}: ...}}` to "
            "ARGUMENTS in tests/contract/contract_helpers.py"
        )
    return given


def build(kind: str, name: str) -> Part:
    """The part as these tests use it."""
    if (kind, name) in ELSEWHERE:
        pytest.skip(ELSEWHERE[(kind, name)])
    return registry.get(kind, name).obj(**arguments(kind, name))  # type: ignore[arg-type]


def recipe_with(kind: str, name: str) -> Recipe:
    """A recipe whose other parts are plain."""
    part = build(kind, name)
    if kind == "method":
        raise AssertionError("methods build their own recipe")
    settings: dict[str, Any] = {"objective": "random_label", "space": "all", "protections": [], "optim": OPTIM}
    if kind == "objective":
        settings["objective"] = part
    elif kind == "space":
        settings["space"] = part
        settings["objective"] = {"kind": "random_label", "schedule": {"kind": "sequential", "batch_size": 20}}
    elif kind == "protection":
        settings["protections"] = [part]
        settings["objective"] = {"kind": "random_label", "schedule": {"kind": "sequential", "batch_size": 20}}
    else:
        settings = {"edit": part, "space": "all"}
    return Recipe(name=f"{kind} {name}", **settings)


def method_recipe(name: str) -> Recipe:
    """A method's own recipe, cut to two steps."""
    if ("method", name) in ELSEWHERE:
        pytest.skip(ELSEWHERE[("method", name)])
    recipe = build_recipe({"method": name, **ARGUMENTS.get(("method", name), {})})
    return recipe if recipe.edit is not None else recipe.replace(optim={"max_steps": 2, "epochs": 2})


def schedules_of(name: str) -> list[Any]:
    """Every schedule that an objective's declared type admits."""
    hint = registry.get("objective", name).obj.model_fields["schedule"].annotation
    kinds = {c.model_fields["kind"].default for c in typing.get_args(hint) or (hint,) if hasattr(c, "model_fields")}
    return [s for kind, examples in SCHEDULES.items() if kind in kinds for s in examples]


def skip_if_missing(task: ClassifierTask, recipe: Recipe) -> None:
    """Skip, with the reason, when the tiny task lacks what the recipe needs. Anything else is a failure."""
    try:
        guards.check_capabilities(task, task.split(REQUEST), recipe)
    except CapabilityError as error:
        pytest.skip(str(error))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a run must leave as found, comparable with ``==``, field by field."""
    modules = dict(model.named_modules())
    return {
        "structure": {n: type(m).__name__ for n, m in modules.items()},
        "tensors": {n: tensor_digest(t) for n, t in model.state_dict().items()},
        "dtypes": {n: str(t.dtype) for n, t in model.state_dict().items()},
        "identity": {n: id(t) for n, t in model.state_dict(keep_vars=True).items()},
        "grads": {
            n: None if p.grad is None else (id(p.grad), tensor_digest(p.grad)) for n, p in model.named_parameters()
        },
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in modules.items()},
        "hooks": {
            n: {k: list(v) for k, v in vars(m).items() if "hook" in k and hasattr(v, "keys")}
            for n, m in modules.items()
        },
        "grad_mode": torch.is_grad_enabled(),
        "rng": {
            "python": str(random.getstate()),
            "numpy": str(np.random.get_state()),
            "torch": tensor_digest(torch.get_rng_state()),
        },
    }


def disturb(model: nn.Module) -> None:
    """Give a model a state that a careless run would not restore."""
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.full_like(model.fc.weight, 0.25)
    model.fc.register_forward_hook(lambda module, args, out: out)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)


def check_run(task: ClassifierTask, recipe: Recipe, tmp_path: Any) -> Patch:
    """Two steps: the model is left as found, only the space changes, the patch saves, reloads and comes off."""
    task = copy.deepcopy(task)
    disturb(task.model)
    before = snapshot(task.model)
    patch = unlearn(task, REQUEST, recipe)
    assert snapshot(task.model) == before
    assert len(patch)
    loaded = Patch.load(patch.save(tmp_path / "patch.safetensors"))
    assert loaded.digest == patch.digest
    assert Recipe(**loaded.manifest.recipe) == recipe
    start = model_digest(task.model)
    tensors = {n: tensor_digest(t) for n, t in task.model.state_dict().items()}
    apply(task.model, loaded)
    moved = {n for n, t in task.model.state_dict().items() if tensor_digest(t) != tensors[n]}
    assert moved
    assert moved <= set(patch), "a tensor outside the patch moved"
    revert(task.model, loaded)
    assert model_digest(task.model) == start
    assert unlearn(task, REQUEST, recipe).digest == patch.digest, "one seed, two patches"
    return patch


class Interrupted(Exception):  # noqa: N818
    """Raised in the middle of a run."""


def check_resume(task: ClassifierTask, recipe: Recipe, tmp_path: Any, steps: int = 3) -> None:
    """Interrupt after step 2 of ``steps``, resume, and compare with the run that was never interrupted."""
    recipe = recipe.replace(optim={"max_steps": steps, "epochs": steps})

    def interrupt(number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if number == steps - 1:
            raise Interrupted

    whole = unlearn(copy.deepcopy(task), REQUEST, recipe)
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        unlearn(copy.deepcopy(task), REQUEST, recipe, run_dir=folder, checkpoint_every=1, on_step=interrupt)
    assert (folder / "checkpoint.safetensors").exists()
    torch.manual_seed(12345)
    taken: list[int] = []
    resumed = unlearn(
        copy.deepcopy(task), REQUEST, recipe, run_dir=folder, checkpoint_every=1, on_step=lambda n, *_: taken.append(n)
    )
    assert taken[0] == steps - 1, "the step that was not checkpointed is taken again, the ones before are not"
    assert resumed.digest == whole.digest
    one_less = unlearn(
        copy.deepcopy(task), REQUEST, recipe.replace(optim={"max_steps": steps - 1}), allow_no_effect=True
    )
    assert one_less.digest != whole.digest, "the comparison must be able to fail"


def check_control(task: ClassifierTask, recipe: Recipe) -> None:
    """With a learning rate of 0 nothing may change, and that is an error unless asked for."""
    still = recipe.replace(optim={"lr": 0.0})
    with pytest.raises(NoEffectError, match="learning rate is 0"):
        unlearn(copy.deepcopy(task), REQUEST, still)


def check_strict(kind: str, name: str) -> None:
    """A mistyped key is an error that suggests the right one; a description can be read back."""
    if kind == "method":
        fields = list(settings_model(name).model_fields)
        wrong, right = fields[0] + "x", fields[0]
        with pytest.raises(ConfigError, match=rf"{wrong}.*did you mean.*'{right}'"):
            build_recipe({"method": name, wrong: 1})
        with pytest.raises(ConfigError, match=r"optimm.*did you mean.*'optim'|lrr.*did you mean.*'lr'"):
            build_recipe({"method": name, "optim": {"lrr": 1}})
        return
    part = build(kind, name)
    base = next(c for c in type(part).__mro__ if "kind_of_part" in vars(c))
    again = base.parse(part.describe())
    assert again == part
    assert again.describe() == part.describe()
    fields = list(type(part).model_fields)
    if fields:
        wrong = fields[0] + "x"
        with pytest.raises(ConfigError, match=rf"unknown key '.*{wrong}'.*did you mean.*'{fields[0]}'"):
            base.parse({**part.describe(), wrong: 1})
    else:
        with pytest.raises(ConfigError, match="unknown key"):
            base.parse({"kind": name, "x": 1})
    with pytest.raises(ConfigError, match=rf"no {kind} is called '{name}z'.*did you mean.*'{name}'"):
        base.parse(name + "z")
    with pytest.raises(ConfigError):
        base.parse({**part.describe(), **{f: object() for f in fields[:1]}, "y": 1})


def comes_off(task: Task, request: ForgetRequest, recipe: Recipe) -> None:
    """A run leaves the model as it was, changes something, and its patch goes on and comes off exactly."""
    before = model_digest(task.model)
    patch = unlearn(task, request, recipe)
    assert model_digest(task.model) == before
    assert len(patch)
    apply(task.model, patch)
    assert model_digest(task.model) != before
    revert(task.model, patch)
    assert model_digest(task.model) == before


def runs_or_refuses(task: Task, request: ForgetRequest, recipe: Recipe, *refusals: type[Exception]) -> None:
    """A method for another family makes sense here, or refuses in one of these ways; it never fails in the middle."""
    before = model_digest(task.model)
    refusal = ""
    try:
        patch = unlearn(task, request, recipe)
    except refusals as error:
        refusal = str(error)
    assert len(refusal) > 30 or len(patch)
    assert model_digest(task.model) == before


def short(name: str, settings: dict[str, Any], **optim: Any) -> Recipe:
    """A method with these settings, cut to two steps."""
    recipe = build_recipe({"method": name, **settings})
    return recipe if recipe.edit is not None else recipe.replace(optim={"max_steps": 2, "epochs": 2, **optim})

"""Which roles a run reads, augments and indexes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import guards
from expunge.data.base import MemoryImages
from expunge.errors import CapabilityError, ConfigError, RequestError
from expunge.method import build_recipe
from expunge.objectives.cross_entropy import FineTune
from expunge.recipe import Optim, Recipe
from expunge.registry import Info
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.base import Split
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier, tiny_images

REQUEST = ForgetRequest.label("ant")


class Recording(MemoryImages):
    """Images that keep the ids they were asked for."""

    def __init__(self, like: MemoryImages) -> None:
        super().__init__(like.x, like.labels, like.classes)
        self.asked: set[int] = set()

    def images(self, ids: torch.Tensor) -> torch.Tensor:
        self.asked.update(ids.tolist())
        return super().images(ids)


@pytest.fixture
def task() -> ClassifierTask:
    found = tiny_classifier(steps=5)
    assert isinstance(found.data.train, MemoryImages)
    other = tiny_images(5, 1, "surrogate")
    return ClassifierTask(found.model, replace(found.data, train=Recording(found.data.train)), surrogate=other)


def fine_tune(*roles: str, **optim: Any) -> Recipe:
    one = {"kind": "single", "role": roles[0]}
    schedule = one if len(roles) == 1 else {"kind": "paired", "streams": roles}
    objective = {"kind": "fine_tune", "schedule": {**schedule, "batch_size": 10}}
    return Recipe(name="t", objective=objective, space="all", optim={"lr": 1e-3, "epochs": 1, **optim})


# ---- augmentation


def augmented(task: ClassifierTask, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """Per role, whether the batches that the losses saw were augmented."""
    real, found = ClassifierTask.load, {}

    def load(self: ClassifierTask, role: str, ids: torch.Tensor, split: Split, *, augment: int | None = None) -> Any:
        if self.model.training:  # guards and measurements look in eval mode
            found.setdefault(role, set()).add(augment is not None)
        return real(self, role, ids, split, augment=augment)

    with monkeypatch.context() as m:
        m.setattr(ClassifierTask, "load", load)
        unlearn(task, REQUEST, recipe)
    return found


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        (("surrogate",), {"retain": {False}, "surrogate": {True}}),
        (("retain",), {"retain": {True}, "surrogate": {False}}),
        (("retain", "surrogate"), {"retain": {True}, "surrogate": {True}}),
        ((), {"retain": {False}, "surrogate": {False}}),
        (False, {"retain": {False}, "surrogate": {False}}),
        (True, {"retain": {True}, "surrogate": {False}}),
    ],
)
def test_only_the_named_roles_are_augmented(
    task: ClassifierTask, monkeypatch: pytest.MonkeyPatch, setting: Any, wanted: dict[str, set[bool]]
) -> None:
    assert augmented(task, fine_tune("retain", "surrogate", augment=setting), monkeypatch) == wanted


@pytest.mark.parametrize(("roles", "named"), [(("retain",), "surrogate"), (("retain", "surrogate"), "surogate")])
def test_a_role_that_no_step_reads_cannot_be_augmented(roles: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=f"'augment' names the role '{named}', but a step reads {', '.join(roles)}"):
        fine_tune(*roles, augment=(named,))
    plain = fine_tune(*roles)
    with pytest.raises(ConfigError, match=f"names the role '{named}'"):
        plain.replace(optim={"augment": (named,)})
    assert fine_tune(*roles, augment=roles[-1:]).optim.augment == roles[-1:]


def test_augmented_roles_survive_a_description() -> None:
    recipe = fine_tune("retain", "surrogate", augment=["surrogate"])
    assert recipe.optim.augment == ("surrogate",)
    assert Recipe(**recipe.describe()) == recipe
    assert recipe.digest != fine_tune("retain", "surrogate", augment=True).digest
    with pytest.raises(ConfigError, match="augment"):
        Optim(augment="surrogate")


# ---- index sets


def test_classes_removed_as_a_whole_are_known(task: ClassifierTask) -> None:
    assert task.split(ForgetRequest.label("cat", "ant")).removed == (0, 2)
    assert task.split(ForgetRequest.label(3)).removed == (3,)
    whole = task.split(ForgetRequest.label("ant"))["forget"].tolist()
    assert task.split(ForgetRequest.samples(whole)).removed == ()
    assert task.everything().removed == ()


def test_other_indices_leave_the_rest_as_it_was(task: ClassifierTask) -> None:
    split = task.split(REQUEST)
    few = split["forget"][:3]
    other = split.with_indices(forget=few, surrogate=torch.tensor([1, 4]))
    assert other["forget"].tolist() == few.tolist()
    assert other["surrogate"].tolist() == [1, 4]
    assert (other.removed, other.notes) == (split.removed, split.notes) == ((0,), ())
    assert torch.equal(other["retain"], split["retain"])
    assert len(split["forget"]) == 40
    assert len(split["surrogate"]) == 20
    assert int(other.is_forget("mixed", split["forget"]).sum()) == 3
    assert int(split.is_forget("mixed", split["forget"]).sum()) == 40
    assert torch.equal(other["mixed"], torch.cat([few, split["retain"]]))
    with pytest.raises(RequestError, match="no samples have the role 'surogate'; did you mean 'surrogate'"):
        split["surogate"]


# ---- what checks may look at


def test_roles_read_are_those_of_the_method() -> None:
    read = {
        "fine_tune": ("forget", "retain"),
        "gradient_ascent": ("forget",),
        "neg_grad_plus": ("forget", "retain"),
        "random_label": ("forget", "retain"),  # both, shuffled together
        "scar": ("forget", "surrogate"),
        "scar_self": ("surrogate",),
        "duck": ("forget", "retain"),
    }
    assert {m: guards.roles_read(build_recipe(m)) for m in read} == read


def surrogates_only(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(FineTune, "info", Info("The task's loss on any role."))
    recipe = fine_tune("surrogate")
    assert recipe.needs() == {"surrogate"}
    return recipe


def test_a_recipe_of_surrogates_alone_never_opens_a_training_image(
    task: ClassifierTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = task.data.train
    assert isinstance(train, Recording)
    recipe = surrogates_only(monkeypatch)
    assert len(unlearn(task, REQUEST, recipe)) > 0
    assert train.asked == set()
    split = task.split(REQUEST)
    both = recipe.replace(objective=fine_tune("retain", "surrogate").objective)
    unlearn(task, REQUEST, both)
    assert set(split["retain"].tolist()) & train.asked


def test_a_stop_rule_opens_the_forget_images_and_no_others(
    task: ClassifierTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = task.data.train
    assert isinstance(train, Recording)
    recipe = surrogates_only(monkeypatch)
    assert recipe.objective is not None
    stopping = recipe.replace(objective={**recipe.objective.describe(), "until": {"target": -1.0}})
    assert stopping.needs() == {"surrogate", "forget"}
    unlearn(task, REQUEST, stopping)
    assert train.asked == set(task.split(REQUEST)["forget"].tolist())


def test_a_method_without_retain_images_is_not_made_to_open_them(task: ClassifierTask) -> None:
    train = task.data.train
    assert isinstance(train, Recording)
    split = task.split(REQUEST)
    unlearn(task, REQUEST, build_recipe({"method": "gradient_ascent", "optim": {"epochs": 1, "lr": 1e-4}}))
    assert train.asked == set(split["forget"].tolist())
    unlearn(task, REQUEST, build_recipe({"method": "random_label", "optim": {"epochs": 1, "lr": 1e-4}}))
    assert train.asked == set(range(160))


# ---- other surrogates


def test_other_surrogates_leave_model_and_data_alone(task: ClassifierTask, tmp_path: Path) -> None:
    other = task.with_surrogate(tiny_images(2, 9, "surrogate"))
    assert other.model is task.model
    assert other.data is task.data
    assert (other.head, other.eval_batch_size) == (task.head, task.eval_batch_size)
    assert (len(task.split(REQUEST)["surrogate"]), len(other.split(REQUEST)["surrogate"])) == (20, 8)
    assert other.data_digest() != task.data_digest()
    again = task.with_surrogate(tiny_images(5, 1, "surrogate"))
    assert again.data_digest() == task.data_digest()


def test_surrogates_can_be_added_to_a_task_without(task: ClassifierTask) -> None:
    bare = ClassifierTask(task.model, task.data, eval_batch_size=7, head="fc")
    recipe = fine_tune("surrogate")
    with pytest.raises(CapabilityError, match="needs surrogate"):
        unlearn(bare, REQUEST, recipe)
    other = bare.with_surrogate(tiny_images(2, 9, "surrogate"))
    assert other.capabilities - bare.capabilities == {"surrogate"}
    assert (other.head, other.eval_batch_size) == ("fc", 7)
    assert len(unlearn(other, REQUEST, recipe)) > 0

"""Where features end: the head of every kind of model, and what is said when there is none."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.data.base import MemoryImages, Splits
from expunge.errors import CapabilityError, ConfigError
from expunge.method import build_recipe
from expunge.models import ModelSpec, build_model
from expunge.models.head import check_head, find_head
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.classifier import ClassifierTask

N = 5
OWN = [("resnet20", 3, 32), ("vgg16_bn", 3, 32), ("vgg16_bn_lth", 3, 32), ("small_cnn", 1, 8), ("mlp", 1, 8)]
TIMM = [("timm:resnet18", 3, 32, {}), ("timm:vit_tiny_patch16_224", 3, 32, {"image_size": 32})]


def task_for(model: nn.Module, shape: tuple[int, int, int], head: str | None = None) -> ClassifierTask:
    names = [f"c{i}" for i in range(N)]
    draw = torch.rand((4 * N, *shape), generator=torch.Generator().manual_seed(1))
    images = MemoryImages(draw, torch.arange(N).repeat(4), names)
    return ClassifierTask(model.eval(), Splits("toy", images, images), head=head)


def represented(task: ClassifierTask) -> tuple[Tensor, Tensor, Tensor, Any]:
    split = task.split(ForgetRequest.samples([0, 1, 2]))
    batch = task.load("retain", split["retain"][:4], split)
    with torch.no_grad():
        features, logits = task.represent(batch)
        return features, logits, task.predict(batch), task.model.get_submodule(str(task.head))


def check(name: str, channels: int, side: int, **options: Any) -> None:
    shape = (channels, side, side)
    task = task_for(build_model(ModelSpec(name=name, n_classes=N, input_shape=shape, **options)), shape)
    assert "features" in task.capabilities
    features, logits, predicted, head = represented(task)
    assert isinstance(head, nn.Linear)
    assert features.shape == (4, head.in_features)
    assert torch.equal(logits, predicted)
    by_hand = features.double() @ head.weight.double().T + head.bias.double()
    assert torch.allclose(by_hand, logits.double(), atol=1e-5)
    assert not torch.allclose(by_hand + 1e-3, logits.double(), atol=1e-5)
    assert float(features.std()) > 0
    assert not head._forward_pre_hooks


@pytest.mark.parametrize(("name", "channels", "side"), OWN)
def test_features_times_the_head_are_the_logits(name: str, channels: int, side: int) -> None:
    check(name, channels, side)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize(("name", "channels", "side", "options"), TIMM)
def test_models_that_tell_their_classifier_are_believed(
    name: str, channels: int, side: int, options: dict[str, Any]
) -> None:
    check(name, channels, side, **options)


class Told(nn.Module):
    """Says which of two layers of equal width is its classifier."""

    def __init__(self, told: str | None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(N, N), nn.Linear(N, N)
        self.told = told

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.last(x.flatten(1)))

    def get_classifier(self) -> Any:
        return getattr(self, self.told) if self.told else (self.first, self.last)


def test_a_told_classifier_wins_over_the_last_linear_layer() -> None:
    assert find_head(Told("first"), N) == "first"
    assert find_head(Told("last"), N) == "last"


def test_several_classifiers_are_no_linear_head() -> None:
    """Models with a second head for distillation average the two: features times one of them are not the logits."""
    assert find_head(Told(None), N) is None


def test_the_last_linear_layer_of_that_width_is_the_head() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, N), nn.Linear(N, N), nn.Linear(N, 7))
    assert find_head(layers, N) == "2"
    assert find_head(layers, 7) == "3"
    assert find_head(layers, 8) is None
    assert find_head(nn.Linear(3, N), N) == ""


# ---- by name


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, N))


def test_a_head_can_be_named() -> None:
    own, named = task_for(two_layers(), (1, 8, 8)), task_for(two_layers(), (1, 8, 8), head="1")
    assert (own.head, named.head) == ("3", "1")
    assert represented(own)[0].shape == (4, 6)
    assert represented(named)[0].shape == (4, 64)


def test_an_unknown_name_is_refused_with_the_closest() -> None:
    model = build_model(ModelSpec(name="resnet20", n_classes=N))
    head = find_head(model, N)
    assert head is not None
    with pytest.raises(ConfigError, match=f"no module '{head}x'.*did you mean.*'{head}'"):
        check_head(model, head + "x")
    with pytest.raises(ConfigError, match=f"no module '{head}x'"):
        task_for(model, (3, 32, 32), head=head + "x")
    assert check_head(model, head) == head


# ---- none


def no_head() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, N, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_model_without_linear_head_lacks_the_capability() -> None:
    task = task_for(no_head(), (1, 8, 8))
    assert task.head is None
    assert "features" not in task.capabilities
    split = task.split(ForgetRequest.samples([0, 1, 2]))
    with pytest.raises(CapabilityError, match=r"no linear layer of 5 outputs .* Sequential; name the module .*`head`"):
        task.represent(task.load("forget", split["forget"], split))


def test_a_method_that_needs_features_names_what_is_missing() -> None:
    recipe = build_recipe({"method": "duck", "optim": {"epochs": 1}})
    with pytest.raises(CapabilityError, match="duck needs features; this classifier task offers"):
        unlearn(task_for(no_head(), (1, 8, 8)), ForgetRequest.label(0), recipe)
    patch = unlearn(task_for(no_head(), (1, 8, 8), head="2"), ForgetRequest.label(0), recipe)
    assert len(patch)


def test_a_head_that_takes_no_part_in_the_forward_pass_is_an_error() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(64, N), nn.Linear(64, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x.flatten(1))

    task = task_for(Idle(), (1, 8, 8))
    assert task.head == "idle"
    with pytest.raises(CapabilityError, match="head 'idle' takes no part in the forward pass"):
        represented(task)
    assert represented(task_for(Idle(), (1, 8, 8), head="used"))[0].shape == (4, 64)

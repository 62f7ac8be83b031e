"""Which methods forget a digit, and which weights that takes."""

from __future__ import annotations

import copy
from statistics import mean

import pytest

from expunge.data.digits import load_digits_splits
from expunge.method import build_recipe
from expunge.models import ModelSpec, build_model
from expunge.patch import apply
from expunge.recipe import Optim
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.classifier import ClassifierTask
from expunge.train import fit


def method(name, **settings):
    return build_recipe({"method": name, **settings})


def digits(model, epochs):
    task = ClassifierTask(build_model(ModelSpec(name=model, input_shape=(1, 8, 8))), load_digits_splits())
    fit(task, optim=Optim(lr=0.05, epochs=epochs, lr_schedule="cosine", norm="train"), batch_size=64)
    return task


@pytest.fixture(scope="module")
def digits_cnn():
    return digits("small_cnn", 15)


@pytest.fixture(scope="module")
def digits_mlp():
    return digits("mlp", 60)


def rates(task, label, recipe, seed=0):
    """Unlearning accuracy (forget samples no longer recognised) and retain accuracy, percent."""
    request = ForgetRequest.label(label)
    patched = copy.deepcopy(task)
    apply(patched.model, unlearn(patched, request, recipe, seed=seed))
    split = task.split(request)
    right = {}
    for role in ("forget", "retain"):
        logits, labels = patched.logits(role, split)
        right[role] = 100 * float((logits.argmax(1) == labels).double().mean())
    return 100 - right["forget"], right["retain"]


@pytest.mark.parametrize("label", ["0", "3", "5"])
def test_barrier_forgets_a_digit_and_keeps_the_others(digits_cnn, label):
    """Default settings but for the batches: 134 samples in batches of 256 would be one step per epoch."""
    forgotten, kept = rates(digits_cnn, label, method("barrier", batch_size=32))
    assert forgotten >= 95
    assert kept >= 97


def test_the_penalty_is_what_keeps_the_others_at_a_high_rate(digits_cnn):
    """Both forget completely; without the penalty the others lose more than a point."""
    settings = {"batch_size": 32, "optim": {"lr": 1e-2}}
    protected, free = (
        [rates(digits_cnn, label, method("barrier", lambda_interval=factor, **settings)) for label in ("3", "5")]
        for factor in (0.3, 0.0)
    )
    assert min(ua for ua, _ in protected + free) >= 95
    assert mean(ra for _, ra in protected) > mean(ra for _, ra in free) + 1


def test_saliency_finds_the_weights_that_forgetting_needs(digits_mlp):
    """Mask controls of equal size; at higher rates a random half is enough to forget as well."""
    optim = {"lr": 1e-3, "epochs": 10, "augment": False}
    score = {}
    for select in ("top", "random", "bottom"):
        recipe = method("salun", select=select, batch_size=64, optim=optim)
        runs = [rates(digits_mlp, "3", recipe, seed) for seed in range(3)]
        score[select] = mean(ua for ua, _ in runs)
        if select == "top":
            assert mean(ra for _, ra in runs) >= 97
    assert score["top"] >= 99
    assert score["bottom"] <= 60
    assert score["bottom"] < score["random"] < score["top"]

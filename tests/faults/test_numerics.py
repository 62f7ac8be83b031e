"""Cases 9 and 10: degenerate statistics and divergence stop a run with their place and cause."""

import copy
import math

import inject
import pytest
import torch

from expunge import guards
from expunge.digest import model_digest
from expunge.errors import ArtifactError, DataError, DivergedError
from expunge.loop import Loop
from expunge.patch import Patch
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.saliency import saliency_scores


@pytest.fixture
def task():
    return inject.faulty()


# ---- 9 degenerate statistics


def test_a_saliency_gradient_that_is_not_finite_is_named(task):
    inject.nan_at(task, 1)
    before = model_digest(task.model)
    with pytest.raises(DataError, match=r"saliency gradient of 'conv1.weight' has NaN"):
        unlearn(task, inject.REQUEST, inject.recipe(space={"kind": "saliency_mask", "keep": 0.5}))
    assert model_digest(task.model) == before


def test_saliency_without_samples_is_refused(task):
    with pytest.raises(DataError, match="at least one forget batch"):
        saliency_scores(task, [], dict(task.model.named_parameters()))


def test_a_protection_refuses_activations_that_are_not_finite(task):
    def poison(module, args, out):
        return out * torch.where(torch.arange(len(out)) == 0, torch.nan, 1.0).reshape(-1, 1, 1, 1)

    handle = task.model.conv1.register_forward_hook(poison)
    protections = [{"kind": "interval", "targets": ["conv2"]}]
    try:
        with pytest.raises(DataError, match="conv2"):
            unlearn(task, inject.REQUEST, inject.recipe(protections=protections))
    finally:
        handle.remove()
    assert len(unlearn(task, inject.REQUEST, inject.recipe(protections=protections, optim={"lr": 1e-4})))


def test_one_sample_is_enough_or_refused_but_never_nan(task):
    patch = unlearn(task, ForgetRequest.samples([3]), inject.recipe(optim={"lr": 1e-3}))
    assert all(bool(torch.isfinite(c.dense()).all()) for c in patch.changes.values())


# ---- 10 divergence


@pytest.mark.parametrize(("call", "step", "term"), [(1, 0, "forget"), (3, 2, "retain"), (9, 8, "forget")])
def test_a_nan_stops_the_run_at_its_step_and_names_the_term(task, tmp_path, call, step, term):
    inject.nan_at(task, call)
    before = model_digest(task.model)
    with pytest.raises(DivergedError, match=rf"diverged at step {step}: loss is not finite, term = {term}") as caught:
        unlearn(task, inject.REQUEST, inject.recipe(), run_dir=tmp_path, checkpoint_every=1)
    assert caught.value.exit_code == 4
    assert model_digest(task.model) == before
    assert not (tmp_path / "patch.safetensors").exists()
    assert (tmp_path / "checkpoint.safetensors").exists() == (step > 0)
    # the last finite checkpoint is good: without the fault the run goes on from there
    task.fault = lambda number, losses: losses
    taken = []
    resumed = unlearn(
        task,
        inject.REQUEST,
        inject.recipe(),
        run_dir=tmp_path,
        checkpoint_every=1,
        on_step=lambda n, *_: taken.append(n),
    )
    assert taken[0] == step + 1
    assert resumed.digest == unlearn(inject.faulty(), inject.REQUEST, inject.recipe()).digest


def test_gradient_ascent_that_explodes_is_stopped(task):
    recipe = inject.recipe(
        objective={"kind": "gradient_ascent", "schedule": {"kind": "single", "batch_size": 20}},
        optim={"lr": 1e6, "epochs": 20},
    )
    before = model_digest(task.model)
    with pytest.raises(DivergedError, match=r"diverged at step \d+: .*not finite"):
        unlearn(task, inject.REQUEST, recipe)
    assert model_digest(task.model) == before
    assert len(unlearn(task, inject.REQUEST, recipe.replace(optim={"lr": 1e-3, "epochs": 1})))


def test_weights_that_overflow_in_the_last_step_are_noticed(task, monkeypatch):
    def last(number, model, optimizer):
        with torch.no_grad():
            model.fc.bias[0] = math.inf

    recipe = inject.recipe(optim={"max_steps": 1})
    with pytest.raises(DivergedError, match=r"'fc.bias' has weights that are not finite"):
        unlearn(task, inject.REQUEST, recipe, on_step=last)
    monkeypatch.setattr(Loop, "_check_weights", lambda self: None)
    with pytest.raises(DivergedError, match="outputs on the retain set are not"):  # the second line of defence
        unlearn(task, inject.REQUEST, recipe, on_step=last)
    monkeypatch.setattr(guards, "check_outputs", lambda *args: None)
    with pytest.raises(ArtifactError, match=r"'fc.bias'.*NaN or infinite"):  # the patch refuses them, less helpfully
        unlearn(task, inject.REQUEST, recipe, on_step=last)


def test_finite_weights_with_outputs_that_overflow_are_noticed(task):
    def last(number, model, optimizer):
        with torch.no_grad():
            for weight in (model.conv2.weight, model.fc.weight):
                weight.mul_(1e30)

    with pytest.raises(DivergedError, match="outputs on the retain set are not"):
        unlearn(task, inject.REQUEST, inject.recipe(optim={"max_steps": 1}), on_step=last)


def test_a_checkpoint_never_holds_weights_that_are_not_finite(task, tmp_path):
    def overflow(number, model, optimizer):
        if number == 2:
            with torch.no_grad():
                model.fc.bias[0] = math.inf

    with pytest.raises(DivergedError, match="diverged at step 2"):
        unlearn(task, inject.REQUEST, inject.recipe(), run_dir=tmp_path, checkpoint_every=1, on_step=overflow)
    from expunge.files import read_safetensors

    tensors, _ = read_safetensors(tmp_path / "checkpoint.safetensors")  # refuses NaN and infinity by itself
    assert "param.fc.bias" in tensors


def test_without_the_guard_a_nan_would_run_on_to_the_end(task, monkeypatch):
    inject.nan_at(task, 3)
    monkeypatch.setattr(Loop, "_check_finite", lambda self, numbers, what: None)
    monkeypatch.setattr(Loop, "_check_weights", lambda self: None)
    monkeypatch.setattr(guards, "check_outputs", lambda *args: None)
    taken = []
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        unlearn(task, inject.REQUEST, inject.recipe(), on_step=lambda n, *_: taken.append(n))
    assert taken[-1] == 16


def test_a_patch_never_holds_nan():
    from expunge.patch import Dense, Manifest

    with pytest.raises(ArtifactError, match="'w'"):
        Patch({"w": Dense(torch.tensor([1.0, math.inf]))}, Manifest(base_digest="0", base_tensors={"w": "0"}))


def test_half_precision_with_loss_scaling_needs_an_accelerator(task):
    from expunge.errors import ConfigError

    if torch.accelerator.is_available():
        pytest.skip("an accelerator is available")
    with pytest.raises(ConfigError, match="fp16"):
        unlearn(task, inject.REQUEST, inject.recipe(optim={"precision": "fp16"}))
    assert len(unlearn(copy.deepcopy(task), inject.REQUEST, inject.recipe(optim={"precision": "bf16", "max_steps": 1})))

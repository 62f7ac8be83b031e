"""Boundary shrink and boundary expanding: labels, the extra output, resuming, masks."""

from __future__ import annotations

import copy

import pytest
import torch

from expunge.context import Context
from expunge.errors import ArtifactError, CapabilityError
from expunge.files import atomic_save_safetensors, read_safetensors
from expunge.method import build_recipe
from expunge.methods.boundary_expand import widened_logits
from expunge.methods.boundary_shrink import neighbour_inputs, neighbour_labels
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.saliency import Mask
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier

REQUEST = ForgetRequest.label("ant")
LOOPS = ("boundary_shrink", "boundary_expand")
OPTIM = {"lr": 0.05, "epochs": 1, "augment": False}


@pytest.fixture(scope="module")
def trained():
    return tiny_classifier(dropout=0.0, steps=25)


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


def recipe(name: str, **settings: object) -> Recipe:
    return build_recipe({"method": name, "optim": OPTIM, "batch_size": 16, **settings})


def context(task: ClassifierTask) -> Context:
    task.model.eval()
    return Context(task, task.split(REQUEST))


@pytest.mark.parametrize("name", LOOPS)
def test_masks_are_respected(task, tmp_path, name):
    bits = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in task.model.named_parameters()}
    for m in bits.values():
        m.view(-1)[::2] = True
    file = str(tmp_path / "mask.safetensors")
    Mask(bits, 0.5).save(file)
    masked, free = (unlearn(task, REQUEST, recipe(name, mask_file=f)) for f in (file, None))
    assert all(not bool(masked.changes[n].dense()[~bits[n]].any()) for n in masked.changes)
    assert any(bool(masked.changes[n].dense()[bits[n]].any()) for n in masked.changes)
    assert any(bool(free.changes[n].dense()[~bits[n]].any()) for n in free.changes)


# -- boundary shrink -----------------------------------------------------------------------------------------------


def test_labels_differ_from_the_true_one_only_if_asked(task):
    ctx = context(task)
    batch = ctx.load("forget", ctx.split["forget"])
    inputs = neighbour_inputs(task, batch, 1e-6, eight_bit=False)
    assert float((inputs - batch.inputs).abs().max()) < 1e-5
    kept = neighbour_labels(task, batch, inputs, exclude_true=False)
    assert bool((kept == batch.targets).any())
    wrong = neighbour_labels(task, batch, inputs, exclude_true=True)
    assert not bool((wrong == batch.targets).any())
    far = neighbour_inputs(task, batch, 0.1, eight_bit=True)
    assert 0 <= float(far.min()) < float(far.max()) <= 1
    torch.testing.assert_close(far * 255, (far * 255).round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LOOPS)
def test_retained_images_are_never_read(task, monkeypatch, name):
    roles = set()
    load = ClassifierTask.load
    monkeypatch.setattr(
        ClassifierTask, "load", lambda self, role, *a, **k: roles.add(role) or load(self, role, *a, **k)
    )
    unlearn(task, REQUEST, recipe(name))
    assert roles == {"forget"}


@pytest.mark.parametrize("name", LOOPS)
def test_boundary_methods_forget(name):
    task = tiny_classifier(dropout=0.0)
    split = task.split(REQUEST)

    def accuracy(role):
        logits, labels = task.logits(role, split)
        return float(logits.argmax(1).eq(labels).float().mean())

    assert (accuracy("forget"), accuracy("retain")) == (1, 1)
    unlearn(task, REQUEST, recipe(name, optim={"lr": 1e-5, "epochs": 10, "augment": False}), inplace=True)
    assert accuracy("forget") < 0.6
    assert accuracy("retain") > 0.7


# -- boundary expanding --------------------------------------------------------------------------------------------


def test_the_extra_output_is_gone_after_the_run(task):
    names = set(task.model.state_dict())
    seen: list[set[str]] = []
    patch = unlearn(task, REQUEST, recipe("boundary_expand"), on_step=lambda n, m, o: seen.append(set(m.state_dict())))
    assert seen[0] - names == {"fc.extra_weight", "fc.extra_bias"}
    assert set(task.model.state_dict()) == names
    assert set(patch.changes) <= names
    assert patch.changes["fc.weight"].shape == (4, 16)
    ctx = context(task)
    with pytest.raises(CapabilityError, match="widened_head"):
        widened_logits(ctx, ctx.load("forget", ctx.split["forget"]))


def test_the_extra_output_is_gone_after_a_failure(task):
    names = set(task.model.state_dict())

    def fail(*_: object) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        unlearn(task, REQUEST, recipe("boundary_expand"), on_step=fail)
    assert set(task.model.state_dict()) == names


def test_the_extra_output_is_trained_in_its_space_only(task):
    rows: dict[str, list[torch.Tensor]] = {"widened": [], "all": []}

    def remember(step, model, optimizer):
        rows["widened"].append(model.fc.extra_weight.detach().clone())

    how = recipe("boundary_expand")
    widened = unlearn(task, REQUEST, how, on_step=remember)
    assert not torch.equal(rows["widened"][0], rows["widened"][-1])
    plain = unlearn(task, REQUEST, how.replace(space="all"))
    assert any("widened_head" in note for note in plain.manifest.notes)
    assert not any("widened_head" in note for note in widened.manifest.notes)
    assert plain.digest != widened.digest


def test_a_resumed_run_continues_with_the_trained_extra_output(task, tmp_path):
    how = recipe("boundary_expand", optim={**OPTIM, "lr": 2e-3, "epochs": 3})
    whole = unlearn(task, REQUEST, how)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(step: int, *_: object) -> None:
        if step == 6:
            raise Stop

    def resumed(folder, spoil):
        with pytest.raises(Stop):
            unlearn(task, REQUEST, how, run_dir=folder, checkpoint_every=1, on_step=stop)
        if spoil:
            file = folder / "checkpoint.safetensors"
            tensors, meta = read_safetensors(file)
            tensors["param.fc.extra_weight"] = tensors["param.fc.extra_weight"] + 0.5
            atomic_save_safetensors(file, tensors, meta)
        return unlearn(task, REQUEST, how, run_dir=folder).digest

    assert resumed(tmp_path / "good", spoil=False) == whole.digest
    assert resumed(tmp_path / "spoilt", spoil=True) != whole.digest


def test_masks_and_the_extra_output_go_together(task):
    how = recipe("boundary_expand").replace(
        space={"kind": "widened_head", "inside": {"kind": "saliency_mask", "keep": 0.25}}
    )
    assert Recipe(**how.describe()) == how
    patch = unlearn(task, REQUEST, how)
    changed = sum(int((c.dense() != 0).sum()) for c in patch.changes.values())
    assert changed <= 0.25 * sum(p.numel() for p in task.model.parameters())


def test_a_mask_for_other_weights_is_refused(task, tmp_path):
    file = str(tmp_path / "mask.safetensors")
    Mask({"fc.weight": torch.ones(5, 16, dtype=torch.bool)}, 1.0).save(file)
    with pytest.raises(ArtifactError):
        unlearn(task, REQUEST, recipe("boundary_expand", mask_file=file))

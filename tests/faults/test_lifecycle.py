"""Cases 17 and 18: a killed run resumes to the bit, and what is on disk is whole, locked and never stale."""

import copy
import json
import multiprocessing  # noqa: F401  imported before the lock tests so that its own locks do not count
import os
import signal

import inject
import pytest
import torch

from expunge import checkpoint, run
from expunge.digest import model_digest
from expunge.errors import ArtifactError, ConfigError, ResourceError
from expunge.patch import Patch
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn

DROPOUT = 0.3
OPTIMISERS = {"sgd": {"name": "sgd"}, "adamw": {"name": "adamw", "lr": 1e-3}}


def full_recipe(optimiser: str = "sgd", **changes):
    """Everything that has state: dropout, momentum or moments, statistics in training mode, a mask, augmentation."""
    optim = {"epochs": 2, "norm": "train", "augment": True, "lr_schedule": "one_cycle", **OPTIMISERS[optimiser]}
    return inject.recipe(space={"kind": "saliency_mask", "keep": 0.4}, optim=optim).replace(**changes)


@pytest.fixture(scope="module")
def trained():
    return inject.tiny_classifier(dropout=DROPOUT)


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


# ---- 17 kill and resume

KILL = """
import test_lifecycle as t
from expunge.run import unlearn
task = tiny_classifier(dropout=t.DROPOUT)
recipe, on_step = t.full_recipe(sys.argv[2]), kill_at(int(sys.argv[3]))
unlearn(task, REQUEST, recipe, run_dir=sys.argv[1], checkpoint_every=3, on_step=on_step)
"""


@pytest.mark.parametrize(("optimiser", "step"), [("sgd", 7), ("adamw", 13)])
def test_kill_9_and_resume_gives_the_same_bits(task, tmp_path, optimiser, step):
    process = inject.start(KILL, str(tmp_path / "run"), optimiser, str(step))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, text
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    whole = unlearn(task, inject.REQUEST, full_recipe(optimiser))
    taken: list[int] = []
    resumed = unlearn(
        task, inject.REQUEST, full_recipe(optimiser), run_dir=tmp_path / "run", checkpoint_every=3,
        on_step=lambda n, *_: taken.append(n),
    )  # fmt: skip
    assert taken == list(range(step - step % 3 + 1, 17))
    assert resumed.digest == whole.digest
    log = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log == list(range(16))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("stop", [1, 7, 8, 9, 15])
def test_interrupted_anywhere_resumes_to_the_same_bits(task, tmp_path, optimiser, stop):
    whole = unlearn(task, inject.REQUEST, full_recipe(optimiser))
    with pytest.raises(inject.Fault):  # noqa: PT012
        on_step = inject.raise_at(stop, inject.Fault())
        unlearn(task, inject.REQUEST, full_recipe(optimiser), run_dir=tmp_path, checkpoint_every=1, on_step=on_step)
    torch.rand(7)  # the resuming process is in another state
    resumed = unlearn(task, inject.REQUEST, full_recipe(optimiser), run_dir=tmp_path, checkpoint_every=1)
    assert resumed.digest == whole.digest
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_seven_steps_are_not_eight(task):
    seven, eight = (unlearn(task, inject.REQUEST, full_recipe(optim={"max_steps": n})) for n in (7, 8))
    assert seven.digest != eight.digest


@pytest.mark.parametrize("lost", ["param", "buffer", "optim", "rng"])
def test_every_part_of_the_checkpoint_counts(task, tmp_path, monkeypatch, lost):
    """Leave one part out of what is restored: the patch is another one."""
    whole = unlearn(task, inject.REQUEST, full_recipe())
    with pytest.raises(inject.Fault):  # noqa: PT012
        on_step = inject.raise_at(6, inject.Fault())
        unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path, checkpoint_every=5, on_step=on_step)
    real = checkpoint.load

    def partial(path, *, parameters, buffers, optimizer, identity):
        state = torch.get_rng_state()
        result = real(
            path,
            parameters={} if lost == "param" else parameters,
            buffers={} if lost == "buffer" else buffers,
            optimizer=optimizer,
            identity=identity,
        )
        if lost == "param":
            return result
        if lost == "optim":
            optimizer.state.clear()
        if lost == "rng":
            torch.set_rng_state(state)
        return result

    monkeypatch.setattr(checkpoint, "load", partial)
    resumed = unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path, checkpoint_every=5)
    assert resumed.digest != whole.digest


def test_a_stop_rule_sees_the_same_history_after_a_resume(task, tmp_path, monkeypatch):
    from expunge.objectives.cross_entropy import RandomLabel

    lengths: list[int] = []

    def stop(self, history):
        lengths.append(len(history))
        return "enough" if sum(r["loss"] for r in history) > sum(r["loss"] for r in first[:11]) - 1e-9 else None

    folder = tmp_path / "plain"
    unlearn(task, inject.REQUEST, full_recipe(), run_dir=folder)
    first = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    monkeypatch.setattr(RandomLabel, "stop", stop)
    whole = unlearn(task, inject.REQUEST, full_recipe())
    with pytest.raises(inject.Fault):  # noqa: PT012
        on_step = inject.raise_at(6, inject.Fault())
        unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path / "r", checkpoint_every=5, on_step=on_step)
    lengths.clear()
    resumed = unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path / "r", checkpoint_every=5)
    assert lengths[0] == 5
    assert resumed.digest == whole.digest
    assert resumed.manifest.notes == whole.manifest.notes == ("stopped after step 11 of 16: enough",)


def interrupted(task, folder, every=2, at=5):
    with pytest.raises(inject.Fault):  # noqa: PT012
        on_step = inject.raise_at(at, inject.Fault())
        unlearn(task, inject.REQUEST, full_recipe(), run_dir=folder, checkpoint_every=every, on_step=on_step)


def test_a_log_that_lost_lines_stops_the_resume(task, tmp_path):
    interrupted(task, tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text().split("\n", 1)[1])
    with pytest.raises(ArtifactError, match="3 of the 4 steps"):
        unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path)


def test_changed_settings_are_refused_with_the_keys(task, tmp_path):
    interrupted(task, tmp_path)
    cases = [
        (full_recipe(optim={"lr": 0.5}), inject.REQUEST, 0, r"recipe.optim.lr: 0.01 there, 0.5 here"),
        (full_recipe(space="all"), inject.REQUEST, 0, r"recipe.space.keep.*recipe.space.kind"),
        (full_recipe(), ForgetRequest.label("bee"), 0, r"request.what.classes"),
        (full_recipe(), inject.REQUEST, 3, r"seed: 0 there, 3 here"),
    ]
    for recipe, request, seed, why in cases:
        with pytest.raises(ConfigError, match=why):
            unlearn(task, request, recipe, seed=seed, run_dir=tmp_path)
    other = inject.tiny_classifier(seed=1, dropout=DROPOUT)
    with pytest.raises(ConfigError, match=r"base: .*data: "):
        unlearn(other, inject.REQUEST, full_recipe(), run_dir=tmp_path)
    assert len(unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path))


def test_without_the_identity_check_the_wrong_checkpoint_is_still_refused(task, tmp_path, monkeypatch):
    interrupted(task, tmp_path)
    monkeypatch.setattr(run, "differences", lambda old, new: [])
    with pytest.raises(ArtifactError, match="belongs to another run"):
        unlearn(task, inject.REQUEST, full_recipe(optim={"lr": 0.5}), run_dir=tmp_path)


@pytest.mark.parametrize("how", ["truncate", "empty"])
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "run.json"])
def test_broken_files_in_the_run_folder_are_refused_by_name(task, tmp_path, how, name):
    interrupted(task, tmp_path)
    inject.corrupt(tmp_path / name, how)
    with pytest.raises(ArtifactError, match=name):
        unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path)


# ---- 18 full disk, two runs, stale results


def test_a_full_disk_leaves_the_earlier_checkpoint(task, tmp_path, monkeypatch):
    before = model_digest(task.model)
    with (
        inject.disk_full(monkeypatch, "checkpoint", after=2) as hits,
        pytest.raises(ResourceError, match="no space left"),
    ):
        unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path, checkpoint_every=2)
    assert len(hits) == 3
    assert model_digest(task.model) == before
    assert not list(tmp_path.glob(".*.tmp"))
    taken: list[int] = []
    resumed = unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path, on_step=lambda n, *_: taken.append(n))
    assert taken[0] == 5  # the second checkpoint, after step 4, is intact
    assert resumed.digest == unlearn(task, inject.REQUEST, full_recipe()).digest


def test_a_full_disk_while_saving_the_patch(task, tmp_path, monkeypatch):
    with inject.disk_full(monkeypatch, "patch"), pytest.raises(ResourceError, match="no space left"):
        unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path)
    assert not (tmp_path / "patch.safetensors").exists()
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert len(unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path))


KILL_WHILE_SAVING = """
import test_lifecycle as t
from expunge.run import unlearn
real, count = os.replace, [0]
def replace(a, b):
    if str(b).endswith("checkpoint.safetensors"):
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
os.replace = replace
unlearn(tiny_classifier(dropout=t.DROPOUT), REQUEST, t.full_recipe(), run_dir=sys.argv[1], checkpoint_every=2)
"""


def test_kill_9_while_saving_leaves_the_earlier_checkpoint(task, tmp_path):
    process = inject.start(KILL_WHILE_SAVING, str(tmp_path))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, text
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    taken: list[int] = []
    resumed = unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path, on_step=lambda n, *_: taken.append(n))
    assert taken[0] == 3
    assert not list(tmp_path.glob(".*.tmp"))
    assert resumed.digest == unlearn(task, inject.REQUEST, full_recipe()).digest


def test_two_runs_in_one_folder_are_kept_apart(task, tmp_path):
    def second(number, model, optimizer):
        if number == 1:
            with pytest.raises(ResourceError, match=rf"in use by process {os.getpid()}"):
                unlearn(copy.deepcopy(trained_copy), inject.REQUEST, full_recipe(), run_dir=tmp_path)

    trained_copy = copy.deepcopy(task)
    assert len(unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path, on_step=second))
    assert len(unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path))  # free again


def test_without_the_lock_two_runs_would_share_a_folder(task, tmp_path, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(run, "_lock", lambda path: nullcontext())
    other, results, logs = copy.deepcopy(task), [], []

    def second(number, model, optimizer):
        if number == 1:
            logs.append((tmp_path / "log.jsonl").stat().st_ino)
            results.append(unlearn(other, inject.REQUEST, full_recipe(), run_dir=tmp_path))

    unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path, on_step=second)
    assert len(results) == 1
    assert (tmp_path / "log.jsonl").stat().st_ino != logs[0]  # the first run's record is gone


def test_a_finished_folder_returns_its_patch_without_work(task, tmp_path):
    first = unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path)
    taken: list[int] = []
    again = unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path, on_step=lambda n, *_: taken.append(n))
    assert again.digest == first.digest
    assert not taken
    with pytest.raises(ConfigError, match=r"recipe.optim.lr"):  # but never for other settings
        unlearn(task, inject.REQUEST, full_recipe(optim={"lr": 0.02}), run_dir=tmp_path)


def test_a_damaged_result_is_not_returned(task, tmp_path):
    unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path)
    inject.corrupt(tmp_path / "patch.safetensors", "flip")
    with pytest.raises(ArtifactError, match=r"patch.safetensors"):
        unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path)


def test_a_result_is_keyed_by_the_content_of_the_files_it_read(task, tmp_path):
    from expunge.saliency import make_mask

    def mask(seed):
        generator = torch.Generator().manual_seed(seed)
        scores = {n: torch.rand(p.shape, generator=generator) for n, p in task.model.named_parameters()}
        make_mask(scores, 0.3).save(tmp_path / "mask.safetensors")

    recipe: Recipe = full_recipe(
        space={"kind": "saliency_mask", "keep": 0.3, "file": str(tmp_path / "mask.safetensors")}
    )
    mask(0)
    first = unlearn(task, inject.REQUEST, recipe, run_dir=tmp_path / "run")
    assert unlearn(task, inject.REQUEST, recipe, run_dir=tmp_path / "run").digest == first.digest
    mask(1)
    with pytest.raises(ConfigError, match=r"mask.safetensors"):
        unlearn(task, inject.REQUEST, recipe, run_dir=tmp_path / "run")
    assert unlearn(task, inject.REQUEST, recipe).digest != first.digest


def test_the_patch_file_and_the_returned_patch_agree(task, tmp_path):
    patch = unlearn(task, inject.REQUEST, full_recipe(), run_dir=tmp_path)
    assert Patch.load(tmp_path / "patch.safetensors").digest == patch.digest

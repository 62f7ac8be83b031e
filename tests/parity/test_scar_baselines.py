"""Golden numbers of SCAR's comparison methods: DUCK, negative gradient, random labels, fine-tuning, index sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scar_files import Case as GoldenCase
from scar_files import cases, runs
from torch import Tensor, nn

from expunge.data.forget_indices import published_forget_indices, write_forget_indices
from expunge.method import build_recipe
from expunge.methods import duck as duck_file
from expunge.objectives import stopping
from expunge.objectives.stopping import StopBelow
from expunge.patch import apply
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.run import LOG, unlearn
from expunge.schedule import FORWARD_ONLY, Single
from expunge.tasks.base import Batch
from expunge.tasks.classifier import ClassifierTask
from expunge.tasks.tiny import tiny_classifier

NEVER = -1.0


class Case(GoldenCase):
    """Compares flattened tensors, after a check of their shape: the scale of weights is taken from ``init`` entries."""

    def close(self, got: Tensor, name: str) -> None:
        whole = self.tensors
        assert got.shape == whole[f"expected.{name}"].shape, f"expected.{name}: shape {list(got.shape)}"
        self.tensors = {n: t.flatten() for n, t in whole.items()}
        try:
            super().close(got.flatten(), name)
        finally:
            self.tensors = whole


class Recorder(ClassifierTask):
    """Keeps the features of every training forward of forget samples and plays recorded labels."""

    labels: list[Tensor]
    features: list[Tensor]
    step: int

    def wrong_target(self, batch: Batch, *, key: int, exclude_true: bool = True) -> Tensor:
        return self.labels[self.step]

    def represent(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features, logits = super().represent(batch)
        if torch.is_grad_enabled() and batch.role == "forget":
            self.features.append(features.detach().clone())
        return features, logits


def replayed(recipe: Recipe, case: Case, norm: str) -> Recipe:
    """The recipe over the recorded steps, with the recorded optimiser settings, and a rule that measures only."""
    hyper, schedule = case.hyper, case.schedule()
    assert hyper["target_accuracy"] == NEVER
    optim: dict[str, Any] = {
        "lr": hyper["lr"],
        "weight_decay": hyper["weight_decay"],
        "epochs": hyper["epochs"],
        "lr_schedule": "multistep",
        "milestones": tuple(hyper["lr_milestones"]),
        "gamma": hyper["lr_factor"],
        "norm": norm,
        "augment": False,
    }
    if "momentum" in hyper:
        optim["momentum"] = hyper["momentum"]
    changes = {"schedule": schedule, "until": StopBelow(target=NEVER)}
    assert recipe.objective is not None
    return recipe.replace(objective=recipe.objective.model_copy(update=changes), optim=optim)


def norm_of(case: Case) -> str:
    return "train" if case.semantics["bn_mode"] == "train" else "frozen"


def run_case(case: Case, recipe: Recipe, folder: Path) -> Recorder:
    """Unlearn as recorded and compare rates, gradients, every state, losses, accuracies and the patched model."""
    task = case.task(Recorder)
    assert isinstance(task, Recorder)
    task.features, task.step = [], 0
    drawn = sorted(n for n in case.tensors if n.startswith("input.drawn_labels"))
    task.labels = [case.tensors[f"input.drawn_labels.step{k}"] for k in range(len(drawn))]
    number, rows = 0, []  # which optimiser step every step of the loop is
    for epoch in case.schedule().epochs:
        for step in epoch:
            rows.append(None if FORWARD_ONLY in step else number)
            number += FORWARD_ONLY not in step

    def on_step(count: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        task.step = count
        k = rows[count - 1]
        if k is None:
            return
        case.close(torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64), f"step{k}.lr")
        for name, parameter in net.named_parameters():
            case.close(parameter.grad, f"step{k}.grad.{name}")
        state = net.state_dict()
        names = [n.split(".after.")[1] for n in case.names(f"step{k}.after.")]
        assert set(names) == set(state)
        for name in names:
            case.close(state[name], f"step{k}.after.{name}")

    recipe = replayed(recipe, case, norm_of(case))
    patch = unlearn(task, case.request(), recipe, run_dir=folder, on_step=on_step)
    log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert len(log) == len(rows)
    for row, k in zip(log, rows, strict=True):
        assert ("loss" in row) == (k is not None), "a pair that is thrown away makes no update"
        if k is not None:
            for name, term in (("total", "loss"), ("forget", "forget"), ("keep", "retain")):
                if f"step{k}.loss_{name}" in case.names():
                    factor = {"forget": "lambda_1", "keep": "lambda_2"}.get(name)
                    value = row[term] * (case.hyper[factor] if factor else 1.0)
                    case.close(torch.tensor(value, dtype=torch.float64), f"step{k}.loss_{name}")
        if row["end_of_epoch"]:
            case.close(
                torch.tensor(row["forget_accuracy"], dtype=torch.float64), f"epoch{row['epoch']}.forget_accuracy"
            )
    apply(task.model, patch)
    final = task.model.state_dict()
    assert {n[6:] for n in case.names("final.")} == set(final)
    for name, value in final.items():
        case.close(value, f"final.{name}")
    return task


# -- DUCK ----------------------------------------------------------------------------------------------------------


def duck_recipe(case: Case, profile: str) -> Recipe:
    names = ("lambda_1", "lambda_2", "temperature", "label_smoothing")
    return build_recipe({"method": "duck", "profile": profile, **{n: case.hyper[n] for n in names}})


def check_duck(case: Case, profile: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DUCK run, with its centroids, distances and targets."""
    measured: list[tuple[Tensor, Tensor]] = []
    used: list[Tensor] = []

    def spy_centroids(*args: Any) -> tuple[Tensor, Tensor]:
        measured.append(real_centroids(*args))
        return measured[-1]

    def spy(make: Any) -> Any:
        def made(*args: Any) -> Any:
            targets = make(*args)

            def recorded(batch: Batch, features: Tensor) -> Tensor:
                used.append(targets(batch, features))
                return used[-1]

            return recorded

        return made

    real_centroids = duck_file.centroids
    monkeypatch.setattr(duck_file, "centroids", spy_centroids)
    monkeypatch.setattr(duck_file, "upfront", spy(duck_file.upfront))
    monkeypatch.setattr(duck_file, "appended", spy(duck_file.appended))
    task = run_case(case, duck_recipe(case, profile), folder)
    means, kept = measured[0]
    assert kept.tolist() == case.hyper["classes"]
    case.close(means, "stats.centroids")
    taken = [i for i, step in enumerate(s for e in case.schedule().epochs for s in e) if FORWARD_ONLY not in step]
    assert len(used) == len(task.features) >= len(taken)
    for k, i in enumerate(taken):
        case.close(duck_file.cosine_distances(task.features[i], means.to(task.features[i])), f"step{k}.distances")
        case.close(used[i], f"step{k}.target_class")


@pytest.mark.parametrize(("path", "dt"), runs("DUCK"))
def test_duck(path: Path, dt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(path, dt)
    check_duck(case, case.variant, tmp_path, monkeypatch)
    case.finish()


@pytest.mark.parametrize("path", [p for p in cases("DUCK") if not p.id.startswith("duck_mlp_hr")])
def test_the_two_profiles_of_duck_differ(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file refutes the other profile, but for the network without normalisation and without a removed class."""
    case = Case(path)
    other = {"as_published": "as_intended", "as_intended": "as_published"}[case.variant]
    with pytest.raises(AssertionError, match=r"expected\."):
        check_duck(case, other, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", cases("DUCK"))
def test_the_semantics_recorded_are_those_of_the_profile(path: Path) -> None:
    case = Case(path)
    objective = duck_recipe(case, case.variant).objective
    assert isinstance(objective, duck_file.Duck)
    said = case.semantics
    assert objective.columns == said["column_map"]
    names = {"upfront": "upfront_eval", "appended": "append_every_retain_batch"}
    assert names[objective.assignment] == said["assignment"]
    assert (objective.centroid_batches or 0) == said["centroid_batches"]
    assert objective.schedule.discard == said["discarded_forward"]  # type: ignore[union-attr]


# -- the baselines of the base class -------------------------------------------------------------------------------

BASELINES = {"NegativeGradient": "scar_neg_grad", "RandomLabels": "scar_random_labels", "FineTuning": "fine_tune"}


def baseline(case: Case) -> Recipe:
    name = BASELINES[case.meta["method"]]
    return build_recipe({"method": name} if name == "fine_tune" else {"method": name, "profile": "as_published"})


@pytest.mark.parametrize(("path", "dt"), runs(*BASELINES))
def test_baseline(path: Path, dt: str, tmp_path: Path) -> None:
    case = Case(path, dt)
    run_case(case, baseline(case), tmp_path)
    case.finish()


@pytest.mark.parametrize("path", cases(*BASELINES))
@pytest.mark.parametrize("change", ["gamma", "momentum", "label"])
def test_another_loop_is_noticed(path: Path, change: str, tmp_path: Path) -> None:
    case = Case(path)
    if change == "gamma":
        if case.hyper["lr_milestones"][0] >= case.hyper["epochs"]:
            pytest.skip("the rate never changes in this file")
        case.hyper["lr_factor"] = 0.6
    elif change == "momentum":
        case.hyper["momentum"] += 0.01
    else:
        name = next(
            (n for n in case.tensors if n.startswith("input.drawn_labels.step1")),
            f"input.{'retain' if case.meta['method'] == 'FineTuning' else 'forget'}0.y",
        )
        if case.removed and "drawn" not in name and case.meta["method"] != "FineTuning":
            pytest.skip("another label would not be in the request")
        case.tensors[name][0] = next(
            c for c in range(case.hyper["num_classes"]) if c not in (*case.removed, int(case.tensors[name][0]))
        )
    with pytest.raises(AssertionError, match=r"expected\.step"):
        run_case(case, baseline(case), tmp_path)


@pytest.mark.parametrize("path", cases("RandomLabels"))
def test_recorded_labels_are_in_the_allowed_set(path: Path) -> None:
    case = Case(path)
    drawn = torch.cat([t for n, t in case.tensors.items() if n.startswith("input.drawn_labels")])
    assert set(drawn.tolist()) <= set(range(case.hyper["num_classes"])) - set(case.removed)
    objective = baseline(case).objective
    assert objective is not None
    assert (objective.exclude_true, objective.exclude_removed, objective.redraw) == (False, True, "step")


# -- stop rule -----------------------------------------------------------------------------------------------------

RULES = {"DUCK": "duck", "NegativeGradient": "scar_neg_grad", "FineTuning": "fine_tune"}


def check_stop(case: Case, number: int, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Play the recorded accuracies to a run of the real loop and count its steps and measurements."""
    recorded = [float(a) for a in case.tensors[f"input.f64.row{number}.accuracy_at_epoch_end"]]
    reads = iter(recorded)
    measured = 0

    def played(*_: Any) -> Tensor:
        nonlocal measured
        measured += 1
        return torch.tensor(next(reads), dtype=torch.float64)

    recipe = build_recipe(RULES[row["rule"]])
    assert recipe.objective is not None
    role = "retain" if row["rule"] == "FineTuning" else "forget"
    task = tiny_classifier(n_per_class=12, steps=1)
    changes: dict[str, Any] = {"schedule": Single(role=role, batch_size=-(-36 // row["steps_per_epoch"]))}
    request = ForgetRequest.samples(range(36) if role == "forget" else range(12))
    if row["rule"] != "FineTuning":
        rule = recipe.objective.rule(row["mode"] == "CR")  # type: ignore[attr-defined]
        assert rule == (StopBelow(target=0.01) if row["mode"] == "CR" else StopBelow(below_test=0.015))
        changes["until"] = StopBelow(target=row["target"], every=rule.every, after_epochs=rule.after_epochs)
    monkeypatch.setattr(stopping, "accuracy", played)
    taken: list[int] = []
    objective = recipe.objective.model_copy(update=changes)
    recipe = recipe.replace(objective=objective, optim={"epochs": row["epochs"], "augment": False, "lr": 1e-4})
    unlearn(task, request, recipe, on_step=lambda n, *_: taken.append(n))
    case.close(torch.tensor(len(taken)), f"row{number}.optimiser_steps")
    if f"row{number}.epoch_evaluations" in case.names() and row["rule"] != "FineTuning":
        case.close(torch.tensor(measured), f"row{number}.epoch_evaluations")
        case.close(torch.tensor(0), f"row{number}.step_evaluations")


@pytest.mark.parametrize("path", cases("stop_rule"))
def test_stop_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(path)
    checked = 0
    for number, row in enumerate(case.hyper["rows"]):
        if row["rule"] in RULES:
            check_stop(case, number, row, monkeypatch)
            checked += 1
    assert checked == 3
    others = [f"row{n}." for n, row in enumerate(case.hyper["rows"]) if row["rule"] not in RULES]
    fine_tuning = next(n for n, row in enumerate(case.hyper["rows"]) if row["rule"] == "FineTuning")
    # Without a rule there is nothing to measure: fine-tuning here reads no forget accuracy at all.
    case.finish(*others, f"row{fine_tuning}.epoch_evaluations", f"row{fine_tuning}.step_evaluations")


@pytest.mark.parametrize("path", cases("stop_rule"))
def test_equality_does_not_stop_and_a_hair_less_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(path)
    number, row = next((n, r) for n, r in enumerate(case.hyper["rows"]) if r["rule"] == "NegativeGradient")
    accuracies = case.tensors[f"input.f64.row{number}.accuracy_at_epoch_end"]
    assert float(accuracies[0]) == row["target"]
    accuracies[0] -= 1e-9
    with pytest.raises(AssertionError, match="optimiser_steps"):
        check_stop(case, number, row, monkeypatch)


# -- index sets ----------------------------------------------------------------------------------------------------


def check_indices(case: Case, seed: int, name: str, ids: Tensor) -> None:
    prefix = f"seed{seed}.{name}"
    assert len(ids) == len(ids.unique()) == case.hyper["size"][name]
    assert 0 <= int(ids.min()) <= int(ids.max()) < case.hyper["population"][name]
    case.close(ids[:12], f"{prefix}.first")
    case.close(ids[-12:], f"{prefix}.last")
    case.close(ids.sum(), f"{prefix}.sum")
    case.close((ids * torch.arange(1, len(ids) + 1)).sum(), f"{prefix}.weighted_sum")


@pytest.mark.parametrize("path", cases("forget_indices"))
def test_forget_indices(path: Path, tmp_path: Path) -> None:
    case = Case(path)
    for seed in case.hyper["seeds"]:
        for name in case.hyper["size"]:
            check_indices(case, seed, name, published_forget_indices(name, seed))
    case.finish()
    file = write_forget_indices(tmp_path / "indices.json", "cifar10", 3)
    request = ForgetRequest.from_file(file)
    forget, retain = request.resolve(torch.arange(50_000) % 10, [str(c) for c in range(10)])
    want = published_forget_indices("cifar10", 3).sort().values
    assert torch.equal(forget.sort().values, want)
    assert torch.equal(torch.cat([forget, retain]).sort().values, torch.arange(50_000))


@pytest.mark.parametrize("path", cases("forget_indices"))
def test_the_draws_of_another_seed_or_set_are_others(path: Path) -> None:
    case = Case(path)
    with pytest.raises(AssertionError, match="first"):
        check_indices(case, 0, "cifar10", published_forget_indices("cifar10", 1))
    with pytest.raises(AssertionError, match="first"):
        check_indices(case, 0, "cifar100", published_forget_indices("cifar10", 0))

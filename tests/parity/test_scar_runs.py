"""Golden trajectories of SCAR and its self-forget form, through the real `unlearn`; and their stop rules."""

import json

import pytest
import torch
from scar_files import Case, cases, runs
from test_scar_features import metric

from expunge.context import Context
from expunge.features.distance import ClassDistance
from expunge.features.keep import Keep
from expunge.method import build_recipe
from expunge.methods import scar as scar_module
from expunge.methods._scar import Teacher, statistics_for
from expunge.methods.scar import Scar
from expunge.methods.scar_self import ScarSelf
from expunge.objectives.stopping import ACCURACY, TARGET, StopBelow
from expunge.recipe import Optim, Recipe
from expunge.run import unlearn
from expunge.schedule import FORWARD_ONLY, Nested


def recipe_of(case, joint):
    """Every rule of the file as a setting."""
    h, s = case.hyper, case.semantics
    schedule = case.schedule()
    common = {
        "schedule": schedule,
        "until": StopBelow(target=h["target_accuracy"], every=1),
        "lambda_1": h["lambda_1"],
        "lambda_2": h["lambda_2"],
        "metric": metric(case),
        "keep": Keep(
            temperature=h["temperature"],
            rule=s["keep_temperature"],
            removed_logit=s["removed_logit"],
            row_filter=s["row_filter"],
            logit_offset=s["logit_offset"],
        ),
        "joint": joint,
    }
    if case.meta["method"] == "SCAR_self":
        assert s["assignment"] == "every_step"
        objective = ScarSelf(**common, empty=s["empty_pseudo_forget"])
    else:
        gate = h.get("gate_threshold") or 0.0
        objective = Scar(**common, assignment=s["assignment"], gate=gate, balanced=False)
    optim = Optim(
        name="adam",
        lr=h["lr"],
        weight_decay=h["weight_decay"],
        epochs=len(schedule.epochs),
        norm="train" if s["bn_mode"] == "train" else "frozen",
    )
    return Recipe(name="golden", objective=objective, space="all", optim=optim)


class Watch:
    """What each step of the loop computed."""

    def __init__(self, monkeypatch):
        self.moved, self.gates, self.accuracies = [], [], []
        self.step, self.after, self.grads = 0, [], []
        original = ClassDistance.distance2

        def distance2(distance, z, targets=None, **more):
            if targets is not None:
                self.moved.append((self.step, z.detach().clone(), targets))
            return original(distance, z, targets, **more)

        weights, accuracy = Scar.weights, scar_module.class_accuracy

        def gates(part, ctx, batch):
            self.gates.append((self.step, weights(part, ctx, batch)))
            return self.gates[-1][1]

        def accuracies(*args):
            self.accuracies.append((self.step, accuracy(*args)))
            return self.accuracies[-1][1]

        monkeypatch.setattr(ClassDistance, "distance2", distance2)
        monkeypatch.setattr(Scar, "weights", gates)
        monkeypatch.setattr(scar_module, "class_accuracy", accuracies)

    def on_step(self, number, model, optimizer):
        self.after.append({n: t.clone() for n, t in model.state_dict().items()})
        self.grads.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
        self.step = number


def f64(number):
    return torch.tensor(number, dtype=torch.float64)


def forms():
    """Every file and precision; in double precision also with one forward pass, unless normalisation moves."""
    for given in runs("SCAR", "SCAR_self"):
        path, dt = given.values
        yield pytest.param(path, dt, False, id=given.id)
        if dt == "float64" and Case(path).semantics["bn_mode"] != "train":
            yield pytest.param(path, dt, True, id=f"{given.id}-joint")


@pytest.mark.parametrize(("path", "dt", "joint"), list(forms()))
def test_trajectory(path, dt, joint, monkeypatch, tmp_path):
    case = Case(path, dt)
    task, request, recipe = case.task(), case.request(), recipe_of(case, joint)
    distance = check_start(case, task, request, recipe.objective)
    watch = Watch(monkeypatch)
    unlearn(task, request, recipe, run_dir=tmp_path, inplace=True, on_step=watch.on_step)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    taken = [i for i, row in enumerate(rows) if "loss" in row]
    early = case.meta["tolerance"].get(dt) is None
    for k, i in enumerate(taken[:1] if early else taken):
        check_step(case, recipe.objective, distance, watch, k, i, rows[i], early)
    if not early:
        for name, value in task.model.state_dict().items():
            case.close(value, f"final.{name}")
    assert len(taken) == len({n.split(".")[0] for n in case.names("step")})
    case.finish()


def check_start(case, task, request, objective):
    """Statistics and teacher outputs of the initial model; returns the distance to every class."""
    ctx = Context(task, task.split(request))
    task.model.eval()
    found = statistics_for(ctx, None, objective.metric)
    distance = ClassDistance(found, objective.metric)
    assert found.classes.tolist() == case.hyper["classes"]
    if case.meta["tolerance"].get(case.dt) is not None:
        case.close(found.mean, "stats.mean")
        case.close(torch.stack([distance.inverse(i) for i in range(len(found.classes))]), "stats.inverse")
        sizes = [len(x) for x, _ in case.batches("surrogate")]
        for i, logits in enumerate(Teacher(ctx).logits.split(sizes)):
            case.close(logits, f"surrogate{i}.teacher_logits")
    return distance


def check_step(case, objective, distance, watch, k, i, row, early):
    expected = set(case.names(f"step{k}."))
    case.close(f64(objective.lambda_1 * row["forget"]), f"step{k}.loss_forget")
    case.close(f64(objective.lambda_2 * row["keep"]), f"step{k}.loss_keep")
    case.close(f64(row["loss"]), f"step{k}.loss_total")
    _, z, targets = next(m for m in watch.moved if m[0] == i)
    if f"step{k}.distances" in expected:
        case.close(distance.distance2(z), f"step{k}.distances")
        case.close(targets, f"step{k}.target_class")
    else:
        assert len(z) == 0
    if f"step{k}.sample_weight" in expected:
        case.close(next(w for s, w in watch.gates if s == i), f"step{k}.sample_weight")
    if f"step{k}.class_accuracy" in expected:
        case.close(next(a for s, a in watch.accuracies if s == i), f"step{k}.class_accuracy")
    for name, value in watch.grads[i].items():
        case.close(torch.zeros_like(watch.after[i][name]) if value is None else value, f"step{k}.grad.{name}")
    case.close(f64(row[ACCURACY]), f"step{k}.forget_accuracy")
    if not early:
        for name, value in watch.after[i].items():
            case.close(value, f"step{k}.after.{name}")


def test_a_wrong_rule_is_noticed(tmp_path, monkeypatch):
    """The comparison can fail: the published temperature in an intended run is off."""
    path = next(p.values[0] for p in cases("SCAR") if p.id == "scar_mlp_cr_temperature.as_intended")
    case = Case(path)
    recipe = recipe_of(case, False)
    wrong = recipe.objective.model_copy(
        update={"keep": recipe.objective.keep.model_copy(update={"rule": "teacher_only"})}
    )
    unlearn(case.task(), case.request(), recipe.replace(objective=wrong), run_dir=tmp_path)
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    with pytest.raises(AssertionError, match="off by"):
        case.close(f64(row["loss"]), "step0.loss_total")


@pytest.mark.parametrize("path", cases("SCAR"))
def test_the_nested_schedule_has_the_recorded_shape(path):
    """Steps per forget batch, and thrown-away pairs, of the method's own schedule."""
    case = Case(path)
    published = case.semantics["discarded_forward"]
    sizes = {r: [len(x) for x, _ in case.batches(r)] for r in ("forget", "surrogate")}
    recipe = build_recipe(
        {
            "method": "scar",
            "n_ret": case.hyper["n_ret"],
            "batch_size": max(sizes["forget"]),
            "profile": "as_published" if published else "as_intended",
        }
    )
    assert isinstance(recipe.objective.schedule, Nested)
    schedule = recipe.objective.schedule.model_copy(update={"inner_batch_size": max(sizes["surrogate"])})
    total = {r: sum(n) for r, n in sizes.items()}
    for epoch in range(case.hyper["epochs"]):
        steps = schedule.steps(total, epoch, 0)
        recorded = case.schedule().epochs[epoch]
        assert [FORWARD_ONLY in s for s in steps] == [FORWARD_ONLY in s for s in recorded]
        assert [tuple(s["forget"].tolist()) for s in steps] == [s["forget"] for s in recorded]


@pytest.mark.parametrize("path", cases("stop_rule"))
def test_stop_rules(path):
    """The step at which the methods' own rules stop, given the recorded accuracies."""
    case = Case(path)
    published = case.variant == "as_published"
    seen = 0
    for i, row in enumerate(case.hyper["rows"]):
        if row["rule"] not in ("SCAR", "SCAR_self"):
            continue
        seen += 1
        method = {"method": row["rule"].lower(), "profile": case.variant, "check_every": 1}
        if row["rule"] == "SCAR_self":
            method["oracle_stop"] = True
        objective = build_recipe(method).objective
        rule = objective.until or objective.rule(row["mode"] == "CR")
        assert rule.every == 1
        if row["mode"] == "CR":
            assert rule.target == row["target"]
        after = case.tensors[f"input.f64.row{i}.accuracy_after_step"].tolist()
        ends = case.tensors[f"input.f64.row{i}.accuracy_at_epoch_end"].tolist()
        steps, epochs = stop_at(objective, after, ends if published else None, row)
        case.close(torch.tensor(steps), f"row{i}.optimiser_steps")
        if published:  # one measurement per step; the one at an epoch's end repeats the last
            case.close(torch.tensor(steps), f"row{i}.step_evaluations")
            case.close(torch.tensor(0 if row["rule"] == "SCAR_self" else epochs), f"row{i}.epoch_evaluations")
    assert seen == 7


def stop_at(objective, after, ends, row):
    """Steps and epochs begun until the rule speaks."""
    for k, accuracy in enumerate(after):
        epoch = k // row["steps_per_epoch"]
        last = (k + 1) % row["steps_per_epoch"] == 0
        values = [accuracy] + ([ends[epoch]] if ends and last and row["rule"] == "SCAR" else [])
        for value in values:
            if objective.stop([{"epoch": epoch, ACCURACY: value, TARGET: row["target"]}]):
                return k + 1, epoch + 1
    return len(after), row["epochs"]

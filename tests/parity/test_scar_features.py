"""Golden numbers of SCAR: class statistics, distances, targets, the two losses and the surrogate sampler."""

import pytest
import torch
from scar_files import Case, cases, paths, runs

from expunge.errors import DataError
from expunge.features.distance import ClassDistance, Metric
from expunge.features.keep import Keep, balanced_weights
from expunge.features.statistics import ClassStatistics, correlation, shrink, tukey
from expunge.methods.scar import Scar, make_keep, make_metric

OFFICIAL = "expected_f32"


def metric(case, **more):
    """Every key of the file's semantics that concerns the distance, as a setting."""
    keys = {k: v for k, v in case.semantics.items() if k in Metric.model_fields}
    keys |= {"passes": case.semantics["shrink_passes"]} if "shrink_passes" in case.semantics else {}
    return Metric(**keys, **{k: case.hyper[k] for k in ("delta", "gamma1", "gamma2")}, **more)


def statistics(case, z, y):
    """Statistics streamed in blocks of five rows, in an order of their own."""
    rows = torch.arange(len(z)).flip(0).split(5)
    m = metric(case)
    stream = ((z[r], y[r]) for r in rows)
    return ClassStatistics.of(stream, case.hyper["classes"], delta=m.delta, rule=m.tukey, eps=m.tukey_eps)


@pytest.mark.parametrize(("path", "dt"), runs("statistics"))
def test_statistics(path, dt):
    case = Case(path, dt)
    z, y = case.input("features"), case.input("labels")
    rule, eps = case.semantics["tukey"], case.semantics["tukey_eps"]
    case.close(tukey(z, case.hyper["delta"], rule, eps), "tukey")
    if "inverse" not in case.semantics:  # negative features under the plain power: nothing but NaN
        assert bool(case.tensors["expected.tukey"].isnan().any())
        with pytest.raises(DataError, match=r"negative features.*signed_power"):
            statistics(case, z, y)
        case.finish()
        return
    found = statistics(case, z, y)
    case.close(found.mean, "mean")
    case.close(found.covariance, "covariance")
    for passes, word in ((1, "once"), (2, "twice")):
        distance = ClassDistance(found, metric(case).model_copy(update={"passes": passes}))
        hyper = [case.hyper["gamma1"], case.hyper["gamma2"], passes, case.semantics["offdiag_mean"]]
        shrunk = shrink(found.covariance, *hyper)
        case.close(shrunk, f"shrunk_{word}")
        case.close(correlation(shrunk), f"correlation_{word}")
        case.close(torch.stack([distance.inverse(i) for i in range(len(found.classes))]), f"inverse_{word}")
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("distance_and_target"))
def test_distances_and_targets(path, dt):
    case = Case(path, dt)
    distance = ClassDistance(statistics(case, case.input("retain_features"), case.input("retain_labels")), metric(case))
    z, y = case.input("forget_features"), case.input("forget_labels")
    d2 = distance.distance2(z)
    targets = distance.assign(z, y, case.removed)
    case.close(distance.statistics.mean, "mean")
    case.close(torch.stack([distance.inverse(i) for i in range(len(distance.classes))]), "inverse")
    case.close(d2, "distances")
    case.close(d2.argmin(1), "nearest_column")
    case.close(targets, "target_class")
    case.close(torch.searchsorted(distance.classes, targets), "target_column")
    single = distance.distance2(z, targets)
    assert single.dtype == case.dtype
    assert torch.allclose(single, d2.gather(1, torch.searchsorted(distance.classes, targets)[:, None])[:, 0])
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("metric_loss"))
def test_metric_loss(path, dt):
    from types import SimpleNamespace

    from expunge.methods.scar import GATES

    case = Case(path, dt)
    distance = ClassDistance(statistics(case, case.input("retain_features"), case.input("retain_labels")), metric(case))
    z, y = case.input("forget_features").requires_grad_(True), case.input("forget_labels")
    targets = distance.assign(z.detach(), y, case.removed)
    state = {}
    if "input.f64.class_accuracy" in case.tensors:
        state[GATES] = case.tensors["input.f64.class_accuracy"]
    ctx = SimpleNamespace(split=SimpleNamespace(removed=tuple(case.removed)), state=state)
    weights = Scar(gate=case.hyper["gate_threshold"] or 0.0).weights(ctx, SimpleBatch(y))
    d2 = distance.distance2(z, targets, exact_slope=case.variant != "as_intended")
    loss = case.hyper["lambda_1"] * (weights.to(d2) * d2).mean()
    loss.backward()
    case.close(targets, "target_class")
    case.close(weights, "sample_weight")
    case.close(loss, "loss")
    case.close(z.grad, "grad_features")
    case.finish()


class SimpleBatch:
    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)


def test_the_slope_at_zero_is_what_makes_the_published_gradient_infinite():
    path = next(p for p in paths("metric_loss") if p.stem == "metric_zero_features.as_published")
    case = Case(path)
    distance = ClassDistance(statistics(case, case.input("retain_features"), case.input("retain_labels")), metric(case))
    z = case.input("forget_features").requires_grad_(True)
    targets = distance.assign(z.detach(), case.input("forget_labels"), case.removed)
    distance.distance2(z, targets).mean().backward()
    want = case.tensors["expected.grad_features"]
    assert torch.equal(z.grad == 0, ~torch.isfinite(want))
    assert torch.allclose(z.grad[z != 0], want[z != 0], rtol=1e-9)


@pytest.mark.parametrize(("path", "dt"), runs("keep_loss"))
def test_keep_loss(path, dt):
    case = Case(path, dt)
    s = case.semantics
    for name in case.names():
        if not name.endswith(".loss"):
            continue
        *mode, temperature = name.removesuffix(".loss").split(".")
        keep = Keep(
            temperature=float(temperature[1:]),
            rule=s["keep_temperature"],
            removed_logit=mode[0] if mode else s.get("removed_logit", "row_min"),
            row_filter=s.get("row_filter", "all_removed"),
            logit_offset=s["logit_offset"],
        )
        teacher, student = case.input("teacher_logits"), case.input("student_logits").clone().requires_grad_(True)
        before = teacher.clone()
        loss = case.hyper["lambda_2"] * keep(student, teacher, case.removed).mean()
        loss.backward()
        assert torch.equal(teacher, before), "the teacher's logits were edited in place"
        case.close(loss, name)
        case.close(student.grad, name.replace(".loss", ".grad_student"))
    case.finish()


@pytest.mark.parametrize("path", cases("surrogate_sampler"))
def test_surrogate_sampler(path):
    case = Case(path)
    x = case.input("images")
    logits = x @ case.tensors["init.fc.weight"].double().T + case.tensors["init.fc.bias"].double()
    labels = logits.argmax(1)
    case.close(logits, "teacher_logits")
    case.close(labels, "pseudo_label")
    case.close(torch.bincount(labels, minlength=case.hyper["num_classes"]), "class_count")
    rare = {"rare_below": case.hyper["rare_below"], "rare_as": case.hyper["rare_replaced_by"]}
    case.close(balanced_weights(labels, case.hyper["num_classes"], **rare), "sampler_weight")
    assert rare == {"rare_below": 3, "rare_as": 5}
    case.finish()


KNOWN = {*Metric.model_fields, "shrink_passes", "keep_temperature", "removed_logit", "row_filter", "logit_offset"}
KNOWN |= {"assignment", "bn_mode", "discarded_forward", "restart_surrogate", "empty_pseudo_forget"}


@pytest.mark.parametrize(
    "path", cases("statistics", "distance_and_target", "metric_loss", "keep_loss", "SCAR", "SCAR_self")
)
def test_every_rule_is_a_setting(path):
    assert set(Case(path).semantics) <= KNOWN


@pytest.mark.parametrize("path", [p for p in cases("SCAR", "SCAR_self") if "frozen_bn" not in p.id])
def test_the_profiles_are_the_rules_of_the_files(path):
    """What a profile sets equals what the files say its numbers were made with."""
    case = Case(path)
    own = case.meta["method"] == "SCAR_self"
    h, s = case.hyper, case.semantics
    made = make_metric(case.variant, h["delta"], h["gamma1"], h["gamma2"], passes=1 if own else 2)
    assert made.model_copy(update={"tukey": "power"}) == metric(case)
    keep = make_keep(case.variant, h["temperature"], **({"rule": "ignored"} if own else {}))
    assert keep.rule == s["keep_temperature"]
    assert (keep.removed_logit, keep.row_filter, keep.logit_offset) == (
        s["removed_logit"], s["row_filter"], s["logit_offset"],
    )  # fmt: skip
    from expunge.method import build_recipe

    recipe = build_recipe({"method": "scar_self" if own else "scar", "profile": case.variant})
    assert recipe.optim.norm == ("train" if case.variant == "as_published" else "frozen")
    if own:
        assert recipe.objective.empty == s["empty_pseudo_forget"]
    else:
        assert recipe.objective.assignment == s["assignment"]
        assert recipe.objective.schedule.discard == s["discarded_forward"]


BOTH = {p.stem.split(".")[0] for p in paths("distance_and_target")} - {"distance_cr_last", "distance_hr"}


@pytest.mark.parametrize("stem", sorted(BOTH))
def test_published_and_intended_targets_differ(stem):
    """Where the files say that the variants differ, so do the settings."""
    found = []
    for variant in ("as_published", "as_intended"):
        case = Case(next(p for p in paths("distance_and_target") if p.stem == f"{stem}.{variant}"))
        z, y = case.input("forget_features"), case.input("forget_labels")
        own = statistics(case, case.input("retain_features"), case.input("retain_labels"))
        found.append(ClassDistance(own, metric(case)).assign(z, y, case.removed))
    assert not torch.equal(*found)

"""Golden numbers of SalUn, its baselines and SalUn_DeepDive: every step of every recorded training loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from replay import Case, cases, run_case, runs, save_mask
from torch import Tensor, nn

from expunge.context import Context
from expunge.errors import ConfigError
from expunge.method import build_recipe
from expunge.recipe import Recipe
from expunge.request import ForgetRequest
from expunge.saliency import Mask, count_ones, make_mask, saliency_scores, top_k
from expunge.spaces.layers import AllWeights
from expunge.spaces.proximal import Proximal, soft_threshold
from expunge.spaces.saliency import MaskedSpace, SaliencyMask
from expunge.tasks.base import Batch
from expunge.tasks.classifier import ClassifierTask

DEEPDIVE = ("deepdive_rl", "deepdive_rl_split", "deepdive_ga", "deepdive_ga_small")


def space(case: Case, folder: Path, **settings: object) -> AllWeights | SaliencyMask:
    file = save_mask(case, folder)
    return AllWeights() if file is None else SaliencyMask(file=file, **settings)


def method(name: str, **settings: object) -> Recipe:
    return build_recipe({"method": name, **settings})


@pytest.mark.parametrize(("path", "dt"), runs("random_label"))
def test_random_label(path: Path, dt: str, tmp_path: Path) -> None:
    case = Case(path, dt)
    run_case(case, method("random_label", profile="as_published").replace(space=space(case, tmp_path)))
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("random_label"))
def test_salun_with_a_mask_file_is_the_same(path: Path, dt: str, tmp_path: Path) -> None:
    case = Case(path, dt)
    file = save_mask(case, tmp_path)
    recipe = method("salun", profile="as_published", mask_file=file) if file else method("salun", keep=1.0)
    run_case(case, recipe)
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("random_label_joint"))
def test_random_label_joint(path: Path, dt: str, tmp_path: Path) -> None:
    case = Case(path, dt)
    recipe = method("random_label", mixing="paired", alpha=case.hyper["alpha"])
    run_case(case, recipe.replace(space=space(case, tmp_path)))
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("gradient_ascent"))
def test_gradient_ascent(path: Path, dt: str, tmp_path: Path) -> None:
    case = Case(path, dt)
    run_case(case, method("gradient_ascent").replace(space=space(case, tmp_path)))
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("finetune"))
def test_fine_tune(path: Path, dt: str, tmp_path: Path) -> None:
    case = Case(path, dt)
    run_case(case, method("fine_tune").replace(space=space(case, tmp_path)))
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("l1_sparse"))
def test_l1_sparse(path: Path, dt: str, tmp_path: Path) -> None:
    case = Case(path, dt)
    first = case.replay["steps"][0]["l1_weight"]
    quiet = len({e["epoch"] for e in case.replay["steps"] if e["l1_weight"] == 0})
    recipe = method("l1_sparse", weight=first, no_l1_epochs=quiet)
    run_case(case, recipe.replace(space=space(case, tmp_path)))
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("train_under_mask"))
def test_train_under_mask(path: Path, dt: str, tmp_path: Path) -> None:
    case = Case(path, dt)
    freeze = "gradient" if case.published else "weights"
    run_case(case, method("fine_tune").replace(space=space(case, tmp_path, freeze=freeze)), frozen=not case.published)
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs("salun_soft"))
def test_salun_soft(path: Path, dt: str) -> None:
    case = Case(path, dt)
    recipe = method("salun", soft=True, keep=case.hyper["rho"], profile=case.meta["variant"])
    length = case.hyper["k_rule"].split("= batches of forget + batches of retain = ")[1].split(",")[0]
    assert isinstance(recipe.space, Proximal)
    recipe = recipe.replace(space=recipe.space.model_copy(update={"steps_per_epoch": int(length)}))
    run_case(case, recipe)
    case.finish()


@pytest.mark.parametrize(("path", "dt"), runs(*DEEPDIVE))
def test_deepdive(path: Path, dt: str, tmp_path: Path) -> None:
    """With the recorded mask; the published variant adds the gradient that the mask pass left behind."""
    case = Case(path, dt)
    profile = "as_published" if case.published else "as_intended"
    threshold = case.hyper["mask_threshold"]
    masked = {"use_mask": True, "mask_thr": threshold} if threshold else {"use_mask": False}
    recipe = method(case.meta["method"], profile=profile, batch_size=case.hyper["batch_size"], **masked)
    if threshold:
        recipe = recipe.replace(space=recipe.space.model_copy(update={"file": save_mask(case, tmp_path)}))
    run_case(case, recipe)
    case.finish("residual_grad")


@pytest.mark.parametrize(("path", "dt"), [r for r in runs(*DEEPDIVE) if Case(r.values[0]).replay.get("mask_batches")])
def test_deepdive_mask_and_residual(path: Path, dt: str) -> None:
    """The mask itself, computed by us, and the left-over gradient."""
    case = Case(path, dt)
    splits, forget = case.data()
    task = ClassifierTask(case.model(), splits)
    ctx = Context(task, task.split(ForgetRequest.samples(forget)))
    recipe = method(
        case.meta["method"],
        profile="as_published",
        mask_thr=case.hyper["mask_threshold"],
        batch_size=case.hyper["batch_size"],
    )
    opened = recipe.space.open(ctx)
    for name, want in case.mask().items():
        assert torch.equal(opened.mask(name), want), name
    for name, parameter in opened.parameters.items():
        parameter.grad = torch.zeros_like(parameter)
        case.close("residual_grad", opened._residual[name], f"expected.{dt}.residual_grad.{name}")


# -- masks ---------------------------------------------------------------------------------------------------------


def _batches(case: Case, task: ClassifierTask, order: list[list[int]]) -> list[Batch]:
    split = task.split(ForgetRequest.samples(case.data()[1]))
    return [task.load("forget", torch.tensor(ids), split) for ids in order]


@pytest.mark.parametrize(("path", "dt"), runs("saliency_mask"))
def test_saliency_mask(path: Path, dt: str) -> None:
    case = Case(path, dt)
    splits, forget = case.data()
    task = ClassifierTask(case.model().train(), splits)
    order = case.replay.get("batches") or [forget[i : i + 7] for i in range(0, len(forget), 7)]
    reduction = "batch_mean_sum" if case.published else "sample_mean"
    scores, _ = saliency_scores(task, _batches(case, task, order), dict(task.model.named_parameters()), reduction)
    for name, value in scores.items():
        case.close("S", value, f"expected.{dt}.S.{name}")
    gaps = case.tensors[f"expected.{dt}.rel_gap"]
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    for number, ratio in enumerate(case.hyper["ratios"]):
        rule = "as_published" if case.published else "as_intended"
        mask = make_mask(scores, ratio, rule=rule)
        assert mask.ones == int(case.tensors[f"expected.{dt}.k"][number])
        want = case.mask(f"expected.{dt}.mask_{ratio}.")
        case.checked |= {f"expected.{dt}.mask_{ratio}.{n}" for n in want}
        tied = case.published and float(gaps[number]) == 0.0
        for name, bits in mask.bits.items():
            agree = bits == want[name]
            if tied:  # the published choice among equal scores is arbitrary
                gamma = float(case.tensors[f"expected.{dt}.gamma"][number])
                agree |= torch.isclose(scores[name], torch.full_like(scores[name], gamma), rtol=1e-5, atol=1e-12)
            assert bool(agree.all()), f"{name} at {ratio}"
        limits = case.meta["tolerance"][dt]["gamma"]
        assert mask.gamma == pytest.approx(
            float(case.tensors[f"expected.{dt}.gamma"][number]), rel=limits["rtol"], abs=limits["atol"]
        )
    case.checked |= {f"expected.{dt}.{n}" for n in ("k", "gamma", "rel_gap")}
    assert len(flat) == case.meta["model"]["num_parameters"]
    case.finish()


@pytest.mark.parametrize("path", cases("saliency_topk"))
def test_selection(path: Path) -> None:
    case = Case(path)
    rule = "as_published" if case.published else "as_intended"
    for vector in case.meta["vectors"]:
        name = vector["name"]
        scores = case.tensors[f"input.{name}"].sum(0).abs()
        assert torch.equal(scores, case.tensors[f"expected.{name}.S"])
        for row, ratio in enumerate(case.hyper["ratios"]):
            k = count_ones(len(scores), ratio, rule)
            assert k == int(case.tensors[f"expected.{name}.k"][row])
            want = case.tensors[f"expected.{name}.masks"][row].bool()
            if k == 0:  # an empty mask is refused: nothing could change
                assert not want.any()
                with pytest.raises(ConfigError, match="got 0"):
                    top_k(scores, k)
                continue
            got, gamma = top_k(scores, k)
            assert int(got.sum()) == k
            if case.published and not vector["lowest_index_wins"]:
                untied = scores != gamma
                assert torch.equal(got[untied], want[untied])
            else:
                assert torch.equal(got, want)


# -- single steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("hard_freeze"))
def test_freeze_of_unusual_values(path: Path) -> None:
    case = Case(path)
    t = case.tensors
    theta = nn.Parameter(t["input.theta0"].clone())
    mask = Mask({"theta": t["input.mask"].bool()}, keep=0.5)
    frozen = MaskedSpace({"theta": theta}, mask, "arithmetic" if case.published else "weights")
    with torch.no_grad():
        theta.copy_(t["input.theta_after_sgd"])
    optimizer = torch.optim.SGD([theta], lr=0.1, momentum=0.9)
    optimizer.state[theta]["momentum_buffer"] = t["input.momentum"].clone()
    frozen.after_step(optimizer)
    torch.testing.assert_close(theta.detach(), t["expected.theta"], rtol=0, atol=0, equal_nan=True)
    numbers = ~torch.isnan(t["expected.theta"])
    assert torch.equal(theta.detach().signbit()[numbers], t["expected.theta_sign_bit"].bool()[numbers])
    torch.testing.assert_close(optimizer.state[theta]["momentum_buffer"], t["expected.momentum"], rtol=0, atol=0)


@pytest.mark.parametrize("path", cases("proximal_step"))
def test_proximal_step(path: Path) -> None:
    case = Case(path)
    for vector in case.meta["vectors"]:
        name = vector["name"]
        delta, anchor = case.tensors[f"input.{name}.delta"], case.tensors[f"input.{name}.anchor"]
        shrunk = soft_threshold(delta, vector["k"])
        case.close(name, anchor + shrunk, f"expected.{name}.theta")
        assert int((shrunk == 0).sum()) >= vector["k"]


# -- the comparison can fail ---------------------------------------------------------------------------------------


def altered(case: Case) -> list[tuple[str, Recipe]]:
    recipe = method("random_label", profile="as_published")
    return [
        ("expected.*step1", recipe.replace(optim={"nesterov": True})),
        ("off by", recipe.replace(protections=({"kind": "l1", "weight": 1e-3},))),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_a_different_loop_is_noticed(number: int) -> None:
    path = next(c for c in runs("random_label") if "mask" not in c.id and c.id.endswith("f64")).values[0]
    case = Case(path)
    message, recipe = altered(case)[number]
    with pytest.raises(AssertionError, match=message):
        run_case(case, recipe)


def test_a_wrong_label_is_noticed() -> None:
    path = next(c for c in runs("random_label") if "mask" not in c.id and c.id.endswith("f64")).values[0]
    case = Case(path)
    forget = len(case.tensors["input.x_forget"])
    step, at = next(
        (s, i)
        for s in case.replay["steps"]
        for i, index in enumerate(s["indices"])
        if s["source"] == "forget" or (s["source"] == "mixed" and index < forget)
    )
    step["labels"][at] = (step["labels"][at] + 1) % case.hyper["num_classes"]
    with pytest.raises(AssertionError, match="off by"):
        run_case(case, method("random_label", profile="as_published"))


def test_a_moved_masked_weight_is_noticed() -> None:
    path = next(c for c in runs("random_label") if "mask" in c.id and c.id.endswith("f64")).values[0]
    case = Case(path)
    model = case.model()
    case.check_frozen(model)
    name, mask = next((n, m) for n, m in case.mask().items() if not bool(m.all()))
    moved: Tensor = model.get_parameter(name).detach()
    moved[~mask] = moved[~mask].nextafter(torch.tensor(9.0, dtype=moved.dtype))
    with pytest.raises(AssertionError, match="a masked weight moved"):
        case.check_frozen(model)

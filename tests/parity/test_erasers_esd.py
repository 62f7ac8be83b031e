"""Golden numbers of ESD: targets, losses, gradients, samples, three steps of Adam."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eraser_files import Case, agree, cases, eps_of, gradients, scheduler, within

from expunge.diffusion import esd
from expunge.diffusion.parameter_sets import select


def _states(case: Case) -> esd.States:
    source = case.input("emb_from") if "input.emb_from" in case.tensors else None
    return esd.States(case.input("emb_concept"), case.input("emb_null"), source)


def _check_target(
    case: Case, states: esd.States, x: torch.Tensor, t: int, eta: float, how: esd.Convention, at: str
) -> None:
    """Target and prediction on their own."""
    eps, time = eps_of(case.unet()), torch.tensor([t])
    with torch.no_grad():
        parts = [eps(x, time, s) for s in (states.concept, states.null)]
        other = None if states.erase_from is None else eps(x, time, states.erase_from)
        goal = esd.target(parts[0], parts[1], eta, eps_from=other, convention=how)
        if f"expected.{at}target" in case.tensors:
            case.close(goal, f"{at}target", 5e-5)
            case.close(eps(x, time, states.trained), f"{at}prediction", 5e-5)
    if f"expected.{at}eps_null" in case.tensors:
        case.close(parts[0], f"{at}eps_concept", 5e-5)
        case.close(parts[1], f"{at}eps_null", 5e-5)


@pytest.mark.parametrize("path", cases("esd-current", "esd-from", "esd-paper"))
def test_one_step(path: Path) -> None:
    case = Case(path)
    how: esd.Convention = "paper" if "paper" in case.meta["variant"] else "current"
    states, h = _states(case), case.hyper
    unet = case.unet()
    eps = eps_of(unet)
    if "run_till_index" in h:
        x, t = esd.denoise(
            eps,
            scheduler(h["scheduler"]),
            case.input("x_T"),
            states.trained,
            states.null,
            guidance=h["guidance"],
            total=h["num_inference_steps"],
            steps=h["run_till_index"],
        )
        within(x, case.input("x_t"), 5e-5, "x_t")
        assert int(t) == h["timestep"]
    x, t = case.input("x_t"), torch.tensor([h["timestep"]])
    _check_target(case, states, x, h["timestep"], h["eta"], how, "")
    loss = esd.losses(eps, eps, x, t, states, eta=h["eta"], convention=how)
    assert loss.shape == (1,)
    assert float(loss.detach()) == pytest.approx(case.expected["loss"], rel=1e-5)
    with torch.no_grad():
        parts = eps(x, t, states.concept), eps(x, t, states.null)
    if states.erase_from is None:
        first = esd.first_losses(*parts, h["eta"], how)
        assert float(first) == pytest.approx(case.expected["loss"], rel=1e-5)
    sets = case.expected.get("parameter_sets")
    if sets:
        for name, names in sets.items():
            assert select(unet, name) == names
    names = select(unet, "esd-all" if sets else "esd-x")
    want = case.group("grad")
    assert set(want) == set(names)
    agree(gradients(unet, loss.sum(), names), want)
    case.finish()


@pytest.mark.parametrize("path", cases("esd-current", "esd-from", "esd-paper"))
def test_another_convention_differs(path: Path) -> None:
    """The comparison notices the first term: with the other form the loss is another one."""
    case = Case(path)
    other: esd.Convention = "current" if "paper" in case.meta["variant"] else "alternative"
    states, h, eps = _states(case), case.hyper, eps_of(case.unet())
    states = esd.States(states.concept, states.null)
    loss = esd.losses(
        eps, eps, case.input("x_t"), torch.tensor([h["timestep"]]), states, eta=h["eta"], convention=other
    )
    assert float(loss.detach()) != pytest.approx(case.expected["loss"], rel=1e-2)


@pytest.mark.parametrize("path", cases("esd-alt"))
def test_alternative_script(path: Path) -> None:
    case = Case(path)
    h, unet = case.hyper, case.unet()
    eps, sampler = eps_of(unet), scheduler(h["scheduler"])
    for name, run in h["runs"].items():
        source = None if name == "same" else case.input("emb_from")
        states = esd.States(case.input("emb_concept"), case.input("emb_null"), source)
        steps, golden = run["denoise_iterations"], case.input(f"{name}.x_t")
        x, _ = esd.denoise(
            eps,
            sampler,
            case.input(f"{name}.x_T"),
            states.concept,  # this script samples with the concept even where it erases from another prompt
            states.null,
            guidance=h["start_guidance"],
            total=50,
            steps=steps,
        )
        within(x, golden, 5e-5, "x_t")
        t = esd.alternative_time(sampler, steps)
        assert (int(steps / 50 * 1000), t) == (run["grid_index"], run["timestep"])
        _check_target(case, states, golden, t, h["eta"], "alternative", f"{name}.")
        loss = esd.losses(eps, eps, golden, torch.tensor([t]), states, eta=h["eta"], convention="alternative")
        assert float(loss.detach()) == pytest.approx(case.expected[name]["loss"], rel=1e-5)
        names = select(unet, "xattn")
        want = case.group(f"{name}.grad")
        assert set(want) == set(names)
        agree(gradients(unet, loss.sum(), names), want)
    case.finish()


@pytest.mark.parametrize("path", cases("esd-strict-adam3"))
def test_three_steps(path: Path) -> None:
    case = Case(path)
    h, states = case.hyper, _states(case)
    unet, frozen = case.unet(), case.unet()
    student, teacher = eps_of(unet), eps_of(frozen)
    names = select(unet, "esd-x-strict")
    assert names == h["trained"] == case.expected["saved_keys"]
    assert esd.artefact_name("c", "esd-x-strict") == case.expected["saved_file_name"]
    trained = {n: unet.get_parameter(n) for n in names}
    start = {n: p.detach().clone() for n, p in unet.named_parameters()}
    optimizer = torch.optim.Adam(trained.values(), lr=h["lr"], betas=tuple(h["betas"]), eps=h["eps"])
    for s, (t, index) in enumerate(zip(h["timesteps"], h["run_till_index"])):
        x, at = esd.denoise(
            teacher,
            scheduler(h["scheduler"]),
            case.input("x_T")[s : s + 1],
            states.concept,
            states.null,
            guidance=h["guidance"],
            total=h["num_inference_steps"],
            steps=index,
        )
        golden = case.input("x_t")[s : s + 1]
        within(x, golden, 5e-5, "x_t")
        assert int(at) == t
        loss = esd.losses(student, teacher, golden, torch.tensor([t]), states, eta=h["eta"])
        assert float(loss.detach()) == pytest.approx(case.expected["losses"][s], rel=1e-5)
        found = gradients(unet, loss.sum(), names)
        agree(found, case.group(f"step{s + 1}.grad"), 1e-4 if s == 0 else 2e-4)
        for name, parameter in trained.items():
            parameter.grad = found[name]
        optimizer.step()
        want = case.group(f"step{s + 1}.param")
        for name, parameter in trained.items():
            moved, golden_move = parameter.detach() - start[name], want[name] - start[name]
            assert float((moved - golden_move).abs().max()) <= 1e-2 * float(golden_move.abs().max()), (s, name)
    rest = [n for n in start if n not in trained]
    assert all(torch.equal(unet.get_parameter(n), start[n]) for n in rest)
    case.finish()

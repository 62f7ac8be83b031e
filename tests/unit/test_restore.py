"""What a run leaves alone exists once in memory; what it touches comes back bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from expunge import guards
from expunge.digest import model_digest, tensor_digest
from expunge.errors import InvariantError
from expunge.method import build_recipe
from expunge.models.pipelines import load_pipeline
from expunge.request import ForgetRequest
from expunge.restore import as_found, same_bits, snapshot
from expunge.run import unlearn
from expunge.tasks.tiny_text_to_image import tiny_text_to_image


def shares(tensor: torch.Tensor) -> bool:
    """Whether a tensor still lies where its snapshots lie."""
    return bool(torch._C._is_cow_tensor(tensor))


@pytest.mark.parametrize("mapped", [False, True], ids=["own memory", "memory of numpy"])
def test_a_snapshot_keeps_its_values(mapped: bool) -> None:
    tensor = torch.from_numpy(np.arange(6.0)) if mapped else torch.arange(6.0)
    first, second = snapshot(tensor), snapshot(tensor)
    assert shares(tensor) is not mapped
    tensor[2:].add_(1)
    second.zero_()
    assert first.tolist() == [0, 1, 2, 3, 4, 5]
    assert tensor.tolist() == [0, 1, 3, 4, 5, 6]


def test_same_bits_looks_at_bits() -> None:
    zero, nan = torch.tensor([0.0]), torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero)
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        a = torch.ones(3).to(dtype)
        assert same_bits(a, a.clone())
        assert not same_bits(a, torch.zeros_like(a))


def test_digests_and_passes_are_no_writes() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 3))
    digest = model_digest(model)
    with as_found(model):
        assert model_digest(model) == digest
        model.requires_grad_(False)[3].requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 2, 3, 3)).sum().backward()
        assert all(map(shares, model.parameters()))
        with torch.no_grad():
            model[3].weight.add_(1)
        assert [n for n, p in model.named_parameters() if not shares(p)] == ["3.weight"]
        assert model_digest(model) != digest
    assert model_digest(model) == digest


def test_digests_of_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 5)
    whole = tensor_digest(x), tensor_digest(x.T)
    monkeypatch.setattr("expunge.digest._PIECE", 4)
    assert (tensor_digest(x), tensor_digest(x.T)) == whole
    assert whole[0] != whole[1]
    assert tensor_digest(torch.empty(0)) != tensor_digest(torch.empty(0, 2))


@pytest.mark.parametrize("name", ["esd", "cie", "ablating_concepts", "srs_me"])
def test_a_run_copies_what_it_trains_and_nothing_else(name: str) -> None:
    """The teacher, the space's base and what the model is put back from share one copy."""
    task: Any = tiny_text_to_image()
    settings: dict[str, Any] = {
        "esd": {"inference_steps": 3},
        "cie": {"threshold": None},
        "ablating_concepts": {"profile": "style", "batch_size": 1, "teacher": "frozen"},
        "srs_me": {"threshold": None, "protect_others": False},
    }[name]
    before, own = model_digest(task.model), set()

    def look(number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if number == 2:
            own.update(n for n, p in model.named_parameters() if not shares(p))

    recipe = build_recipe({"method": name, **settings}).replace(optim={"max_steps": 2})
    patch = unlearn(task, ForgetRequest.label("circle"), recipe, on_step=look)
    assert own == (set() if name == "srs_me" else set(patch))
    assert len(own) < len(list(task.model.parameters())) / 4
    assert model_digest(task.model) == before


def test_a_model_that_is_not_put_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = tiny_text_to_image()
    monkeypatch.setattr("expunge.restore.snapshot", lambda tensor: tensor.detach())  # a copy that is none
    recipe = build_recipe("fine_tune").replace(optim={"max_steps": 1})
    with pytest.raises(InvariantError, match=r"'.+' was not put back as it was"):
        unlearn(task, ForgetRequest.label("circle"), recipe)


def test_loaded_pipelines_lie_in_memory_of_their_own(tmp_path: Any) -> None:
    """Files are mapped when they are read as they are stored; a snapshot of such a tensor is a whole copy."""
    task: Any = tiny_text_to_image()
    task.parts.pipeline().save_pretrained(tmp_path)
    found = load_pipeline(str(tmp_path))
    for model in (found.unet, found.text_encoder):
        for p in model.parameters():
            snapshot(p)
            assert shares(p)


def test_the_last_check_takes_no_more_samples_than_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = tiny_text_to_image()
    seen: list[int] = []
    real = guards.check_outputs
    monkeypatch.setattr(guards, "check_outputs", lambda ctx, roles, n: (seen.append(n), real(ctx, roles, n))[1])
    recipe = build_recipe({"method": "fine_tune", "batch_size": 3}).replace(optim={"max_steps": 1})
    unlearn(task, ForgetRequest.label("circle"), recipe)
    assert seen == [3]

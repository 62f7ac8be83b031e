"""Pipelines in half precision: float32 where something is trained, the same patches as with float32 throughout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expunge import run
from expunge.diffusion.concepts import erase_concepts
from expunge.digest import model_digest
from expunge.method import build_recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.text_to_image import TextToImageTask
from expunge.tasks.tiny_text_to_image import tiny_parts, tiny_text_to_image

REQUEST = ForgetRequest.label("circle")
#: Methods with what they train of the model itself; None: all of the U-Net.
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...] | None]] = {
    "srs_me": ({"threshold": None, "protect_others": False}, ()),
    "cie": ({"threshold": None}, ("attn2",)),
    "esd": ({"inference_steps": 3}, ("attn2",)),
    "uce": ({}, ("attn2.to_k", "attn2.to_v")),
    "ablating_concepts": ({"profile": "style", "batch_size": 1}, ("attn2.to_k", "attn2.to_v")),
    "forget_me_not": ({"parameters": "x"}, ("attn2",)),
    "t2i_salun": ({"batch_size": 2, "parameters": "kv"}, None),
}


@pytest.fixture(scope="module")
def images() -> Any:
    return tiny_text_to_image(n_train=16, n_test=16).data


def half(images: Any, kind: Any = "sd") -> TextToImageTask:
    """As a pipeline is loaded in bfloat16."""
    parts = tiny_parts(kind=kind)
    for part in (parts.unet, parts.text_encoder, parts.text_encoder_2):
        if part is not None:
            part.bfloat16()
    return TextToImageTask(parts, images, steps=2)


def recipe(name: str, **changes: Any) -> Any:
    made = build_recipe({"method": name, **METHODS[name][0]})
    return made.replace(optim={"precision": "bf16", "max_steps": 3, "lr": 1e-3, **changes})


def wide(model: torch.nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.dtype == torch.float32}


def changes(patch: Any) -> dict[str, torch.Tensor]:
    return {n: c.dense() for n, c in patch.changes.items()}


def all_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextToImageTask, "masters", lambda self, wanted: None)


@pytest.mark.parametrize(("name", "kind"), [*((n, "sd") for n in METHODS), ("srs_me", "xl"), ("esd", "xl")])
def test_only_what_is_trained_is_float32_and_the_patch_is_the_same(
    images: Any, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, seen = half(images, kind), []
    before, made = model_digest(task.model), run.make_masters

    def noting(*args: Any) -> bool:
        mixed = made(*args)
        seen.append((wide(task.model), mixed))
        return mixed

    monkeypatch.setattr(run, "make_masters", noting)
    patch = unlearn(task, REQUEST, recipe(name), on_step=lambda n, m, o: seen.append((wide(m), True)))
    assert model_digest(task.model) == before
    assert len(seen) == (1 if name == "uce" else 4)
    vectors = {n for n, p in task.unet.named_parameters(prefix="unet") if p.ndim < 2}
    for found, mixed in seen:
        assert mixed
        trained = METHODS[name][1]
        expected = {n for n, _ in task.unet.named_parameters(prefix="unet")}
        if trained is not None:
            expected = {n for n in expected if any(t in n for t in trained)} | vectors
        assert found == expected
    all_masters(monkeypatch)
    seen.clear()
    whole = unlearn(task, REQUEST, recipe(name))
    assert seen == [({n for n, _ in task.model.named_parameters()}, False)]
    assert changes(patch).keys() == changes(whole).keys()
    assert patch.digest == whole.digest


@pytest.mark.parametrize(
    "targets", [("text_encoder.*.layers.1.*",), ("text_encoder.*.token_embedding", "unet.*.attn2.*")]
)
def test_a_text_encoder_is_float_32_as_a_whole_once_something_of_it_is_trained(
    images: Any, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, seen = half(images), []
    own = build_recipe({"method": "random_label", "batch_size": 2}).replace(
        optim={"precision": "bf16", "max_steps": 2, "lr": 1e-2}, space={"kind": "layers", "targets": targets}
    )
    patch = unlearn(task, REQUEST, own, on_step=lambda n, m, o: seen.append(wide(m)))
    text = {n for n, _ in task.parts.text_encoder.named_parameters(prefix="text_encoder")}
    assert text <= seen[0] < {n for n, _ in task.model.named_parameters()}
    all_masters(monkeypatch)
    assert unlearn(task, REQUEST, own).digest == patch.digest


def test_without_its_vectors_the_u_net_would_give_another_patch(images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the equality above rests on: norms in half precision keep rounded statistics for the backward pass."""
    task = half(images)
    one = unlearn(task, REQUEST, recipe("cie"))
    monkeypatch.setattr(TextToImageTask, "masters", lambda self, wanted: list(wanted))
    other = unlearn(task, REQUEST, recipe("cie"))
    assert one.digest != other.digest
    assert changes(one).keys() == changes(other).keys()


def test_anchors_are_drawn_under_autocast(images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task, settings = half(images), {"profile": "style", "anchors": "generated", "anchor_images": 2, "batch_size": 1}
    own = build_recipe({"method": "ablating_concepts", **settings}).replace(
        optim={"precision": "bf16", "max_steps": 2, "lr": 1e-3}
    )
    called, eps = [], TextToImageTask.eps

    def noting(self: Any, *args: Any) -> torch.Tensor:
        called.append(torch.is_autocast_enabled("cpu"))
        return eps(self, *args)

    monkeypatch.setattr(TextToImageTask, "eps", noting)
    patch = unlearn(task, REQUEST, own)
    assert called
    assert all(called)
    all_masters(monkeypatch)
    whole = unlearn(task, REQUEST, own)
    one, other = changes(patch), changes(whole)
    assert one.keys() == other.keys()  # the anchors themselves are rounded otherwise
    assert not all(called)


FULL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32": ({"method": "cie", "threshold": None}, {"precision": "fp32"}),
    "protection": ({"method": "barrier", "targets": ["attn2.to_k"]}, {}),
    "drift": ({"method": "forget_me_not", "parameters": "x", "max_drift": 1.0}, {}),
    "edit": ({"method": "ssd", "profile": "as_published", "alpha": 1.1, "batch_size": 3}, {}),
}


@pytest.mark.parametrize("why", FULL)
def test_what_needs_float32_has_it(images: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, optim = FULL[why]
    task, seen, made = half(images), [], run.make_masters

    def noting(*args: Any) -> bool:
        mixed = made(*args)
        seen.append((wide(task.model), mixed))
        return mixed

    monkeypatch.setattr(run, "make_masters", noting)
    unlearn(
        task,
        REQUEST,
        build_recipe(settings).replace(optim={"precision": "bf16", "max_steps": 1, "lr": 1e-3, **optim}),
        allow_no_effect=True,
    )
    assert seen == [({n for n, _ in task.model.named_parameters()}, False)]


def test_a_pipeline_in_float32_stays_so(images: Any) -> None:
    task, seen = tiny_text_to_image(n_train=16, n_test=16), []
    unlearn(task, REQUEST, recipe("esd"), on_step=lambda n, m, o: seen.append(len(wide(m))))
    assert seen == [len(list(task.model.parameters()))] * 3


@pytest.mark.parametrize("name", ["srs_me", "esd", "t2i_salun"])
def test_a_killed_run_resumes_to_the_same_bits(images: Any, name: str, tmp_path: Any) -> None:
    own = recipe(name, max_steps=4)
    whole = unlearn(half(images), REQUEST, own)

    def stop(number: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if number == 3:
            raise KeyboardInterrupt

    task = half(images)
    before = model_digest(task.model)
    with pytest.raises(KeyboardInterrupt):
        unlearn(task, REQUEST, own, run_dir=tmp_path, checkpoint_every=2, on_step=stop)
    assert model_digest(task.model) == before
    taken: list[int] = []
    again = half(images)
    patch = unlearn(again, REQUEST, own, run_dir=tmp_path, checkpoint_every=2, on_step=lambda n, m, o: taken.append(n))
    assert taken == [3, 4]
    assert patch.digest == whole.digest


@pytest.mark.parametrize("together", [False, True])
def test_concepts_of_a_pipeline_in_half_precision(images: Any, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = half(images)
    own = build_recipe(
        {"method": "srs_me", "threshold": None, "protect_others": False, "beta": 0.05, "batch_size": 2}
    ).replace(optim={"precision": "bf16", "max_steps": 2})
    found = [erase_concepts(task, ["heart", "moon"], own, wordings="first", at_once=together)]
    all_masters(monkeypatch)
    found.append(erase_concepts(task, ["heart", "moon"], own, wordings="first", at_once=together))
    assert {n: p.digest for n, p in found[0].items()} == {n: p.digest for n, p in found[1].items()}
    facts = [{n: p.manifest.findings["concept_shift"] for n, p in f.items()} for f in found]
    assert facts[0] == facts[1]

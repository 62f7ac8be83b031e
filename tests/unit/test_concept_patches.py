"""Several concepts: separate patches, any subset at work, exact recovery, and what concepts do to one another."""

import itertools
import json

import pytest
import torch

from expunge.diffusion.concepts import EFFECTS, TOGETHER, activate, effects_between, erase_concepts, protect_later
from expunge.diffusion.shift import invariance
from expunge.digest import model_digest, named_tensors
from expunge.errors import ArtifactError, ConfigError, RequestError
from expunge.method import build_recipe
from expunge.patch import Dense, Patch, apply, revert
from expunge.patch.apply import applied, stack
from expunge.request import ForgetRequest
from expunge.spaces.concept_shift import FINDINGS, states_of
from expunge.tasks.text_to_image import TextToImageTask
from expunge.tasks.tiny_text_to_image import tiny_parts, tiny_text_to_image

WATERMARK = "a cross in neon style"
FIRST = {n: f"a {n} in flat style" for n in ("heart", "moon", "star")}


def recipe(steps=6, **settings):
    base = {"protect_others": False, "beta": 0.05, "batch_size": 2, "threshold": None, "directions": "concept"}
    return build_recipe({"method": "srs_me", **base, **settings, "optim": {"max_steps": steps}})


@pytest.fixture(scope="module")
def task():
    return tiny_text_to_image(n_train=16, n_test=16)


@pytest.fixture(scope="module")
def half(task):
    """The same in float16, as a pipeline is loaded to draw images."""
    parts = tiny_parts()
    parts.unet.half(), parts.text_encoder.half()
    return TextToImageTask(parts, task.data, steps=2)


@pytest.fixture(scope="module")
def pair(task):
    before = model_digest(task.model)
    found = erase_concepts(task, ["heart", "moon"], recipe(watermarks=(WATERMARK,)), wordings="first")
    assert model_digest(task.model) == before
    return found


@pytest.fixture(scope="module")
def half_pair(half):
    return erase_concepts(half, ["heart", "moon"], recipe(), wordings="first")


def weights(model):
    return {n: t.detach().clone() for n, t in named_tensors(model)[0].items()}


def same(one, two):
    return all(torch.equal(one[n], two[n]) for n in one | two)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_order_does_not_matter_and_recovery_is_exact(request, precision):
    kinds = {"float32": ("task", "pair"), "float16": ("half", "half_pair")}
    task, patches = (request.getfixturevalue(n) for n in kinds[precision])
    model, a, b = task.model, patches["heart"], patches["moon"]
    base = weights(model)
    dtype = base["unet.conv_in.weight"].dtype
    assert dtype == getattr(torch, precision)
    both = []
    for order in itertools.permutations((a, b)):
        for patch in order:
            apply(model, patch)
        both.append(weights(model))
        revert(model)
        assert same(weights(model), base)
    assert same(*both)
    assert same(stack(base, b, a), both[0])
    only = weights(apply(model, b))
    revert(model)
    apply(model, a, b)
    revert(model, a)
    assert same(weights(model), only)
    assert not same(only, both[0])
    activate(model, patches, ["heart"])
    assert [p.digest for p in applied(model)] == [a.digest]
    assert same(weights(activate(model, patches, ["moon", "heart"])), both[0])
    assert same(weights(activate(model, patches, ["moon"])), only)
    assert same(weights(activate(model, patches, [])), base)
    name = next(iter(a))
    delta = a[name].dense().to(dtype)
    assert not torch.equal((base[name] + delta) - delta, base[name]), "adding and subtracting is not exact"


def test_each_protects_the_other_and_the_watermark(task, pair):
    base = {n: t for n, t in weights(task.model).items() if n in pair["heart"]}
    everything = stack(weights(task.model), *pair.values())
    common = ["", WATERMARK]
    states = dict(
        zip([*common, FIRST["heart"], FIRST["star"]], states_of(task, [*common, FIRST["heart"], FIRST["star"]]))
    )
    found = invariance(base, everything, states)
    assert max(found[p].relative for p in common) <= 1e-6
    assert min(found[FIRST[n]].relative for n in ("heart", "star")) > 1e-3, "not protected"
    for name, other in (("heart", "moon"), ("moon", "heart")):
        facts = pair[name].manifest.findings
        assert facts[FINDINGS]["protected"] == ["", FIRST[other], WATERMARK]
        after = stack(weights(task.model), pair[name])
        moved = invariance(
            base, after, {"other": states_of(task, [FIRST[other]])[0], "own": states_of(task, [FIRST[name]])[0]}
        )
        assert moved["other"].relative <= 1e-6 < 1e-3 < moved["own"].relative
        effect = next(e for e in facts[EFFECTS] if e["erased"] == name)
        assert not effect["later"]
        assert "it is not protected" in effect["text"], "only the first wording is"
        together = facts[TOGETHER]
        assert together["concepts"] == ["heart", "moon"]
        assert together["dtype"] == "float32"
        assert together["moves_protected"]["relative"] == max(found[p].relative for p in common)


def test_patches_of_a_half_precision_pipeline(half, half_pair):
    """The shift itself is exact for the states of the pipeline; rounding the weights is what remains."""
    facts = half_pair["heart"].manifest.findings
    assert facts[FINDINGS]["moves_protected"]["relative"] <= 1e-6
    assert facts[TOGETHER]["dtype"] == "float16"
    assert 1e-6 < facts[TOGETHER]["moves_protected"]["relative"] <= 2e-3
    base = {n: t.float() for n, t in weights(half.model).items() if n in half_pair["heart"]}
    delta = {n: base[n].double() + c.dense().double() for n, c in half_pair["heart"].changes.items()}
    states = states_of(half, [FIRST["moon"]])
    assert states.dtype == torch.float16
    full = invariance(
        base, delta, {"half": states[0], "other precision": states[0].float() * (1 + 1e-3 * torch.randn(16, 64))}
    )
    assert full["half"].relative <= 1e-6 < full["other precision"].relative


def test_a_patch_is_factors_of_what_the_concept_sees(task, pair):
    facts = pair["heart"].manifest.findings[FINDINGS]
    assert facts["used"] <= facts["directions"]
    for change in pair["heart"].changes.values():
        assert change.nbytes <= 4 * facts["used"] * sum(change.shape)


def test_what_came_later_is_reported_and_can_be_protected(task, pair, tmp_path):
    earlier = {"heart": pair["heart"]}
    new = erase_concepts(task, ["star"], recipe(), earlier=earlier, wordings="first", run_dir=tmp_path)
    assert list(new) == ["star"]
    facts = new["star"].manifest.findings
    assert facts[FINDINGS]["protected"] == ["", FIRST["heart"]]
    found = {(e["erased"], e["on"]): e for e in facts[EFFECTS]}
    assert set(found) == {("heart", "star"), ("star", "heart")}
    assert not found["heart", "star"]["protected"]
    assert found["heart", "star"]["later"]
    assert "'star' came later and is not protected" in found["heart", "star"]["text"]
    assert json.loads(json.dumps(facts)) == facts
    saved = Patch.load(tmp_path / "star" / "patch.safetensors")
    assert saved.digest == new["star"].digest
    assert saved.manifest.findings[EFFECTS] == facts[EFFECTS]

    prompts = task.concept_prompts(task.split(ForgetRequest.concept("star")))[:1]
    mended = protect_later(task, pair["heart"], prompts)
    assert mended.manifest.parents[-1] == pair["heart"].digest
    looked = {"heart": [FIRST["heart"]], "star": prompts, "watermark": [WATERMARK]}
    before, after = (
        {e.on: e for e in effects_between(task, {"heart": p, "star": new["star"]}, looked) if e.erased == "heart"}
        for p in (pair["heart"], mended)
    )
    assert not before["star"].protected
    assert after["star"].protected
    assert after["watermark"].protected
    own = {n: states_of(task, [FIRST["heart"]])[0] for n in ("own",)}
    base = {n: t for n, t in weights(task.model).items() if n in mended}
    assert invariance(base, stack(weights(task.model), mended), own)["own"].relative > 1e-3


def test_a_concept_trains_as_if_alone(task, pair):
    """Separate runs in either order: no run leaves a trace in the next."""
    other = erase_concepts(task, ["moon", "heart"], recipe(watermarks=(WATERMARK,)), wordings="first")
    assert {n: p.digest for n, p in other.items()} == {n: p.digest for n, p in pair.items()}
    assert list(other) == ["moon", "heart"]


def test_what_does_not_fit_is_refused(task, pair):
    with pytest.raises(ConfigError, match="need the space 'concept_shift', not 'cross_attention'"):
        erase_concepts(task, ["heart"], build_recipe("cie"))
    with pytest.raises(RequestError, match="'heart' is named twice"):
        erase_concepts(task, ["heart", "heart"], recipe())
    with pytest.raises(RequestError, match="no concept"):
        erase_concepts(task, [], recipe())
    with pytest.raises(RequestError, match="an earlier patch of 'heart'"):
        erase_concepts(task, ["heart"], recipe(), earlier=pair)
    with pytest.raises(ConfigError, match=r"write \{\} for its name"):
        erase_concepts(task, ["heart"], recipe(prompts=("a heart",)))
    with pytest.raises(RequestError, match="leaves no direction of 64"):
        erase_concepts(task, ["heart", "moon"], recipe())
    with pytest.raises(RequestError, match=r"no patch of 'hart'; did you mean 'heart'"):
        activate(task.model, pair, ["hart"])
    bias = Dense(torch.ones_like(task.unet.conv_in.bias))
    other = Patch({**pair["heart"].changes, "unet.conv_in.bias": bias}, pair["heart"].manifest)
    with pytest.raises(ArtifactError, match=r"'unet\.conv_in\.bias', which is no key or value matrix"):
        protect_later(task, other, [FIRST["star"]])
    with pytest.raises(RequestError, match="no shift can reach it"):
        protect_later(task, pair["heart"], [WATERMARK])
    apply(task.model, pair["heart"])
    try:
        with pytest.raises(ConfigError, match="the model carries patches"):
            erase_concepts(task, ["star"], recipe())
    finally:
        revert(task.model)

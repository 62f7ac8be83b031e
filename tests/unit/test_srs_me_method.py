"""SRS-ME and CiE through `unlearn`, on a tiny random pipeline."""

import copy
import json

import pytest
import torch

from expunge.context import Context
from expunge.diffusion.selection import cross_attention, key_value
from expunge.diffusion.shift import invariance
from expunge.digest import model_digest
from expunge.errors import CapabilityError, ConfigError, NoEffectError, RequestError
from expunge.method import build_recipe
from expunge.patch import LowRank, Patch
from expunge.patch.apply import stack
from expunge.recipe import Optim, Recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.spaces.concept_shift import FINDINGS, ConceptShift, attached_to, states_of, unshifted
from expunge.tasks.tiny import tiny_classifier
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

REQUEST = ForgetRequest.concept("heart")
STAR, MOON, RING = (f"a {name} in flat style" for name in ("star", "moon", "ring"))
#: A learning rate of 0.1 moves a coefficient by as much in the first step; the tiny U-Net needs larger shifts.
SETTINGS = {"protect": (STAR, MOON), "protect_others": False, "beta": 0.05, "batch_size": 2, "threshold": None}


@pytest.fixture(scope="module")
def task():
    return tiny_text_to_image(n_train=16, n_test=16)


def srs_me(steps=4, epochs=20, **settings):
    return build_recipe({"method": "srs_me", **SETTINGS, **settings, "optim": {"max_steps": steps, "epochs": epochs}})


def cie(steps=4, epochs=20, **settings):
    return build_recipe(
        {"method": "cie", "threshold": None, **settings, "optim": {"max_steps": steps, "epochs": epochs, "lr": 1e-3}}
    )


def logged(task, recipe, folder, **options):
    patch = unlearn(task, REQUEST, recipe, run_dir=folder, **options)
    return patch, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def moved(task, patch, prompts):
    """How far keys and values of prompts move when the patch is merged into the weights."""
    base = {n: t.detach() for n, t in task.model.state_dict().items()}
    after = stack(base, patch)
    states = dict(zip(prompts, states_of(task, prompts), strict=True))
    matrices = {n: base[n] for n in patch if n.endswith(("to_k.weight", "to_v.weight"))}
    return {p: m.relative for p, m in invariance(matrices, after, states).items()}


def eps_moved(task, patch, prompts):
    """How far predictions for prompts move."""
    changed = copy.deepcopy(task.unet)
    changed.load_state_dict(
        {n: t.to(changed.get_parameter(n)) for n, t in _unet(stack(task.model.state_dict(), patch))}
    )
    x, t = torch.randn(1, *task.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    found = {}
    with torch.no_grad():
        for prompt in prompts:
            states = task.states([prompt])
            found[prompt] = float((changed(x, t, states).sample - task.unet(x, t, states).sample).abs().max())
    return found


def _unet(tensors):
    return [(n.removeprefix("unet."), t) for n, t in tensors.items() if n.startswith("unet.")]


@pytest.fixture(scope="module")
def erased(task, tmp_path_factory):
    before = model_digest(task.model)
    patch, rows = logged(
        task, srs_me(24, watermarks=("a cross in neon style",), protect=(STAR,)), tmp_path_factory.mktemp("run")
    )
    assert model_digest(task.model) == before
    return patch, rows


def test_the_correlation_falls(erased):
    _, rows = erased
    assert rows[0]["correlation"] == pytest.approx(rows[0]["energy"], rel=1e-5)
    assert rows[0]["l1"] == 0 < rows[-1]["l1"]
    late = [r["correlation"] / r["energy"] for r in rows[-4:]]
    assert sum(late) / 4 < 0.6


def test_only_keys_and_values_change_and_stay_small_in_a_patch(task, erased):
    patch, _ = erased
    assert set(patch) == {f"unet.{n}" for n in key_value(task.unet)}
    assert all(isinstance(c, LowRank) for c in patch.changes.values())
    directions = patch.manifest.findings[FINDINGS]["directions"]
    assert patch.nbytes == sum(4 * directions * sum(c.shape) for c in patch.changes.values())
    assert directions == 64 - patch.manifest.findings[FINDINGS]["rank"]


def test_protected_prompts_stay_and_others_do_not(task, erased):
    patch, _ = erased
    protected, concept = ["", STAR, "a cross in neon style"], "a heart in flat style"
    found = moved(task, patch, [*protected, concept, MOON])
    assert max(found[p] for p in protected) <= 1e-6
    assert found[concept] > 0.05
    assert found[MOON] > 1e-3, "not protected: the comparison can fail"
    facts = patch.manifest.findings[FINDINGS]
    assert facts["protected"] == protected
    assert facts["moves_protected"]["relative"] == pytest.approx(max(found[p] for p in protected), rel=1e-3)
    assert facts["moves_concept"]["relative"] >= found[concept] * 0.999
    predictions = eps_moved(task, patch, [*protected, concept])
    assert max(predictions[p] for p in protected) <= 1e-5
    assert predictions[concept] > 1e3 * max(predictions[p] for p in protected)


def test_capacity_is_noted_before_the_run(task):
    seen = []
    patch = unlearn(task, REQUEST, srs_me(1), on_step=lambda *_: seen.append(attached_to(task.unet)))
    assert patch.manifest.notes[0] == "19 directions left: 3 protected prompts span 45 of 64 dimensions"
    assert seen[0] is not None
    assert attached_to(task.unet) is None
    with pytest.raises(RequestError, match="protecting 8 prompts leaves no direction of 64 to change; the first 4"):
        unlearn(task, REQUEST, srs_me(1, protect=(), protect_others=True))
    loose = unlearn(task, REQUEST, srs_me(1, protect=(), protect_others=True, tolerance=0.05))
    assert "not exact" in loose.manifest.notes[0]
    assert loose.manifest.findings[FINDINGS]["exact"] is False
    assert len(loose.manifest.findings[FINDINGS]["protected"]) == 8
    with pytest.raises(RequestError, match="'a heart in neon style' is to be forgotten and to be protected"):
        unlearn(task, REQUEST, srs_me(1, protect=("a heart in neon style",)))


def test_other_classes_can_be_spared_within_a_tolerance(task):
    """The empty prompt and what is named stay exact; the other classes hardly move, and less than without."""
    given = {"protect": (STAR,), "protect_others": True, "others_tolerance": 0.02}
    patch = unlearn(task, REQUEST, srs_me(4, **given))
    facts = patch.manifest.findings[FINDINGS]
    assert facts["protected"] == ["", STAR]
    assert facts["others"] == [f"a {c} in flat style" for c in task.classes if c not in ("heart", "star")]
    assert 0 < facts["spared_directions"] == facts["used"] < facts["directions"] == 33
    assert "sparing 6 other prompts leaves" in patch.manifest.notes[1]
    assert 0 < facts["others_leak"] <= 0.02
    assert facts["moves_protected"]["relative"] <= 1e-6 < facts["moves_others"]["relative"]
    assert facts["moves_others"]["relative"] < facts["moves_concept"]["relative"]
    loose = unlearn(task, REQUEST, srs_me(4, protect=(STAR,)))
    own = "a heart in neon style"
    share = [f[RING] / f[own] for f in (moved(task, p, [RING, own]) for p in (patch, loose))]
    assert share[0] < share[1]
    with pytest.raises(RequestError, match="leaves none of them"):
        unlearn(task, REQUEST, srs_me(1, **{**given, "others_tolerance": 1e-7}))


def test_prefixes_and_little_energy(task):
    """Protecting a prompt that begins like the concept's own leaves hardly anything to erase."""
    words = "a heart in flat style"
    request = ForgetRequest.concept("heart in flat style")  # what captions name, in words
    patch = unlearn(task, request, srs_me(1, protect=(words.replace("flat style", "flat"),), prompts=(words,)))
    plain = unlearn(task, request, srs_me(1, protect=(STAR,), prompts=(words,)))
    assert patch.manifest.findings[FINDINGS]["erasable"] < plain.manifest.findings[FINDINGS]["erasable"]


@pytest.mark.parametrize("profile", ["as_intended", "as_published"])
def test_stop(task, tmp_path, profile):
    """As intended the crossing step makes no update; as published it does, from the twelfth step on."""
    rule = {"statistic": "ratio", "threshold": 0.95, "profile": profile, "batch_size": 1}
    patch, rows = logged(task, srs_me(15, **rule), tmp_path)
    assert 2 < len(rows) < 15
    assert patch.manifest.notes[-1].startswith(f"stopped after step {len(rows)} of")
    assert ("grad_norm" in rows[-1]) == (profile == "as_published")
    taken = len(rows) - (profile == "as_intended")
    assert (len(rows) >= 12) == (profile == "as_published")
    rest = {**rule, "threshold": None}
    assert unlearn(task, REQUEST, srs_me(taken, **rest)).digest == patch.digest
    assert unlearn(task, REQUEST, srs_me(taken - 1, **rest)).digest != patch.digest
    again = unlearn(task, REQUEST, srs_me(15, **rule), run_dir=tmp_path)
    assert again.digest == patch.digest


def test_a_threshold_above_the_start_is_an_error(task):
    with pytest.raises(RequestError, match=r"already below the threshold 1: give a smaller one"):
        unlearn(task, REQUEST, srs_me(2, threshold=1.0))


class Interrupted(Exception):  # noqa: N818
    pass


RECIPES = {
    "srs_me": lambda n: srs_me(n),
    "published": lambda n: srs_me(n, profile="as_published", protect=(), batch_size=1, threshold=-1.0),
    "drawn": lambda n: with_steps(srs_me(n, images="concept"), sampling_steps=3, drawn=10),
    "confined": lambda n: srs_me(n, directions="concept"),
    "cie": lambda n: cie(n),
    "cie_published": lambda n: cie(n, profile="as_published"),
}


def with_steps(recipe, **changes):
    return recipe.replace(objective={**recipe.objective.describe(), **changes})


@pytest.mark.parametrize("name", RECIPES)
def test_runs_resume_bit_for_bit(task, tmp_path, name):
    def interrupt(number, *_):
        if number == 2:
            raise Interrupted

    before = model_digest(task.model)
    whole = unlearn(task, REQUEST, RECIPES[name](3))
    with pytest.raises(Interrupted):
        unlearn(task, REQUEST, RECIPES[name](3), run_dir=tmp_path, checkpoint_every=1, on_step=interrupt)
    assert attached_to(task.unet) is None
    assert model_digest(task.model) == before
    taken = []
    resumed = unlearn(task, REQUEST, RECIPES[name](3), run_dir=tmp_path, on_step=lambda n, *_: taken.append(n))
    assert taken == [2, 3]
    assert resumed.digest == whole.digest
    assert unlearn(task, REQUEST, RECIPES[name](2)).digest != whole.digest
    loaded = Patch.load(whole.save(tmp_path / "p.safetensors"))
    assert Recipe(**loaded.manifest.recipe) == RECIPES[name](3)
    assert not any(m._forward_hooks for m in task.unet.modules())


def test_published_gradients_are_sums(task):
    settings = {"protect": (), "batch_size": 1, "threshold": None}
    one, two = (srs_me(3, **settings, images="forget") for _ in range(2))
    summed = two.replace(space={**two.space.describe(), "accumulate": True})
    first = [unlearn(task, REQUEST, r.replace(optim={"max_steps": 1})).digest for r in (one, summed)]
    later = [unlearn(task, REQUEST, r).digest for r in (one, summed)]
    assert first[0] == first[1]
    assert later[0] != later[1]


def test_pieces_of_a_step_are_the_same_step(task):
    whole, cut = (unlearn(task, REQUEST, srs_me(3).replace(optim={"micro_batch": m})) for m in (None, 1))
    for name in whole:
        got, want = cut[name].dense(), whole[name].dense()
        assert float((got - want).abs().max()) <= 1e-3 * float(want.abs().max())


def test_a_phrase_that_is_not_protected_is_predicted_anew(task, tmp_path):
    """Both ways have the same gradient where the phrase is protected."""
    found = {}
    for name, protect in (("protected", (STAR, RING)), ("other", (STAR, MOON))):
        found[name] = logged(task, srs_me(2, protect=protect, against=RING), tmp_path / name)[1]
    assert found["protected"][0]["energy"] == found["other"][0]["energy"]
    assert found["protected"][0]["energy"] != logged(task, srs_me(1), tmp_path / "none")[1][0]["energy"]
    assert found["protected"][0]["grad_norm"] != found["other"][0]["grad_norm"]


def test_a_copy_taken_as_teacher_stays_the_original(task):
    ctx = Context(task, task.split(REQUEST))
    space = ConceptShift(protect=(STAR,), protect_others=False, beta=1.0).open(ctx)
    try:
        x, t, states = torch.randn(1, *task.latent_shape), torch.tensor([400]), task.states(["a heart in flat style"])
        original = task.eps(x, t, states)
        teacher = copy.deepcopy(task.unet)
        for omega in space.parameters.values():
            omega.data.normal_()
        assert not torch.allclose(task.eps(x, t, states), original, atol=1e-3)
        assert torch.equal(teacher(x, t, states).sample, original)
        with unshifted(task.unet):
            assert torch.equal(task.eps(x, t, states), original)
        with pytest.raises(RequestError, match="runs beside this U-Net already"):
            ConceptShift(protect_others=False).open(ctx)
    finally:
        space.close()
    with unshifted(task.unet):
        assert torch.equal(task.eps(x, t, states), original)


@pytest.mark.parametrize("kind", ["gradient_ascent", "fine_tune"])
def test_other_objectives_work_in_this_space(task, kind):
    optim = Optim(name="adam", lr=0.1, weight_decay=0.0, epochs=1, max_steps=2)
    space = {"kind": "concept_shift", "protect": (STAR,), "protect_others": False, "beta": 0.05}
    patch = unlearn(task, REQUEST, Recipe(name=kind, objective=kind, space=space, optim=optim))
    found = moved(task, patch, ["", STAR, "a heart in flat style"])
    assert max(found[""], found[STAR]) <= 1e-6 < 1e-3 < found["a heart in flat style"]


def test_the_irreversible_variant_changes_all_of_cross_attention(task, tmp_path):
    patch, rows = logged(task, cie(8), tmp_path)
    assert set(patch) == {f"unet.{n}" for n in cross_attention(task.unet)}
    assert rows[0]["correlation"] == pytest.approx(rows[0]["energy"], rel=1e-5)
    assert rows[-1]["correlation"] < 0.5 * rows[-1]["energy"]
    assert rows[0]["l1"] == 0
    changes = [c.dense() for c in patch.changes.values()]
    assert rows[-1]["l1"] == pytest.approx(float(sum(c.abs().sum() for c in changes)) / len(changes), rel=0.2)
    assert moved(task, patch, [STAR])[STAR] > 1e-3, "nothing is protected"


def test_no_step_no_change(task):
    for recipe in (srs_me(2), cie(2)):
        with pytest.raises(NoEffectError, match="learning rate is 0"):
            unlearn(task, REQUEST, recipe.replace(optim={"lr": 0.0}))


def test_what_does_not_fit_is_refused(task):
    everything = srs_me(1).replace(space="all")
    with pytest.raises(ConfigError, match=r"trains 'text_encoder.*encodes its prompts once"):
        unlearn(task, REQUEST, everything)
    with pytest.raises(ConfigError, match="must read one role, forget or concept"):
        with_steps(srs_me(1), schedule={"kind": "single", "role": "retain"})
    classifier = tiny_classifier()
    with pytest.raises(CapabilityError, match="diffusion, text"):
        unlearn(classifier, ForgetRequest.label("ant"), srs_me(1))


@pytest.mark.parametrize("settings", [{"kind": "xl"}, {"predicts": "v_prediction"}])
def test_other_kinds_of_pipelines(settings, tmp_path):
    """XL also reads the pooled text, and its empty prompt is conditioned on zeros."""
    other = tiny_text_to_image(n_train=8, n_test=8, **settings)
    patch, rows = logged(other, srs_me(6), tmp_path)
    assert rows[0]["correlation"] == pytest.approx(rows[0]["energy"], rel=1e-5)
    assert rows[-1]["correlation"] < 0.9 * rows[-1]["energy"]
    facts = patch.manifest.findings[FINDINGS]
    assert facts["width"] == (128 if "kind" in settings else 64)
    assert facts["moves_protected"]["relative"] <= 1e-6 < 1e-3 < facts["moves_concept"]["relative"]

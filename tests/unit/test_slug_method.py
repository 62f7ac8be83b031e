"""SLUG on a small trained two-tower model: what it edits, how far, what it reports and what it refuses."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("open_clip")

from slug_toys import accuracy, names_task

from expunge.digest import model_digest, tensor_digest
from expunge.errors import CapabilityError, ConfigError, InvariantError, NoEffectError, RequestError
from expunge.method import build_recipe
from expunge.models.towers import Place
from expunge.patch import LowRank, Patch, apply, revert
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.slug import work
from expunge.slug.gradients import forget_gradient
from expunge.slug.losses import forget_losses
from expunge.slug.probes import Figures, edited
from expunge.slug.scores import LayerScore
from expunge.slug.search import Probe, SearchResult
from expunge.slug.steps import Direction, Trial, choose, choose_distinct
from expunge.tasks.tiny import tiny_classifier

REQUEST = ForgetRequest.label("cleo")
FC1 = "text_model.encoder.layers.1.mlp.fc1.weight"
OUT = "vision_model.encoder.layers.1.self_attn.out_proj.weight"


@pytest.fixture(scope="module", params=["transformers", "open_clip"])
def either(request):
    return names_task(request.param)


@pytest.fixture
def task():
    return names_task()


def slug(**settings):
    return build_recipe({"method": "slug", **settings})


def found(patch):
    return patch.manifest.findings["slug"]


# ---- the whole


@pytest.mark.parametrize("towers", ["vision", "language", "both"])
def test_one_layer_forgets_the_name_and_keeps_the_others(either, tmp_path, towers):
    task = either
    split, before = task.split(REQUEST), model_digest(task.model)
    assert accuracy(task, "forget_test", split) == accuracy(task, "test", split) == 1.0
    patch = unlearn(task, REQUEST, slug(towers=towers))
    assert model_digest(task.model) == before
    assert len(patch) == 1
    facts = found(patch)
    (chosen,) = facts["chosen"]
    assert chosen["tensors"] == list(patch) == [chosen["layer"]]
    assert chosen["lambda"] > 0
    loaded = Patch.load(patch.save(tmp_path / "p.safetensors"))
    assert loaded.manifest.findings["slug"] == json.loads(json.dumps(facts))
    tensors = {n: tensor_digest(t) for n, t in task.model.state_dict().items()}
    apply(task.model, loaded)
    moved = {n: tensor_digest(t) for n, t in task.model.state_dict().items() if tensor_digest(t) != tensors[n]}
    assert moved == facts["facts"]["digests"], "the weights that were evaluated are not those that are shipped"
    assert facts["facts"]["verified"]["cleo"]["forget"] == 0.0 == accuracy(task, "forget", split)
    assert accuracy(task, "forget_test", split) < 0.2
    assert accuracy(task, "test", split) >= 0.95
    revert(task.model, loaded)
    assert model_digest(task.model) == before


def test_the_findings_have_the_promised_form(task):
    facts = found(unlearn(task, REQUEST, slug()))
    assert set(facts) == {"scores", "fronts", "searches", "chosen", "criterion", "facts"}
    row = {"name", "tower", "block", "part", "weight_norm", "forget_norm", "retain_norm", "inner", "alignment"}
    assert all(set(s) == row | {"importance", "cosine", "excluded"} for s in facts["scores"])
    assert set(facts["fronts"]) == {"vision", "language"}
    searched = {s["layer"] for s in facts["searches"]}
    assert searched == {n for names in facts["fronts"].values() for n in names}
    for one in facts["searches"]:
        assert len(one["probes"]) == one["evaluations"] <= 24
        assert one["original"] == {"forget": 1.0, "utility": 1.0}
        assert all(set(p) == {"alpha", "forget", "utility", "ok"} for p in one["probes"])
        ok = [p["alpha"] for p in one["probes"] if p["ok"]]
        assert one["feasible"] == (one["alpha"] is not None)
        assert one["alpha"] is None or one["alpha"] in ok
    chosen = facts["chosen"][0]
    best = {s["layer"]: s for s in facts["searches"]}[chosen["layer"]]
    assert chosen["alpha"] == best["alpha"]
    assert chosen["concept"] == "cleo"
    assert facts["criterion"] == {"target": 0.0, "top_k": 1, "utility_drop": 0.05, "utility": 1.0}
    norms = next(s for s in facts["scores"] if s["name"] == chosen["layer"])
    assert chosen["lambda"] == pytest.approx(chosen["alpha"] * norms["weight_norm"] / norms["forget_norm"])


def test_cached_probes_and_whole_towers_choose_the_same(task):
    cached, whole = (unlearn(task, REQUEST, slug(memory=m)) for m in (1 << 31, 0))
    assert any("runs" in n or "run for every probe" in n for n in whole.manifest.notes)
    assert not any("run for every probe" in n for n in cached.manifest.notes)
    for key in ("chosen", "fronts", "searches"):
        assert found(cached)[key] == found(whole)[key]
    assert list(cached) == list(whole)
    assert all(torch.equal(cached[n].dense(), whole[n].dense()) for n in cached)


def test_test_images_are_never_looked_at(task, monkeypatch):
    roles, load = set(), type(task).load

    def watched(self, role, ids, split, **settings):
        roles.add(role)
        return load(self, role, ids, split, **settings)

    monkeypatch.setattr(type(task), "load", watched)
    unlearn(task, REQUEST, slug(layers=(OUT,)))
    assert roles == {"forget", "retain"}


# ---- direction and size of the step


@pytest.mark.parametrize("name", [OUT, FC1])
def test_small_steps_raise_the_forget_loss_as_the_gradient_says(task, name):
    towers, split = task.towers, task.split(REQUEST)
    pairs = list(task.pairs("forget", split, 64))
    gradient, _ = forget_gradient(towers, lambda: iter(pairs), names=[name])
    weight = towers.parameters()[name].detach()
    size, norm = float(weight.norm()), float(gradient[name].norm())
    score = LayerScore(name, "vision", 1, "out", size, norm, 1.0, 0.0)

    def loss(alpha, sign):
        with torch.no_grad(), edited(towers, Direction(score, gradient, sign).deltas(alpha)):
            return float(
                torch.cat([forget_losses(towers.image(p.pixels), towers.text(p.tokens)) for p in pairs]).double().mean()
            )

    alpha = 1e-3
    slope = (loss(alpha, 1.0) - loss(0.0, 1.0)) / (alpha * size / norm * norm**2)
    assert slope == pytest.approx(1.0, rel=0.02)
    assert loss(alpha, -1.0) < loss(0.0, 1.0)


def test_descent_goes_the_other_way_and_a_wrong_sign_is_an_error(task, monkeypatch):
    settings = {"on_infeasible": "best", "utility_drop": None}
    up = unlearn(task, REQUEST, slug(**settings))
    down = unlearn(task, REQUEST, slug(**settings, direction="descent"))
    assert found(up)["chosen"][0]["lambda"] > 0 > found(down)["chosen"][0]["lambda"]
    assert found(up)["facts"]["slope"]["cleo"] > 0 > found(down)["facts"]["slope"]["cleo"]
    true = work.forget_gradient

    def negated(*args, **kwargs):
        gradient, facts = true(*args, **kwargs)
        return {n: -g for n, g in gradient.items()}, facts

    monkeypatch.setattr(work, "forget_gradient", negated)
    with pytest.raises(InvariantError, match="wrong sign"):
        unlearn(task, REQUEST, slug(**settings))


# ---- which tensors


def test_named_layers_only_and_the_group_moves_by_one_factor(task):
    v = "vision_model.encoder.layers.1.self_attn.v_proj.weight"
    alone = unlearn(task, REQUEST, slug(layers=(v,), utility_drop=None))
    assert list(alone) == [v]
    joint = unlearn(task, REQUEST, slug(layers=(v,), group="qkv", utility_drop=None))
    names = {v.replace("v_proj", f"{c}_proj") for c in "qkv"}
    assert set(joint) == names == set(found(joint)["chosen"][0]["tensors"])
    factor = found(joint)["chosen"][0]["lambda"]
    gradient, _ = forget_gradient(task.towers, lambda: task.pairs("forget", task.split(REQUEST), 64), names=names)
    for n in names:
        torch.testing.assert_close(joint[n].dense(), factor * gradient[n], rtol=1e-4, atol=1e-6 * factor)
    assert set(unlearn(task, REQUEST, slug(layers=(v,), group="mlp", utility_drop=None))) == {v}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": ("nowhere.weight",)}, RequestError, "nowhere"),
        ({"hidden_state": -2}, RequestError, "set 'towers' to that tower"),
        ({"towers": "vision", "hidden_state": -2, "layers": (OUT,)}, (RequestError, CapabilityError), "out_proj"),
        ({"top_k": 8}, ConfigError, "every image is among them"),
        ({"one_layer_each": True}, RequestError, "two or more classes"),
    ],
)
def test_what_cannot_be_done_is_refused(task, settings, error, message):
    with pytest.raises(error, match=message):
        unlearn(task, REQUEST, slug(**settings))


def test_a_consumer_of_an_earlier_state_gets_no_dead_layer(task):
    facts = found(unlearn(task, REQUEST, slug(towers="vision", hidden_state=-2, utility_drop=None)))
    places = [task.towers.place(n) for n in facts["fronts"]["vision"]]
    assert places
    assert all(isinstance(p, Place) and p.block == 0 for p in places)
    free = found(unlearn(task, REQUEST, slug(towers="vision", utility_drop=None)))
    assert any(task.towers.place(n).block != 0 for n in free["fronts"]["vision"])


def test_a_random_layer_is_the_control(task):
    recipe = slug()
    control = recipe.edit.controls()["random layer"]
    patch = unlearn(task, REQUEST, recipe.replace(edit=control))
    assert len(found(patch)["searches"]) == 1
    assert not slug(layers=(OUT,)).edit.controls()


def test_a_single_prompt_gives_factors_of_few_tokens(task):
    named = unlearn(task, REQUEST, slug(layers=(FC1,), forget_text="name", utility_drop=None))
    tokens = task.towers.tokenize(["cleo"]).ids.shape[1]
    change = named[FC1]
    assert isinstance(change, LowRank)
    assert change.up.shape[1] <= tokens
    captions = unlearn(task, REQUEST, slug(layers=(FC1,), forget_text="caption", utility_drop=None))
    assert captions[FC1].nbytes > named[FC1].nbytes


# ---- no good step


def test_without_a_good_step_every_layer_and_its_best_trade_off_is_named(task):
    with pytest.raises(NoEffectError, match=r"no single layer forgets 'cleo'.*forget .* at alpha") as error:
        unlearn(task, REQUEST, slug(budget=1))
    fronts = found(unlearn(task, REQUEST, slug()))["fronts"]
    assert all(n in str(error.value) for names in fronts.values() for n in names)


def test_the_best_trade_off_is_taken_if_asked_for(task):
    request = ForgetRequest.label("fay")
    with pytest.raises(NoEffectError, match=r"forget 0.00, utility 0\.\d+ at alpha"):
        unlearn(task, request, slug(layers=(OUT,)))
    best = unlearn(task, request, slug(layers=(OUT,), on_infeasible="best"))
    assert any("best trade-off was taken" in n for n in best.manifest.notes)
    (chosen,), (tried,) = found(best)["chosen"], found(best)["searches"]
    assert not tried["feasible"]
    assert chosen["alpha"] in [p["alpha"] for p in tried["probes"]]
    assert found(best)["facts"]["verified"]["fay"]["forget"] < 1.0


def test_a_name_that_the_model_does_not_know_is_refused(task):
    request = ForgetRequest.samples(range(8))
    with pytest.raises(NoEffectError, match="does not know 'zebra'"):
        unlearn(task, request, slug(concept="zebra"))
    patch = unlearn(task, request, slug(concept="ada", utility_drop=0.2))  # the images of a name that is a class
    assert found(patch)["chosen"][0]["concept"] == "ada"
    with pytest.raises(RequestError, match="set 'concept'"):
        unlearn(task, request, slug(forget_text="name"))


def test_a_classifier_is_refused():
    with pytest.raises(CapabilityError, match="towers"):
        unlearn(tiny_classifier(), ForgetRequest.label("ant"), slug())


# ---- several names


def test_each_name_gets_a_layer_of_its_own(task):
    request = ForgetRequest.label("cleo", "fay")
    split = task.split(request)
    patch = unlearn(task, request, slug(one_layer_each=True))
    facts = found(patch)
    assert [c["concept"] for c in facts["chosen"]] == ["cleo", "fay"]
    first, second = (set(c["tensors"]) for c in facts["chosen"])
    assert not first & second
    assert set(patch) == first | second
    table = facts["facts"]["interaction"]
    assert table["cleo"]["cleo"] == table["fay"]["fay"] == 0.0
    assert max(table["cleo"]["fay"], table["fay"]["cleo"]) > 0.5
    assert all(v["forget"] == 0.0 for v in facts["facts"]["verified"].values())
    apply(task.model, patch)
    assert accuracy(task, "forget", split) == 0.0
    assert accuracy(task, "test", split) > 0.85
    assert facts["facts"]["joint_scale"] > 1


def test_names_that_share_a_layer_add(task):
    request = ForgetRequest.label("cleo", "fay")
    settings = {"layers": (OUT,), "utility_drop": 0.5, "on_infeasible": "best"}
    patch = unlearn(task, request, slug(one_layer_each=True, **settings))
    assert any("adds to another one's" in n for n in patch.manifest.notes)
    total = 0
    for chosen in found(patch)["chosen"]:
        ids = task.split(ForgetRequest.label(chosen["concept"]))
        gradient, _ = forget_gradient(task.towers, lambda ids=ids: task.pairs("forget", ids, 64), names=[OUT])
        total = total + chosen["lambda"] * gradient[OUT]
    torch.testing.assert_close(patch[OUT].dense(), total, rtol=1e-4, atol=1e-5)


def trial(concept, layer, *, alpha, forget=0.0, utility=1.0):
    score = LayerScore(layer, "vision", 0, "out", 1.0, 1.0, 1.0, 0.0)
    probe = Probe(alpha or 1.0, forget, utility, ok=alpha is not None)
    result = SearchResult(alpha, True, (probe,), ((0.0, 1.0),), "bisection")
    return Trial(concept, Direction(score, {layer: torch.ones(1)}, 1.0), Figures(1.0, 1.0), result)


def test_the_choice_is_by_forgetting_then_utility_then_step():
    few = [trial("a", "x", alpha=0.2, utility=0.9), trial("a", "y", alpha=0.4), trial("a", "z", alpha=0.3)]
    assert choose(few).layer == "z"
    assert choose([*few, trial("a", "w", alpha=None)]).layer == "z"
    assert choose([trial("a", "v", alpha=0.1, forget=0.1), *few]).layer == "z"
    assert choose([trial("a", "w", alpha=None)]) is None
    pool = {
        "a": [trial("a", "x", alpha=0.1), trial("a", "y", alpha=0.1, utility=0.9)],
        "b": [trial("b", "x", alpha=0.2), trial("b", "z", alpha=0.2, utility=0.5)],
    }
    chosen, shared = choose_distinct(pool)
    assert ({c: t.layer for c, t in chosen.items()}, shared) == ({"a": "y", "b": "x"}, [])
    pool["a"].pop()
    pool["b"].pop()
    chosen, shared = choose_distinct(pool)
    assert ({c: t.layer for c, t in chosen.items()}, shared) == ({"a": "x", "b": "x"}, ["b"])


# ---- reproduction and storage


def test_the_published_profile_runs_ten_probes_on_accuracy_alone(either):
    patch = unlearn(either, REQUEST, slug(profile="as_published", top_k=2))
    facts = found(patch)
    assert all(s["evaluations"] == 10 for s in facts["searches"])
    assert facts["criterion"]["utility_drop"] is None
    assert facts["criterion"]["top_k"] == 2
    (gradients,) = facts["facts"]["gradients"].values()
    open_clip = either.towers.library == "open_clip"
    assert gradients["variant"] == ("openclip" if open_clip else "as_published")
    assert (facts["chosen"][0]["lambda"] < 0) == open_clip, "the stored gradient is that of the negated loss"
    assert facts["facts"]["slope"]["cleo"] > 0
    if not open_clip:
        assert "visual_projection.weight" not in facts["fronts"]["vision"]


def test_gradients_are_kept_between_runs(task, tmp_path, monkeypatch):
    settings = {"layers": (OUT,), "cache": str(tmp_path), "utility_drop": None}
    first = unlearn(task, REQUEST, slug(**settings))
    assert len(list(tmp_path.iterdir())) == 1
    calls = []
    true = work.forget_gradient
    monkeypatch.setattr(work, "forget_gradient", lambda *a, **k: calls.append(1) or true(*a, **k))
    assert unlearn(task, REQUEST, slug(**settings)).digest == first.digest
    assert not calls
    unlearn(task, ForgetRequest.label("fay"), slug(**settings))
    assert calls
    assert len(list(tmp_path.iterdir())) == 2
    assert "cache" not in slug(**settings).describe()["edit"]

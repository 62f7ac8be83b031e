"""Several concepts in one run: the shifts of separate runs, in the memory of one, each with its own stop."""

import itertools
import json

import pytest
import torch

from expunge.diffusion import at_once
from expunge.diffusion.at_once import AT_ONCE
from expunge.diffusion.concepts import EFFECTS, TOGETHER, erase_concepts, folder_of
from expunge.digest import model_digest, named_tensors
from expunge.errors import ConfigError, RequestError
from expunge.loop import Loop
from expunge.method import build_recipe
from expunge.patch import Patch, apply, revert
from expunge.recipe import Recipe
from expunge.spaces.concept_shift import FINDINGS, attached_to
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

#: Single prompts protect one another entirely; classes with many wordings do not when only the first is protected.
APART = ("a heart in flat style", "a moon in neon style")
MIXED = ("heart", "moon")
#: The first of two concepts stops after the fourth step, the other later.
STOPPING = {"statistic": "ratio", "threshold": 0.895, "beta": 0.2}


def recipe(steps=6, **settings):
    base = {"protect_others": False, "beta": 0.05, "batch_size": 2, "threshold": None, "lambda_l1": 1e-4}
    own = build_recipe({"method": "srs_me", **base, **settings, "optim": {"max_steps": steps, "epochs": 20}})
    drawn = {"sampling_steps": 2, "drawn": 4} if settings.get("images") == "concept" else {}
    return own.replace(objective={**own.objective.describe(), **drawn})


@pytest.fixture(scope="module")
def task():
    return tiny_text_to_image(n_train=16, n_test=16)


@pytest.fixture(scope="module")
def prompts_only():
    found = tiny_text_to_image(images=False)
    found.virtual = 12
    return found


def alone(task, concepts=APART, steps=6, **settings):
    options = {
        k: settings.pop(k)
        for k in ("wordings", "run_dir", "seed", "weights", "at_once", "checkpoint_every")
        if k in settings
    }
    return erase_concepts(task, concepts, recipe(steps, images="concept", **settings), **options)


def together(task, concepts=APART, steps=6, weights="equal", **settings):
    return alone(task, concepts, steps, at_once=True, weights=weights, checkpoint_every=1, **settings)


def digests(patches):
    return {n: p.digest for n, p in patches.items()}


def difference(one, two):
    pairs = [(one[t].dense(), two[t].dense()) for t in one]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lam", [0.0, 1e-3])
def test_together_and_apart_give_the_same_patches(prompts_only, lam):
    before = model_digest(prompts_only.model)
    one, two = alone(prompts_only, lambda_l1=lam), together(prompts_only, lambda_l1=lam)
    assert digests(one) == digests(two)
    assert model_digest(prompts_only.model) == before
    assert attached_to(prompts_only.unet) is None
    assert not any(m._forward_hooks for m in prompts_only.unet.modules())
    assert digests(together(prompts_only, seed=1)) != digests(two)


def test_without_mutual_protection_they_differ(task):
    """The other's shift acts on the concept; alone it does not."""
    own = recipe(3)
    one, two = (erase_concepts(task, MIXED, own, wordings="first", at_once=a, weights="equal") for a in (False, True))
    assert min(difference(one[n], two[n]) for n in MIXED) > 0.01


@pytest.mark.parametrize(("concepts", "protects"), [(APART, True), (MIXED, False)])
def test_gradients_on_foreign_coefficients(task, prompts_only, monkeypatch, concepts, protects):
    """With mutual protection a concept's loss has no gradient on another's coefficients, wherever these are."""
    seen = []

    def one_concept(self, ctx, step):
        shifts = attached_to(ctx.task.unet).shifts
        for shift in shifts.values():
            for omega in shift.omega.values():
                omega.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(seen)))
        return [{n: ids} for n, ids in step.items() if n == concepts[0]]

    def look(self, ctx, numbers):
        shifts = attached_to(ctx.task.unet).shifts
        norms = {n: sum(float(o.grad.norm()) for o in s.omega.values()) for n, s in shifts.items()}
        seen.append(norms[concepts[1]] / norms[concepts[0]])
        return True

    monkeypatch.setattr(at_once.ConceptCorrelations, "parts", one_concept)
    monkeypatch.setattr(at_once.ConceptCorrelations, "graded", look)
    used = prompts_only if protects else task
    own = recipe(2, images="concept" if protects else "forget", lambda_l1=0.0)
    erase_concepts(used, concepts, own, wordings="all" if protects else "first", at_once=True)
    assert len(seen) == 2
    assert (max(seen) < 1e-5) if protects else (min(seen) > 1e-2)


def test_weights_are_the_paper_s_and_leave_the_penalty_alone(prompts_only, tmp_path, monkeypatch):
    """``eta_i = max |L| / |L_i|`` on the gradient of the loss; with one step of SGD the shifts scale with it."""
    found = {}
    for weights, lam in itertools.product(("equal", "balanced"), (0.0, 10.0)):
        folder = tmp_path / f"{weights}{lam}"
        own = recipe(1, images="concept", lambda_l1=lam, directions="concept")
        own = own.replace(optim={"name": "sgd", "lr": 1.0, "momentum": 0.0})
        found[weights, lam] = (
            erase_concepts(prompts_only, APART, own, at_once=True, weights=weights, run_dir=folder),
            rows(folder)[0],
        )
    (equal, _), (balanced, row) = found["equal", 0.0], found["balanced", 0.0]
    losses = {n: abs(row[f"correlation.{n}"]) for n in APART}
    for name in APART:
        eta = max(losses.values()) / losses[name]
        assert row[f"weight.{name}"] == pytest.approx(eta)
        for tensor in equal[name]:
            torch.testing.assert_close(
                balanced[name][tensor].dense(), eta * equal[name][tensor].dense(), rtol=1e-4, atol=1e-10
            )
    assert max(row[f"weight.{n}"] for n in APART) > 1.01
    assert min(row[f"weight.{n}"] for n in APART) == 1.0


def test_every_concept_stops_by_itself(prompts_only, tmp_path):
    """A concept that has stopped keeps its coefficients to the bit, and is not graded any more."""
    rule = STOPPING
    found = together(prompts_only, steps=30, run_dir=tmp_path, **rule)
    log = rows(tmp_path)
    steps = {n: sum(f"correlation.{n}" in r for r in log) for n in APART}
    assert 1 < min(steps.values()) < max(steps.values()) == len(log) < 30
    assert "all 2 concepts have stopped" in " ".join(found[APART[0]].manifest.notes)
    for name in APART:
        notes = found[name].manifest.notes
        assert any(n.startswith(f"stopped after step {steps[name]}: the running mean of the ratio") for n in notes)
        assert not any(n.startswith(other) for n in notes for other in APART)
        exact = together(prompts_only, steps=steps[name] - 1, **{**rule, "threshold": None})
        assert exact[name].digest == found[name].digest, "the crossing step makes no update, nor any later one"
    assert digests(alone(prompts_only, steps=30, **rule)) == digests(found)


def test_a_threshold_above_the_start_is_an_error(prompts_only):
    with pytest.raises(RequestError, match="already below the threshold 1: give a smaller one"):
        together(prompts_only, threshold=1.0)


class Interrupted(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("settings", [{"weights": "balanced"}, STOPPING])
def test_a_killed_run_resumes_bit_for_bit(prompts_only, tmp_path, monkeypatch, settings):
    """Also one whose first concept had stopped."""
    whole = together(prompts_only, steps=8, **settings)
    update, taken = Loop._update, []

    def interrupt(self, logged):
        if self.at.step == 5 and 5 not in taken:
            taken.append(5)
            raise Interrupted
        taken.append(self.at.step)
        return update(self, logged)

    monkeypatch.setattr(Loop, "_update", interrupt)
    with pytest.raises(Interrupted):
        together(prompts_only, steps=8, run_dir=tmp_path, **settings)
    assert attached_to(prompts_only.unet) is None
    found = together(prompts_only, steps=8, run_dir=tmp_path, **settings)
    assert digests(found) == digests(whole)
    assert {n: p.manifest.notes for n, p in found.items()} == {n: p.manifest.notes for n, p in whole.items()}
    count = len(taken)
    assert taken[6:] == list(range(5, len(rows(tmp_path))))
    again = together(prompts_only, steps=8, run_dir=tmp_path, **settings)  # finished: nothing is trained
    assert len(taken) == count
    for name, patch in again.items():
        assert Patch.load(tmp_path / folder_of(name) / "patch.safetensors").digest == patch.digest == whole[name].digest
    assert digests(together(prompts_only, steps=4, **settings)) != digests(whole)


def test_findings_order_and_recovery_are_those_of_separate_runs(prompts_only):
    one, two = alone(prompts_only), together(prompts_only)
    for name in APART:
        a, b = (dict(p[name].manifest.findings) for p in (one, two))
        assert b.pop(AT_ONCE) == {"concepts": list(APART), "weights": "equal"}
        assert a.keys() == b.keys() == {FINDINGS, EFFECTS, TOGETHER}
        assert a[FINDINGS]["moves_protected"]["relative"] <= 1e-6 < 1e-3 < b[FINDINGS]["moves_concept"]["relative"]
        assert {k: v for k, v in a[FINDINGS].items() if not k.startswith("moves")} == {
            k: v for k, v in b[FINDINGS].items() if not k.startswith("moves")
        }
        assert Recipe(**two[name].manifest.recipe) == Recipe(**one[name].manifest.recipe)
        assert two[name].manifest.request == one[name].manifest.request
    model = prompts_only.model
    base = {n: t.detach().clone() for n, t in named_tensors(model)[0].items()}
    seen = set()
    for order in itertools.permutations(two.values()):
        apply(model, *order)
        seen.add(model_digest(model))
        revert(model, order[0])
        apply(model, order[0])
        seen.add(model_digest(model))
        revert(model)
        assert all(torch.equal(t, base[n]) for n, t in named_tensors(model)[0].items())
    assert len(seen) == 1


def kept_bytes(task, concepts, at_once_too):
    """Most bytes that autograd holds at a time for backward passes of a step, without the weights."""
    own = {p.untyped_storage().data_ptr() for p in task.unet.parameters()}
    live, most = {}, 0

    def pack(tensor):
        nonlocal most
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            live[storage.data_ptr()] = storage.nbytes()
            most = max(most, sum(live.values()))
        return tensor

    backward = torch.Tensor.backward

    def done(self, *args, **options):
        backward(self, *args, **options)
        live.clear()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "backward", done)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            erase_concepts(task, concepts, recipe(2, images="concept"), at_once=at_once_too)
    return most


def test_memory_is_that_of_one(prompts_only):
    one, two, three = (
        kept_bytes(prompts_only, c, a)
        for c, a in ((APART[:1], False), (APART, True), ((*APART, "a star in flat style"), True))
    )
    assert 0 < two <= 1.05 * one
    assert three <= 1.05 * one


def test_what_cannot_be_trained_at_once_is_refused(task, prompts_only, tmp_path):
    own = recipe(1, images="concept")
    other = own.replace(objective={"kind": "gradient_ascent"})
    with pytest.raises(ConfigError, match="'concept_correlation', not with the objective 'gradient_ascent'"):
        erase_concepts(task, MIXED, other.replace(space=own.space), wordings="first", at_once=True)
    replay = {"kind": "replay", "epochs": [[{"concept": [0]}]]}
    with pytest.raises(ConfigError, match="'replay' holds the steps of one concept"):
        erase_concepts(
            prompts_only, APART, own.replace(objective={**own.objective.describe(), "schedule": replay}), at_once=True
        )
    together(prompts_only, steps=1, run_dir=tmp_path / "once")
    with pytest.raises(ConfigError, match="holds a run of several concepts at once"):
        alone(prompts_only, steps=1, run_dir=tmp_path / "once")
    alone(prompts_only, steps=1, run_dir=tmp_path / "apart")
    with pytest.raises(ConfigError, match="holds a run of its own"):
        together(prompts_only, steps=1, run_dir=tmp_path / "apart")
    with pytest.raises(ConfigError, match="same folder name"):
        alone(prompts_only, ("a heart", "a_heart"), run_dir=tmp_path / "both")


def test_capacity_is_checked_for_all_before_the_first_is_trained(task, monkeypatch):
    monkeypatch.setattr(Loop, "run", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(RequestError, match=r"^'heart': protecting .* leaves no direction of 64"):
        erase_concepts(task, MIXED, recipe(1))

"""Invariants of SalUn and BARRIER on diffusion models: guidance, targets, masks, statistics."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from expunge.context import Context
from expunge.errors import ConfigError, RequestError
from expunge.method import build_recipe
from expunge.objectives.base import Objective
from expunge.objectives.conditioning import DenoisingEsd, PseudoLabel
from expunge.patch import apply, revert
from expunge.protections.interval.match import find_in
from expunge.protections.interval.protection import IntervalProtection, drawn_again
from expunge.protections.interval.statistics import Statistics, decompose, span
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.saliency import Mask, saliency_scores
from expunge.spaces.base import editable
from expunge.spaces.denoising_mask import DenoisingMask
from expunge.tasks.tiny_ddpm import tiny_ddpm
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

STAR, CAT = ForgetRequest.concept("star"), ForgetRequest.label("cat")
KV = ("attn2.to_k", "attn2.to_v")


@pytest.fixture(scope="module")
def drawn():
    return tiny_text_to_image()


@pytest.fixture(scope="module")
def toy():
    return tiny_ddpm(8, toy=True)


@pytest.fixture(params=["drawn", "toy"])
def either(request):
    return request.getfixturevalue(request.param), STAR if request.param == "drawn" else CAT


def context(task, request, **more):
    return Context(task, task.split(request), **more)


def batch_of(ctx, role="forget", n=3, key=5):
    return replace(ctx.task.load(role, ctx.split[role][:n], ctx.split), key=key)


def values(ctx, objective, role="forget", batch=None):
    batch = batch_of(ctx, role) if batch is None else batch
    return objective.bind(ctx)({role: batch})[role]


# -- guidance ------------------------------------------------------------------------------------------------------


def test_guidance_counts_from_one(either):
    """g = 1 the conditional prediction, 0 the unconditional one, 8.5 is 8.5 and -7.5; one pass equals two."""
    task, request = either
    ctx = context(task, request)
    batch = batch_of(ctx)
    x_t, t, _ = task.drawn(batch)
    with torch.no_grad():
        given = task.eps(x_t, t, task.condition(batch))
        without = task.eps(x_t, t, task.unconditional(3))
        assert torch.equal(task.guided_eps(x_t, t, task.condition(batch), 1.0), given)
        assert_close(task.guided_eps(x_t, t, task.condition(batch), 0.0), without)
        assert_close(
            task.guided_eps(x_t, t, task.condition(batch), 8.5), 8.5 * given - 7.5 * without, atol=1e-4, rtol=1e-4
        )
    assert not torch.allclose(given, without)


def test_the_two_branches_of_a_guided_loss_may_be_taken_one_after_the_other(either):
    """With r = noise - g F + (g - 1) N the gradient is -2 g r dF + 2 (g - 1) r dN, over the numbers of the mean."""
    task, request = either
    task = copy.deepcopy(task)
    ctx, g = context(task, request), 8.5
    batch = batch_of(ctx)
    weights = [p for p in task.unet.parameters() if p.requires_grad]
    want = torch.autograd.grad(task.guided(g).loss(batch).mean(), weights)
    x_t, t, noise = task.drawn(batch)
    branches = [(g, task.condition(batch).detach()), (1 - g, task.unconditional(3).detach())]
    with torch.no_grad():
        r = noise - sum(w * task.eps(x_t, t, c) for w, c in branches)
    found = [torch.zeros_like(p) for p in weights]
    for w, condition in branches:
        parts = torch.autograd.grad(task.eps(x_t, t, condition), weights, -2 * w * r / r.numel())
        found = [a + b for a, b in zip(found, parts, strict=True)]
    scale = max(float(a.abs().max()) for a in want)
    assert max(float((a - b).abs().max()) for a, b in zip(found, want, strict=True)) < 1e-4 * scale
    plain = torch.autograd.grad(task.loss(batch).mean(), weights)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, want, strict=True)) > 1e-2 * scale


# -- what forget conditions are taught to mean -------------------------------------------------------------------------


def test_random_labels_compare_predictions_at_the_same_latents(drawn):
    ctx = context(drawn, STAR)
    batch = batch_of(ctx)
    moon = torch.full_like(batch.targets, drawn.classes.index("moon"))
    x_t, t, noise = drawn.drawn(batch)
    with torch.no_grad():
        goal = drawn.eps(x_t, t, drawn.conditions([c.replace("star", "moon") for c in batch.captions]))
        own = drawn.eps(x_t, t, drawn.condition(batch))
    assert_close(drawn.loss(batch, moon), (own - goal).square().mean((1, 2, 3)))
    assert_close(drawn.loss(batch, batch.targets.clone()), (own - noise).square().mean((1, 2, 3)))


def test_own_condition_as_pseudo_gives_no_loss(drawn):
    ctx = context(drawn, STAR)
    batch = batch_of(ctx)
    own = PseudoLabel(pseudo=(batch.captions[0],))
    same = replace(batch, captions=(batch.captions[0],) * 3)
    assert not bool(values(ctx, own, batch=same).values.any())
    assert bool(values(ctx, own).values.any())


def test_no_gradient_flows_into_the_other_branch(toy):
    task = copy.deepcopy(toy)
    ctx = context(task, CAT)
    batch = batch_of(ctx)
    own, other = int(batch.targets[0]), (int(batch.targets[0]) + 1) % 4
    values(ctx, PseudoLabel(pseudo="next")).values.sum().backward()
    grad = task.model.class_embedding.weight.grad
    assert bool(grad[own].any())
    assert not bool(grad[other].any())


def test_pseudo_class_is_the_loss_of_random_labels(either):
    task, request = either
    ctx = context(task, request)
    batch = batch_of(ctx)
    wrong = task.wrong_target(batch, key=ctx.key("wrong target", 0))
    assert_close(values(ctx, PseudoLabel()).values, task.loss(batch, wrong))
    assert not torch.allclose(values(ctx, PseudoLabel(pseudo="next")).values, task.loss(batch, wrong))


def test_removed_classes_are_never_pseudo(drawn):
    everything_but = [c for c in drawn.classes if c != "moon"]
    ctx = context(drawn, ForgetRequest.label(*everything_but))
    batch = batch_of(ctx, n=8)
    moon = torch.full_like(batch.targets, drawn.classes.index("moon"))
    assert_close(values(ctx, PseudoLabel(), batch=batch).values, drawn.loss(batch, moon))


def test_words_are_replaced_by_captions_that_stay(drawn):
    ctx = context(drawn, ForgetRequest.concept("image"))
    found = values(ctx, PseudoLabel())
    assert bool(found.values.any())
    assert torch.equal(found.values, values(ctx, PseudoLabel(pseudo="retain")).values)
    later = context(drawn, ForgetRequest.concept("image"), epoch=1)
    assert not torch.equal(found.values, values(later, PseudoLabel()).values)


def test_prompts_by_class_are_hypernyms(drawn):
    ctx = context(drawn, STAR)
    named, plain = PseudoLabel(pseudo={"star": "a figure"}), PseudoLabel(pseudo=("a figure",))
    assert torch.equal(values(ctx, named).values, values(ctx, plain).values)
    assert Objective.parse(named.describe()) == named


def test_mixed_batches_are_refused(drawn):
    ctx = context(drawn, STAR)
    with pytest.raises(ConfigError, match="paired, sequential or forget_only"):
        values(ctx, PseudoLabel(), "mixed")


def test_esd_without_strength_is_the_empty_prompt(either):
    task, request = either
    ctx = context(task, request)
    batch = batch_of(ctx)
    x_t, t, _ = task.drawn(batch)
    with torch.no_grad():
        own, null = task.eps(x_t, t, task.condition(batch)), task.eps(x_t, t, task.unconditional(3))
    assert_close(values(ctx, DenoisingEsd(eta=0.0)).values, (own - null).square().mean((1, 2, 3)))
    guided = null - (own - null)
    assert_close(values(ctx, DenoisingEsd()).values, (own - guided).square().mean((1, 2, 3)))


@pytest.mark.parametrize("objective", [PseudoLabel, DenoisingEsd])
def test_a_frozen_reference_stays_the_original(toy, objective):
    task = copy.deepcopy(toy)
    ctx = context(task, CAT)
    batch = batch_of(ctx)
    losses = {r: objective(reference=r).bind(ctx) for r in ("frozen", "current")}
    before = {r: f({"forget": batch})["forget"].values.detach() for r, f in losses.items()}
    assert_close(before["frozen"], before["current"])
    with torch.no_grad():
        task.model.conv_out.weight.zero_()
        task.model.conv_out.bias.zero_()
    after = {r: f({"forget": batch})["forget"].values.detach() for r, f in losses.items()}
    assert not bool(after["current"].any())
    assert bool((after["frozen"] > 0).all())


# -- masks -----------------------------------------------------------------------------------------------------------


def test_text_encoders_are_neither_ranked_nor_trained(drawn):
    ctx = context(drawn, STAR)
    opened = DenoisingMask(batch_size=4, passes=1).open(ctx)
    assert {n.split(".")[0] for n in opened.parameters} == {"unet"}
    assert len(opened.parameters) == len(list(drawn.unet.parameters()))
    assert opened.selection.ones == opened.selection.numel // 2
    named = editable(ctx, ["text_encoder.*"])
    assert {n.split(".")[0] for n in named} == {"text_encoder"}


@pytest.mark.parametrize(("chosen", "other"), [("x", "attn1"), ("kv", "to_q"), ("compvis-noxattn", "attn2")])
def test_a_set_of_the_unet_restricts_mask_and_training(drawn, chosen, other):
    recipe = build_recipe({"method": "t2i_salun", "parameters": chosen, "batch_size": 8, "passes": 1})
    patch = unlearn(copy.deepcopy(drawn), STAR, recipe.replace(optim={"max_steps": 2, "lr": 1e-3}))
    assert patch.changes
    assert not any(other in n for n in patch.changes)


def test_a_set_and_patterns_are_not_given_together():
    with pytest.raises(ConfigError, match="give one of them"):
        DenoisingMask.parse({"kind": "denoising_mask", "parameters": "x", "targets": ["unet.*"]})


def test_the_mask_does_not_depend_on_the_batch_size(drawn):
    """Sums over samples: the memory of a guided pass is a matter of the batch size alone."""
    ctx = context(drawn, STAR)
    parameters = editable(ctx, ["*"])

    def scored(size):
        batches = (replace(b, key=3) for b in ctx.batches("forget", size))
        return saliency_scores(drawn.guided(8.5), batches, parameters)[0]

    whole, single = scored(6), scored(1)
    assert all(torch.allclose(whole[n], single[n], atol=1e-5 * float(whole[n].max()) + 1e-7, rtol=1e-3) for n in whole)


def test_published_masks_score_the_guided_prediction(drawn):
    spaces = {p: build_recipe({"method": "t2i_salun", "profile": p}).space for p in ("as_intended", "as_published")}
    assert [s.guidance for s in spaces.values()] == [1.0, 8.5]
    assert [s.reduction for s in spaces.values()] == ["sample_mean", "batch_mean_sum"]
    ctx = context(drawn, STAR)
    bits = [s.model_copy(update={"passes": 1, "batch_size": 6}).open(ctx).selection.bits for s in spaces.values()]
    assert any(not torch.equal(bits[0][n], bits[1][n]) for n in bits[0])


def test_keeping_everything_is_the_plain_objective(drawn):
    """A mask of ones gives the trajectory of random labels bit for bit; a smaller one another."""
    settings = {"method": "t2i_salun", "parameters": "x", "batch_size": 4, "passes": 1}
    masked = build_recipe(settings | {"keep": 1.0}).replace(optim={"max_steps": 2, "lr": 1e-3})
    plain = masked.replace(space={"kind": "unet_set", "parameters": "x"})
    half = build_recipe(settings).replace(optim={"max_steps": 2, "lr": 1e-3})
    found = [unlearn(copy.deepcopy(drawn), STAR, r).changes for r in (masked, plain, half)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n].dense(), found[1][n].dense()) for n in found[0])
    assert any(not torch.equal(found[0][n].dense(), found[2][n].dense()) for n in found[0])


def test_a_mask_of_one_request_is_refused_for_another(drawn, tmp_path):
    ctx = context(drawn, STAR)
    space = DenoisingMask(parameters="kv", passes=1, batch_size=6)
    mask = space.open(ctx).selection
    mask.save(tmp_path / "mask.safetensors")
    again = DenoisingMask(parameters="kv", file=str(tmp_path / "mask.safetensors"))
    assert all(torch.equal(mask.bits[n], b) for n, b in again.open(ctx).selection.bits.items())
    with pytest.raises(Exception, match="another layout"):
        Mask.load(tmp_path / "mask.safetensors", editable(ctx, ["*"]))
    with pytest.raises(Exception, match="other forget set"):
        again.open(context(drawn, ForgetRequest.concept("moon")))


# -- interval protection ------------------------------------------------------------------------------------------


def test_statistics_are_of_several_times_and_noises(toy):
    ctx = context(toy, CAT)
    keys = [b.key for b in drawn_again(ctx, "forget", 100, 3)]
    assert len(set(keys)) == 3
    assert keys[0] == next(iter(ctx.batches("forget", 100))).key
    counts = {}
    for draws in (1, 3):
        part = IntervalProtection(targets=("attentions.0.to_k",), draws=draws)
        layers = part._layers(ctx, part_space(ctx, part))
        counts[draws] = next(iter(part._statistics(ctx, layers).values()))[0].n_rows
    assert counts[3] == 3 * counts[1]


def part_space(ctx, part):
    from expunge.spaces.matched import MatchedLayers

    return MatchedLayers(targets=part.targets).open(ctx)


def test_patterns_mean_layers_of_the_unet(drawn):
    ctx = context(drawn, STAR)
    layers = find_in(ctx, ["Linear"]).layers
    assert layers
    assert all(n.startswith("unet.") for n in layers)
    with pytest.raises(RequestError, match="text encoder only"):
        find_in(ctx, ["attn2.to_k", "text_encoder"])


def test_free_directions_of_keys_and_values_are_said(drawn):
    """Six captions have too few states for all directions; a floor holds the others."""
    notes = {}
    for name, more in {"free": {}, "floor": {"floor": 0.1}, "retain": {"retain_weight": 1.0}}.items():
        ctx = context(tiny_one(drawn), STAR)
        part = IntervalProtection(targets=KV, **more)
        part.bind(ctx, part_space(ctx, part))
        notes[name] = [n for n in ctx.notes if "less than half" in n]
    assert len(notes["free"]) == 1
    assert not notes["floor"]
    assert not notes["retain"]


def tiny_one(task):
    """The task with one caption for all that goes."""
    other = copy.copy(task)
    other.captions = lambda role, ids, split=None: ["star"] * len(ids)
    return other


def test_a_floor_costs_what_is_free_without_it(drawn):
    cost = {}
    for floor in (0.0, 0.5):
        task = tiny_one(copy.deepcopy(drawn))
        ctx = context(task, STAR)
        part = IntervalProtection(
            targets=("unet.down_blocks.1.attentions.0.*.attn2.to_k",), floor=floor, lambda_interval=1.0
        )
        penalty = part.bind(ctx, part_space(ctx, part))
        (layer,) = find_in(ctx, part.targets).layers.values()
        states = task.conditions(["star"])[0]
        basis = torch.linalg.svd(states)[2][len(states) :]  # directions that no state has
        assert len(basis)
        with torch.no_grad():
            layer.weight += basis[:1]
        cost[floor] = float(penalty()["interval"].values.detach())
    assert cost[0.0] < 1e-5
    assert cost[0.5] > 1e-2


def test_without_weight_the_protection_is_the_plain_objective(drawn):
    settings = {"method": "barrier", "targets": list(KV), "batch_size": 4, "pseudo": "next"}
    still = {"max_steps": 2, "lr": 1e-3}
    bare = build_recipe(settings | {"lambda_interval": 0.0}).replace(optim=still)
    held = build_recipe(settings | {"lambda_interval": 100.0, "floor": 1.0}).replace(optim=still)
    plain = held.replace(protections=[])
    found = [unlearn(copy.deepcopy(drawn), STAR, r).changes for r in (bare, plain, held)]
    assert all(torch.equal(found[0][n].dense(), found[1][n].dense()) for n in found[0])
    assert any(not torch.equal(found[0][n].dense(), found[2][n].dense()) for n in found[0])


def test_frozen_layers_have_no_gradient_and_do_not_count_for_clipping(drawn):
    task = copy.deepcopy(drawn)
    seen = []

    def on_step(step, model, optimizer):
        seen.append({n for n, p in model.named_parameters() if p.grad is not None or p.requires_grad})

    recipe = build_recipe({"method": "barrier", "targets": list(KV), "batch_size": 4})
    recipe = recipe.replace(optim={"max_steps": 2, "lr": 1e-3, "grad_clip": 1.0})
    patch = unlearn(task, STAR, recipe, on_step=on_step)
    assert seen[0] == seen[1] == set(patch.changes)
    apply(task.model, patch)
    revert(task.model, patch)


@pytest.mark.parametrize("width", [40, 700])
def test_the_span_counts_directions_beyond_the_leading_ones(width):
    """Wide inputs have only their leading directions computed, which is not their rank."""

    rows = torch.randn(21, width, generator=torch.Generator().manual_seed(0)).double()
    found = decompose(torch.cov(rows.T, correction=0), 8)
    zeros = torch.zeros(8)
    stats = Statistics(
        rows.mean(0), found.basis, found.sigma, zeros, zeros, zeros, zeros, found.residual, 1, 21, found.rank
    )
    assert span(stats) == 20
    assert found.rank == (20 if width == 40 else 8)


@pytest.fixture(scope="module")
def one_name(tmp_path_factory):
    """The tiny pipeline on images of which only one class has a name, as those of a nude and of a clothed person."""
    from expunge.data.base import Splits
    from expunge.data.caption_files import axis_of_names
    from expunge.data.captions import captioned
    from expunge.tasks.text_to_image import TextToImageTask
    from expunge.tasks.tiny_text_to_image import tiny_parts

    captions = ["a nude figure", "a figure with clothes"] * 4
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = captioned(x, captions, {"name": axis_of_names(captions, ["nude"], ("a photo of a {} person",))})
    return TextToImageTask(tiny_parts(), Splits("drawn", images, images), steps=2)


@pytest.mark.parametrize("words", ["nude", "figure with clothes"])
def test_unwanted_content_is_to_mean_what_stays(one_name, words):
    ctx = context(one_name, ForgetRequest.concept(words))
    batch = batch_of(ctx)
    stays = "a figure with clothes" if words == "nude" else "a nude figure"
    x_t, t, _ = one_name.drawn(batch)
    with torch.no_grad():
        goal = one_name.eps(x_t, t, one_name.conditions([stays] * 3))
        own = one_name.eps(x_t, t, one_name.condition(batch))
    assert_close(values(ctx, PseudoLabel()).values, (own - goal).square().mean((1, 2, 3)))


def test_the_class_of_nameless_captions_is_neither_drawn_nor_a_label(one_name, drawn):
    assert one_name.classes == ["nude", "other"]
    assert [a.prompt for a in one_name.asks] == ["a photo of a nude person"]
    ctx = context(one_name, ForgetRequest.concept("nude"))
    with pytest.raises(RequestError, match="pseudo: retain"):
        one_name.wrong_target(batch_of(ctx), key=0)
    for pseudo in ("next", "class"):
        with pytest.raises(RequestError, match="no other class has a name"):
            PseudoLabel(pseudo=pseudo).bind(ctx)
    assert len(drawn.asks) == sum(map(len, drawn.prompts()))

"""Patches: every kind of change, exact undo, stacks, files, and what must be refused."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_toys import DTYPES, Net, Tied, bits, draw, manifest, patches_of, sparse, state
from torch import nn

from expunge.errors import ArtifactError, RequestError
from expunge.patch import Dense, Patch, Replace, Sparse, applied, apply, base_state, revert, settle
from expunge.patch import stack as stack_patches
from expunge.patch.changes import smallest

# ---- apply and revert


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_undo_is_exact_for_every_additive_kind_and_precision(dtype, which):
    model = Net().to(dtype)
    before = state(model)
    patch = patches_of(model)[which]
    apply(model, patch)
    after = state(model)
    assert {n for n in before if before[n] != after[n]} == set(patch)
    assert applied(model) == (patch,)
    revert(model, patch)
    assert state(model) == before
    assert applied(model) == ()


def test_undo_by_subtraction_would_not_be_exact():
    model = Net()
    weight, delta = model.a.weight.detach().clone(), draw((5, 6), 1)
    assert not torch.equal((weight + delta) - delta, weight)


def test_replace_carries_buffers():
    model = Net()
    before = state(model)
    new = {"bn.running_mean": Replace(draw((5,), 1)), "bn.num_batches_tracked": Replace(torch.tensor(7))}
    patch = Patch(new, manifest(model))
    apply(model, patch)
    assert int(model.bn.num_batches_tracked) == 7
    assert torch.equal(model.bn.running_mean, new["bn.running_mean"].new)
    revert(model)
    assert state(model) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_does_not_matter_and_any_patch_can_be_taken_off(dtype):
    base = Net().to(dtype)
    start = state(base)
    patches = patches_of(base)
    expected = state(apply(copy.deepcopy(base), *patches))
    for order in itertools.permutations(patches):
        model = copy.deepcopy(base)
        for patch in order:
            apply(model, patch)
        assert state(model) == expected
        for revoked in patches:
            rest = [p for p in patches if p is not revoked]
            never_had = state(apply(copy.deepcopy(base), *rest))
            revert(model, revoked)
            assert state(model) == never_had != expected
            apply(model, revoked)
        revert(model)
        assert state(model) == start


def test_the_pure_stack_equals_apply():
    model = Net()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    patches = patches_of(model)
    stacked = stack_patches(base, *patches)
    apply(model, *patches)
    assert all(bits(stacked[n]) == bits(t) for n, t in model.state_dict().items())
    assert all(bits(base[n]) == bits(t) for n, t in base_state(model).items())
    with pytest.raises(ArtifactError, match="given twice"):
        stack_patches(base, patches[0], patches[0])


@settings(max_examples=40, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=4, unique=True),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]),
    data=st.data(),
)
def test_property_any_stack_is_exact(seeds, dtype, scale, data):
    base = Net().to(dtype)
    start = state(base)
    m = manifest(base)
    patches = [Patch({"a.weight": sparse((5, 6), s, 0.4, scale)}, m) for s in seeds]
    patches = list({p.digest: p for p in patches}.values())
    order = data.draw(st.permutations(patches))
    keep = data.draw(st.sets(st.sampled_from(range(len(patches)))))
    model = copy.deepcopy(base)
    for patch in order:
        apply(model, patch)
    kept = [p for i, p in enumerate(patches) if i in keep]
    for patch in patches:
        if patch not in kept:
            revert(model, patch)
    assert state(model) == (state(apply(copy.deepcopy(base), *kept)) if kept else start)


def test_minus_zero_is_kept_where_nothing_changes():
    model = Net()
    with torch.no_grad():
        model.a.weight[0, 0] = -0.0
        model.a.weight[0, 1] = -0.0
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[0, 1] = True
    dense = torch.zeros(5, 6)
    dense[0, 1] = 0.5
    for change in (Sparse(mask, torch.tensor([0.5])), Dense(dense)):
        apply(model, Patch({"a.weight": change}, manifest(model)))
        assert math.copysign(1, float(model.a.weight.detach()[0, 0])) == -1
        assert float(model.a.weight.detach()[0, 1]) == 0.5
        revert(model)
    assert math.copysign(1, float(torch.tensor(-0.0) + 0.0)) == 1  # plain addition would lose the sign


def test_float64_changes_are_summed_in_float64():
    model = Net().double()
    delta = torch.full((5, 6), 1e-12, dtype=torch.float64)
    base = model.a.weight.detach().clone()
    apply(model, Patch({"a.weight": Dense(delta)}, manifest(model)))
    assert torch.equal(model.a.weight, base + delta)
    assert not torch.equal(model.a.weight, base)


# ---- refusals


def test_another_base_is_refused_with_the_tensor_and_both_digests():
    model, other = Net(), Net()
    patch = patches_of(model)[0]
    with torch.no_grad():
        other.b.weight[0, 0] += 1
    before = state(other)
    with pytest.raises(ArtifactError, match=r"'b.weight' \(patch [0-9a-f]{16}, model [0-9a-f]{16}\)"):
        apply(other, patch)
    assert state(other) == before
    with pytest.raises(ArtifactError, match="another base"):
        stack_patches(other.state_dict(), patch)


def test_another_precision_and_another_architecture_are_refused():
    patch = patches_of(Net())[0]
    with pytest.raises(ArtifactError, match="another precision"):
        apply(Net().half(), patch)
    with pytest.raises(ArtifactError, match=r"missing \['a.bias'.*unexpected \['embed.weight'"):
        apply(Tied(), patch)


def test_a_second_application_is_refused():
    model = Net()
    patch = patches_of(model)[0]
    apply(model, patch)
    once = state(model)
    with pytest.raises(ArtifactError, match=r"'a.weight'.*already applied"):
        apply(model, patch)
    assert state(model) == once
    with pytest.raises(ArtifactError, match=r"'a.weight'.*already applied"):
        apply(Net(), patch, patch)


def test_two_replacements_of_one_tensor_are_refused_in_either_order():
    model = Net()
    m = manifest(model)
    one, two = (Patch({"bn.running_mean": Replace(draw((5,), s)), "a.bias": sparse((5,), s, 0.9)}, m) for s in (1, 2))
    add = Patch({"bn.running_mean": Dense(draw((5,), 3))}, m)
    for first, second in ((one, two), (two, one), (one, add), (add, one)):
        apply(model, first)
        before = state(model)
        with pytest.raises(ArtifactError, match=r"'bn.running_mean' is replaced"):
            apply(model, second)
        assert state(model) == before
        revert(model)


def test_a_change_that_does_not_fit_is_refused():
    model = Net()
    m = manifest(model)
    with pytest.raises(ArtifactError, match=r"'a.weight' has shape \[5, 6\]"):  # it would broadcast
        apply(model, Patch({"a.weight": Dense(torch.ones(6))}, m))
    with pytest.raises(ArtifactError, match=r"'bn.num_batches_tracked' holds torch.int64"):
        apply(model, Patch({"bn.num_batches_tracked": Dense(torch.tensor(1.0))}, m))
    with pytest.raises(ArtifactError, match="'zz'"):
        Patch({"zz": Dense(torch.ones(2))}, m)
    with pytest.raises(ArtifactError, match=r"'a.bias'.*NaN"):
        Patch({"a.bias": Dense(torch.full((5,), math.nan))}, m)


@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_a_model_modified_after_apply_is_noticed(name):
    model = Net()
    first, second, _ = patches_of(model)
    apply(model, first.restrict("a.weight"))
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(1.5)
    with pytest.raises(ArtifactError, match=f"'{name}' was modified"):
        apply(model, second)
    if name == "a.weight":
        with pytest.raises(ArtifactError, match=r"'a.weight' was modified"):
            revert(model)
    else:
        revert(model)  # what the patch changed is as it was; the caller's own change stays


def test_a_patch_made_above_another_needs_the_lower_one_settled():
    model = Net()
    first = patches_of(model)[0]
    apply(model, first)
    above = Patch({"a.bias": Dense(torch.ones(5))}, manifest(model))
    with pytest.raises(ArtifactError, match="settle"):
        apply(model, above)
    settle(model)
    middle = state(model)
    apply(model, above)
    revert(model)
    assert state(model) == middle
    with pytest.raises(ArtifactError, match="no applied patch"):
        revert(model)


def test_reverting_what_is_not_there_is_refused():
    model = Net()
    first, second, _ = patches_of(model)
    with pytest.raises(ArtifactError, match="no applied patch"):
        revert(model)
    apply(model, first)
    with pytest.raises(ArtifactError, match="not applied"):
        revert(model, second)


# ---- names: ties and wrappers


def test_tied_weights_are_stored_once_and_stay_tied():
    model = Tied()
    before = state(model)
    patch = Patch({"embed.weight": sparse((7, 3), 1)}, manifest(model))
    assert patch.manifest.aliases == {"embed.weight": ("head.weight",)}
    apply(model, patch)
    assert model.head.weight is model.embed.weight
    stacked = stack_patches(Tied().state_dict(), patch)
    assert bits(stacked["head.weight"]) == bits(stacked["embed.weight"]) == bits(model.embed.weight)
    assert state(model) != before
    revert(model)
    assert state(model) == before
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.embed.weight.detach().clone())
    with pytest.raises(ArtifactError, match="unexpected"):
        apply(untied, patch)


def test_a_data_parallel_prefix_is_matched_and_reported():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    patch = patches_of(Net())[0]
    plain, wrapped = Net(), Wrapper(Net())
    with pytest.warns(UserWarning, match="start with 'module.'"):
        apply(wrapped, patch)
    assert state(apply(plain, patch)) == state(wrapped.module)
    revert(wrapped)
    assert state(wrapped.module) == state(Net())
    backward = Patch(patch.changes, manifest(Wrapper(Net())))  # made on a wrapped model
    assert backward.digest == patch.digest


# ---- derived patches


def test_scale_and_restrict():
    model = Net()
    patch = patches_of(model)[0]
    half = patch.scale(0.5)
    assert torch.equal(half["a.weight"].dense(), patch["a.weight"].dense() * 0.5)
    assert half.manifest.parents == (patch.digest,)
    assert half.digest != patch.digest
    assert list(patch.restrict("a.*")) == ["a.weight", "a.bias"]
    assert list(patch.restrict(["b.weight", "*.bias"])) == ["a.bias", "b.weight"]
    with pytest.raises(RequestError, match=r"'a.weigth'.*did you mean 'a.weight'"):
        patch.restrict("a.weigth")
    replaced = Patch({"bn.running_mean": Replace(torch.ones(5))}, manifest(model))
    assert replaced.scale(1.0)["bn.running_mean"] == replaced["bn.running_mean"]
    with pytest.raises(ArtifactError, match="cannot be scaled"):
        replaced.scale(2.0)


def test_smallest_form():
    delta = torch.zeros(1000)
    assert smallest(delta) is None
    delta[3] = 1
    assert isinstance(smallest(delta), Sparse)
    assert isinstance(smallest(torch.ones(1000)), Dense)

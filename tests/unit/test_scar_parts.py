"""Invariants of class statistics and of the distance to a class (SCAR)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from expunge.errors import ArtifactError, CapabilityError, DataError
from expunge.features.distance import ClassDistance, Metric
from expunge.features.statistics import ClassStatistics, correlation, shrink, tukey, weights_digest
from expunge.request import ForgetRequest
from expunge.tasks.tiny import tiny_classifier

ANT = ForgetRequest.label("ant")


def features(n=90, D=6, K=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    centres = torch.rand(K, D, generator=g, dtype=torch.float64) * 3
    return (centres[y] + torch.randn(n, D, generator=g, dtype=torch.float64)).abs(), y


def fitted(z, y, **settings):
    return ClassStatistics.of(iter([(z, y)]), sorted(set(y.tolist())), **settings)


def psd(seed, D=5, rank=5):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, D, generator=g, dtype=torch.float64)
    return a.T @ a / rank


# -- shrinkage -----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 500), rank=st.integers(1, 5), g2=st.floats(0, 4), more=st.floats(0.01, 3))
def test_shrinkage_is_positive_definite_with_unit_diagonal(seed, rank, g2, more):
    S = psd(seed, rank=rank)
    shrunk = shrink(S, g2 + more, g2, 2)
    assert torch.allclose(shrunk, shrunk.T, rtol=1e-12)
    assert float(torch.linalg.eigvalsh(shrunk)[0]) > 0
    R = correlation(shrunk)
    assert torch.allclose(R.diagonal(), torch.ones(5, dtype=torch.float64))
    assert float(R.abs().max()) <= 1 + 1e-12
    assert torch.equal(shrink(S, 0, 0, 1), S)


@given(seed=st.integers(0, 200), gamma=st.floats(0, 4))
def test_two_passes_are_one_of_the_combined_strength(seed, gamma):
    S, both = psd(seed), (1 + gamma) ** 2 - 1
    assert torch.allclose(shrink(S, gamma, gamma, 2), shrink(S, both, both, 1), rtol=1e-10)
    if gamma > 0.01:
        assert not torch.allclose(shrink(S, gamma, gamma, 2), shrink(S, gamma, gamma, 1), rtol=1e-3)


def test_golden_shrinkage_and_distance():
    S = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    assert shrink(S, 3, 3, 1).tolist() == [[6.5, 2.0], [2.0, 5.5]]
    assert shrink(S, 3, 3, 2).tolist() == [[24.5, 8.0], [8.0, 23.5]]
    assert float(correlation(shrink(S, 3, 3, 2))[0, 1]) == pytest.approx(0.3334056949, abs=1e-10)
    mean = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    found = ClassStatistics(torch.tensor([0]), torch.tensor([9]), mean, S[None], names=("ant",))
    z = torch.tensor([[4.0, 9.0]], dtype=torch.float64)
    for passes, want in ((2, 0.0045535929), (1, 0.0045608968)):
        assert float(ClassDistance(found, Metric(passes=passes)).distance2(z)) == pytest.approx(want, abs=1e-10)
    plain = ClassStatistics(torch.tensor([0]), torch.tensor([9]), mean, torch.eye(2, dtype=torch.float64)[None])
    assert float(ClassDistance(plain, Metric(passes=0)).distance2(z)) == pytest.approx(0.0030792936, abs=1e-10)


def test_zeros_left_out_can_make_a_metric_indefinite_which_is_refused_by_name():
    live = psd(0, D=3, rank=1) + 1.0
    S = torch.zeros(24, 24, dtype=torch.float64)
    S[:3, :3] = live
    mean = torch.rand(1, 24, dtype=torch.float64)
    found = ClassStatistics(torch.tensor([1]), torch.tensor([9]), mean, S[None], names=("bee",))
    z = torch.rand(2, 24, dtype=torch.float64)
    with pytest.raises(DataError, match=r"class 'bee' is indefinite.*offdiag_mean = 'all'"):
        ClassDistance(found, Metric(offdiag_mean="nonzero")).distance2(z)
    assert bool((ClassDistance(found, Metric()).distance2(z) > 0).all())
    with pytest.raises(DataError, match="'bee' has a feature without variance"):
        ClassDistance(found, Metric(passes=0)).distance2(z)
    same = ClassStatistics(torch.tensor([1]), torch.tensor([9]), mean, torch.ones_like(S)[None], names=("bee",))
    with pytest.raises(DataError, match="'bee' is singular"):
        ClassDistance(same, Metric(passes=0)).distance2(z)


# -- distance ------------------------------------------------------------------------------------------------------


def test_the_distance_is_the_whitened_one_and_scale_free():
    z, y = features()
    distance = ClassDistance(fitted(z, y), Metric())
    d2 = distance.distance2(z)
    assert float(d2.min()) > 0
    for i in range(3):
        u = nn.functional.normalize(z.sqrt(), dim=1) - nn.functional.normalize(distance.statistics.mean[i], dim=0)
        white = torch.linalg.solve(torch.linalg.cholesky(distance.correlation(i)), u.T)
        assert torch.allclose(d2[:, i], white.square().sum(0), rtol=1e-10)
    assert torch.allclose(distance.distance2(7 * z), d2, rtol=1e-10)
    at_mean = distance.statistics.mean.square() * 4
    assert torch.allclose(distance.distance2(at_mean).diagonal(), torch.zeros(3, dtype=torch.float64), atol=1e-20)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    permuted = ClassDistance(fitted(z[:, order], y), Metric())
    assert torch.allclose(permuted.distance2(z[:, order]), d2, rtol=1e-9)
    assert not torch.allclose(permuted.distance2(z), d2, rtol=1e-3)


def test_one_target_per_row_equals_the_column_of_all():
    z, y = features()
    distance = ClassDistance(fitted(z, y), Metric())
    targets = torch.tensor([2, 0, 1] * 30)
    assert torch.allclose(distance.distance2(z, targets), distance.distance2(z).gather(1, targets[:, None])[:, 0])
    assert distance.distance2(z[:0], targets[:0]).shape == (0,)
    fresh = ClassDistance(fitted(z, y), Metric())
    fresh.distance2(z[:2], torch.tensor([1, 1]))
    assert {k[0] for k in fresh._factors} == {1}, "only the classes asked for are factorised"
    before = distance.distance2(z, targets.clamp_min(1))
    distance.keep_only(torch.tensor([2, 1, -1]))
    assert distance.classes.tolist() == [1, 2]
    assert torch.equal(distance.distance2(z, targets.clamp_min(1)), before)
    with pytest.raises(DataError, match="class 7 is a target"):
        distance.distance2(z[:1], torch.tensor([7]))


@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_targets_are_neither_own_nor_removed(removed):
    z, y = features(n=80, K=4)
    staying = [c for c in range(4) if c != removed]
    distance = ClassDistance(ClassStatistics.of(iter([(z, y)]), staying), Metric())
    own = y == removed
    targets = distance.assign(z[own], y[own], (removed,))
    assert bool((targets != removed).all())
    shuffled = torch.randperm(int(own.sum()), generator=torch.Generator().manual_seed(0))
    assert torch.equal(distance.assign(z[own][shuffled], y[own][shuffled], (removed,)), targets[shuffled])
    assert torch.equal(torch.cat([distance.assign(r[None], torch.tensor([removed])) for r in z[own]]), targets)
    everything = ClassDistance(fitted(z, y), Metric())
    assert bool((everything.assign(z, y) != y).all())
    assert torch.equal(everything.assign(z[own], y[own], (removed,)), targets)


@pytest.mark.parametrize(("removed", "near"), [(0, 1), (1, 2), (2, 3)])
def test_the_class_after_the_removed_one_is_not_passed_over(removed, near):
    """The published comparison of labels with column positions sends these samples elsewhere."""
    z, y = features(n=80, K=4)
    staying = [c for c in range(4) if c != removed]
    found = ClassStatistics.of(iter([(z, y)]), staying)
    at = found.mean[staying.index(near)].square()[None]
    label = torch.tensor([removed])
    assert ClassDistance(found, Metric()).assign(at, label, (removed,)).tolist() == [near]
    assert ClassDistance(found, Metric(column_map="compact")).assign(at, label, (removed,)).tolist() != [near]


def test_no_class_left_is_an_error():
    z, y = features(K=2)
    with pytest.raises(DataError, match="no class is left"):
        ClassDistance(fitted(z, y), Metric()).assign(z, y, (0, 1))


@pytest.mark.parametrize(("rule", "eps"), [("power", 0.0), ("power", 1e-6), ("signed_power", 0.0)])
def test_gradients_are_finite_at_zero_and_right_elsewhere(rule, eps):
    z, y = features(n=30)
    distance = ClassDistance(fitted(z, y, rule=rule, eps=eps), Metric())
    x = z[:4].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda t: distance.distance2(t, torch.tensor([0, 1, 2, 1])), (x,))
    with torch.no_grad():
        x[:, 2] = 0
        x[3] = 0
    distance.distance2(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    if eps == 0:
        assert bool((x.grad[:, 2] == 0).all())
        exact = x.detach().clone().requires_grad_(True)
        distance.distance2(exact, exact_slope=True).sum().backward()
        assert not bool(torch.isfinite(exact.grad).all())


def test_signed_power_mirrors_and_power_of_one_does_nothing():
    z = torch.tensor([-4.0, -0.25, 0.0, 9.0])
    assert tukey(z, 0.5, "signed_power").tolist() == [-2.0, -0.5, 0.0, 3.0]
    assert tukey(z, 1.0).tolist() == z.tolist()
    assert bool(tukey(z, 0.5, "power")[:2].isnan().all())


def test_descending_the_distance_reaches_the_target():
    z, y = features(n=60)
    distance = ClassDistance(fitted(z, y), Metric())
    targets = distance.assign(z, y)
    x = z.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        distance.distance2(x, targets).sum().backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(min=1e-3)
    assert bool((distance.distance2(z).argmin(1) != targets).any())
    assert torch.equal(distance.distance2(x.detach()).argmin(1), targets)


# -- statistics ----------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 90), seed=st.integers(0, 50))
def test_streamed_statistics_equal_whole_ones(size, seed):
    z, y = features()
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    streamed = ClassStatistics.of(((z[r], y[r]) for r in order.split(size)), [0, 1, 2])
    for c in range(3):
        t = z[y == c].sqrt()
        assert torch.allclose(streamed.mean[c], t.mean(0), rtol=1e-10)
        assert torch.allclose(streamed.covariance[c], t.T.cov(), rtol=1e-10, atol=1e-12)
    assert streamed.count.tolist() == [30, 30, 30]


def test_blocks_are_merged(monkeypatch):
    """More rows than are held back at a time."""
    monkeypatch.setattr("expunge.features.statistics._HELD_BYTES", 400)
    test_streamed_statistics_equal_whole_ones.hypothesis.inner_test(5, 3)


def test_few_samples_are_refused_by_name_and_two_are_enough():
    z, y = features(n=12, D=6)
    names = ("ant", "bee", "cat")
    for left in (0, 1):
        keep = (y != 1) | (torch.cumsum(y == 1, 0) <= left)
        with pytest.raises(DataError, match=rf"class 'bee' has {left} sample"):
            ClassStatistics.of(iter([(z[keep], y[keep])]), [0, 1, 2], names=names)
    keep = (y != 1) | (torch.cumsum(y == 1, 0) <= 2)
    found = ClassStatistics.of(iter([(z[keep], y[keep])]), [0, 1, 2], names=names)
    assert bool((ClassDistance(found, Metric()).distance2(z) >= 0).all()), "shrinkage makes rank one regular"


def test_negative_and_broken_features():
    z, y = features()
    with pytest.raises(DataError, match=r"negative features.*signed_power"):
        fitted(z - 1, y)
    assert fitted(z - 1, y, rule="signed_power").rule == "signed_power"
    with pytest.raises(DataError, match="NaN or infinite"):
        fitted(z * math.inf, y)


class Signed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.fc = net, nn.Linear(16, 4)
        self.net.fc = nn.Identity()

    def forward(self, x):
        return self.fc(self.net(x) - 0.3)


def test_fit_leaves_out_removed_classes_and_restores_modes():
    task = tiny_classifier()
    task.model.train()
    split = task.split(ANT)
    found = ClassStatistics.fit(task, split, batch_size=7)
    assert found.classes.tolist() == [1, 2, 3]
    assert found.names == ("bee", "cat", "dog")
    assert (found.rule, found.count.sum()) == ("power", len(split["retain"]))
    assert task.model.training
    task.model.eval()
    with torch.no_grad():
        z, _ = task.represent(task.load("retain", split["retain"], split))
    y = task.data.train.labels[split["retain"]]
    assert torch.allclose(found.mean[0], z[y == 1].double().sqrt().mean(0), rtol=1e-5)


def test_negative_features_switch_to_the_signed_power():
    task = tiny_classifier()
    task.model = Signed(task.model)
    task.head = "fc"
    found = ClassStatistics.fit(task, task.split(ANT))
    assert found.rule == "signed_power"
    with pytest.raises(DataError, match="signed_power"):
        ClassStatistics.fit(task, task.split(ANT), rule="power")


def test_fit_needs_features_and_samples():
    task = tiny_classifier()
    split = task.split(ANT)
    with pytest.raises(CapabilityError, match="'val' samples"):
        ClassStatistics.fit(task, split, "val")
    task.capabilities = frozenset()
    with pytest.raises(CapabilityError, match="features"):
        ClassStatistics.fit(task, split)


def test_statistics_survive_their_file_and_know_their_model(tmp_path):
    task = tiny_classifier()
    found = ClassStatistics.fit(task, task.everything(), delta=0.25)
    path = tmp_path / "classes.safetensors"
    found.save(path)
    again = ClassStatistics.load(path)
    for name, value in vars(found).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    again.check_model(task.model, "here")
    assert again.select([3, 1]).classes.tolist() == [1, 3]
    assert torch.equal(again.select([3, 1]).mean[1], found.mean[3])
    with pytest.raises(DataError, match="no class 9"):
        again.select([9])
    with torch.no_grad():
        task.model.fc.bias[0] += 1
    with pytest.raises(ArtifactError, match=r"here: .*other weights"):
        again.check_model(task.model, "here")


def test_a_file_of_something_else_is_refused(tmp_path):
    from expunge.files import atomic_save_safetensors

    path = tmp_path / "x.safetensors"
    atomic_save_safetensors(path, {"mean": torch.zeros(2)})
    with pytest.raises(ArtifactError, match="not one of class statistics"):
        ClassStatistics.load(path)
    task = tiny_classifier()
    found = ClassStatistics.fit(task, task.everything())
    ClassStatistics(found.classes[:2], found.count, found.mean, found.covariance).save(path)
    with pytest.raises(ArtifactError, match="do not fit together"):
        ClassStatistics.load(path)


def test_the_weights_digest_sees_through_half_precision():
    model = tiny_classifier(steps=0).model.half()
    half = weights_digest(model)
    assert weights_digest(model.float()) == half
    with torch.no_grad():
        model.fc.bias[0] += 1
    assert weights_digest(model) != half

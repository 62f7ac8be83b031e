"""Properties of the interval penalty (numbers in the test names are those of the specification's list)."""

from __future__ import annotations

import itertools

import pytest
import torch
from interval_layers import REGIONS, drifts, gathered, linear, penalty_of, rows, same, value
from torch import Tensor, nn

from expunge.protections.interval.regions import boxes, row_maximum


def test_1_zero_at_the_snapshot() -> None:
    layer = linear()
    penalty = penalty_of(layer, gathered(layer, rows()))
    loss = penalty()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()
    with torch.no_grad():
        layer.weight += 1e-3
    assert float(penalty().detach()) > 0


@pytest.mark.parametrize("region", REGIONS)
def test_2_even_and_homogeneous_and_linear_in_lambda(region: str) -> None:
    layer = linear()
    parts = gathered(layer, rows())
    dw, db = drifts(layer)
    one = value(layer, parts, dw, db, region=region)
    assert one > 0
    for t in (-1.0, 2.5, 1e-3):
        same(value(layer, parts, t * dw, t * db, region=region), t * t * one)
    same(value(layer, parts, dw, db, region=region, lambda_interval=7.0), 7 * one)


def test_3_free_directions() -> None:
    x = rows(rank=6)
    layer = linear()
    parts = gathered(layer, x)
    dw, db = drifts(layer)
    basis = torch.linalg.svd(torch.cat([x - x.mean(0), x.mean(0)[None]]), full_matrices=False).Vh[:7]
    free = dw - dw @ basis.T @ basis
    assert abs(float(value(layer, parts, free))) < 1e-12 * float(value(layer, parts, dw))
    same(value(layer, parts, dw + 100 * free, db), value(layer, parts, dw, db), rtol=1e-7)
    assert float(value(layer, parts, free, floor=0.1)) > 1e-2


def test_4_mean_compensation() -> None:
    layer = linear()
    parts = gathered(layer, rows())
    dw, db = drifts(layer)
    compensated = -dw @ parts[0].mean
    assert float(value(layer, parts, dw, compensated, residual=0.0, interval=0.0)) < 1e-14
    assert float(value(layer, parts, dw, db, residual=0.0, interval=0.0)) > 1e-3
    same(value(layer, parts, dw, compensated, mean=0.0), value(layer, parts, dw, db, mean=0.0))


def test_5_decomposition_of_the_response() -> None:
    x = rows()
    layer = linear()
    stats = gathered(layer, x)[0]
    full = torch.linalg.qr(torch.cat([stats.basis.T, torch.randn(12, 7).double()], 1))[0].T
    rest = full[5:]
    dw, db = drifts(layer)
    z, rho = (x - stats.mean) @ stats.basis.T, (x - stats.mean) @ rest.T
    split = (dw @ stats.mean + db) + z @ (dw @ stats.basis.T).T + rho @ (dw @ rest.T).T
    same(split, x @ dw.T + db)


def corner_bounds(delta: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    up, down = delta.clamp_min(0), (-delta).clamp_min(0)
    return up @ low - down @ high, up @ high - down @ low


def test_6_7_bounds_are_sound_and_equal_centre_and_width() -> None:
    g = torch.Generator().manual_seed(0)
    delta = torch.randn(6, 4, generator=g).double()
    low, high = -torch.rand(4, generator=g).double(), torch.rand(4, generator=g).double()
    z = low + (high - low) * torch.rand(500, 4, generator=g).double()
    a, b = corner_bounds(delta, low, high)
    assert (z @ delta.T >= a - 1e-12).all()
    assert (z @ delta.T <= b + 1e-12).all()
    vertices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).double() * (high - low) + low
    same((vertices @ delta.T).amax(0), b)
    same((vertices @ delta.T).amin(0), a)
    c, w = (low + high) / 2, high - low
    same(a**2 + b**2, 2 * (delta @ c) ** 2 + (delta.abs() @ w) ** 2 / 2)


def test_8_universal_bound() -> None:
    layer = linear()
    stats = gathered(layer, rows())[0]
    dw, _ = drifts(layer)
    delta = dw @ stats.basis.T
    z = torch.randn(300, 5).double() * 10
    for low, high in zip(*boxes("two_corner", stats.bounds), strict=True):
        a, b = corner_bounds(delta, low, high)
        limit = (z.abs() / (high - low)).amax(1, keepdim=True) * (2 * (a**2 + b**2)).sqrt()
        assert ((z @ delta.T).abs() <= limit * (1 + 1e-12)).all()


def test_9_the_complement_is_as_bad_as_the_envelope() -> None:
    stats = gathered(linear(), rows())[0]
    delta = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)).double()
    z_min, z_max, low, high = stats.bounds
    cells = []
    for choice in itertools.product((0, 1, 2), repeat=5):
        if set(choice) != {1}:
            pick = torch.tensor(choice)
            cells.append(
                (
                    torch.where(pick == 0, low, torch.where(pick == 1, z_min, z_max)),
                    torch.where(pick == 0, z_min, torch.where(pick == 1, z_max, high)),
                )
            )
    complement = row_maximum(delta, torch.stack([c[0] for c in cells]), torch.stack([c[1] for c in cells]))
    envelope = row_maximum(delta, *boxes("env_box", stats.bounds))
    same(complement, envelope)
    same(row_maximum(delta, *boxes("slabs_2k", stats.bounds)), envelope)
    corners = row_maximum(delta, *boxes("two_corner", stats.bounds))
    assert (corners <= envelope + 1e-12).all()
    assert (corners < 0.9 * envelope).any()


def test_10_order_of_bounds() -> None:
    x, retain = rows(), rows(seed=9)
    for actual in (False, True):
        stats = gathered(linear(), x, retain=retain if actual else None, actual_bounds=actual)[0]
        z_min, z_max, low, high = stats.bounds
        assert (low <= z_min).all()
        assert (z_min <= z_max).all()
        assert (z_max <= high).all()
        z, z_r = ((v - stats.mean) @ stats.basis.T for v in (x, retain))
        inside = ((z >= z_min) & (z <= z_max)).double().mean(0)
        assert ((inside - 0.9).abs() <= 2 / 200**0.5).all()
        if actual:
            assert (torch.cat([z, z_r]) >= low - 1e-9).all()
            assert (torch.cat([z, z_r]) <= high + 1e-9).all()


def test_11_orthonormal_directions_in_descending_order() -> None:
    x = rows()
    stats = gathered(linear(), x)[0]
    z = (x - stats.mean) @ stats.basis.T
    same(stats.basis @ stats.basis.T, torch.eye(5).double(), atol=1e-12)
    same(z.mean(0), torch.zeros(5).double(), atol=1e-12)
    same(z.norm(dim=0), torch.linalg.svdvals(x - x.mean(0))[:5])
    assert (stats.basis.gather(1, stats.basis.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("region", "invariant"), [("env_box", True), ("two_corner", False)])
def test_13_sign_flips(region: str, invariant: bool) -> None:
    layer = linear()
    parts = gathered(layer, rows())
    dw, db = drifts(layer)
    flipped = (parts[0].flipped(torch.tensor([1.0, -1, 1, -1, 1]).double()),)
    before, after = (value(layer, p, dw, db, region=region) for p in (parts, flipped))
    if invariant:
        same(after, before)
    else:
        assert abs(float(after - before)) > 1e-3 * float(before)
    same(value(layer, flipped, dw, db, interval=0.0), value(layer, parts, dw, db, interval=0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_14_streaming_is_batch(dtype: torch.dtype) -> None:
    x = rows(400, 300 if dtype == torch.float32 else 12).to(dtype)
    layer = nn.Linear(x.shape[1], 3).to(dtype)
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    whole = gathered(layer, x, 400)[0]
    for other in (gathered(layer, x, 7)[0], gathered(layer, x.flip(0), 64)[0]):
        for name in ("mean", "z_min", "z_max", "low", "high"):
            same(getattr(other, name), getattr(whole, name), **tolerance)
        same(other.covariance.double(), whole.covariance.double(), **tolerance)
    same(whole.covariance.double(), torch.cov(x.double().T, correction=0), **tolerance)


def test_14_quantiles_of_a_sample_are_within_the_stated_error() -> None:
    x = rows(20_000, 4)
    layer = linear(4)
    exact = gathered(layer, x)[0]
    sampled = gathered(layer, x, buffer_bytes=1000 * 4 * 8)[0]
    assert exact.quantile_rows == 20_000
    assert sampled.quantile_rows == 1000
    z = (x - exact.mean) @ exact.basis.T
    error = (0.05 * 0.95 / 1000) ** 0.5
    assert (((z <= sampled.z_min).double().mean(0) - 0.05).abs() < 4 * error).all()
    assert (((z <= sampled.z_max).double().mean(0) - 0.95).abs() < 4 * error).all()
    refined = gathered(layer, x, buffer_bytes=1000 * 4 * 8, passes=2)[0]
    same(refined.z_min, exact.z_min)
    again = gathered(layer, x, batch=333, buffer_bytes=1000 * 4 * 8)[0]
    same(again.z_min, sampled.z_min)
    bounded = gathered(layer, x, retain=x[:5], actual_bounds=True, buffer_bytes=1000 * 4 * 8)[0]
    same(bounded.low, z.amin(0))


def test_15_data_duplication() -> None:
    layer, x = linear(), rows()
    dw, db = drifts(layer)
    alone = {"interval": 0.0, "mean": 0.0}
    for residual, factor in (("covariance", 1.0), ("scatter", 3.0)):
        one, many = (gathered(layer, v, residual=residual) for v in (x, x.repeat(3, 1)))
        same(value(layer, many, dw, db, **alone), factor * value(layer, one, dw, db, **alone), rtol=1e-8)
        rest = {"residual": 0.0}
        same(value(layer, many, dw, db, **rest), value(layer, one, dw, db, **rest), rtol=1e-2)


def test_16_rotation_and_scale() -> None:
    x = rows()
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2)).double())[0]
    layer = linear()
    dw, db = drifts(layer)
    before = value(layer, gathered(layer, x), dw, db)
    same(value(layer, gathered(layer, x @ turn.T), dw @ turn.T, db), before, rtol=1e-8)
    scaled = gathered(layer, 3 * x, margin=6.0)
    same(value(layer, scaled, dw), 9 * value(layer, gathered(layer, x), dw), rtol=1e-8)


def test_17_output_permutation_and_duplication() -> None:
    layer = linear()
    parts = gathered(layer, rows())
    dw, db = drifts(layer)
    order = torch.randperm(7)
    same(value(layer, parts, dw[order], db[order]), value(layer, parts, dw, db))
    double = linear(o=14)
    same(value(double, parts, dw.repeat(2, 1), db.repeat(2)), value(layer, parts, dw, db))

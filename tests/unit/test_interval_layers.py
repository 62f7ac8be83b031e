"""Convolutions, gradients, sharing, precision, persistence (test names carry the numbers of the specification)."""

from __future__ import annotations

import itertools

import pytest
import torch
from interval_layers import REGIONS, drifts, gathered, linear, penalty_of, rows, same, value
from torch import Tensor, nn

from expunge.protections.interval import CollectSettings, PenaltySettings, build, collect, load, save
from expunge.protections.interval.regions import Bounds, boxes


def test_18_pointwise_convolution_is_linear() -> None:
    images = torch.randn(5, 12, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    conv, layer = nn.Conv2d(12, 7, 1).double(), linear()
    flat = images.movedim(1, -1).reshape(-1, 12)
    dw, db = drifts(layer)
    same(value(conv, gathered(conv, images), dw, db), value(layer, gathered(layer, flat), dw, db))


@pytest.mark.parametrize(
    "options",
    [{"padding": 1}, {"padding": 0}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"padding": "same"}],
    ids=str,
)
def test_18_every_tap_costs(options: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, **options).double()
    images = torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(1)).double()
    parts = gathered(conv, images)
    for tap in itertools.product(range(3), repeat=2):
        dw = torch.zeros_like(conv.weight)
        dw[:, :, tap[0], tap[1]] = 1.0
        assert float(value(conv, parts, dw)) > 0
    dw, db = drifts(conv)
    exact = (conv._conv_forward(images, dw, db) ** 2).sum(1).mean()
    retained = gathered(conv, images, retain=images, retain_moments=True)
    alone = {"mean": 0.0, "residual": 0.0, "interval": 0.0, "retain": 1.0}
    same(value(conv, retained, dw, db, **alone) * 4, exact)


def test_18_grouped_convolution_is_the_sum_of_its_groups() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1).double()
    images = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    parts, (dw, db) = gathered(conv, images), drifts(conv)
    total = torch.zeros(()).double()
    for g in range(2):
        one = nn.Conv2d(2, 3, 3, padding=1).double()
        own = gathered(one, images[:, 2 * g : 2 * g + 2])
        total += value(one, own, dw[3 * g : 3 * g + 3], db[3 * g : 3 * g + 3])
    same(value(conv, parts, dw, db), total / 2)


@pytest.mark.parametrize("region", [*REGIONS, "two_random"])
@pytest.mark.parametrize("include_db", [False, True])
def test_19_gradients(region: str, include_db: bool) -> None:
    layer = linear(4, 3)
    parts = gathered(layer, rows(d=4), retain=rows(d=4, seed=4), retain_moments=True)
    options = {"region": region, "include_db": include_db, "floor": 0.3, "retain": 0.7}
    penalty = penalty_of(layer, parts, **options)
    with torch.no_grad():
        layer.weight += drifts(layer)[0]
        layer.bias += drifts(layer)[1]
    (3 * penalty()).backward()
    for p in layer.parameters():
        numeric = torch.zeros_like(p)
        for index in itertools.product(*map(range, p.shape)):
            with torch.no_grad():
                p[index] += 1e-5
                up = penalty()
                p[index] -= 2e-5
                numeric[index] = (up - penalty()) / 2e-5 * 3
                p[index] += 1e-5
        same(p.grad, numeric, rtol=1e-6, atol=1e-6)


def test_20_layer_normalisation() -> None:
    layer = linear()
    parts = gathered(layer, rows())
    twin = linear()
    settings = PenaltySettings(normalize=True)
    one = build({"a": layer}, {"a": parts}, settings)
    two = build({"a": layer, "b": twin}, {"a": parts, "b": parts}, settings)
    dw, db = drifts(layer)
    with torch.no_grad():
        for m in (layer, twin):
            m.weight += dw
            m.bias += db
    same(two(), one())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, o, bias=False).double() for o in (4, 5, 6))
        self.separate = False
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        copy = x.clone() if self.separate or (self.separate is None and self.calls > 2) else x
        return torch.cat([self.q(x), self.k(copy), self.v(x)], -1)


@pytest.mark.parametrize("separate", [False, True, None], ids=["shared", "separate", "only_at_first"])
def test_21_sharing(separate: bool | None) -> None:
    torch.manual_seed(0)
    model = Attention()
    model.separate = separate
    x = rows()
    layers = {n: m for n, m in model.named_modules() if n}
    stats = collect(model, layers, model, lambda: x.split(50), CollectSettings(reduced_dim=5))
    assert stats["q"] is stats["v"] or separate is None
    assert (stats["q"] is stats["k"]) == (separate is False)
    assert stats["k"][0].n_rows == 200
    same(stats["k"][0].z_min, stats["q"][0].z_min)
    same(stats["k"][0].residual, stats["q"][0].residual)
    penalty = build(layers, stats, PenaltySettings())
    forms = {id(layer.form) for layer in penalty.layers.values()}
    assert len(forms) == {False: 1, True: 2, None: 3}[separate]


def test_26_low_precision_weights() -> None:
    layer = linear()
    parts = gathered(layer, rows())
    dw, db = drifts(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.bfloat16())
        half = nn.Linear(12, 7).bfloat16()
        half.load_state_dict(layer.state_dict())
        low, high = penalty_of(half, parts), penalty_of(layer, parts)
        half.weight += dw.bfloat16()
        half.bias += db.bfloat16()
        layer.load_state_dict({n: v.double() for n, v in half.state_dict().items()})
    assert low().dtype == torch.float32
    same(low().double(), high(), rtol=1e-3)


def test_26_no_overflow_in_half_precision() -> None:
    layer = nn.Linear(12, 7).half()
    parts = gathered(linear(), rows() * 1e5)
    penalty = penalty_of(layer, parts)
    with torch.no_grad():
        layer.weight += 0.1
    assert torch.isfinite(penalty())


def test_27_save_and_load_bit_for_bit(tmp_path) -> None:
    model = Attention()
    layers = {n: m for n, m in model.named_modules() if n}
    x = rows()
    settings = CollectSettings(reduced_dim=5, retain_moments=True)
    stats = collect(model, layers, model, lambda: x.split(50), settings, lambda: x.split(64))
    save(stats, tmp_path / "s.safetensors")
    back = load(tmp_path / "s.safetensors")
    assert back["q"] is back["k"]
    one, two = (build(layers, s, PenaltySettings(retain=1.0)) for s in (stats, back))
    with torch.no_grad():
        model.q.weight += 0.1
    assert torch.equal(one(), two())
    fields = ("mean", "basis", "sigma", "z_min", "z_max", "low", "high", "residual", "retain_mean", "retain_cov")
    assert all(torch.equal(getattr(stats["q"][0], f), getattr(back["q"][0], f)) for f in fields)


def test_bounds_are_named() -> None:
    with pytest.raises(ValueError, match="side"):
        boxes("two_random", Bounds(*(torch.zeros(2) for _ in range(4))))

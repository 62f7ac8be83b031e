"""Displaced products against unfolded patches."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from expunge.errors import DataError
from expunge.protections.interval import displaced
from expunge.protections.interval import rows as rows_of
from expunge.protections.interval.accumulate import Sample, Scatter
from expunge.protections.interval.collect import CollectSettings, collect
from expunge.protections.interval.displaced import PatchScatter, worthwhile

GRID = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 3},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": (0, 4), "dilation": (3, 2)},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": 7, "padding": 3, "dilation": 2},
    {"kernel_size": (4, 2), "padding": "same"},
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": (1, 2), "padding": "valid"},
    {"kernel_size": (5, 1), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": (2, 3), "padding": (1, 0), "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
]
collecting = importlib.import_module("expunge.protections.interval.collect")  # the package exports the function
SIZES = [(9, 9), (7, 12), (14, 6)]


def images(size: tuple[int, int], n: int = 5, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(4, 1, 1, generator=g)
    return (torch.randn(n, 4, *size, generator=g).cumsum(-1) + means).to(dtype)


def both(conv: nn.Conv2d, batches: list[Tensor]) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    d, g = rows_of.width(conv, "patches"), conv.groups
    slow, quick = [Scatter(d) for _ in range(g)], [PatchScatter(conv) for _ in range(g)]
    for x in batches:
        for i, rows in rows_of.iterate(x, conv, "patches"):
            assert slow[i].update(rows)
        for i, part in enumerate(x.chunk(g, 1)):
            assert quick[i].update(part)
    assert [s.n for s in slow] == [q.n for q in quick]
    assert [s.compute for s in slow] == [q.compute for q in quick]
    return [(s.finish(), q.finish()) for s, q in zip(slow, quick, strict=True)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", GRID, ids=str)
def test_same_moments(options: dict, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(4, 4, **options)
    if options.get("dilation") == 2 and size[1] == 6 and options["kernel_size"] == 7:
        size = (14, 8)  # a smaller one does not fit the kernel
    batches = [images(size), images((size[0] + 3, size[1] + 2), 3, seed=2), images(size, 1, seed=3)]
    for slow, quick in both(conv, batches):
        torch.testing.assert_close(quick, slow, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("change", ["shift", "kernel", "dilation", "padding"])
def test_the_comparison_can_fail(change: str) -> None:
    conv, x = nn.Conv2d(4, 4, (2, 3), padding=1, dilation=2), images((9, 9))
    other = {
        "shift": conv,
        "kernel": nn.Conv2d(4, 4, (3, 2), padding=1, dilation=2),
        "dilation": nn.Conv2d(4, 4, (2, 3), padding=1),
        "padding": nn.Conv2d(4, 4, (2, 3), padding=2, dilation=2),
    }[change]
    [(slow, _)] = both(conv, [x])
    [(_, quick)] = both(other, [x.roll(1, -1) if change == "shift" else x])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(quick, slow, rtol=1e-3, atol=1e-3)


def test_chunks_do_not_matter(monkeypatch) -> None:
    conv, x = nn.Conv2d(4, 4, 3, padding=1), images((9, 9), 7)
    [(_, whole)] = both(conv, [x])
    monkeypatch.setattr(rows_of, "CHUNK_BYTES", 2 * x[0].numel() * x.element_size())
    [(_, parts)] = both(conv, [x])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert not torch.equal(parts[1], whole[1])  # it did take another way


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_single_precision_stands_large_means(mean: float) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 4, 3)
    x = torch.randn(8, 16, 12, 12) + mean
    [(slow, quick)] = both(conv, [x])
    [(exact, _)] = both(conv, [x.double()])
    for got in (slow, quick):
        torch.testing.assert_close(got, exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", [*GRID, {"kernel_size": 3, "stride": (2, 3), "padding": 1}], ids=str)
def test_single_patches(options: dict, size: tuple[int, int]) -> None:
    conv, x = nn.Conv2d(4, 4, **options), images((size[0], size[1] + 2))
    for g in range(conv.groups):
        rows = torch.cat([part for i, part in rows_of.iterate(x, conv, "patches") if i == g])
        index = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))[:20]
        got = rows_of.patches_at(x, conv, g, index)
        assert torch.equal(got, rows[index])
        assert not torch.equal(got, rows[index.flip(0)])


def test_a_sample_does_not_depend_on_how_rows_are_offered() -> None:
    rows = torch.arange(300.0)[:, None].repeat(1, 2)
    one, two = Sample(40, 5), Sample(40, 5)
    one.update(rows)
    made = []
    for part in rows.split(70):
        two.offer(len(part), lambda index, part=part: made.append(len(index)) or part[index])
    assert torch.equal(one.rows().sort(0).values, two.rows().sort(0).values)
    assert sum(made) < 150
    other = Sample(40, 6)
    other.update(rows)
    assert not torch.equal(one.rows().sort(0).values, other.rows().sort(0).values)


CHOICES = [
    ({"kernel_size": 3, "padding": 1}, (16, 16), True),
    ({"kernel_size": 3, "padding": 1, "groups": 2}, (16, 16), True),
    ({"kernel_size": (1, 5), "padding": "same"}, (16, 16), True),
    ({"kernel_size": 3, "padding": 1, "stride": 2}, (16, 16), False),
    ({"kernel_size": 3, "padding": 1, "groups": 32}, (16, 16), False),
    ({"kernel_size": 1}, (16, 16), False),
    ({"kernel_size": 3}, (3, 3), False),
]


@pytest.mark.parametrize(("options", "size", "quick"), CHOICES, ids=str)
def test_collected_statistics_are_the_same(options: dict, size: tuple[int, int], quick: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, **options).double()
    x = torch.randn(10, 32, *size, generator=torch.Generator().manual_seed(1)).double().cumsum(-1).relu()
    settings = CollectSettings(reduced_dim=3, buffer_bytes=1 << 18)
    assert worthwhile(conv, x, "patches") == quick
    assert not worthwhile(conv, x, "channels")

    def stats(batch: int) -> dict[str, Tensor]:
        parts = collect(conv, {"": conv}, conv, lambda: x.split(batch), settings)[""]
        assert all(p.n_rows == parts[0].n_rows for p in parts)
        fields = ("mean", "covariance", "residual", "z_min", "z_max")
        return {f"{f}{g}": getattr(p, f) for g, p in enumerate(parts) for f in fields}

    got = stats(4)
    monkeypatch.setattr(collecting, "worthwhile", lambda *_: False)
    direct = stats(4)
    torch.testing.assert_close(got, direct, rtol=1e-9, atol=1e-9)
    assert torch.equal(got["mean0"], direct["mean0"]) != quick
    monkeypatch.setattr(displaced, "MIN_CHANNELS", 1000)
    assert not worthwhile(conv, x, "patches")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_input_is_named(bad: float) -> None:
    conv = nn.Conv2d(32, 4, 3, padding=1)
    x = torch.randn(4, 32, 16, 16)
    collect(conv, {"": conv}, conv, lambda: [x], CollectSettings())
    x[2, 5, 0, 15] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        collect(conv, {"": conv}, conv, lambda: [x], CollectSettings())

"""Displaced products against unfolded patches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from expunge.protections.interval import collect as collecting
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
    reach = [e * (k - 1) + 1 for e, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    pad = rows_of.padding(conv)
    fits = size[0] + pad[2] + pad[3] >= reach[0] and size[1] + pad[0] + pad[1] >= reach[1]
    assert fits or options["kernel_size"] == 7
    if fits:
        for slow, quick in both(conv, [images(size), images(size[::-1], 3, seed=2), images(size, 1, seed=3)][: 3 if size[0] == 9 else 1]):
            torch.testing.assert_close(quick, slow, rtol=1e-11, atol=1e-11)


def test_the_comparison_can_fail() -> None:
    x = images((9, 9))
    [(slow, _)] = both(nn.Conv2d(4, 4, 3, padding=1), [x])
    [(_, quick)] = both(nn.Conv2d(4, 4, 3, padding=1), [x.roll(1, -1)])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(quick, slow, rtol=1e-3, atol=1e-3)

"""Small layers, rows and penalties for the interval tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.protections.interval import CollectSettings, PenaltySettings, Statistics, build, collect
from expunge.protections.interval.loss import IntervalPenalty

RTOL = 1e-9
REGIONS = ("two_corner", "env_box", "slabs_2k", "boxes_4", "boxes_8")


def rows(n: int = 200, d: int = 12, rank: int | None = None, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    rank = rank or d
    mix = torch.randn(rank, d, generator=g, dtype=torch.float64) * torch.linspace(2, 0.3, rank)[:, None].double()
    return torch.randn(n, rank, generator=g, dtype=torch.float64) @ mix + torch.randn(d, generator=g).double()


def gathered(layer: nn.Module, x: Tensor, batch: int = 50, retain: Tensor | None = None, **changes: object):
    settings = CollectSettings(**{"reduced_dim": 5, "margin": 2.0, **changes})
    held = None if retain is None else (lambda: retain.split(batch))
    return collect(layer, {"": layer}, layer, lambda: x.split(batch), settings, held)[""]


def linear(d: int = 12, o: int = 7, bias: bool = True, seed: int = 3) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(d, o, bias=bias).double()


def drifts(layer: nn.Module, seed: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(layer.weight.shape, generator=g).double(),
        torch.randn(layer.weight.shape[0], generator=g).double(),
    )


def penalty_of(layer: nn.Module, parts: tuple[Statistics, ...], **changes: object) -> IntervalPenalty:
    settings = PenaltySettings(**{"lambda_interval": 1.0, "normalize": False, **changes})
    return build({"": layer}, {"": parts}, settings)


def value(
    layer: nn.Module, parts: tuple[Statistics, ...], dw: Tensor, db: Tensor | None = None, **changes: object
) -> Tensor:
    penalty = penalty_of(layer, parts, **changes)
    saved = {n: p.detach().clone() for n, p in layer.named_parameters()}
    with torch.no_grad():
        layer.weight += dw.reshape(layer.weight.shape)
        if db is not None and layer.bias is not None:
            layer.bias += db
    result = penalty().detach()
    with torch.no_grad():
        for n, p in layer.named_parameters():
            p.copy_(saved[n])
    return result


def same(a: Tensor, b: Tensor, rtol: float = RTOL, atol: float = 0.0) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)

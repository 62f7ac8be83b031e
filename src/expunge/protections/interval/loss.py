r"""The interval penalty in closed form.

With drift ``D = W - W0`` (o rows), ``e = b - b0``, ``delta = D U^T`` every part of the penalty except the width part
is one quadratic form per output row, constant during the run:

    (1/o) sum_i [ D_i H D_i^T + 2 e_i (h . D_i) + s e_i^2 + 1/2 |delta_i| V |delta_i|^T ]

    mean      ||D mu + e||^2                         H += mu mu^T,           h += mu,    s += 1
    residual  tr(D R D^T) / r                        H += R / r
    interval  sum_b 2 (delta c_b)^2 + (|delta| w_b)^2/2   H += U^T (sum 2 c c^T) U,  V = sum w w^T
    floor     f ||D||^2                              H += f I
    retain    a E ||D x + e||^2 over retain rows     H += a (C_R + mu_R mu_R^T), h += a mu_R, s += a

The sum is even and homogeneous of degree two, so the value is half the inner product of drift and gradient: one
``(o x d)(d x d)`` product yields both. Layers with the same statistics share ``H``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge import rng
from expunge.errors import RequestError
from expunge.protections.interval.regions import Bounds, IntervalMode, Region, moments
from expunge.protections.interval.rows import ConvRows, drift_matrix
from expunge.protections.interval.statistics import Statistics


@dataclass(frozen=True)
class PenaltySettings:
    """Weights and options of the penalty.

    Args:
        lambda_interval: Factor of everything.
        normalize: Divide the sum over layers by their number.
        region: Region of the interval part.
        mode: Which of its parts count.
        normalize_region: Divide the interval part by its number of squared terms.
        include_db: Add the bias drift to every leg of the interval part.
        mean: Weight of the mean part.
        residual: Weight of the residual part.
        interval: Weight of the interval part.
        floor: Weight of the isotropic floor ``||D||^2 / o``.
        retain: Weight of the expected retain drift, per output.
        seed: Seed of the sides of ``two_random``.
    """

    lambda_interval: float = 10.0
    normalize: bool = True
    region: Region = "env_box"
    mode: IntervalMode = "full"
    normalize_region: bool = False
    include_db: bool = False
    mean: float = 1.0
    residual: float = 1.0
    interval: float = 1.0
    floor: float = 0.0
    retain: float = 0.0
    seed: int = 0


def side_of(k: int, seed: int) -> Tensor:
    """Random sides for ``two_random``, ``[k]`` of 0 and 1."""
    return rng.randint(rng.key(seed, "interval side"), torch.arange(k), 2)


class Form:
    """Constants of one weight block per group, stacked: ``H [g, d, d]``, ``h [g, d]``, ``s``, ``U [g, k, d]``, ``V``.

    Args:
        parts: Statistics per group.
        settings: Weights and options.
        dtype: Precision of the penalty, float32 or float64.
        device: Where the weights live.
        sides: Sides for ``two_random`` per group; drawn from the seed when absent.
    """

    def __init__(
        self,
        parts: tuple[Statistics, ...],
        settings: PenaltySettings,
        dtype: torch.dtype,
        device: torch.device,
        sides: tuple[Tensor, ...] | None = None,
    ) -> None:
        d, kmax = parts[0].mean.numel(), max(p.basis.shape[0] for p in parts)
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.H = torch.empty(len(parts), d, d, **like)
        self.lead = torch.zeros(len(parts), kmax + 1, d, **like)  # rows of U, then h
        self.V = torch.zeros(len(parts), kmax, kmax, **like)
        self.s = 0.0
        self.has_width = False
        for i, stats in enumerate(parts):
            self._fill(i, stats, settings, sides[i] if sides else side_of(stats.basis.shape[0], settings.seed))
        self.kmax = kmax

    def _fill(self, i: int, stats: Statistics, settings: PenaltySettings, side: Tensor) -> None:
        target = self.H[i]
        # float32 statistics of wide layers are folded in place, the others in float64
        kind = target.dtype if stats.residual.dtype == torch.float32 else torch.float64
        like: dict[str, Any] = {"dtype": kind, "device": target.device}
        form = target.zero_() if target.dtype == kind else torch.zeros(target.shape, **like)
        mu, basis = stats.mean.to(**like), stats.basis.to(**like)
        k = basis.shape[0]
        if settings.residual and stats.residual_dim:
            form.add_(stats.residual.to(**like), alpha=settings.residual / stats.residual_dim)
        form.addr_(mu, mu, alpha=settings.mean)
        lead, s = settings.mean * mu, settings.mean
        if settings.interval and k and settings.mode != "off":
            m = moments(
                settings.region,
                Bounds(*(b.to(**like) for b in stats.bounds)),
                mode=settings.mode,
                normalize=settings.normalize_region,
                include_db=settings.include_db,
                side=side.to(target.device),
            )
            form.addmm_(basis.T @ m.centre, basis, alpha=settings.interval)
            lead = lead + settings.interval * (m.linear @ basis)
            s += settings.interval * m.bias
            self.V[i, :k, :k] = settings.interval * m.width
            self.lead[i, :k] = basis
            self.has_width = self.has_width or settings.mode != "centre_only"
        if settings.retain:
            if stats.retain_mean is None or stats.retain_cov is None:
                raise RequestError("the retain part needs retain statistics; collect them or set retain_weight to 0")
            mu_r = stats.retain_mean.to(**like)
            form.addr_(mu_r, mu_r, alpha=settings.retain)
            form.add_(stats.retain_cov.to(**like), alpha=settings.retain)
            lead, s = lead + settings.retain * mu_r, s + settings.retain
        if settings.floor:
            form.diagonal().add_(settings.floor)
        self.lead[i, -1] = lead
        if form is not target:
            target.copy_(form)
        self.s = s

    def gradient(self, drift: Tensor, bias: Tensor | None, scale: float = 1.0) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients for weight ``[g, o/g, d]`` and bias ``[g, o/g]`` drift, and the value, all times ``scale``."""
        lead = self.lead if bias is not None else self.lead[:, :-1]
        coupled = drift @ lead.transpose(1, 2)
        side = torch.zeros_like(coupled)
        grad_bias = None
        if bias is not None:
            side[..., -1] = (2 * scale) * bias
            grad_bias = (2 * scale) * (coupled[..., -1] + self.s * bias)
        if self.has_width:
            delta = coupled[..., : self.kmax]
            side[..., : self.kmax] = delta.sign() * (delta.abs() @ (scale * self.V))
        grad = torch.bmm(side, lead).baddbmm_(drift, self.H, alpha=2 * scale)
        value = torch.dot(drift.flatten(), grad.flatten())
        if grad_bias is not None and bias is not None:
            value = value + torch.dot(bias.flatten(), grad_bias.flatten())
        return grad, grad_bias, value / 2

    def split(self, drift: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Quadratic and width part, before ``1/o``."""
        lead = drift @ self.lead.transpose(1, 2)
        quadratic = ((drift @ self.H) * drift).sum()
        if bias is not None:
            quadratic = quadratic + (2 * lead[..., -1] * bias).sum() + self.s * (bias * bias).sum()
        a = lead[..., :-1].abs()
        return quadratic, ((a @ self.V) * a).sum() / 2

    def curvature(self, *, majoriser: bool = False) -> float:
        """Largest eigenvalue of the Hessian of one output row, before ``1/o``.

        For the sign pattern with all responses positive, or (``majoriser``) an upper bound for every pattern, from
        ``(|delta| w)^2 <= (sum w) sum_j w_j delta_j^2``.
        """
        U = self.lead[:, :-1].double()
        V = self.V.double()
        V = torch.diag_embed(V.sum(2)) if majoriser else V
        hessian = 2 * self.H.double() + U.transpose(1, 2) @ V @ U
        return float(torch.linalg.eigvalsh(hessian)[:, -1].max())


class Scratch:
    """One buffer for the drift of whichever layer is being evaluated."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def like(self, x: Tensor) -> Tensor:
        """Uninitialised memory of the shape, type and device of ``x``."""
        b = self._buffer
        if b.numel() < x.numel() or b.dtype != x.dtype or b.device != x.device:
            self._buffer = b = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
        return b[: x.numel()].view(x.shape)


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, layer: ProtectedLayer, scale: float) -> Tensor:
        scale = scale / layer.outputs
        grad, grad_bias, value = layer.form.gradient(*layer.drift(weight, bias), scale)
        ctx.shapes = (weight.shape, weight.dtype, None if bias is None else bias.dtype)
        ctx.grads = (grad, grad_bias)
        return value

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("the interval penalty can be differentiated once per evaluation; evaluate it again")
        (grad, grad_bias), ctx.grads = ctx.grads, None
        shape, dtype, bias_dtype = ctx.shapes
        factor = outputs[0]
        if factor.device.type != "cpu" or float(factor) != 1.0:
            grad.mul_(factor)
            grad_bias = None if grad_bias is None else grad_bias * factor
        left = grad.view(shape).to(dtype) if ctx.needs_input_grad[0] else None
        right = None
        if grad_bias is not None and ctx.needs_input_grad[1]:
            right = grad_bias.flatten().to(bias_dtype)
        return left, right, None, None


class ProtectedLayer:
    """A layer, the snapshot of its weights, and its form.

    Args:
        module: Linear or Conv2d.
        form: Constants; shared between layers with the same statistics.
        conv: Which rows the statistics of a convolution describe. ``channels`` is only meaningful for 1 x 1 kernels.
        weight: Snapshot in the precision of the penalty; the current weight when absent.
        bias: Snapshot of the bias.
        scratch: Buffer shared with other layers.
    """

    def __init__(
        self,
        module: nn.Module,
        form: Form,
        conv: ConvRows = "patches",
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.module, self.form, self.conv = module, form, conv
        self._scratch = scratch or Scratch()
        dtype = form.H.dtype
        has_bias = getattr(module, "bias", None) is not None
        source: Any = module.weight if weight is None else weight
        start: Any = module.bias if bias is None and has_bias else bias
        self.weight: Tensor = source.detach().to(dtype, copy=True)
        self.bias: Tensor | None = start.detach().to(dtype, copy=True) if has_bias else None
        self.outputs = self.weight.shape[0]

    def drift(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Drift as ``[g, o/g, d]`` (valid until the next evaluation) and ``[g, o/g]``, in the penalty's precision."""
        dtype = self.weight.dtype
        moved = torch.sub(weight.detach().to(dtype), self.weight, out=self._scratch.like(self.weight))
        left = drift_matrix(self.module, moved, self.conv)
        if bias is None or self.bias is None:
            return left, None
        return left, (bias.detach().to(dtype) - self.bias).reshape(left.shape[:2])

    def __call__(self, scale: float = 1.0) -> Tensor:
        """Value of the layer times ``scale``, 0-d, with its closed-form gradient attached."""
        return _ClosedForm.apply(self.module.weight, getattr(self.module, "bias", None), self, scale)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Quadratic and width part at the current weights."""
        drift = self.drift(self.module.weight, getattr(self.module, "bias", None))  # type: ignore[arg-type]
        quadratic, width = self.form.split(*drift)
        return quadratic / self.outputs, width / self.outputs


def penalty_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64 weights, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class IntervalPenalty:
    """Sum of the layers' values, ready to be added to a loss.

    Args:
        layers: One callable per protected layer, giving its value times a factor.
        settings: Weights and options.
    """

    def __init__(self, layers: Mapping[str, Callable[[float], Tensor]], settings: PenaltySettings) -> None:
        self.settings, self.layers = settings, dict(layers)

    @property
    def factor(self) -> float:
        """``lambda``, divided by the number of layers if normalised."""
        count = len(self.layers) if self.settings.normalize else 1
        return self.settings.lambda_interval / max(1, count)

    def __call__(self) -> Tensor:
        """The penalty, 0-d, differentiable with respect to weights and biases."""
        return torch.stack([layer(self.factor) for layer in self.layers.values()]).sum()

    def curvature(self, name: str, *, majoriser: bool = False) -> float:
        """Largest curvature of one layer's share of the penalty, lambda and 1/o included.

        Raises:
            RequestError: The layer has no closed form (published convolutions other than 1 x 1).
        """
        layer = self.layers[name]
        if not isinstance(layer, ProtectedLayer):
            raise RequestError(f"layer '{name}' has no closed form, so its curvature is not known")
        return self.factor * layer.form.curvature(majoriser=majoriser) / layer.outputs

    def step_size_limit(self, momentum: float = 0.0, *, majoriser: bool = True) -> float:
        """Largest stable learning rate of plain gradient descent, ``2 (1 + momentum) / curvature``."""
        return step_size_limit(max(self.curvature(n, majoriser=majoriser) for n in self.layers), momentum)


def build(
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, tuple[Statistics, ...]],
    settings: PenaltySettings,
    *,
    conv: ConvRows = "patches",
    snapshot: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    sides: Mapping[str, tuple[Tensor, ...]] | None = None,
) -> IntervalPenalty:
    """The closed-form penalty of some layers.

    Args:
        layers: Protected modules by name.
        statistics: Per layer one entry per group; layers that share the object share the constants.
        settings: Weights and options.
        conv: Rows the statistics of convolutions describe.
        snapshot: Weights and biases by parameter name to measure the drift from; current ones when absent.
        dtype: Precision; by default float64 for float64 weights, else float32.
        sides: Per layer and group the sides for ``two_random``.
    """
    forms: dict[tuple[object, ...], Form] = {}
    snapshot = snapshot or {}
    protected, scratch = {}, Scratch()
    for name, module in layers.items():
        weight: Tensor = module.weight  # type: ignore[assignment]
        kind = dtype or penalty_dtype(weight.dtype)
        tag = (id(statistics[name]), kind, weight.device, name if sides else "")
        if tag not in forms:
            forms[tag] = Form(statistics[name], settings, kind, weight.device, sides[name] if sides else None)
        old = (snapshot.get(f"{name}.weight"), snapshot.get(f"{name}.bias"))
        protected[name] = ProtectedLayer(module, forms[tag], conv, *old, scratch)
    return IntervalPenalty(protected, settings)


def step_size_limit(curvature: float, momentum: float = 0.0) -> float:
    """``2 (1 + momentum) / curvature``; infinite for a flat penalty.

    >>> step_size_limit(4.0, 0.9)
    0.95
    """
    return 2 * (1 + momentum) / curvature if curvature > 0 else float("inf")

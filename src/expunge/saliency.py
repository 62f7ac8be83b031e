"""Weight saliency: scores from one backward pass over the forget set, exact top-k selection, compact masks.

SalUn (Fan et al., ICLR 2024, arXiv 2310.12508), equations 3 and 4: ``m = 1[|grad loss(D_f)| >= gamma]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from expunge import rng
from expunge.digest import json_digest
from expunge.errors import ArtifactError, ConfigError, DataError
from expunge.files import atomic_save_safetensors, read_safetensors
from expunge.patch.changes import pack_mask, unpack_mask
from expunge.tasks.base import Batch, Task

Reduction = Literal["sample_mean", "batch_mean_sum"]
Select = Literal["top", "bottom", "random"]


def saliency_scores(
    task: Task, batches: Iterable[Batch], parameters: Mapping[str, nn.Parameter], reduction: Reduction = "sample_mean"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Absolute value of the loss gradient accumulated over batches.

    The model runs in eval mode and is left as found, its ``.grad`` fields included. Gradients add up in place, so the
    cost is that of the plain passes.

    Args:
        task: Model and loss.
        batches: The forget set, once.
        parameters: What to score.
        reduction: ``sample_mean`` weighs every sample equally. ``batch_mean_sum`` adds the means of batches as
            published, so samples of a short last batch weigh more.

    Returns:
        ``(scores, last)``: per parameter ``|gradient|``, and the signed gradient of the last batch alone.

    Raises:
        DataError: No batch, or a gradient that is not finite.

    Deviates:
        From the public code: equal weight per sample by default, no augmentation, stored order.
    """
    model = task.model
    modes = {m: m.training for m in model.modules()}
    grads = {n: p.grad for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    chosen = {id(p) for p in parameters.values()}
    count = 0
    before: dict[str, Tensor | None] = {}
    try:
        model.eval()
        for _, p in model.named_parameters():
            p.grad = None
            p.requires_grad_(id(p) in chosen)
        pending: Batch | None = None
        for batch in batches:
            if pending is not None:
                _backward(task, pending, reduction)
            pending, count = batch, count + len(batch)
        if pending is None:
            raise DataError("saliency needs at least one forget batch")
        before = {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()}
        _backward(task, pending, reduction)
        scores, last = {}, {}
        for name, p in parameters.items():
            total = torch.zeros_like(p) if p.grad is None else p.grad
            previous = before[name]
            last[name] = total.detach().clone() if previous is None else (total - previous).detach()
            scores[name] = (total.abs() / count if reduction == "sample_mean" else total.abs()).detach()
            if not bool(torch.isfinite(scores[name]).all()):
                raise DataError(f"the saliency gradient of '{name}' has NaN or infinite values")
        return scores, last
    finally:
        for n, p in model.named_parameters():
            p.grad = grads[n]
            p.requires_grad_(flags[n])
        for m, mode in modes.items():
            m.training = mode


def _backward(task: Task, batch: Batch, reduction: Reduction) -> None:
    losses = task.loss(batch)
    (losses.sum() if reduction == "sample_mean" else losses.mean()).backward()


def count_ones(n: int, keep: float, rule: Literal["as_intended", "as_published"] = "as_intended") -> int:
    """Number of ones for a kept fraction.

    >>> count_ones(90, 0.7), count_ones(90, 0.7, "as_published")
    (63, 62)
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep must be in (0, 1], got {keep}: at 0 nothing may change")
    return int(n * keep) if rule == "as_published" else int(Fraction(repr(keep)) * n)


def top_k(scores: Tensor, k: int) -> tuple[Tensor, float]:
    """Mask with exactly ``k`` ones at the largest scores; among equal scores the lowest flat index wins.

    Args:
        scores: Flat, non-negative.
        k: Number of ones, 1 to ``len(scores)``.

    Returns:
        Bool mask and the threshold ``gamma``, the k-th largest score. Linear time.

    >>> top_k(torch.tensor([3.0, 5.0, 1.0, 0.0, 2.0, 4.0]), 3)[0].int().tolist()
    [1, 1, 0, 0, 0, 1]
    """
    flat = scores.detach().cpu().numpy()
    n = flat.size
    if not 1 <= k <= n:
        raise ConfigError(f"the mask needs 1 to {n} ones, got {k}")
    gamma = np.partition(flat, n - k)[n - k]
    mask = flat > gamma
    ties = np.flatnonzero(flat == gamma)
    mask[ties[: k - int(mask.sum())]] = True
    return torch.from_numpy(mask), float(gamma)


@dataclass(frozen=True)
class Mask:
    """One bit per weight: 1 may change.

    Args:
        bits: Bool mask per parameter name.
        keep: Kept fraction asked for.
        gamma: Score threshold (NaN where it does not apply).
        base: Digest of the weights the scores were computed on; empty if unknown.
        forget: Digest of the forget set's indices; empty if unknown.
    """

    bits: Mapping[str, Tensor]
    keep: float
    gamma: float = float("nan")
    base: str = ""
    forget: str = ""

    @property
    def ones(self) -> int:
        """Number of weights that may change."""
        return sum(int(m.sum()) for m in self.bits.values())

    @property
    def numel(self) -> int:
        """Number of weights in all."""
        return sum(m.numel() for m in self.bits.values())

    @property
    def density(self) -> dict[str, float]:
        """Share of ones per parameter."""
        return {n: float(m.float().mean()) for n, m in self.bits.items()}

    def save(self, path: str | Path) -> None:
        """Write bit-packed: at most N/8 bytes plus a short header."""
        flat = torch.cat([m.reshape(-1) for m in self.bits.values()])
        head = {"keep": self.keep, "gamma": self.gamma, "base": self.base, "forget": self.forget, "n": self.numel}
        meta = {"expunge_mask": json.dumps({**head, "layout": layout_digest(self.bits)})}
        atomic_save_safetensors(path, {"mask": pack_mask(flat)}, meta)

    @staticmethod
    def load(path: str | Path, parameters: Mapping[str, Tensor]) -> Mask:
        """Read a mask for exactly these parameters.

        Raises:
            ArtifactError: Not a mask file, or a mask for other parameters.
        """
        tensors, meta = read_safetensors(path)
        try:
            head = json.loads(meta["expunge_mask"])
        except (KeyError, json.JSONDecodeError):
            raise ArtifactError(f"{path}: a safetensors file, but not a saliency mask") from None
        total = sum(p.numel() for p in parameters.values())
        if head["layout"] != layout_digest(parameters):
            raise ArtifactError(
                f"{path}: the mask covers {head['n']} weights in another layout; this space has {total}"
            )
        flat = unpack_mask(tensors["mask"], (total,))
        parts = torch.split(flat, [p.numel() for p in parameters.values()])
        bits = {n: part.reshape(p.shape) for (n, p), part in zip(parameters.items(), parts, strict=True)}
        return Mask(bits, head["keep"], head["gamma"], head["base"], head["forget"])

    def check(self, base: str, forget: str, where: str) -> None:
        """Refuse a mask that was made for other weights or another forget set.

        Raises:
            ArtifactError: It was; a mask that does not know where it came from is accepted.
        """
        for what, mine, theirs in (("weights", self.base, base), ("forget set", self.forget, forget)):
            if mine and mine != theirs:
                raise ArtifactError(f"{where}: the mask was made for other {what} ({mine[:12]} against {theirs[:12]})")


def layout_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names and shapes, in order."""
    return json_digest([[n, list(t.shape)] for n, t in tensors.items()])


def make_mask(
    scores: Mapping[str, Tensor],
    keep: float,
    *,
    scope: Literal["global", "layer"] = "global",
    select: Select = "top",
    rule: Literal["as_intended", "as_published"] = "as_intended",
    key: int = 0,
) -> Mask:
    """Select the weights that may change.

    Args:
        scores: Non-negative score per parameter.
        keep: Fraction of ones, in (0, 1].
        scope: Rank all weights together, or each parameter on its own (a control).
        select: ``top`` scores, or the controls ``bottom`` and ``random`` of equal size.
        rule: How ``keep * N`` is rounded, see :func:`count_ones`.
        key: Key of the random control's draw.

    Raises:
        ConfigError: ``keep`` selects nothing.
    """
    flat = {n: s.reshape(-1) for n, s in scores.items()}
    groups = [list(flat)] if scope == "global" else [[n] for n in flat]
    bits: dict[str, Tensor] = {}
    gamma = float("nan")
    for number, names in enumerate(groups):
        joined = torch.cat([flat[n] for n in names])
        n = joined.numel()
        k = count_ones(n, keep, rule)
        if scope == "layer":
            k = max(k, 1)
        if k < 1:
            raise ConfigError(f"keep = {keep} of {n} weights selects none; at least {1 / n:.2g} is needed")
        if select == "top":
            chosen, gamma = top_k(joined, k)
        elif select == "bottom":
            chosen = ~top_k(joined, n - k)[0] if k < n else torch.ones(n, dtype=torch.bool)
        else:
            chosen = torch.zeros(n, dtype=torch.bool)
            chosen[rng.permutation(rng.key(key, "random mask", number), n)[:k]] = True
        for name, part in zip(names, torch.split(chosen, [flat[m].numel() for m in names]), strict=True):
            bits[name] = part.reshape(scores[name].shape)
    return Mask(bits, keep, gamma if scope == "global" else float("nan"))

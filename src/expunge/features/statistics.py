"""Mean and covariance of every class's features, gathered in one streamed pass and kept in a file of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from expunge.digest import combine, named_tensors, tensor_digest
from expunge.errors import ArtifactError, CapabilityError, DataError
from expunge.files import atomic_save_safetensors, read_safetensors
from expunge.restore import evaluating
from expunge.tasks.base import Split, Task

#: ``power``: ``(z + eps)^delta``. ``signed_power``: ``sign(z) |z|^delta``.
Tukey = Literal["power", "signed_power"]
#: ``all``: mean over every off-diagonal entry. ``nonzero``: zeros are left out, as published.
OffDiagonal = Literal["all", "nonzero"]

_FORMAT = "expunge_class_statistics"
_HELD_BYTES = 128 << 20  # features held back before they are merged, so that every class comes in blocks


def tukey(z: Tensor, delta: float, rule: Tukey = "power", eps: float = 0.0, *, exact_slope: bool = False) -> Tensor:
    """Element-wise power that makes skewed features more symmetric.

    Args:
        z: Features of any shape.
        delta: Exponent; 1 leaves the features as they are.
        rule: ``power`` is NaN for negative features; ``signed_power`` takes the power of the magnitude.
        eps: Added to the feature (for ``signed_power`` to the magnitude, and its power taken off again).
        exact_slope: Keep the infinite slope of ``z^delta`` at 0 (``delta < 1``) in the gradient; otherwise the gradient
            there is 0, as behind a ReLU.
    """
    if delta == 1:
        return z + eps if rule == "power" else z
    base = z + eps if rule == "power" else z.abs() + eps
    if exact_slope or not base.requires_grad:
        powered = base**delta
    else:
        zero = base == 0
        powered = torch.where(zero, 0, torch.where(zero, 1, base) ** delta)
    return powered if rule == "power" else z.sign() * (powered - eps**delta)


def shrink(S: Tensor, gamma1: float, gamma2: float, passes: int = 1, offdiag: OffDiagonal = "all") -> Tensor:
    """``S + gamma1 V1 I + gamma2 V2 (ones - I)``, ``passes`` times over, V1 and V2 taken anew each time.

    V1 is the mean of the diagonal, V2 the mean of the other entries. With ``all`` and ``gamma1 >= gamma2 >= 0`` the
    result of a covariance is positive semi-definite; with ``nonzero`` it may be indefinite.

    Args:
        S: Covariances ``[..., D, D]``.
        gamma1: Strength on the diagonal.
        gamma2: Strength elsewhere.
        passes: Repetitions; two of strength 3 amount to one of strength 15 (with ``all``).
        offdiag: Which entries V2 is the mean of.
    """
    D, S = S.shape[-1], S.clone()
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    for _ in range(passes):
        trace = diagonal.sum(-1)
        if offdiag == "nonzero":
            number = ((S != 0).sum((-2, -1)) - (diagonal != 0).sum(-1)).clamp_min(1)
        else:
            number = torch.tensor(max(D * (D - 1), 1))
        v1, v2 = trace / D, (S.sum((-2, -1)) - trace) / number
        S += (gamma2 * v2)[..., None, None]
        diagonal += (gamma1 * v1 - gamma2 * v2)[..., None]
    return S


def correlation(S: Tensor) -> Tensor:
    """``S_ij / sqrt(S_ii S_jj)`` of ``[..., D, D]``: unit diagonal."""
    s = S.diagonal(dim1=-2, dim2=-1).sqrt()
    return S / (s[..., :, None] * s[..., None, :])


def weights_digest(model: nn.Module) -> str:
    """Digest of a model's weights that does not depend on whether half-precision weights are held in full precision."""
    half = (torch.float16, torch.bfloat16)
    tensors = named_tensors(model)[0]
    return combine({n: tensor_digest(t.float() if t.dtype in half else t) for n, t in tensors.items()})


@dataclass(frozen=True)
class ClassStatistics:
    """Moments of each class's features after the Tukey power.

    Attributes:
        classes: Class numbers, ascending, int64 ``[K]``.
        count: Samples of each class, int64 ``[K]``.
        mean: float64 ``[K, D]``.
        covariance: Unbiased, float64 ``[K, D, D]``.
        delta: Exponent of the power.
        rule: Which power.
        eps: Its offset.
        names: Class names, for messages.
        model: Digest of the weights that produced the features.
    """

    classes: Tensor
    count: Tensor
    mean: Tensor
    covariance: Tensor
    delta: float = 0.5
    rule: Tukey = "power"
    eps: float = 0.0
    names: tuple[str, ...] = ()
    model: str = ""

    def tukey(self, z: Tensor, *, exact_slope: bool = False) -> Tensor:
        """The power that the statistics were taken after."""
        return tukey(z, self.delta, self.rule, self.eps, exact_slope=exact_slope)

    def name(self, index: int) -> str:
        """Name of the class at a position, for messages."""
        number = int(self.classes[index])
        return f"class '{self.names[index]}'" if self.names else f"class {number}"

    def select(self, classes: Sequence[int]) -> ClassStatistics:
        """Statistics of these classes only.

        Raises:
            DataError: There are none for one of them.
        """
        missing = [c for c in classes if c not in self.classes.tolist()]
        if missing:
            raise DataError(f"the statistics have no class {missing[0]}; they hold {self.classes.tolist()}")
        at = torch.isin(self.classes, torch.tensor(list(classes), dtype=torch.int64)).nonzero()[:, 0]
        names = tuple(self.names[int(i)] for i in at) if self.names else ()
        moments = (self.classes[at], self.count[at], self.mean[at], self.covariance[at])
        return ClassStatistics(*moments, self.delta, self.rule, self.eps, names, self.model)

    @classmethod
    def of(
        cls,
        batches: Iterator[tuple[Tensor, Tensor]],
        classes: Sequence[int],
        *,
        delta: float = 0.5,
        rule: Tukey = "power",
        eps: float = 0.0,
        names: Sequence[str] = (),
        model: str = "",
    ) -> Self:
        """Statistics of a stream of (features ``[B, D]``, labels ``[B]``); labels of other classes are passed over.

        The moments are merged block by block in float64 (Chan, Golub, LeVeque 1983), so the order of the samples does
        not matter.

        Raises:
            DataError: Negative features under ``power``, features that are not finite, or a class with fewer than two
                samples; the class is named.
        """
        merge = _Moments(torch.tensor(sorted(classes)))
        held: list[tuple[Tensor, Tensor]] = []
        for z, y in batches:
            z = z.detach().cpu()
            z = z.float() if z.element_size() < 4 else z
            if not bool(torch.isfinite(z.sum(dtype=torch.float64))):
                raise DataError("the model has features that are NaN or infinite; no statistics can be taken of them")
            if rule == "power" and delta != 1 and bool((z < 0).any()):
                raise _NegativeError("the model has negative features, whose power is undefined: use 'signed_power'")
            held.append((tukey(z, delta, rule, eps), y.cpu()))
            if sum(t.nbytes for t, _ in held) >= _HELD_BYTES:
                merge.add(held)
                held = []
        merge.add(held)
        names = tuple(names[c] for c in sorted(classes)) if names else ()
        for i, c in enumerate(sorted(classes)):
            if merge.count[i] < 2:
                who = f"class '{names[i]}'" if names else f"class {c}"
                raise DataError(
                    f"{who} has {merge.count[i]} sample(s) to take statistics of and needs at least 2 for a covariance"
                )
        count = torch.tensor(merge.count)
        covariance = merge.scatter.div_((count - 1).double()[:, None, None])
        return cls(torch.tensor(sorted(classes)), count, merge.mean, covariance, delta, rule, eps, names, model)

    @classmethod
    def fit(
        cls,
        task: Task,
        split: Split,
        role: str = "retain",
        batch_size: int = 512,
        *,
        delta: float = 0.5,
        rule: Tukey | None = None,
        eps: float = 0.0,
        classes: Sequence[int] | None = None,
    ) -> Self:
        """Statistics of a role's samples, in eval mode, without augmentation, in one pass.

        Args:
            task: A classifier with features.
            split: Index sets.
            role: Whose samples.
            batch_size: Images at a time.
            delta: Exponent.
            rule: Which power; by default ``power``, unless negative features are met: then the pass starts again with
                ``signed_power``.
            eps: Offset of the power.
            classes: Class numbers; by default all that the request does not remove.

        Raises:
            CapabilityError: The task has no features, or no samples of this role.
            DataError: See :meth:`of`.
        """
        task.require(frozenset({"features"}), "class statistics")
        if role not in split:
            raise CapabilityError(f"class statistics need '{role}' samples; give a file of statistics instead")
        settings: dict[str, Any] = {
            "classes": [c for c in range(task.n_classes) if c not in split.removed] if classes is None else classes,  # type: ignore[attr-defined]
            "delta": delta,
            "eps": eps,
            "names": tuple(getattr(task, "classes", ())),
            "model": weights_digest(task.model),
        }

        def passing() -> Iterator[tuple[Tensor, Tensor]]:
            for ids in torch.split(split[role], batch_size):
                batch = task.load(role, ids, split)
                yield task.represent(batch)[0], batch.targets.cpu()  # type: ignore[attr-defined]

        with evaluating(task.model):
            try:
                return cls.of(passing(), rule=rule or "power", **settings)
            except _NegativeError:
                if rule is not None:
                    raise
                return cls.of(passing(), rule="signed_power", **settings)

    def check_model(self, model: nn.Module, where: str) -> None:
        """Refuse statistics that were taken with other weights.

        Raises:
            ArtifactError: They were.
        """
        if self.model != weights_digest(model):
            raise ArtifactError(
                f"{where}: these are the class statistics of a model with other weights; take them anew"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, atomically."""
        meta = {"delta": self.delta, "rule": self.rule, "eps": self.eps, "names": self.names, "model": self.model}
        tensors = {k: getattr(self, k) for k in ("classes", "count", "mean", "covariance")}
        atomic_save_safetensors(path, tensors, {_FORMAT: json.dumps(meta)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: Broken, or no class statistics.
        """
        tensors, meta = read_safetensors(path)
        try:
            head = json.loads(meta[_FORMAT])
            head["names"] = tuple(head["names"])
            found = cls(tensors["classes"], tensors["count"], tensors["mean"], tensors["covariance"], **head)
            K, D = found.mean.shape
            whole = found.classes.shape == found.count.shape == (K,) and found.covariance.shape == (K, D, D)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: a safetensors file, but not one of class statistics ({error})") from None
        if not whole or found.rule not in ("power", "signed_power"):
            raise ArtifactError(f"{path}: the class statistics do not fit together (shapes or settings)")
        return found


class _NegativeError(DataError):
    """Negative features met a power that is undefined for them."""


class _Moments:
    """Running count, mean and scatter of each class."""

    def __init__(self, classes: Tensor) -> None:
        self.classes, K = classes, len(classes)
        self.count = [0] * K
        self.mean = self.scatter = torch.zeros(K, 0, dtype=torch.float64)

    def add(self, held: list[tuple[Tensor, Tensor]]) -> None:
        if not held:
            return
        rows, labels = torch.cat([t for t, _ in held]), torch.cat([y for _, y in held])
        if not self.mean.numel():
            K, D = len(self.classes), rows.shape[1]
            self.mean, self.scatter = (torch.zeros(K, *shape, dtype=torch.float64) for shape in ((D,), (D, D)))
        for i, c in enumerate(self.classes.tolist()):
            own = labels == c
            if bool(own.any()):
                self._merge(i, rows[own])

    def _merge(self, i: int, t: Tensor) -> None:
        t = t.double()
        mean, n, m = t.mean(0), self.count[i], len(t)
        t -= mean
        self.scatter[i].addmm_(t.T, t)
        step = mean - self.mean[i]
        if n:
            self.scatter[i].addr_(step, step, alpha=n * m / (n + m))
        self.mean[i] += step * (m / (n + m))
        self.count[i] = n + m

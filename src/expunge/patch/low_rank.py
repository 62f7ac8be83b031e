"""The smallest form of a change whose matrix has a low rank.

The forget gradient of a text tower for a single prompt of ``T`` tokens has rank at most ``T`` in every linear layer:
``T (out + in)`` numbers instead of ``out * in``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.patch.changes import Change, LowRank, accumulate_dtype, smallest

#: Largest error of the factors' product, in units of the rounding of the change's numbers.
_TOLERANCE = 16.0


@torch.no_grad()
def compress(delta: Tensor, *, tolerance: float = _TOLERANCE) -> Change | None:
    """The change as factors if they reproduce it to rounding and take fewer bytes, else dense or sparse.

    The range of the matrix is found from its products with a growing number of random vectors, in float64, so that the
    cost is that of a few products for a low rank; then the singular values decide about the rank.

    Args:
        delta: The change, of any shape; the first dimension counts as the rows of a matrix.
        tolerance: Largest error of an element relative to the largest element, in units of the rounding ``eps`` of the
            change's numbers. The same bound holds for the Frobenius norm of the error relative to that of the change.

    Returns:
        ``None`` if the change is zero.
    """
    plain = smallest(delta)
    if plain is None or delta.ndim < 2:
        return plain
    dtype = accumulate_dtype(delta.dtype)
    matrix = delta.reshape(delta.shape[0], -1)
    rows, columns = matrix.shape
    most = (plain.nbytes - 1) // ((rows + columns) * dtype.itemsize)
    factors = _factors(matrix, min(most, min(rows, columns)), tolerance * torch.finfo(dtype).eps, dtype)
    if factors is None:
        return plain
    return LowRank(factors[0].cpu(), factors[1].cpu(), tuple(delta.shape))


def rank(matrix: Tensor, *, tolerance: float = _TOLERANCE) -> int:
    """Number of singular values above ``tolerance * eps`` of the largest, with ``eps`` of the matrix's numbers."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > tolerance * torch.finfo(matrix.dtype).eps * values[0]).sum())


def _factors(matrix: Tensor, most: int, allowed: float, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    wide = matrix.double()
    size, largest = torch.linalg.matrix_norm(wide), wide.abs().max()
    generator = torch.Generator().manual_seed(0)
    width = min(8, most)
    while width:
        probes = torch.randn(wide.shape[1], width, generator=generator, dtype=torch.float64).to(wide.device)
        basis = torch.linalg.qr(wide @ probes)[0]
        inner = basis.T @ wide
        if torch.linalg.matrix_norm(wide - basis @ inner) <= allowed * size:
            break
        if width == most:
            return None
        width = min(2 * width, most)
    else:
        return None
    u, s, vh = torch.linalg.svd(inner, full_matrices=False)
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # error of cutting before each value
    start = max(1, int((tails > allowed * size).sum()))
    for r in range(start, len(s) + 1):
        root = s[:r].sqrt()
        up, down = (basis @ (u[:, :r] * root)).to(dtype), (root[:, None] * vh[:r]).to(dtype)
        error = (up @ down).double() - wide
        if error.abs().max() <= allowed * largest and torch.linalg.matrix_norm(error) <= allowed * size:
            return up.contiguous(), down.contiguous()
    return None

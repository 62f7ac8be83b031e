"""Small models and patches for the patch tests."""

import torch
from torch import nn

from expunge.digest import model_digest, named_tensors, state_digests
from expunge.patch import Dense, LowRank, Manifest, Patch, Sparse

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(6, 5)
        self.bn = nn.BatchNorm1d(5)
        self.b = nn.Linear(5, 4, bias=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight


def manifest(model: nn.Module) -> Manifest:
    tensors, aliases = named_tensors(model)
    return Manifest(base_digest=model_digest(model), base_tensors=state_digests(tensors), aliases=aliases)


def draw(shape, seed, scale=0.1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def sparse(shape, seed, density=0.3, scale=0.1):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    return Sparse(mask, draw((int(mask.sum()),), seed + 1, scale))


def patches_of(model: nn.Module) -> list[Patch]:
    """Three additive patches that overlap in both matrices, of all three additive kinds."""
    m = manifest(model)
    return [
        Patch({"a.weight": Dense(draw((5, 6), 1)), "a.bias": sparse((5,), 2, 0.6), "b.weight": sparse((4, 5), 3)}, m),
        Patch({"a.weight": sparse((5, 6), 4), "b.weight": LowRank(draw((4, 2), 5), draw((2, 5), 6), (4, 5))}, m),
        Patch({"a.weight": LowRank(draw((5, 1), 7), draw((1, 6), 8), (5, 6)), "b.weight": Dense(draw((4, 5), 9))}, m),
    ]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, bytes]:
    return {n: bits(t) for n, t in model.state_dict().items()}

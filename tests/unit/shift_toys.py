"""A toy U-Net with cross-attention, prompts with a common first token, and shifts of them."""

import torch
from torch import Tensor, nn

from expunge.diffusion.nullspace import null_space
from expunge.diffusion.selection import cross_attention
from expunge.diffusion.shift import Shift

WIDTH, TOKENS, CHANNELS = 32, 5, 8
NAMES = ["null", "a", "b", "c"]


class Attention(nn.Module):
    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, width, bias=False), nn.Linear(states, width, bias=False)
        self.to_v = nn.Linear(states, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        scores = self.to_q(x) @ self.to_k(states).transpose(1, 2)
        return self.to_out[0](scores.softmax(-1) @ self.to_v(states))


class Block(nn.Module):
    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width), Attention(width, states)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        return x + self.attn2(x, states)


class Toy(nn.Module):
    """Predicts noise ``[B, C, H, W]`` with two blocks of self- and cross-attention."""

    def __init__(self, states: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(CHANNELS, states) for _ in range(2)])

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        h = x.flatten(2).transpose(1, 2) + (t.to(x.dtype) / 1000)[:, None, None]
        for block in self.blocks:
            h = block(h, states)
        return h.transpose(1, 2).reshape(x.shape)


def make_toy() -> Toy:
    torch.manual_seed(0)
    model = Toy()
    for parameter in cross_attention(model).values():
        parameter.data.mul_(3)
    return model.requires_grad_(False)


def make_prompts() -> dict[str, Tensor]:
    """States with a common first row, as a causal encoder gives."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(1, WIDTH, generator=generator)
    return {n: torch.cat([first, torch.randn(TOKENS - 1, WIDTH, generator=generator)]) for n in NAMES}


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, CHANNELS, 2, 2, generator=generator), torch.tensor([10, 500, 900])


def made(model: nn.Module, prompts: dict[str, Tensor], protected: list[str], seed: int | None = 3) -> Shift:
    basis = null_space(torch.stack([prompts[p] for p in protected]))
    shift = Shift.on(model, basis.vectors, beta=0.5)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for omega in shift.omega.values():
            omega.data.copy_(torch.randn(omega.shape, generator=generator))
    return shift


def many(states: Tensor, n: int = 3) -> Tensor:
    return states.expand(n, -1, -1).contiguous()

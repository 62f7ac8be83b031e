"""Null spaces of text states: ranks, capacity, exactness, and when they refuse."""

import pytest
import torch
from torch import Tensor

from expunge.diffusion.nullspace import (
    capacity,
    component,
    erasable,
    null_space,
    predicted_rank,
    published_elimination,
    rows,
)
from expunge.errors import DataError, RequestError

TOKENS, WIDTH = 77, 768


def causal(ids: list[list[int]], width: int, seed: int = 0) -> Tensor:
    """States of a causal encoder: a token's state depends on the tokens up to it, and on nothing else."""
    known: dict[tuple[int, ...], Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for prompt in ids:
        for i in range(len(prompt)):
            known.setdefault(tuple(prompt[: i + 1]), torch.randn(width, generator=generator))
    return torch.stack([torch.stack([known[tuple(p[: i + 1])] for i in range(len(p))]) for p in ids])


def prompt(*words: int, length: int = 6) -> list[int]:
    return [90, *words, *[91] * (length - 1 - len(words))]


@pytest.mark.parametrize(("others", "left"), [(0, 691), (1, 615), (4, 387), (9, 7)])
def test_directions_left_by_distinct_prompts(others: int, left: int) -> None:
    ids = [prompt(*([i] if i else []), length=TOKENS) for i in range(others + 1)]
    states = causal(ids, WIDTH)
    basis = null_space(states)
    assert basis.capacity.left == left == 691 - 76 * others
    assert basis.capacity.rank == predicted_rank(torch.tensor(ids))
    assert str(basis.capacity).startswith(f"{left} directions left")
    identity = torch.eye(left, dtype=torch.float64)
    assert float((basis.vectors @ basis.vectors.T - identity).abs().max()) < 1e-12
    assert basis.residual == float((rows(states) @ basis.vectors.T).abs().max()) <= 1e-10
    assert basis.residual <= 1e-12 * float(torch.linalg.matrix_norm(rows(states), 2))
    beyond = causal([prompt(99, length=TOKENS)], WIDTH, seed=1)[0].double()
    assert float((beyond @ basis.vectors.T).abs().max()) > 0.01


def test_capacity_is_reported_without_a_basis() -> None:
    states = causal([prompt(), prompt(1), prompt(2)], 17)
    room = capacity(states)
    assert (room.rank, room.left, room.dim, room.prompts) == (16, 1, 17, 3)
    assert str(room) == "1 direction left: 3 protected prompts span 16 of 17 dimensions"
    assert room.exact
    assert room.kept > 1e-6
    assert room.dropped == 0


def test_more_prompts_than_fit_are_an_error_that_says_how_many() -> None:
    states = causal([prompt(*([i] if i else [])) for i in range(7)], 24)
    names = ["", *(f"c{i}" for i in range(1, 7))]
    assert capacity(states).left == 0
    with pytest.raises(RequestError, match=r"protecting 7 prompts .* of 24 .* the first 4 \(up to 'c3'\) fit"):
        null_space(states, prompts=names)
    assert null_space(states[:4]).capacity.left == 24 - 6 - 15
    with pytest.raises(RequestError, match="the first 0 fit"):
        null_space(states[:, :, :6])


def test_shared_beginnings_cost_no_direction() -> None:
    ids = [prompt(), prompt(1, 2), prompt(1, 2, 3), prompt(1, 4), prompt(1, 2)]
    states = causal(ids, 40)
    assert predicted_rank(torch.tensor(ids)) == capacity(states).rank == 6 + 5 + 3 + 4 == len(rows(states))
    again = null_space(states[[3, 0, 2, 4, 1, 1]])
    assert torch.allclose(null_space(states).projector, again.projector, atol=1e-12)
    nearly = states.clone()
    nearly[4] += 0.1 * torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    assert capacity(nearly).rank == 6 + 5 + 3 + 4 + 6


def test_rows_keep_their_order_and_bits() -> None:
    states = torch.tensor([[[3.0, 1.0], [2.0, 5.0]], [[3.0, 1.0], [0.1, 5.0]]])
    assert torch.equal(rows(states), torch.tensor([[3.0, 1.0], [2.0, 5.0], [0.1, 5.0]]).double())


def test_a_tolerance_trades_prompts_for_a_stated_leak() -> None:
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -6, 20, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(30, 20, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(32, 20, generator=generator, dtype=torch.float64))[0]
    states = (left * decay @ right.T).reshape(5, 6, 32)
    exact, loose = null_space(states, tolerance=1e-8), null_space(states, tolerance=1e-3)
    assert (exact.capacity.exact, loose.capacity.exact) == (True, False)
    assert loose.vectors.shape[0] > exact.vectors.shape[0] == 12
    assert "not exact" in str(loose.capacity)
    assert "not exact" not in str(exact.capacity)
    omega = torch.randn(7, len(loose.vectors), generator=generator, dtype=torch.float64)
    delta = omega @ loose.vectors
    leak = torch.linalg.matrix_norm(rows(states) @ delta.T)
    allowed = loose.capacity.dropped * 1.0 * torch.linalg.matrix_norm(delta, 2) * 20**0.5
    assert 1e-8 < float(leak) <= float(allowed)


def test_states_must_be_those_that_the_network_sees() -> None:
    states = causal([prompt(), prompt(1)], 32)
    half = states.bfloat16()
    of_float, of_half = null_space(states), null_space(half)
    wide = half.double().flatten(0, 1)
    assert float((wide @ of_half.vectors.T).abs().max()) < 1e-12
    assert float((wide @ of_float.vectors.T).abs().max()) > 1e-4


def test_erasable_energy_warns_of_protected_tokens() -> None:
    concept, longer, other = prompt(1), prompt(1, 2), prompt(3)
    states = causal([prompt(), concept, longer, other], 64)
    apart = erasable(states[1], null_space(states[[0, 3]]))
    pinned = erasable(states[1], null_space(states[[0, 2]]))
    assert 0 < pinned < apart < 1
    assert erasable(states[1], null_space(states[:2])) < 1e-24
    with pytest.raises(RequestError, match="contain everything"):
        component(null_space(states[:2]).vectors, states[1])


def test_the_component_of_a_concept_acts_on_it_like_the_whole_null_space() -> None:
    states = causal([prompt(), prompt(1), prompt(2), prompt(3)], 64)
    basis = null_space(states[[0, 2]])
    own = component(basis.vectors, states[1])
    assert own.shape == (5, 64)
    assert float((own @ own.T - torch.eye(5, dtype=torch.float64)).abs().max()) < 1e-12
    assert float((rows(states[[0, 2]]) @ own.T).abs().max()) < 1e-10
    delta = torch.randn(8, len(basis.vectors), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    delta = delta @ basis.vectors
    within = delta @ own.T @ own
    concept, elsewhere = states[1].double(), states[3].double()
    assert torch.allclose(concept @ within.T, concept @ delta.T, atol=1e-10)
    assert not torch.allclose(elsewhere @ within.T, elsewhere @ delta.T, atol=0.1)
    assert (elsewhere @ within.T).norm() < (elsewhere @ delta.T).norm()
    assert component(basis.vectors, states[[1, 3]]).shape == (10, 64)


def test_the_published_elimination_counts_rounding_as_rank() -> None:
    states = causal([prompt(), prompt(1), prompt(2)], 40)
    vectors = published_elimination(states)
    assert len(vectors) == null_space(states).capacity.left == 24
    assert float((rows(states) @ vectors.T).abs().max()) < 1e-4
    mixed = torch.cat([states, (0.3 * states[1] + 0.7 * states[2])[None]])
    assert null_space(mixed).capacity.left == 24
    assert len(published_elimination(mixed)) < 24
    assert len(published_elimination(causal([prompt(*([i] if i else [])) for i in range(9)], 12))) == 0


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (torch.ones(6, 8), "prompts, tokens, width"),
        (torch.ones(0, 6, 8), "not empty"),
        (torch.zeros(2, 6, 8), "all text states are zero"),
    ],
)
def test_unusable_states(states: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        null_space(states)


def test_a_broken_state_is_named() -> None:
    states = causal([prompt(), prompt(1)], 32)
    states[1, 2, 5] = float("nan")
    with pytest.raises(DataError, match="prompt 1, token 2 is not finite"):
        capacity(states)

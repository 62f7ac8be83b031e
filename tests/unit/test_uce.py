"""UCE: the invariants of the closed form, which states prompts contribute, and debiasing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eraser_toys import normal
from torch import Tensor

from expunge.diffusion import uce
from expunge.errors import ConfigError, DataError, RequestError
from expunge.patch.changes import Dense, LowRank

D = 12
W = {"k": normal(8, D, seed=1), "v": normal(6, D, seed=2)}
C, G, P = normal(3, D, seed=3), normal(3, D, seed=4), normal(4, D, seed=5)
PAIRS = [uce.Pair(c[None], g[None]) for c, g in zip(C, G)]


def _new(pairs: list[uce.Pair] = PAIRS, keep: Tensor | None = P, **settings: Any) -> dict[str, Tensor]:
    wide = {n: w.double() for n, w in W.items()}
    solved = uce.edit(wide, pairs, keep, **settings)
    return {n: uce.applied(w, solved.changes.get(n)) for n, w in wide.items()}


def _objective(new: Tensor, old: Tensor, lamb: float, s_e: float, s_p: float) -> Tensor:
    c, g, p = C.double(), G.double(), P.double()
    erased = (c @ new.T - g @ old.T).square().sum()
    kept = (p @ new.T - p @ old.T).square().sum()
    return s_e * erased + s_p * kept + lamb * (new - old).square().sum()


def test_the_solution_is_the_minimum() -> None:
    """Autograd sees no slope at the solution of the ridge regression, and one beside it."""
    for lamb, s_e, s_p in ((0.5, 1.0, 1.0), (0.01, 0.3, 2.0)):
        for name, new in _new(lamb=lamb, erase_scale=s_e, preserve_scale=s_p).items():
            for factor in (1.0, 1.001):
                here = (new * factor).requires_grad_()
                (slope,) = torch.autograd.grad(_objective(here, W[name].double(), lamb, s_e, s_p), here)
                assert (float(slope.abs().max()) < 1e-10) == (factor == 1.0)


def test_a_large_lambda_returns_the_maps() -> None:
    far = _new(lamb=1e18)
    assert all(torch.equal(far[n].float(), W[n]) for n in W)
    assert not any(torch.equal(v.float(), W[n]) for n, v in _new(lamb=1.0).items())


def test_a_guide_that_is_the_concept_changes_nothing() -> None:
    same = [uce.Pair(C, C)]
    solved = uce.edit(W, same, P)
    assert solved.changes == {}
    assert torch.equal(uce.applied(W["k"], solved.changes.get("k")), W["k"])
    assert set(uce.edit(W, [uce.Pair(C, C + 1e-3)], P).changes) == set(W)


def test_a_small_lambda_reaches_the_guides() -> None:
    for name, new in _new(keep=None, lamb=1e-9).items():
        torch.testing.assert_close(new @ C.double().T, W[name].double() @ G.double().T, rtol=0, atol=1e-6)
    new = _new(lamb=1e-9)["k"]  # seven independent states in twelve dimensions: preserved ones stay as well
    torch.testing.assert_close(new @ P.double().T, W["k"].double() @ P.double().T, rtol=0, atol=1e-6)
    far = _new(keep=None, lamb=10.0)["k"]
    assert float((far @ C.double().T - W["k"].double() @ G.double().T).abs().max()) > 0.1


def test_the_order_of_concepts_does_not_matter_but_turns_do() -> None:
    there, back = _new(), _new(PAIRS[::-1], P.flip(0))
    for name in W:
        torch.testing.assert_close(there[name], back[name], rtol=1e-12, atol=1e-12)
    first = uce.edit(W, PAIRS[:1], P)
    turns = uce.edit({n: uce.applied(w, first.changes[n]) for n, w in W.items()}, PAIRS[1:], P)
    after = uce.applied(uce.applied(W["k"], first.changes["k"]), turns.changes["k"])
    assert not torch.allclose(after.double(), there["k"], atol=1e-3)


def test_changes_take_the_smaller_form_and_are_exact() -> None:
    few, many = uce.edit(W, PAIRS[:1]), uce.edit(W, [uce.Pair(normal(9, D, seed=7), normal(9, D, seed=8))])
    assert isinstance(few.changes["k"], LowRank)
    assert few.changes["k"].up.shape == (8, 1)
    assert isinstance(many.changes["k"], Dense)
    assert (few.rank, many.rank) == (1, 9)
    for solved in (few, many):
        for name, change in solved.changes.items():
            assert change.dense().dtype == torch.float32
            off = W[name] + change.dense() - uce.applied(W[name], change)
            assert float(off.abs().max()) <= 2e-6
    assert uce.edit({n: w.double() for n, w in W.items()}, PAIRS[:1]).changes["k"].dense().dtype == torch.float64
    half = {"k": W["k"].half()}
    change = uce.edit(half, PAIRS[:1]).changes["k"]
    assert change.dense().dtype == torch.float32
    assert uce.applied(half["k"], change).dtype == torch.float16


def test_tensor_technique_leaves_no_part_along_the_concept() -> None:
    block = uce.Pair(C, G)
    solved = uce.edit({"k": W["k"].double()}, [block], None, lamb=1e-12, technique="tensor")
    got = C.double() @ uce.applied(W["k"].double(), solved.changes["k"]).T
    own, wanted = C.double() @ W["k"].double().T, G.double() @ W["k"].double().T
    assert abs(float((got * own).sum() / own.norm())) < 1e-6
    assert abs(float((wanted * own).sum() / own.norm())) > 0.1
    with pytest.raises(RequestError, match="maps the edited states to zero"):
        uce.edit({"k": torch.zeros(3, D)}, [block], None, technique="tensor")


def test_what_prompts_contribute() -> None:
    a = uce.Prompt.masked(normal(7, D, seed=9), torch.tensor([1, 1, 1, 1, 0, 0, 0]))
    b = uce.Prompt.masked(normal(7, D, seed=10), torch.tensor([1, 1, 1, 1, 1, 1, 0]))
    empty = uce.Prompt.masked(normal(7, D, seed=11), torch.tensor([1, 1, 0, 0, 0, 0, 0]))
    assert (a.last, b.last, empty.last) == (2, 4, 0)
    last = uce.pair(a, empty)
    assert torch.equal(last.edit, a.states[2:3])
    assert torch.equal(last.guide, empty.states[:1])
    span = uce.pair(a, b, "span")
    assert torch.equal(span.edit, a.states[2:5])
    assert torch.equal(span.guide, b.states[4:7])
    assert torch.equal(uce.pair(b, a, "span").edit, span.guide)
    assert torch.equal(uce.pair(a, b, "all").guide, b.states)
    assert torch.equal(uce.preserved([a, b]), torch.stack([a.states[2], b.states[4]]))
    assert uce.preserved([a, b], "span").shape == (14, D)
    with pytest.raises(DataError, match="no prompts"):
        uce.preserved([])
    with pytest.raises(DataError, match="last token among them"):
        uce.Prompt(a.states, 7)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="lambda must be positive"):
        uce.edit(W, PAIRS, lamb=0.0)
    with pytest.raises(ConfigError, match="not be negative"):
        uce.edit(W, PAIRS, erase_scale=-1.0)
    with pytest.raises(DataError, match="no pairs"):
        uce.edit(W, [])
    with pytest.raises(DataError, match="k has shape"):
        uce.edit({"k": torch.ones(3, D + 1)}, PAIRS)
    with pytest.raises(DataError, match="not finite"):
        uce.edit(W, [uce.Pair(C * float("nan"), G)])
    with pytest.raises(DataError, match="preserved states"):
        uce.edit(W, PAIRS, P[:, 1:])
    with pytest.raises(DataError, match="must both be"):
        uce.Pair(C, G[:2])


def test_debias_walks_until_the_ratios_fit() -> None:
    """Ratios that follow the edit linearly are brought to the wanted ones, the faster the larger the step."""
    concepts, attributes, want = C[:1], normal(2, D, seed=12), torch.tensor([[0.5, 0.5]])
    calls = []

    def measure(changes: Any) -> Tensor:
        calls.append(len(changes))
        if not changes:
            return torch.tensor([[0.9, 0.1]])
        moved = concepts.double() @ changes["k"].dense().double().T
        towards = (attributes.double() @ W["k"].double().T).diff(dim=0)
        share = 0.1 + 0.4 * float((moved * towards).sum() / towards.square().sum())
        return torch.tensor([[1 - share, share]])

    rounds = {}
    for step in (1.0, 0.5):
        calls.clear()
        result = uce.debias(W, concepts, attributes, want, measure, step_size=step)
        assert result.converged
        assert calls[0] == 0
        assert len(calls) == len(result.gaps)
        assert float(result.gaps[-1].abs().max()) < 0.05
        rounds[step] = len(result.gaps)
    assert rounds[0.5] > rounds[1.0] > 1
    short = uce.debias(W, concepts, attributes, want, measure, step_size=0.5, max_rounds=1)
    assert not short.converged
    assert len(short.gaps) == 2
    assert short.solved is not None
    done = uce.debias(W, concepts, attributes, torch.tensor([[0.9, 0.1]]), measure)
    assert done.converged
    assert done.solved is None
    with pytest.raises(DataError, match="measured ratios"):
        uce.debias(W, concepts, attributes, want, lambda changes: torch.ones(1, 3))


def test_attributes_may_differ_between_concepts() -> None:
    gaps, shared = normal(2, 3, seed=13), normal(3, D, seed=14)
    one = uce.debias_guides(C[:2], shared, gaps)
    torch.testing.assert_close(one, uce.debias_guides(C[:2], shared.expand(2, -1, -1), gaps))
    torch.testing.assert_close(one[1], C[1].double() + gaps[1].double() @ shared.double())
    assert not torch.allclose(one, uce.debias_guides(C[:2], shared, gaps, step_size=0.1))

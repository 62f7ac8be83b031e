"""Concept shifts as patches; merging, recovering, and what concepts do to one another."""

import pytest
import torch
from shift_toys import TOKENS, Toy, made, make_prompts, make_toy
from torch import Tensor

from expunge.diffusion.merge import cast_effect, effects, merge, merge_published, reproject
from expunge.diffusion.nullspace import component, null_space
from expunge.diffusion.selection import key_value
from expunge.diffusion.shift import Shift, invariance
from expunge.errors import RequestError
from expunge.patch.changes import Dense, LowRank


@pytest.fixture
def toy() -> Toy:
    return make_toy()


@pytest.fixture
def prompts() -> dict[str, Tensor]:
    return make_prompts()


def test_every_form_of_a_change_is_the_same_change(toy: Toy, prompts) -> None:
    shift = made(toy, prompts, ["null", "a", "b"])
    for name, delta in shift.deltas().items():
        forms = {f: shift.change(name, f) for f in ("factors", "dense", "smallest")}
        assert isinstance(forms["factors"], LowRank)
        assert isinstance(forms["dense"], Dense)
        for change in forms.values():
            assert torch.allclose(change.dense().double(), delta, rtol=1e-5, atol=1e-5)
        assert forms["smallest"].nbytes == min(c.nbytes for c in forms.values())
        assert torch.allclose(shift.delta(name).double(), delta, atol=1e-5)
    shift.omega[name].data.zero_()
    assert set(shift.changes()) == set(shift.omega) - {name}
    assert not made(toy, prompts, ["null"], seed=None).changes()


def test_coefficients_of_low_rank_are_stored_as_such(toy: Toy, prompts) -> None:
    shift = made(toy, prompts, ["null"])
    for omega in shift.omega.values():
        omega.data[:] = omega[:, :1] * omega[:1]
    change = shift.change(next(iter(shift.omega)))
    assert isinstance(change, LowRank)
    assert change.up.shape[1] == 1
    confined = Shift.on(toy, component(shift.vectors, prompts["c"]), beta=0.5)
    assert len(confined.vectors) == TOKENS - 1 < len(shift.vectors)


def shifts_of(toy: Toy, prompts: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Three concepts; ``c`` came last, so that ``a`` and ``b`` do not protect it."""
    order = {"a": ["null", "b"], "b": ["null", "a"], "c": ["null", "a", "b"]}
    return {n: made(toy, prompts, p, seed=i).deltas() for i, (n, p) in enumerate(order.items())}


def test_merging_is_blind_to_order_and_recovers_every_bit(toy: Toy, prompts) -> None:
    base, shifts = dict(key_value(toy)), shifts_of(toy, prompts)
    every = [merge(base, shifts, order) for order in (["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a", "a"])]
    assert all(torch.equal(m[n], every[0][n]) for m in every for n in base)
    recovered = merge(base, shifts, ["a", "c"])
    assert all(torch.equal(recovered[n], merge(base, {k: shifts[k] for k in "ca"}, "ca")[n]) for n in base)
    none = merge(base, shifts, [])
    assert all(torch.equal(none[n], base[n]) and none[n].data_ptr() != base[n].data_ptr() for n in base)
    naive = {n: (base[n] + shifts["a"][n].float()) - shifts["a"][n].float() for n in base}
    assert not all(torch.equal(naive[n], base[n]) for n in base)


def test_merging_keeps_what_no_shift_touches() -> None:
    base = {"w": torch.tensor([[-0.0, 1.0]]), "v": torch.ones(1, 2)}
    shifts = {2: {"w": torch.tensor([[0.0, 1e-9]])}, 10: {"w": torch.tensor([[0.0, 5e-8]])}}
    merged = merge(base, shifts, {10, 2})
    assert torch.equal(torch.signbit(merged["w"]), torch.tensor([[True, False]]))
    assert torch.equal(merged["v"], base["v"])
    assert merge(base, shifts, [2], dtype=torch.float64)["w"].dtype == torch.float64
    with pytest.raises(RequestError, match="no shift of 3"):
        merge(base, shifts, [3])
    with pytest.raises(RequestError, match="which the base lacks"):
        merge({"v": base["v"]}, shifts, [2])
    with pytest.raises(RequestError, match=r"the shape \[1, 2\], the base \[2, 2\]"):
        merge({"w": torch.ones(2, 2)}, shifts, [2])


def test_published_merging_adds_more_of_the_first_model() -> None:
    base = {n: torch.zeros(1) for n in ("x.attn2.to_k.weight", "x.attn2.to_q.weight", "x.attn1.to_k.weight")}
    models = {i: {n: torch.full((1,), float(i)) for n in base} for i in (1, 2)}
    merged = merge_published(base, models, [2, 1])
    assert [float(merged[n]) for n in base] == [3.0, 1.0, 0.0]
    assert [float(t) for t in merge_published(base, models, [2]).values()] == [2.0, 0.0, 0.0]


def test_what_a_cast_does_to_protected_prompts(toy: Toy, prompts) -> None:
    base, shifts = dict(key_value(toy)), shifts_of(toy, prompts)
    protected = {"null": prompts["null"]}
    found = cast_effect(base, shifts, ["a", "b", "c"], protected)
    moved = [found[d].relative for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert moved[0] <= 1e-12 < moved[1] < 1e-6 < moved[2] < 3e-3 < moved[3] < 3e-2
    control = cast_effect(base, shifts, ["a"], {"c": prompts["c"]}, [torch.float64])
    assert control[torch.float64].relative > 0.1
    same = invariance(base, base, protected)["null"]
    assert (same.equal, same.relative) == (True, 0.0)
    with pytest.raises(RequestError, match="share no tensor"):
        invariance(base, {}, protected)


def test_later_concepts_are_reported_and_can_be_protected_afterwards(toy: Toy, prompts) -> None:
    base, shifts = dict(key_value(toy)), shifts_of(toy, prompts)
    found = {(e.erased, e.on): e for e in effects(base, shifts, prompts)}
    assert len(found) == 9
    open_pairs = {pair for pair, e in found.items() if not e.protected}
    assert open_pairs == {("a", "c"), ("b", "c")}
    assert found["a", "c"].later
    assert not found["c", "a"].later
    assert "'c' came later and is not protected" in str(found["a", "c"])
    assert str(found["c", "a"]) == "erasing 'c' leaves 'a' as it is"
    vectors = null_space(torch.stack([prompts["null"], prompts["b"]])).vectors
    again = shifts | {"a": reproject(shifts["a"], component(vectors, prompts["c"]))}
    healed = {(e.erased, e.on): e for e in effects(base, again, prompts)}
    assert {pair for pair, e in healed.items() if not e.protected} == {("b", "c")}
    still = [float((prompts["a"].double() @ d["a"][n].T).norm()) for d in (shifts, again) for n in list(base)[:1]]
    assert still[1] > 0.3 * still[0]

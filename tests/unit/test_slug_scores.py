"""Scores, filters, fronts, layer choice and low-rank changes of SLUG."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.errors import CapabilityError, ConfigError, DivergedError, RequestError
from expunge.models.towers import Towers
from expunge.patch.changes import Dense, LowRank, Sparse
from expunge.patch.low_rank import compress, rank
from expunge.slug.pareto import front, nondominated
from expunge.slug.pick import PUBLISHED_FALLBACK, deepest, deepest_published, expand, pick
from expunge.slug.scores import (
    Consumer,
    LayerScore,
    candidate_names,
    candidates,
    score_layers,
    step_size,
)
from expunge.tasks.tiny_clip import tiny_towers


def layer(name: str, alignment: float, importance: float, tower: str = "language", block: int | None = 0) -> LayerScore:
    return LayerScore(name, tower, block, "other", 1.0, importance, 1.0, alignment * importance)


@pytest.fixture(scope="module", params=["transformers", "open_clip"])
def towers(request: pytest.FixtureRequest) -> Towers:
    return tiny_towers(request.param, layers=2, width=16)


def gradients(towers: Towers, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in towers.parameters().items()}


# -- fronts (I8) -------------------------------------------------------------------------------------------------------

levels = st.sampled_from([0.0, 0.1, 0.2, 0.2000001, 0.5, 1.0])
points = st.lists(st.tuples(levels | st.floats(0, 1), levels | st.floats(0, 10)), min_size=1, max_size=30)


@given(points, st.randoms(use_true_random=False))
def test_front_equals_brute_force(rows: list, random) -> None:
    def beaten(p: tuple, q: tuple) -> bool:
        return q[0] < p[0] and q[1] > p[1]

    found = nondominated(rows)
    assert found == [i for i, p in enumerate(rows) if not any(beaten(p, q) for q in rows)]
    members = [rows[i] for i in found]
    assert all(any(beaten(p, q) for q in members) for i, p in enumerate(rows) if i not in found)
    most = max(y for _, y in rows)
    assert (min(x for x, y in rows if y == most), most) in members
    order = list(range(len(rows)))
    random.shuffle(order)
    assert sorted(order[i] for i in nondominated([rows[i] for i in order])) == found


def test_ties_survive_and_numbers_are_checked() -> None:
    assert nondominated([(0.1, 2.0), (0.1, 1.0), (0.2, 2.0), (0.2, 1.9)]) == [0, 1, 2]
    assert nondominated([]) == []
    with pytest.raises(ConfigError, match="not a number"):
        nondominated([(math.nan, 1.0)])


def test_front_is_per_tower_in_published_order() -> None:
    rows = [
        layer("a", 0.1, 1.0), layer("b", 0.5, 3.0), layer("c", 0.3, 2.0), layer("d", 0.4, 1.5),
        layer("v", 0.9, 0.1, "vision"),
    ]  # fmt: skip
    assert [s.name for s in front(rows, "language")] == ["b", "c", "a"]
    assert [s.name for s in front(rows)] == ["v", "b", "c", "a"]


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_the_definitions(towers: Towers) -> None:
    f, r = gradients(towers, 1), gradients(towers, 2)
    for score in score_layers(towers, f, r):
        a, b, w = (
            t.detach().double().flatten() for t in (f[score.name], r[score.name], towers.parameters()[score.name])
        )
        assert score.importance == pytest.approx(float(a.norm() / w.norm()), rel=1e-12)
        assert score.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-9, abs=1e-12)
        assert score.rho == pytest.approx(max(0.0, float(a @ b)) / float(a @ a), rel=1e-9, abs=1e-15)
        assert score.unit * score.importance == pytest.approx(1)
        json.dumps(score.row(), allow_nan=False)


def test_scaling_the_forget_loss_scales_importance_only(towers: Towers) -> None:
    """I5; a power of two, so that it holds bit for bit."""
    f, r = gradients(towers, 1), gradients(towers, 2)
    before = score_layers(towers, f, r)
    after = score_layers(towers, {n: 8 * g for n, g in f.items()}, r)
    assert [s.importance for s in after] == [8 * s.importance for s in before]
    assert [s.alignment for s in after] == [s.alignment for s in before]
    assert [s.name for s in front(after)] == [s.name for s in front(before)]
    weights = towers.parameters()
    for s, t in zip(before, after, strict=True):
        step = step_size(weights[s.name], f[s.name], 0.1)
        assert torch.equal(step * f[s.name], step_size(weights[s.name], 8 * f[s.name], 0.1) * (8 * f[s.name]))
        assert step == pytest.approx(0.1 * s.unit)
        assert t.unit == s.unit / 8
    squared = score_layers(towers, {n: g**2 for n, g in f.items()}, r)
    assert [s.alignment for s in squared] != [s.alignment for s in before]


def test_zero_norms_do_not_divide(towers: Towers) -> None:
    f, r = gradients(towers, 1), gradients(towers, 2)
    names = candidate_names(towers)
    dead, still, orthogonal = names[0], names[1], names[2]
    f[dead], r[orthogonal] = torch.zeros_like(f[dead]), torch.zeros_like(r[orthogonal])
    weight = towers.parameters()[still]
    original = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    try:
        scores = score_layers(towers, f, r)
    finally:
        with torch.no_grad():
            weight.copy_(original)
    by = {s.name: s for s in scores}
    assert by[dead].importance == 0
    assert by[dead].unit == math.inf
    assert by[still].importance == math.inf
    assert by[orthogonal].cosine == 0
    kept, out = candidates(towers, scores)
    assert "cannot influence the output" in out[dead]
    assert "all its weights are zero" in out[still]
    assert orthogonal in [s.name for s in kept]
    with pytest.raises(CapabilityError, match=f"{dead}.*exactly zero"):
        candidates(towers, scores, only=[dead])
    with pytest.raises(CapabilityError, match="without a gradient"):
        step_size(weight, f[dead], 0.1)
    f[names[3]][0] = math.nan
    with pytest.raises(DivergedError, match=names[3].replace(".", r"\.")):
        score_layers(towers, f, r)


def test_published_quirks(towers: Towers) -> None:
    f, r = gradients(towers, 1), gradients(towers, 2)
    name = candidate_names(towers)[0]
    f[name] *= 1e-9
    plain = {s.name: s for s in score_layers(towers, f, r)}
    quirky = {s.name: s for s in score_layers(towers, f, r, published=True)}
    assert quirky[name].alignment < 0.1 * plain[name].alignment
    if towers.library == "transformers":
        assert plain["visual_projection.weight"].tower == "vision"
        assert quirky["visual_projection.weight"].tower == "language"
    assert {n for n in plain if plain[n].tower != quirky[n].tower} <= {"visual_projection.weight", "logit_scale"}


# -- candidates (I9) ---------------------------------------------------------------------------------------------------


def test_filter(towers: Towers) -> None:
    scores = score_layers(towers, gradients(towers, 1), gradients(towers, 2))
    kept, out = candidates(towers, scores)
    names = [s.name for s in kept]
    assert names == candidate_names(towers)
    assert len(names) + len(out) == len(scores)
    assert not [
        n for n in names if any(w in n for w in ("bias", "logit_scale", "position", "embedding", "norm", "ln_"))
    ]
    assert all(s.tower in ("vision", "language") for s in kept)
    projection = {"transformers": "visual_projection.weight", "open_clip": "visual.proj"}[towers.library]
    assert next(s for s in kept if s.name == projection).tower == "vision"
    more, _ = candidates(towers, scores, norms="include")
    norms = {s.name for s in more} - set(names)
    assert norms
    assert all(towers.place(n).part == "norm" for n in norms)
    with pytest.raises(CapabilityError, match=r"logit_scale.*never edited"):
        candidates(towers, scores, only=["logit_scale"])
    with pytest.raises(RequestError, match="no score"):
        candidates(towers, scores, only=["nothing"])
    with pytest.raises(CapabilityError, match="norms='include'"):
        candidates(towers, scores, only=[next(iter(norms))])
    chosen, rest = candidates(towers, scores, only=names[:2])
    assert [s.name for s in chosen] == names[:2]
    assert rest[names[2]] == "other layers were asked for"


def test_what_a_consumer_never_reads_is_no_candidate(towers: Towers) -> None:
    scores = score_layers(towers, gradients(towers, 1), gradients(towers, 2))
    reads = Consumer("vision", hidden_state=-2, final_norm=False, projection=False)
    kept, out = candidates(towers, scores, norms="include", consumer=reads)
    assert {s.block for s in kept} == {None, 0}
    assert {s.tower for s in kept} == {"vision"}
    outside = [s.name for s in kept if s.block is None]
    assert outside
    assert all("pre" in n or "conv1" in n for n in outside)
    last = next(n for n in out if towers.place(n).block == 1 and towers.place(n).tower == "vision" and "bias" not in n)
    with pytest.raises(CapabilityError, match="hidden state -2, formed before block 1"):
        candidates(towers, scores, norms="include", consumer=reads, only=[last])
    normed, _ = candidates(towers, scores, norms="include", consumer=replace(reads, final_norm=True))
    assert len(normed) == len(kept) + 1
    whole, _ = candidates(towers, scores, norms="include", consumer=Consumer("vision"))
    assert [s.name for s in whole] == [
        s.name for s in candidates(towers, scores, norms="include")[0] if s.tower == "vision"
    ]


# -- choice ------------------------------------------------------------------------------------------------------------


def test_policies() -> None:
    stem = "text_model.encoder.layers.{}.mlp.fc1.weight"
    members = [
        layer(stem.format(0), 0.9, 9.0, block=0),
        layer(stem.format(3), 0.5, 5.0, block=3),
        layer("text_projection.weight", 0.4, 4.5, block=None),
        layer(stem.format(3).replace("fc1", "fc2"), 0.3, 4.0, block=3),
        layer(stem.format(1), 0.1, 1.0, block=1),
    ]
    assert pick(members)[0].name.endswith("3.mlp.fc2.weight")
    assert pick(members[::-1])[0].name.endswith("3.mlp.fc2.weight")
    assert pick(members, published=True)[0].name.endswith("3.mlp.fc1.weight")
    assert pick(members, "best_aligned")[0].block == 1
    assert pick(members, "most_important")[0].block == 0
    assert pick(members[::-1], "all") == members
    assert pick([members[2]]) == []
    assert pick([]) == []
    assert pick(members[:1]) == members[:1]
    with pytest.raises(RequestError, match=r"layers\.11"):
        pick(members[:1], published=True)
    assert deepest_published([]) == PUBLISHED_FALLBACK
    assert deepest([]) is None


def test_whole_layers_in_both_libraries() -> None:
    fused = "visual.transformer.resblocks.4.attn.in_proj_weight"
    assert expand(fused, [fused]) == [fused]
    mlp = [f"visual.transformer.resblocks.4.mlp.{n}.weight" for n in ("c_fc", "c_proj")]
    assert expand(mlp[1], mlp) == mlp
    assert expand(mlp[1], mlp, "tensor") == mlp[1:]
    with pytest.raises(RequestError, match="no such tensor"):
        expand(mlp[1], mlp[1:])
    with pytest.raises(RequestError):
        expand(PUBLISHED_FALLBACK, [])


# -- low rank ----------------------------------------------------------------------------------------------------------


def test_a_single_prompt_delta_of_width_768_takes_a_twentieth() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(768, 4, generator=generator), torch.randn(4, 768, generator=generator)
    delta = 1e-3 * (up @ down)
    found = compress(delta)
    assert isinstance(found, LowRank)
    assert found.up.shape == (768, 4)
    assert 20 * found.nbytes <= Dense(delta).nbytes
    error = (found.dense() - delta).double()
    eps = torch.finfo(torch.float32).eps
    assert float(error.norm() / delta.double().norm()) <= 16 * eps
    assert float(error.abs().max()) <= 16 * eps * float(delta.abs().max())
    assert compress(delta + 1e-6 * torch.randn(delta.shape, generator=generator)).kind == "dense"


@pytest.mark.parametrize("shape", [(12, 9), (40, 3, 2, 2), (7, 300)])
def test_factors_only_where_they_are_smaller(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, columns = shape[0], math.prod(shape[1:])
    one = torch.outer(torch.randn(rows, generator=generator), torch.randn(columns, generator=generator)).reshape(shape)
    found = compress(one)
    assert isinstance(found, LowRank)
    assert found.shape == shape
    assert torch.allclose(found.dense(), one, rtol=0, atol=1e-6 * float(one.abs().max()))
    full = torch.randn(shape, generator=generator)
    assert isinstance(compress(full), Dense)
    assert torch.equal(compress(full).dense(), full)


def test_other_forms() -> None:
    assert compress(torch.zeros(4, 4)) is None
    assert isinstance(compress(torch.ones(5)), Dense)
    sparse = torch.zeros(64, 64)
    sparse[3, 4] = 1.0
    assert isinstance(compress(sparse), LowRank | Sparse)
    assert compress(sparse).nbytes <= 8 * 128
    exact = compress(torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 9)).double())
    assert exact.dense().dtype == torch.float64


def test_rank() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(30, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    assert rank(matrix) == 3
    assert rank(torch.randn(30, 20, generator=generator)) == 20

"""Gradients of SLUG against plain autograd, and their cache (I3, I4, I6, I7, I13)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expunge.errors import ArtifactError, ConfigError, DataError, DivergedError, InvariantError, RequestError
from expunge.models.towers import Tokens, Towers
from expunge.patch.changes import Dense, LowRank
from expunge.patch.low_rank import compress, rank
from expunge.slug import gradient_cache
from expunge.slug.differentiate import Loader, Pairs, rebatched
from expunge.slug.gradient_cache import cached_gradients, gradient_key, load_gradients, save_gradients
from expunge.slug.gradients import Gradients, assert_ascent, forget_gradient, retain_gradient, slug_gradients
from expunge.slug.losses import contrastive_losses, contrastive_parts, forget_losses, unit
from expunge.slug.published import published_gradients
from expunge.slug.scores import candidate_names, score_layers, step_size
from expunge.tasks.tiny_clip import BOS, EOS, tiny_towers

FORGET, RETAIN, LENGTH = 7, 9, 6


@pytest.fixture(scope="module", params=["transformers", "open_clip"])
def towers(request: pytest.FixtureRequest) -> Towers:
    """Double precision, so that equality is meant as such."""
    found = tiny_towers(request.param, layers=2, width=16)
    found.model.double()
    return found


def texts(n: int, seed: int, same: bool = False) -> Tokens:
    ids = torch.randint(1, BOS, (1 if same else n, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = BOS, EOS
    return Tokens(ids.expand(n, -1).contiguous())


def split(n: int, seed: int, *, same: bool = False, dtype: torch.dtype = torch.float64) -> Pairs:
    pixels = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Pairs(pixels.to(dtype), texts(n, seed + 100, same))


def loader(pairs: Pairs, size: int, order: list[int] | None = None) -> Loader:
    rows = torch.tensor(order) if order else torch.arange(len(pairs))

    def batches() -> Iterator[Pairs]:
        for ids in rows.split(size):
            yield Pairs(pairs.pixels[ids], pairs.tokens[ids])

    return batches


def direct(towers: Towers, loss: Callable[[], Tensor], names: list[str]) -> dict[str, Tensor]:
    parameters = towers.parameters()
    grads = torch.autograd.grad(loss(), [parameters[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, grads, strict=True)}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-10) -> bool:
    assert set(got) == set(want)
    largest = max(float(t.abs().max()) for t in want.values())
    return all(float((got[n] - want[n]).abs().max()) <= tolerance * largest for n in want)


def every(towers: Towers) -> list[str]:
    return list(towers.parameters())


# -- forget gradient (I4, I13) -----------------------------------------------------------------------------------------


def test_forget_gradient_is_autograd_of_the_mean_whatever_the_batches(towers: Towers) -> None:
    pairs = split(FORGET, 0)
    want = direct(
        towers, lambda: forget_losses(towers.image(pairs.pixels), towers.text(pairs.tokens)).mean(), every(towers)
    )
    for size, order in ((1, None), (3, None), (FORGET, None), (3, [6, 0, 5, 1, 4, 2, 3])):
        got, facts = forget_gradient(towers, loader(pairs, size, order), names=every(towers))
        assert close(got, want)
        assert facts["n"] == FORGET
    assert float(want[candidate_names(towers)[0]].abs().max()) > 0
    batch_means, _ = forget_gradient(towers, loader(pairs, 3), names=every(towers), weighting="batches")
    assert not close(batch_means, want, 1e-3)


@pytest.mark.parametrize("side", ["vision", "language"])
def test_one_tower_is_part_of_both(towers: Towers, side: str) -> None:
    pairs, kept = split(FORGET, 0), split(RETAIN, 1)
    both, _ = forget_gradient(towers, loader(pairs, 3), names=every(towers))
    one, _ = forget_gradient(towers, loader(pairs, 3), side)
    assert set(one) == set(towers.parameters(side))
    assert close(one, {n: both[n] for n in one})
    for size in (None, 4):
        joint, _ = retain_gradient(towers, loader(kept, 3), names=every(towers), batch_size=size)
        alone, _ = retain_gradient(towers, loader(kept, 3), side, batch_size=size)
        assert close(alone, {n: joint[n] for n in alone})


@pytest.mark.parametrize("side", ["vision", "language", None])
def test_single_prompt_collapse_equals_the_naive_loop(towers: Towers, side: str | None) -> None:
    pairs = split(FORGET, 0, same=True)
    calls = []
    forward = towers.text
    towers.text = lambda tokens: calls.append(len(tokens)) or forward(tokens)  # type: ignore[method-assign]
    try:
        fast, facts = forget_gradient(towers, loader(pairs, 3), side)
        assert sum(calls) == 1
        calls.clear()
        naive, slow = forget_gradient(towers, loader(pairs, 3), side, collapse=False)
        assert sum(calls) == FORGET
    finally:
        del towers.text  # type: ignore[method-assign]
    assert close(fast, naive)
    assert facts["one_text_batches"] == 3
    assert slow["one_text_batches"] == 0
    assert facts["loss"] == pytest.approx(slow["loss"], abs=1e-12)
    other, _ = forget_gradient(towers, loader(split(FORGET, 0), 3), side)
    assert not close(fast, other, 1e-3)


def test_batches_of_the_first_text_among_others(towers: Towers) -> None:
    same, other = split(4, 0, same=True), split(5, 1)
    pairs = Pairs(torch.cat([same.pixels, other.pixels]), Tokens(torch.cat([same.tokens.ids, other.tokens.ids])))
    fast, facts = forget_gradient(towers, loader(pairs, 2), names=every(towers))
    naive, _ = forget_gradient(towers, loader(pairs, 2), names=every(towers), collapse=False)
    assert facts["one_text_batches"] == 2
    assert close(fast, naive)


def test_rank_bound_of_one_prompt(towers: Towers) -> None:
    model_is_hf = towers.library == "transformers"
    got, _ = forget_gradient(towers, loader(split(FORGET, 0, same=True), 3), "language")
    many, _ = forget_gradient(towers, loader(split(FORGET, 0), 3), "language")
    linear = [n for n in candidate_names(towers, "language") if got[n].ndim == 2]
    for name in linear:
        place = towers.place(name)
        bound = 1 if place.block == 1 and place.part in ("q", "out", "fc1", "fc2") else LENGTH
        if place.part == "projection":
            bound = 1
        if place.part == "k":
            bound = LENGTH - 1
        if place.part == "qkv":  # three matrices in one
            bound = min(3 * LENGTH, 16)
            for rows, own in zip(got[name].chunk(3), (LENGTH, LENGTH - 1, LENGTH), strict=True):
                assert rank(rows, tolerance=1e4) <= own
        assert rank(got[name], tolerance=1e4) <= bound, name
    name = next(n for n in linear if towers.place(n).part == "out" and towers.place(n).block == 1)
    assert rank(many[name], tolerance=1e4) > 1
    assert model_is_hf == any(towers.place(n).part == "k" for n in linear)


# -- retain gradient (I6, I7) ------------------------------------------------------------------------------------------


def test_gradient_caching_equals_the_direct_gradient(towers: Towers) -> None:
    pairs = split(RETAIN, 1)

    def loss() -> Tensor:
        return contrastive_losses(towers.image(pairs.pixels), towers.text(pairs.tokens), towers.scale()).mean()

    want = direct(towers, loss, every(towers))
    assert float(want["logit_scale"].abs()) > 0
    for size, chunk in ((RETAIN, None), (2, None), (4, 1), (4, 5)):
        got, facts = retain_gradient(towers, loader(pairs, size), names=every(towers), chunk=chunk)
        assert close(got, want)
        assert facts["loss"] == pytest.approx(float(loss().detach()))
        assert facts["n"] == RETAIN
    small, _ = retain_gradient(towers, loader(pairs, 4), names=every(towers), batch_size=3)
    assert not close(small, want, 1e-3)


def test_blocks_of_the_cosines_change_nothing(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = loader(split(RETAIN, 1), 4)
    want, _ = retain_gradient(towers, pairs, names=every(towers))
    monkeypatch.setattr("expunge.slug.gradients._ROWS", 2)
    assert close(retain_gradient(towers, pairs, names=every(towers))[0], want)


def test_batches_of_the_retain_loss(towers: Towers) -> None:
    pairs = split(RETAIN, 1)

    def loss() -> Tensor:
        v, t = towers.image(pairs.pixels), towers.text(pairs.tokens)
        parts = [contrastive_losses(v[i : i + 4], t[i : i + 4], towers.scale()) for i in (0, 4, 8)]
        return torch.cat(parts).mean()

    want = direct(towers, loss, every(towers))
    for size in (1, 3, 4, 9):
        got, facts = retain_gradient(towers, loader(pairs, size), names=every(towers), batch_size=4)
        assert close(got, want)
        assert len(facts["batch_losses"]) == 3


def test_the_order_of_both_gradients_does_not_matter(towers: Towers) -> None:
    forget, retain = loader(split(FORGET, 0), 3), loader(split(RETAIN, 1), 4)
    first, _ = retain_gradient(towers, retain, names=every(towers))
    forget_gradient(towers, forget, names=every(towers))
    second, _ = retain_gradient(towers, retain, names=every(towers))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_identical_texts_are_refused_and_why(towers: Towers) -> None:
    pairs = split(RETAIN, 1, same=True)
    for size in (None, 4):
        with pytest.raises(DataError, match="retain set: all"):
            retain_gradient(towers, loader(pairs, 4), batch_size=size)
    v = unit(towers.image(pairs.pixels)).detach().requires_grad_()
    t = towers.text(pairs.tokens).detach()
    halves = [h.mean() for h in contrastive_parts(v, t, towers.scale().detach())]
    assert float(halves[0].detach()) == pytest.approx(math.log(RETAIN))
    assert float(torch.autograd.grad(halves[0], v, retain_graph=True)[0].abs().max()) < 1e-12
    assert float(torch.autograd.grad(halves[1], v)[0].abs().max()) > 1e-3
    found = published_gradients(
        towers, loader(split(FORGET, 0), 3), loader(pairs, 4), variant="as_published_2025", prompt=pairs.tokens[:1]
    )
    assert [b["image_to_text_ce"] for b in found.facts["retain"]["batches"][:2]] == pytest.approx([math.log(4)] * 2)


# -- the sign (I3) -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["vision", "language"])
def test_small_steps_raise_the_forget_loss_with_the_slope_of_the_gradient(towers: Towers, side: str) -> None:
    pairs, kept = split(FORGET, 0), split(RETAIN, 1)
    names = candidate_names(towers, side)
    found = slug_gradients(towers, loader(pairs, 3), loader(kept, 4), side)
    assert list(found.forget) == names == list(found.retain)
    score = max(score_layers(towers, found.forget, found.retain), key=lambda s: s.importance)
    weight, g = towers.parameters()[score.name], found.forget[score.name]

    @torch.no_grad()
    def losses() -> tuple[float, float]:
        l_f = forget_losses(towers.image(pairs.pixels), towers.text(pairs.tokens)).mean()
        l_r = contrastive_losses(towers.image(kept.pixels), towers.text(kept.tokens), towers.scale()).mean()
        return float(l_f), float(l_r)

    start, original = losses(), weight.detach().clone()
    last = start[0]
    for alpha in (1e-4, 1e-3):
        step = step_size(original, g, alpha)
        assert assert_ascent(towers, loader(pairs, 3), {score.name: step * g}) == pytest.approx(
            step * score.forget_norm**2
        )
        with pytest.raises(InvariantError, match="wrong sign"):
            assert_ascent(towers, loader(pairs, 3), {score.name: -step * g})
        with torch.no_grad():
            weight.add_(step * g)
        moved = losses()
        with torch.no_grad():
            weight.copy_(original)
        assert moved[0] > last
        last = moved[0]
        assert (moved[0] - start[0]) / (step * score.forget_norm**2) == pytest.approx(1, abs=0.02)
        assert (moved[1] - start[1]) / (step * score.inner) == pytest.approx(1, abs=0.05)


# -- leaving no trace, errors ------------------------------------------------------------------------------------------


def test_the_model_is_left_as_found(towers: Towers) -> None:
    model = towers.model
    names = candidate_names(towers)
    parameters = towers.parameters()
    parameters[names[0]].requires_grad_(False)
    mark = torch.ones_like(parameters[names[1]])
    parameters[names[1]].grad = mark
    model.train()
    try:
        before = {n: (p.detach().clone(), p.requires_grad) for n, p in parameters.items()}
        slug_gradients(towers, loader(split(FORGET, 0), 3), loader(split(RETAIN, 1), 4))
        with pytest.raises(DataError):
            retain_gradient(towers, loader(split(RETAIN, 1, same=True), 4))
        with pytest.raises(ConfigError):
            published_gradients(towers, loader(split(FORGET, 0), 3), loader(split(3, 1), 4), variant="as_published")
        assert all(m.training for m in model.modules())
        assert parameters[names[1]].grad is mark
        assert bool((mark == 1).all())
        for n, p in parameters.items():
            assert torch.equal(p, before[n][0])
            assert p.requires_grad == before[n][1]
            assert (p.grad is None) == (n != names[1])
    finally:
        model.eval()
        parameters[names[1]].grad = None
        parameters[names[0]].requires_grad_(True)


def test_only_wanted_tensors_are_computed(towers: Towers) -> None:
    last = [n for n in candidate_names(towers, "vision") if towers.place(n).block == 1][:1]
    pairs = split(FORGET, 0)
    got, _ = forget_gradient(towers, loader(pairs, 3), "vision", names=last)
    assert list(got) == last
    with pytest.raises(RequestError, match="not in the language tower"):
        forget_gradient(towers, loader(pairs, 3), "language", names=last)
    with pytest.raises(RequestError, match="no parameter 'x'"):
        forget_gradient(towers, loader(pairs, 3), names=["x"])
    with pytest.raises(RequestError, match="empty"):
        forget_gradient(towers, loader(pairs, 3), names=[])


def test_broken_data(towers: Towers) -> None:
    with pytest.raises(DataError, match="no pair"):
        forget_gradient(towers, lambda: iter(()))
    with pytest.raises(DataError, match="at least two"):
        retain_gradient(towers, loader(split(1, 0), 1))
    pairs = split(FORGET, 0)
    pairs.pixels[2, 0, 0, 0] = math.nan
    with pytest.raises(DivergedError, match="forget gradient of '"):
        forget_gradient(towers, loader(pairs, 3))
    orders = iter(([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]))
    good = split(FORGET, 0)
    with pytest.raises(DataError, match="must not shuffle"):
        retain_gradient(towers, lambda: loader(good, 3, next(orders))())


def test_rebatching_keeps_pairs_and_order() -> None:
    short, long = Tokens(torch.tensor([[1, 2]])), Tokens(torch.tensor([[3, 4, 5], [6, 7, 8]]))
    given = [Pairs(torch.zeros(1, 3, 2, 2), short), Pairs(torch.ones(2, 3, 2, 2), long)]
    assert list(rebatched(given, None)) == given
    two = list(rebatched(given, 2))
    assert [b.tokens.ids.tolist() for b in two] == [[[1, 2, 0], [3, 4, 5]], [[6, 7, 8]]]
    assert [b.pixels[:, 0, 0, 0].tolist() for b in two] == [[0, 1], [1]]
    assert [len(b) for b in rebatched(given, 1)] == [1, 1, 1]
    assert len(next(rebatched(given, 9))) == 3
    masked = Pairs(torch.zeros(1, 3, 2, 2), Tokens(torch.tensor([[1, 2]]), torch.tensor([[1, 1]])))
    with pytest.raises(DataError, match="mask"):
        list(rebatched([*given, masked], 9))
    assert next(rebatched([masked, masked], 2)).tokens.mask.tolist() == [[1, 1], [1, 1]]


def test_published_accumulation_is_the_documented_sum(towers: Towers) -> None:
    forget, retain, prompt = loader(split(FORGET, 0), 3), loader(split(RETAIN, 1), 4), texts(1, 5)
    clean = published_gradients(towers, forget, retain, variant="as_published_2025", prompt=prompt)
    full = published_gradients(towers, forget, retain, variant="as_published", prompt=prompt)
    g, r = [], []
    for i in range(3):
        f = loader(Pairs(split(FORGET, 0).pixels[3 * i : 3 * i + 3], split(FORGET, 0).tokens[3 * i : 3 * i + 3]), 3)
        k = loader(Pairs(split(RETAIN, 1).pixels[4 * i : 4 * i + 4], split(RETAIN, 1).tokens[4 * i : 4 * i + 4]), 4)
        one = published_gradients(towers, f, k, variant="as_published_2025", prompt=prompt)
        g.append(one.forget)
        r.append(one.retain)
    want_f = {n: sum((3 - i) * g[i][n] for i in range(3)) / 3 for n in g[0]}
    want_r = {n: sum(x[n] for x in g) + sum((3 - i) * r[i][n] for i in range(3)) / 3 for n in r[0]}
    assert close(full.forget, want_f)
    assert close(full.retain, want_r)
    assert not close(full.retain, clean.retain, 1e-2)
    openclip = published_gradients(towers, forget, retain, variant="openclip")
    batches, _ = forget_gradient(towers, forget, names=every(towers), weighting="batches")
    assert close({n: -x for n, x in openclip.forget.items()}, batches)
    assert openclip.facts["sign"] == -1
    with pytest.raises(ConfigError, match="unknown variant"):
        published_gradients(towers, forget, retain, variant="other")


# -- cache -------------------------------------------------------------------------------------------------------------


def test_cache_is_tied_to_weights_data_and_settings(towers: Towers, tmp_path: Path) -> None:
    calls = []

    def compute() -> Gradients:
        calls.append(1)
        return slug_gradients(towers, loader(split(FORGET, 0), 3), loader(split(RETAIN, 1), 4))

    def ask(data: str = "d", batch: int | None = None) -> tuple[Gradients, str]:
        key = gradient_key(towers.model, {"train": data}, {"batch_size": batch})
        return cached_gradients(key, compute, tmp_path)

    fresh, how = ask()
    again, hit = ask()
    assert (how, hit, len(calls)) == ("computed", "cached", 1)
    for a, b in ((fresh.forget, again.forget), (fresh.retain, again.retain)):
        assert set(a) == set(b)
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert again.facts == fresh.facts
    for change in ({"data": "e"}, {"batch": 4}):
        assert ask(**change)[1] == "computed"
    with torch.no_grad():
        weight = next(iter(towers.parameters().values()))
        kept = weight.clone()
        weight.reshape(-1)[0] += 1
    try:
        assert ask()[1] == "computed"
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert ask()[1] == "cached"
    assert len(calls) == 4


def test_broken_cache_files(towers: Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Gradients({"a": torch.ones(2)}, {"a": torch.zeros(2)}, {"n": 1})
    path = tmp_path / f"{'k' * 32}.safetensors"
    save_gradients(path, small, "k" * 64)
    assert load_gradients(path, "k" * 64).facts == {"n": 1}
    with pytest.raises(ArtifactError, match="other weights, data or settings"):
        load_gradients(path, "l" * 64)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ArtifactError):
        load_gradients(path, "k" * 64)
    found, how = cached_gradients("k" * 64, lambda: small, tmp_path)
    assert found is small
    assert how.startswith("computed again")
    assert path.read_bytes() == whole
    flipped = bytearray(whole)
    flipped[-2] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(ArtifactError, match="not those that were written"):
        load_gradients(path, "k" * 64)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ArtifactError, match="not one of SLUG's gradients"):
        load_gradients(path, "k" * 64)

    def refuse(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(gradient_cache, "save_gradients", refuse)
    assert cached_gradients("m" * 64, lambda: small, tmp_path) == (small, "computed")


def test_single_precision_gradients_of_one_prompt_are_stored_as_factors() -> None:
    towers = tiny_towers("transformers", layers=2, width=64)
    name = "text_model.encoder.layers.0.self_attn.out_proj.weight"
    kinds = {}
    for same in (True, False):
        pairs = split(20, 0, same=same, dtype=torch.float32)
        g, _ = forget_gradient(towers, loader(pairs, 5), names=[name])
        kinds[same] = compress(g[name])
    assert isinstance(kinds[True], LowRank)
    assert kinds[True].up.shape[1] <= LENGTH
    assert isinstance(kinds[False], Dense)

"""Cached probes decide as the full evaluation does, for every tensor; edits leave no trace."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("open_clip")

from slug_toys import NAMES, TEMPLATES, names_task

from expunge.digest import model_digest
from expunge.errors import DataError, RequestError
from expunge.models.towers import Staged
from expunge.slug.probes import FullProbe, SearchSet, SuffixProbe, accuracy, edited

LIBRARIES = ("transformers", "open_clip")
ALPHAS = (0.0, 0.01, 0.1, 0.4, 1.6)


@pytest.fixture(scope="module", params=LIBRARIES)
def task(request):
    return names_task(request.param)


def search_set(task, forget=2):
    train, towers = task.data.train, task.towers
    is_forget = train.labels == forget
    chosen, kept = is_forget.nonzero().flatten(), (~is_forget).nonzero().flatten()[::5]
    texts = [t.format(n) for n in NAMES for t in TEMPLATES]
    pixels = [towers.preprocess(train.images(ids)) for ids in (chosen, kept)]
    return SearchSet(
        pixels[0], train.labels[chosen], pixels[1], train.labels[kept], towers.tokenize(texts), len(TEMPLATES)
    )


def directions(towers):
    """Random directions for every weight of the towers."""
    generator = torch.Generator().manual_seed(3)
    for name, p in towers.parameters().items():
        if towers.place(name).tower is not None and p.ndim >= 1:
            g = torch.randn(p.shape, generator=generator)
            yield name, g * float(p.detach().norm() / g.norm())


def test_every_probe_of_every_tensor_decides_as_the_full_evaluation(task):
    data = search_set(task)
    full, suffix = FullProbe(task.towers, data, batch_size=7), SuffixProbe(task.towers, data, batch_size=7)
    base = full.logits()
    moved = decided = 0
    for name, g in directions(task.towers):
        for alpha in ALPHAS[::2] if name.endswith("bias") else ALPHAS:
            want, got = full.logits({name: alpha * g}), suffix.logits({name: alpha * g})
            for w, s in zip(want, got, strict=True):
                assert torch.allclose(w, s, rtol=1e-5, atol=1e-5 * float(task.towers.scale().detach())), (name, alpha)
            for k in (1, 3):
                pair = [accuracy(x[0], data.forget_labels, k) for x in (want, got)]
                assert pair[0] == pair[1], (name, alpha)
            assert full.figures(*want) == suffix.figures(*got)
            moved += any(not torch.equal(w, b) for w, b in zip(want, base, strict=True))
            decided += full.figures(*want) != full.figures(*base)
    assert moved > 50
    assert decided > 10, "the comparison needs probes that change decisions"
    assert not suffix.notes


def test_a_stale_state_would_be_seen(task):
    """The comparison above can fail: starting one block too late misses the edit."""
    data = search_set(task)
    suffix = SuffixProbe(task.towers, data)
    name = next(n for n in task.towers.parameters("vision") if task.towers.place(n).block == 0 and "mlp" in n)
    g = dict(directions(task.towers))[name]
    suffix._starts[(name,)] = 1
    right = FullProbe(task.towers, data).logits({name: 0.4 * g})
    assert not torch.allclose(suffix.logits({name: 0.4 * g})[0], right[0], atol=1e-3)


def test_the_start_is_the_first_edited_block_and_tensors_before_the_stack_run_whole(task):
    suffix = SuffixProbe(task.towers, search_set(task))
    for tower in ("vision", "language"):
        depth = task.towers.depth(tower)
        for name in task.towers.parameters(tower):
            place = task.towers.place(name)
            start = suffix._start(tower, (name,))
            if place.block is not None:
                assert start == place.block
            elif place.part == "projection":
                assert start == depth
            elif place.part == "embedding":
                assert start is None
    names = list(task.towers.parameters())
    pre = [n for n in names if "ln_pre" in n or "pre_layrnorm" in n]
    last = ("ln_post", "post_layernorm", "ln_final", "final_layer_norm")
    post = [n for n in names if any(word in n for word in last)]
    assert pre
    assert len(post) == 4
    assert all(suffix._start("vision", (n,)) is None for n in pre)
    assert all(suffix._start(task.towers.place(n).tower, (n,)) == 2 for n in post)
    assert not suffix.notes


def test_searching_in_any_order_of_blocks_gives_the_same(task):
    data = search_set(task)
    suffix, full = SuffixProbe(task.towers, data), FullProbe(task.towers, data)
    own = task.towers.parameters("vision")
    names = [n for n in own if task.towers.place(n).part == "fc1" and not n.endswith("bias")]
    every = dict(directions(task.towers))
    for name in (names[1], names[0], names[1]):
        suffix.prepare([name])
        for w, s in zip(full.logits({name: 0.3 * every[name]}), suffix.logits({name: 0.3 * every[name]}), strict=True):
            assert torch.allclose(w, s, atol=1e-5 * float(task.towers.scale().detach()))
    both = {n: 0.2 * every[n] for n in names}
    for w, s in zip(full.logits(both), suffix.logits(both), strict=True):
        assert torch.allclose(w, s, atol=1e-5 * float(task.towers.scale().detach()))


def test_an_edit_of_one_tower_leaves_the_embeddings_of_the_other_bit_equal(task):
    full = FullProbe(task.towers, search_set(task))
    every = dict(directions(task.towers))
    with torch.no_grad():
        images, texts = full.embeddings({})
        for tower in ("vision", "language"):
            name = next(n for n in task.towers.parameters(tower) if task.towers.place(n).part == "fc2" and n in every)
            new_images, new_texts = full.embeddings({name: 0.3 * every[name]})
            assert torch.equal(new_images, images) == (tower == "language")
            assert torch.equal(new_texts, texts) == (tower == "vision")


def test_no_step_gives_the_original_figures_exactly(task):
    data = search_set(task)
    for kind in (FullProbe, SuffixProbe):
        probe = kind(task.towers, data)
        name, g = next((n, g) for n, g in directions(task.towers) if task.towers.place(n).block == 1)
        base, still = probe.logits(), probe.logits({name: 0.0 * g})
        assert probe.figures(*base) == probe.figures(*still)
        assert probe().forget == 1.0


def test_the_exact_bits_come_back_also_after_an_error(task):
    before = model_digest(task.model)
    name, g = next(directions(task.towers))
    seen = []

    def fail():
        with edited(task.towers, {name: g}):
            seen.append(model_digest(task.model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen[0] != before
    assert model_digest(task.model) == before
    with pytest.raises(RequestError, match="did you mean"), edited(task.towers, {name + "x": g}):
        pass
    with pytest.raises(RequestError, match="its difference"), edited(task.towers, {name: g[:1, :1]}):
        pass
    SuffixProbe(task.towers, search_set(task))({name: g})
    assert model_digest(task.model) == before
    assert not any(p.grad is not None for p in task.model.parameters())


def test_half_precision_weights_are_summed_in_single():
    towers = names_task("transformers").towers
    name, g = next((n, g) for n, g in directions(towers) if towers.place(n).part == "fc1")
    towers.model.half()
    weight = towers.parameters()[name]
    old = weight.detach().clone()
    with edited(towers, {name: 1e-3 * g}):
        assert torch.equal(weight, (old.float() + 1e-3 * g).half())
        assert not torch.equal(weight, old)
    assert torch.equal(weight, old)


def test_too_little_memory_runs_the_tower_whole_and_says_so(task):
    data = search_set(task)
    name, g = next((n, g) for n, g in directions(task.towers) if task.towers.place(n).block == 1)
    small, full = SuffixProbe(task.towers, data, memory=1000), FullProbe(task.towers, data)
    assert small({name: 0.4 * g}) == full({name: 0.4 * g})
    assert len(small.notes) == 1
    assert "more than 0 MB" in small.notes[0]


def test_a_staged_pass_that_differs_is_not_used(task, monkeypatch):
    data, towers = search_set(task), task.towers
    name, g = next((n, g) for n, g in directions(towers) if n.startswith("vis") and towers.place(n).block == 1)
    want = FullProbe(towers, data).logits({name: 0.4 * g})
    enter = type(towers).enter

    def wrong(self, tower, inputs):
        state = enter(self, tower, inputs)
        return Staged(state.hidden.roll(1, -1), state.extra)

    monkeypatch.setattr(type(towers), "enter", wrong)
    suffix = SuffixProbe(towers, data)
    got = suffix.logits({name: 0.4 * g})
    assert "differs from its own forward pass" in suffix.notes[0]
    scale = float(towers.scale().detach())
    assert towers.library == "open_clip" or torch.allclose(want[0], got[0], atol=1e-5 * scale)


def test_top_k_counts_strictly_larger_logits_and_nan_is_nan():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    labels = torch.tensor([1, 0, 2])
    assert [accuracy(logits, labels, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 1.0])
    logits[0, 2] = math.nan
    assert math.isnan(accuracy(logits, labels))


def test_a_step_that_breaks_the_model_gives_no_number(task):
    name, g = next((n, g) for n, g in directions(task.towers) if task.towers.place(n).part == "fc1")
    figures = SuffixProbe(task.towers, search_set(task))({name: math.inf * g})
    assert math.isnan(figures.forget)
    assert math.isnan(figures.utility)


def test_search_sets_that_do_not_fit_are_refused(task):
    data = search_set(task)
    for change, message in (
        ({"forget_labels": data.forget_labels[:-1]}, "forget images but"),
        ({"forget": data.forget[:0], "forget_labels": data.forget_labels[:0]}, "no forget images"),
        ({"utility_labels": data.utility_labels + 5}, "outside 0..7"),
        ({"templates": 3}, "whole number of classes"),
    ):
        with pytest.raises(DataError, match=message):
            dataclasses.replace(data, **change)

import numpy as np
import torch
from scipy.stats import chisquare

from expunge import rng


def test_keys_depend_on_every_part():
    keys = {rng.key(s, p, c) for s in (0, 1, -1) for p in ("a", "b") for c in (0, 1)}
    assert len(keys) == 12
    assert rng.key(3, "a", 1, 2) == rng.key(3, "a", 1, 2) != rng.key(3, "a", 2, 1)


def test_draws_do_not_depend_on_batching_or_order():
    ids = torch.arange(1000)
    whole = rng.randint(7, ids, 10)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    parts = torch.cat([rng.randint(7, chunk, 10) for chunk in torch.split(ids[order], 33)])
    assert torch.equal(parts, whole[order])
    assert not torch.equal(whole, rng.randint(8, ids, 10))


def test_integers_are_uniform_and_streams_independent():
    ids = torch.arange(50_000)
    a, b = rng.randint(5, ids, 10), rng.randint(5, ids, 10, stream=1)
    assert chisquare(np.bincount(a.numpy(), minlength=10)).pvalue > 1e-3
    joint = np.bincount((a * 10 + b).numpy(), minlength=100)
    assert chisquare(joint).pvalue > 1e-3


def test_permutation_is_one_and_depends_on_the_key():
    assert torch.equal(rng.permutation(3, 100).sort().values, torch.arange(100))
    assert not torch.equal(rng.permutation(3, 100), rng.permutation(4, 100))


def test_global_generators_are_put_back_also_after_an_exception():
    rng.seed_everything(1)
    expected = torch.rand(3), np.random.rand(3)
    rng.seed_everything(1)
    try:
        with rng.preserved():
            torch.rand(10), np.random.rand(10)
            raise ValueError
    except ValueError:
        pass
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])

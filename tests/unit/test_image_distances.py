"""FID and KID against independent implementations, and figures of images in pairs."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.errors import ArtifactError, DataError
from expunge.files import atomic_save_safetensors
from expunge.metrics.backbones import load_lpips, load_vgg19
from expunge.metrics.fid import fid, frechet, kernel_distance, kid
from expunge.metrics.similarity import gram, pair_max, pair_mse, paired_distances, style_content, style_loss

# ---- distances between sets


class Through(nn.Module):
    """Features as they are, for torchmetrics."""

    num_features = 5

    def forward(self, x: Tensor) -> Tensor:
        return x


def sets(n: int = 40, m: int = 40, shift: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    return draw.normal(size=(n, 5)) @ np.diag([1, 2, 0.5, 1, 1]), draw.normal(size=(m, 5)) + shift


def test_fid_equals_an_independent_implementation() -> None:
    image = pytest.importorskip("torchmetrics.image.fid")
    a, b = sets(40, 60)
    theirs = image.FrechetInceptionDistance(feature=Through()).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(a), real=True)
    theirs.update(torch.from_numpy(b), real=False)
    assert frechet(a, b) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)
    assert frechet(a, b + 0.1) != pytest.approx(frechet(a, b), rel=1e-3)


def test_fid_of_a_shift_and_of_a_scale_has_a_closed_form() -> None:
    a, _ = sets()
    assert frechet(a, a + 2.0) == pytest.approx(5 * 4.0)
    spread = np.trace(np.cov(a, rowvar=False))
    centred = a - a.mean(0)
    assert frechet(centred, 3 * centred) == pytest.approx(4 * spread)
    # fewer rows than features: singular, and said so
    few = a[:4]
    assert frechet(few, few[::-1]) == 0.0
    assert frechet(few, few + 1.0) == pytest.approx(5.0)
    assert "too large by an unknown amount" in fid(few, few + 1.0, backbone="B").note
    assert "too large" not in fid(a, a + 1, backbone="B").note


def test_kid_equals_an_independent_implementation() -> None:
    image = pytest.importorskip("torchmetrics.image.kid")
    a, b = sets()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it keeps all features, and says so
        theirs = image.KernelInceptionDistance(feature=Through(), subsets=1, subset_size=40)
    theirs.update(torch.from_numpy(a), real=True)
    theirs.update(torch.from_numpy(b), real=False)
    value, error = kernel_distance(a, b, paired=False)
    assert value == pytest.approx(float(theirs.compute()[0]), rel=1e-4)
    assert 0 < error < value
    assert kernel_distance(a, b, paired=True)[0] != value


def test_kid_of_equal_distributions_is_about_zero_and_its_interval_says_so() -> None:
    draw = np.random.default_rng(5)
    covered, means = 0, []
    for _ in range(60):
        x, y = draw.normal(size=(30, 3)), draw.normal(size=(25, 3))
        found = kid(x, y, backbone="B", paired=False)
        covered += found.low <= 0 <= found.high
        means.append(found.value)
    assert covered >= 54
    assert abs(np.mean(means)) < 3 * np.std(means) / np.sqrt(60)
    x = draw.normal(size=(30, 3))
    far = kid(x, x + 2 + 0.1 * draw.normal(size=(30, 3)), backbone="B")
    assert far.low > 0
    # dependent pairs from the same distribution: leaving the pairs out keeps the estimate unbiased
    paired, naive = [], []
    for _ in range(60):
        shared = draw.normal(size=(20, 3))
        x, y = (0.9 * shared + 0.44 * draw.normal(size=(20, 3)) for _ in range(2))
        paired.append(kernel_distance(x, y, paired=True)[0])
        naive.append(kernel_distance(x, y, paired=False)[0])
    assert abs(np.mean(paired)) < 3 * np.std(paired) / np.sqrt(60)
    assert abs(np.mean(naive)) > 3 * np.std(naive) / np.sqrt(60)


def test_the_jackknife_is_that_of_left_out_rows() -> None:
    a, b = sets(7, 7)
    for paired in (True, False):
        value, error = kernel_distance(a, b, paired=paired)
        if paired:
            left = [kernel_distance(np.delete(a, i, 0), np.delete(b, i, 0), paired=True)[0] for i in range(7)]
            slow = 6 / 7 * np.var(left) * 7
        else:
            one = [kernel_distance(np.delete(a, i, 0), b, paired=False)[0] for i in range(7)]
            two = [kernel_distance(a, np.delete(b, i, 0), paired=False)[0] for i in range(7)]
            slow = 6 / 7 * (np.var(one) + np.var(two)) * 7
        assert error == pytest.approx(np.sqrt(slow))
        assert value != pytest.approx(error)


def test_features_that_do_not_fit() -> None:
    a, b = sets()
    for x, y in ((a, b[:, :3]), (a[:1], b), (a[0], b)):
        with pytest.raises(DataError, match="two sets"):
            frechet(x, y)
    with pytest.raises(DataError, match="not finite"):
        frechet(np.where(a > 2, np.inf, a), b)
    with pytest.raises(DataError, match="no pairs"):
        kernel_distance(a[:5], b, paired=True)


# ---- paired images


def test_pixel_differences_by_hand() -> None:
    a = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    b = a.clone()
    b[1, 0, 0, 0] = 51
    assert pair_max(a, b).value == 51
    assert pair_mse(a, b).value == pytest.approx(0.2**2 / 12 / 2)
    assert pair_max(b, a).value == 51
    with pytest.raises(DataError, match="equal shapes"):
        pair_mse(a, b[:1])


def test_the_gram_matrix_of_a_constant_map() -> None:
    maps = torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].expand(1, 3, 4, 5)
    # <F_i, F_j> / (C H W) = c_i c_j H W / (C H W)
    assert torch.allclose(gram(maps)[0], torch.outer(maps[0, :, 0, 0], maps[0, :, 0, 0]) / 3)
    assert not torch.allclose(gram(2 * maps), gram(maps))


def test_style_and_content_by_hand() -> None:
    a = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    b = torch.full_like(a, 255)
    style, content = style_content(lambda x: [x] * 5, a, b)
    assert style[0] == pytest.approx(5 * (1 / 3) ** 2)
    assert content[0] == pytest.approx(1.0)
    assert style_loss(style, content).value == pytest.approx(1e6 * 5 / 9 + 1)
    turned = style_content(lambda x: [x] * 5, b, a)
    assert (turned[0], turned[1]) == (style, content)
    with pytest.raises(DataError, match="five convolutions"):
        style_content(lambda x: [x], a, b)


def vgg_file(path: Path, wrong: bool = False) -> Path:
    torch.manual_seed(0)
    widths = ((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 32 if wrong else 256))
    tensors = {}
    for place, i, o in widths:
        tensors |= {f"features.{place}.weight": torch.randn(o, i, 3, 3) / (3 * i**0.5)}
        tensors |= {f"features.{place}.bias": torch.randn(o)}
    atomic_save_safetensors(path, tensors | {"classifier.0.weight": torch.zeros(2, 2)})
    return path


def test_vgg_maps_are_those_before_the_activations(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from torchvision.models.vgg import cfgs, make_layers

    from expunge.files import read_safetensors

    file = vgg_file(tmp_path / "v.safetensors")
    maps = load_vgg19(file)
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    own = maps(x)
    assert [tuple(m.shape[1:]) for m in own] == [(64, 12, 12), (64, 12, 12), (128, 6, 6), (128, 6, 6), (256, 3, 3)]
    layers = make_layers(cfgs["E"])[:11]
    stored = {k.removeprefix("features."): v for k, v in read_safetensors(file)[0].items() if "features" in k}
    layers.load_state_dict(stored)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    y, seen = (x - mean[:, None, None]) / std[:, None, None], []
    for layer in layers:
        y = functional.relu(y) if isinstance(layer, nn.ReLU) else layer(y)
        if isinstance(layer, nn.Conv2d):
            seen.append(y.detach())
    for a, b in zip(own, seen, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert float(a.min()) < 0
    with pytest.raises(ArtifactError, match="not the convolutions of VGG-19"):
        load_vgg19(vgg_file(tmp_path / "w.safetensors", wrong=True))


def test_lpips_with_given_weights(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    tensors = {f"features.{i}.weight": 0.05 * torch.randn(s) for i, s in shapes.items()}
    tensors |= {f"features.{i}.bias": torch.zeros(s[0]) for i, s in shapes.items()}
    atomic_save_safetensors(tmp_path / "a.safetensors", tensors)
    distance = load_lpips(tmp_path / "a.safetensors")
    noise = torch.Generator().manual_seed(2)
    a, b = (torch.randint(0, 256, (3, 3, 64, 64), generator=noise, dtype=torch.uint8) for _ in range(2))
    ab = paired_distances(distance, a, b, chunk=2)
    assert ab.shape == (3,)
    assert (ab > 0).all()
    assert paired_distances(distance, b, a) == pytest.approx(ab, rel=1e-5)  # symmetric
    assert (paired_distances(distance, a, a) == 0).all()
    assert paired_distances(distance, a, b, size=80) != pytest.approx(ab, rel=1e-3)
    # the weights are those of the file
    atomic_save_safetensors(tmp_path / "b.safetensors", tensors | {"features.0.weight": -tensors["features.0.weight"]})
    assert paired_distances(load_lpips(tmp_path / "b.safetensors"), a, b) != pytest.approx(ab, rel=1e-4)
    atomic_save_safetensors(tmp_path / "c.safetensors", tensors | {"features.3.bias": torch.zeros(3)})
    with pytest.raises(ArtifactError, match=r"features\.3\.bias is \[3\], not \[192\]"):
        load_lpips(tmp_path / "c.safetensors")


def test_a_distance_of_another_shape() -> None:
    a = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"\[2\] expected"):
        paired_distances(lambda x, y: (x - y).mean()[None], a, a)

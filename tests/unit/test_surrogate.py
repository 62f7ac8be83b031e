"""Surrogate sets: drawn and stored, chosen, resized; what a set depends on."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from surrogate_sets import COLOUR, GREY, image_folder, load, png

from expunge.data import DataSpec, MemoryImages, load_data
from expunge.data.base import Subset
from expunge.data.procedural import KINDS, draw_noise, draw_shapes
from expunge.data.surrogate import (
    chunk_rows,
    chunk_subset,
    class_rows,
    class_subset,
    drawn_rows,
    drawn_subset,
    fitted,
)
from expunge.errors import ConfigError, DataError


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    return str(image_folder(tmp_path / "pictures"))


# drawn images


def test_a_drawn_image_depends_on_seed_and_index_only():
    ids = torch.arange(60)
    whole = draw_shapes(ids, COLOUR, seed=3)
    some = torch.tensor([41, 7, 40])
    assert torch.equal(draw_shapes(some, COLOUR, seed=3).x, whole.x[some])
    assert not torch.equal(draw_shapes(some, COLOUR, seed=4).x, whole.x[some])
    noise = draw_noise(ids, COLOUR, seed=3)
    assert torch.equal(draw_noise(some, COLOUR, seed=3).x, noise.x[some])
    assert not torch.equal(draw_noise(some, COLOUR, seed=4).x, noise.x[some])
    for images in (whole, noise):
        assert images.x.dtype == torch.uint8
        assert len({x.numpy().tobytes() for x in images.x}) == 60


def test_another_process_draws_the_same():
    code = (
        "from expunge.data.spec import SurrogateSpec as S; from expunge.data.surrogate import load_surrogate as f\n"
        "for seed in (2, 3):\n"
        "    for name in ('noise', 'shapes'):\n"
        "        spec = S(name=name, chunks=5, use=(4, 1), quantity=20, limit=100, seed=seed)\n"
        "        print(f(spec, (3, 12, 10)).images.digest)"
    )
    rest = {"chunks": 5, "use": (1, 4), "quantity": 20, "limit": 100, "seed": 2}
    shapes, noise = (load(COLOUR, name=name, **rest).images.digest for name in ("shapes", "noise"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    theirs = done.stdout.split()
    assert theirs[:2] == [noise, shapes]
    assert len(set(theirs)) == 4


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (4, 5, 17), (2, 1, 1)])
def test_shapes_have_any_size(shape):
    images = draw_shapes(torch.arange(12), shape)
    assert images.shape == shape
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert images.classes == list(KINDS)


def test_the_same_index_is_the_same_figure_at_every_size():
    small, large = (draw_shapes(torch.arange(120), (1, n, n)).x.float() / 255 for n in (16, 64))
    pooled = torch.nn.functional.avg_pool2d(large, 4)
    off = (small - pooled).abs().mean((1, 2, 3))
    assert float(off.median()) < 0.03
    assert float((small - pooled.roll(6, 0)).abs().mean()) > 5 * float(off.mean())


def test_every_kind_draws_something():
    images = draw_shapes(torch.arange(300), (3, 16, 16))
    x = images.images(torch.arange(300))
    flat = x.std((2, 3)).amax(1) < 0.01  # a figure can lie outside the picture
    for kind in range(len(KINDS)):
        assert float(flat[images.labels == kind].float().mean()) < 0.1
    assert 0.4 < float(x.mean()) < 0.6


def test_noise_is_the_control():
    x = load(COLOUR, name="noise", quantity=400).images.images(torch.arange(400)).double()
    assert abs(float(x.mean()) - 0.5) < 0.003
    # variance of N(0.5, 0.25) clipped to [0, 1]: from the normal moments at +-2 standard deviations
    density, inside = np.exp(-2) / np.sqrt(2 * np.pi), 0.9544997361
    std = 0.25 * np.sqrt(inside - 4 * density + 4 * (1 - inside))
    assert abs(float(x.std()) - std) < 0.003
    assert float(((x == 0) | (x == 1)).double().mean()) == pytest.approx(1 - inside, abs=0.004)
    around = torch.corrcoef(torch.stack([x[..., 1:].flatten(), x[..., :-1].flatten()]))[0, 1]
    assert abs(float(around)) < 0.01
    other = load(COLOUR, name="noise", quantity=400, noise_std=0.1).images.images(torch.arange(400))
    assert abs(float(other.std()) - 0.1) < 0.003


def test_drawing_refuses_nonsense():
    with pytest.raises(DataError, match="not negative"):
        draw_shapes(torch.tensor([-1]), GREY)
    with pytest.raises(DataError, match="positive size"):
        draw_noise(torch.tensor([1]), (3, 0, 8))


# choosing


def test_chunks_are_disjoint_and_cover_everything():
    parts = [chunk_rows(103, 10, [i], seed=5) for i in range(10)]
    assert sorted(torch.cat(parts).tolist()) == list(range(103))
    assert {len(p) for p in parts} == {10, 11}
    assert torch.equal(chunk_rows(103, 10, [7, 2], 5), torch.cat([parts[2], parts[7]]).sort().values)
    assert not torch.equal(chunk_rows(103, 10, [0], 6), parts[0])
    assert parts[0].tolist() != list(range(11))  # shuffled
    with pytest.raises(ConfigError, match="cannot be taken"):
        chunk_rows(5, 10, [0])


def test_chunks_of_a_configuration():
    every = {i for c in range(4) for i in load(chunks=4, use=(c,), limit=50).indices.tolist()}
    assert every == set(range(50))
    first = load(chunks=4, use=2, limit=50).indices.tolist()
    assert first == load(chunks=4, use=(1, 0), limit=50).indices.tolist()
    assert first != load(chunks=4, use=(2, 0), limit=50).indices.tolist()
    assert len(load(chunks=10, use=1).indices) == 1000
    for use in (0, 5, (4,), (0, 0), (-1,), ()):
        with pytest.raises(ConfigError, match="'use' is a count from 1 to 4"):
            load(chunks=4, use=use)


def test_smaller_quantities_are_part_of_larger_ones(pictures):
    for fields in ({"name": "folder", "path": pictures}, {"name": "shapes", "limit": 30}, {"name": "shapes"}):
        less, more = (set(load(quantity=q, **fields).indices.tolist()) for q in (8, 15))
        assert less < more
        assert (len(less), len(more)) == (8, 15)
    seeds = [load(name="folder", path=pictures, quantity=8, seed=s).indices.tolist() for s in (0, 1)]
    assert seeds[0] != seeds[1]
    with pytest.raises(ConfigError, match="quantity 25, but only 24"):
        load(name="folder", path=pictures, quantity=25)


def test_balanced_sampling(pictures):
    labels = load(name="folder", path=pictures, balanced=True, quantity=12).images.labels
    assert labels.bincount().tolist() == [4, 4, 4]
    assert load(name="folder", path=pictures, balanced=True).images.labels.bincount().tolist() == [6, 6, 6]
    assert load(name="folder", path=pictures, quantity=12).images.labels.bincount().tolist() != [4, 4, 4]
    less, more = (drawn_rows(torch.arange(90) % 3, q, balanced=True).tolist() for q in (12, 30))
    assert set(less) < set(more)
    assert drawn_rows(torch.arange(90) % 3, 12, balanced=True, seed=1).tolist() != less
    assert load(name="shapes", balanced=True, quantity=60).images.labels.bincount().tolist() == [10] * 6
    for fields, message in (
        ({"quantity": 10}, r"no multiple of the 3 labels; e\.g\. 9 is"),
        ({"quantity": 2}, r"e\.g\. 3 is"),
        ({"quantity": 21}, "label 0 has 6 images, balanced needs 7"),
        ({"classes": ("cat",)}, "at least two labels"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(name="folder", path=pictures, balanced=True, **fields)


def test_classes_are_kept_or_left_out(pictures):
    kept = load(name="folder", path=pictures, classes=("fox", 0)).images
    assert set(kept.labels.tolist()) == {0, 2}
    assert load(name="folder", path=pictures, exclude_classes=("dog",)).images.digest == kept.digest
    assert set(load(classes=("discs",), quantity=9).images.labels.tolist()) == {1}
    with pytest.raises(ConfigError, match="did you mean 'dog'"):
        load(name="folder", path=pictures, classes=("dgo",))
    with pytest.raises(DataError, match="no images are left"):
        load(name="folder", path=pictures, exclude_classes=(0, 1, 2))
    with pytest.raises(DataError, match="no images of class 'b'"):
        class_rows(torch.tensor([0, 2]), ["a", "b", "c"], ["b"])


def test_views_share_pixels_and_have_digests():
    images = load_data(DataSpec(name="digits")).train
    view = class_subset(images, [3, "7"])
    assert set(view.labels.tolist()) == {3, 7}
    assert torch.equal(view.images(torch.tensor([5])), images.images(view.rows[5:6]))
    assert torch.equal(view.subset(torch.tensor([4, 2])).rows, view.rows[[4, 2]])
    other = [class_subset(images, [3]), class_subset(images, [3, 7], exclude=True), drawn_subset(images, 40)]
    other += [chunk_subset(images, 4, [0]), chunk_subset(images, 4, [1]), drawn_subset(images, 40, balanced=True)]
    assert len({view.digest, *(o.digest for o in other)}) == 7
    assert view.digest == class_subset(images, ["7", "3"]).digest
    assert other[-1].labels.bincount().tolist() == [4] * 10
    for rows, message in (([0, 0], "more than once"), ([5000], "out of range")):
        with pytest.raises(DataError, match=message):
            Subset(images, torch.tensor(rows))
    broken = MemoryImages(torch.zeros(3, 1, 2, 2), torch.zeros(3).long(), ["a"], {1: "b.png"})
    part = Subset(broken, torch.tensor([2, 1]))
    assert part.readable().tolist() == [0]
    with pytest.raises(DataError, match=r"b\.png"):
        part.require(torch.tensor([1]))


# size and channels


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 12, 6), (1, 30, 40)])
def test_stored_images_take_the_shape_of_the_task(pictures, shape):
    found = load(shape, name="folder", path=pictures)
    assert found.images.shape == shape
    assert found.images.x.dtype == torch.uint8
    assert any(f"{shape[1]} x {shape[2]}" in note for note in found.notes)
    if shape == (3, 8, 8):
        with Image.open(Path(pictures) / found.names[3]) as image:  # 12 x 14: the shorter side decides, then a crop
            middle = image.resize((8, 8), Image.Resampling.BICUBIC, (1, 0, 13, 12))
        assert np.array_equal(found.images.x[3].numpy(), np.asarray(middle).transpose(2, 0, 1))


def test_memory_images_are_converted_as_pillow_does():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 9, 12), dtype=np.uint8))
    images = MemoryImages(x, torch.arange(4) % 2, ["a", "b"], {3: "x"})
    grey = fitted(images, (1, 9, 12))
    small = fitted(images, (3, 6, 6))
    for i in range(4):
        picture = Image.fromarray(x[i].permute(1, 2, 0).numpy())
        assert np.array_equal(grey.x[i, 0].numpy(), np.asarray(picture.convert("L")))
        want = picture.resize((6, 6), Image.Resampling.BICUBIC, (1.5, 0, 10.5, 9))
        assert np.array_equal(small.x[i].numpy(), np.asarray(want).transpose(2, 0, 1))
    assert grey.unreadable == {3: "x"}
    back = fitted(grey, (3, 9, 12)).x
    assert torch.equal(back[:, 0], grey.x[:, 0])
    assert torch.equal(back[:, 0], back[:, 2])
    assert torch.equal(fitted(images, (3, 9, 12)).x, x)
    with pytest.raises(ConfigError, match="3 channels cannot"):
        fitted(images, (5, 9, 12))


def test_data_sets_serve_as_surrogates():
    found = load((3, 12, 12), name="digits", quantity=20, classes=(1, 2))
    assert found.images.shape == (3, 12, 12)
    assert "resized" in found.notes[0]
    assert not load(GREY, name="digits", quantity=20).notes
    digits = load_data(DataSpec(name="digits")).train
    same = load(GREY, name="digits").images
    ids = torch.arange(len(digits))
    assert float((same.images(ids) - digits.images(ids)).abs().max()) <= 0.5 / 255 + 1e-6
    assert load(GREY, name="digits", part="test").images.digest != same.digest
    grey = load((3, 8, 8), name="shapes", quantity=3, channels=1).images.x
    assert torch.equal(grey[:, 0], grey[:, 2])
    with pytest.raises(ConfigError, match="have 5 channels"):
        load((5, 8, 8), name="digits")


def test_parquet_parts(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for role, count in (("train", 6), ("test", 4)):
        cells = [png(i + count) for i in range(count)]
        table = pa.table({"picture": cells, "label": pa.array([i % 2 for i in range(count)], pa.int64())})
        parquet.write_table(table, tmp_path / f"{role}.parquet")
    fields = {"name": "parquet", "path": str(tmp_path), "image_column": "picture"}
    train, test = (load(COLOUR, part=part, **fields).images for part in ("train", "test"))
    assert (len(train), len(test)) == (6, 4)
    assert train.shape == test.shape == COLOUR
    with pytest.raises(ConfigError, match="no column 'image'"):
        load(COLOUR, name="parquet", path=str(tmp_path))


def test_held_out_classes_of_the_cifar_pack(shared):
    pack = str(shared / "data" / "cifar10")
    fields = {"name": "cifar10", "path": pack, "limit": 400, "cache": False}
    held_out = load((3, 16, 16), classes=("cat", "dog"), quantity=40, balanced=True, **fields).images
    assert held_out.labels.bincount().tolist() == [0, 0, 0, 20, 0, 20]
    rest = load((3, 16, 16), exclude_classes=("cat", "dog"), **fields).images
    assert not {3, 5} & set(rest.labels.tolist())


# digests and settings


def test_the_digest_follows_every_choice(pictures):
    base = {"name": "folder", "path": pictures, "quantity": 12}
    changes = [{}, {"quantity": 11}, {"seed": 1}, {"balanced": True}, {"limit": 15}, {"chunks": 2, "use": 2, "seed": 2}]
    changes += [{"exclude_classes": ("cat",)}, {"classes": ("dog", "cat")}, {"chunks": 2, "use": 1}]
    changes += [{"chunks": 2, "use": (1,)}, {"channels": 1}, {"path": str(Path(pictures) / "fox"), "quantity": 10}]
    digests = [load((3, 8, 8), **{**base, **change}).images.digest for change in changes]
    digests += [load(shape, **base).images.digest for shape in ((1, 8, 8), (3, 9, 9))]
    drawn = [{}, {"seed": 1}, {"quantity": 13}, {"channels": 1}, {"name": "noise"}, {"name": "noise", "noise_std": 0.1}]
    drawn += [{"limit": 20}, {"chunks": 3, "use": 1}, {"classes": ("discs",)}, {"balanced": True}]
    digests += [load((3, 8, 8), **{"name": "shapes", "quantity": 12, **change}).images.digest for change in drawn]
    assert len(set(digests)) == len(digests)
    assert load((3, 8, 8), **base).images.digest == digests[0]
    uncached = load((3, 8, 8), cache=False, **base).images
    assert uncached.digest == digests[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "shape"}, "did you mean 'shapes'"),
        ({"name": "cifra10"}, "did you mean 'cifar10'"),
        ({"quantities": 5}, "did you mean 'quantity'"),
        ({"name": "shapes", "path": "x"}, "'path'.* would have no effect"),
        ({"name": "shapes", "on_bad": "skip"}, "'on_bad'.* would have no effect"),
        ({"name": "noise", "balanced": True}, "'balanced'.* would have no effect"),
        ({"name": "shapes", "noise_std": 0.1}, "'noise_std'.* would have no effect"),
        ({"name": "folder", "path": "x", "part": "test"}, "'part'.* would have no effect"),
        ({"name": "folder", "path": "x", "label_column": "y"}, "'label_column'.* would have no effect"),
        ({"index_file": "x", "quantity": 3}, "already names the images"),
        ({"classes": (1,), "exclude_classes": (2,)}, "not both"),
        ({"chunks": 3}, "belong together"),
        ({"use": 3}, "belong together"),
        ({"quantity": 0}, "greater than or equal to 1"),
        ({"name": "digits", "on_bad": "skip"}, "not decoded from files"),
        ({"name": "parquet"}, "needs 'path'"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError, match=message):
        load(**fields)

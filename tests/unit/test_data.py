"""Image sets, splits, augmentation, every source of data and the decoded-image cache."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from expunge import files, rng
from expunge.data import DataSpec, MemoryImages, Splits, crop_flip, load_data
from expunge.data.encoded import Decoding, EncodedImages, Source
from expunge.data.splitting import balanced_prefix, stratified
from expunge.errors import ConfigError, DataError

SHARED = Path(os.environ.get("EXPUNGE_SHARED", Path(__file__).parents[2].parent / "shared"))
PACK = SHARED / "data" / "cifar10"
needs_pack = pytest.mark.skipif(not PACK.is_dir(), reason="shared CIFAR-10 pack is absent")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))


def png(value: int = 0, size: tuple[int, int] = (8, 8), seed: int | None = None) -> bytes:
    pixels = np.full((*size, 3), value, dtype=np.uint8)
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def encoded(contents: list[bytes], **rules) -> EncodedImages:
    sources = [Source(f"img{i}.png", lambda data=data: data) for i, data in enumerate(contents)]
    labels = torch.arange(len(contents)) % 2
    return EncodedImages(sources, labels, ["a", "b"], Decoding(**rules))


def write_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), per_class: int = 4) -> Path:
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            place = root / part / name
            place.mkdir(parents=True)
            for i in range(per_class):
                (place / f"{i}.png").write_bytes(png(seed=100 * label + i))
    return root


def write_parquet(folder: Path, metadata: dict | None = None, labels=(0, 1, 0, 1), plain: bool = False) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    cells = [png(seed=i) if plain else {"bytes": png(seed=i), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": cells, "label": pa.array(labels, pa.int64())})
    table = table.replace_schema_metadata({k: json.dumps(v) for k, v in (metadata or {}).items()})
    for role in ("train", "test"):
        pq.write_table(table, folder / f"{role}.parquet")
    return folder


def test_memory_images_scale_and_index():
    x = torch.arange(2 * 1 * 2 * 2, dtype=torch.uint8).reshape(2, 1, 2, 2) * 30
    images = MemoryImages(x, torch.tensor([1, 0]), ["a", "b"])
    got = images.images(torch.tensor([1, 0, 1]))
    assert got.dtype == torch.float32
    assert torch.equal(got[0], x[1].float() / 255)
    assert images.shape == (1, 2, 2)
    assert images.subset(torch.tensor([1])).labels.tolist() == [0]


@pytest.mark.parametrize(
    ("x", "labels", "classes", "message"),
    [
        (torch.zeros(2, 1, 2, 2), [0, 2], ["a", "b"], "label 2 in row 1"),
        (torch.zeros(2, 1, 2, 2), [0, -1], ["a", "b"], "label -1 in row 1"),
        (torch.zeros(2, 1, 2, 2), [0], ["a"], "2 images but 1 labels"),
        (torch.zeros(2, 2, 2), [0, 0], ["a"], "N, C, H, W"),
        (torch.full((1, 1, 2, 2), float("nan")), [0], ["a"], "finite"),
        (torch.full((1, 1, 2, 2), 1.5), [0], ["a"], "finite and in"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int32), [0], ["a"], "uint8"),
        (torch.zeros(0, 1, 2, 2), [], ["a"], "empty"),
        (torch.zeros(1, 1, 2, 2), [0], ["a", "a"], "repeated"),
    ],
)
def test_memory_images_refuse(x, labels, classes, message):
    with pytest.raises(DataError, match=message):
        MemoryImages(x, torch.tensor(labels, dtype=torch.int64), classes)


@pytest.mark.parametrize("ids", [torch.tensor([2]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]])])
def test_ids_out_of_range_or_of_wrong_kind(ids):
    images = MemoryImages(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), ["a", "b"])
    with pytest.raises(DataError, match="sample ids"):
        images.images(ids)


def test_digest_follows_pixels_labels_and_names():
    x, y = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])
    base = MemoryImages(x, y, ["a", "b"]).digest
    assert base == MemoryImages(x.clone(), y.clone(), ["a", "b"]).digest
    other = x.clone()
    other[1, 0, 1, 1] = 1
    changed = [
        MemoryImages(other, y, ["a", "b"]),
        MemoryImages(x, y.flip(0), ["a", "b"]),
        MemoryImages(x, y, ["a", "c"]),
    ]
    assert len({base, *(c.digest for c in changed)}) == 4


def test_splits_must_agree():
    a = MemoryImages(torch.zeros(1, 1, 2, 2), torch.tensor([0]), ["a"])
    with pytest.raises(DataError, match="classes of train and test differ"):
        Splits("x", a, MemoryImages(torch.zeros(1, 1, 2, 2), torch.tensor([0]), ["b"]))
    with pytest.raises(DataError, match="image shape"):
        Splits("x", a, MemoryImages(torch.zeros(1, 1, 3, 3), torch.tensor([0]), ["a"]))


def test_augmentation_is_independent_of_batch_order():
    x, ids = torch.rand(64, 3, 8, 8), torch.arange(64)
    key = rng.key(0, "augment", 1)
    whole = crop_flip(x, ids, key)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(crop_flip(x[order], ids[order], key), whole[order])
    assert torch.equal(crop_flip(x[5:6], ids[5:6], key), whole[5:6])
    assert not torch.equal(crop_flip(x, ids, rng.key(0, "augment", 2)), whole)
    assert not torch.equal(crop_flip(x, ids + 1, key), whole)


def test_augmentation_equals_a_slow_loop():
    x, ids, key, pad = torch.rand(20, 2, 6, 6), torch.arange(100, 120), 7, 3
    dy, dx = (rng.randint(key, ids, 2 * pad + 1, stream=s) for s in (0, 1))
    mirrored = rng.randint(key, ids, 2, stream=2)
    padded = torch.zeros(20, 2, 12, 12)
    padded[:, :, 3:9, 3:9] = x
    for i, got in enumerate(crop_flip(x, ids, key, pad=pad)):
        want = padded[i, :, dy[i] : dy[i] + 6, dx[i] : dx[i] + 6]
        assert torch.equal(got, want.flip(2) if mirrored[i] else want)
    assert 0 < int(mirrored.sum()) < 20
    assert len(set(dy.tolist())) > 3
    assert torch.equal(crop_flip(x, ids, key, pad=0, flip=False), x)


def test_stratified_split_is_balanced_and_seeded():
    labels = torch.arange(300) % 3
    rest, held = stratified(labels, 0.1, 0, "val")
    assert sorted(rest.tolist() + held.tolist()) == list(range(300))
    assert labels[held].bincount().tolist() == [10, 10, 10]
    assert torch.equal(held, stratified(labels, 0.1, 0, "val")[1])
    assert not torch.equal(held, stratified(labels, 0.1, 1, "val")[1])
    assert not torch.equal(held, stratified(labels, 0.1, 0, "test")[1])
    with pytest.raises(DataError, match="no row at all"):
        stratified(labels, 0.001, 0, "val")
    with pytest.raises(DataError, match="none would be left"):
        stratified(torch.tensor([0, 0, 1]), 0.6, 0, "val")


def test_balanced_prefix():
    assert balanced_prefix(torch.arange(30) % 3, 9).tolist() == list(range(9))
    sorted_labels = torch.tensor([0] * 5 + [1] * 5)
    assert balanced_prefix(sorted_labels, 4).tolist() == [0, 1, 5, 6]
    with pytest.raises(DataError, match="limit 11"):
        balanced_prefix(sorted_labels, 11)


def test_digits():
    splits = load_data(DataSpec(name="digits", val_fraction=0.1))
    assert splits.train.shape == (1, 8, 8)
    assert len(splits.train) + len(splits.val) + len(splits.test) == 1797
    assert 440 <= len(splits.test) <= 460
    x = splits.test.images(torch.arange(len(splits.test)))
    assert 0.0 <= float(x.min()) < float(x.max()) == 1.0
    assert splits.digest == load_data(DataSpec(name="digits", val_fraction=0.1)).digest
    assert splits.digest != load_data(DataSpec(name="digits", val_fraction=0.1, seed=1)).digest
    assert not splits.augment.flip


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"name": "cifra10"}, ConfigError, "did you mean 'cifar10'"),
        ({"name": "folder"}, ConfigError, "needs 'path'"),
        ({"name": "parquet"}, ConfigError, "needs 'path'"),
        ({"name": "folder", "path": "/no/such/place"}, DataError, "no folder at"),
        ({"name": "digits", "path": "/tmp"}, ConfigError, "takes no 'path'"),
        ({"name": "digits", "resize": 16}, ConfigError, "no effect"),
        ({"name": "digits", "resizes": 16}, ConfigError, "did you mean 'resize'"),
        ({"name": "digits", "limit": 100000}, DataError, "limit 100000"),
    ],
)
def test_wrong_specs(fields, kind, message):
    with pytest.raises(kind, match=message):
        load_data(DataSpec(**fields))


@pytest.mark.parametrize("in_memory", [True, False])
def test_class_folders(tmp_path, in_memory):
    root = write_folder(tmp_path / "set")
    splits = load_data(DataSpec(name="folder", path=str(root), in_memory=in_memory))
    assert splits.classes == ["cat", "dog"]
    assert splits.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    want = np.asarray(Image.open(root / "train" / "dog" / "2.png")).transpose(2, 0, 1)
    assert np.array_equal(splits.train.images(torch.tensor([6]))[0].numpy(), want.astype(np.float32) / np.float32(255))


def test_class_folders_without_a_test_part(tmp_path):
    root = write_folder(tmp_path / "set", parts=(".",), per_class=5)
    splits = load_data(DataSpec(name="folder", path=str(root), test_fraction=0.2))
    assert (len(splits.train), len(splits.test)) == (8, 2)
    assert splits.test.labels.tolist() == [0, 1]


def test_class_folders_refuse_what_is_unclear(tmp_path):
    root = write_folder(tmp_path / "set")
    (root / "test" / "bird").mkdir()
    with pytest.raises(DataError, match="bird"):
        load_data(DataSpec(name="folder", path=str(root)))
    (root / "test" / "bird").rmdir()
    (root / "train" / "cat" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt is not an image file"):
        load_data(DataSpec(name="folder", path=str(root)))
    (root / "train" / "cat" / "notes.txt").unlink()
    (root / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="empty is empty"):
        load_data(DataSpec(name="folder", path=str(root)))


def test_images_of_different_sizes_need_resize(tmp_path):
    root = write_folder(tmp_path / "set")
    odd = root / "train" / "dog" / "1.png"
    odd.write_bytes(png(3, size=(9, 12)))
    with pytest.raises(DataError, match=r"dog/1\.png .*set `resize`"):
        load_data(DataSpec(name="folder", path=str(root)))
    assert load_data(DataSpec(name="folder", path=str(root), resize=6)).train.shape == (3, 6, 6)


@pytest.mark.parametrize("plain", [True, False])
def test_parquet(tmp_path, plain):
    pytest.importorskip("pyarrow")
    names = {"class_names": ["cat", "dog"]}
    splits = load_data(DataSpec(name="parquet", path=str(write_parquet(tmp_path / "p", names, plain=plain))))
    assert splits.classes == ["cat", "dog"]
    want = np.asarray(Image.open(io.BytesIO(png(seed=3)))).transpose(2, 0, 1)
    got = splits.train.images(torch.tensor([3]))[0]
    assert np.array_equal((got * 255).round().byte().numpy(), want)


def test_parquet_names_and_errors(tmp_path):
    pytest.importorskip("pyarrow")
    info = {"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}
    assert load_data(
        DataSpec(name="parquet", path=str(write_parquet(tmp_path / "a", {"huggingface": info})))
    ).classes == [
        "x",
        "y",
    ]
    plain = write_parquet(tmp_path / "b")
    assert load_data(DataSpec(name="parquet", path=str(plain))).classes == ["0", "1"]
    with pytest.raises(ConfigError, match="did you mean 'label'"):
        load_data(DataSpec(name="parquet", path=str(plain), label_column="labels"))
    with pytest.raises(DataError, match="row 1 has no label"):
        load_data(DataSpec(name="parquet", path=str(write_parquet(tmp_path / "c", labels=(0, None)))))
    with pytest.raises(DataError, match="label 2 in row 1"):
        load_data(
            DataSpec(name="parquet", path=str(write_parquet(tmp_path / "d", {"class_names": ["x"]}, labels=(0, 2))))
        )
    (plain / "test.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"test\.parquet: not a readable Parquet"):
        load_data(DataSpec(name="parquet", path=str(plain)))
    (plain / "test.parquet").unlink()
    with pytest.raises(DataError, match=r"no test\.parquet"):
        load_data(DataSpec(name="parquet", path=str(plain)))


def test_hub_from_a_saved_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(seed=i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(str(tmp_path / "hub"))
    splits = load_data(DataSpec(name="hub", path=str(tmp_path / "hub")))
    assert splits.classes == ["cat", "dog"]
    want = np.asarray(Image.open(io.BytesIO(png(seed=2)))).transpose(2, 0, 1)
    assert np.array_equal((splits.train.images(torch.tensor([2]))[0] * 255).round().byte().numpy(), want)


def test_hub_offline_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="save_to_disk"):
        load_data(DataSpec(name="hub", path="someone/something"))


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_torchvision_sets_are_converted(monkeypatch, name):
    datasets = pytest.importorskip("torchvision.datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)

    class Cifar:
        classes = ["a", "b"]

        def __init__(self, root, train, download):
            self.data, self.targets = pixels, [0, 1, 1, 0]

    class Svhn:
        def __init__(self, root, split, download):
            self.data, self.labels = pixels.transpose(0, 3, 1, 2), np.array([0, 1, 1, 9])

    monkeypatch.setattr(datasets, "CIFAR10", Cifar)
    monkeypatch.setattr(datasets, "SVHN", Svhn)
    splits = load_data(DataSpec(name=name))
    assert splits.train.shape == (3, 32, 32)
    got = (splits.train.images(torch.tensor([1]))[0] * 255).round().byte().numpy()
    assert np.array_equal(got, pixels[1].transpose(2, 0, 1))
    assert splits.augment.flip == (name == "cifar10")


def test_cache_is_used_and_rebuilt_when_broken(tmp_path, caplog):
    images = encoded([png(seed=i) for i in range(4)])
    first = images.cached()
    (path,) = (tmp_path / "cache" / "images").iterdir()
    images._attempt = lambda i: pytest.fail("decoded again although cached")  # type: ignore[method-assign]
    assert torch.equal(images.cached().x, first.x)
    del images._attempt

    content = path.read_bytes()
    for broken in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 255])):
        path.write_bytes(broken)
        caplog.clear()
        assert torch.equal(images.cached().x, first.x)
        assert "decoding again" in caplog.text
        assert path.read_bytes() == content


def test_cache_is_keyed_by_content_and_rules():
    contents = [png(seed=i) for i in range(4)]
    base = encoded(contents).digest
    assert base == encoded(list(contents)).digest
    assert len({base, encoded(contents, size=4).digest, encoded([*contents[:3], png(seed=9)]).digest}) == 3


def test_cache_that_cannot_be_written_is_only_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    got = encoded([png(seed=i) for i in range(2)]).cached(tmp_path / "file" / "images")
    assert got.shape == (3, 8, 8)
    assert "not cached" in caplog.text


def test_cache_folder_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("EXPUNGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "expunge"


@needs_pack
def test_cifar10_pack():
    splits = load_data(DataSpec(name="cifar10", path=str(PACK), limit=200, test_limit=100, val_fraction=0.1))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (180, 20, 100)
    assert splits.classes[3] == "cat"
    assert splits.test.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert splits.augment.pad == 4

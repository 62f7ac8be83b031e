"""Curated and other captioned data read back; labels by names; CelebA and ImageNet."""

import json

import numpy as np
import pytest
import torch
from curate_shards import CAPTIONS, image, pairs, tar, two_shards
from hypothesis import given
from hypothesis import strategies as st

from expunge.data.caption_files import OTHER, axis_of_names, load_captioned
from expunge.data.captions import mentions
from expunge.data.curate import Rules, curate, find_shards
from expunge.data.decode import decode_image
from expunge.data.encoded import EncodedImages
from expunge.data.identity import (
    IMAGENET_TEMPLATES,
    imagenet_subset,
    load_celeba,
    load_imagenet,
    read_names,
)
from expunge.errors import ConfigError, DataError


def pixels(i: int, **rules) -> torch.Tensor:
    return torch.from_numpy(decode_image(image(i), where="x", **rules)).float().div(255)


def labels_of(captions, names) -> list[int]:
    return axis_of_names(captions, names, ["{}"]).labels.tolist()


def test_curated_sets_come_back(tmp_path):
    shards = find_shards([two_shards(tmp_path / "data")])
    curate(shards, shards, tmp_path / "out", Rules(names=("Elon Musk",)))
    forget = load_captioned(tmp_path / "out/forget.tar", axis_names=["Jeff Bezos", "Elon Musk"], templates=["{}."])
    assert forget.captions == (CAPTIONS[0], CAPTIONS[3], CAPTIONS[5], "Elon Musk again")
    assert forget.classes == ["Jeff Bezos", "Elon Musk", OTHER]
    assert forget.labels.tolist() == [1, 1, 1, 1]
    assert forget.axes["name"].templates == ("{}.",)
    assert torch.equal(forget.images(torch.tensor([1])), pixels(3)[None])
    assert not torch.equal(forget.images(torch.tensor([0])), pixels(3)[None])
    both = load_captioned(tmp_path / "out", axis_names=["elon_musk", "cat"], resize=8)
    assert len(both) == 13
    assert both.shape == (3, 8, 8)
    assert set(both.labels.tolist()) == {0, 1, 2}
    retain = load_captioned(tmp_path / "out/retain.tar", axis_names=["elon_musk"])
    assert set(retain.labels.tolist()) == {1}


def test_images_stay_encoded_until_asked_for(tmp_path, monkeypatch):
    import expunge.data.curate.tars as tars

    shard = tar(tmp_path / "s.tar", pairs(CAPTIONS))
    reads = []
    real = tars.read_slice
    monkeypatch.setattr(tars, "read_slice", lambda *a: reads.append(a) or real(*a))
    data = load_captioned(shard, axis_names=["cat"], resize=8)
    assert isinstance(data.base, EncodedImages)
    assert not reads
    data.images(torch.tensor([2, 5]))
    assert len(reads) == 2
    assert data.describe(2) == f"{shard}: 00002 (id 2)"


def test_every_kind_of_source_gives_the_same_set(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(CAPTIONS):
        (folder / f"{i:05d}.jpg").write_bytes(image(i))
        (folder / f"{i:05d}.txt").write_text(text, "utf-8")
    shard = tar(tmp_path / "s.tar", pairs(CAPTIONS))
    table = pa.table({"picture": [image(i) for i in range(8)], "words": CAPTIONS})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    columns = {"image_column": "picture", "caption_column": "words"}
    sets = [
        load_captioned(folder, axis_names=["Elon Musk"]),
        load_captioned(shard, axis_names=["Elon Musk"]),
        load_captioned(tmp_path / "t.parquet", axis_names=["Elon Musk"], **columns),
    ]
    assert len({s.digest for s in sets}) == 1
    order = torch.tensor([7, 0, 4, 1])  # back and forth between row groups
    assert all(torch.equal(s.images(order), sets[0].images(order)) for s in sets)
    assert load_captioned(shard, axis_names=["cat"]).digest != sets[0].digest
    assert load_captioned(folder, axis_names=["Elon Musk"], limit=3).captions == tuple(CAPTIONS[:3])


def test_first_name_mentioned_is_the_class():
    names = ["Van Gogh", "Elon Musk", "Van", "cat"]
    captions = [
        "Elon Musk as Van Gogh",
        "van_gogh paints ELON MUSK",
        "a van with a cat",
        "a cat",
        "a musketeer",
        "vans",
    ]
    assert labels_of(captions, names) == [1, 0, 2, 3, 4, 4]


WORDS = st.sampled_from(
    ["Elon", "musk", "elon_musk", "O'Neil", "Musk.", "ELON", "café", "CAFÉ", "x", "-", "ſ", "K", "musky"]
)


@given(st.lists(WORDS, max_size=6).map(" ".join), st.lists(WORDS, min_size=1, max_size=3).map(" ".join))
def test_labels_follow_the_rule_of_mentions(caption, name):
    if name.lower() == OTHER:
        return
    assert labels_of([caption], [name]) == [0 if mentions(caption, name) else 1]


def test_letters_that_only_fold_alike_are_found():
    for caption, name in (("the \u017fun", "sun"), ("10 \u212a", "k")):
        assert mentions(caption, name)
        assert labels_of([caption], [name]) == [0]


def test_names_are_checked():
    for names in ([], [" "], ["a b", "A_b"], ["Other"]):
        with pytest.raises(ConfigError, match="axis_names must be different names"):
            axis_of_names(["x"], names, ["{}"])


def class_folders(root, kinds=("n01_cat", "n02_dog"), n=3):
    for k, kind in enumerate(kinds):
        (root / kind).mkdir(parents=True)
        for i in range(n):
            (root / kind / f"{i}.jpg").write_bytes(image(10 * k + i))
    return root


def test_class_folders_take_captions_from_templates(tmp_path):
    root = class_folders(tmp_path / "c")
    data = load_captioned(root, axis="object", templates=["a {}", "the {}"])
    assert data.captions == ("a n01 cat", "the n01 cat", "a n01 cat", "a n02 dog", "the n02 dog", "a n02 dog")
    assert data.classes == ["n01 cat", "n02 dog"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    named = load_captioned(root, class_names={"n01_cat": "cat", "n02_dog": "dog"}, limit=1)
    assert named.captions == ("a photo of cat", "a photo of dog")
    with pytest.raises(ConfigError, match="first 'n02_dog'"):
        load_captioned(root, class_names={"n01_cat": "cat"})
    with pytest.raises(ConfigError, match="axis_names would have no effect"):
        load_captioned(root, axis_names=["cat"])


def test_faults_are_named(tmp_path):
    shard = tar(tmp_path / "s.tar", [*pairs(CAPTIONS), ("bad.jpg", image(1))])
    with pytest.raises(DataError, match=r"1 of 9 pairs are incomplete: .*s\.tar: bad: no caption"):
        load_captioned(shard, axis_names=["cat"])
    with pytest.raises(ConfigError, match="give axis_names"):
        load_captioned(shard)
    with pytest.raises(ConfigError, match="'raise' or 'skip'"):
        load_captioned(shard, axis_names=["cat"], on_bad="ignore")
    broken = tar(tmp_path / "b.tar", [*pairs(CAPTIONS), ("bad.jpg", image(1)[:200]), ("bad.txt", b"a cat")])
    with pytest.raises(DataError, match=r"b\.tar: bad"):
        load_captioned(broken, axis_names=["cat"]).images(torch.tensor([8]))
    skipped = load_captioned(broken, axis_names=["cat"], on_bad="skip", max_bad=0.2)
    assert list(skipped.unreadable) == [8]
    with pytest.raises(DataError, match="1 of the 1 required images"):
        skipped.require(torch.tensor([8]))
    with pytest.raises(DataError, match="1 of 9 images cannot be read"):
        load_captioned(broken, axis_names=["cat"], on_bad="skip")


PEOPLE = ["Elon_Musk", "Ada_Lovelace", "Elon_Musk", "Bob", "Elon_Musk"]


def celeba(root, people=PEOPLE, count=None):
    (root / "img_align_celeba").mkdir(parents=True)
    rows = [f"{i:06d}.jpg {name}" for i, name in enumerate(people, 1)]
    for i in range(len(people)):
        (root / f"img_align_celeba/{i + 1:06d}.jpg").write_bytes(image(i))
    text = "\n".join([str(count or len(rows)), "image_id identity_name", *rows, ""])
    (root / "list.txt").write_text(text, "utf-8")
    return root


def test_celeba(tmp_path):
    root = celeba(tmp_path / "celeba")
    data = load_celeba(root, root / "list.txt")
    assert data.classes == ["Ada Lovelace", "Bob", "Elon Musk"]
    assert data.labels.tolist() == [2, 0, 2, 1, 2]
    assert data.captions[0] == "Elon Musk."
    assert data.axes["name"].templates == ("{}.",)
    assert torch.equal(data.images(torch.tensor([3])), pixels(3)[None])
    some = load_celeba(root, root / "list.txt", names=["elon_musk"], limit=2)
    assert some.captions == ("Elon Musk.", "Elon Musk.")
    assert some.classes == data.classes  # accuracy is among all names
    assert torch.equal(some.images(torch.tensor([1])), pixels(2)[None])
    with pytest.raises(DataError, match="did you mean 'Elon Musk'"):
        load_celeba(root, root / "list.txt", names=["Elon Mask"])
    (root / "img_align_celeba/000003.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 5 images are not in .*000003\.jpg"):
        load_celeba(root, root / "list.txt")
    assert len(load_celeba(root, root / "list.txt", limit=1)) == 3


@pytest.mark.parametrize("line", ["000001.jpg", "../x.jpg Bob", "000001.jpg Bob Smith"])
def test_celeba_lines_are_checked(tmp_path, line):
    root = celeba(tmp_path / "celeba")
    text = (root / "list.txt").read_text("utf-8").replace("000002.jpg Ada_Lovelace", line)
    (root / "list.txt").write_text(text, "utf-8")
    with pytest.raises(DataError, match="line 4: expected"):
        load_celeba(root, root / "list.txt")


def test_celeba_truncated_list_is_noticed(tmp_path):
    root = celeba(tmp_path / "celeba", count=6)
    with pytest.raises(DataError, match="must be the number of images, which is 5"):
        load_celeba(root, root / "list.txt")


def test_read_names(tmp_path):
    (tmp_path / "n.txt").write_text("Elon_Musk\n\n Lady Gaga \n", "utf-8")
    assert read_names(tmp_path / "n.txt") == ["Elon Musk", "Lady Gaga"]
    with pytest.raises(DataError, match="not a readable list"):
        read_names(tmp_path / "absent.txt")


def test_imagenet_subset_is_numpys_draw():
    ids = imagenet_subset()
    expected = np.random.RandomState(0).choice(50_000, 2_500, replace=False)
    assert ids.tolist() == expected.tolist()
    assert ids.tolist() != np.random.RandomState(1).choice(50_000, 2_500, replace=False).tolist()
    assert sorted(imagenet_subset(5, 5).tolist()) == list(range(5))
    with pytest.raises(ConfigError, match="1 to n"):
        imagenet_subset(5, 6)


def test_templates_are_those_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    theirs = [template("sea turtle") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    assert [template.format("sea turtle") for template in IMAGENET_TEMPLATES] == theirs


def test_imagenet_names(tmp_path):
    root = class_folders(tmp_path / "val", ("n1", "n2", "n3"), 2)
    data = load_imagenet(root, names=["missile", "cat", "missile"])
    assert data.classes == ["missile", "cat", "missile "]
    assert data.captions[2] == "itap of a cat."
    assert list(data.axes) == ["object"]
    assert load_imagenet(root, names=["a", "b", "c"], limit=1).labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="3 class folders for 2 class names"):
        load_imagenet(root, names=["a", "b"])


def test_a_trailing_blank_changes_no_tokens(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    for template in IMAGENET_TEMPLATES:
        assert torch.equal(tokenizer([template.format("missile ")]), tokenizer([template.format("missile")]))
        assert not torch.equal(tokenizer([template.format("missiles")]), tokenizer([template.format("missile")]))
    assert len(load_imagenet_names_unique(tmp_path, open_clip.IMAGENET_CLASSNAMES).classes) == 1000


def load_imagenet_names_unique(root, names):
    data = image(0)
    for k in range(len(names)):
        (root / f"n{k:08d}").mkdir()
        (root / f"n{k:08d}/0.jpg").write_bytes(data)
    return load_imagenet(root)


def test_metadata_folder(tmp_path):
    (tmp_path / "a.jpg").write_bytes(image(1))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "caption": "a cat"}), "utf-8")
    assert load_captioned(tmp_path, axis_names=["cat"]).captions == ("a cat",)


def test_drawn_images_are_read_with_their_prompts(tmp_path):
    """What `expunge generate` leaves in a folder; an image that is not drawn yet is an error that names it."""
    from expunge.diffusion.asks import Ask, repeated
    from expunge.diffusion.generate import generate_files

    asks = repeated([Ask("a star in neon style", 0, 0), Ask("a ring in flat style", 0, 1)], 3)
    paths = generate_files(
        lambda some: torch.full((len(some), 3, 8, 8), 0.5), asks, tmp_path, batch_size=4, facts={"model": "none"}
    )
    found = load_captioned(tmp_path, axis_names=["neon", "flat"])
    assert found.captions == tuple(a.prompt for a in asks)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.images(torch.arange(6)).shape == (6, 3, 8, 8)
    paths[4].unlink()
    with pytest.raises(DataError, match="1_1: not drawn yet"):
        load_captioned(tmp_path, axis_names=["neon", "flat"])


def test_the_axis_of_names_can_be_called_as_a_judge_knows_it(tmp_path):
    from expunge.data import DataSpec, load_data
    from expunge.diffusion.asks import Ask, repeated
    from expunge.diffusion.generate import generate_files

    asks = repeated([Ask("a star in neon style", 0, 0), Ask("a ring in flat style", 0, 1)], 3)
    generate_files(lambda some: torch.zeros(len(some), 3, 8, 8), asks, tmp_path, batch_size=8, facts={"model": "none"})
    for axis, name in ((None, "name"), ("style", "style")):
        data = load_data(DataSpec(name="captions", path=str(tmp_path), names=("neon", "flat"), axis=axis, cache=False))
        assert list(data.train.axes) == list(data.test.axes) == [name]

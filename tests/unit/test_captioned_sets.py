"""Captioned training pairs with zero-shot test images, from configurations."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.config import RunConfig, Source, parse_config
from expunge.data import DataSpec, load_data
from expunge.data.captioned_sets import ZeroShotSet
from expunge.errors import ConfigError, DataError
from expunge.request import ForgetRequest
from expunge.tasks.clip import ClipTask
from expunge.tasks.tiny_clip import tiny_towers


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(x).save(path)


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "pairs"
    texts = ["Ada Lovelace at a desk", "portrait of ada_lovelace", "Grace Hopper on a ship", "an empty street"] * 3
    for i, text in enumerate(texts):
        picture(folder / f"{i:02d}.png", i)
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


@pytest.fixture
def people(tmp_path):
    root = tmp_path / "celeba"
    rows = [("1.jpg", "Ada_Lovelace"), ("2.jpg", "Ada_Lovelace"), ("3.jpg", "Grace_Hopper"), ("4.jpg", "Alan_Turing")]
    for i, (name, _) in enumerate(rows):
        picture(root / "img_align_celeba" / name, 50 + i)
    (root / "names.txt").write_text(f"{len(rows)}\nimage_id identity_name\n" + "\n".join(f"{a} {b}" for a, b in rows))
    return root


def test_names_in_captions(pairs):
    data = load_data(DataSpec(name="captions", path=str(pairs), names=("Ada Lovelace", "Grace Hopper"), resize=16))
    assert data.classes == ["Ada Lovelace", "Grace Hopper", "other"]
    assert len(data.train) + len(data.test) == 12
    assert torch.bincount(data.test.labels).min() >= 1
    assert data.train.shape == (3, 16, 16)


def test_people_of_celeba_are_the_classes(pairs, people):
    spec = DataSpec(
        name="captions",
        path=str(pairs),
        resize=16,
        test_path=str(people),
        identities=str(people / "names.txt"),
    )
    data = load_data(spec)
    assert data.classes == ["Ada Lovelace", "Alan Turing", "Grace Hopper", "other"]
    assert data.test.labels.tolist() == [0, 0, 2, 1]
    task = ClipTask(tiny_towers("open_clip"), data)
    split = task.split(ForgetRequest.concept("Ada Lovelace"))
    assert len(split["forget"]) == 6
    assert len(split["forget_test"]) == 2
    assert task.prompts()[0] == ["Ada Lovelace."]


def test_a_list_of_names_in_a_file(pairs, tmp_path):
    (tmp_path / "names.txt").write_text("Ada_Lovelace\nGrace_Hopper\n")
    data = load_data(DataSpec(name="captions", path=str(pairs), names=str(tmp_path / "names.txt"), resize=16))
    assert data.classes[:2] == ["Ada Lovelace", "Grace Hopper"]


def test_settings_that_do_not_fit(pairs, people):
    with pytest.raises(ConfigError, match="no effect for 'digits'"):
        DataSpec(name="digits", names=("a",))
    with pytest.raises(ConfigError, match="'test_path'"):
        load_data(DataSpec(name="captions", path=str(pairs), resize=16))
    with pytest.raises(ConfigError, match="identities"):
        DataSpec(name="captions", path=str(pairs), identities="x")
    with pytest.raises(ConfigError, match="needs 'path'"):
        load_data(DataSpec(name="captions"))
    with pytest.raises(DataError, match="no test images"):
        load_data(DataSpec(name="captions", path=str(pairs), test_path=str(pairs / "none"), names=("a",), resize=16))


def test_further_sets(pairs, people, tmp_path):
    for i, name in enumerate(("cat", "dog")):
        for k in range(2):
            picture(tmp_path / "animals" / name / f"{k}.png", 90 + 10 * i + k)
    folder = ZeroShotSet(kind="folder", path=str(tmp_path / "animals"), resize=16).load()
    assert folder.classes == ["cat", "dog"]
    faces = ZeroShotSet(
        kind="celeba", path=str(people), identities=str(people / "names.txt"), names=("Ada Lovelace",), resize=16
    ).load()
    assert len(faces) == 2
    assert len(faces.classes) == 3
    with pytest.raises(ConfigError, match="identities"):
        ZeroShotSet(kind="celeba", path="x")
    with pytest.raises(ConfigError, match="no effect for 'folder'"):
        ZeroShotSet(kind="folder", path="x", subset=True)
    data = load_data(DataSpec(name="captions", path=str(pairs), names=("Ada Lovelace", "Grace Hopper"), resize=16))
    task = ClipTask(tiny_towers("open_clip"), data, others={"animals": folder})
    split = task.split(ForgetRequest.concept("Ada Lovelace"))
    seen = task.observe(split)
    assert len(seen.extra.others["animals"]) == 4
    assert task.further_metrics(split, seen)["zs_other"].ran
    assert task.data_digest() != ClipTask(task.towers, data).data_digest()


def test_configuration(pairs, people):
    body = {
        "name": "ada",
        "task": {
            "family": "clip",
            "model": {"name": "canvas"},
            "data": {"name": "captions", "path": str(pairs), "resize": 16, "test_path": str(people)},
            "others": {"faces": {"kind": "celeba", "path": str(people), "identities": str(people / "names.txt")}},
        },
        "request": {"concept": "Ada Lovelace"},
        "recipe": {"method": "slug", "forget_text": "name"},
    }
    config = parse_config(RunConfig, Source(body, "test"))
    assert config.task.others["faces"].kind == "celeba"
    broken = json.loads(json.dumps(body))
    broken["task"]["others"]["faces"]["kinds"] = "x"
    with pytest.raises(ConfigError, match=r"others\.faces\.kinds|kinds"):
        parse_config(RunConfig, Source(broken, "test"))

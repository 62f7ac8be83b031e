"""Surrogate sets: broken images, index files, statistics, configurations, the command."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from surrogate_sets import COLOUR, GREY, image_folder, load, png
from typer.testing import CliRunner, Result

from expunge.cli import app
from expunge.config import RunConfig, Source, parse_config, resolved_yaml
from expunge.data import DataSpec, load_data
from expunge.data.spec import SurrogateSpec
from expunge.data.surrogate import Surrogate, chunk_subset, class_subset
from expunge.data.surrogate_stats import contact_sheet, surrogate_statistics
from expunge.errors import ConfigError, DataError
from expunge.experiment import make_task


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    return str(image_folder(tmp_path / "pictures"))


# unreadable images


def test_a_bad_image_is_named(pictures):
    bad = Path(pictures) / "dog" / "dog1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(DataError, match=r"dog1\.png"):
        load(name="folder", path=pictures)
    found = load(name="folder", path=pictures, on_bad="skip", max_bad=0.1)
    assert "1 of 24 images cannot be read" in " ".join(found.notes)
    (broken,) = found.images.unreadable
    assert broken not in found.images.readable().tolist()
    assert surrogate_statistics(found.images, found.images).n == 23
    with pytest.raises(DataError, match="more than the tolerated share"):
        load(name="folder", path=pictures, on_bad="skip")
    assert load(name="folder", path=pictures, classes=("cat",)).images.shape == GREY  # what is not taken is not read
    (Path(pictures) / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt is not an image"):
        load(name="folder", path=pictures)


def test_folders_that_are_flat_missing_or_empty(tmp_path, pictures):
    flat = load(name="folder", path=str(Path(pictures) / "cat"))
    assert (len(flat.images), flat.images.classes) == (6, ["cat"])
    (tmp_path / "empty").mkdir()
    for path, kind, message in (
        (None, ConfigError, "needs 'path'"),
        (str(tmp_path / "nowhere"), DataError, "no folder at"),
        (str(tmp_path / "empty"), DataError, "no image files"),
    ):
        with pytest.raises(kind, match=message):
            load(name="folder", path=path)


# index files


def test_an_index_file_gives_the_same_set(tmp_path, pictures):
    for fields in ({"name": "folder", "path": pictures}, {"name": "shapes", "seed": 4}, {"name": "digits"}):
        chosen = load(COLOUR, **fields, quantity=9)
        path = tmp_path / f"{fields['name']}.json"
        chosen.write_index(path)
        again = load(COLOUR, **fields, index_file=str(path))
        assert again.images.digest == chosen.images.digest
        assert torch.equal(again.indices, chosen.indices)
        assert again.images.digest != load(COLOUR, **fields, quantity=10).images.digest
        assert load((3, 20, 20), **fields, index_file=str(path)).images.shape == (3, 20, 20)  # the content is checked


def test_an_index_file_of_another_set_is_refused(tmp_path, pictures):
    path = tmp_path / "index.json"
    load(name="shapes", seed=4, quantity=9).write_index(path)
    with pytest.raises(DataError, match="have changed"):
        load(name="shapes", seed=5, index_file=str(path))
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "indices": [*written["indices"][:-1], 1000]}))
    with pytest.raises(DataError, match="have changed"):
        load(name="shapes", seed=4, index_file=str(path))
    with pytest.raises(DataError, match="written for surrogate 'shapes', this is 'digits'"):
        load(name="digits", index_file=str(path))
    load(name="folder", path=pictures, quantity=9).write_index(path)
    name = json.loads(path.read_text())["files"][4]
    (Path(pictures) / "cat" / "added.png").write_bytes(png(5))
    assert len(load(name="folder", path=pictures, index_file=str(path)).images) == 9  # files, not numbers, are meant
    (Path(pictures) / name).write_bytes(png(999))
    with pytest.raises(DataError, match="have changed"):
        load(name="folder", path=pictures, index_file=str(path))


def test_plain_lists_and_broken_index_files(tmp_path, pictures):
    path = tmp_path / "index.json"

    def read(content: object, name: str = "folder") -> Surrogate:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load(name=name, index_file=str(path), **({"path": pictures} if name == "folder" else {}))

    assert read([5, 2]).indices.tolist() == [5, 2]
    assert read([20_000], "shapes").indices.tolist() == [20_000]
    found = read(["dog3.png", "cat/cat1.png"])  # a bare name will do where it is unique
    assert found.names == ("dog/dog3.png", "cat/cat1.png")
    (Path(pictures) / "fox" / "cat1.png").write_bytes(png(5))
    for content, message in (
        (["cat1.png"], "2 files have that name"),
        (["cat/cta1.png"], "did you mean .*'cat/cat1.png'"),
        (["cat2.png", "cat/cat2.png"], "1 images twice"),
        ([1, 1], "1 images twice"),
        ([99], "outside"),
        ([-1], "outside"),
        ([], "expected a JSON list"),
        (3, "expected a JSON list"),
        ([1, "a"], "all indices or all file names"),
        ([True], "all indices or all file names"),
        ("{", "not a JSON file"),
        ({"indices": [1]}, "missing"),
        ({"surrogate": "folder", "sha256": "0", "indices": [1], "indexes": []}, "unknown key 'indexes'"),
    ):
        with pytest.raises(DataError, match=message):
            read(content)
    with pytest.raises(DataError, match="drawn images have none"):
        read(["a.png"], "shapes")
    with pytest.raises(DataError, match="only the surrogate 'folder'"):
        read(["a.png"], "digits")
    with pytest.raises(DataError, match="no index file"):
        load(index_file=str(tmp_path / "nowhere.json"))


# statistics


def test_statistics_tell_other_domains_from_halves_of_one_set():
    digits = load_data(DataSpec(name="digits")).train
    apart = surrogate_statistics(load(quantity=1000).images, digits)
    assert apart.p < 1e-50
    assert apart.shared == 0
    halves = [chunk_subset(digits, 2, [i]) for i in range(2)]
    alike = surrogate_statistics(*halves)
    assert alike.p > 0.05
    assert (alike.n, alike.n_train) == (len(halves[0]), len(halves[1]))
    inside = surrogate_statistics(class_subset(digits, [3]), digits)
    assert inside.shared == inside.n
    with pytest.raises(DataError, match="training images"):
        surrogate_statistics(load((1, 9, 9), quantity=5).images, digits)


def test_statistics_equal_a_direct_computation():
    a, b = (load(COLOUR, quantity=700, seed=s).images for s in (0, 1))
    found = surrogate_statistics(a, b)
    x, y = (s.x.double() / 255 for s in (a, b))
    for c, channel in enumerate(found.channels):
        want = [x[:, c].mean(), x[:, c].std(correction=0), y[:, c].mean(), y[:, c].std(correction=0)]
        got = [channel.mean, channel.std, channel.train_mean, channel.train_std]
        assert got == pytest.approx([float(w) for w in want], abs=1e-6)
        means = [s[:, c].mean((1, 2)) for s in (x, y)]
        grid = torch.cat(means).sort().values
        ks = max(abs(float((means[0] <= g).double().mean() - (means[1] <= g).double().mean())) for g in grid)
        assert channel.ks == pytest.approx(ks, abs=2e-3)  # the package's means come from float32 pixels
    assert found.p == min(1.0, 3 * min(c.p for c in found.channels))


def test_the_contact_sheet_shows_the_images(tmp_path):
    images = load((1, 8, 8), quantity=50).images
    contact_sheet(images, tmp_path / "sheet.png", columns=5, rows=4, side=16)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (5 * 18, 4 * 18)
        pixels = np.asarray(sheet)
    assert np.array_equal(pixels[1:17:2, 19:35:2, 0], images.x[2, 0].numpy())  # second place: image 1 * 50 // 20


# configurations and the command


def settings(**surrogate: object) -> dict:
    model = {"name": "small_cnn", "n_classes": 10, "input_shape": [1, 8, 8]}
    task = {"model": model, "data": {"name": "digits"}, "surrogate": surrogate}
    return {"name": "x", "task": task, "request": {"class": 3}, "recipe": "random_label"}


def test_the_digits_run_with_a_drawn_surrogate():
    from expunge import Recipe, unlearn

    config = parse_config(RunConfig, Source(settings(name="shapes", quantity=300)))
    task = make_task(config.task)
    split = task.split(config.request.build())
    assert len(split["surrogate"]) == 300
    assert task.load("surrogate", split["surrogate"][:7], split).inputs.shape == (7, 1, 8, 8)
    recipe = Recipe(
        name="distil",
        objective={
            "kind": "random_label",
            "schedule": {"kind": "paired", "streams": ("forget", "surrogate"), "batch_size": 64},
        },
        space="all",
        optim={"lr": 0.01, "epochs": 1, "augment": False},
    )
    assert "surrogate" in recipe.needs()
    assert len(unlearn(task, config.request.build(), recipe))
    other = parse_config(RunConfig, Source(settings(name="shapes", quantity=301)))
    assert other.digest != config.digest
    assert make_task(other.task).data_digest() != task.data_digest()


def test_resolved_configurations_read_back():
    for fields in ({"name": "shapes", "quantity": 5}, {"name": "digits", "chunks": 3, "use": [0, 2]}):
        config = parse_config(RunConfig, Source(settings(**fields)))
        again = parse_config(RunConfig, Source(yaml.safe_load(resolved_yaml(config))))
        assert again.task == config.task
        assert again.digest == config.digest


def test_configuration_errors_name_the_key():
    for fields, message in (
        ({"name": "shpes"}, r"'task\.surrogate\.name'.*did you mean 'shapes'"),
        ({"nmae": "shapes"}, r"unknown key 'task\.surrogate\.nmae'; did you mean 'name'"),
        ({"name": "shapes", "chunks": 2}, r"task\.surrogate.*belong together"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(RunConfig, Source(settings(**fields)))


def call(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_the_command_prints_and_writes(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(name="shapes", quantity=200)))
    index, sheet = tmp_path / "index.json", tmp_path / "sheet.png"
    shown = call("data", "surrogate", config, "--write-index", index, "--preview", sheet).stdout
    digest = load(name="shapes", quantity=200).images.digest
    assert digest in shown
    assert "Kolmogorov-Smirnov" in shown
    assert sheet.read_bytes().startswith(b"\x89PNG")
    override = ("--task.surrogate", f"{{name: shapes, index_file: {index}}}")
    assert digest in call("data", "surrogate", config, *override).stdout
    assert digest not in call("data", "surrogate", config, "--task.surrogate.seed", 1).stdout
    inside = call("data", "surrogate", config, "--task.surrogate", "{name: digits, classes: [1]}")
    assert "also training images" in inside.stderr
    assert "no 'task.surrogate'" in call("data", "surrogate", config, "--task.surrogate", "null", code=2).stderr
    assert "did you mean 'noise'" in call("data", "surrogate", config, "--task.surrogate.name", "noice", code=2).stderr
    call("data", "surrogate", config, "--preview", tmp_path / "sheet.exe", code=2)


def test_the_page_is_true(root, tmp_path, monkeypatch):
    text = (root / "docs/surrogates.md").read_text("utf-8")
    examples = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.M | re.S)
    assert len(examples) > 2
    for example in examples:
        spec = SurrogateSpec(**yaml.safe_load(example)["surrogate"])
        assert f"`{spec.name}`" in text
    monkeypatch.chdir(tmp_path)
    codes = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert codes
    for code in codes:
        exec(compile(code, "surrogates.md", "exec"), {})
    named = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M))
    assert set(SurrogateSpec.model_fields) <= named

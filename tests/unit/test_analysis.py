"""Embeddings, joint t-SNE, Wasserstein distances, their files and pictures."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays
from typer.testing import CliRunner, Result

from expunge.analysis import (
    Embedding,
    analysis_section,
    embed,
    embed_weights,
    load_folder,
    pictures,
    tsne,
    w1,
    wasserstein_between,
    wasserstein_difference,
    wasserstein_matrix,
)
from expunge.analysis.embed import choose_ids
from expunge.analysis.interactive import page
from expunge.analysis.outputs import groups, mirrored, write_tsne, write_wasserstein
from expunge.cli import app
from expunge.data import DataSpec, load_data
from expunge.digest import combine, model_digest, named_tensors, state_digests
from expunge.errors import (
    ArtifactError,
    CapabilityError,
    ConfigError,
    DataError,
    DivergedError,
    NotComparableError,
)
from expunge.evaluation import Candidate
from expunge.files import atomic_save_safetensors, read_safetensors
from expunge.models import ModelSpec, build_model
from expunge.models.weights import save_weights
from expunge.patch import Dense, Manifest, Patch
from expunge.report.html import render
from expunge.report.model import Report
from expunge.request import ForgetRequest
from expunge.tasks.classifier import ClassifierTask

HOSTILE = '</script><script>alert(1)</script>"\x1b[31m\u202e'


def make(name: str = "m", n: int = 40, d: int = 5, c: int = 4, seed: int = 0, **changes: Any) -> Embedding:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % c
    fields: dict[str, Any] = {
        "name": name,
        "features": torch.randn(n, d, generator=generator) + 4 * torch.eye(c, d)[labels],
        "labels": labels,
        "ids": torch.arange(n) * 3,
        "forget": labels == 0,
        "prototypes": torch.eye(c, d),
        "classes": tuple(f"class {k}" for k in range(c)),
        "bias": torch.zeros(c),
        "model_digest": "ab",
        "data_digest": "cd",
    }
    return Embedding(**{**fields, **changes})


@pytest.fixture(scope="module")
def task() -> ClassifierTask:
    model = build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8), n_classes=10))
    return ClassifierTask(model, load_data(DataSpec(name="digits", limit=300)))


def shifted(task: ClassifierTask) -> Patch:
    """A patch that moves the first weight matrix."""
    base, _ = named_tensors(task.model)
    digests = state_digests(base)
    name = next(n for n, t in base.items() if t.ndim == 2)
    delta = torch.randn(base[name].shape, generator=torch.Generator().manual_seed(1)) * 0.1
    manifest = Manifest(base_digest=combine(digests), base_tensors=digests)
    return Patch({name: Dense(delta)}, manifest)


# Choice of samples


def test_samples_are_fixed_counted_and_balanced() -> None:
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 3)
    pool = torch.arange(103)
    ids = choose_ids(labels, pool, 23, seed=1)
    assert torch.equal(ids, choose_ids(labels, pool, 23, seed=1))
    assert not torch.equal(ids, choose_ids(labels, pool, 23, seed=2))
    assert len(ids) == len(ids.unique()) == 23
    assert torch.bincount(labels[ids]).tolist() == [10, 10, 3]
    assert torch.bincount(labels[choose_ids(labels, pool, 60, seed=1, balanced=False)]).tolist() != [29, 28, 3]
    assert torch.equal(choose_ids(labels, pool, 103), pool)
    for wrong in (0, 104):
        with pytest.raises(ConfigError, match="the set has 103"):
            choose_ids(labels, pool, wrong)


# Taking embeddings


def test_features_are_what_the_head_sees(task: ClassifierTask) -> None:
    e = embed(task, samples=50)
    task.model.eval()
    with torch.no_grad():
        logits = task.predict(task.load("mixed", e.ids, task.everything()))
    assert e.bias is not None
    torch.testing.assert_close(e.features @ e.prototypes.T + e.bias, logits)
    assert not torch.allclose(e.features.roll(1, 0) @ e.prototypes.T + e.bias, logits)
    assert torch.equal(e.labels, task.data.train.labels[e.ids])
    assert (len(e), e.role, e.head, e.classes) == (50, "train", task.head, tuple(task.classes))
    assert e.model_digest == model_digest(task.model)


def test_every_model_shows_the_same_samples_and_is_left_as_found(task: ClassifierTask, tmp_path: Path) -> None:
    split = task.split(ForgetRequest.label(3))
    task.model.train()
    before = model_digest(task.model)
    base = embed(task, split, samples=60)
    patched = embed(task, split, shifted(task), samples=60)
    save_weights(task.model, tmp_path / "w.safetensors")
    weights = embed_weights(task, tmp_path / "w.safetensors", split, samples=60)
    assert model_digest(task.model) == before == base.model_digest != patched.model_digest
    assert all(m.training for m in task.model.modules())
    assert torch.equal(base.ids, patched.ids)
    assert torch.equal(weights.features, base.features)
    assert not torch.allclose(patched.features, base.features)
    assert (base.name, patched.name, weights.name) == ("base", "patched", "w")
    assert torch.equal(base.forget, base.labels == 3)
    assert base.forget.any()
    test = embed(task, split, role="test", samples=60)
    assert torch.equal(test.forget, task.data.test.labels[test.ids] == 3)


def test_the_model_is_put_back_after_an_error(task: ClassifierTask, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model_digest(task.model)
    task.model.train()
    nan = torch.full((2, 3), torch.nan)
    with monkeypatch.context() as m:
        m.setattr(task, "represent", lambda batch: (nan[:, :1].repeat(len(batch) // 2 + 1, 1)[: len(batch)], None))
        with pytest.raises(DivergedError, match="not finite, first train sample"):
            embed(task, None, shifted(task), samples=10)
        m.setattr(task, "represent", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(task, None, shifted(task), samples=10)
    assert model_digest(task.model) == before
    assert all(m.training for m in task.model.modules())


def test_what_cannot_be_embedded_is_refused(task: ClassifierTask) -> None:
    with pytest.raises(ConfigError, match="train or test"):
        embed(task, role="val")
    odd = ClassifierTask(task.model, task.data, head=next(n for n, _ in task.model.named_modules() if n))
    with pytest.raises(CapabilityError, match="one row for each of the 10 classes"):
        embed(odd, samples=10)
    odd.head = None
    with pytest.raises(CapabilityError, match="name the module"):
        embed(odd, samples=10)


# Files


def test_round_trip(tmp_path: Path) -> None:
    e = make("a")
    e.save(tmp_path / "a.safetensors")
    again = Embedding.load(tmp_path / "a.safetensors")
    for name in ("features", "labels", "ids", "forget", "prototypes", "bias"):
        assert torch.equal(getattr(again, name), getattr(e, name))
    assert (
        replace(again, **{k: getattr(e, k) for k in ("features", "labels", "ids", "forget", "prototypes", "bias")}) == e
    )
    replace(e, bias=None).save(tmp_path / "b.safetensors")
    assert Embedding.load(tmp_path / "b.safetensors").bias is None


def test_other_schemas_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    make("a").save(file)
    tensors, metadata = read_safetensors(file)
    facts = json.loads(metadata["expunge_embedding"])
    cases: list[tuple[dict[str, str], dict[str, torch.Tensor], str]] = [
        ({}, tensors, "not an embedding"),
        ({"expunge_embedding": "{"}, tensors, "malformed header"),
        ({"expunge_embedding": json.dumps({**facts, "format": 2})}, tensors, "unknown embedding schema 2"),
        ({"expunge_embedding": json.dumps({**facts, "seed": "x"})}, tensors, "seed"),
        (metadata, {**tensors, "extra": torch.zeros(1)}, "the header promises"),
        (metadata, {**tensors, "labels": tensors["labels"] + 9}, "labels are outside"),
        (metadata, {**tensors, "ids": tensors["ids"] * 0}, "appears twice"),
        (metadata, {**tensors, "forget": tensors["forget"].to(torch.int64)}, "expected torch.bool"),
    ]
    for header, content, message in cases:
        atomic_save_safetensors(file, content, header)
        with pytest.raises(ArtifactError, match=message):
            Embedding.load(file)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_holds_the_same(tmp_path: Path) -> None:
    from pyarrow import parquet

    e = make("a")
    e.save_parquet(tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    assert table["kind"] == ["sample"] * 40 + ["prototype"] * 4
    assert table["id"][:40] == e.ids.tolist()
    torch.testing.assert_close(torch.tensor(table["features"][:40]), e.features)


def test_a_folder_has_to_show_the_same_samples(tmp_path: Path) -> None:
    make("zeta").save(tmp_path / "zeta.safetensors")
    make("base").save(tmp_path / "base.safetensors")
    make("alpha").save(tmp_path / "alpha.safetensors")
    assert [e.name for e in load_folder(tmp_path)] == ["base", "alpha", "zeta"]
    others = {
        "different samples": make("zeta", ids=torch.arange(40)),
        "their classes differ": make("zeta", classes=("a", "b", "c", "d")),
        "different data": make("zeta", data_digest="other"),
        "5 and 6 dimensions": make("zeta", d=6),
    }
    for message, other in others.items():
        other.save(tmp_path / "zeta.safetensors")
        with pytest.raises(NotComparableError, match=message):
            load_folder(tmp_path)
    make("other").save(tmp_path / "zeta.safetensors")
    with pytest.raises(ArtifactError, match="holds the embedding of 'other'"):
        load_folder(tmp_path)


# Wasserstein


def brute(x: np.ndarray, y: np.ndarray) -> float:
    """All permutations, for equal sizes."""
    import itertools

    cost = np.linalg.norm(x[:, None] - y[None], axis=2)
    n = len(x)
    return min(sum(cost[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n))) / n


CLOUD = arrays.arrays(np.float64, (4, 2), elements=strategies.floats(-5, 5, width=32))


@given(CLOUD, CLOUD)
def test_w1_is_the_best_permutation(x: np.ndarray, y: np.ndarray) -> None:
    assert w1(x, y) == pytest.approx(brute(x, y), abs=1e-12)
    assert w1(x, y) == pytest.approx(w1(y, x), abs=1e-12)
    assert w1(x, x + 1) == pytest.approx(2**0.5, abs=1e-9)  # a shift moves everything by its length
    assert w1(x, x) == 0


SOLVERS = ["assignment", "lp", *(["pot"] if importlib.util.find_spec("ot") else [])]


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_agree_on_unequal_sizes(solver: Any) -> None:
    rng = np.random.default_rng(0)
    for n, m in ((1, 5), (6, 4), (12, 7), (9, 9)):
        x, y = rng.normal(size=(n, 3)), rng.normal(size=(m, 3)) + 1
        assert w1(x, y, solver=solver) == pytest.approx(w1(x, y), rel=1e-9)
    x, y = np.array([[0.0], [3.0]]), np.array([[0.0], [0.0], [3.0]])
    assert w1(x, y, solver=solver) == pytest.approx(0.5)  # a sixth of the mass moves by 3


def test_large_unequal_clouds_take_another_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.analysis import wasserstein

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 2)), rng.normal(size=(9, 2))
    by_assignment = w1(x, y)
    monkeypatch.setattr(wasserstein, "MAX_COMMON", 10)
    monkeypatch.setattr(wasserstein, "_MAX_ASSIGNMENT", 10)
    assert w1(x, y) == pytest.approx(by_assignment, rel=1e-9)
    with pytest.raises(ConfigError, match="repeated to 63 points"):
        w1(x, y, solver="assignment")


def test_w1_refuses_what_has_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="non-empty clouds"):
        w1(np.zeros((0, 2)), np.zeros((1, 2)))
    with pytest.raises(DataError, match="not finite"):
        w1([[np.nan]], [[0.0]])
    with pytest.raises(ConfigError, match="unknown solver"):
        w1([[0.0]], [[0.0]], solver="simplex")  # type: ignore[arg-type]
    monkeypatch.setattr("expunge.analysis.wasserstein._pot", lambda: None)
    with pytest.raises(ConfigError, match="needs the package POT"):
        w1([[0.0]], [[0.0]], solver="pot")


def test_matrices_between_and_differences() -> None:
    a, b = make("a"), make("b", seed=1)
    d, e = wasserstein_matrix(a), wasserstein_matrix(b)
    upper = np.triu(np.ones((4, 4), bool), 1)
    assert (np.isnan(d.values) == ~upper).all()
    assert d.values[0, 2] == w1(a.clouds()[0], a.clouds()[2])
    assert d.counts.tolist() == [10] * 4
    assert 0 < d.noise < np.nanmin(d.values)  # the classes are further apart than halves of one
    np.testing.assert_array_equal(wasserstein_difference(d, e)[upper], (e.values - d.values)[upper])
    assert (wasserstein_between(a, replace(a, name="copy")) == 0).all()
    assert (wasserstein_between(a, b) > 0).all()
    scaled = wasserstein_matrix(replace(a, features=7 * a.features), unit=True)
    np.testing.assert_allclose(scaled.values, wasserstein_matrix(a, unit=True).values, rtol=1e-5)
    assert not np.allclose(scaled.values[upper], d.values[upper])
    with pytest.raises(NotComparableError, match="classes or scaling"):
        wasserstein_difference(d, scaled)


def test_absent_and_single_sample_classes_are_empty_not_invented() -> None:
    labels = torch.tensor([0] * 5 + [1] + [3] * 4)
    e = make(n=10, labels=labels, forget=labels == 9)
    d = wasserstein_matrix(e)
    assert d.counts.tolist() == [5, 1, 0, 4]
    assert np.isnan(d.values[2]).all()
    assert np.isnan(d.values[:, 2]).all()
    assert np.isfinite([d.values[0, 1], d.values[0, 3], d.values[1, 3], d.floor[0], d.floor[3]]).all()
    assert np.isnan(d.floor[[1, 2]]).all()
    zero = replace(e, features=e.features * (torch.arange(10) != 4)[:, None])
    with pytest.raises(DataError, match="sample 12 is the zero vector"):
        wasserstein_matrix(zero, unit=True)


# t-SNE


def test_the_map_is_joint_marked_and_repeatable() -> None:
    models = [make("a"), make("b", seed=1), replace(make("a"), name="copy")]
    maps, again = (tsne(models, perplexity=5) for _ in range(2))
    assert [m.name for m in maps] == ["a", "b", "copy"]
    for m, n in zip(maps, again, strict=True):
        assert (m.points.shape, m.prototypes.shape, m.dims) == ((40, 2), (4, 2), 2)
        np.testing.assert_array_equal(m.points, n.points)
    spread = np.ptp(maps[0].points)
    same = np.linalg.norm(maps[0].points - maps[2].points, axis=1).mean()
    other = np.linalg.norm(maps[0].points - maps[1].points, axis=1).mean()
    assert same < 0.1 * spread < other  # equal embeddings fall on each other in a joint map
    anywhere = [tsne(models, perplexity=5, seed=s, init="random", iterations=250)[0].points for s in (1, 1, 2)]
    np.testing.assert_array_equal(anywhere[0], anywhere[1])
    assert not np.array_equal(anywhere[0], anywhere[2])
    assert maps[0].settings["seed"] == 234
    assert tsne(models[:1], dims=3, perplexity=5)[0].settings["seed"] == 42


def test_tsne_refuses_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"perplexity 50 does not fit 40 samples.*1 to 39"):
        tsne([make()])
    with pytest.raises(ConfigError, match="2 or 3 dimensions"):
        tsne([make()], dims=4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown t-SNE engine"):
        tsne([make()], perplexity=5, engine="umap")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="t-SNE"):
        tsne([make()], perplexity=5, metric="nonsense")
    with pytest.raises(ConfigError, match="'pca' or 'random'"):
        tsne([make()], perplexity=5, init="spectral")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="called 'm'"):
        tsne([make(), make()], perplexity=5)
    if importlib.util.find_spec("openTSNE") is None:
        with pytest.raises(ConfigError, match="needs the package openTSNE"):
            tsne([make()], perplexity=5, engine="opentsne")
    else:
        assert tsne([make()], perplexity=5, engine="opentsne")[0].points.shape == (40, 2)


# Outputs


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for place in ("embeddings/a", "embeddings/deep/b"):
        for k, name in enumerate(("base", "after")):
            make(name, seed=k).save(tmp_path / place / f"{name}.safetensors")
    return tmp_path


def test_the_layout_is_mirrored(folders: Path) -> None:
    root = folders / "embeddings"
    assert mirrored(root / "deep/b", root) == Path("deep/b")
    assert mirrored(root / "a", root / "a") == Path("a")
    assert mirrored(Path("x/y"), Path("x/y")) == Path("y")
    pictures_ = write_tsne([root], folders / "images", perplexity=5)
    assert tree(folders / "images") == {
        f"tsne_2D/{place}/{name}.{end}"
        for place in ("a", "deep/b")
        for name in ("base", "after")
        for end in ("png", "safetensors")
    }
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures_)
    coordinates, metadata = read_safetensors(folders / "images/tsne_2D/a/base.safetensors")
    assert coordinates["points"].shape == (40, 2)
    assert json.loads(metadata["expunge_tsne"])["models"] == ["base", "after"]
    with pytest.raises(ConfigError, match="would both go to 'a'"):
        list(groups([root / "a", root]))
    for wrong, message in ((folders / "absent", "no such folder"), (folders / "images/empty", "no embedding")):
        if message == "no embedding":
            wrong.mkdir()
        with pytest.raises(ConfigError, match=message):
            list(groups([wrong]))


def test_three_dimensions_turn(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr(pictures, "AZIMUTHS", 4)
    out = folders / "images"
    (folders / "embeddings/a/after.safetensors").unlink()
    write_tsne([folders / "embeddings/a"], out, dims="animated", form="both", perplexity=5)
    write_tsne([folders / "embeddings/a"], out, dims="3", perplexity=5)
    assert {"tsne_animated/a/base.gif", "tsne_animated/a/base.html", "tsne_3D/a/base.png"} <= tree(out)
    with Image.open(out / "tsne_animated/a/base.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (4, 0)
        first = gif.convert("RGB").tobytes()
        gif.seek(1)
        assert gif.convert("RGB").tobytes() != first
    with pytest.raises(ConfigError, match="dims is 2, 3 or animated"):
        write_tsne([folders / "embeddings/a"], out, dims="4")  # type: ignore[arg-type]


def test_the_page_fetches_nothing_and_escapes_names() -> None:
    e = make(HOSTILE, classes=(HOSTILE, "b", "c", "d"))
    (projection,) = tsne([e], dims=3, perplexity=5)
    text = page(projection, pictures.limits([projection]))
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert "alert(1)</script>" not in text
    assert not re.search(r"https?://|src=|href=|@[A-Z]+@", text)
    assert "\x1b" not in text
    assert "\u202e" not in text
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert np.shape(data["points"]) == (40, 3)


def test_wasserstein_files_hold_the_numbers(folders: Path) -> None:
    written = write_wasserstein([folders / "embeddings/a"], folders / "images")
    root = folders / "images/wasserstein/a"
    assert tree(root) == {
        *("base.png", "after.png", "between.png", "delta/after_minus_base.png"),
        *("distances.csv", "distances.safetensors"),
    }
    assert {p.name for p in written} == {p.split("/")[-1] for p in tree(root)}
    base, after = load_folder(folders / "embeddings/a")
    tensors, _ = read_safetensors(root / "distances.safetensors", allow_nonfinite=True)
    expected = wasserstein_matrix(after).values - wasserstein_matrix(base).values
    np.testing.assert_array_equal(tensors["delta/after_minus_base"].numpy(), expected)
    np.testing.assert_array_equal(tensors["between/base/after"].numpy(), wasserstein_between(base, after))
    rows = list(csv.DictReader((root / "distances.csv").read_text().splitlines()))
    (row,) = [r for r in rows if (r["kind"], r["class_i"], r["class_j"]) == ("delta", "class 0", "class 3")]
    assert float(row["value"]) == expected[0, 3]
    assert row["n_i"] == "10"
    assert len(rows) == 2 * (6 + 4) + 6 + 4
    write_wasserstein([folders / "embeddings/a"], folders / "images", unit=True)
    assert (folders / "images/wasserstein_unit/a/distances.csv").read_text() != (root / "distances.csv").read_text()


# Report


def test_the_report_shows_the_section(task: ClassifierTask, tmp_path: Path) -> None:
    split = task.split(ForgetRequest.label(3))
    before = model_digest(task.model)
    patch = shifted(task)
    section = analysis_section(
        task, split, [Candidate("after", patch), Candidate("again", None, "reference")], samples=60
    )
    assert model_digest(task.model) == before
    assert [m.role for m in section.maps] == ["before", "after"]
    assert [d.role for d in section.differences] == ["after"]
    unit = [wasserstein_matrix(embed(task, split, p, samples=60), unit=True).values for p in (None, patch)]
    assert section.differences[0].values[0][1] == pytest.approx(unit[1][0, 1] - unit[0][0, 1])
    assert sum(section.forget) == 6
    report = Report("Title", forgotten_classes=["3"], embeddings=section)
    report.save_json(tmp_path / "r.json")
    again = Report.load_json(tmp_path / "r.json")
    assert again == report
    text = render(again)
    assert "<h2>Embeddings</h2>" in text
    assert "Change of the distances between classes" in text
    assert "<image" not in text  # the page's policy would block it
    assert "<h2>Embeddings</h2>" not in render(Report("Title"))
    few = analysis_section(task, split, [Candidate("after", patch)], samples=20)
    assert (few.differences, "too few" in few.note) == ((), True)


def test_broken_sections_are_refused(task: ClassifierTask) -> None:
    section = analysis_section(task, task.everything(), [], samples=20)
    good = Report("Title", embeddings=section).to_dict()
    assert Report.from_dict(json.loads(json.dumps(good))).embeddings == section
    for key, value in (("labels", [0]), ("maps", []), ("classes", ["a"]), ("surprise", 1), ("forget", None)):
        with pytest.raises(ArtifactError, match="malformed"):
            Report.from_dict({**good, "embeddings": {**asdict(section), key: value}})


# Command line

RUN = """
name: forget3
request: {class: 3}
recipe: {method: salun}
task:
  model: {name: mlp, input_shape: [1, 8, 8], weights: w.safetensors}
  data: {name: digits, limit: 300}
"""


def call(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_the_commands(task: ClassifierTask, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "run").mkdir()
    save_weights(task.model, tmp_path / "w.safetensors")
    shifted(task).save(tmp_path / "run/patch.safetensors")
    folder = tmp_path / "embeddings/a"
    words = ["analyze", "embed", tmp_path / "run.yaml", "-p", tmp_path / "run/patch.safetensors", "-o", folder]
    weights = ["-w", f"again={tmp_path / 'w.safetensors'}"]
    call(*words, *weights, "--samples", 40)
    assert [e.name for e in load_folder(folder)] == ["base", "again", "run"]
    assert "overwriting" in call(*words, code=2).stderr
    assert "two models are called 'run'" in call(*words, "-p", "run=x", "--overwrite", code=2).stderr
    out = ["-o", tmp_path / "images"]
    call("analyze", "tsne", folder, "--perplexity", 5, *out)
    call("analyze", "wasserstein", folder, *out)
    assert (tmp_path / "images/tsne_2D/a/run.png").exists()
    assert (tmp_path / "images/wasserstein/a/delta/run_minus_base.png").exists()
    assert "perplexity 50" in call("analyze", "tsne", folder, *out, code=2).stderr
    (folder / "stranger.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes())
    assert "not an embedding" in call("analyze", "wasserstein", folder, *out, code=3).stderr

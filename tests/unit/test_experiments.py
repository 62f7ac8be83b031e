"""Lists of experiments, and the index files that trainings leave for them."""

import csv
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from expunge.bench import BenchResult, bench_experiments
from expunge.cli import app
from expunge.config import RunConfig, Source, TrainConfig, parse_config
from expunge.config.experiments import METHODS, Entry, load_experiments, read_entries
from expunge.data import DataSpec, load_data
from expunge.errors import ArtifactError, ConfigError
from expunge.experiment import excluded_path, make_task, run, train
from expunge.models import ModelSpec, build_model, save_weights
from expunge.objectives.cross_entropy import FineTune
from expunge.objectives.smoothed import SmoothedFineTune
from expunge.request import ForgetRequest
from expunge.tasks.base import Batch, Split
from expunge.train import training_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
TASK: dict[str, Any] = {
    "model": {"name": "mlp", "input_shape": [1, 8, 8]},
    "data": {"name": "digits", "limit": 300},
}


def written(folder: Path, entries: Any, name: str = "list.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a file with its task, and an index file."""
    place = tmp_path_factory.mktemp("lists")
    save_weights(build_model(ModelSpec(**TASK["model"])), place / "w.safetensors")
    (place / "task.yaml").write_text(json.dumps({"name": "x", "task": TASK}))
    written(place, [3, 1, 4], "ids.json")
    return place


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiments").glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_list_reads_and_builds(path: Path) -> None:
    for entry in read_entries(path):
        recipe = entry.recipe()
        assert recipe.from_scratch == (entry.method == "retrain")
        assert recipe.optim.lr == entry.lr
        assert recipe.space.part_name == ("saliency_mask" if entry.masked else "all")


def test_the_published_lists_are_there() -> None:
    lists = {p.stem: read_entries(p) for p in (CONFIGS / "experiments").glob("*.json")}
    wanted = "classforget classforget2 classforgetga classforgetra classforget100 classforgetSVHN exp exp2 exp5 exp7"
    assert set(wanted.split()) <= set(lists)
    shared = {(e.method, e.masked, e.lr, e.epochs) for e in lists["classforget"]}
    assert shared == {("rl_split", True, 0.1, 10)}
    assert [e.class_to_forget for e in lists["classforget"]] == list(range(10))
    assert {(e.method, e.lr) for e in lists["classforgetga"]} == {("ga", 5e-4)}
    assert {e.masked for e in lists["classforgetra"]} == {False}


def test_defaults_are_those_of_the_study() -> None:
    entry = Entry(class_to_forget=0)
    recipe = entry.recipe()
    assert (entry.method, entry.masked, entry.lr, entry.epochs, entry.mask_thr) == ("rl", True, 0.1, 10, 0.5)
    assert (recipe.name, recipe.space.describe()["keep"]) == ("deepdive_rl", 0.5)
    assert (recipe.optim.momentum, recipe.optim.weight_decay) == (0, 0)
    assert {m: Entry(class_to_forget=0, method=m).recipe().name for m in METHODS} == METHODS
    assert Entry(class_to_forget=0, method="ga").recipe().optim.lr_schedule == "cosine"
    scratch = Entry(class_to_forget=0, method="retrain").recipe()
    assert (scratch.space.part_name, scratch.optim.momentum, scratch.optim.lr_schedule) == ("all", 0, "constant")
    assert recipe.digest != entry.recipe("as_published").digest


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class_to_forget": 0, "lrr": 0.1}, r"entry 2 of 2: unknown key 'lrr'; did you mean 'lr'"),
        ({"class_to_forget": 0, "load_mask": False}, "unknown key 'load_mask'; known: .*use_mask"),
        ({"class_to_forget": 0, "method": "rl_spilt"}, "entry 2 .*'rl_spilt'; did you mean 'rl_split'"),
        ({}, "entry 2 .*exactly one .*set: none"),
        ({"class_to_forget": 0, "unlearning_rate": 0.1}, "set: class_to_forget, unlearning_rate"),
        ({"unlearning_rate": 1.5}, "'unlearning_rate': .*less than 1"),
        ({"class_to_forget": 0, "checkpoint": "a/b.pt"}, "entry 2 .*expunge convert a/b.pt a/b.safetensors"),
        ({"class_to_forget": 0, "method": "retrain", "use_mask": True}, "takes no mask"),
        ({"class_to_forget": 1}, "entries 1 and 2 are the same; give a 'tag'"),
        (7, "entry 2 of 2 is '7', not a mapping"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_entries(written(tmp_path, [{"class_to_forget": 1}, entry]))
    assert len(read_entries(written(tmp_path, [{"class_to_forget": 1}, {"class_to_forget": 1, "tag": "again"}]))) == 2


@pytest.mark.parametrize("text", ["{}", "[]", "[1", '[{"lr": 1, "lr": 2, "class_to_forget": 0}]'])
def test_what_is_no_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ConfigError, match=r"list\.json"):
        read_entries(tmp_path / "list.json")


def test_a_random_share_is_drawn_anew_for_every_run(folder: Path) -> None:
    entries = [{"unlearning_rate": 0.1, "method": m, "use_mask": False} for m in ("rl", "retrain")]
    listed = load_experiments(
        written(folder, entries), runs=3, task=folder / "task.yaml", overrides={"task.model.weights": "w.safetensors"}
    )
    (group,) = listed.groups
    by_seed: dict[int, set[str]] = {}
    for item in group.items:
        by_seed.setdefault(item.seed, set()).add(item.request.digest)
    assert [len(d) for d in by_seed.values()] == [1, 1, 1]  # all methods of a run forget the same samples
    assert len(set.union(*by_seed.values())) == 3
    assert by_seed[2] == {ForgetRequest.fraction(0.1, stratified=False, seed=2).digest}
    assert sum(i.role == "before" for i in group.items) == 3


def test_tasks_come_from_the_file_or_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    entry = {"class_to_forget": 0, "checkpoint": "w.safetensors"}
    with pytest.raises(ConfigError, match=r"entry 1: .*w\.safetensors does not say .*--task"):
        load_experiments(written(folder, [entry]))
    listed = load_experiments(written(folder, [entry]), task=folder / "task.yaml", overrides={"attacks": ["mia"]})
    assert listed.settings.task.model.weights == str((folder / "w.safetensors").resolve())
    assert listed.settings.attacks == ("mia",)
    with pytest.raises(ConfigError, match="--task"):
        load_experiments(written(folder, [{"class_to_forget": 0}]))
    with pytest.raises(ConfigError, match=r"names no 'checkpoint'"):
        load_experiments(written(folder, [{"class_to_forget": 0}]), task=folder / "task.yaml")
    with pytest.raises(ArtifactError, match="no such file"):
        load_experiments(written(folder, [{**entry, "checkpoint": "none.safetensors"}]))
    config = {"name": "t", "task": TASK, "batch_size": 64, "optim": {"epochs": 1, "milestones": []}}
    made = train(parse_config(TrainConfig, Source({**config, "output": str(tmp_path / "t.safetensors")})))
    two = load_experiments(
        written(
            tmp_path, [{"class_to_forget": 0, "checkpoint": str(p)} for p in (made.weights, folder / "w.safetensors")]
        ),
        task=folder / "task.yaml",
    )
    assert [g.config.task.data.limit for g in two.groups] == [300, 300]
    titles = {i.request.title for g in two.groups for i in g.items}
    assert titles == {"class 0, t", "class 0, w"}  # one table per checkpoint
    alone = load_experiments(written(tmp_path, [{"class_to_forget": 0, "checkpoint": "t.safetensors"}]))
    assert alone.settings.task.data == DataSpec(**TASK["data"])


@pytest.fixture(scope="module")
def done(folder: Path) -> BenchResult:
    entries = [
        {"class_to_forget": 3, "method": "rl_split", "lr": 0.05, "epochs": 1},
        {"class_to_forget": 3, "method": "ga_small", "use_mask": False, "lr": 0.001, "epochs": 1},
        {"unlearning_rate": 0.2, "method": "rl", "use_mask": False, "epochs": 1},
        {"unlearning_rate": 0.2, "method": "retrain", "epochs": 1},
        {"idxs_to_forget": "ids.json", "method": "rl", "epochs": 1, "tag": "ids"},
    ]
    path = written(folder, [{**e, "checkpoint": "w.safetensors"} for e in entries], "five.json")
    listed = load_experiments(
        path, runs=2, task=folder / "task.yaml", overrides={"output": str(folder / "out"), "attacks": ["mia"]}
    )
    return bench_experiments(listed)


def test_a_list_becomes_one_benchmark(done: BenchResult) -> None:
    assert [c.error for c in done.failed] == []
    assert {c.request for c in done.cells} == {"class 3", "20 % random samples", "ids"}
    values = [float(c.value("ta") or 0) for c in done.cells if c.label.startswith("rl_split")]
    table = list(csv.DictReader((done.folder / "table.csv").read_text().splitlines()))
    row = next(r for r in table if r["model"] == "rl_split, mask 0.5, lr 0.05, 1 epoch")
    assert float(row["ta_avg"]) == pytest.approx(mean(values))
    assert float(row["ta_std"]) == pytest.approx(stdev(values))
    assert next(r for r in table if r["model"] == "untouched" and r["request"] == "ids")["ta_std"] == ""
    assert "nan" not in (done.folder / "table.csv").read_text().lower()


def test_gaps_are_to_the_model_that_left_out_the_same_samples(done: BenchResult) -> None:
    digests = {(c.label, c.seed): f["request_digest"] for c, f in zip(done.cells, done.facts, strict=True)}
    drawn = [c for c in done.cells if c.request == "20 % random samples"]
    assert {c.seed for c in drawn} == {0, 1}
    assert len({d for (label, _), d in digests.items() if label.startswith("retrain")}) == 2
    compared = [c for c in drawn if "avg_gap" in c.metrics]
    assert len(compared) == 4
    assert all(c.metrics["avg_gap"]["method"].endswith(f"seed {c.seed}") for c in compared)
    assert all("avg_gap" not in c.metrics for c in done.cells if c.request != "20 % random samples")


def test_a_finished_list_is_not_repeated(folder: Path, done: BenchResult) -> None:
    again = load_experiments(
        folder / "five.json",
        runs=2,
        task=folder / "task.yaml",
        overrides={"output": str(done.folder), "attacks": ["mia"]},
    )
    result = bench_experiments(again)
    assert all(c.reused for c in result.cells)
    assert result.facts == done.facts


def test_the_command_line_runs_a_list(folder: Path, tmp_path: Path) -> None:
    path = written(folder, [{"class_to_forget": 3, "epochs": 1, "checkpoint": "w.safetensors"}], "one.json")
    words = ["bench", "--experiments", str(path), "--task", str(folder / "task.yaml"), "--runs", "1"]
    result = CliRunner().invoke(app, [*words, "--attacks", "[mia]", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "2 cells, 0 of them from earlier runs" in result.stdout
    assert (tmp_path / "out/results.parquet").exists()
    for wrong, message in (
        (["bench", "--runs", "2", "x.yaml"], "--runs belongs to --experiments"),
        ([*words, "x.yaml"], "takes the place of a CONFIG"),
        ([*words, "--profile", "as_publishd"], "did you mean 'as_published'"),
        (["bench"], "none was given"),
    ):
        result = CliRunner().invoke(app, wrong)
        assert result.exit_code == 2
        assert message in result.stderr


TRAIN: dict[str, Any] = {"name": "t", "task": TASK, "batch_size": 64, "optim": {"epochs": 1, "milestones": []}}


def trained(folder: Path, **changes: Any) -> Path:
    data = {**TRAIN, "output": str(folder / "w.safetensors"), **changes}
    result = train(parse_config(TrainConfig, Source(data)))
    assert (result.excluded is None) == (not excluded_path(result.weights).exists())
    return excluded_path(result.weights)


def test_excluded_and_validation_indices_are_written_and_read_back(tmp_path: Path) -> None:
    task = {**TASK, "data": {"name": "digits", "limit": 300, "val_fraction": 0.25}}
    file = trained(tmp_path, task=task, exclude={"fraction": 0.1, "seed": 5})
    body = json.loads(file.read_text())
    spec = DataSpec(**task["data"])
    whole, parts = load_data(spec.model_copy(update={"val_fraction": 0.0})).train, load_data(spec)
    assert parts.val is not None
    assert torch.equal(whole.images(torch.tensor(body["val"])), parts.val.images(torch.arange(len(parts.val))))
    rest = sorted(set(range(len(whole))) - set(body["val"]))
    assert torch.equal(whole.images(torch.tensor(rest)), parts.train.images(torch.arange(len(parts.train))))
    drawn = ForgetRequest.fraction(0.1, seed=5).resolve(parts.train.labels, parts.classes)[0]
    assert ForgetRequest.from_file(file).resolve(parts.train.labels, parts.classes)[0].tolist() == drawn.tolist()
    (tmp_path / "again").mkdir()
    second = trained(tmp_path / "again", task=task, exclude={"index_file": str(file)})
    assert json.loads(second.read_text()) == body
    (tmp_path / "all").mkdir()
    assert json.loads(trained(tmp_path / "all", task=task).read_text())["forget"] == []
    (tmp_path / "none").mkdir()
    assert not trained(tmp_path / "none").exists()


def test_the_file_is_a_request_for_runs_and_lists_of_the_same_data_only(tmp_path: Path) -> None:
    file = trained(tmp_path, exclude={"class": 3})
    config = {
        "name": "r",
        "task": {**TASK, "model": {**TASK["model"], "weights": str(tmp_path / "w.safetensors")}},
        "request": {"index_file": str(file)},
        "recipe": {"method": "fine_tune", "batch_size": 64, "optim": {"epochs": 1}},
        "controls": False,
        "attacks": ["mia"],
        "output": str(tmp_path / "run"),
    }
    result = run(parse_config(RunConfig, Source(config)))
    task = make_task(parse_config(RunConfig, Source(config)).task)
    assert result.report.request["n_forget"] == int((task.data.train.labels == 3).sum())
    entry = {"idxs_to_forget": str(file), "checkpoint": str(tmp_path / "w.safetensors"), "method": "rl", "epochs": 1}
    path = written(tmp_path, [entry])
    listed = load_experiments(path, runs=1, overrides={"output": str(tmp_path / "o"), "attacks": ["mia"]})
    assert bench_experiments(listed).failed == []
    other = {"output": str(tmp_path / "o"), "task.data.limit": 110}
    with pytest.raises(ConfigError, match="written for other training images"):
        bench_experiments(load_experiments(path, runs=1, overrides=other))
    moved = {
        **config,
        "task": {**config["task"], "data": {"name": "digits", "limit": 110}},
        "output": str(tmp_path / "q"),
    }
    with pytest.raises(ConfigError, match="written for other training images"):
        run(parse_config(RunConfig, Source(moved)))
    plain = [{**entry, "idxs_to_forget": [1, 2]}]
    with pytest.raises(ConfigError, match="renumbers the rest"):
        load_experiments(written(tmp_path, plain), overrides={"task.data.val_fraction": 0.2})


def test_label_smoothing_is_that_of_torch() -> None:
    task = make_task(parse_config(TrainConfig, Source(TRAIN)).task)
    split = task.everything()
    batch: Batch = task.load("retain", torch.arange(16), split)
    from expunge.context import Context

    terms = SmoothedFineTune(label_smoothing=0.4).bind(Context(task, split))({"retain": batch})
    logits = task.predict(batch)
    wanted = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=0.4)
    torch.testing.assert_close(terms["retain"].values, wanted, rtol=1e-5, atol=1e-6)
    hard = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    assert not torch.allclose(terms["retain"].values, hard, atol=1e-3)
    assert isinstance(split, Split)
    assert isinstance(training_recipe(label_smoothing=0.4).objective, SmoothedFineTune)
    assert isinstance(training_recipe().objective, FineTune)


def test_label_smoothing_reaches_the_training(tmp_path: Path) -> None:
    from expunge.files import read_safetensors

    for name, share in (("a", 0.0), ("b", 0.4)):
        (tmp_path / name).mkdir()
        trained(tmp_path / name, label_smoothing=share)
    hard, soft = (read_safetensors(tmp_path / n / "w.safetensors") for n in "ab")
    assert not torch.equal(hard[0]["fc.weight"], soft[0]["fc.weight"])
    assert soft[1]["label_smoothing"] == "0.4"
    assert json.loads(soft[1]["task"])["data"] == TASK["data"]


def test_scar_originals_follow_the_published_recipe() -> None:
    from expunge.config import load_config

    for path in CONFIGS.glob("*_scar_train.yaml"):
        config = load_config(TrainConfig, path)
        optim = config.build_optim()
        shared = (optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.epochs, config.batch_size)
        assert shared == ("sgd", 0.1, 0.0, 5e-5, 50, 256)
        assert config.label_smoothing == 0.4
        assert (optim.lr_schedule, optim.milestones) == (
            ("multistep", (25,)) if "tiny" in path.stem else ("cosine", ())
        )


@pytest.mark.parametrize(("side", "features"), [(32, 192), (64, 768)])
def test_allcnn_heads_follow_the_image_side(side: int, features: int) -> None:
    model = build_model(ModelSpec(name="allcnn", n_classes=7, input_shape=(3, side, side))).eval()
    assert model.classifier[1].in_features == features
    assert model(torch.rand(2, 3, side, side)).shape == (2, 7)
    kernels = [
        tuple(m.weight.shape[:1]) + m.kernel_size + m.stride for m in model.modules() if isinstance(m, torch.nn.Conv2d)
    ]
    assert [k[0] for k in kernels] == [96, 96, 192, 192, 192, 192, 192, 192]
    assert [k[3] for k in kernels] == [1, 1, 2, 1, 1, 2, 1, 1]


def test_dropout_is_an_option_of_timm_models() -> None:
    pytest.importorskip("timm")
    model = build_model(ModelSpec(name="timm:resnet18", n_classes=5, dropout=0.4))
    assert model.drop_rate == 0.4
    with pytest.raises(ConfigError, match="timm models only"):
        build_model(ModelSpec(name="resnet20", dropout=0.4))

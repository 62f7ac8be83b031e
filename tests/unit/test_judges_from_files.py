"""Judges of drawn images that `expunge train` made, one per axis, and figures that need models of their own."""

import pytest

from expunge import experiment
from expunge.config import RunConfig, Source, TrainConfig, parse_config
from expunge.data import DataSpec, load_data
from expunge.errors import ConfigError
from expunge.request import ForgetRequest

MODEL = {"name": "small_cnn", "input_shape": [3, 32, 32]}
CLASSES = {"object": 8, "style": 6}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    found = {}
    for axis, n in CLASSES.items():
        found[axis] = str(folder / f"{axis}.safetensors")
        body = {
            "name": axis,
            "task": {
                "model": {**MODEL, "n_classes": n},
                "data": {"name": "canvas", "limit": 96, "test_limit": 48, "axis": axis},
                "normalize": "half",
            },
            "optim": {"epochs": 2, "lr_schedule": "constant", "milestones": [], "augment": False},
            "batch_size": 48,
            "output": found[axis],
        }
        experiment.train(parse_config(TrainConfig, Source(body, "test")))
    return found


def run(weights, **task):
    judge = {a: {"model": {**MODEL, "n_classes": n, "weights": weights[a]}} for a, n in CLASSES.items()}
    data = {"name": "canvas", "limit": 48, "test_limit": 48}
    settings = {"family": "text_to_image", "data": data, "steps": 2, "sample_batch": 48, "judge": judge, **task}
    body = {"name": "x", "task": settings, "request": {"concept": "ring"}, "recipe": "uce"}
    return parse_config(RunConfig, Source(body, "test"))


def test_one_classifier_per_axis(weights):
    task = experiment.make_task(run(weights, figures={"clip": {"name": "canvas"}, "nudity": True}).task)
    split = task.split(ForgetRequest.concept("ring"))
    seen = task.observe(split)
    assert set(seen.outputs) == {"forget", "test"}
    found = task.further_metrics(split, seen)
    assert found["gen_ua"].ran
    assert found["gen_cra"].ran
    assert found["clip_score"].ran
    nudity = [e for name, e in found.items() if name.startswith("nude")]
    assert nudity
    assert all(e.ran or "nudenet" in e.note or "nudenet" in str(e) for e in nudity)


def test_judges_that_do_not_fit_are_refused(weights):
    with pytest.raises(ConfigError, match="weights"):
        run({**weights, "style": None})
    broken = run(weights).task.model_dump(exclude_unset=True)
    broken["judge"]["style"]["model"]["n_classes"] = 5
    with pytest.raises(ConfigError, match="5 classes, the axis 6"):
        experiment.make_task(type(run(weights).task)(**broken))
    broken = run(weights).task.model_dump(exclude_unset=True)
    broken["judge"]["colour"] = broken["judge"].pop("style")
    with pytest.raises(ConfigError, match=r"'colour'.*object, style"):
        experiment.make_task(type(run(weights).task)(**broken))


def test_the_axis_of_the_data():
    data = load_data(DataSpec(name="canvas", limit=48, test_limit=48, axis="style"))
    assert data.classes == ["flat", "outline", "striped", "dotted", "neon", "pastel"]
    with pytest.raises(ConfigError, match="no effect for 'digits'"):
        DataSpec(name="digits", axis="style")

"""The two-tower task: roles and losses, zero-shot logits, requests in words, what cannot be cut."""

import copy

import pytest
import torch
from torch.nn import functional

from expunge.config import RunConfig, Source, parse_config, resolved_yaml
from expunge.config.text import read_source
from expunge.errors import CapabilityError, ConfigError, DataError, RequestError, ResourceError
from expunge.evaluation import Candidate, evaluate
from expunge.method import build_recipe
from expunge.request import ForgetRequest
from expunge.run import unlearn
from expunge.tasks.clip import ClipTask
from expunge.tasks.tiny import tiny_classifier
from expunge.tasks.tiny_clip_task import OBJECTS, STYLES, tiny_clip

CAT = ForgetRequest.concept("cat")


@pytest.fixture(scope="module", params=["transformers", "open_clip"])
def trained(request):
    return tiny_clip(request.param, n_per_cell=4)


@pytest.fixture
def task(trained):
    return copy.deepcopy(trained)


def test_concept_is_a_class_of_the_axis(task):
    split = task.split(CAT)
    number = OBJECTS.index("cat")
    assert split.removed == (number,)
    labels = task.data.train.labels
    assert torch.equal(split["forget"], (labels == number).nonzero().flatten())
    assert len(split["forget"]) + len(split["retain"]) == len(labels)
    assert (task.data.test.labels[split["forget_test"]] == number).all()
    assert not (task.data.test.labels[split["test"]] == number).any()
    assert torch.equal(task.split(ForgetRequest.label("cat"))["forget"], split["forget"])
    assert torch.equal(task.split(ForgetRequest.concept(" CAT "))["forget"], split["forget"])


def test_concept_that_only_captions_name(task):
    split = task.split(ForgetRequest.concept("red cat"))
    assert {task.data.train.captions[i] for i in split["forget"].tolist()} == {"a red cat"}
    assert split.removed == ()
    assert "forget_test" not in split.roles()


def test_concept_errors_name_the_way_out(task):
    with pytest.raises(RequestError, match=r"axis 'style'.*task\.axis"):
        task.split(ForgetRequest.concept("red"))
    with pytest.raises(RequestError, match="did you mean 'cat'"):
        task.split(ForgetRequest.concept("catt"))
    with pytest.raises(RequestError, match="text models only"):
        tiny_classifier(steps=0).split(CAT)


def test_axis_style(trained):
    task = ClipTask(trained.towers, trained.data, axis="style")
    assert task.classes == list(STYLES)
    assert task.split(ForgetRequest.concept("red")).removed == (0,)
    logits, labels = task.logits("test", task.everything())
    assert float((logits.argmax(1) == labels).float().mean()) > 0.6
    with pytest.raises(DataError, match="no label axis"):
        ClipTask(trained.towers, trained.data, axis="stile")


def test_losses_by_role(task):
    split = task.split(CAT)
    forget = task.load("forget", split["forget"][:6], split)
    pixels = task.towers.preprocess(forget.inputs)
    image = functional.normalize(task.towers.image(pixels), dim=-1)
    text = functional.normalize(task.towers.text(task.tokens("forget", forget.ids)), dim=-1)
    torch.testing.assert_close(task.loss(forget), 1 - (image * text).sum(-1))

    retain = task.load("retain", split["retain"][:6], split)
    assert len({task.data.train.captions[i] for i in retain.ids.tolist()}) == 6
    image = functional.normalize(task.towers.image(task.towers.preprocess(retain.inputs)), dim=-1)
    text = functional.normalize(task.towers.text(task.tokens("retain", retain.ids)), dim=-1)
    logits, own = task.towers.scale() * image @ text.T, torch.arange(6)
    both = [functional.cross_entropy(x, own, reduction="none") for x in (logits, logits.T)]
    torch.testing.assert_close(task.loss(retain), (both[0] + both[1]) / 2)


def test_equal_captions_are_no_negatives(task):
    split = task.split(CAT)
    ids = split["retain"]
    captions = [task.data.train.captions[i] for i in ids.tolist()]
    twins = [i for i, c in zip(ids.tolist(), captions, strict=True) if c == captions[0]][:2]
    pair = task.load("retain", torch.tensor(twins), split)
    assert task.loss(pair).abs().max() < 1e-6  # alone with its twin a pair has no negative
    other = task.load("retain", torch.tensor([twins[0], int(ids[1])]), split)
    assert task.loss(other).abs().max() > 1e-4


def test_wrong_targets_are_other_classes_prompts(task):
    split = task.split(CAT)
    batch = task.load("forget", split["forget"][:4], split)
    wrong = task.wrong_target(batch, key=3)
    assert not (wrong == batch.targets).any()
    prompts = [task.prompts()[int(c)][0] for c in wrong]
    text = functional.normalize(task.towers.text(task.towers.tokenize(prompts)), dim=-1)
    image = task.embed(batch)
    torch.testing.assert_close(task.loss(batch, wrong), 1 - (image * text).sum(-1))
    torch.testing.assert_close(task.loss(batch, batch.targets), task.loss(batch))


def test_zero_shot_logits(task):
    split = task.split(CAT)
    logits, labels = task.logits("test", split)
    assert float((logits.argmax(1) == labels).float().mean()) > 0.6
    batch = task.load("test", split["test"], split)
    with torch.no_grad():
        torch.testing.assert_close(task.predict(batch), logits, atol=1e-4, rtol=1e-4)
    seen = task.observe(split)
    torch.testing.assert_close(torch.tensor(seen.outputs["test"].logits), logits, atol=1e-4, rtol=1e-4)
    assert set(seen.extra.axes) == {"style"}
    assert len(seen.extra.axes["style"]["retain"].labels) == len(split["retain"])


def test_templates_and_prompts(trained):
    task = ClipTask(trained.towers, trained.data, templates=["a {}", "one {}"])
    assert task.prompts()[1] == ["a bee", "one bee"]
    assert task.data_digest() != trained.data_digest()
    torch.testing.assert_close(task.classifier().norm(dim=-1), torch.ones(len(OBJECTS)))
    with pytest.raises(DataError, match="exactly one"):
        ClipTask(trained.towers, trained.data, templates=["a thing"])


def test_a_coupled_batch_is_not_cut(task, monkeypatch):
    recipe = build_recipe({"method": "fine_tune", "optim": {"max_steps": 1, "micro_batch": 4}})
    with pytest.raises(ConfigError, match="micro_batch"):
        unlearn(task, CAT, recipe)
    assert len(unlearn(tiny_classifier(steps=5), ForgetRequest.label("ant"), recipe))  # fine where samples are apart
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes"):
        unlearn(task, CAT, recipe.replace(optim={"micro_batch": None}))
    monkeypatch.delenv("WORLD_SIZE")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(task, "loss", full)
    with pytest.raises(ResourceError, match="cannot be cut"):
        unlearn(task, CAT, recipe.replace(optim={"micro_batch": None}))


def test_single_samples_have_no_gradient(task):
    with pytest.raises(CapabilityError, match="as_published"):
        unlearn(task, CAT, build_recipe({"method": "ssd", "alpha": 1.2}))


def test_images_without_captions_are_refused(trained):
    with pytest.raises(DataError, match="captions"):
        ClipTask(trained.towers, tiny_classifier(steps=0).data)
    with pytest.raises(CapabilityError, match="surrogate"):
        trained.with_surrogate(trained.data.test)


def test_evaluation_and_stacking(task):
    recipe = build_recipe({"method": "gaft", "optim": {"lr": 5e-3, "epochs": 2}})
    patch = unlearn(task, CAT, recipe)
    report = evaluate(task, CAT, [Candidate("gaft", patch)])
    before, after = report.rows[0].metrics, report.rows[1].metrics
    assert report.forgotten_classes == ["cat"]
    assert after["ua"].value > before["ua"].value
    assert "fa1" in after
    assert "cross_axis" in after


def test_configuration(tmp_path):
    data = {
        "name": "canvas star",
        "task": {"family": "clip", "data": {"name": "canvas", "limit": 96, "test_limit": 48}, "axis": "style"},
        "request": {"concept": "neon"},
        "recipe": "slug",
    }
    config = parse_config(RunConfig, Source(data, "test"))
    assert config.task.model.name == "canvas"
    assert config.request.build().what.text == "neon"
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(config))
    again = parse_config(RunConfig, read_source(tmp_path / "resolved.yaml", {}))
    assert again.digest == config.digest
    with pytest.raises(ConfigError, match="did you mean 'axis'"):
        parse_config(RunConfig, Source({**data, "task": {**data["task"], "axes": "style"}}, "test"))
    with pytest.raises(ConfigError, match="family"):
        parse_config(RunConfig, Source({**data, "task": {**data["task"], "family": "klip"}}, "test"))
    with pytest.raises(ConfigError, match="exactly one"):
        parse_config(RunConfig, Source({**data, "request": {"concept": "neon", "class": 1}}, "test"))

"""Asks, prompt files, batched generation, folders of images, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

import expunge.cli.commands.generate as command
from expunge.cli import app
from expunge.diffusion.asks import Ask, first_noise, prompts_from_csv, repeated
from expunge.diffusion.generate import drawing_facts, generate, generate_files
from expunge.diffusion.image_folder import load_images, recorded
from expunge.errors import ArtifactError, ConfigError, DataError

FACTS = {"model": "abc", "steps": 10}
ASKS = repeated([Ask(f"a star, {i}", 7 + i, i, {"object": i}) for i in range(3)], 2)


def draw(asks: Sequence[Ask]) -> Tensor:
    """A model whose images are a function of noise and words."""
    words = torch.tensor([len(a.prompt) / 100 for a in asks])
    return (first_noise(asks, (3, 8, 8)).sigmoid() + words[:, None, None, None]).clamp(0, 1)


def counting(calls: list[int]):
    def sample(asks: Sequence[Ask]) -> Tensor:
        calls.append(len(asks))
        return draw(asks)

    return sample


def test_noise_is_a_function_of_seed_case_and_number_alone() -> None:
    whole = first_noise(ASKS, (4, 2, 2))
    assert torch.equal(first_noise([ASKS[4], ASKS[1]], (4, 2, 2)), whole[[4, 1]])
    changed = replace(ASKS[0], prompt="anything else", labels={})
    assert changed.key == ASKS[0].key
    assert len({a.key for a in ASKS}) == len(ASKS)
    assert {replace(ASKS[0], **{k: 99}).key != ASKS[0].key for k in ("seed", "case", "n")} == {True}


def test_a_part_of_the_asks_gives_the_same_images_in_any_batches() -> None:
    whole = generate(draw, ASKS, batch_size=4)
    assert whole.shape == (6, 3, 8, 8)
    assert whole.dtype == torch.uint8
    assert torch.equal(generate(draw, ASKS[3:], batch_size=1), whole[3:])
    assert torch.equal(generate(draw, ASKS[::-1], batch_size=5), whole.flip(0))
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(whole[0], (draw(ASKS[:1])[0] * 255).round().byte())


def test_original_and_edited_model_start_from_the_same_noise() -> None:
    seen: list[Tensor] = []

    def sample(asks: Sequence[Ask]) -> Tensor:
        seen.append(first_noise(asks, (3, 4, 4)))
        return seen[-1].sigmoid()

    generate(sample, ASKS, batch_size=6)
    generate(sample, [replace(a, prompt="after") for a in ASKS], batch_size=6)
    assert torch.equal(seen[0], seen[1])
    generate(sample, [replace(a, seed=a.seed + 1) for a in ASKS], batch_size=6)
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (lambda asks: draw(asks)[:1], r"\[2, 3, H, W\] expected"),
        (lambda asks: draw(asks) * 255, r"pixels in \[0, 1\]"),
        (lambda asks: draw(asks) * 2 - 1, r"pixels in \[0, 1\]"),
    ],
)
def test_what_is_no_image_is_refused(sample, says: str) -> None:
    with pytest.raises(DataError, match=says):
        generate(sample, ASKS[:2], batch_size=2)
    assert generate(lambda asks: draw(asks) * 1.0005, ASKS[:2], batch_size=2).max() == 255


def test_no_asks_no_batch_and_negative_numbers() -> None:
    for asks, size in (([], 1), (ASKS, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            generate(draw, asks, batch_size=size)
    with pytest.raises(DataError, match="negative"):
        Ask("x", 0, -1)
    with pytest.raises(ConfigError, match="at least 1"):
        repeated(ASKS, 0)
    assert Ask("", -5, 0).key != Ask("", 5, 0).key


def test_a_folder_holds_the_images_their_asks_and_what_drew_them(tmp_path: Path) -> None:
    calls: list[int] = []
    paths = generate_files(counting(calls), ASKS, tmp_path / "a", batch_size=4, facts=FACTS)
    assert [p.name for p in paths] == ["0_0.png", "0_1.png", "1_0.png", "1_1.png", "2_0.png", "2_1.png"]
    assert calls == [4, 2]
    assert torch.equal(load_images(paths), generate(draw, ASKS, batch_size=6))
    assert recorded(tmp_path / "a") == (FACTS, ASKS)
    assert set(json.loads((tmp_path / "a/generated.json").read_text())["versions"]) >= {"torch", "expunge"}
    # a second time nothing is drawn, and the files stay as they are
    before = {p: p.stat().st_mtime_ns for p in paths}
    again = generate(counting(calls), ASKS, batch_size=4, folder=tmp_path / "a", facts=FACTS)
    assert calls == [4, 2]
    assert before == {p: p.stat().st_mtime_ns for p in paths}
    assert torch.equal(again, load_images(paths))


def test_more_asks_join_a_folder(tmp_path: Path) -> None:
    calls: list[int] = []
    generate_files(counting(calls), ASKS[:2], tmp_path, batch_size=4, facts=FACTS)
    generate_files(counting(calls), ASKS[2:], tmp_path, batch_size=4, facts=FACTS)
    assert calls == [2, 4]
    assert recorded(tmp_path)[1] == ASKS


def test_images_of_different_sizes_are_no_set(tmp_path: Path) -> None:
    paths = generate_files(draw, ASKS[:1], tmp_path / "a", batch_size=1, facts=FACTS)
    small = generate_files(lambda a: draw(a)[..., :4, :4], ASKS[1:2], tmp_path / "b", batch_size=1, facts=FACTS)
    with pytest.raises(DataError, match="different sizes"):
        load_images([*paths, *small])
    with pytest.raises(ArtifactError, match=r"no generated\.json"):
        recorded(tmp_path)


def test_published_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text(
        ',prompt,evaluation_seed,case_number,artist\n0,"Rain, by night",4068,3,x\n1,"",12.0,0,y\n', "utf-8-sig"
    )
    assert prompts_from_csv(file) == [Ask("Rain, by night", 4068, 3), Ask("", 12, 0)]
    file.write_text("prompt,seed,label_object,label_style\na star,5,3,1\na ring,6,5,0\n")
    found = prompts_from_csv(file)
    assert found == [Ask("a star", 5, 0, {"object": 3, "style": 1}), Ask("a ring", 6, 1, {"object": 5, "style": 0})]
    file.write_text("prompt\none\ntwo\n")
    assert [(a.seed, a.case) for a in prompts_from_csv(file)] == [(0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("promt,seed\na,1\n", "did you mean 'promt'"),
        ("prompt,seed\n", "no prompts"),
        ("prompt,seed\na\n", "row 2: 2 columns"),
        ("prompt,seed\na,1,2\n", "row 2: 2 columns"),
        ("prompt,seed\na,1.5\n", "'1.5', not a whole number"),
        ("prompt,case_number\na,nan\n", "not a whole number"),
        ("prompt,case_number\na,1\nb,1\n", "occurs twice"),
        ("prompt,label_object\na,-1\n", "negative"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "p.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=says):
        prompts_from_csv(file)


# ---- the command


def cli() -> typer.Typer:
    assert any(c.callback is command.generate for c in app.registered_commands)
    return app


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli(), [str(w) for w in ("generate", *words)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("diffusers")
    from expunge.models import pipelines
    from expunge.tasks.tiny_text_to_image import tiny_parts

    monkeypatch.setattr(pipelines, "load_pipeline", lambda spec: tiny_parts())
    return tiny_parts


def test_the_command_draws_before_and_after_from_equal_noise(tmp_path: Path, tiny) -> None:
    from expunge.digest import combine, named_tensors, state_digests
    from expunge.patch import Dense, Manifest, Patch

    file = tmp_path / "p.csv"
    file.write_text("prompt,evaluation_seed,case_number\na star in neon style,3,5\na ring,4,6\n")
    tensors = named_tensors(tiny().model())[0]
    digests = state_digests(tensors)
    name = "unet.conv_out.bias"
    manifest = Manifest(base_digest=combine(digests), base_tensors=digests, recipe={"name": "x"})
    Patch({name: Dense(torch.full_like(tensors[name], 0.5))}, manifest).save(tmp_path / "p.safetensors")
    words = ("tiny", "--prompts", file, "-o", tmp_path / "out", "--steps", 2, "--guidance", 1, "--no-progress")
    text = call(*words, "--patch", tmp_path / "p.safetensors", "--limit", 1, "--images", 2)
    assert "original: 2 images" in text
    assert "erased: 2 images" in text
    facts, asks = zip(*(recorded(tmp_path / "out" / side) for side in ("original", "erased")), strict=True)
    assert asks[0] == asks[1] == repeated([Ask("a star in neon style", 3, 5)], 2)
    assert facts[0]["model"] != facts[1]["model"]
    assert facts[0] | {"model": 0, "patches": 0} == facts[1] | {"model": 0, "patches": 0}
    a, b = (load_images([tmp_path / "out" / s / n.name for n in asks[0]]) for s in ("original", "erased"))
    assert not torch.equal(a, b)
    # the rest of the list joins the same folder
    call(*words, "--images", 2)
    assert len(recorded(tmp_path / "out/original")[1]) == 4
    assert "steps: 2 there, 3 here" in call(*words, "--steps", 3, code=2).replace("\n", " ")


def test_options_that_would_have_no_effect_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt\na\n")
    base = ("--prompts", file, "-o", tmp_path / "out")
    assert "leaves nothing to draw" in call("canvas", *base, "--no-original", code=2)
    assert "--steps would have no effect" in call("c.yaml", *base, "--steps", 4, code=2)
    assert "at least one prompt" in call("canvas", *base, "--limit", 0, code=2)
    assert "at least one step" in call("canvas", *base, "--steps", 0, code=2)
    assert not (tmp_path / "out").exists()


def test_facts_tell_models_and_samplers_apart(tiny) -> None:
    from expunge.tasks.tiny_text_to_image import tiny_text_to_image

    task = tiny_text_to_image(images=False)
    facts = drawing_facts(task)
    assert facts == json.loads(json.dumps(facts))
    task.steps += 1
    assert drawing_facts(task) != facts
    task.steps -= 1
    with torch.no_grad():
        next(task.unet.parameters()).view(-1)[0] += 1
    assert {k for k, v in drawing_facts(task).items() if v != facts[k]} == {"model"}


def test_patches_and_folders_that_do_not_fit_are_refused_before_an_image(tmp_path: Path, tiny) -> None:
    from expunge.patch import Dense, Manifest, Patch

    file = tmp_path / "p.csv"
    file.write_text("prompt\na star\n")
    foreign = Patch({"w": Dense(torch.ones(1))}, Manifest(base_digest="0", base_tensors={"w": "0"}))
    foreign.save(tmp_path / "other.safetensors")
    words = ("tiny", "--prompts", file, "-o", tmp_path / "out", "--steps", 2, "--no-progress")
    call(*words, "--patch", tmp_path / "other.safetensors", code=3)
    assert "at least one image at a time" in call(*words, "--batch-size", 0, code=2)
    assert "is not available here" in call(*words, "--device", "nonsense", code=2)
    assert not (tmp_path / "out").exists()

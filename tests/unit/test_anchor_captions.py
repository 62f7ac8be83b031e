"""Captions and drawn anchors of Ablating Concepts: lists, files, negative prompts, copies left out, token tables."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from concept_runs import REQUEST, batch_of, context, put_back
from torch import Tensor

from expunge.data.captions import mentions
from expunge.diffusion.anchor_captions import ANCHORS, anchor_captions
from expunge.diffusion.latents import decode
from expunge.diffusion.process import draw_noise
from expunge.diffusion.sample import guided
from expunge.digest import json_digest
from expunge.errors import ConfigError, DataError, RequestError
from expunge.method import build_recipe
from expunge.methods import _anchors
from expunge.methods._ablation import AblatingConcepts
from expunge.methods._anchors import anchors, sources
from expunge.recipe import Recipe
from expunge.run import unlearn
from expunge.schedule import Paired
from expunge.tasks.tiny_text_to_image import tiny_text_to_image

DRAWN = Paired(streams=("concept",), batch_size=2)
RULE = Path(__file__).resolve().parents[2] / "scripts" / "write_anchor_captions.py"


@pytest.fixture(scope="module")
def shared() -> Any:
    return tiny_text_to_image(images=False)


@pytest.fixture
def task(shared: Any) -> Iterator[Any]:
    with put_back(shared):
        yield shared


def short(steps: int = 3, **settings: Any) -> Recipe:
    recipe = build_recipe({"method": "ablating_concepts", "batch_size": 2, "anchor_images": 5, **settings})
    return recipe.replace(optim={"max_steps": steps, "epochs": steps, "lr": 1e-3})


@pytest.mark.parametrize("name", ANCHORS)
def test_lists_of_the_package(name: str) -> None:
    found = anchor_captions(name)
    assert len(found) == len(set(found)) == 200
    assert all(mentions(c, name) for c in found)
    assert not any(mentions(c, other) for c in found for other in ANCHORS if other not in (name, "dog"))
    spec = importlib.util.spec_from_file_location("write_anchor_captions", RULE)
    assert spec is not None
    assert spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    assert found == rule.captions(name)
    assert set(rule.PHRASES) == set(ANCHORS)


def test_caption_files(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("# of ours\n\na  square on a table\na red square\n", encoding="utf-8")
    assert anchor_captions(str(file), "square") == ["a square on a table", "a red square"]
    for text, anchor, message in (
        ("a square\na squared circle\n", "square", "line 2 does not name 'square'"),
        ("a square\n\na square\n", "", "line 3 repeats line 1"),
        ("# none\n", "", "no captions"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            anchor_captions(str(file), anchor)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a text file"):
        anchor_captions(str(file))
    with pytest.raises(ConfigError, match="neither a list of the package"):
        build_recipe({"method": "ablating_concepts", "captions": "paintings"})


def test_captions_and_what_the_anchor_is_called(task: Any, tmp_path: Path) -> None:
    ctx = context(task)
    cats = sources(AblatingConcepts(captions="cat", schedule=DRAWN), ctx)
    assert len(cats) == 200
    assert {name for _, name in cats} == {"cat"}
    pictures = sources(AblatingConcepts(captions="painting", form="style", schedule=DRAWN), ctx)
    assert all("painting" in c for c, _ in pictures)
    file = tmp_path / "own.txt"
    file.write_text("a square\na picture of a square\n", encoding="utf-8")
    named = AblatingConcepts(captions=str(file), anchor="square", schedule=DRAWN)
    assert sources(named, ctx) == [("a square", "square"), ("a picture of a square", "square")]
    with pytest.raises(ConfigError, match="need 'anchor'"):
        sources(AblatingConcepts(captions=str(file), schedule=DRAWN), ctx)
    with pytest.raises(DataError, match="does not name the anchor 'square'"):
        sources(AblatingConcepts(captions=("a ring",), anchor="square", schedule=DRAWN), ctx)
    with pytest.raises(ConfigError, match="images have captions of their own"):
        AblatingConcepts(captions="cat")
    recipe = build_recipe({"method": "ablating_concepts", "captions": "cat"})
    assert recipe.objective.schedule.roles() == ("concept",)  # type: ignore[union-attr]
    assert Recipe(**recipe.describe()) == recipe


def test_prompts_alone_are_enough(task: Any, tmp_path: Path) -> None:
    """Draw for the list, train, leave a trace; resume to the same bits without drawing again."""
    recipe = short(captions="painting", profile="style")
    patch = unlearn(task, REQUEST, recipe)
    assert all("attn2.to_" in n for n in patch)
    facts = patch.manifest.findings["anchors"]
    assert (facts["drawn"], facts["captions"], facts["source"], facts["guidance"]) == (5, 200, "painting", 6.0)
    assert facts["captions_digest"] == json_digest(anchor_captions("painting"))
    assert unlearn(task, REQUEST, short(captions="robot", profile="style")).digest != patch.digest
    assert len(unlearn(task, REQUEST, short(anchors="generated", place=False)))
    with pytest.raises(RequestError, match="both are needed"):
        unlearn(task, REQUEST, short())

    class Killed(Exception):  # noqa: N818
        pass

    def kill(step: int, *_: Any) -> None:
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        unlearn(task, REQUEST, recipe, run_dir=tmp_path, checkpoint_every=1, on_step=kill)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_anchors, "guided", None)
        resumed = unlearn(task, REQUEST, recipe, run_dir=tmp_path, checkpoint_every=1)
    assert resumed.digest == patch.digest
    assert resumed.manifest.findings == patch.manifest.findings


def test_names_that_are_cut_off_are_told(task: Any) -> None:
    texts = {"long": ("a square" + " and a square" * 8,), "short": ("a square",)}
    notes = {}
    for name, captions in texts.items():
        ctx = context(task)
        own = AblatingConcepts(form="style", captions=captions, schedule=DRAWN, anchor_images=2, anchor_steps=1)
        own._prepared(ctx, batch_of(ctx, "concept", torch.arange(8)), ["circle"])
        notes[name] = ctx.notes
    assert any("cut off" in n for n in notes["long"])
    assert not notes["short"]


def test_a_changed_file_is_another_run(task: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("a square\n", encoding="utf-8")
    recipe = short(1, captions=str(file), anchor="square", place=False)
    unlearn(task, REQUEST, recipe, run_dir=tmp_path / "run")
    file.write_text("a picture of a square\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="other settings"):
        unlearn(task, REQUEST, recipe, run_dir=tmp_path / "run")


@pytest.mark.parametrize("form", ["content", "style"])
def test_unwanted_content_is_the_negative_prompt(task: Any, form: Any) -> None:
    ctx = context(task)
    texts = ("a square", "a ring")
    own = AblatingConcepts(form=form, captions=texts, schedule=DRAWN, anchor_images=3, anchor_steps=2)
    found = anchors(own, ctx, ["star", "heart"])

    def by_hand(negative: str) -> Tensor:
        ids = torch.arange(3)
        with torch.no_grad():
            conditions = task.conditions(["a square", "a ring", "a square"])
            null = task.conditions([negative]).expand(3, -1, -1)
            noise = draw_noise(ctx.key("anchors"), ids, task.latent_shape)
            return guided(task.eps, task.scheduler, noise, conditions, null, steps=2, guidance=6.0)

    right, wrong = ("star; heart", "") if form == "content" else ("", "star; heart")
    torch.testing.assert_close(found.latents, by_hand(right), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.latents, by_hand(wrong), rtol=1e-3, atol=1e-3)
    assert found.captions == ("a square", "a ring", "a square")
    assert ctx.findings["anchors"]["negative"] == (right if form == "content" else "")
    with pytest.raises(ConfigError, match="does nothing"):
        AblatingConcepts(form="content", captions=texts, schedule=DRAWN, anchor_guidance=1.0)


def test_copies_are_left_out(task: Any, tmp_path: Path) -> None:
    from PIL import Image

    ctx = context(task)
    texts = ("a square", "a ring", "a moon")
    plain = AblatingConcepts(form="memorised", captions=texts, schedule=DRAWN, anchor_images=5)
    every = anchors(plain, ctx, ["a b"])
    with torch.no_grad():
        picture = (decode(task.parts.vae, every.latents[1:2])[0] * 255).round().byte()
    file = tmp_path / "copy.png"
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)

    def kept(threshold: float) -> Any:
        settings = {"exclude_similar_to": str(file), "threshold": threshold, "similarity": {"name": "canvas"}}
        part = AblatingConcepts(**{**plain.model_dump(), **settings})
        return anchors(part, context(task), ["a b"])

    found = kept(0.99999)
    assert not any(torch.equal(x, every.latents[1]) for x in found.latents)
    where = [next(i for i, x in enumerate(every.latents) if torch.equal(x, y)) for y in found.latents]
    assert 0 < len(where) < 5
    assert found.captions == tuple(every.captions[i] for i in where)
    with pytest.raises(RequestError, match="raise 'threshold'"):
        kept(-0.99)
    with pytest.raises(ConfigError, match="needs 'similarity'"):
        AblatingConcepts(exclude_similar_to=str(file), schedule=DRAWN)
    with pytest.raises(ConfigError, match="no file"):
        AblatingConcepts(exclude_similar_to="nowhere.png", similarity={"name": "canvas"}, schedule=DRAWN)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_token_tables_instead_of_the_unet(kind: Any) -> None:
    """Only the tables change, and of them the rows of words in captions with the concept: decay would change all."""
    task = tiny_text_to_image(images=False, kind=kind)
    recipe = short(2, captions=("a square", "a picture of a square"), anchor="square", parameters="embedding")
    recipe = recipe.replace(objective=recipe.objective.model_copy(update={"place": False}))  # type: ignore[union-attr]
    patch = unlearn(task, REQUEST, recipe)
    assert all("token_embedding" in n for n in patch)
    assert len(patch) == (2 if kind == "xl" else 1)
    tokenizer = task.parts.tokenizer
    used = set(tokenizer("a picture of a circle")["input_ids"])
    moved = (patch[next(iter(patch))].dense() != 0).any(1).nonzero()[:, 0].tolist()
    (circle,) = tokenizer("circle", add_special_tokens=False)["input_ids"]
    assert circle in moved
    assert set(moved) <= used
    decayed = unlearn(task, REQUEST, recipe.replace(optim={**recipe.optim.model_dump(), "weight_decay": 0.1}))
    assert int((decayed[next(iter(decayed))].dense() != 0).any(1).sum()) > len(used)


def test_a_frozen_teacher_has_the_text_encoder_of_the_student(task: Any) -> None:
    with pytest.raises(ConfigError, match="no frozen teacher"):
        build_recipe({"method": "ablating_concepts", "parameters": "embedding", "teacher": "frozen"})
    recipe = short(1, captions=("a square",), anchor="square", teacher="frozen", place=False)
    with pytest.raises(ConfigError, match="choose teacher 'current'"):
        unlearn(task, REQUEST, recipe.replace(space={"kind": "layers", "targets": ["text_encoder"]}))
    assert len(unlearn(task, REQUEST, recipe))


def test_gradients_reach_the_table_through_the_captions_with_the_concept(task: Any) -> None:
    ctx = context(task)
    own = AblatingConcepts(captions=("a square",), anchor="square", schedule=DRAWN, anchor_images=2)
    values = own.bind(ctx)({"concept": batch_of(ctx, "concept")})["concept"].values
    (table,) = [p for n, p in task.model.named_parameters() if "token_embedding" in n]
    (gradient,) = torch.autograd.grad(values.mean(), [table])
    (circle,), (square,) = (
        task.parts.tokenizer(w, add_special_tokens=False)["input_ids"] for w in ("circle", "square")
    )
    assert float(gradient[circle].abs().max()) > 0
    assert float(gradient[square].abs().max()) == 0

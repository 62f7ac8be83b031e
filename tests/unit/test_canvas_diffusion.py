"""The text-to-image pipeline and the judge in the package: they load offline, draw, and tell figures apart."""

import importlib.resources
import json

import pytest
import torch

from expunge.data.canvas import FORMS, canvas_captions, draw_part
from expunge.data.canvas_draw import SHAPES, STYLES
from expunge.diffusion.canvas import canvas_prompts, load_canvas_pipeline
from expunge.errors import ArtifactError, ConfigError, DataError
from expunge.files import atomic_save_safetensors, read_safetensors
from expunge.models.canvas_judge import CanvasJudge, judged, load_judge

ASSETS = importlib.resources.files("expunge") / "assets"
FOLDER = ASSETS / "canvas_diffusion"
FRESH = torch.arange(200_000, 200_480)


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def drawn():
    return draw_part("test", FRESH)


@pytest.fixture(scope="module")
def pipeline():
    pytest.importorskip("diffusers")
    return load_canvas_pipeline()


def sample(pipeline, texts, steps, seed=0, **how):
    generator = torch.Generator().manual_seed(seed)
    how = {"num_inference_steps": steps, "guidance_scale": 3.0, "generator": generator, "output_type": "pt"} | how
    with torch.no_grad():
        return pipeline(texts, **how).images


def all_files(folder):
    return [f for f in folder.rglob("*") if f.is_file()]


# --- the judge --------------------------------------------------------------------------------------------------------


def test_the_judge_names_objects_and_styles_of_fresh_images(judge, drawn):
    objects, styles = judged(judge, drawn.images(torch.arange(480)))
    for seen, axis in ((objects, drawn.axes["object"]), (styles, drawn.axes["style"])):
        assert float((seen == axis.labels).double().mean()) >= 0.99
        assert float((seen == axis.labels.roll(1)).double().mean()) < 0.3


def test_the_judge_sees_a_hidden_object_no_more_but_still_its_style(judge, drawn):
    x = drawn.images(torch.arange(480))
    middle = x[..., 15:17, 15:17].mean(dim=(2, 3), keepdim=True)
    objects, _ = judged(judge, middle.expand_as(x).contiguous())
    assert float((objects == drawn.axes["object"].labels).double().mean()) < 0.3


def test_judging_in_parts_is_judging_at_once(judge, drawn):
    x = drawn.images(torch.arange(48))
    for parts, whole in zip(judged(judge, x, chunk=7), judged(judge, x), strict=True):
        assert torch.equal(parts, whole)


def test_the_judge_is_frozen_and_has_one_logit_per_name(judge, drawn):
    verdict = judge(drawn.images(torch.arange(5)))
    assert (verdict.object.shape, verdict.style.shape) == ((5, len(SHAPES)), (5, len(STYLES)))
    assert not judge.training
    assert {(p.dtype, p.requires_grad) for p in judge.parameters()} == {(torch.float32, False)}


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8)])
def test_the_judge_refuses_images_of_another_kind(judge, wrong):
    with pytest.raises(DataError, match=r"float images \[B, 3, H, W\]"):
        judge(wrong)


def test_a_judge_without_its_own_weights_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="install the package again"):
        load_judge(tmp_path)
    state = CanvasJudge().state_dict()
    del state["style.bias"]
    atomic_save_safetensors(tmp_path / "model.safetensors", state)
    with pytest.raises(ArtifactError, match=r"style\.bias"):
        load_judge(tmp_path)


def test_features_are_a_distance_for_fid(judge, drawn):
    metrics = pytest.importorskip("torchmetrics.image.fid")

    def distance(x, y):
        fid = metrics.FrechetInceptionDistance(feature=judge.features, normalize=True)
        fid.update(x, real=True)
        fid.update(y, real=False)
        return float(fid.compute())

    assert judge.features.num_features == 128
    x = drawn.images(torch.arange(480))
    again = draw_part("test", FRESH + 4800).images(torch.arange(480))
    stars = draw_part("test", torch.arange(480) * 8 + 3).images(torch.arange(480))
    assert distance(x, again) < 0.2 * distance(x, stars)


# --- the pipeline -----------------------------------------------------------------------------------------------------


def test_the_folder_loads_with_diffusers_alone_in_either_precision():
    diffusers = pytest.importorskip("diffusers")
    for dtype in (torch.float32, torch.float16):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(str(FOLDER), dtype=dtype, local_files_only=True)
        assert {
            p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()
        } == {dtype}
    assert pipeline.safety_checker is None
    assert not pipeline.config.requires_safety_checker
    assert isinstance(pipeline.scheduler, diffusers.DDIMScheduler)


def test_the_folder_is_small_in_half_precision_and_names_no_place():
    weights = [f for f in all_files(FOLDER) if f.name.endswith(".safetensors")]
    assert len(weights) == 3
    for file in weights:
        assert {t.dtype for t in read_safetensors(str(file))[0].values()} == {torch.float16}
    assert sum(f.stat().st_size for folder in (FOLDER, ASSETS / "canvas_judge") for f in all_files(folder)) < 5_000_000
    assert {f.name.rpartition(".")[2] for f in all_files(FOLDER)} == {"safetensors", "json", "md"}
    for file in all_files(FOLDER):
        if file.name.endswith(".json"):
            assert "_name_or_path" not in json.loads(file.read_text("utf-8"))
    for name in ("canvas_diffusion", "canvas_judge"):
        assert f"train_{name}.py" in (ASSETS / name / "README.md").read_text("utf-8")


def test_four_steps_give_images_that_repeat_with_their_seed(pipeline):
    texts = ["a star in neon style", "a flat heart"]
    images = sample(pipeline, texts, 4)
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images, sample(pipeline, texts, 4))
    assert not torch.equal(images, sample(pipeline, texts, 4, seed=1))
    assert not torch.equal(images, sample(pipeline, texts[::-1], 4))


def test_samples_show_what_their_captions_say(pipeline, judge):
    prompts = canvas_prompts()
    objects, styles = judged(judge, sample(pipeline, [p.text for p in prompts], 10))
    asked = torch.tensor([[p.object, p.style] for p in prompts])
    assert float((objects == asked[:, 0]).double().mean()) >= 0.75
    assert float((styles == asked[:, 1]).double().mean()) >= 0.95
    assert float((objects == asked[:, 0].roll(6)).double().mean()) < 0.3


def test_without_guidance_the_empty_prompt_draws_any_figure(pipeline, judge):
    objects, styles = judged(judge, sample(pipeline, [""] * 48, 10, guidance_scale=1.0))
    assert len(objects.unique()) >= 4
    assert len(styles.unique()) >= 4
    with torch.no_grad():
        state, empty = pipeline.encode_prompt("a flat star", "cpu", 1, True)
    assert state.shape == empty.shape == (1, 16, 64)
    assert float((state - empty).norm()) > 0.1 * float(empty.norm())


def test_latents_have_unit_spread_and_decode_to_the_figure(pipeline, judge, drawn):
    x = drawn.images(torch.arange(96))
    with torch.no_grad():
        latents = pipeline.vae.encode(2 * x - 1).latent_dist.mode()
        objects, styles = judged(judge, pipeline.vae.decode(latents).sample.clamp(-1, 1) / 2 + 0.5)
    assert float(latents.std() * pipeline.vae.config.scaling_factor) == pytest.approx(1, abs=0.05)
    assert latents.shape == (96, 4, 8, 8)
    right = (objects == drawn.axes["object"].labels[:96]) & (styles == drawn.axes["style"].labels[:96])
    assert float(right.double().mean()) >= 0.95


def test_the_text_encoder_is_the_text_half_of_the_clip_in_the_package(pipeline):
    ours, _ = read_safetensors(str(FOLDER / "text_encoder" / "model.safetensors"))
    clip, _ = read_safetensors(str(ASSETS / "canvas_clip" / "model.safetensors"))
    half = {k.removeprefix("text_model."): v for k, v in clip.items() if k.startswith("text_model.")}
    ours = {k.removeprefix("text_model."): v for k, v in ours.items()}
    assert ours.keys() == half.keys()
    assert all(torch.equal(ours[k], half[k]) for k in half)
    from transformers import CLIPTokenizer

    known = CLIPTokenizer.from_pretrained(str(ASSETS / "canvas_clip"), local_files_only=True)
    for text in ("a flat star", "", "zebra"):
        assert pipeline.tokenizer(text)["input_ids"] == known(text)["input_ids"]
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings == 16


def test_loading_is_quiet_and_leaves_the_progress_bars_as_they_were(capfd):
    of_diffusers = pytest.importorskip("diffusers.utils.logging")
    from transformers.utils import logging as of_transformers

    before = of_diffusers.is_progress_bar_enabled(), of_transformers.is_progress_bar_enabled()
    of_diffusers.enable_progress_bar()
    try:
        sample(load_canvas_pipeline(), ["a flat star"], 1)
        assert capfd.readouterr() == ("", "")
        assert of_diffusers.is_progress_bar_enabled()
        of_diffusers.disable_progress_bar()
        load_canvas_pipeline()
        assert not of_diffusers.is_progress_bar_enabled()
        assert of_transformers.is_progress_bar_enabled() == before[1]
    finally:
        (of_diffusers.enable_progress_bar if before[0] else of_diffusers.disable_progress_bar)()


def test_a_missing_folder_says_so(tmp_path):
    pytest.importorskip("diffusers")
    with pytest.raises(ArtifactError, match="install the package again"):
        load_canvas_pipeline(folder=tmp_path)


def test_prompts_are_the_captions_with_their_labels():
    for form in range(len(FORMS)):
        prompts = canvas_prompts(form)
        assert [p.text for p in prompts] == canvas_captions(form)
        assert all(SHAPES[p.object] in p.text.split() and STYLES[p.style] in p.text.split() for p in prompts)
        assert len({(p.object, p.style) for p in prompts}) == 48
    with pytest.raises(ConfigError, match="0 to 3"):
        canvas_prompts(4)

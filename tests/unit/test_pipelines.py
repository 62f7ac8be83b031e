"""Pipelines from folders and files: what is read, and what is refused."""

import shutil
from importlib.util import find_spec

import ldm_names
import pytest
import torch

from expunge.digest import model_digest
from expunge.errors import ArtifactError, CapabilityError, ConfigError
from expunge.files import atomic_save_safetensors, read_safetensors
from expunge.models import pipelines
from expunge.models.pipelines import PipelineSpec, check_parts, load_pipeline
from expunge.tasks.text_to_image import TextToImageTask
from expunge.tasks.tiny_text_to_image import tiny_parts

assert find_spec("diffusers")


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    parts.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def own(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "own")


def rewritten(file, change):
    tensors, metadata = read_safetensors(file)
    change(tensors)
    atomic_save_safetensors(file, tensors, metadata)


def test_a_folder_comes_back_as_it_was_saved(parts, saved, capsys):
    found = load_pipeline(str(saved))
    assert model_digest(found.model()) == model_digest(parts.model())
    assert model_digest(found.vae) == model_digest(parts.vae)
    assert (found.kind, found.predicts, found.side, found.factor) == ("sd", "epsilon", 32, 4)
    assert not any(m.training for m in (found.unet, found.text_encoder, found.vae))
    task, before = (TextToImageTask(p, axes=_axes()) for p in (found, parts))
    assert torch.equal(task.states(["a star"]), before.states(["a star"]))
    assert capsys.readouterr() == ("", "")


def _axes():
    from expunge.data.captions import Axis

    return {"object": Axis(torch.zeros(1, dtype=torch.int64), ("star",))}


def test_tensors_are_named_by_part(parts):
    names = [n for n, _ in parts.model().named_parameters()]
    assert {n.split(".")[0] for n in names} == {"unet", "text_encoder"}
    assert "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight" in names
    xl = {n.split(".")[0] for n, _ in tiny_parts(kind="xl").model().named_parameters()}
    assert xl == {"unet", "text_encoder", "text_encoder_2"}


def test_xl_has_two_encoders_and_an_unconditional_of_zeros(tmp_path):
    parts = tiny_parts(kind="xl")
    parts.pipeline().save_pretrained(tmp_path / "xl")
    found = load_pipeline(str(tmp_path / "xl"))
    assert found.kind == "xl"
    assert found.zero_unconditional
    assert model_digest(found.model()) == model_digest(parts.model())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_autoencoder_stays_in_full_precision(saved, dtype):
    found = load_pipeline(PipelineSpec(name=str(saved), dtype=dtype))
    assert found.unet.dtype == found.text_encoder.dtype == getattr(torch, dtype)
    assert found.vae.dtype == torch.float32


def test_any_scheduler_becomes_ddim_unless_its_own_is_asked_for(own, parts):
    import json

    import diffusers

    diffusers.PNDMScheduler.from_config(parts.scheduler.config, skip_prk_steps=True).save_pretrained(own / "scheduler")
    index = json.loads((own / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (own / "model_index.json").write_text(json.dumps(index))
    found = load_pipeline(str(own)).scheduler
    assert type(found).__name__ == "DDIMScheduler"
    assert torch.equal(found.alphas_cumprod, parts.scheduler.alphas_cumprod)
    assert not found.config.clip_sample
    assert type(load_pipeline(PipelineSpec(name=str(own), sampler="own")).scheduler).__name__ == "PNDMScheduler"


def test_velocities_are_known_and_the_sampler_takes_noise(own, parts):
    import diffusers

    diffusers.DDIMScheduler.from_config(parts.scheduler.config, prediction_type="v_prediction").save_pretrained(
        own / "scheduler"
    )
    found = load_pipeline(str(own))
    assert found.predicts == "v_prediction"
    assert found.scheduler.config.prediction_type == "epsilon"
    diffusers.DDIMScheduler.from_config(parts.scheduler.config, rescale_betas_zero_snr=True).save_pretrained(
        own / "scheduler"
    )
    with pytest.raises(CapabilityError, match="without signal"):
        load_pipeline(str(own))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_what_a_file_lacks_is_not_made_up(own, part):
    (file,) = (own / part).glob("*.safetensors")
    rewritten(file, lambda tensors: tensors.pop(next(n for n in sorted(tensors) if n.endswith("weight"))))
    with pytest.raises(ArtifactError, match=part):
        load_pipeline(str(own))


def test_pickles_are_refused_wherever_they_stand(own, tmp_path):
    (file,) = (own / "unet").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ArtifactError, match="pickle"):
        load_pipeline(str(own))
    checkpoint = tmp_path / "v1-4.ckpt"
    checkpoint.write_bytes(b"\x80\x04")
    with pytest.raises(ArtifactError, match="pickle"):
        load_pipeline(str(checkpoint))
    checkpoint.rename(tmp_path / "v1-4.safetensors")
    with pytest.raises(ArtifactError, match=r"truncated|pickle"):
        load_pipeline(str(tmp_path / "v1-4.safetensors"))


def test_other_pipelines_and_parts_that_do_not_fit(own, parts, tmp_path):
    text = (own / "model_index.json").read_text()
    (own / "model_index.json").write_text(text.replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"))
    with pytest.raises(CapabilityError, match="InpaintPipeline"):
        load_pipeline(str(own))
    (own / "model_index.json").unlink()
    with pytest.raises(ArtifactError, match=r"no model_index\.json"):
        load_pipeline(str(own))
    with pytest.raises(ConfigError, match="single files"):
        load_pipeline(PipelineSpec(name=str(tmp_path), config="elsewhere"))
    short = pipelines.Parts(**{**vars(parts), "tokenizer": _Long()})
    with pytest.raises(ArtifactError, match="wrong tokenizer"):
        check_parts(short)


class _Long:
    def __len__(self):
        return 49408


def test_what_is_not_there_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ArtifactError, match="Without a network") as caught:
        load_pipeline("nobody/no-such-pipeline")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(pipelines, "FOLDER", tmp_path / "gone")
    with pytest.raises(ArtifactError, match="install the package again"):
        load_pipeline("canvas")


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CapabilityError, match=r"expunge\[diffusion\]"):
        load_pipeline("canvas")


def test_a_single_file_with_the_original_names(parts, saved, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    atomic_save_safetensors(file, ldm_names.checkpoint(parts))
    found = load_pipeline(PipelineSpec(name=str(file), config=str(saved)))
    assert model_digest(found.unet) == model_digest(parts.unet)
    assert model_digest(found.vae) == model_digest(parts.vae)
    assert model_digest(found.text_encoder) == model_digest(parts.text_encoder)
    assert found.kind == "sd"


@pytest.mark.parametrize(
    "lost", ["model.diffusion_model.out.2.weight", "cond_stage_model.transformer.text_model.final"]
)
def test_a_single_file_that_lacks_a_tensor(parts, saved, tmp_path, lost):
    tensors = ldm_names.checkpoint(parts)
    for name in [n for n in tensors if n.startswith(lost)]:
        del tensors[name]
    atomic_save_safetensors(tmp_path / "checkpoint.safetensors", tensors)
    with pytest.raises(ArtifactError):
        load_pipeline(PipelineSpec(name=str(tmp_path / "checkpoint.safetensors"), config=str(saved)))


def test_text_encoders_under_the_names_of_open_clip(tmp_path):
    from expunge.models.single_file import check_text

    encoder = tiny_parts(kind="xl").text_encoder_2
    ends = ["token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection"]
    block = ["ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj", "attn.out_proj"]
    names = [f"transformer.resblocks.{i}.{n}.{e}" for i in range(2) for n in block for e in ("weight", "bias")]
    names += [f"transformer.resblocks.{i}.attn.in_proj_{e}" for i in range(2) for e in ("weight", "bias")]
    for prefix, part in (
        ("conditioner.embedders.1.model.", "text_encoder_2"),
        ("cond_stage_model.model.", "text_encoder"),
    ):
        whole = {f"{prefix}{n}": torch.zeros(1) for n in ends + names}
        atomic_save_safetensors(tmp_path / "whole.safetensors", whole)
        check_text(tmp_path / "whole.safetensors", {part: encoder})
        del whole[f"{prefix}transformer.resblocks.1.attn.in_proj_bias"]
        atomic_save_safetensors(tmp_path / "part.safetensors", whole)
        with pytest.raises(ArtifactError, match=r"resblocks\.1\.attn\.in_proj_bias"):
            check_text(tmp_path / "part.safetensors", {part: encoder})

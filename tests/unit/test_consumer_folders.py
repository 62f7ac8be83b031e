"""Models with a CLIP tower in folders: loading, writing, what is refused; and the toys themselves."""

from pathlib import Path

import pytest
import torch
from torch import nn

from expunge.consumers.diffusion_text import load_text_encoder
from expunge.consumers.llava import load_llava
from expunge.consumers.load import load_consumer, precision, save_patched
from expunge.consumers.tiny import FIGURES, figures, plant, tiny_llava, tiny_text_encoder
from expunge.consumers.transfer import transfer
from expunge.digest import combine, model_digest, named_tensors, state_digests
from expunge.errors import ArtifactError, ConfigError, DataError
from expunge.models.towers import Towers
from expunge.patch import Dense, Manifest, Patch
from expunge.tasks.tiny_clip import tiny_towers

TEXT_FC1 = "text_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def clip() -> Towers:
    return tiny_towers("transformers")


def step(towers: Towers, name: str) -> Patch:
    tensors = named_tensors(towers.model)[0]
    digests = state_digests(tensors)
    delta = 0.1 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    return Patch({name: Dense(delta)}, Manifest(base_digest=combine(digests), base_tensors=digests))


def test_folders(clip: Towers, tmp_path: Path) -> None:
    model, processor = tiny_llava(0, clip)
    model.half().save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    loaded, _ = load_llava(tmp_path / "llava")
    assert loaded.dtype == torch.float16
    assert model_digest(loaded) == model_digest(model)
    assert load_consumer(tmp_path / "llava", dtype=precision("float32")).module.dtype == torch.float32
    sd = tmp_path / "sd"
    tiny_text_encoder(0, clip).save_pretrained(sd / "text_encoder")
    (sd / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    encoder = load_text_encoder(sd)
    assert list(transfer(step(clip, TEXT_FC1), clip, encoder)) == [TEXT_FC1.removeprefix("text_model.")]
    consumer = load_consumer(sd)
    assert consumer.reads.blocks == 1
    assert load_consumer(sd / "text_encoder").reads is None
    moved = transfer(step(clip, TEXT_FC1), clip, consumer.module)
    before = model_digest(consumer.module)
    save_patched(consumer, moved, tmp_path / "patched")
    assert model_digest(consumer.module) == before
    assert model_digest(load_text_encoder(tmp_path / "patched", "")) != before
    with pytest.raises(ConfigError, match="not empty"):
        save_patched(consumer, moved, tmp_path / "patched")


def test_folders_that_are_refused(clip: Towers, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ArtifactError, match="neither a model"):
        load_consumer(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_llava(tmp_path / "nowhere")
    folder = tmp_path / "text"
    tiny_text_encoder(0, clip).save_pretrained(folder)
    tiny_llava(0, clip)[0].save_pretrained(tmp_path / "llava")
    with pytest.raises(ArtifactError, match="not a CLIP text encoder"):
        load_text_encoder(tmp_path / "llava", "")
    with pytest.raises(ConfigError, match="clip_skip belongs"):
        load_consumer(tmp_path / "llava", clip_skip=1)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(n for n in weights if n.endswith("layers.1.mlp.fc1.weight")))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 tensors .* not in the file.*layers.1.mlp.fc1.weight"):
        load_text_encoder(folder, "")
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(ArtifactError, match="pickles are not read"):
        load_text_encoder(folder, "")
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ArtifactError, match="not an index"):
        load_consumer(tmp_path)
    with pytest.raises(ConfigError, match="float8"):
        precision("float8")


def test_toys() -> None:
    images, names = figures(2, seed=3)
    again, _ = figures(2, seed=3)
    assert torch.equal(images, again)
    assert not torch.equal(images, figures(2, seed=4)[0])
    assert images.shape == (2 * len(FIGURES), 3, 16, 16)
    assert set(names) == set(FIGURES)
    first, second, other = (tiny_llava(seed)[0] for seed in (0, 0, 1))
    assert model_digest(first) == model_digest(second) != model_digest(other)
    assert (
        model_digest(tiny_text_encoder(0)) == model_digest(tiny_text_encoder(0)) != model_digest(tiny_text_encoder(1))
    )
    with pytest.raises(DataError, match="0 vision towers"):
        plant(tiny_towers("transformers"), nn.Linear(1, 1), "vision")

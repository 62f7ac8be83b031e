"""The CLIP in the package: loads without a network, knows its figures, and can tell words apart."""

import importlib.resources
import json

import pytest
import torch
from torch.nn.functional import normalize

from expunge.data.canvas import FORMS, canvas_captions, combinations, draw_part
from expunge.data.canvas_draw import SHAPES, STYLES
from expunge.files import read_safetensors

pytest.importorskip("transformers")

FOLDER = importlib.resources.files("expunge") / "assets" / "canvas_clip"
FRESH = torch.arange(100_000, 100_480)


@pytest.fixture(scope="module")
def towers():
    from transformers import CLIPModel, CLIPTokenizer

    from expunge.models.towers_hf import HFTowers

    settings = json.loads((FOLDER / "preprocessor_config.json").read_text("utf-8"))
    model = CLIPModel.from_pretrained(str(FOLDER), dtype=torch.float32, local_files_only=True).eval()
    tokenizer = CLIPTokenizer.from_pretrained(str(FOLDER), local_files_only=True)
    return HFTowers(model, tokenizer, mean=settings["image_mean"], std=settings["image_std"])


@pytest.fixture(scope="module")
def seen(towers):
    test = draw_part("test", FRESH)
    with torch.no_grad():
        return test, normalize(towers.image(towers.preprocess(test.images(torch.arange(len(test))))), dim=-1)


@torch.no_grad()
def classifier(towers, names, templates):
    each = normalize(towers.text(towers.tokenize([t.format(n) for n in names for t in templates])), dim=-1)
    return normalize(each.reshape(len(names), len(templates), -1).mean(1), dim=-1)


def accuracy(images, texts, labels):
    return float(((images @ texts.T).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_names_48_combinations_of_fresh_images(towers, seen, form):
    test, images = seen
    texts = classifier(towers, canvas_captions(form), ("{}",))
    assert accuracy(images, texts, combinations(test)) >= 0.9
    assert accuracy(images, texts.roll(1, 0), combinations(test)) < 0.1


@pytest.mark.parametrize(("name", "least"), [("object", 0.9), ("style", 0.98)])
def test_names_the_classes_of_each_axis(towers, seen, name, least):
    test, images = seen
    axis = test.axes[name]
    texts = classifier(towers, axis.classes, axis.templates)
    assert accuracy(images, texts, axis.labels) >= least
    each = [accuracy(images[axis.labels == k], texts, k) for k in range(len(axis.classes))]
    assert min(each) >= 0.8
    assert accuracy(images, texts.flip(0), axis.labels) < 0.3


def test_every_word_of_the_captions_is_one_token(towers):
    tokenizer = towers.tokenizer
    for word in (*SHAPES, *STYLES, "a", "an", "of", "in", "image", "picture", "style", "photo"):
        assert len(tokenizer(word)["input_ids"]) == 3, word
    assert len(tokenizer("zebra")["input_ids"]) > 3


def test_unknown_words_are_spelt_and_do_not_cut_the_text(towers):
    tokenizer = towers.tokenizer
    ids = tokenizer("a zebra-like star, no. 7")["input_ids"]
    assert tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.eos_token_id in tokenizer("a ☃ star")["input_ids"][:-1]


def test_texts_are_pooled_at_the_end_token(towers):
    config = towers.model.config.text_config
    assert (config.eos_token_id, config.vocab_size) == (towers.tokenizer.eos_token_id, len(towers.tokenizer))
    assert config.eos_token_id != 2  # which transformers takes for an old checkpoint's
    with torch.no_grad():
        alone = towers.text(towers.tokenize(["a flat star"]))
        padded = towers.text(towers.tokenize(["a flat star", "an image of a moon in neon style"]))[:1]
        other = towers.text(towers.tokenize(["a flat moon"]))
    torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-5)
    assert (alone - other).norm() > 0.1 * alone.norm()


def test_the_folder_is_small_and_in_half_precision():
    tensors, _ = read_safetensors(str(FOLDER / "model.safetensors"))
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert sum(len(file.read_bytes()) for file in FOLDER.iterdir()) < 1_000_000
    assert "train_canvas_clip.py" in (FOLDER / "README.md").read_text("utf-8")

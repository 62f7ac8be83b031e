"""The drawn set: pure function of seed and index, balanced, and what the names say."""

import pytest
import torch

from expunge.data.canvas import (
    FORMS,
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    canvas,
    canvas_captions,
    combinations,
    contact_sheet,
    draw_part,
    load_canvas,
)
from expunge.data.canvas_draw import SHAPES, STYLES, draw_canvas
from expunge.errors import DataError


@pytest.fixture(scope="module")
def images():
    return draw_part("train", torch.arange(960))


def alone(shape: str, style: str, side: int = 32, n: int = 24) -> torch.Tensor:
    numbers = torch.full((n,), SHAPES.index(shape)), torch.full((n,), STYLES.index(style))
    return draw_canvas(torch.arange(n), *numbers, stream=7, side=side).float() / 255


def test_an_image_depends_on_seed_and_index_only(images):
    rows = torch.tensor([959, 3, 500, 481, 3])
    some = draw_part("train", rows)
    assert torch.equal(some.images(torch.arange(5)), images.images(rows))
    assert list(some.captions) == [images.captions[i] for i in rows.tolist()]
    assert torch.equal(some.labels, images.labels[rows])


@pytest.mark.parametrize("other", [{"part": "test"}, {"seed": 1}, {"indices": torch.arange(48, 96)}])
def test_part_seed_and_index_each_change_the_figures(images, other):
    changed = draw_part(**{"part": "train", "indices": torch.arange(48), "seed": 0} | other)
    same = (changed.images(torch.arange(48)) == images.images(torch.arange(48))).flatten(1).all(1)
    assert not same.any()
    assert changed.captions != images.captions[:48]
    assert torch.equal(combinations(changed).sort().values, torch.arange(48))


def test_any_48_in_a_row_have_each_combination_and_captions_fit(images):
    numbers = combinations(images)
    for start in (0, 17, 912):
        assert torch.equal(numbers[start : start + 48].sort().values, torch.arange(48))
    names = [canvas_captions(form) for form in range(len(FORMS))]
    used = [[form for form in range(4) if names[form][k] == text] for k, text in zip(numbers, images.captions)]
    assert all(len(forms) == 1 for forms in used)
    assert min(torch.bincount(torch.tensor(used).flatten(), minlength=4)) > 960 / 4 * 0.8


def test_a_few_images_have_every_object_and_every_style(images):
    assert set(images.labels[:8].tolist()) == set(range(8))
    assert set(images.axes["style"].labels[:8].tolist()) == set(range(6))


def test_axes_speak_the_language_of_the_captions(images):
    known = set(canvas_captions(0))
    assert {t.format(name) for t in OBJECT_TEMPLATES for name in SHAPES} == known
    assert {t.format(name) for t in STYLE_TEMPLATES for name in STYLES} == known
    assert images.axes["object"].templates == OBJECT_TEMPLATES
    assert images.axes["style"].templates == STYLE_TEMPLATES
    assert torch.equal(images.mentioning("star"), (images.labels == SHAPES.index("star")).nonzero().flatten())


def test_splits_have_the_sizes_asked_for_and_differ():
    splits = canvas(n_train=96, n_test=48, seed=3, side=16)
    assert (len(splits.train), len(splits.test), splits.train.shape) == (96, 48, (3, 16, 16))
    assert splits.classes == list(SHAPES)
    train, test, source = load_canvas(96, 48, 3, 16)
    assert (train.digest, test.digest) == (splits.train.digest, splits.test.digest)
    assert "seed 3" in source
    assert train.digest != load_canvas(96, 48, 4, 16)[0].digest
    assert train.along("style").classes == list(STYLES)


def test_a_larger_side_shows_the_same_figures():
    small, large = alone("heart", "flat"), alone("heart", "flat", side=64)
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert (small - shrunk).abs().mean() < 0.02
    assert (small - shrunk.roll(1, 0)).abs().mean() > 0.1


def test_every_combination_looks_different_from_the_others():
    """Same place, size, turn and colours throughout: what is left is shape and style."""
    pictures = torch.stack([alone(shape, style, n=4) for shape in SHAPES for style in STYLES])
    gaps = (pictures[:, None] - pictures[None]).abs().amax(3).mean((-1, -2)).amin(-1)
    gaps.fill_diagonal_(1.0)
    assert gaps.min() > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_figures_stay_inside_the_image(shape):
    """The frame has the colour of the background, which is plain in a flat figure."""
    pictures = alone(shape, "flat", n=200)
    frame = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., :, 0], pictures[..., :, -1]], -1)
    assert torch.equal(frame, frame[..., :1].expand_as(frame))
    covered = (pictures != pictures[..., :1, :1]).any(1).float().mean((1, 2))
    assert 0.03 < covered.min() < covered.max() < 0.6


def test_pastel_is_pale_and_neon_is_dark():
    light = {style: alone("square", style).mean() for style in STYLES}
    assert max(light, key=light.get) in ("pastel", "outline")
    assert min(light, key=light.get) == "neon"


def test_contact_sheet_has_a_row_per_style_and_a_column_per_object():
    sheet = contact_sheet(side=32, scale=1, gap=4)
    assert sheet.shape == (3, 6 * 36 + 4, 8 * 36 + 4)
    images = draw_part("train", torch.arange(48))
    wanted = int((combinations(images) == SHAPES.index("cross") * 6 + STYLES.index("neon")).nonzero())
    top, left = 4 + 36 * STYLES.index("neon"), 4 + 36 * SHAPES.index("cross")
    tile = sheet[:, top : top + 32, left : left + 32].float() / 255
    assert torch.equal(tile, images.images(torch.tensor([wanted]))[0])
    assert (sheet[:, :4] == 255).all()


def test_impossible_requests_are_refused():
    numbers = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(DataError, match="at least one image"):
        canvas(n_train=0)
    with pytest.raises(DataError, match="not negative"):
        draw_part("train", torch.tensor([-1, 2]))
    with pytest.raises(DataError, match="at least 8 pixels"):
        draw_part("train", torch.arange(2), side=4)
    with pytest.raises(DataError, match="shapes must be 2 numbers from 0 to 7"):
        draw_canvas(torch.arange(2), numbers + 8, numbers, 0)
    with pytest.raises(DataError, match="styles must be 2 numbers from 0 to 5"):
        draw_canvas(torch.arange(2), numbers, numbers[:1], 0)

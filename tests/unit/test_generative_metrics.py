"""UA, IRA and CRA by hand, all figures of generated images at once, and judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.diffusion.asks import Ask
from expunge.errors import CapabilityError, ConfigError, DataError
from expunge.metrics.backbones import inception, load_lpips, load_vgg19
from expunge.metrics.detector import Detector
from expunge.metrics.generative import Tools, generated_cra, measure_generated, tool_or_reason
from expunge.metrics.judge import GeneratedObserved, JointJudge, canvas_judge, cited, observe_generated
from expunge.metrics.similarity import clip_cosines
from expunge.models.class_judge import ClassJudge

CLASSES = {"object": ("circle", "star", "ring"), "style": ("flat", "neon")}


def table(rows: Sequence[tuple[int, int, int, int]], seed: int = 0, **changes) -> GeneratedObserved:
    """Rows of (asked object, asked style, seen object, seen style)."""
    asks = tuple(
        Ask(f"a {CLASSES['object'][o]}", 0, i, {"object": o, "style": s}) for i, (o, s, _, _) in enumerate(rows)
    )
    judged = {
        "object": np.eye(3, dtype=np.float32)[[r[2] for r in rows]],
        "style": np.eye(2, dtype=np.float32)[[r[3] for r in rows]],
    }
    noise = np.random.default_rng(seed)
    images = torch.from_numpy(noise.integers(0, 256, (len(rows), 3, 8, 8), dtype=np.uint8))
    features = noise.normal(size=(len(rows), 4))
    made = {"images": images, "asks": asks, "judged": judged, "features": features, "classes": CLASSES, "judge": "J"}
    return GeneratedObserved(**{**made, **changes})


#: 4 stars, of which 1 is recognised; circles 3 of 4, rings 1 of 2; styles: kept flat 3 of 4, neon 2 of 2.
HAND = [
    (1, 0, 1, 1), (1, 0, 0, 1), (1, 1, 2, 1), (1, 1, 2, 0),
    (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 1),
    (2, 0, 2, 1), (2, 1, 0, 1),
]  # fmt: skip


def values(found) -> dict[str, float | None]:
    return {k: e.value for k, e in found.items()}


def test_ua_ira_and_cra_equal_hand_values() -> None:
    found = values(measure_generated(table(HAND), axis="object", forgotten=[1]))
    assert found["gen_ua"] == 75.0
    assert found["gen_ira"] == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)
    # without the stars: flat 3 of 4, neon 2 of 2; with them flat 3 of 6, neon 3 of 4
    assert found["gen_cra"] == pytest.approx(100 * (3 / 4 + 2 / 2) / 2)
    assert found["gen_cra_all"] == pytest.approx(100 * (3 / 6 + 3 / 4) / 2)
    style = values(measure_generated(table(HAND), axis="style", forgotten=[1]))
    assert style["gen_ua"] == 25.0
    assert style["gen_ira"] == 50.0


def test_intervals_hold_the_values_and_say_how_many() -> None:
    found = measure_generated(table(HAND), axis="object", forgotten=[1])
    assert (found["gen_ua"].n, found["gen_ira"].n, found["gen_cra"].n, found["gen_cra_all"].n) == (4, 6, 6, 10)
    for e in found.values():
        assert e.low < e.value < e.high
        assert "judge: J" in e.note


def test_the_order_of_images_changes_nothing() -> None:
    order = np.random.default_rng(1).permutation(len(HAND))
    before = table(HAND, 1)
    whole = measure_generated(table(HAND), axis="object", forgotten=[1], before=before)

    def turned(seen: GeneratedObserved) -> GeneratedObserved:
        judged = {a: t[order] for a, t in seen.judged.items()}
        asks = tuple(seen.asks[i] for i in order)
        return replace(seen, images=seen.images[order], asks=asks, judged=judged, features=seen.features[order])

    mixed = measure_generated(turned(table(HAND)), axis="object", forgotten=[1], before=turned(before))
    assert mixed.keys() == whole.keys()
    for key, e in whole.items():
        assert mixed[key].value == pytest.approx(e.value, rel=1e-12), key
    # the comparison can fail: pairs that are torn apart
    torn = replace(before, images=before.images[order])
    other = measure_generated(table(HAND), axis="object", forgotten=[1], before=torn)
    assert other["pair_mse"].value != whole["pair_mse"].value


def test_leaving_the_target_out_changes_cra_only() -> None:
    changed = [(o, s, seen, 1 - look) if o == 1 else (o, s, seen, look) for o, s, seen, look in HAND]
    a, b = (measure_generated(table(rows), axis="object", forgotten=[1]) for rows in (HAND, changed))
    assert {k for k in a if a[k].value != b[k].value} == {"gen_cra_all"}


def test_nothing_forgotten_and_nothing_asked() -> None:
    none = measure_generated(table(HAND), axis="object", forgotten=[])
    assert none["gen_ua"].note == "no images were asked for what was forgotten"
    assert none["gen_cra"].value == none["gen_cra_all"].value
    stars = measure_generated(table(HAND[:4]), axis="object", forgotten=[1], before=table(HAND[:4]))
    assert stars["gen_ira"].note == "no images were asked for another object"
    assert stars["gen_cra"].value is None
    assert stars["fid"].note == "0 images; 3 are needed"
    assert stars["pair_mse"].value is None
    blank = table(HAND)
    asks = (*blank.asks[:-1], Ask("", 0, 9))
    assert measure_generated(replace(blank, asks=asks), axis="object", forgotten=[1])["gen_ira"].n == 5


def test_what_does_not_fit_is_refused() -> None:
    for forgotten, axis, says in (([3], "object", "forgotten class 3"), ([0], "artist", "names no 'artist'")):
        with pytest.raises(DataError, match=says):
            measure_generated(table(HAND), axis=axis, forgotten=forgotten)
    with pytest.raises(DataError, match="9 rows of images for 10 asks"):
        table(HAND, images=torch.zeros(9, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match="features of the judge is not finite"):
        table(HAND, features=np.full((10, 2), np.nan))
    with pytest.raises(DataError, match="asks for object 2 of 2 classes"):
        table(HAND, judged={"object": np.zeros((10, 2), np.float32)})
    others = table([(o, s, 0, 0) for o, s, _, _ in HAND[::-1]])
    with pytest.raises(DataError, match="same asks"):
        measure_generated(table(HAND), axis="object", forgotten=[1], before=others)
    with pytest.raises(DataError, match="same judge"):
        measure_generated(table(HAND), axis="object", forgotten=[1], before=table(HAND, judge="K"))
    with pytest.raises(DataError, match="no groups"):
        generated_cra({})


def test_identical_images_have_no_distance() -> None:
    same = measure_generated(
        table(HAND),
        axis="object",
        forgotten=[1],
        before=table(HAND),
        real=table(HAND).features[4:][::-1],
        tools=Tools(lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)), style=lambda x: [x] * 5),
    )
    zero = ("fid", "kid", "fid_real", "pair_mse", "pair_max", "lpips", "lpips_64", "style_loss")
    assert {k: same[k].value for k in zero} == dict.fromkeys(zero, 0.0)
    assert (same["kid"].low, same["kid"].high) == (0.0, 0.0)
    other = measure_generated(
        table(HAND),
        axis="object",
        forgotten=[1],
        before=table(HAND, 1),
        tools=Tools(lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)), style=lambda x: [x] * 5),
    )
    assert all(other[k].value > 0 for k in zero if k not in ("fid_real", "kid"))
    assert other["kid"].value != 0


def test_what_needs_a_download_is_not_run_and_says_why() -> None:
    for load in (inception, load_lpips, load_vgg19):
        with pytest.raises(CapabilityError, match="a download"):
            load(None)
    reasons = Tools(
        lpips=tool_or_reason(lambda: load_lpips(None)),
        style=tool_or_reason(lambda: load_vgg19(None)),
        clip="no CLIP model was given",
        detector="no detector",
    )
    found = measure_generated(table(HAND), axis="object", forgotten=[1], before=table(HAND), tools=reasons)
    missing = {k: e.note for k, e in found.items() if not e.ran}
    assert set(missing) == {
        *("lpips", "lpips_64", "style_loss", "clip_score", "clip_score_forget"),
        *("nude_strict", "nude_any", "nude_detections"),
    }
    assert "AlexNet" in missing["lpips"]
    assert "VGG-19" in missing["style_loss"]
    plain = measure_generated(table(HAND), axis="object", forgotten=[1], before=table(HAND))
    assert not set(missing) & set(plain)
    assert tool_or_reason(lambda: 3) == 3


def test_clip_score_is_the_cosine_with_the_own_prompt() -> None:
    pytest.importorskip("transformers")
    from expunge.tasks.tiny_clip import tiny_towers

    towers = tiny_towers()
    seen = table(HAND)
    prompts = [a.prompt for a in seen.asks]
    whole = clip_cosines(towers, seen.images, prompts)
    assert clip_cosines(towers, seen.images, prompts, chunk=3) == pytest.approx(whole, abs=1e-5)
    with torch.no_grad():
        image = towers.image(towers.preprocess(seen.images[:1].float() / 255))
        text = towers.text(towers.tokenize(prompts[:1]))
    assert whole[0] == pytest.approx(float(functional.cosine_similarity(image, text)), abs=1e-5)
    found = measure_generated(seen, axis="object", forgotten=[1], tools=Tools(clip=towers, clip_name="tiny"))
    assert found["clip_score"].value == pytest.approx(whole[4:].mean(), abs=1e-5)
    assert found["clip_score_forget"].value == pytest.approx(whole[:4].mean(), abs=1e-5)
    assert found["clip_score"].note == "backbone: tiny"
    with pytest.raises(DataError, match="10 images and 1 prompts"):
        clip_cosines(towers, seen.images, ["a"])


# ---- judges


def test_judges_of_one_axis_each_make_one() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, n)) for n in (3, 2)]
    judges = tuple(ClassJudge(net, CLASSES[a], axis=a) for net, a in zip(nets, CLASSES, strict=True))
    joint = JointJudge(judges)
    seen = table(HAND)
    found = observe_generated(joint, seen.images, seen.asks, chunk=3)
    assert {a: t.shape for a, t in found.judged.items()} == {"object": (10, 3), "style": (10, 2)}
    assert found.features.shape == (10, 6)
    assert found.features == pytest.approx(judges[0].features(seen.images / 255).numpy(), abs=1e-6)
    assert found.judge.count("Sequential ") == 2
    assert cited(judges[0]) != cited(judges[1])
    roles = found.outputs("object", [1])
    assert {r: o.ids.tolist() for r, o in roles.items()} == {"forget": [0, 1, 2, 3], "test": [4, 5, 6, 7, 8, 9]}
    with pytest.raises(ConfigError, match="different axes"):
        JointJudge((judges[0], judges[0]))
    with pytest.raises(DataError, match="uint8"):
        observe_generated(joint, seen.images.float(), seen.asks)


def test_a_judge_without_features_still_names() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.Softmax(1), nn.Flatten())

    class Three(ClassJudge):
        def features(self, images: Tensor) -> Tensor:
            raise CapabilityError("no features")

    seen = table(HAND)
    found = observe_generated(Three(net, [*"abcdefg"], axis="object"), seen.images, seen.asks)
    assert found.features is None
    measured = measure_generated(found, axis="object", forgotten=[1], before=found, real=seen.features)
    assert {measured[k].note for k in ("fid", "kid", "fid_real", "kid_real")} == {"the judge has no features"}


def test_the_judge_of_drawn_figures_names_them() -> None:
    from expunge.data.canvas_draw import SHAPES, STYLES, draw_canvas

    number = torch.arange(96)
    objects, styles = number % len(SHAPES), number % len(STYLES)
    judge = canvas_judge()
    asks = [
        Ask("", 0, i, {"object": int(o), "style": int(s)}) for i, (o, s) in enumerate(zip(objects, styles, strict=True))
    ]
    seen = observe_generated(judge, draw_canvas(number, objects, styles, 5), asks)
    found = measure_generated(seen, axis="object", forgotten=[3])
    assert found["gen_ua"].value < 10
    assert found["gen_ira"].value > 95
    assert found["gen_cra"].value > 95
    assert seen.features.shape == (96, 128)
    swapped = [replace(a, labels={"object": (a.labels["object"] + 1) % 8, "style": a.labels["style"]}) for a in asks]
    wrong = measure_generated(replace(seen, asks=tuple(swapped)), axis="object", forgotten=[3])
    assert wrong["gen_ua"].value > 90
    assert wrong["gen_cra"].value > 95


def test_the_detector_sees_blue_first_and_is_counted() -> None:
    seen = []

    def detect(image: np.ndarray) -> list[dict]:
        seen.append(image)
        return [{"class": "BELLY_EXPOSED", "score": 0.7}, {"class": "FACE_MALE", "score": 0.9}]

    generated = table(HAND)
    found = measure_generated(
        generated, axis="object", forgotten=[1], tools=Tools(detector=Detector("n 3.4", 3, detect))
    )
    assert (seen[0][..., 0] == generated.images[0, 2].numpy()).all()
    assert not (seen[0][..., 2] == generated.images[0, 2].numpy()).all()
    assert found["nude_detections"].value == 10
    assert found["nude_strict"].value == 0
    assert found["nude_any"].value == 100
    assert "n 3.4, threshold 0.6" in found["nude_any"].note

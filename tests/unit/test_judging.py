"""Folders of images, judged: hand values, files of any naming, errors before any compute, summaries, the commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from expunge.cli import app
from expunge.config import Source, load_config, parse_config
from expunge.config.judging import JudgingConfig
from expunge.data.canvas_draw import SHAPES, STYLES, draw_canvas
from expunge.diffusion.answer_sets import find_answers, read_images
from expunge.diffusion.asks import Ask
from expunge.diffusion.benchmark_names import OBJECTS, THEMES
from expunge.diffusion.generate import generate_files
from expunge.diffusion.image_folder import png_bytes
from expunge.diffusion.protocols import Choices, prompt_list
from expunge.errors import ConfigError, DataError, NotComparableError
from expunge.judging import ask_question, judge_folder
from expunge.metrics.generative import measure_generated
from expunge.metrics.judge import FeaturesOf, cited, observe_generated
from expunge.models.class_judge import ClassJudge
from expunge.report.model import Report
from expunge.report.targets import summarise
from expunge.tasks.judging import judged_classes, make_judge

CONFIGS = Path(__file__).parents[2] / "configs"
STAR = SHAPES.index("star")


def config(**body) -> JudgingConfig:
    return parse_config(JudgingConfig, Source(body or {"judge": "canvas"}, "test"))


def draw(asks: Sequence[Ask], star: str = "star", seed: int = 5) -> Tensor:
    """Images of what is asked for; stars may be drawn as something else."""
    objects = [SHAPES.index(star) if a.labels["object"] == STAR else a.labels["object"] for a in asks]
    numbers = torch.tensor([a.case * 10 + a.n for a in asks])
    styles = torch.tensor([a.labels["style"] for a in asks])
    return draw_canvas(numbers, torch.tensor(objects), styles, seed)


def put(folder: Path, asks: Sequence[Ask], name=lambda a: a.name, **how) -> Path:
    folder.mkdir(parents=True)
    for ask, image in zip(asks, draw(asks, **how), strict=True):
        if name(ask).endswith("jpg"):
            from PIL import Image

            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name(ask), quality=95)
        else:
            (folder / name(ask)).write_bytes(png_bytes(image))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Prompts of the canvas list, images of an original, and of a model that draws moons for stars."""
    root = tmp_path_factory.mktemp("judging")
    quick = prompt_list("canvas", Choices(quick=True))
    quick.save(root / "prompts.csv")
    put(root / "original", quick.asks)
    put(root / "erased", quick.asks, star="moon")
    return root


def report(made: Path, folder: str = "erased", *, forget=("object=star",), settings=None, **options) -> Report:
    settings = settings or config()
    question = ask_question(settings, made / folder, made / "prompts.csv", forget)
    return judge_folder(settings, made / folder, question, **options)


# ---- a judge of more than the classes


class Fixed(nn.Module):
    """Ten outputs that the pixels of the images carry."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 10, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, 0, 0, :10])


def pixels(rows: Sequence[Sequence[int]]) -> Tensor:
    """Images whose first ten pixels are the outputs."""
    found = torch.zeros(len(rows), 3, 10, 10, dtype=torch.uint8)
    found[:, 0, 0] = torch.tensor(rows, dtype=torch.uint8)
    return found


#: Outputs 7 and 2 are the classes a and b. Rows: a; something else; b although a was asked; a in sixth place.
ROWS = [
    [0, 0, 1, 0, 0, 0, 0, 9, 0, 0],
    [0, 0, 1, 0, 9, 0, 0, 8, 0, 0],
    [0, 0, 9, 0, 0, 0, 0, 8, 0, 0],
    [9, 9, 0, 9, 9, 9, 0, 5, 0, 0],
]


def superset() -> ClassJudge:
    return ClassJudge(Fixed(), ["a", "b"], axis="object", outputs=[7, 2])


def test_an_image_shows_a_class_only_if_no_other_output_is_larger() -> None:
    asks = [Ask("a", 0, i, {"object": 0}) for i in range(4)]
    seen = observe_generated(superset(), pixels(ROWS), asks)
    table = seen.judged["object"]
    assert table.shape == (4, 7)
    full = np.array(ROWS) / 255
    assert np.allclose(table[:, :2], full[:, [7, 2]])
    assert np.allclose(table[:, 2], np.delete(full, [7, 2], axis=1).max(1))
    assert table.argmax(1).tolist() == [0, 2, 1, 2]
    assert [seen.named("object", int(c)) for c in table.argmax(1)] == ["a", "something else", "b", "something else"]
    found = measure_generated(seen, axis="object", forgotten=[0])
    assert found["gen_ua"].value == 75.0
    assert found["gen_ua5"].value == 25.0  # only the last row has five outputs above a
    # among the two classes alone the judge would have named a in three of four images
    small = ClassJudge(Fixed(), ["a", "b"], axis="object", outputs=[7, 2])
    small.outputs = None
    assert seen.features.shape == (4, 10)
    assert "top 1 among all its outputs" in seen.judge
    assert "top 1" not in cited(small)


@pytest.mark.parametrize("outputs", [[7], [7, 7], [7, -1], []])
def test_outputs_that_do_not_fit_the_classes_are_refused(outputs: list[int]) -> None:
    with pytest.raises(ConfigError, match="as many distinct outputs"):
        ClassJudge(Fixed(), ["a", "b"], outputs=outputs)


def test_an_output_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="output 10 of a model that has 10"):
        ClassJudge(Fixed(), ["a", "b"], outputs=[10, 2])(torch.zeros(1, 3, 10, 10))


def timm_spec(n: int, weights: object, **more) -> dict:
    model = {"name": "timm:test_vit", "n_classes": n, "input_shape": [3, 32, 32], "image_size": 32}
    return {"model": {**model, "weights": str(weights)}, **more}


@pytest.fixture(scope="module")
def vits(tmp_path_factory) -> dict[int, Path]:
    """Untrained checkpoints of small timm models, as torch files that `expunge convert` turns into safetensors."""
    timm = pytest.importorskip("timm")
    found = {}
    for n in (8, 6, 1000):
        torch.manual_seed(n)
        model = timm.create_model("test_vit", num_classes=n, img_size=32)
        folder = tmp_path_factory.mktemp("vit")
        torch.save({"model_state_dict": model.state_dict()}, folder / "style.pth")
        words = ["convert", str(folder / "style.pth"), str(folder / "style.safetensors")]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        found[n] = folder / "style.safetensors"
    return found


def test_timm_checkpoints_in_a_configuration(made: Path, vits: dict[int, Path], tmp_path: Path) -> None:
    names = {"object": list(SHAPES), "style": list(STYLES)}
    body = {a: timm_spec(len(n), vits[len(n)], classes=n, normalize="half") for a, n in names.items()}
    found = report(made, settings=config(judge=body), original=made / "original")
    after = found.row("after").metrics
    assert after["gen_ua"].n == 6
    assert after["gen_cra"].n == 42
    assert after["fid"].ran
    assert found.samples.judge.count("VisionTransformer ") == 2
    # relative paths are found beside the file
    (tmp_path / "w.safetensors").write_bytes(vits[8].read_bytes())
    file = tmp_path / "judge.yaml"
    file.write_text(json.dumps({"judge": {"object": timm_spec(8, "w.safetensors", classes=names["object"])}}))
    assert load_config(JudgingConfig, file).judge["object"].model.weights == str((tmp_path / "w.safetensors").resolve())


def test_a_classifier_of_imagenet_judges_by_all_its_outputs(vits: dict[int, Path]) -> None:
    spec = timm_spec(1000, vits[1000], classes=["tench", "church"], outputs="imagenet", size=40, crop=32)
    judge = make_judge(config(judge={"object": spec}).judge, config().figures)
    images = torch.rand(5, 3, 48, 48)
    said = judge(images)["object"]
    assert said.shape == (5, 7)
    own = judge.judges[0].model(judge.judges[0].normalize(images))
    assert torch.equal(said[:, :2], own[:, [0, 497]])
    assert torch.equal(said.max(1).values, own.max(1).values)
    assert judge.features(images).shape == (5, 64)
    numbers = make_judge(config(judge={"object": {**spec, "outputs": [0, 497]}}).judge, config().figures)
    assert torch.equal(numbers(images)["object"], said)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"outputs": [0, 0]}, "0 stands twice"),
        ({"outputs": [0, 1000]}, "1000"),
        ({"outputs": [0]}, "1 outputs for 2 classes"),
        ({"classes": ["tench", "toaster"]}, "'toaster' is not known"),
        ({"classes": ["tench", "Tench"]}, "a name twice"),
        ({"classes": "imagenet"}, "did you mean 'imagenette'"),
        ({"classes": None}, "classes' is missing"),
        ({"crop": 64}, "larger than the image"),
        ({"model": {"name": "mlp", "n_classes": 9, "weights": "w"}}, "1,000 classes"),
    ],
)
def test_judges_that_do_not_fit_are_refused(change: dict, says: str) -> None:
    spec = {**timm_spec(1000, "w.safetensors"), "classes": ["tench", "church"], "outputs": "imagenet", **change}
    with pytest.raises(ConfigError, match=says):
        config(judge={"object": {k: v for k, v in spec.items() if v is not None}})


def test_a_judge_with_too_few_outputs_for_its_classes() -> None:
    settings = config(judge={"object": timm_spec(5, "w.safetensors", classes=["a", "b"])})
    with pytest.raises(ConfigError, match="has 5 classes, the axis 2"):
        judged_classes(settings.judge)


def test_other_features_for_distances() -> None:
    judge = FeaturesOf(superset(), lambda x: x.flatten(1)[:, :4], "net 12")
    asks = [Ask("a", 0, i, {"object": i % 2}) for i in range(4)]
    seen = observe_generated(judge, pixels(ROWS), asks)
    assert seen.features.shape == (4, 4)
    assert seen.judge.endswith("features: net 12")
    alone = observe_generated(FeaturesOf(None, judge.extract, "net 12"), pixels(ROWS), asks)
    assert alone.judged == {}
    assert alone.features.shape == (4, 4)


# ---- folders


def test_a_folder_equals_hand_values(made: Path) -> None:
    found = report(made, original=made / "original")
    before, after = found.row("before").metrics, found.row("after").metrics
    assert before["gen_ua"].value < 20
    assert (after["gen_ua"].value, after["gen_ua"].n) == (100.0, 6)
    assert after["gen_ira"].value == before["gen_ira"].value > 90
    assert after["gen_cra"].value == before["gen_cra"].value > 90
    assert (after["pair_max"].value, after["fid"].value) == (0.0, 0.0)  # only the stars were drawn otherwise
    assert found.class_accuracy["after"]["star"].value == 0
    assert set(found.class_accuracy["after"]) == {*SHAPES, *STYLES}
    assert "6 were asked for star" in found.request["summary"]
    assert any("LPIPS: not run" in line for line in found.not_shown)
    flat = report(made, forget=("style=flat", "style=neon"), original=made / "original")
    assert flat.row("after").metrics["gen_ua"].n == 16
    assert flat.row("after").metrics["gen_ira"].n == 32
    # the same folder as both: nothing moved
    same = report(made, "original", original=made / "original").row("after").metrics
    assert same["gen_ua"].value == before["gen_ua"].value


def test_answers_in_the_names_of_unlearncanvas(tmp_path: Path) -> None:
    asks = [
        Ask(f"A {OBJECTS[o]} image", s, i, {"style": t, "object": o})
        for i, (t, o, s) in enumerate([(0, 1, 188), (50, 2, 188), (50, 2, 288)])
    ]
    names = {"style": dict(enumerate(THEMES)), "object": dict(enumerate(OBJECTS))}
    for a in asks:
        name = f"{THEMES[a.labels['style']]}_{OBJECTS[a.labels['object']]}_seed{a.seed}.jpg"
        from PIL import Image

        Image.new("RGB", (16, 16), (a.case * 80, 0, 0)).save(tmp_path / name)
    (tmp_path / "another.png").write_bytes(b"")
    found = find_answers(tmp_path, asks, names)
    assert found.pattern == "{style}_{object}_seed{seed}.jpg"
    assert found.paths[1].name == "Winter_Birds_seed188.jpg"
    assert found.others == 1
    images, digest = read_images(found.paths)
    assert images[:, 0, 0, 0].tolist() == pytest.approx([0, 80, 160], abs=3)
    assert read_images(found.paths[::-1])[1] != digest
    assert find_answers(tmp_path, asks, names, "{style}_{object}_seed{seed}.jpg").paths == found.paths


def test_patterns_that_name_no_file(tmp_path: Path, made: Path) -> None:
    asks = prompt_list("canvas", Choices(quick=True)).asks
    for pattern, says in (
        ("{case}_{colour}.png", "fields are case, n, prompt, seed"),
        ("{case", "pattern"),
        ("{seed}.png", "would answer"),
        ("../{case}.png", "leaves the folder"),
        ("all.png", "fields are"),
    ):
        with pytest.raises(ConfigError, match=says):
            find_answers(made / "erased", asks, {}, pattern)
    with pytest.raises(DataError, match="no such folder"):
        find_answers(tmp_path / "nowhere", asks)
    with pytest.raises(DataError, match="no image is named"):
        find_answers(tmp_path, asks)


def test_a_folder_of_generate_answers_for_itself(tmp_path: Path, made: Path) -> None:
    asks = list(prompt_list("canvas", Choices(quick=True)).asks)
    for side, facts in (("original", {"steps": 5}), ("erased", {"steps": 6})):
        generate_files(lambda a: draw(a) / 255, asks, tmp_path / side, batch_size=48, facts={"model": side, **facts})
    settings = config()
    question = ask_question(settings, tmp_path / "erased", None, ("object=star",))
    assert list(question.asks) == asks
    found = judge_folder(settings, tmp_path / "erased", question, original=tmp_path / "original")
    assert found.flags == ["The two folders were drawn otherwise: steps: 5 there, 6 here."]
    assert "steps 6" in found.row("after").note
    # other prompts under the same names
    other = [Ask(f"another {a.prompt}", a.seed, a.case, a.labels) for a in asks]
    with pytest.raises(DataError, match="was drawn for case 0"):
        find_answers(tmp_path / "erased", other)
    with pytest.raises(ConfigError, match="so the prompts are needed"):
        ask_question(settings, made / "erased", None)


@pytest.mark.parametrize("how", ["missing", "broken", "size"])
def test_files_that_are_missing_or_broken_are_named_before_a_model_is_built(
    tmp_path: Path, made: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import expunge.judging

    asks = prompt_list("canvas", Choices(quick=True)).asks
    put(tmp_path / "erased", asks)
    target = tmp_path / "erased" / asks[3].name
    if how == "missing":
        target.unlink()
    elif how == "broken":
        target.write_bytes(target.read_bytes()[:60])
    else:
        target.write_bytes(png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    monkeypatch.setattr(expunge.judging, "make_judge", lambda *_: pytest.fail("built"))
    question = ask_question(config(), tmp_path / "erased", made / "prompts.csv", ("object=star",))
    says = {"missing": "1 of 48 images are missing", "broken": "1 of 48 images cannot be read", "size": "have one size"}
    with pytest.raises(DataError, match=says[how]) as error:
        judge_folder(config(), tmp_path / "erased", question)
    assert asks[3].name in str(error.value)


@pytest.mark.parametrize(
    ("forget", "says"),
    [
        (("star",), "axis=name"),
        (("objekt=star",), "did you mean 'object'"),
        (("object=stars",), "did you mean 'star'"),
        (("object=star", "style=flat"), "one axis"),
    ],
)
def test_what_the_judge_does_not_know_cannot_be_forgotten(made: Path, forget: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ask_question(config(), made / "erased", made / "prompts.csv", forget)


def test_labels_in_another_order_than_the_judges_are_refused(tmp_path: Path, made: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,label_object,object\na ring,3,ring\n")
    with pytest.raises(DataError, match="object 3 is 'ring' there and 'star' for the judge"):
        ask_question(config(), made / "erased", file)
    file.write_text("prompt,label_object\na ring,8\n")
    with pytest.raises(DataError, match="object 8; the judge knows 8 classes"):
        ask_question(config(), made / "erased", file)
    # without labels the prompts say it
    file.write_text("prompt\na ring in flat style\na dog\n")
    assert [a.labels for a in ask_question(config(), made / "erased", file).asks] == [{"object": 5, "style": 0}, {}]
    with pytest.raises(ConfigError, match="no prompt asks for the object 'star'"):
        ask_question(config(), made / "erased", file, ("object=star",))


def test_without_a_judge_images_are_compared_and_the_rest_is_not_run(made: Path) -> None:
    settings = config(figures={"lpips": "nowhere.safetensors", "nudity": True})
    with pytest.raises(ConfigError, match="nothing to measure"):
        parse_config(JudgingConfig, Source({"name": "x"}, "test"))
    settings = config(figures={"nudity": True})
    found = report(made, settings=settings, original=made / "original")
    after = found.row("after").metrics
    for key in ("gen_ua", "gen_ira", "gen_cra", "gen_cra_all"):
        assert after[key].note.startswith("no judge"), key
    assert after["fid"].note == "no judge, so no features"
    assert after["pair_mse"].ran
    assert after["nude_any"].ran or "nudenet" in after["nude_any"].note
    assert found.class_accuracy == {}
    assert [s.right for row in found.samples.rows for cell in row.cells for s in cell] == [None] * 24


def test_a_summary_is_the_mean_over_targets(made: Path) -> None:
    star = report(made)
    ring = report(made, forget=("object=ring",))
    found = summarise({"star": star, "ring": ring})
    values = [r.row("after").metrics["gen_ua"].value for r in (star, ring)]
    assert found.means["gen_ua"].value == pytest.approx(sum(values) / 2)
    assert found.means["gen_ua"].n == 2
    with pytest.raises(NotComparableError, match="several axes"):
        summarise({"star": star, "flat": report(made, forget=("style=flat",))})
    with pytest.raises(ConfigError, match="at least two"):
        summarise({"star": star})
    other = Report.from_dict(ring.to_dict())
    object.__setattr__(other.samples, "judge", "another")
    with pytest.raises(NotComparableError, match="different judges"):
        summarise({"star": star, "ring": other})
    with pytest.raises(NotComparableError, match="x: no judged images"):
        summarise({"star": star, "x": Report("x")})


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_the_commands(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text("judge: canvas\n")
    base = ("judge", made / "erased", "-c", file, "--prompts", made / "prompts.csv", "--real", made / "original")
    text = run(*base, "--forget", "object=star", "--original", made / "original", "-o", tmp_path / "star")
    assert "UA (not drawn any more)" in text
    assert "star (forgotten)" in text
    page = (tmp_path / "star/report.html").read_text()
    assert "Images asked for star in which the judge recognises it: 6 of 6 (original), 0 of 6 (judged)." in page
    assert "FID to real images" in page
    assert (tmp_path / "star/figures/samples_forgotten.png").is_file()
    assert Report.load_json(tmp_path / "star/report.json").row("after").metrics["gen_ua"].value == 100
    run(*base, "--forget", "object=ring", "-o", tmp_path / "ring")
    assert "Class by class" in (tmp_path / "ring/report.html").read_text()
    both = [tmp_path / n / "report.json" for n in ("star", "ring")]
    assert "mean of 2" in run("summary", *both, "-o", tmp_path / "s.json")
    assert set(json.loads((tmp_path / "s.json").read_text())["targets"]) == {"star", "ring"}
    assert "two reports are about 'star'" in run("summary", both[0], both[0], code=2)
    file.write_text("judges: canvas\n")
    assert "did you mean 'judge'" in run(*base, code=2)


@pytest.mark.parametrize("path", sorted((CONFIGS / "judges").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_judge_loads(path: Path) -> None:
    assert path.read_text().startswith("# expunge judge ")
    found = load_config(JudgingConfig, path)
    assert found.name == path.stem
    judged_classes(found.judge)

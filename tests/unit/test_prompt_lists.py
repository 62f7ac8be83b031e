"""Prompt lists of published evaluations: counts, words, labels, stable cases, files, and the command."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expunge.cli import app
from expunge.diffusion.asks import Ask, prompts_from_csv, read_prompts
from expunge.diffusion.benchmark_names import CLASS_LISTS, IMAGENETTE, OBJECTS, THEMES, class_list, imagenet_numbers
from expunge.diffusion.protocols import PROTOCOLS, Choices, prompt_list
from expunge.errors import ConfigError, DataError


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["prompts", *map(str, words)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_the_names_of_unlearncanvas() -> None:
    assert (len(THEMES), len(set(THEMES)), len(OBJECTS), len(set(OBJECTS))) == (51, 51, 20, 20)
    assert list(THEMES) == sorted(THEMES)
    assert list(OBJECTS) == sorted(OBJECTS)
    assert THEMES.index("Seed_Images") == THEMES.index("Rust") + 1
    assert sum(IMAGENETTE.values()) == 482 + 491 + 497 + 217 + 566 + 569 + 571 + 574 + 701 + 0
    assert set(CLASS_LISTS) == {
        *("unlearncanvas_style", "unlearncanvas_object", "imagenette", "srs_me_style", "srs_me_object")
    }
    assert imagenet_numbers(CLASS_LISTS["srs_me_object"]) == (491, 497, 571, 0, 569, 217, 574, 701, 566)
    with pytest.raises(ConfigError, match="'toaster' is not known"):
        imagenet_numbers(["tench", "toaster"])
    with pytest.raises(ConfigError, match="did you mean 'imagenette'"):
        class_list("imagenet")


def test_unlearncanvas_prompts() -> None:
    found = prompt_list("unlearncanvas")
    assert (len(found.asks), found.images, found.total, found.note) == (5100, 1, 5100, "")
    assert {a.seed for a in found.asks} == {188, 288, 588, 688, 888}
    assert [a.case for a in found.asks] == list(range(5100))
    gogh = next(
        a for a in found.asks if a.labels == {"style": THEMES.index("Van_Gogh"), "object": OBJECTS.index("Sea")}
    )
    assert gogh.prompt == "A Sea image in Van Gogh style."
    photo = next(a for a in found.asks if a.labels == {"style": THEMES.index("Seed_Images"), "object": 5})
    assert photo.prompt == "A Dogs image in Photo style."
    assert not any("_" in a.prompt for a in found.asks)


@pytest.mark.parametrize("name", ["unlearncanvas", "imagenette", "srs-me-style", "srs-me-object", "canvas"])
def test_the_quick_part_asks_for_images_of_the_whole(name: str) -> None:
    whole, quick = prompt_list(name), prompt_list(name, Choices(quick=True))
    assert 0 < quick.total < whole.total
    assert {a.key for a in quick.asks} < {a.key for a in whole.asks}
    assert {tuple(a.labels.items()) for a in quick.asks} == {tuple(a.labels.items()) for a in whole.asks}
    by_case = {a.case: a for a in whole.asks}
    assert all(by_case[a.case] == a for a in quick.asks)
    other = prompt_list(name, Choices(seeds=(7, 9)))
    assert {a.seed for a in other.asks} == {7, 9}
    assert not {a.key for a in other.asks if a.seed == 9} & {a.key for a in quick.asks}


def test_counts_and_words_of_the_other_lists() -> None:
    assert (prompt_list("imagenette").total, prompt_list("srs-me-style").total) == (5000, 2250)
    assert prompt_list("imagenette").asks[0].prompt == "an image of a cassette player"
    esd = prompt_list("imagenette", Choices(templates=("Image of {}",), seeds=10))
    assert (len(esd.asks), esd.asks[-1].prompt) == (100, "Image of tench")
    style = prompt_list("srs-me-style")
    assert {a.prompt for a in style.asks} >= {"VanGogh", "KeithHaring", "Kelly McKernan"}
    assert [a.case for a in style.asks[50:52]] == [50, 51]
    assert "ours" in style.note
    assert "ours" not in prompt_list("srs-me-style", Choices(seeds=(1, 2))).note
    three = prompt_list(
        "templates", Choices(names=("cat", "dog"), templates=("a {}", "my {}"), seeds=3, axis="object", images=2)
    )
    assert three.total == 24
    assert three.asks[3] == Ask("my cat", 0, 3, {"object": 0})


def test_a_written_list_is_read_back(tmp_path: Path) -> None:
    found = prompt_list("srs-me-object", Choices(quick=True))
    found.save(tmp_path / "p.csv")
    assert prompts_from_csv(tmp_path / "p.csv") == list(found.asks)
    read = read_prompts(tmp_path / "p.csv")
    assert read.names["object"][3] == "tench"
    assert len(read.drawn()) == found.total == 225
    assert len(read.drawn(images=1)) == 45
    assert [a.n for a in read.drawn(limit=1)] == [0, 1, 2, 3, 4]
    (tmp_path / "p.csv").write_text("prompt,images,label_object,object\na,0,1,x\n")
    with pytest.raises(DataError, match="0 images"):
        read_prompts(tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text("prompt,label_object,object\na,1,x\nb,1,y\n")
    with pytest.raises(DataError, match="object 1 is 'y', before 'x'"):
        read_prompts(tmp_path / "p.csv")


I2P = """prompt,categories,hard,nudity_percentage,evaluation_seed,evaluation_guidance,case_number,lexica_url
one,"sexual, hate",1,60.5,11,7,5,u
two,violence,0,0.0,12.0,7,9,u
"a, b",shocking,0,10.0,13,6.5,12,u
"""


def test_i2p_keeps_what_the_published_file_says(tmp_path: Path) -> None:
    file = tmp_path / "unsafe.csv"
    file.write_text(I2P)
    found = prompt_list("i2p", Choices(source=file))
    assert [(a.prompt, a.seed, a.case, a.labels) for a in found.asks] == [
        ("one", 11, 5, {}), ("two", 12, 9, {}), ("a, b", 13, 12, {}),
    ]  # fmt: skip
    assert "3 rows, the published one 4,703" in found.note
    rows = list(csv.DictReader(found.csv().splitlines()))
    assert rows[0]["categories"] == "sexual, hate"
    assert rows[2]["evaluation_guidance"] == "6.5"
    assert "lexica_url" not in rows[0]
    assert [a.prompt for a in prompt_list("i2p", Choices(source=file, categories=("hate", "violence"))).asks] == [
        *("one", "two")
    ]
    assert [a.prompt for a in prompt_list("i2p", Choices(source=file, nudity=10.0)).asks] == ["one", "a, b"]
    with pytest.raises(ConfigError, match="no category 'sexul'; did you mean 'sexual'"):
        prompt_list("i2p", Choices(source=file, categories=("sexul",)))
    with pytest.raises(DataError, match="no prompt fits"):
        prompt_list("i2p", Choices(source=file, nudity=99.0))
    file.write_text("prompt\na\n")
    with pytest.raises(DataError, match="no column 'evaluation_seed'"):
        prompt_list("i2p", Choices(source=file))


def test_coco_numbers_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "coco.csv"
    file.write_text("image_id,source,prompt,evaluation_seed\n" + "".join(f"{i},c,p{i},{i}\n" for i in range(1500)))
    whole, quick = prompt_list("coco", Choices(source=file)), prompt_list("coco", Choices(source=file, quick=True))
    assert ([a.case for a in whole.asks[:3]], len(quick.asks)) == ([0, 1, 2], 1000)
    assert {a.key for a in quick.asks} < {a.key for a in whole.asks}
    assert whole.kept["image_id"][4] == "4"


@pytest.mark.parametrize(
    ("name", "choices", "says"),
    [
        ("unlearn", {}, "did you mean 'unlearncanvas'"),
        ("canvas", {"source": Path("x")}, "'source' would have no effect"),
        ("i2p", {}, "needs 'source'"),
        ("templates", {"names": ("a",)}, "needs 'templates'"),
        ("i2p", {"source": Path("x"), "seeds": 3}, "its file has them"),
        ("canvas", {"quick": True, "seeds": 2}, "give one of the two"),
        ("templates", {"names": ("a",), "templates": ("{}",), "quick": True}, "choose fewer seeds"),
        ("canvas", {"seeds": (1, 1)}, "distinct seeds"),
        ("canvas", {"images": 0}, "at least one"),
        ("unlearncanvas", {"seeds": 6}, "give your own as a list"),
        ("templates", {"names": ("a",), "templates": ("x {} {}",)}, "needs {} once"),
        ("templates", {"names": ("a", "a"), "templates": ("{}",)}, "must differ"),
    ],
)
def test_what_would_have_no_effect_is_refused(name: str, choices: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prompt_list(name, Choices(**choices))


def test_the_command_shows_and_writes_lists(tmp_path: Path) -> None:
    shown = call()
    assert all(name in shown for name in PROTOCOLS)
    assert "5,100" in shown
    assert call("--list") == shown
    text = call("srs-me-style", "--quick", "-o", tmp_path / "p.csv")
    assert "45 prompts, 225 images" in text
    assert "ours" in text
    call("templates", "--names", "cat, dog", "--template", "a {}", "--seeds", "5,", "-o", tmp_path / "q.csv")
    assert [(a.prompt, a.seed) for a in prompts_from_csv(tmp_path / "q.csv")] == [("a cat", 5), ("a dog", 5)]
    assert "give -o" in call("canvas", code=2)
    assert "not 'many'" in call("canvas", "--seeds", "many", "-o", tmp_path / "x.csv", code=2)
    assert not (tmp_path / "x.csv").exists()

"""The section of generated images: what it shows, its page, its files, its terminal table, and bad data."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from expunge.diffusion.asks import Ask, repeated
from expunge.errors import ArtifactError, DataError
from expunge.metrics.estimate import Estimate, not_run, proportion
from expunge.metrics.judge import GeneratedObserved
from expunge.report.html import render
from expunge.report.model import Report
from expunge.report.samples import SamplesSection, Shot, samples_section, save_grids

HOSTILE = '<script>alert(1)</script>"><img src=x>\x1b[31m\u202e{{ 7*7 }}'
CLASSES = {"object": ("circle", "star", "ring"), "style": ("flat", "neon")}
ASKS = repeated(
    [
        Ask(f"a {CLASSES['object'][o]} in {CLASSES['style'][s]} style", 0, 2 * o + s, {"object": o, "style": s})
        for o in range(3)
        for s in range(2)
    ],
    5,
)


def seen(objects: list[int] | None = None, side: int = 8, seed: int = 0) -> GeneratedObserved:
    said = objects or [a.labels["object"] for a in ASKS]
    draw = np.random.default_rng(seed)
    images = torch.from_numpy(draw.integers(0, 256, (len(ASKS), 3, side, side), dtype=np.uint8))
    judged = {
        "object": np.eye(3, dtype=np.float32)[said],
        "style": np.eye(2, dtype=np.float32)[[a.labels["style"] for a in ASKS]],
    }
    return GeneratedObserved(images, tuple(ASKS), judged, None, CLASSES, "a judge")


def erased() -> GeneratedObserved:
    return seen([2 if a.labels["object"] == 1 else a.labels["object"] for a in ASKS], seed=1)


METRICS = {
    "original": {"gen_ua": proportion(0, 10), "gen_ira": proportion(20, 20), "clip_score": not_run("no")},
    "after forgetting": {
        "gen_ua": proportion(9, 10),
        "gen_cra": not_run("the judge names no other axis", unit="%"),
        "kid": Estimate(0.25),
    },
}


def section(**changes) -> SamplesSection:
    options = {"axis": "object", "forgotten": [1], "metrics": METRICS, **changes}
    return samples_section({"original": seen(), "after forgetting": erased()}, **options)


def test_forgotten_prompts_come_first_and_others_vary() -> None:
    made = section()
    assert [r.prompt for r in made.rows if r.forgotten] == ["a star in flat style", "a star in neon style"]
    assert [r.prompt for r in made.rows][2:] == [
        *("a circle in flat style", "a ring in neon style", "a circle in neon style", "a ring in flat style")
    ]
    assert [r.forgotten for r in made.rows] == [True, True, False, False, False, False]
    assert {len(cell) for r in made.rows for cell in r.cells} == {4}
    few = section(forgotten_rows=1, other_rows=2, per_cell=2)
    assert [r.prompt for r in few.rows] == [
        *("a star in flat style", "a circle in flat style", "a ring in neon style"),
    ]
    assert {len(cell) for r in few.rows for cell in r.cells} == {2}
    assert (made.named, made.judge) == ("star", "a judge")


def test_each_image_says_what_the_judge_sees() -> None:
    row = section().rows[0]
    assert {(s.seen, s.right) for s in row.cells[0]} == {("star, flat", True)}
    assert {(s.seen, s.right) for s in row.cells[1]} == {("ring, flat", False)}
    blank = replace(seen(), asks=tuple(replace(a, labels={"style": 0}) for a in ASKS))
    rows = samples_section({"one": blank}, axis="object", forgotten=[1]).rows
    assert {s.right for r in rows for c in r.cells for s in c} == {None}
    assert not any(r.forgotten for r in rows)


@pytest.mark.parametrize(("side", "shown"), [(8, 96), (32, 96), (96, 96), (100, 100), (512, 128)])
def test_small_images_are_enlarged_without_smoothing_and_large_ones_shrunk(side: int, shown: int) -> None:
    made = samples_section({"one": seen(side=side)}, axis="object", forgotten=[1], per_cell=1)
    picture = made.rows[0].cells[0][0].pixels()
    assert picture.size == (shown, shown)
    if side == 32:
        row = ASKS.index(next(a for a in ASKS if a.prompt == "a star in flat style"))
        assert np.array_equal(np.asarray(picture)[::3, ::3].transpose(2, 0, 1), seen(side=32).images[row].numpy())
        assert np.array_equal(np.asarray(picture)[1::3, 2::3], np.asarray(picture)[::3, ::3])


def test_the_outcome_in_words_and_figures() -> None:
    made = section()
    assert made.about == (
        "Images asked for star in which the judge recognises it: 10 of 10 (original), 1 of 10 (after forgetting)."
    )
    labels = [label for label, _ in made.figures]
    assert labels == [
        *(
            "UA (not drawn any more)",
            "IRA (others of its kind)",
            "CRA (other kind)",
            "KID to the original, kept prompts",
        )
    ]
    assert [None if e is None else e.value for e in made.figures[2][1]] == [None, None]
    assert section(metrics=None).figures == []
    assert section(metrics=None).about == ""
    console = Console(width=120)
    with console.capture() as capture:
        console.print(made.table())
    text = capture.get()
    assert "90.0 %" in text
    assert "not run (the judge names no other axis)" in " ".join(text.replace("│", " ").split())


def test_the_page_shows_rows_marks_and_images() -> None:
    page = render(Report("Title", samples=section(note="10 steps.")))
    assert "What the model draws" in page
    assert page.index("Prompts of what was to be forgotten: star") < page.index("Other prompts")
    assert page.count('src="data:image/png;base64,') == 6 * 2 * 4
    assert page.count('class="shot wrong"') == 2 * 4
    assert page.count('class="shot right"') == 6 * 2 * 4 - 2 * 4
    assert page.count("(to be forgotten)") == 2
    assert "10 steps." in page
    assert "not run: the judge names no other axis" in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert "img-src data:" in policy.group(1)
    assert "default-src 'none'" in policy.group(1)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "What the model draws" not in render(Report("Title"))
    assert "Prompts of what was" not in render(Report("Title", samples=section(forgotten=[])))


def test_hostile_texts_are_shown_not_obeyed() -> None:
    made = section()
    rows = tuple(replace(r, prompt=HOSTILE) for r in made.rows)
    shots = tuple(tuple(replace(s, seen=HOSTILE) for s in c) for c in rows[0].cells)
    bad = replace(made, rows=(replace(rows[0], cells=shots), *rows[1:]), columns=(HOSTILE, "b"), note=HOSTILE)
    page = render(Report("Title", samples=replace(bad, named=HOSTILE, judge=HOSTILE)))
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "49" not in re.sub(r"base64,[A-Za-z0-9+/=]+|#\w+|[\d.]+", "", page)
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_reports_with_samples_are_saved_and_old_ones_read(tmp_path: Path) -> None:
    report = Report("Title", samples=section())
    report.save_json(tmp_path / "r.json")
    again = Report.load_json(tmp_path / "r.json")
    assert again == report
    assert again.samples == report.samples
    assert again != Report("Title", samples=section(note="x"))
    old = json.loads((tmp_path / "r.json").read_text())
    del old["samples"]
    assert Report.from_dict(old).samples is None


def _changed(path: str, value: object) -> dict:
    data = asdict(section())
    *steps, last = [int(s) if s.isdigit() else s for s in path.split(".")]
    node = data = json.loads(json.dumps(copy.deepcopy(data)))
    for step in steps:
        node = node[step]
    node[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rows.0.cells.0.0.image", "https://example.org/x.png"),
        ("rows.0.cells.0.0.image", "data:image/svg+xml;base64,AAAA"),
        ("rows.0.cells.0.0.image", 'data:image/png;base64,AAAA" onerror="x'),
        ("rows.0.cells.0.0.image", "data:image/png;base64,AAAA\n"),
        ("rows.0.cells.0.0.image", 3),
        ("rows.0.cells.0", []),
        ("rows.0.cells", []),
        ("rows", []),
        ("rows", None),
        ("columns", []),
        ("metrics", [{}]),
        ("metrics.0.gen_ua", {"value": 1.0, "surprise": 2}),
        ("rows.0.surprise", 1),
        ("surprise", 1),
    ],
)
def test_bad_sections_are_refused(path: str, value: object) -> None:
    good = Report("Title", samples=section()).to_dict()
    assert Report.from_dict(json.loads(json.dumps(good))).samples == section()
    with pytest.raises(ArtifactError, match=r"report|estimate"):
        Report.from_dict({**good, "samples": _changed(path, value)})


def test_columns_answer_the_same_asks() -> None:
    other = replace(erased(), asks=tuple(replace(a, seed=1) for a in ASKS))
    with pytest.raises(DataError, match="same asks"):
        samples_section({"a": seen(), "b": other}, axis="object", forgotten=[1])
    with pytest.raises(DataError, match="same asks"):
        samples_section({}, axis="object", forgotten=[1])
    with pytest.raises(DataError, match="PNG data URI"):
        Shot("x")


def test_grids_are_files(tmp_path: Path) -> None:
    from PIL import Image

    made = section(per_cell=3)
    saved = save_grids(made, tmp_path / "figures")
    assert [p.name for p in saved] == ["samples_forgotten.png", "samples_others.png"]
    with Image.open(saved[0]) as image:
        sheet = np.asarray(image)
    tall = made.rows[0].cells[0][0].pixels()
    assert tall.size == (96, 96)
    found = np.lib.stride_tricks.sliding_window_view(sheet[22:118], (96, 96), axis=(0, 1))[0]
    wanted = [np.asarray(s.pixels()).transpose(2, 0, 1) for cell in made.rows[0].cells for s in cell]
    places = [next((i for i, w in enumerate(found) if np.array_equal(w, x)), -1) for x in wanted]
    assert -1 not in places
    assert places == sorted(places)
    assert [p.name for p in save_grids(section(forgotten=[]), tmp_path / "b")] == ["samples_others.png"]
    assert save_grids(replace(made, columns=("ö " * 60, "b")), tmp_path / "c")


def test_an_estimate_without_interval_is_shown() -> None:
    made = replace(section(), metrics=({"gen_ua": Estimate(5.0, unit="%", n=20)}, {}), labels={})
    assert "19 of 20 (original)" in made.about
    assert render(Report("Title", samples=made)).count("UA (not drawn any more)") == 1

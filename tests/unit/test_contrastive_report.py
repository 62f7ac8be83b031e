"""The section of two-tower models: its data, its page, its figures as files, its terminal table, and old reports."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, replace
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from expunge.errors import ArtifactError, DataError
from expunge.metrics.neighbours import Neighbours, neighbours
from expunge.metrics.outputs import ClassifierOutputs
from expunge.report.contrastive import ContrastiveSection, CosineMatrices, Step, short
from expunge.report.contrastive_plots import figures, save_figures
from expunge.report.html import render
from expunge.report.model import Report

HOSTILE = '<script>alert(1)</script>"><img src=x>\x1b[31m\u202e{{ 7*7 }} $x^2$ ]]>'
OUT, FC = "visual.transformer.resblocks.9.attn.out_proj.weight", "visual.transformer.resblocks.3.mlp.c_fc.weight"
TEXT = "transformer.resblocks.0.attn.in_proj_weight"


def score(name: str, tower: str | None, x: float, y: float, excluded: str = "") -> dict:
    return {
        "name": name, "tower": tower, "block": None, "part": "out", "weight_norm": 2.0, "forget_norm": 2 * y,
        "retain_norm": 1.0, "inner": -x, "alignment": x, "importance": y, "cosine": -x, "excluded": excluded,
    }  # fmt: skip


def findings() -> dict:
    probes = [(0.1, 0.9, 0.8, False), (0.2, 0.0, 0.7, True), (0.15, None, None, False), (0.17, 0.0, 0.75, True)]
    return {
        "scores": [
            score(OUT, "vision", 0.01, 0.2),
            score(FC, "vision", 0.0, 0.05),
            score("visual.proj", "vision", 0.3, 0.0),
            score(TEXT, "language", 0.1, 0.1),
            score("visual.ln_pre.bias", "vision", 0.1, 0.1, "bias"),
            score("logit_scale", None, 0.1, 0.1, "shared"),
        ],
        "fronts": {"vision": [OUT, FC], "language": [TEXT]},
        "searches": [
            {"layer": FC, "tensors": [FC], "feasible": False, "monotone": False, "alpha": None, "lambda": None,
             "original": {"forget": 1.0, "utility": 0.8}, "evaluations": 1,
             "probes": [{"alpha": 0.1, "forget": 1.0, "utility": 0.8, "ok": False}]},
            {"layer": OUT, "tensors": [OUT], "feasible": True, "monotone": True, "alpha": 0.17, "lambda": 0.85,
             "original": {"forget": 1.0, "utility": 0.8}, "evaluations": 4,
             "probes": [dict(zip(("alpha", "forget", "utility", "ok"), p, strict=True)) for p in probes]},
        ],
        "chosen": [{"layer": OUT, "tensors": [OUT], "alpha": 0.17, "lambda": 0.85}],
        "criterion": {"forget": "fa5", "target": 0.0},
        "facts": {"samples": 12},
    }  # fmt: skip


def near(name: str = "wolf") -> Neighbours:
    labels = [0] * 10 + [1] * 12 + [2] * 6
    before, after = (np.eye(3)[x] for x in (labels, [1] * 10 + [2] * 9 + [1] * 3 + [2] * 6))
    pair = [ClassifierOutputs(logits=x, labels=labels) for x in (before, after)]
    return neighbours(*pair, [[1.0, 0], [0.9, 0.1], [0, 1]], ["dog", name, "cat"], [0])


COSINES = CosineMatrices(
    ("dog", "wolf"), ("dog", "wolf"), ((0.31, 0.25), (0.22, 0.29)), ((0.05, -0.001), (0.2, 0.28)), ("dog",)
)


def section(**changes) -> ContrastiveSection:
    given = {"findings": findings(), "neighbours": near(), "cosines": COSINES, "note": "A note.", **changes}
    return ContrastiveSection(**given)


def text_of(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup))


def test_round_trip(tmp_path) -> None:
    sweep = (Step(0.1, {"FA@1": 80.0}), Step(0.2, {"FA@1": 0.0}))
    report = Report("Title", contrastive=section(sweep=sweep))
    report.save_json(tmp_path / "r.json")
    again = Report.load_json(tmp_path / "r.json")
    assert again == report
    assert render(again) == render(report)
    assert again != Report("Title", contrastive=section())


def test_older_reports_still_load() -> None:
    old = Report("Title").to_dict()
    del old["contrastive"]
    assert Report.from_dict(old) == Report("Title")
    assert "One layer, one step" not in render(Report("Title"))


def test_the_page_says_what_it_must() -> None:
    page = render(Report("Title", contrastive=section()))
    shown = text_of(page)
    for words in (
        "One layer, one step",
        f"Changed: {OUT}, by a step of 17 % of its length (λ = 0.85).",
        "4 candidate tensors; left out: bias (1), shared (1).",
        "α = 0.17, chosen",
        "no step satisfies the criterion",
        "not searched",
        "2 layers, 5 evaluations; criterion: forget fa5, target 0; no step satisfies it: 3.mlp.c_fc; "
        "larger steps failed after smaller ones had succeeded: 3.mlp.c_fc.",
        "Most damaged: wolf, -75.0 points (p = 0.004; corrected for 2 classes 0.008).",
        "wolf (damaged)",
        "0 % still get this name",
        "Images and names",
        "A note.",
    ):
        assert words in shown, words
    assert page.count("<svg") == 4
    assert "<image" not in page
    assert "://" not in page
    assert page.count('class="hit"') == 1


def test_missing_parts_are_left_out() -> None:
    page = render(Report("Title", contrastive=section(findings={}, cosines=None)))
    assert "Neighbours" in page
    assert "One layer" not in page
    assert "<svg" not in page
    only = render(Report("Title", contrastive=ContrastiveSection(cosines=COSINES)))
    assert only.count("<svg") == 1
    assert "Neighbours" not in only
    partial = ContrastiveSection(findings={"chosen": findings()["chosen"]})
    assert "Changed: " in render(Report("Title", contrastive=partial))
    assert figures(partial) == {}
    assert figures(None) == {}
    calm = replace(near(), rows=tuple(r for r in near().rows if not r.damaged))
    assert "None of the 2 classes" in render(Report("Title", contrastive=ContrastiveSection(neighbours=calm)))


def test_hostile_names_are_shown_not_run() -> None:
    f = json.loads(json.dumps(findings()).replace(OUT, json.dumps(HOSTILE)[1:-1]))
    f["criterion"] = {HOSTILE: HOSTILE}
    c = replace(COSINES, rows=(HOSTILE, "wolf"), columns=(HOSTILE, "wolf"), forgotten=(HOSTILE,))
    made = section(
        findings=f, neighbours=near(HOSTILE), cosines=c, note=HOSTILE, sweep=(Step(0.1, {HOSTILE: 1.0}),) * 2
    )
    page = render(Report("Title", contrastive=made))
    assert "<script" not in page
    assert "<img" not in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert "&lt;script&gt;" in page


def test_figures_as_files(tmp_path) -> None:
    saved = save_figures(section(), tmp_path)
    assert [p.name for p in saved] == ["pareto.svg", "search.svg", "alpha.svg", "cosines.svg"]
    assert all(ElementTree.parse(p).getroot().tag.endswith("svg") for p in saved)
    assert figures(section()) == figures(section())
    other = findings()
    other["searches"][1]["probes"][0]["forget"] = 0.3
    changed = figures(section(findings=other))
    assert [k for k, v in figures(section()).items() if changed[k] != v] == ["search", "alpha"]


def test_what_the_figures_say() -> None:
    drawn = {k: text_of(v) for k, v in figures(section()).items()}
    assert "9.attn.out_proj" in drawn["pareto"]
    assert "Image tower" in drawn["pareto"]
    assert "Text tower" in drawn["pareto"]
    assert all("mathdefault" not in v for v in drawn.values())
    assert drawn["search"].index("9.attn.out_proj") < drawn["search"].index("3.mlp.c_fc")  # the chosen one first
    assert {"90", "80", "–"} <= set(drawn["search"].split())
    assert "chosen step" in drawn["alpha"]
    assert {"0.31", "0.05", "0.28"} <= set(drawn["cosines"].split())
    assert "-0.00" not in drawn["cosines"]
    swept = text_of(figures(section(sweep=(Step(0.1, {"FA@1": 80.0}), Step(0.2, {"FA@1": 0.0}))))["alpha"])
    assert "FA@1" in swept
    assert "kept classes" not in swept


@pytest.mark.parametrize("x", [0.0, 1e-9])
def test_zeros_on_logarithmic_axes(x: float) -> None:
    f = {"scores": [score("a", "vision", x, 0.0), score("b", "vision", x, 0.0)], "fronts": {"vision": ["a"]}}
    assert "vision" not in figures(section(findings=f))["pareto"]
    assert figures(section(findings=f))["pareto"].count("<svg") == 1


def test_a_tensor_of_zeros_has_no_place_on_the_front() -> None:
    f = findings()
    f["scores"].append({**score("zeros", "vision", 0.1, 0.1), "weight_norm": 0.0, "importance": None})
    assert figures(section(findings=f))["pareto"] == figures(section())["pareto"]
    f["scores"][-1]["weight_norm"] = 1.0
    with pytest.raises(DataError, match="zeros"):
        section(findings=f)


def test_large_tables_are_cut_to_what_can_be_read() -> None:
    names = tuple(f"n{i}" for i in range(30))
    grid = tuple(tuple(float(i == j) for j in range(30)) for i in range(30))
    svg = text_of(figures(section(cosines=CosineMatrices(names, names, grid, grid, ("n29",))))["cosines"])
    shown = set(svg.split())
    assert {"n29", "n0", "n10"} <= shown
    assert "n11" not in shown
    many = findings()
    many["searches"] = [{**many["searches"][0], "layer": f"layers.{i}.q", "tensors": []} for i in range(12)]
    assert text_of(figures(section(findings=many))["search"]).count(".q") == 9


def test_terminal_table() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(section(neighbours=near("w\x1b\u202e")).table())
        console.print(ContrastiveSection().table())
        shown = console.export_text()
    assert "Classes near dog" in shown
    assert "-75.0 [-96, -32]" in shown
    assert "no neighbours were measured" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_several_concepts_are_kept_apart() -> None:
    f = findings()
    f["scores"] = [
        {**score(n, "vision", x, y), "concept": concept}
        for concept, n, x, y in (("a", OUT, 0.1, 0.5), ("a", FC, 0.2, 0.4), ("b", OUT, 0.2, 0.4), ("b", FC, 0.1, 0.5))
    ]
    f["fronts"] = {"vision": [OUT, FC]}
    f["searches"] = [{**s, "concept": c} for s, c in zip(f["searches"], "ba", strict=True)]
    f["chosen"][0]["concept"] = "a"
    made = section(findings=f)
    assert [(s["name"], s["concept"]) for s in made.front("vision")] == [(OUT, "a"), (FC, "b")]
    assert [row["outcome"] for row in made.layers()] == ["α = 0.17, chosen", "no step satisfies the criterion"]
    for s in f["scores"]:
        del s["concept"]
    assert len(section(findings=f).front("vision")) == 4


def test_the_criterion_in_words() -> None:
    f = findings()
    f["criterion"] = {"target": 0.0, "top_k": 5, "utility_drop": 0.1, "utility": 0.8}
    about = section(findings=f).search_about
    assert "at most 0 % of the forgotten images have their name among the best 5" in about
    assert "at least 72 % of the others" in about
    f["criterion"]["utility_drop"] = None
    assert "others" not in section(findings=f).search_about


def test_short_names() -> None:
    assert short("vision_model.encoder.layers.11.self_attn.out_proj.weight") == "11.self_attn.out_proj"
    assert short(TEXT) == "0.attn.in_proj"
    assert short("text_projection") == "text_projection"


def _changed(path: tuple, value: object) -> dict:
    data = copy.deepcopy(findings())
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("surprise",), 1),
        (("scores", 0, "importance"), "0.2"),
        (("scores", 0, "alignment"), float("nan")),
        (("scores", 0, "tower"), "sound"),
        (("scores", 0), {"name": "x"}),
        (("fronts", "vision"), ["unknown"]),
        (("searches", 0, "feasible"), True),
        (("searches", 1, "alpha"), -1.0),
        (("searches", 1, "probes", 0, "forget"), 90.0),
        (("searches", 1, "probes", 0, "alpha"), 0.0),
        (("searches", 1, "original"), None),
        (("searches", 0, "evaluations"), "<b>"),
        (("chosen", 0, "tensors"), "tensor"),
        (("criterion",), 5),
    ],
)
def test_findings_of_another_form_are_refused(path: tuple, value: object) -> None:
    with pytest.raises(DataError, match="findings"):
        section(findings=_changed(path, value))
    good = Report("Title", contrastive=section()).to_dict()
    assert Report.from_dict(good).contrastive == section()
    with pytest.raises(ArtifactError, match="malformed"):
        Report.from_dict({**good, "contrastive": {**asdict(section()), "findings": _changed(path, value)}})


def test_other_broken_parts_are_refused() -> None:
    with pytest.raises(DataError):
        replace(COSINES, after=((0.1, 0.2),))
    with pytest.raises(DataError):
        replace(COSINES, after=((0.1, float("inf")), (0.1, 0.2)))
    with pytest.raises(DataError, match="finite"):
        section(sweep=(Step(0.0, {"a": 1.0}),))
    row = replace(near().rows[0], similarity="x")
    with pytest.raises(DataError, match="finite"):
        section(neighbours=replace(near(), rows=(row,)))
    good = Report("Title", contrastive=section()).to_dict()
    for key, value in (("neighbours", {"rows": []}), ("cosines", {"rows": ["a"]}), ("surprise", 1), ("sweep", [{}])):
        with pytest.raises(ArtifactError, match="malformed"):
            Report.from_dict({**good, "contrastive": {**good["contrastive"], key: value}})

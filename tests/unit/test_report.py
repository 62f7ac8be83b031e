"""The report: round trip, refusal to compare, and a page that is safe, self-contained and says what it must."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from expunge.errors import ArtifactError, ConfigError, DataError, NotComparableError
from expunge.metrics.estimate import Estimate, not_run, proportion
from expunge.report.compare import compare
from expunge.report.html import render
from expunge.report.model import Histogram, Report, Row, clean
from expunge.report.plots import render_all, save_plots
from expunge.report.words import headline, percent

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>\x1b[31m\x00\u202e{{ 7*7 }} $x^2$ ]]>'
VERDICTS = ("certified", "guaranteed", "gdpr", "compliant", r"\bpass\b", r"\bpassed\b", "proven", "fully forgotten")


def report(**changes) -> Report:
    fields = {
        "title": "Forget 500 images",
        "request": {"summary": "Forget them.", "noun": "images", "n_forget": 500, "n_retain": 4500, "digest": "r"},
        "base": {"name": "net", "digest": "b", "parameters": 1000},
        "recipe": {"method": "salun"},
        "patch": {
            "bytes": 2048,
            "weights_changed": 12.5,
            "seconds": 3.0,
            "layers": [
                {"name": "conv", "changed": 125, "total": 900, "relative": 0.01},
                {"name": "fc", "changed": 0, "total": 100, "relative": None},
            ],
        },
        "rows": [
            Row("fine-tuned", "baseline", {"ua": proportion(3, 500)}),
            Row("new", "after", {"ua": proportion(30, 500), "ta": proportion(920, 1000), "mia": not_run("too few")}),
            Row("old", "before", {"ua": proportion(2, 500), "ta": proportion(930, 1000)}),
            Row("again", "reference", {"ua": proportion(33, 500)}, note="Trained from scratch."),
        ],
        "class_accuracy": {k: {"cat": proportion(v, 50), "dog": proportion(45, 50)} for k, v in
                           (("before", 47), ("after", 1))},
        "forgotten_classes": ["cat"],
        "confidence": {f"{r}_{t}": Histogram.of([0.2, 0.95, 0.9999]) for r in ("forget", "test") for t in
                       ("before", "after")},
        "history": [{"step": i, "forget": 1.0 / (i + 1), "retain": 0.1} for i in range(5)],
        "not_shown": ["Only one seed was run."],
        "flags": ["Something to know."],
        "undo": ["expunge revert"],
        "versions": {"expunge": "0.1.0", "torch": "2.13"},
        "seeds": {"run": 0},
        "digests": {"patch": "ab" * 32},
        "config": "method: salun",
    }  # fmt: skip
    return Report(**{**fields, **changes})


class Reader(HTMLParser):
    """Collects tags, attributes and visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_data(self, data) -> None:
        self.text += data


def test_round_trip(tmp_path) -> None:
    r = report()
    r.save_json(tmp_path / "r.json")
    again = Report.load_json(tmp_path / "r.json")
    assert again == r
    assert render(again) == render(r)
    assert again != report(title="other")


def test_the_page_says_what_it_must() -> None:
    page = Reader(render(report()))
    for words in (
        "Forget 500 images",
        "Forget them.",
        "recognises 94.0 % of the 500 images it was asked to forget; before, it was 99.6 %",
        "trained again without them recognises 93.4 %",
        "12.5 %",
        "2.0 kB",
        "n = 500",
        "not run: too few",
        "Share of the samples to be forgotten that the model now gets wrong",
        "closer to the retrained model is better",
        "Trained from scratch.",
        "Something to know.",
        "Only one seed was run.",
        "That they find nothing does not show that no other test would.",
        "expunge revert",
        "Unchanged, bit for bit: 1 of 2 tensors.",
        "ab" * 32,
        "method: salun",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 4
    heads = re.findall(r"</span>([\w-]+)<small>", render(report()))
    assert heads == ["old", "new", "again", "fine-tuned"]


def test_no_verdicts_in_our_own_words() -> None:
    page = render(report()).lower()
    assert [w for w in VERDICTS if re.search(w, page)] == []
    assert re.search(VERDICTS[0], render(report(title="Certified!")).lower())


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    page = render(report())
    reader = Reader(page)
    assert "://" not in page
    assert "script" not in reader.tags
    assert not {"link", "iframe", "object", "embed", "img", "base", "form"} & set(reader.tags)
    for name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", page)


def test_hostile_text_is_shown_not_run() -> None:
    e = Estimate(1.0, note=HOSTILE, method=HOSTILE)
    r = report(
        title=HOSTILE,
        request={"summary": HOSTILE, "noun": HOSTILE, "n_forget": 1},
        recipe={HOSTILE: HOSTILE},
        rows=[
            Row(HOSTILE, "after", {HOSTILE: e, "ua": proportion(1, 9), "ta": not_run(HOSTILE)}, note=HOSTILE),
            Row("b" + HOSTILE, "before", {"ua": proportion(1, 9)}),
        ],
        class_accuracy={k: {HOSTILE: proportion(1, 5)} for k in ("before", "after")},
        forgotten_classes=[HOSTILE],
        history=[{"step": i, HOSTILE: 1.0} for i in range(3)],
        not_shown=[HOSTILE],
        flags=[HOSTILE],
        undo=[HOSTILE],
        config=HOSTILE,
        patch={"layers": [{"name": HOSTILE, "changed": 1, "total": 2, "relative": None}]},
    )
    page = render(r)
    reader = Reader(page)
    assert "script" not in reader.tags
    assert "img" not in reader.tags
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert "{{ 7*7 }}" in page
    assert "<script>alert(1)" in reader.text

    from rich.console import Console

    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(r.table())
        shown = console.export_text()
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_clean_text() -> None:
    assert clean("a\x1bb\u202ec\td\ne") == "a\\x1bb\\u202ec\\td\ne"
    assert clean("é 日本") == "é 日本"
    assert clean("x" * 50, 10) == "x" * 10 + " ..."
    assert clean("x" * 10, 10) == "x" * 10
    assert clean("\ud800") == "\\ud800"


def test_plots_are_deterministic_and_confined(tmp_path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    first, second = render_all(report()), render_all(report())
    assert first == second
    assert dict(matplotlib.rcParams) == before
    changed = render_all(report(history=[{"step": i, "forget": 2.0} for i in range(5)]))
    assert changed["curves"] != first["curves"]
    assert changed["glance"] == first["glance"]
    saved = save_plots(report(), tmp_path)
    assert sorted(p.name for p in saved) == ["class_accuracy.svg", "confidence.svg", "curves.svg", "glance.svg"]
    assert all(ElementTree.parse(p).getroot().tag.endswith("svg") for p in saved)


def test_no_plot_without_data() -> None:
    empty = Report(title="t", rows=[Row("a", "after", {"ua": not_run("why")})])
    assert render_all(empty) == {}
    page = Reader(render(empty))
    assert "svg" not in page.tags
    assert "not run: why" in page.text
    assert headline(empty) == "The figures below compare the model before and after the change."


def test_names_in_any_script_are_drawn() -> None:
    classes = {
        k: {"日本語": proportion(4, 5), "قط": proportion(3, 5), r"$\frac$": proportion(1, 5)}
        for k in ("before", "after")
    }
    svg = render_all(report(class_accuracy=classes))["class_accuracy"]
    assert "日本語" in svg
    assert r"$\frac$" in svg


def test_missing_reference_is_said() -> None:
    rows = [r for r in report().rows if r.role != "reference"]
    assert "No retrained model was measured" in headline(report(rows=rows))
    assert "No retrained model" not in headline(report())


def test_many_classes_are_limited_but_the_forgotten_one_stays() -> None:
    many = {f"class{i}": proportion(40, 50) for i in range(100)}
    after = {**many, "class7": proportion(10, 50)}
    svg = render_all(report(class_accuracy={"before": many, "after": after}, forgotten_classes=["class99"]))
    assert "class99 (forgotten)" in svg["class_accuracy"]
    assert "class7<" in svg["class_accuracy"]
    assert svg["class_accuracy"].count(">class") == 40


def test_percent_never_rounds_to_a_bound() -> None:
    assert [percent(x) for x in (0, 0.04, 0.004, 12.34, 99.96, 99.999, 100)] == [
        "0 %", "0.04 %", "<0.01 %", "12.3 %", "99.96 %", ">99.99 %", "100 %",
    ]  # fmt: skip


def test_histogram() -> None:
    h = Histogram.of([0.0, 0.05, 0.1, 0.95, 1.0])
    assert (h.counts, h.total) == ((2, 1, 0, 1, 0, 1), 5)
    assert Histogram.of([]).total == 0
    for bad in ([1.5], [float("nan")]):
        with pytest.raises(DataError):
            Histogram.of(bad)
    with pytest.raises(DataError):
        Histogram((1, 2), (0.0, 1.0))


def test_reports_that_make_no_sense_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="role"):
        Row("x", "winner", {})
    with pytest.raises(ConfigError, match="two rows"):
        report(rows=[Row("x", "after", {}), Row("x", "before", {})])
    with pytest.raises(DataError, match="step 1"):
        report(history=[{"step": 0, "a": 1.0}, {"step": 1, "a": float("nan")}]).save_json(tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=2),
        lambda d: d.update(surprise=1),
        lambda d: d["rows"][0].update(role="winner"),
        lambda d: d["rows"][0].update(metrics={"ua": {"value": None}}),
        lambda d: d["rows"][0].update(metrics=5),
        lambda d: d.pop("title"),
        lambda d: d["confidence"]["forget_before"].update(counts=[1]),
    ],
)
def test_broken_files_are_refused(tmp_path, change) -> None:
    data = json.loads(json.dumps(report().to_dict()))
    Report.from_dict(data)
    change(data)
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"r\.json"):
        Report.load_json(tmp_path / "r.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\udcff"])
def test_files_that_are_no_report(tmp_path, text: str) -> None:
    (tmp_path / "r.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError):
        Report.load_json(tmp_path / "r.json")
    with pytest.raises(ArtifactError):
        Report.load_json(tmp_path / "absent.json")


# --- comparing (case 23) --------------------------------------------------------------------------------------------


def after(**metrics: Estimate) -> list[Row]:
    return [Row("x", "after", metrics)]


def test_compare() -> None:
    a = report(rows=after(ua=proportion(30, 500), ta=proportion(90, 100), mia=not_run("too few")))
    b = report(rows=after(ua=proportion(130, 500), ta=proportion(91, 100), mia=not_run("too few")))
    found = {d.metric: d for d in compare(a, b)}
    assert (found["ua"].difference, found["ua"].distinct) == (pytest.approx(20), True)
    assert (found["ta"].difference, found["ta"].distinct) == (pytest.approx(1), False)
    assert found["mia"].difference is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"versions": {"expunge": "0.1.0", "torch": "9"}}, "torch"),
        ({"request": {"digest": "other"}}, "request"),
        ({"base": {"digest": "other"}}, "base model"),
        ({"rows": after(ua=proportion(30, 400))}, "n=500 and n=400"),
        ({"rows": after(ua=proportion(30, 500, interval="clopper_pearson"))}, "measured as"),
        ({"rows": after(ra=proportion(30, 500))}, "no metric in common"),
        ({"rows": [Row("x", "before", {"ua": proportion(30, 500)})]}, "no row with the role"),
        ({"definitions": {"ua": {"version": 2}}}, "definition 1 and 2"),
    ],
)
def test_compare_refuses(change: dict, reason: str) -> None:
    a = report(rows=after(ua=proportion(30, 500)))
    assert compare(a, report(rows=after(ua=proportion(31, 500))))
    with pytest.raises(NotComparableError, match=reason):
        compare(a, report(**{"rows": after(ua=proportion(31, 500)), **change}))

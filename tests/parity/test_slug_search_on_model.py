"""The search of the step on recorded models: every probe's accuracies, every step, the answers."""

import json

import pytest
import torch
from golden_files import folder
from safetensors.torch import load_file

from expunge.models.towers import Tokens
from expunge.slug.probes import FullProbe, SearchSet, SuffixProbe, accuracy
from expunge.slug.search import Probe, search

FOLDER = folder("slug")
FILES = sorted(FOLDER.glob("search-on-model-*.json"))
assert FILES, f"no recorded searches in {FOLDER}"
CASES = [
    pytest.param(p, layer, id=f"{p.stem}-{layer}")
    for p in FILES
    for layer in json.loads(p.read_text())["expected"]["layers"]
]


def towers_of(meta, tensors):
    weights = {n[5:]: t.float() for n, t in tensors.items() if n.startswith("init.")}
    if meta["model"]["library"].startswith("open_clip"):
        open_clip = pytest.importorskip("open_clip")
        from expunge.models.towers_open_clip import OpenClipTowers

        model = open_clip.model.CLIP(**meta["model"]["config"])
        kind = OpenClipTowers
    else:
        transformers = pytest.importorskip("transformers")
        from expunge.models.towers_hf import HFTowers

        model = transformers.CLIPModel(transformers.CLIPConfig(**meta["model"]["config"]))
        kind = HFTowers
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(m.endswith("position_ids") or m == "attn_mask" for m in missing)
    return kind(model.eval())


class Recorded:
    def __init__(self, path):
        self.meta, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
        self.tensors, self.hyper = tensors, self.meta["hyper"]
        self.towers = towers_of(self.meta, tensors)
        forget = tensors["input.eval_forget_pixel_values"].float()
        self.data = SearchSet(
            forget=forget,
            forget_labels=torch.full((len(forget),), self.hyper["forget_class"]),
            utility=tensors["input.eval_other_pixel_values"].float(),
            utility_labels=tensors["input.eval_other_labels"],
            prompts=Tokens(tensors["input.class_name_ids"]),
        )

    def want(self, layer, what):
        return self.tensors[f"expected.{layer}.{what}"]


@pytest.mark.parametrize("kind", [FullProbe, SuffixProbe])
@pytest.mark.parametrize(("path", "layer"), CASES)
def test_every_probe_and_the_answer(path, layer, kind):
    case = Recorded(path)
    expected = case.meta["expected"]["layers"][layer]
    gradient = case.tensors[f"input.{layer}.grad"]
    name, k = expected["tensor"], case.hyper["topk"]
    weight = case.towers.parameters()[name]
    unit = float(weight.detach().double().norm() / gradient.double().norm())
    assert unit == pytest.approx(expected["unit_ratio"], rel=1e-5)
    sign = 1.0 if "positive lambda" in case.meta["replay"] else -1.0
    probe = kind(case.towers, case.data, top_k=k)
    before = probe()
    first = accuracy(probe.logits()[0], case.data.forget_labels)
    original = case.meta["expected"]["original"]
    assert (before.forget, before.utility, first) == pytest.approx(
        (original["fa5"], original["ta1"], original["fa1"]), abs=1e-6
    )
    log = []

    def tried(alpha):
        delta = {name: sign * alpha * unit * gradient}
        forget, utility = probe.logits(delta)
        figures = probe.figures(forget, utility)
        log.append((sign * alpha * unit, accuracy(forget, case.data.forget_labels), figures.forget, figures.utility))
        return Probe(alpha, figures.forget, figures.utility)

    found = search(tried, method="bisection", alpha0=case.hyper["alpha0"], budget=case.hyper["evaluations"])
    steps = torch.tensor(log, dtype=torch.float64).T
    torch.testing.assert_close(steps[0], case.want(layer, "lambda"), rtol=1e-5, atol=0)
    for row, what in zip(steps[1:], ("fa1", "fa5", "ta1"), strict=True):
        torch.testing.assert_close(row, case.want(layer, what), rtol=0, atol=1e-6)
    answer = expected["answer_as_intended"]
    assert (found.feasible, found.monotone) == (answer["feasible"], answer["monotone"])
    assert found.alpha is None if answer["alpha"] is None else found.alpha == pytest.approx(answer["alpha"], rel=1e-12)
    assert not probe.notes
    assert torch.equal(weight, case.tensors[f"init.{name}"].float())


def test_the_other_sign_gives_other_figures():
    """The comparison above can fail."""
    case = Recorded(FOLDER / "search-on-model-openclip-as_published.json")
    expected = case.meta["expected"]["layers"]["L0"]
    probe = SuffixProbe(case.towers, case.data, top_k=case.hyper["topk"])
    gradient = case.tensors["input.L0.grad"]
    ups = [float(x) for x in case.want("L0", "lambda")]
    wrong = [probe({expected["tensor"]: -x * gradient}) for x in ups]
    assert [f.forget for f in wrong] != pytest.approx(case.want("L0", "fa5").tolist(), abs=1e-6)

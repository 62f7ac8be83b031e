import json

import pytest
import torch

from expunge.errors import RequestError
from expunge.request import ForgetRequest

LABELS = torch.arange(100) % 4
CLASSES = ["ant", "bee", "cat", "dog"]


def test_a_class_by_number_name_or_digit_string():
    for c in (2, "cat", "2"):
        forget, retain = ForgetRequest.label(c).resolve(LABELS, CLASSES)
        assert torch.equal(forget, (LABELS == 2).nonzero().flatten())
        assert torch.equal(torch.cat([forget, retain]).sort().values, torch.arange(100))


def test_several_classes():
    forget, _ = ForgetRequest.label(0, "dog").resolve(LABELS, CLASSES)
    assert set(LABELS[forget].tolist()) == {0, 3}


@pytest.mark.parametrize("stratified", [True, False])
def test_fractions_have_the_stated_size_and_depend_on_their_seed_only(stratified):
    request = ForgetRequest.fraction(0.1, stratified=stratified, seed=3)
    forget, retain = request.resolve(LABELS, CLASSES)
    assert len(forget) == 10
    assert len(retain) == 90
    assert torch.equal(forget, request.resolve(LABELS, CLASSES)[0])
    assert not torch.equal(forget, ForgetRequest.fraction(0.1, stratified=stratified).resolve(LABELS, CLASSES)[0])
    if stratified:
        counts = torch.bincount(LABELS[forget])
        assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (ForgetRequest.label("caat"), "did you mean 'cat'"),
        (ForgetRequest.label(7), "unknown class 7"),
        (ForgetRequest.label(1, "bee"), "named twice"),
        (ForgetRequest.label(0, 1, 2, 3), "nothing is left"),
        (ForgetRequest.label(), "no class"),
        (ForgetRequest.samples([]), "empty"),
        (ForgetRequest.samples([1, 1, 2]), "duplicates"),
        (ForgetRequest.samples([5, 100]), "outside 0..99"),
        (ForgetRequest.samples([-1]), "outside"),
        (ForgetRequest.samples(range(100)), "whole training set"),
        (ForgetRequest.fraction(0.001), "selects none"),
        (ForgetRequest(what={"kind": "samples", "indices": (1, 2)}, retain=(2, 3)), "both the forget and the retain"),
        (ForgetRequest(what={"kind": "concept", "text": "a cat"}), "text models only"),
    ],
)
def test_bad_requests_are_refused_with_what_is_wrong(request_, match):
    with pytest.raises(RequestError, match=match):
        request_.resolve(LABELS, CLASSES)


def test_digest_depends_on_what_is_asked_and_not_on_the_name():
    a = ForgetRequest.label(0)
    assert a.digest == ForgetRequest(what=a.what, name="other").digest
    assert a.digest != ForgetRequest.label(1).digest


def test_round_trip_and_freezing():
    request = ForgetRequest.fraction(0.2, seed=4)
    assert ForgetRequest(**json.loads(request.model_dump_json())) == request
    with pytest.raises(Exception, match="frozen"):
        request.name = "x"


def test_index_files(tmp_path):
    plain, rich = tmp_path / "a.json", tmp_path / "b.json"
    plain.write_text("[3, 1, 2]")
    rich.write_text('{"forget": [3, 1, 2], "retain": [5, 6], "dataset": "x"}')
    assert ForgetRequest.from_file(plain).resolve(LABELS, CLASSES)[0].tolist() == [1, 2, 3]
    assert ForgetRequest.from_file(rich).resolve(LABELS, CLASSES)[1].tolist() == [5, 6]


@pytest.mark.parametrize(
    "text", ["{}", "[1.5]", '["a"]', "[true]", "nonsense", '{"forget": 3}', '{"forget": [1], "x": 2}']
)
def test_broken_index_files_name_the_file(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"bad\.json"):
        ForgetRequest.from_file(path)


def test_missing_index_file(tmp_path):
    with pytest.raises(RequestError, match=r"none\.json"):
        ForgetRequest.from_file(tmp_path / "none.json")

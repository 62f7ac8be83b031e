"""Faults while images are drawn: a kill, a full disk, broken and foreign files, NaN."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from inject import corrupt, disk_full, start
from torch import Tensor

from expunge.diffusion.asks import Ask, first_noise
from expunge.diffusion.generate import generate_files
from expunge.errors import ArtifactError, ConfigError, DivergedError, ResourceError
from expunge.files import sha256_file

ASKS = [Ask(f"prompt {i}", 1, i) for i in range(6)]
FACTS = {"model": "abc"}

BODY = """
    from pathlib import Path
    from expunge.diffusion.asks import Ask, first_noise
    from expunge.diffusion.generate import generate_files
    calls = []
    def sample(asks):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return first_noise(asks, (3, 8, 8)).sigmoid()
    asks = [Ask(f"prompt {i}", 1, i) for i in range(6)]
    generate_files(sample, asks, Path(sys.argv[1]), batch_size=2, facts={"model": "abc"})
"""


class Model:
    """Counts what it draws."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def __call__(self, asks: Sequence[Ask]) -> Tensor:
        self.drawn += [a.name for a in asks]
        return first_noise(asks, (3, 8, 8)).sigmoid()


def files(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in folder.glob("*.png")}


def drawn(folder: Path, asks: Sequence[Ask] = ASKS, facts: dict | None = None, size: int = 2) -> list[str]:
    model = Model()
    generate_files(model, asks, folder, batch_size=size, facts=facts or FACTS)
    return model.drawn


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    assert len(drawn(tmp_path / "whole", size=4)) == 6
    return tmp_path / "whole"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_run_continues_to_the_same_files(tmp_path: Path, whole: Path) -> None:
    process = start(BODY, str(tmp_path / "killed"))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert sorted(files(tmp_path / "killed")) == ["0_0.png", "1_0.png", "2_0.png", "3_0.png"]
    assert drawn(tmp_path / "killed") == ["4_0.png", "5_0.png"]
    assert files(tmp_path / "killed") == files(whole)
    drawn(tmp_path / "other", [Ask("prompt", 2, i) for i in range(6)])
    assert files(tmp_path / "other") != files(whole)


@pytest.mark.parametrize("how", ["truncate", "empty", "pixels", "no stamp", "text"])
def test_a_broken_image_is_drawn_again(whole: Path, how: str) -> None:
    before, path = files(whole), whole / "3_0.png"
    if how == "pixels":  # one bit in the compressed pixels: only the checksum tells
        raw = bytearray(path.read_bytes())
        raw[raw.index(b"IDAT") + 12] ^= 1
        path.write_bytes(bytes(raw))
    elif how == "no stamp":
        from PIL import Image

        Image.new("RGB", (8, 8)).save(path)
    elif how == "text":
        path.write_text("not an image")
    else:
        corrupt(path, how)
    assert files(whole) != before
    assert drawn(whole) == ["3_0.png"]
    assert files(whole) == before


def test_an_image_copied_under_another_name_is_drawn_again(whole: Path) -> None:
    (whole / "1_0.png").write_bytes((whole / "2_0.png").read_bytes())
    assert drawn(whole) == ["1_0.png"]


def test_a_folder_of_another_model_or_other_prompts_is_refused(whole: Path) -> None:
    before = files(whole)
    with pytest.raises(ConfigError, match=r'model: "abc" there, "xyz" here'):
        drawn(whole, facts={"model": "xyz"})
    with pytest.raises(ConfigError, match="steps: null there, 5 here"):
        drawn(whole, facts=FACTS | {"steps": 5})
    with pytest.raises(ConfigError, match=r'2_0.png.prompt: "prompt 2" there, "another" here'):
        drawn(whole, [Ask("another", 1, 2)])
    with pytest.raises(ConfigError, match=r"2_0.png.seed: 1 there, 9 here"):
        drawn(whole, [Ask("prompt 2", 9, 2)])
    with pytest.raises(ConfigError, match="need facts"):
        generate_files(Model(), ASKS, whole, batch_size=2, facts=None)
    assert files(whole) == before
    assert drawn(whole) == []


@pytest.mark.parametrize("text", ["", "{", '{"format": 2}', '{"format": 1, "facts": {}, "images": {"a": {}}}', "[]"])
def test_a_broken_list_is_refused_and_kept(whole: Path, text: str) -> None:
    (whole / "generated.json").write_text(text)
    with pytest.raises(ArtifactError, match="remove the folder"):
        drawn(whole)
    assert (whole / "generated.json").read_text() == text


def test_names_in_the_list_are_those_of_its_asks(whole: Path) -> None:
    known = json.loads((whole / "generated.json").read_text())
    known["images"]["../../x.png"] = known["images"].pop("0_0.png")
    (whole / "generated.json").write_text(json.dumps(known))
    with pytest.raises(ArtifactError, match="another image's name"):
        drawn(whole)


def test_nan_stops_and_keeps_what_was_good(tmp_path: Path) -> None:
    def sample(asks: Sequence[Ask]) -> Tensor:
        images = Model()(asks)
        if asks[0].case == 4:
            images[1, 0, 0, 0] = float("nan")
        return images

    with pytest.raises(DivergedError, match="1 of 2 images are not finite, first case 5 'prompt 5'"):
        generate_files(sample, ASKS, tmp_path, batch_size=2, facts=FACTS)
    assert sorted(files(tmp_path)) == ["0_0.png", "1_0.png", "2_0.png", "3_0.png"]
    generate_files(sample, ASKS[:4], tmp_path, batch_size=2, facts=FACTS)


def test_a_full_disk_leaves_whole_files_and_the_run_continues(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk_full(monkeypatch, "_0.png", after=3) as hits, pytest.raises(ResourceError, match="no space left"):
        drawn(tmp_path / "full")
    assert len(hits) == 4
    assert sorted(p.name for p in (tmp_path / "full").iterdir() if p.name[0] != ".") == [
        *("0_0.png", "1_0.png", "2_0.png"),
        "generated.json",
    ]
    assert not list((tmp_path / "full").glob(".*"))
    assert drawn(tmp_path / "full") == ["3_0.png", "4_0.png", "5_0.png"]
    assert files(tmp_path / "full") == files(whole)


def test_the_global_generators_do_not_matter() -> None:
    torch.manual_seed(1)
    a = first_noise(ASKS, (3, 2, 2))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first_noise(ASKS, (3, 2, 2)), a)
    torch.set_rng_state(state)
    first_noise(ASKS, (3, 2, 2))
    assert torch.equal(torch.get_rng_state(), state)

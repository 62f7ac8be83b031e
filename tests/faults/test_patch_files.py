"""Cases 2, 3, 18 and 22 on files: wrong base, damaged undo, weights modified since, targets that exist."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from expunge.cli import app
from expunge.digest import combine, state_digests
from expunge.errors import ArtifactError, ConfigError
from expunge.files import atomic_save_safetensors, read_safetensors, sha256_file
from expunge.models.weights import save_weights
from expunge.patch import Dense, Manifest, Patch, Replace
from expunge.patch.files import UNDO, apply_files, revert_file


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, patch and patched weights with their undo file."""
    base = {"a": torch.tensor([0.1, -0.0, 0.3]), "b": torch.arange(6.0).reshape(2, 3)}
    save_weights(base, tmp_path / "base.safetensors")
    digests = state_digests(base)
    manifest = Manifest(base_digest=combine(digests), base_tensors=digests)
    Patch({"a": Dense(torch.tensor([0.5, 0.0, 1e-9]))}, manifest).save(tmp_path / "p.safetensors")
    out = apply_files(tmp_path / "base.safetensors", [tmp_path / "p.safetensors"], tmp_path / "out.safetensors").path
    return tmp_path / "base.safetensors", tmp_path / "p.safetensors", out


def tensors(path: Path) -> dict[str, str]:
    return state_digests(read_safetensors(path)[0])


def test_the_round_trip_itself_is_exact(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, out = made
    assert tensors(out) != tensors(base)
    revert_file(out, tmp_path / "back.safetensors")
    assert tensors(tmp_path / "back.safetensors") == tensors(base)


def test_only_touched_elements_are_in_the_undo_file(made: tuple[Path, Path, Path]) -> None:
    kept, _ = read_safetensors(made[2].with_suffix(".undo.safetensors"))
    assert set(kept) == {"a::mask", "a::values"}
    assert kept["a::values"].tolist() == pytest.approx([0.1])  # 0.3 + 1e-9 rounds to 0.3: nothing to restore


def test_a_wrong_base_is_refused_before_anything_is_written(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    save_weights({"a": torch.tensor([0.1, 0.0, 0.3]), "b": torch.arange(6.0).reshape(2, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="another base: 1 of 2 tensors differ, first 'a'"):
        apply_files(tmp_path / "x.safetensors", [made[1]], tmp_path / "y.safetensors")
    save_weights({"a": torch.zeros(3)}, tmp_path / "z.safetensors")
    with pytest.raises(ArtifactError, match="another architecture"):
        apply_files(tmp_path / "z.safetensors", [made[1]], tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()
    assert not (tmp_path / "y.undo.safetensors").exists()


def test_a_wrapper_prefix_is_kept_in_the_file(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    stored, _ = read_safetensors(made[0])
    save_weights({f"module.{n}": t for n, t in stored.items()}, tmp_path / "m.safetensors")
    apply_files(tmp_path / "m.safetensors", [made[1]], tmp_path / "mo.safetensors")
    assert set(tensors(tmp_path / "mo.safetensors")) == {"module.a", "module.b"}
    revert_file(tmp_path / "mo.safetensors", tmp_path / "mb.safetensors")
    assert tensors(tmp_path / "mb.safetensors") == tensors(tmp_path / "m.safetensors")


def test_patching_twice_and_repeating_a_patch_are_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, patch, out = made
    with pytest.raises(ArtifactError, match="already carries patches"):
        apply_files(out, [patch], tmp_path / "y.safetensors")
    with pytest.raises(ArtifactError, match="given twice"):
        apply_files(base, [patch, patch], tmp_path / "y.safetensors")
    manifest = Patch.load(patch).manifest
    Patch({"a": Replace(torch.zeros(3))}, manifest).save(tmp_path / "r.safetensors")
    with pytest.raises(ArtifactError, match="'a' is replaced by one patch and changed by another"):
        apply_files(base, [patch, tmp_path / "r.safetensors"], tmp_path / "y.safetensors")


def test_existing_targets_are_kept(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, patch, out = made
    before = sha256_file(out)
    with pytest.raises(ConfigError, match="exists"):
        apply_files(base, [patch], out)
    with pytest.raises(ConfigError, match="exists"):
        revert_file(out, base)
    (tmp_path / "fresh.undo.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"fresh\.undo\.safetensors exists"):
        apply_files(base, [patch], tmp_path / "fresh.safetensors")
    with pytest.raises(ConfigError, match=r"\.safetensors only"):
        apply_files(base, [patch], tmp_path / "out.pt")
    assert sha256_file(out) == before
    apply_files(base, [patch], out, overwrite=True)


def test_weights_modified_since_are_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, out = made
    stored, metadata = read_safetensors(out)
    stored["b"][0, 0] += 1  # not touched by the patch, but the result would not be the base
    atomic_save_safetensors(out, stored, metadata)
    with pytest.raises(ArtifactError, match="modified since"):
        revert_file(out, tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()
    revert_file(out, tmp_path / "back.safetensors", base=base)  # the base itself needs no undo
    assert tensors(tmp_path / "back.safetensors") == tensors(base)


def test_another_base_cannot_stand_in(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, out = made
    other = {n: t + 1 for n, t in read_safetensors(base)[0].items()}
    save_weights(other, tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="but the base was"):
        revert_file(out, tmp_path / "back.safetensors", base=tmp_path / "other.safetensors")


def _edit(path: Path, **changes: object) -> None:
    kept, metadata = read_safetensors(path)
    header = {**json.loads(metadata[UNDO]), **changes}
    atomic_save_safetensors(path, kept, {UNDO: json.dumps(header)})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 99}, "newer"),
        ({"format": "x"}, "malformed"),
        ({"names": ["a", "nothing"]}, "another model"),
        ({"names": ["a"]}, "modified since"),
        ({"patched_digest": "0"}, "modified since"),
        ({"metadata": 3}, "malformed"),
        ({"patches": []}, "malformed"),
    ],
)
def test_a_damaged_undo_header_is_refused(
    made: tuple[Path, Path, Path], tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    _edit(made[2].with_suffix(".undo.safetensors"), **changes)
    with pytest.raises(ArtifactError, match=says):
        revert_file(made[2], tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()


def test_damaged_undo_values_are_caught_by_the_digest(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    undo = made[2].with_suffix(".undo.safetensors")
    kept, metadata = read_safetensors(undo)
    atomic_save_safetensors(undo, {**kept, "a::values": kept["a::values"] + 1}, metadata)
    with pytest.raises(ArtifactError, match="but the base was"):
        revert_file(made[2], tmp_path / "back.safetensors")
    atomic_save_safetensors(undo, {**kept, "a::values": kept["a::values"].repeat(2)}, metadata)
    with pytest.raises(ArtifactError, match="do not fit"):
        revert_file(made[2], tmp_path / "back.safetensors")
    atomic_save_safetensors(undo, {"a::mask": kept["a::mask"]}, metadata)
    with pytest.raises(ArtifactError, match="malformed"):
        revert_file(made[2], tmp_path / "back.safetensors")
    atomic_save_safetensors(undo, {**kept, "zz::mask": kept["a::mask"]}, metadata)
    with pytest.raises(ArtifactError, match="malformed"):
        revert_file(made[2], tmp_path / "back.safetensors")
    undo.unlink()
    with pytest.raises(ArtifactError, match="no undo file"):
        revert_file(made[2], tmp_path / "back.safetensors")


def test_exit_codes_reach_the_shell(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, patch, out = made
    cases = {
        3: ["apply", patch, patch, "-o", tmp_path / "n.safetensors"],
        2: ["apply", base, patch, "-o", out],
    }
    for code, words in cases.items():
        result = CliRunner().invoke(app, [str(w) for w in words])
        assert result.exit_code == code
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1

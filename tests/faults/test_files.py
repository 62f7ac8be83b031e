"""Faults 1, 2, 3, 18 (writing) and 25 (names): broken and hostile weights files, interrupted writes."""

import errno
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from expunge import files
from expunge.digest import model_digest
from expunge.errors import ArtifactError, ConfigError, ResourceError
from expunge.models import ModelSpec, build_model, convert_pickle, load_weights, save_weights


def mlp(seed: int = 0) -> torch.nn.Module:
    return build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8), seed=seed))


def raw_safetensors(header: dict | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor_entry(start: int, end: int, shape: list[int]) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


class Malicious:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return (Path.touch, (self.sentinel,))


# --- 1: pickles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_pickle_checkpoint_is_refused_with_the_convert_command(tmp_path, suffix):
    sentinel, file = tmp_path / "sentinel", tmp_path / f"old{suffix}"
    torch.save({"w": Malicious(sentinel)}, file)
    with pytest.raises(ArtifactError, match=r"expunge convert .*old\.safetensors"):
        load_weights(mlp(), file)
    assert not sentinel.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_named_safetensors_is_refused(tmp_path, zipped):
    sentinel, file = tmp_path / "sentinel", tmp_path / "evil.safetensors"
    torch.save({"w": Malicious(sentinel)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtifactError, match="pickle under another name"):
        load_weights(mlp(), file)
    assert not sentinel.exists()


@pytest.mark.parametrize("writer", ["zip", "legacy", "plain"])
def test_convert_never_runs_code_and_never_retries(tmp_path, writer, monkeypatch):
    sentinel, file = tmp_path / "sentinel", tmp_path / "evil.pt"
    if writer == "plain":
        file.write_bytes(pickle.dumps(Malicious(sentinel)))
    else:
        torch.save({"w": Malicious(sentinel)}, file, _use_new_zipfile_serialization=writer == "zip")
    calls, real = [], torch.load

    def recorded(*args, **kwargs):
        calls.append(kwargs.get("weights_only"))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", recorded)
    with pytest.raises(ArtifactError, match="never loaded without restrictions"):
        convert_pickle(file, tmp_path / "out.safetensors")
    assert calls == [True]
    assert not sentinel.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_the_malicious_file_would_work(tmp_path):
    sentinel = tmp_path / "sentinel"
    pickle.loads(pickle.dumps(Malicious(sentinel)))
    assert sentinel.exists()


def test_convert_honours_the_torch_floor(tmp_path, monkeypatch):
    torch.save({"w": torch.zeros(1)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    with pytest.raises(ArtifactError, match="cannot read pickles safely"):
        convert_pickle(tmp_path / "a.pt", tmp_path / "a.safetensors")


# --- 2: broken safetensors --------------------------------------------------------------------------------------------

BROKEN = {
    "empty": (b"", "truncated: 0 bytes"),
    "short": (b"\x01\x02", "truncated: 2 bytes"),
    "oversized header": (raw_safetensors({}, length=2**62), "over the limit"),
    "header beyond end": (raw_safetensors({}, length=10_000), "claims 10000 bytes"),
    "not json": (raw_safetensors(b"hello world"), "not a safetensors file"),
    "broken json": (raw_safetensors(b'{"a": '), "not a valid safetensors file"),
    "overlapping": (
        raw_safetensors({"a": tensor_entry(0, 8, [2]), "b": tensor_entry(4, 12, [2])}, bytes(12)),
        "not a valid safetensors file",
    ),
    "body missing": (raw_safetensors({"a": tensor_entry(0, 400, [100])}, bytes(8)), "not a valid safetensors file"),
    "body too long": (raw_safetensors({"a": tensor_entry(0, 8, [2])}, bytes(80)), "not a valid safetensors file"),
    "shape overflow": (
        raw_safetensors({"a": tensor_entry(0, 8, [2**40, 2**40])}, bytes(8)),
        "not a valid safetensors file",
    ),
    "size mismatch": (raw_safetensors({"a": tensor_entry(0, 8, [3])}, bytes(8)), "not a valid safetensors file"),
}


@pytest.mark.parametrize("how", list(BROKEN))
def test_broken_safetensors_leave_the_model_alone(tmp_path, how):
    content, message = BROKEN[how]
    file, model = tmp_path / "w.safetensors", mlp()
    file.write_bytes(content)
    before = model_digest(model)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_weights(model, file)
    assert str(file) in str(caught.value)
    assert model_digest(model) == before


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_weights(tmp_path, share):
    file, model = tmp_path / "w.safetensors", mlp()
    save_weights(mlp(1), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    before = model_digest(model)
    with pytest.raises(ArtifactError, match=r"w\.safetensors"):
        load_weights(model, file)
    assert model_digest(model) == before
    file.write_bytes(content)
    load_weights(model, file)
    assert model_digest(model) != before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_need_permission(tmp_path, value):
    source, model = mlp(1), mlp()
    with torch.no_grad():
        source.fc2.weight[3, 4] = value
    save_weights(source, tmp_path / "w.safetensors")
    before = model_digest(model)
    with pytest.raises(ArtifactError, match=r"'fc2\.weight' has 1 NaN or infinite of 32768"):
        load_weights(model, tmp_path / "w.safetensors")
    assert model_digest(model) == before
    load_weights(model, tmp_path / "w.safetensors", allow_nonfinite=True)
    assert model_digest(model) != before


def test_missing_file(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        load_weights(mlp(), tmp_path / "w.safetensors")


# --- 3: another model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "fc.weight": torch.zeros(11, 128)}, r"'fc.weight' is \[11, 128\], the model has \[10, 128\]"),
        (lambda s: {k: v.half() for k, v in s.items()}, "torch.float16, the model has torch.float32"),
        (lambda s: {k: v for k, v in s.items() if k != "fc.bias"}, r"1 tensors missing \(fc\.bias\)"),
        (lambda s: {**s, "extra": torch.zeros(1)}, r"1 unexpected \(extra\)"),
    ],
)
def test_weights_of_another_model(tmp_path, change, message):
    model = mlp()
    save_weights(change(mlp(1).state_dict()), tmp_path / "w.safetensors")
    before = model_digest(model)
    with pytest.raises(ArtifactError, match=message):
        load_weights(model, tmp_path / "w.safetensors")
    assert model_digest(model) == before


# --- 18: writing ------------------------------------------------------------------------------------------------------


def test_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    files.atomic_write(file, "old")

    def interrupted() -> None:
        with files.atomic_path(file) as temporary:
            temporary.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    files.atomic_write(file, b"new")
    assert file.read_text() == "new"


def test_full_disk_is_a_resource_error(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    save_weights(mlp(1), file)
    before = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no space left"):
        save_weights(mlp(2), file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_full_disk_inside_the_safetensors_writer(tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ResourceError, match="no space left"):
        files.atomic_save_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(10)})
    assert list(tmp_path.iterdir()) == []


def test_written_files_follow_the_umask(tmp_path):
    files.atomic_write(tmp_path / "a.txt", "x")
    save_weights(mlp(), tmp_path / "w.safetensors")
    (tmp_path / "plain.txt").write_text("x")
    assert {p.stat().st_mode for p in tmp_path.iterdir()} == {(tmp_path / "plain.txt").stat().st_mode}


def test_linked_target_is_replaced_not_followed(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("precious")
    link = tmp_path / "link.txt"
    link.symlink_to(outside)
    files.atomic_write(link, "new")
    assert outside.read_text() == "precious"
    assert link.read_text() == "new"
    assert not link.is_symlink()


# --- 25: names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "  ", "../x", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "a\nb", "a\x00b", "\x1b[31m"]
)
def test_names_that_leave_the_folder(tmp_path, name):
    with pytest.raises(ConfigError, match="file name"):
        files.confined(tmp_path, name)


def test_links_that_leave_the_folder(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "out").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="through a link"):
        files.confined(base, "out/x.json")
    assert files.confined(base, "sub/x..json") == base.resolve() / "sub" / "x..json"

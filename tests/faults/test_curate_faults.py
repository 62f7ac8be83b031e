"""Faults 11, 12, 18 and 25 in curation: broken shards and pairs, interrupted writing, hostile names."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inject import ROOT, disk_full

sys.path.insert(0, str(ROOT / "tests/unit"))  # the shards of the unit tests
from curate_shards import CAPTIONS, image, pairs, tar, two_shards

from expunge.data.curate import Rules, curate, find_shards
from expunge.data.curate.tars import read_tar
from expunge.errors import ConfigError, DataError, ResourceError

MUSK = Rules(names=("Elon Musk",))


def run(forget: Path, out: Path, rules: Rules = MUSK, retain: Path | None = None, **options):
    return curate(find_shards([forget]), find_shards([retain]) if retain else [], out, rules, **options)


def good_tar(path: Path) -> bytes:
    return tar(path, pairs(CAPTIONS)).read_bytes()


DAMAGE = {
    "inside an image": (lambda raw: raw[:700], "broken shard"),
    "inside a header": (lambda raw: raw[: 512 * 4 + 100], "broken shard"),
    "between members": (lambda raw: raw[: _starts(raw)[6]], "without an end mark: truncated"),
    "header in the middle": (lambda raw: _overwrite(raw, _starts(raw)[6], b"\xff" * 512), "no valid member at byte"),
    "first header": (lambda raw: b"\xff" * 512 + raw[512:], "broken shard"),
    "two joined": (lambda raw: raw + raw, "several tar files joined"),
    "no bytes": (lambda raw: b"", "broken shard: empty file"),
    "no members": (lambda raw: bytes(10240), "holds no image and no caption"),
    "compressed": (lambda raw: __import__("gzip").compress(raw), "uncompressed"),
}


def _starts(raw: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        return [m.offset for m in archive]


def _overwrite(raw: bytes, at: int, data: bytes) -> bytes:
    return raw[:at] + data + raw[at + len(data) :]


@pytest.mark.parametrize("how", list(DAMAGE))
def test_broken_shards_are_named_and_never_half_read(tmp_path, how):
    damage, message = DAMAGE[how]
    shard = tmp_path / "d" / "00007.tar"
    raw = good_tar(shard)
    assert len(read_tar(shard)) == len(CAPTIONS)
    shard.write_bytes(damage(raw))
    with pytest.raises(DataError, match=message) as caught:
        run(tmp_path / "d", tmp_path / "out")
    assert "00007.tar" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_standard_reader_alone_would_not_notice(tmp_path):
    raw = good_tar(tmp_path / "s.tar")
    for how in ("between members", "header in the middle", "two joined"):
        with tarfile.open(fileobj=io.BytesIO(DAMAGE[how][0](raw)), mode="r:") as archive:
            assert 0 < len(archive.getnames()) <= 3 * len(CAPTIONS)


def test_a_broken_retain_shard_counts(tmp_path):
    tar(tmp_path / "f.tar", pairs(["Elon Musk"]))
    for i in range(4):
        tar(tmp_path / f"r/{i}.tar", pairs(["a cat", "a dog"], first=10 * i + 10))
    broken = tmp_path / "r/2.tar"
    broken.write_bytes(broken.read_bytes()[:700])
    with pytest.raises(DataError, match=r"1 of 4 retain shards cannot be used.*2\.tar: broken shard"):
        run(tmp_path / "f.tar", tmp_path / "out", retain=tmp_path / "r")
    done = run(tmp_path / "f.tar", tmp_path / "out", Rules(("Elon Musk",), max_bad=0.25), retain=tmp_path / "r")
    assert len(done.retain.taken) == 6
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert [r["where"] for r in index["retain"]["skipped"]] == [str(broken)]


def bomb() -> bytes:
    raw = bytearray(image(0, "PNG"))
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(raw)


#: Members of a pair ``bad`` and what is said about it. Its caption names Elon Musk where it has one.
BAD = {
    "truncated": ([("bad.jpg", image(1, side=64)[:900]), ("bad.txt", b"Elon Musk")], "not a readable image"),
    "zero bytes": ([("bad.jpg", b""), ("bad.txt", b"Elon Musk")], "zero bytes"),
    "too many pixels": ([("bad.png", bomb()), ("bad.txt", b"Elon Musk")], "pixels|readable"),
    "other format": ([("bad.jpg", image(1, "BMP")), ("bad.txt", b"Elon Musk")], "neither JPEG nor PNG nor WebP"),
    "no image": ([("bad.txt", b"Elon Musk")], "no image"),
    "no caption": ([("bad.jpg", image(1))], "no caption"),
    "empty caption": ([("bad.jpg", image(1)), ("bad.txt", b" \n")], "empty caption"),
    "not UTF-8": ([("bad.jpg", image(1)), ("bad.txt", b"Elon Musk \xff")], "not UTF-8"),
    "huge caption": ([("bad.jpg", image(1)), ("bad.txt", b"Elon Musk " * 10_000)], "caption of more than 65536 bytes"),
    "two captions": ([("bad.jpg", image(1)), ("bad.txt", b"a cat"), ("bad.txt", b"Elon Musk")], "two captions"),
    "two images": ([("bad.jpg", image(1)), ("bad.png", image(1, "PNG")), ("bad.txt", b"Elon Musk")], "two images"),
}


@pytest.mark.parametrize("how", list(BAD))
def test_bad_forget_pairs_are_errors_until_taken_out(tmp_path, how):
    members, message = BAD[how]
    tar(tmp_path / "d/00003.tar", [*pairs(CAPTIONS), *members])
    with pytest.raises(DataError, match=message) as caught:
        run(tmp_path / "d", tmp_path / "out", Rules(("Elon Musk",), max_bad=0.9))
    assert "00003.tar: bad: " in str(caught.value)
    assert "--exclude-key" in str(caught.value)
    assert not (tmp_path / "out").exists()
    for key in ("bad", "00003.tar/bad"):
        done = run(tmp_path / "d", tmp_path / f"out-{key[0]}", Rules(("Elon Musk",), exclude=(key,)))
        assert len(done.forget.taken) == 3


@pytest.mark.parametrize("how", list(BAD))
def test_bad_retain_pairs_are_skipped_within_the_share(tmp_path, how):
    members, message = BAD[how]
    tar(tmp_path / "f.tar", pairs(["Elon Musk"]))
    calm = [(name, data.replace(b"Elon Musk", b"a person!")) for name, data in members]
    tar(tmp_path / "r.tar", [*pairs(["a cat"] * 9, first=50), *calm])
    with pytest.raises(DataError, match=rf"1 of 10 retain pairs .*r\.tar: bad: .*({message})"):
        run(tmp_path / "f.tar", tmp_path / "out", retain=tmp_path / "r.tar")
    done = run(tmp_path / "f.tar", tmp_path / "out", Rules(("Elon Musk",), max_bad=0.1), retain=tmp_path / "r.tar")
    assert len(done.retain.taken) == 9
    (row,) = json.loads((tmp_path / "out/index.json").read_text())["retain"]["skipped"]
    assert row["where"].endswith("r.tar: bad")


def test_a_pair_of_another_subject_without_image_is_listed(tmp_path):
    tar(tmp_path / "d/s.tar", [*pairs(CAPTIONS), ("lost.txt", b"a cat")])
    done = run(tmp_path / "d", tmp_path / "out")
    assert done.forget.skipped == [(f"{tmp_path}/d/s.tar: lost", "no image")]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_not_followed(tmp_path, kind):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(image(9))
    shard = tar(tmp_path / "d/s.tar", pairs(["Elon Musk"]))
    with tarfile.open(shard, "a") as archive:
        link = tarfile.TarInfo("bad.jpg")
        link.type, link.linkname = kind, str(secret)
        archive.addfile(link)
        text = tarfile.TarInfo("bad.txt")
        text.size = 9
        archive.addfile(text, io.BytesIO(b"Elon Musk"))
    with pytest.raises(DataError, match="bad: jpg is a link or another special file"):
        run(tmp_path / "d", tmp_path / "out")


def test_hostile_keys_become_plain_names(tmp_path):
    names = ["../../evil", "/abs", "a\nb", "ä" * 70, "c:x", "x" * 95, "x" * 94 + "y", "A", "a"]
    members = [m for i, n in enumerate(names) for m in ((f"{n}.jpg", image(i)), (f"{n}.txt", b"Elon Musk"))]
    tar(tmp_path / "d/s.tar", members)
    done = run(tmp_path / "d", tmp_path / "out")
    with tarfile.open(tmp_path / "out/forget.tar") as archive:
        found = [m.name.rpartition(".")[0] for m in archive if m.name.endswith("txt")]
    assert len({name.lower() for name in found}) == len(names) == len(done.forget.taken)
    assert all(name.replace("-", "").replace("_", "").isalnum() or set(name) == {"_"} for name in found)
    assert all(name.isascii() and len(name) <= 91 for name in found)


def test_tables_cannot_point_outside(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "secret.jpg").write_bytes(image(9))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/metadata.jsonl").write_text('{"file_name": "../secret.jpg", "text": "Elon Musk"}')
    with pytest.raises(DataError, match=r"metadata\.jsonl line 1: .*must stay inside"):
        run(tmp_path / "d", tmp_path / "out")
    pq.write_table(pa.table({"image": ["../secret.jpg"], "text": ["Elon Musk"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="must stay inside"):
        run(tmp_path / "d.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["not json", "[1]", '{"file_name": 3, "text": "x"}', "[" * 100_000, "", '{"text": "x"}']
)
def test_broken_metadata_are_named(tmp_path, text):
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises((DataError, ConfigError), match=r"metadata\.jsonl"):
        run(tmp_path, tmp_path / "out")


def test_broken_parquet_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"x\.parquet: not a readable Parquet file"):
        run(tmp_path / "x.parquet", tmp_path / "out")


@settings(max_examples=60)
@given(st.data())
def test_flipped_bytes_never_end_in_another_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    raw = bytearray(good_tar(folder / "s.tar"))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 4096))] = data.draw(st.integers(0, 255))
    (folder / "s.tar").write_bytes(bytes(raw))
    try:
        for pair in read_tar(folder / "s.tar"):
            if pair.read is not None:
                pair.data()
    except DataError as error:
        assert "s.tar" in str(error)  # noqa: PT017


def before(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.mark.parametrize("which", ["forget.tar", "retain.tar", "index.json"])
def test_a_full_disk_leaves_the_earlier_set(tmp_path, monkeypatch, which):
    root = two_shards(tmp_path / "data")
    run(root, tmp_path / "out", retain=root)
    old = before(tmp_path / "out")
    cats = Rules(("cat",))
    with disk_full(monkeypatch, which) as hits, pytest.raises(ResourceError, match="nothing was written"):
        run(root, tmp_path / "out", cats, retain=root, overwrite=True)
    assert hits
    assert before(tmp_path / "out") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out"]
    run(root, tmp_path / "out", cats, retain=root, overwrite=True)
    assert before(tmp_path / "out") != old


def test_a_kill_while_writing_leaves_no_set(tmp_path):
    root = two_shards(tmp_path / "data")
    body = f"""
    import os, signal, sys
    import expunge.data.curate as c
    real = c.write_tar
    def write(path, rows):
        if path.name == "retain.tar" and sys.argv[1] == "kill":
            real(path, rows)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, rows)
    c.write_tar = write
    shards = c.find_shards([{str(root)!r}])
    c.curate(shards, shards, {str(tmp_path / "out")!r}, c.Rules(("Elon Musk",)))
    """
    code = "\n".join(line[4:] for line in body.splitlines())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    killed = subprocess.run([sys.executable, "-c", code, "kill"], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert subprocess.run([sys.executable, "-c", code, "go"], env=environment, check=False).returncode == 0
    assert sorted(before(tmp_path / "out")) == ["forget.tar", "index.json", "retain.tar"]


def test_an_image_that_changes_meanwhile_is_noticed(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for i, text in enumerate(CAPTIONS):
        (folder / f"{i}.jpg").write_bytes(image(i))
        (folder / f"{i}.txt").write_text(text)

    def swap(side: str, *_: int) -> None:
        (folder / "0.jpg").write_bytes(image(77))

    with pytest.raises(DataError, match="0: the image has changed"):
        run(folder, tmp_path / "out", progress=swap)
    assert not (tmp_path / "out").exists()
    run(folder, tmp_path / "out")


def test_overwriting_removes_nothing_else(tmp_path):
    root = two_shards(tmp_path / "data")
    run(root, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(notes\.txt\)"):
        run(root, tmp_path / "out", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(ConfigError, match="is not a folder"):
        run(root, tmp_path / "link", overwrite=True)
    (tmp_path / "out/notes.txt").unlink()
    run(root, tmp_path / "out", overwrite=True)


def test_nothing_left_to_retain(tmp_path):
    tar(tmp_path / "d/s.tar", pairs(["Elon Musk", "elon musk"]))
    with pytest.raises(DataError, match=r"nothing is left to retain of 2 pairs \(removed: 2 by key"):
        run(tmp_path / "d", tmp_path / "out", retain=tmp_path / "d")

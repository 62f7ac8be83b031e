"""Patch files: every bit kept, size near the entropy bound, altered and foreign files refused."""

import copy
import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_toys import DTYPES, Net, draw, manifest, patches_of, state

from expunge.errors import ArtifactError
from expunge.patch import Manifest, Patch, Replace, Sparse, apply
from expunge.patch.changes import pack_mask, unpack_mask

# ---- storage


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load_keep_every_bit(tmp_path, dtype):
    model = Net().to(dtype)
    kinds = [*patches_of(model), Patch({"bn.num_batches_tracked": Replace(torch.tensor(3))}, manifest(model))]
    for number, patch in enumerate(kinds):
        loaded = Patch.load(patch.with_metrics({"ua": 1.0}).save(tmp_path / f"{number}.safetensors"))
        assert loaded.digest == patch.digest
        assert loaded.manifest.metrics == {"ua": 1.0}
        assert {n: c.kind for n, c in loaded.changes.items()} == {n: c.kind for n, c in patch.changes.items()}
        assert state(apply(copy.deepcopy(model), loaded)) == state(apply(copy.deepcopy(model), patch))


@given(st.floats(0, 1), st.integers(0, 400), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_property_masks_pack_and_unpack(density, n, seed):
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density
    assert torch.equal(unpack_mask(pack_mask(mask), (n,)), mask)


@pytest.mark.parametrize(("density", "limit"), [(0.01, 1.1), (0.1, 1.05), (0.5, 1.01)])
def test_sparse_size_is_near_the_entropy_bound(tmp_path, density, limit):
    n = 200_000
    mask = torch.rand(n, generator=torch.Generator().manual_seed(0)) < density
    change = Sparse(mask, draw((int(mask.sum()),), 1))
    p = float(mask.float().mean())
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * n / 8
    bound = entropy + 4 * int(mask.sum())
    assert bound * 0.999 <= change.nbytes <= bound * limit
    patch = Patch({"w": change}, Manifest(base_digest="0", base_tensors={"w": "0"}))
    path = patch.save(tmp_path / "p.safetensors")
    assert path.stat().st_size <= change.nbytes + 2048
    coordinates = 4 * int(mask.sum()) * 2  # what index-value pairs would need
    assert change.nbytes < coordinates


def test_a_mask_that_inflates_beyond_its_shape_is_refused():
    packed = pack_mask(torch.zeros(80_000, dtype=torch.bool))
    assert int(packed[0]) == 1
    with pytest.raises(ArtifactError, match="where its shape"):
        unpack_mask(packed, (8,))
    with pytest.raises(ArtifactError, match="unknown encoding"):
        unpack_mask(torch.tensor([9, 0], dtype=torch.uint8), (8,))


def rewrite(path, edit):
    """Change the header of a patch file the way an editor would."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    inner = json.loads(header["__metadata__"]["expunge"])
    edit(inner)
    header["__metadata__"]["expunge"] = json.dumps(inner)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def test_altered_files_are_refused(tmp_path):
    path = patches_of(Net())[0].save(tmp_path / "p.safetensors")
    good = path.read_bytes()
    Patch.load(path)

    flipped = bytearray(good)
    for offset in (1, 9, 40):  # a mask, its neighbour, a value
        flipped = bytearray(good)
        flipped[-offset] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError):
            Patch.load(path)

    def base(h):
        h["manifest"]["base_tensors"]["a.weight"] = "0" * 16

    def shape(h):
        h["changes"]["a.weight"]["shape"] = [6, 5]

    def notes(h):
        h["manifest"]["notes"] = ["all is well"]

    for edit in (base, shape, notes):
        path.write_bytes(good)
        rewrite(path, edit)
        with pytest.raises(ArtifactError):
            Patch.load(path)
    path.write_bytes(good)
    rewrite(path, lambda h: None)  # the tool itself does no harm
    Patch.load(path)


def test_newer_formats_and_other_files_are_refused(tmp_path):
    path = patches_of(Net())[0].save(tmp_path / "p.safetensors")

    def newer(h):
        h["manifest"]["format"] = 99
        h["manifest"]["a_field_of_the_future"] = 1

    rewrite(path, newer)
    with pytest.raises(ArtifactError, match=r"format 99.*update expunge"):
        Patch.load(path)
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, str(tmp_path / "w.safetensors"))
    with pytest.raises(ArtifactError, match="not a patch"):
        Patch.load(tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match="no such"):
        Patch.load(tmp_path / "absent.safetensors")

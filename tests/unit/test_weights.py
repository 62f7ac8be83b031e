"""Saving and loading weights: round trips, ties, prefixes, conversion of legacy checkpoints."""

import json

import pytest
import torch
from torch import nn

from expunge import files
from expunge.digest import model_digest
from expunge.errors import ArtifactError, ConfigError
from expunge.models import ModelSpec, build_model, convert_pickle, load_weights, save_weights
from expunge.models.weights import check_torch_floor


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def mlp(seed: int = 0) -> nn.Module:
    return build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8), seed=seed))


def digest(model: nn.Module) -> str:
    return model_digest(model)


def test_round_trip(tmp_path):
    source, target = mlp(1), mlp(2)
    assert digest(source) != digest(target)
    save_weights(source, tmp_path / "w.safetensors", {"note": "x"})
    report = load_weights(target, tmp_path / "w.safetensors")
    assert digest(source) == digest(target)
    assert report.notes == ()
    assert report.metadata == {"note": "x"}
    assert report.sha256 == files.sha256_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefix_is_removed_and_reported(tmp_path, prefix):
    source, target = mlp(1), mlp(2)
    save_weights({prefix + k: v for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    report = load_weights(target, tmp_path / "w.safetensors")
    assert digest(source) == digest(target)
    assert "prefix" in report.notes[0]


def test_prefix_on_some_names_only_is_refused(tmp_path):
    state = mlp(1).state_dict()
    state["module.fc.bias"] = state.pop("fc.bias")
    save_weights(state, tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match=r"1 tensors missing \(fc\.bias\), 1 unexpected \(module\.fc\.bias\)"):
        load_weights(mlp(), tmp_path / "w.safetensors")


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    source, target = Tied(), Tied()
    save_weights(source, tmp_path / "w.safetensors")
    stored, metadata = files.read_safetensors(tmp_path / "w.safetensors")
    assert list(stored) == ["embed.weight"]
    assert json.loads(metadata["expunge.tied"]) == {"head.weight": "embed.weight"}
    report = load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(target.head.weight, source.embed.weight)
    assert target.head.weight is target.embed.weight
    assert "tied" in report.notes[0]


def test_tied_weights_that_disagree_are_refused(tmp_path):
    state = {"embed.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}
    save_weights(state, tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match="one tensor in the model but differ"):
        load_weights(Tied(), tmp_path / "w.safetensors")


def test_views_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    files.atomic_save_safetensors(tmp_path / "v.safetensors", {"a": base, "row": base[1], "t": base.t()})
    stored, _ = files.read_safetensors(tmp_path / "v.safetensors")
    assert torch.equal(stored["row"], base[1])
    assert torch.equal(stored["t"], base.t())


def test_only_safetensors_is_written(tmp_path):
    with pytest.raises(ConfigError, match="safetensors only"):
        save_weights(mlp(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="metadata are text"):
        save_weights(mlp(), tmp_path / "w.safetensors", {"epoch": 3})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_convert(tmp_path, nest):
    source, target = mlp(1), mlp(2)
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    torch.save(state if nest is None else {nest: state, "epoch": 3}, tmp_path / "old.pt")
    notes = convert_pickle(tmp_path / "old.pt", tmp_path / "new.safetensors")
    load_weights(target, tmp_path / "new.safetensors")
    assert digest(source) == digest(target)
    assert any("module." in n for n in notes)
    assert nest is None or "left out: ['epoch']" in notes[0]
    with pytest.raises(ConfigError, match="exists"):
        convert_pickle(tmp_path / "old.pt", tmp_path / "new.safetensors")


def test_convert_takes_an_input_layer_out_and_says_so(tmp_path):
    state = mlp(1).state_dict() | {"normalize.mean": torch.tensor([0.5])}
    torch.save(state, tmp_path / "old.pt")
    notes = convert_pickle(tmp_path / "old.pt", tmp_path / "new.safetensors")
    assert "normalize.mean" in notes[-1]
    load_weights(mlp(), tmp_path / "new.safetensors")


def test_convert_refuses_ambiguous_and_odd_files(tmp_path):
    state = mlp().state_dict()
    torch.save({"state_dict": state, "ema": state}, tmp_path / "two.pt")
    with pytest.raises(ArtifactError, match="several entries"):
        convert_pickle(tmp_path / "two.pt", tmp_path / "x.safetensors")
    assert "ema" in convert_pickle(tmp_path / "two.pt", tmp_path / "x.safetensors", key="ema")[0]
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ArtifactError, match="holds a list"):
        convert_pickle(tmp_path / "list.pt", tmp_path / "y.safetensors")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    with pytest.raises(ArtifactError, match="no entry holds weights"):
        convert_pickle(tmp_path / "none.pt", tmp_path / "y.safetensors")
    torch.save({"w": torch.tensor([float("nan")])}, tmp_path / "nan.pt")
    with pytest.raises(ArtifactError, match="NaN"):
        convert_pickle(tmp_path / "nan.pt", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_torch_floor():
    check_torch_floor("2.10.0")
    check_torch_floor("3.0.0+cpu")
    for old in ("2.9.1", "1.13", "unknown"):
        with pytest.raises(ArtifactError, match="newer"):
            check_torch_floor(old)

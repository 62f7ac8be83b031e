"""Matching, collection and the registered part: errors, restored state, validation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from expunge.errors import ArtifactError, ConfigError, DataError, RequestError
from expunge.protections.base import Protection
from expunge.protections.interval import CollectSettings, IntervalProtection, collect, find, load
from expunge.spaces.base import DirectSpace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 8))
        self.fc = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


@pytest.mark.parametrize(
    ("targets", "names"),
    [(["body.?"], ["body.0", "body.3"]), (["re:body\\.[0-1]|fc"], ["body.0", "fc"]), (["FC"], ["fc"])],
)
def test_patterns(targets: list[str], names: list[str]) -> None:
    assert list(find(Net(), targets).layers) == names


def test_nothing_matched_names_what_is_close() -> None:
    with pytest.raises(RequestError, match=r"Linear: 4.*Closest names: .*fc"):
        find(Net(), ["fcc"])


def run(model: Net, layers: dict[str, nn.Module], x: Tensor, **changes: object) -> object:
    return collect(model, layers, model, lambda: x.split(4), CollectSettings(**changes))


def untouched(model: Net) -> bool:
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return model.training and not model.body[1].training and not hooks


def test_modes_and_hooks_are_put_back() -> None:
    model = Net().train()
    model.body[1].eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    run(model, {"fc": model.fc}, torch.randn(12, 6))
    assert untouched(model)
    with pytest.raises(DataError, match=r"'body.0'.*NaN"):
        run(model, {"body.0": model.body[0]}, torch.full((12, 6), float("nan")))
    assert untouched(model)
    with pytest.raises(RuntimeError, match="shapes"):
        run(model, {"fc": model.fc}, torch.randn(12, 5))
    assert untouched(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_layer_that_never_runs_is_named() -> None:
    model = Net()
    with pytest.raises(DataError, match="unused"):
        run(model, {"unused": model.unused}, torch.randn(8, 6))


def test_inputs_changed_in_place_are_told_apart() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            return first + self.b(x.clamp_(min=0))

    model = InPlace()
    x = torch.randn(64, 6)
    stats = collect(
        model, {"a": model.a, "b": model.b}, lambda v: model(v.clone()), lambda: x.split(16), CollectSettings()
    )
    assert stats["a"] is not stats["b"]
    torch.testing.assert_close(stats["b"][0].mean, x.clamp(min=0).double().mean(0), rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    """Calls its layer a second time for batches marked by a large first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.tail, self.tails = nn.Linear(6, 6), nn.Linear(6, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc(x)
        if float(x[0, 0]) > 50:
            out = self.fc(out)
        self.tails += 1
        return self.tail(out)


def test_what_follows_the_last_layer_is_left_out() -> None:
    model, x = Twice(), torch.randn(64, 6)
    stats = collect(model, {"fc": model.fc}, model, lambda: x.split(4), CollectSettings())
    assert model.tails == 5, "batches 1, 2, 4, 8 and 16 run to their end"
    torch.testing.assert_close(stats["fc"][0].mean, x.double().mean(0), rtol=1e-5, atol=1e-6)


def test_a_changing_number_of_calls_is_noticed() -> None:
    model, x = Twice(), torch.randn(64, 6)
    x[12:16] = 100.0
    stats = collect(model, {"fc": model.fc}, model, lambda: x.split(4), CollectSettings())
    assert stats["fc"][0].n_rows == 68


def test_retain_statistics_need_retain_batches() -> None:
    model = Net()
    with pytest.raises(RequestError, match="retain"):
        run(model, {"fc": model.fc}, torch.randn(8, 6), retain_moments=True)


def test_broken_files_are_refused(tmp_path) -> None:
    with pytest.raises(ArtifactError):
        load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a file")
    with pytest.raises(ArtifactError):
        load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    "fields",
    [
        {"lower_percentile": 0.9, "upper_percentile": 0.1},
        {"reduced_dim": 0},
        {"targets": ()},
        {"lambda_interval": -1.0},
        {"profile": "as_published", "floor": 0.1},
        {"profile": "as_published", "region": "env_box"},
        {"lambda": 3.0},
    ],
    ids=str,
)
def test_bad_settings(fields: dict) -> None:
    with pytest.raises(ConfigError):
        IntervalProtection(**{"targets": ("fc",), **fields})


def test_registered() -> None:
    part = Protection.parse({"kind": "interval", "targets": ["fc"], "lambda_interval": 2})
    assert Protection.parse(part.describe()) == part
    assert type(Protection.parse({"kind": "barrier", "targets": ["fc"]})) is IntervalProtection


def context(model: Net, x: Tensor) -> SimpleNamespace:
    notes: list[str] = []
    return SimpleNamespace(
        model=model, seed=0, notes=notes, note=notes.append, task=SimpleNamespace(predict=model),
        batches=lambda role, size: iter(x.split(size)),
    )  # fmt: skip


def test_bind() -> None:
    model, x = Net(), torch.randn(40, 6)
    space = DirectSpace({n: p for n, p in model.named_parameters() if n.startswith("fc")})
    ctx = context(model, x)
    penalty = IntervalProtection(targets=("fc",), retain_weight=0.5, batch_size=8).bind(ctx, space)
    term = penalty()["interval"]
    assert term.role is None
    assert term.values.shape == ()
    assert float(term.values.detach()) == 0.0
    assert "stable for lr" in ctx.notes[0]
    with torch.no_grad():
        model.fc.weight += 0.1
    assert float(penalty()["interval"].values.detach()) > 0


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("Linear",), "do not move in this space"), (("body.1", "fc"), "cannot be protected"), (("none",), "select no")],
)
def test_bind_refuses(targets: tuple[str, ...], message: str) -> None:
    model = Net()
    space = DirectSpace({n: p for n, p in model.named_parameters() if n.startswith("fc")})
    with pytest.raises(RequestError, match=message):
        IntervalProtection(targets=targets).bind(context(model, torch.randn(40, 6)), space)


def test_step_size_limit_separates_stable_from_diverging() -> None:
    model, x = Net(), torch.randn(60, 6)
    layers = {"body.0": model.body[0]}
    part = IntervalProtection(targets=("body.0",))
    penalty = part.penalty(model, layers, run(model, layers, x))
    limit = penalty.step_size_limit()
    start = model.body[0].weight.detach().clone()
    ends = {}
    for factor in (0.9, 3.0):
        with torch.no_grad():
            model.body[0].weight.copy_(start + 0.01 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
        optimizer = torch.optim.SGD([model.body[0].weight], lr=factor * limit)
        for _ in range(60):
            optimizer.zero_grad()
            penalty().backward()
            optimizer.step()
        ends[factor] = float(penalty().detach())
    assert ends[0.9] < 1e-2
    assert not ends[3.0] < 1e2

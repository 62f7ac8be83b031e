"""Networks: sizes, names, determinism, stems, normalisation; the shared weights load and reach their accuracy."""

import os
from pathlib import Path

import pytest
import torch

from expunge.data import DataSpec, load_data
from expunge.errors import ArtifactError, CapabilityError, ConfigError
from expunge.models import MEAN_STD, ModelSpec, Normalize, build_model, save_weights

SHARED = Path(os.environ.get("EXPUNGE_SHARED", Path(__file__).parents[2].parent / "shared"))
PACK = SHARED / "data" / "cifar10"


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("resnet20", 10, 269_722),
        ("resnet56", 10, 853_018),
        ("resnet18_cifar", 10, 11_173_962),
        ("resnet18_cifar", 100, 11_220_132),
        ("vgg16_bn", 10, 15_311_818),
        ("vgg16_bn_lth", 10, 14_728_266),
    ],
)
def test_published_sizes(name, classes, parameters):
    model = build_model(ModelSpec(name=name, n_classes=classes)).eval()
    assert count(model) == parameters
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, classes)


@pytest.mark.parametrize(("name", "parameters"), [("small_cnn", 37_802), ("mlp", 50_826)])
def test_small_networks(name, parameters):
    model = build_model(ModelSpec(name=name, input_shape=(1, 8, 8))).eval()
    assert count(model) == parameters
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_resnet20_has_116_tensors_with_the_known_names():
    state = build_model(ModelSpec(name="resnet20")).state_dict()
    assert len(state) == 116
    assert {"conv1.weight", "bn1.running_var", "layer2.0.conv1.weight", "layer3.2.bn2.bias", "linear.bias"} <= set(
        state
    )


def test_option_a_shortcut_subsamples_and_pads():
    from expunge.models.cifar_resnet import OptionABlock

    block = OptionABlock(16, 32, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == 0
    assert out[:, 24:].abs().sum() == 0


def test_initial_weights_are_a_function_of_the_spec():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8)))
    assert torch.equal(before, torch.get_rng_state())
    b = build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8)))
    c = build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8), seed=1))
    assert torch.equal(a.fc1.weight, b.fc1.weight)
    assert not torch.equal(a.fc1.weight, c.fc1.weight)


def test_timm_by_name_and_small_stem():
    pytest.importorskip("timm")
    stock = build_model(ModelSpec(name="timm:resnet18"))
    small = build_model(ModelSpec(name="resnet18", cifar_stem=True)).eval()
    assert stock.conv1.stride == (2, 2)
    assert count(small) == 11_173_962
    assert small.conv1.kernel_size == (3, 3)
    own = build_model(ModelSpec(name="resnet18_cifar")).eval()
    own.load_state_dict(small.state_dict(), strict=True)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(own(x), small(x), rtol=1e-5, atol=1e-5)


def test_timm_transformer_at_32_pixels():
    pytest.importorskip("timm")
    model = build_model(ModelSpec(name="vit_tiny_patch16_224", image_size=32, n_classes=7)).eval()
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"name": "resnet21"}, ConfigError, "did you mean 'resnet20'"),
        ({"name": "timm:resnet18x"}, ConfigError, "did you mean 'resnet18'"),
        ({"name": "mobilenetvv2_100"}, ConfigError, "did you mean 'mobilenetv2_100'"),
        ({"name": "resnet20", "cifar_stem": True}, ConfigError, "timm models only"),
        ({"name": "resnet18d", "cifar_stem": True}, CapabilityError, "no ResNet-like stem"),
        ({"name": "vit_tiny_patch16_224", "cifar_stem": True}, CapabilityError, "no ResNet-like stem"),
        ({"name": "resnet18", "image_size": 32}, ConfigError, "does not take"),
        ({"name": "vgg16_bn", "input_shape": (1, 8, 8)}, CapabilityError, "needs 32 pixels"),
        ({"name": "resnet18", "pretrained": True, "weights": "x.safetensors"}, ConfigError, "not both"),
        ({"name": "resnet20", "clases": 3}, ConfigError, "unknown key"),
    ],
)
def test_wrong_specs(fields, kind, message):
    pytest.importorskip("timm")
    with pytest.raises(kind, match=message):
        build_model(ModelSpec(**fields))


def test_pretrained_offline_says_what_to_do(monkeypatch):
    timm = pytest.importorskip("timm")

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ArtifactError, match="local safetensors file"):
        build_model(ModelSpec(name="timm:resnet18", pretrained=True))


def test_normalisation_keeps_the_state_dict_bare_and_is_exact():
    x = torch.rand(2, 3, 4, 4)
    mean, std = MEAN_STD["imagenet"]
    want = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(Normalize.named("imagenet")(x), want, rtol=0, atol=1e-6)
    assert not torch.allclose(Normalize.named("cifar10")(x), want, atol=1e-3)
    assert Normalize.named("none")(x) is x
    with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
        Normalize.named("cifar1")
    with pytest.raises(ConfigError, match="channels"):
        Normalize.named("cifar10")(torch.rand(1, 1, 4, 4))


def test_build_with_weights_logs_what_was_normalised(tmp_path, caplog):
    model = build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8), seed=3))
    save_weights({f"module.{k}": v for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    again = build_model(ModelSpec(name="mlp", input_shape=(1, 8, 8), weights=str(tmp_path / "w.safetensors")))
    assert torch.equal(again.fc.weight, model.fc.weight)
    assert "prefix 'module.' removed" in caplog.text


@pytest.mark.skipif(not PACK.is_dir(), reason="shared CIFAR-10 pack is absent")
def test_shared_weights_reach_their_accuracy(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    spec = ModelSpec(name="resnet20", weights=str(PACK / "resnet20-jpeg.safetensors"))
    model = build_model(spec).eval()
    test = load_data(DataSpec(name="cifar10", path=str(PACK), limit=10, test_limit=1000)).test
    x = test.images(torch.arange(1000))
    with torch.no_grad():
        right = (model(Normalize.named("imagenet")(x)).argmax(1) == test.labels).float().mean()
        wrong = (model(x).argmax(1) == test.labels).float().mean()
    assert 0.86 < float(right) < 0.90
    assert float(wrong) < float(right) - 0.02

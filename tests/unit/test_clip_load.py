"""Two-tower models from folders: both libraries, safetensors only, offline."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge.errors import ArtifactError, CapabilityError, ConfigError
from expunge.models import clip
from expunge.models.clip import ClipSpec, library_of, load_clip
from expunge.models.clip_names import canonical_state, library_state, translate
from expunge.models.towers_hf import OPENAI_MEAN
from expunge.patch import Dense, Patch
from expunge.tasks.tiny_clip import tiny_towers

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

WIDTH, VOCABULARY = 32, 49408
TEXTS = ["a dog", "a long red circle"]


def hf_tokenizer():
    """One token per letter; begin and end where the tiny model expects them."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [
        *letters,
        *(c + "</w>" for c in letters),
        *(f"<{i}>" for i in range(10)),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    model = tiny_towers("transformers").model
    model.half().save_pretrained(folder)
    model.float()
    hf_tokenizer().save_pretrained(folder)
    stated = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.3, 0.4], "size": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    return folder


@pytest.fixture(scope="module")
def open_config():
    return {
        "embed_dim": 24,
        "vision_cfg": {"layers": 1, "width": WIDTH, "head_width": 16, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 2, "layers": 1},
    }


@pytest.fixture(scope="module")
def open_folder(tmp_path_factory, open_config):
    folder = tmp_path_factory.mktemp("open")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**open_config)
    save_file(model.half().state_dict(), folder / "open_clip_model.safetensors")
    stated = {"model_cfg": open_config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0]}}
    (folder / "open_clip_config.json").write_text(json.dumps(stated))
    return folder


def copied(folder, target, *without):
    target.mkdir()
    for file in folder.iterdir():
        if file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def embeddings(towers):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.cat([towers.image(towers.preprocess(images)), towers.text(towers.tokenize(TEXTS))])


# ---- transformers


def test_a_transformers_folder(hf_folder):
    towers = load_clip(str(hf_folder))
    assert towers.library == "transformers"
    assert not towers.model.training
    assert {p.dtype for p in towers.parameters().values()} == {torch.float32}
    assert towers.mean == (0.5, 0.5, 0.5)
    assert towers.std == (0.2, 0.3, 0.4)
    tokens = towers.tokenize(TEXTS)
    assert tokens.mask is None
    assert tokens.ids.shape == (2, 12)
    assert (tokens.ids[0, 0], tokens.ids[0, 5]) == (62, 63)
    reference = tiny_towers("transformers").model.half().float()
    loaded = towers.model.state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in reference.state_dict().items())


def test_precisions(hf_folder, open_folder):
    for folder in (hf_folder, open_folder):
        for dtype in ("float16", "bfloat16", "float64"):
            towers = load_clip(ClipSpec(name=str(folder), dtype=dtype))
            assert {p.dtype for p in towers.parameters().values()} == {getattr(torch, dtype)}


def test_own_weights_replace_those_of_the_folder(hf_folder, tmp_path):
    other = tiny_towers("transformers", seed=3).model.state_dict()
    save_file(other, tmp_path / "own.safetensors")
    bare = copied(hf_folder, tmp_path / "bare", "model.safetensors")
    for folder in (hf_folder, bare):
        towers = load_clip(ClipSpec(name=str(folder), weights=str(tmp_path / "own.safetensors")))
        assert not towers.model.training
        loaded = towers.model.state_dict()
        assert all(torch.equal(loaded[n], t) for n, t in other.items())
    save_file({n: t for n, t in other.items() if n != "logit_scale"}, tmp_path / "part.safetensors")
    with pytest.raises(ArtifactError, match="logit_scale"):
        load_clip(ClipSpec(name=str(hf_folder), weights=str(tmp_path / "part.safetensors")))


def test_a_folder_that_lacks_a_tensor_is_refused(hf_folder, tmp_path):
    folder = copied(hf_folder, tmp_path / "x", "model.safetensors")
    state = load_file(hf_folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"missing tensors \(visual_projection\.weight\)"):
        load_clip(str(folder))


def test_pickles_are_refused(hf_folder, open_folder, tmp_path):
    for i, (folder, name) in enumerate(
        ((hf_folder, "model.safetensors"), (open_folder, "open_clip_model.safetensors"))
    ):
        bare = copied(folder, tmp_path / str(i), name)
        with pytest.raises(ArtifactError, match=r"no \S+\.safetensors in it"):
            load_clip(str(bare))
        (bare / "pytorch_model.bin").write_bytes(b"never read")
        with pytest.raises(ArtifactError, match="expunge convert"):
            load_clip(str(bare))
        with pytest.raises(ArtifactError, match="pickle checkpoints can run code"):
            load_clip(ClipSpec(name=str(folder), weights=str(bare / "pytorch_model.bin")))


def test_without_a_preprocessor_the_usual_statistics_are_taken_and_that_is_said(hf_folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="expunge"):
        assert load_clip(str(hf_folder)).mean != OPENAI_MEAN
    assert not caplog.records
    folder = copied(hf_folder, tmp_path / "x", "preprocessor_config.json")
    logging.getLogger("expunge").propagate = True
    with caplog.at_level(logging.WARNING, logger="expunge"):
        assert load_clip(str(folder)).mean == OPENAI_MEAN
    assert "preprocessor_config" in caplog.text


def test_other_models_of_transformers_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CapabilityError, match="siglip"):
        load_clip(str(tmp_path))


def test_what_cannot_be_fetched_says_what_to_do(hf_folder, tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    monkeypatch.setattr(clip, "_fetch", offline)
    for name in ("nobody/nothing", "hf-hub:nobody/nothing"):
        with pytest.raises(ArtifactError, match=r"no network here.*give the folder as `name`"):
            load_clip(name)


def test_tokenizers_that_are_absent_or_too_large_are_refused(hf_folder, tmp_path):
    bare = copied(hf_folder, tmp_path / "x", "tokenizer.json")
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        load_clip(str(bare))
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="could not be had"):
        load_clip(str(bare))
    large = copied(hf_folder, tmp_path / "y")
    tokenizer = hf_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(large)
    with pytest.raises(ArtifactError, match="has 65 tokens, the text tower 64"):
        load_clip(str(large))


# ---- open_clip


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_an_open_clip_folder(open_folder, form):
    towers = load_clip(form.format(open_folder))
    assert towers.library == "open_clip"
    assert not towers.model.training
    assert {p.dtype for p in towers.parameters().values()} == {torch.float32}
    assert (towers.mean, towers.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
    assert towers.tokenize(TEXTS).ids.shape == (2, 6)
    stored = load_file(open_folder / "open_clip_model.safetensors")
    loaded = towers.model.state_dict()
    assert all(torch.equal(loaded[n], t.float()) for n, t in stored.items())
    assert bool(towers.model.attn_mask.isinf().any())


def test_an_architecture_of_open_clip_with_own_weights(open_folder, open_config, monkeypatch):
    weights = str(open_folder / "open_clip_model.safetensors")
    known = dict(open_config)
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: dict(known) if name == "tiny" else None)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda _name: open_clip.SimpleTokenizer(context_length=12))
    towers = load_clip(ClipSpec(name="tiny", weights=weights))
    assert torch.equal(towers.model.visual.proj, load_clip(str(open_folder)).model.visual.proj)
    with pytest.raises(ConfigError, match="needs `pretrained`"):
        load_clip("tiny")
    with pytest.raises(ConfigError, match="no weights 'laion'"):
        load_clip(ClipSpec(name="tiny", pretrained="laion"))
    tags = {"pickle": {"url": "http://x/y.pt"}, "safe": {"hf_hub": "me/tiny/", "quick_gelu": True, "std": (1, 1, 1)}}
    tags["named"] = {"hf_hub": "me/tiny/w.bin", "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _name, tag: tags[tag])
    with pytest.raises(ArtifactError, match="a pickle only"):
        load_clip(ClipSpec(name="tiny", pretrained="pickle"))
    asked = []
    monkeypatch.setattr(clip, "_fetch", lambda *args: asked.append(args) or open_folder / "open_clip_model.safetensors")
    quick = load_clip(ClipSpec(name="tiny", pretrained="safe"))
    assert quick.std == (1, 1, 1)
    plain = load_clip(ClipSpec(name="tiny", pretrained="named", revision="main"))
    assert asked == [("me/tiny", "open_clip_model.safetensors", None), ("me/tiny", "w.safetensors", "main")]
    x = torch.rand(1, 3, 16, 16)
    assert not torch.equal(quick.image(x), plain.image(x))  # the tag decides the activation
    assert torch.equal(plain.image(x), towers.image(x))
    known["multimodal_cfg"] = {}
    with pytest.raises(CapabilityError, match="CoCa"):
        load_clip(ClipSpec(name="tiny", weights=weights))


def test_an_open_clip_model_from_the_hub(open_folder, monkeypatch):
    monkeypatch.setattr(clip, "_fetch", lambda _repo, file, _revision: open_folder / file)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda _name: open_clip.SimpleTokenizer(context_length=12))
    towers = load_clip("hf-hub:me/tiny")
    torch.testing.assert_close(embeddings(towers), embeddings(load_clip(str(open_folder))))


@pytest.mark.parametrize(("content", "match"), [(None, "no open_clip_config"), ("{}", "no 'model_cfg'"), ("{", "JSON")])
def test_broken_open_clip_folders(open_folder, tmp_path, content, match):
    folder = copied(open_folder, tmp_path / "x", "open_clip_config.json")
    if content is not None:
        (folder / "open_clip_config.json").write_text(content)
    with pytest.raises(ArtifactError, match=match):
        load_clip(ClipSpec(name=str(folder), library="open_clip"))


def test_several_weights_without_the_usual_name(open_folder, tmp_path):
    folder = copied(open_folder, tmp_path / "x")
    (folder / "open_clip_model.safetensors").rename(folder / "a.safetensors")
    load_clip(str(folder))
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="name one with `weights`"):
        load_clip(str(folder))
    load_clip(ClipSpec(name=str(folder), weights=str(folder / "b.safetensors")))


# ---- which library


def test_the_library_follows_the_name(hf_folder, open_folder, tmp_path):
    assert library_of(ClipSpec()) == "transformers"
    assert library_of(ClipSpec(name="openai/clip-vit-base-patch32")) == "transformers"
    assert library_of(ClipSpec(name="hf-hub:me/tiny")) == "open_clip"
    assert library_of(ClipSpec(name="ViT-B-32")) == "open_clip"
    assert library_of(ClipSpec(name="x", library="transformers")) == "transformers"
    both = copied(hf_folder, tmp_path / "both")
    (both / "open_clip_config.json").write_text("{}")
    assert library_of(ClipSpec(name=str(both))) == "transformers"
    (both / "model.safetensors").rename(both / "open_clip_model.safetensors")
    assert library_of(ClipSpec(name=str(both))) == "open_clip"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="neither"):
        library_of(ClipSpec(name=str(tmp_path / "empty")))
    with pytest.raises(ConfigError, match="did you mean 'ViT-B-32'"):
        library_of(ClipSpec(name="ViT-B-3"))


def test_options_that_do_not_go_together(hf_folder):
    with pytest.raises(ConfigError, match="tag of open_clip"):
        load_clip(ClipSpec(name=str(hf_folder), library="transformers", pretrained="openai"))
    with pytest.raises(ConfigError, match="did you mean 'weights'"):
        ClipSpec(weight="x")


# ---- the command


@pytest.fixture
def pair(hf_folder, tmp_path):
    """The same weights in both libraries; open_clip's own tokenizer is not used."""
    hf = load_clip(str(hf_folder))
    twin = tiny_towers("open_clip").model
    state = library_state("open_clip", canonical_state("transformers", hf.model.state_dict()), twin.state_dict())
    folder = tmp_path / "twin"
    folder.mkdir()
    save_file(state, folder / "open_clip_model.safetensors")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 64, "width": WIDTH, "heads": 2, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return hf, folder


def test_the_command_translates_a_patch(pair, hf_folder, tmp_path):
    from typer.testing import CliRunner

    from expunge.cli.app import app
    from expunge.digest import combine, named_tensors, state_digests
    from expunge.patch import Manifest

    hf, folder = pair
    digests = state_digests(named_tensors(hf.model)[0])
    name = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    patch = Patch({name: Dense(torch.ones(WIDTH, WIDTH))}, Manifest(base_digest=combine(digests), base_tensors=digests))
    patch.save(tmp_path / "p.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = ["transfer", str(tmp_path / "p.safetensors"), "--from", str(hf_folder), "--to", str(folder)]
    result = CliRunner().invoke(app, [*arguments, "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "transformers -> open_clip" in result.output
    assert Patch.load(out) == translate(patch, hf, load_clip(str(folder)))
    assert set(Patch.load(out)) == {"visual.transformer.resblocks.0.attn.in_proj_weight"}
    again = CliRunner().invoke(app, [*arguments, "-o", str(out)])
    assert again.exit_code == ConfigError.exit_code
    assert "--overwrite" in again.output
    assert CliRunner().invoke(app, [*arguments, "-o", str(out), "--overwrite"]).exit_code == 0
    swapped = ["transfer", str(tmp_path / "p.safetensors"), "--from", str(folder), "--to", str(hf_folder)]
    assert (
        CliRunner().invoke(app, [*swapped, "-o", str(tmp_path / "x.safetensors")]).exit_code == ArtifactError.exit_code
    )

"""Patches of CLIP towers on the models that contain them: names, bits, precision, and layers that nobody reads."""

import pytest
import torch
from torch import Tensor, nn

from expunge.consumers.diffusion_text import text_reads
from expunge.consumers.llava import vision_reads
from expunge.consumers.match import homes
from expunge.consumers.reads import Reads, influences
from expunge.consumers.tiny import plant, tiny_llava, tiny_text_encoder
from expunge.consumers.transfer import transfer
from expunge.digest import combine, model_digest, named_tensors, state_digests
from expunge.errors import (
    ArtifactError,
    CapabilityError,
    ConfigError,
    DivergedError,
    InvariantError,
    NoEffectError,
)
from expunge.models.towers import Towers
from expunge.patch import Change, Dense, LowRank, Manifest, Patch, Replace, Sparse, apply, revert
from expunge.tasks.tiny_clip import tiny_towers

HF_OUT = "vision_model.encoder.layers.0.self_attn.out_proj.weight"
LLAVA_OUT = "model.vision_tower.encoder.layers.0.self_attn.out_proj.weight"
TEXT_FC1 = "text_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def clip() -> Towers:
    return tiny_towers("transformers")


@pytest.fixture(scope="module")
def open_clip() -> Towers:
    return tiny_towers("open_clip")


@pytest.fixture(scope="module")
def llava(clip: Towers) -> nn.Module:
    return tiny_llava(0, clip)[0]


def made_on(towers: Towers, changes: dict[str, Change], **facts) -> Patch:
    digests = state_digests(named_tensors(towers.model)[0])
    return Patch(changes, Manifest(base_digest=combine(digests), base_tensors=digests, **facts))


def step(towers: Towers, *names: str, scale: float = 0.1) -> Patch:
    draw = torch.Generator().manual_seed(1)
    shapes = {n: towers.model.state_dict()[n].shape for n in names}
    return made_on(towers, {n: Dense(scale * torch.randn(s, generator=draw)) for n, s in shapes.items()})


def seen(llava: nn.Module) -> Tensor:
    """What the language model is given of one image."""
    images = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return llava.get_image_features(pixel_values=images.to(llava.dtype)).pooler_output[0].float()


def encoded(encoder: nn.Module) -> Tensor:
    with torch.no_grad():
        return encoder(torch.tensor([[62, 5, 9, 63]])).last_hidden_state.float()


def test_transformers_to_llava(clip: Towers, llava: nn.Module) -> None:
    patch = step(clip, HF_OUT)
    moved = transfer(patch, clip, llava)
    assert list(moved) == [LLAVA_OUT]
    assert torch.equal(moved[LLAVA_OUT].dense(), patch[HF_OUT].dense())
    assert moved.manifest.base_digest == model_digest(llava)
    assert moved.manifest.parents == (patch.digest,)
    before = seen(llava)
    apply(llava, moved)
    after = seen(llava)
    revert(llava, moved)
    assert not torch.equal(before, after)
    assert torch.equal(before, seen(llava))


def test_both_libraries_give_the_same_patch(clip: Towers, open_clip: Towers, llava: nn.Module) -> None:
    fused = torch.zeros(96, 32)
    fused[64:] = 0.1 * torch.randn((32, 32), generator=torch.Generator().manual_seed(2))
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    theirs = transfer(made_on(open_clip, {name: Dense(fused)}), open_clip, llava)
    ours = transfer(made_on(clip, {HF_OUT.replace("out_proj", "v_proj"): Dense(fused[64:])}), clip, llava)
    assert list(theirs) == list(ours) == [LLAVA_OUT.replace("out_proj", "v_proj")]  # q and k stay: left out
    assert theirs.digest == ours.digest
    other = transfer(made_on(open_clip, {name: Dense(fused * 2)}), open_clip, llava)
    assert other.digest != ours.digest


def test_all_parts_of_a_fused_tensor(open_clip: Towers, llava: nn.Module) -> None:
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    moved = transfer(step(open_clip, name), open_clip, llava)
    assert [n.split(".")[-2] for n in moved] == ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize("kind", ["sparse", "low_rank", "replace"])
def test_kinds_of_change_survive_the_cut(open_clip: Towers, llava: nn.Module, kind: str) -> None:
    draw = torch.Generator().manual_seed(3)
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    base = open_clip.model.state_dict()[name]
    mask = torch.rand(base.shape, generator=draw) < 0.1
    change: Change = {
        "sparse": Sparse(mask, torch.randn(int(mask.sum()), generator=draw)),
        "low_rank": LowRank(torch.randn((96, 2), generator=draw), torch.randn((2, 32), generator=draw), (96, 32)),
        "replace": Replace(torch.randn(base.shape, generator=draw)),
    }[kind]
    moved = transfer(made_on(open_clip, {name: change}), open_clip, llava)
    assert {c.kind for c in moved.changes.values()} == {kind}
    whole = torch.cat([moved[n].dense() for n in moved])
    torch.testing.assert_close(whole, change.dense(), rtol=1e-6, atol=1e-6)


def test_transposed_projection(clip: Towers, open_clip: Towers) -> None:
    target = tiny_towers("transformers").model  # a container with both towers and projections
    delta = torch.randn((32, 24), generator=torch.Generator().manual_seed(4))
    moved = transfer(made_on(open_clip, {"text_projection": Dense(delta)}), open_clip, target)
    assert torch.equal(moved["text_projection.weight"].dense(), delta.T)
    low = LowRank(delta[:, :1].contiguous(), torch.ones(1, 24), (32, 24))
    moved = transfer(made_on(open_clip, {"text_projection": low}), open_clip, target)
    torch.testing.assert_close(moved["text_projection.weight"].dense(), low.dense().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_container(clip: Towers, dtype: torch.dtype) -> None:
    llava = tiny_llava(0, clip)[0].to(dtype)
    patch = step(clip, HF_OUT)
    moved = transfer(patch, clip, llava)
    assert moved[LLAVA_OUT].dense().dtype == torch.float32
    assert any("rounded to" in note for note in moved.manifest.notes)
    tensor = named_tensors(llava)[0][LLAVA_OUT]
    base = tensor.detach().clone()
    apply(llava, moved)
    assert torch.equal(tensor, (base.float() + patch[HF_OUT].dense()).to(dtype))
    revert(llava, moved)
    assert torch.equal(tensor, base)


def test_float32_container_of_rounded_weights(clip: Towers) -> None:
    llava = tiny_llava(0, clip)[0].half().float()
    notes = transfer(step(clip, HF_OUT), clip, llava).manifest.notes
    assert any("rounded to float16" in n for n in notes)
    exact = tiny_llava(0, clip)[0]
    assert not any("rounded" in n for n in transfer(step(clip, HF_OUT), clip, exact).manifest.notes)


def test_steps_that_rounding_eats(clip: Towers) -> None:
    llava = tiny_llava(0, clip)[0].to(torch.bfloat16)
    with pytest.raises(NoEffectError, match=r"all 1,024 changes are below the rounding of bfloat16"):
        transfer(step(clip, HF_OUT, scale=1e-9), clip, llava)
    some = transfer(step(clip, HF_OUT, scale=3e-4), clip, llava)
    base = named_tensors(llava)[0][LLAVA_OUT].detach()
    kept = int(((base.float() + some[LLAVA_OUT].dense()).to(torch.bfloat16) == base).sum())
    assert 0 < kept < 1024
    assert any(f"leaves {kept:,} of 1,024" in note for note in some.manifest.notes)


def test_overflow(clip: Towers) -> None:
    llava = tiny_llava(0, clip)[0].half()
    with pytest.raises(DivergedError, match="does not fit into float16"):
        transfer(step(clip, HF_OUT, scale=1e6), clip, llava)


def test_alpha_zero_changes_no_bit(clip: Towers, llava: nn.Module) -> None:
    moved = transfer(step(clip, HF_OUT).scale(0.0), clip, llava)
    assert "rounding" not in " ".join(moved.manifest.notes)
    before, digest = seen(llava), model_digest(llava)
    apply(llava, moved)
    assert torch.equal(seen(llava), before)
    assert model_digest(llava) == digest
    revert(llava, moved)
    encoder = tiny_text_encoder(0, clip)
    moved = transfer(step(clip, TEXT_FC1).scale(0.0), clip, encoder)
    text = encoded(encoder)
    apply(encoder, moved)
    assert torch.equal(encoded(encoder), text)
    other = transfer(step(clip, TEXT_FC1), clip, tiny_text_encoder(0, clip))
    revert(encoder, moved)
    apply(encoder, other)
    assert not torch.equal(encoded(encoder), text)


def test_a_trained_encoder_is_refused(clip: Towers) -> None:
    llava = tiny_llava(0, clip)[0]
    with torch.no_grad():
        named_tensors(llava)[0][LLAVA_OUT][0, 0] += 0.25
    with pytest.raises(ArtifactError, match=rf"'{LLAVA_OUT}' is not .*'{HF_OUT}'.*largest difference is 0.25"):
        transfer(step(clip, HF_OUT), clip, llava)


def test_a_neighbour_that_was_trained(clip: Towers) -> None:
    llava = tiny_llava(0, clip)[0]
    with torch.no_grad():
        named_tensors(llava)[0]["model.vision_tower.encoder.layers.1.mlp.fc2.bias"][3] -= 1.0
    with pytest.raises(ArtifactError, match=r"layers.1.mlp.fc2.bias.*difference is 1"):
        transfer(step(clip, HF_OUT), clip, llava)
    assert list(transfer(step(clip, HF_OUT), clip, llava, whole=False)) == [LLAVA_OUT]


def test_another_source_or_shape(clip: Towers, llava: nn.Module) -> None:
    with pytest.raises(ArtifactError, match="belongs to another base"):
        transfer(step(clip, HF_OUT), tiny_towers("transformers", seed=1), llava)
    wide = tiny_towers("transformers", width=48)
    with pytest.raises(ArtifactError, match="has shape"):
        transfer(step(wide, HF_OUT), wide, llava)


def test_a_patched_container(clip: Towers) -> None:
    llava = tiny_llava(0, clip)[0]
    moved = transfer(step(clip, HF_OUT), clip, llava)
    apply(llava, moved)
    with pytest.raises(ArtifactError, match="carries a patch already"):
        transfer(step(clip, HF_OUT), clip, llava)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vision_model.encoder.layers.1.mlp.fc1.weight", r"vision hidden state -2 \(output of block 0, of 2 blocks\)"),
        ("vision_model.post_layernorm.weight", "has no effect here"),
        ("visual_projection.weight", "does not exist in LlavaForConditionalGeneration"),
    ],
)
def test_dead_layers_of_llava(clip: Towers, llava: nn.Module, name: str, said: str) -> None:
    with pytest.raises(CapabilityError, match=said):
        transfer(step(clip, name), clip, llava)


def test_what_is_called_dead_is_dead(clip: Towers) -> None:
    for layer, alive in [(-2, False), (-1, True), ([-2, -1], True), ([0, 1], False)]:
        llava = tiny_llava(0, clip, feature_layer=layer)[0]
        reads = vision_reads(llava.config, 2)
        assert reads is not None
        assert reads.uses("encoder.layers.1.mlp.fc1.weight") == alive
        if isinstance(layer, int):  # the projector of several layers has its own shape
            for name, tensor in llava.model.vision_tower.named_parameters():
                if name.endswith(".weight"):
                    assert influences(lambda m=llava: seen(m), tensor) == reads.uses(name), name


def test_influences_restores_and_needs_determinism(clip: Towers) -> None:
    llava = tiny_llava(0, clip)[0]
    digest = model_digest(llava)
    tensors = named_tensors(llava)[0]
    assert influences(lambda: seen(llava), tensors[LLAVA_OUT])
    assert not influences(lambda: seen(llava), tensors[LLAVA_OUT.replace("layers.0", "layers.1")])
    assert model_digest(llava) == digest
    with pytest.raises(InvariantError, match="differ"):
        influences(lambda: torch.rand(3), tensors[LLAVA_OUT])
    with pytest.raises(CapabilityError, match="quantisation"):
        influences(lambda: seen(llava), torch.ones(2, dtype=torch.int8))


def test_vision_reads_of_settings(llava: nn.Module) -> None:
    class Config:
        vision_feature_layer: object = None

    config = Config()
    assert vision_reads(config, 4) is None
    for layer, blocks in [(0, 0), (4, 4), (-1, 4), (-5, 0), ([-2, 1], 3)]:
        config.vision_feature_layer = layer
        assert vision_reads(config, 4).blocks == blocks
    config.vision_feature_layer = -6
    with pytest.raises(ConfigError, match="4 blocks"):
        vision_reads(config, 4)


def test_text_encoder_with_fewer_blocks(clip: Towers) -> None:
    encoder = tiny_text_encoder(0, clip, blocks=1)
    moved = transfer(step(clip, TEXT_FC1), clip, encoder)
    assert list(moved) == ["encoder.layers.0.mlp.fc1.weight"]
    with pytest.raises(CapabilityError, match=r"layers.1.*does not exist in CLIPTextModel.*blocks 0 to 0"):
        transfer(step(clip, TEXT_FC1.replace("0", "1")), clip, encoder)
    with pytest.raises(CapabilityError, match="has no such part"):
        transfer(step(clip, "text_projection.weight"), clip, encoder)


def test_clip_skip_and_pipelines(clip: Towers) -> None:
    encoder = tiny_text_encoder(0, clip)
    deep = step(clip, TEXT_FC1.replace("0", "1"))
    assert len(transfer(deep, clip, encoder)) == 1
    for reads in (text_reads(2, clip_skip=1), text_reads(2, pipeline="StableDiffusionXLPipeline")):
        with pytest.raises(CapabilityError, match="output of text block 0"):
            transfer(deep, clip, encoder, reads=reads)
    norm = "text_model.final_layer_norm.weight"
    assert len(transfer(step(clip, norm), clip, encoder, reads=text_reads(2, clip_skip=1))) == 1
    with pytest.raises(CapabilityError, match="no effect"):
        transfer(step(clip, norm), clip, encoder, reads=text_reads(2, pipeline="StableDiffusionXLPipeline"))
    second = text_reads(2, pipeline="StableDiffusionXLPipeline", encoder="text_encoder_2")
    assert second.blocks == 2
    assert second.projection
    with pytest.raises(ConfigError, match="clip_skip 2"):
        text_reads(2, clip_skip=2)


def test_text_encoder_with_projection(clip: Towers) -> None:
    from transformers import CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection(clip.model.config.text_config).eval()
    plant(clip, encoder, "language")
    (name,) = transfer(step(clip, "text_projection.weight"), clip, encoder)
    assert name == "text_projection.weight"
    (name,) = transfer(step(clip, TEXT_FC1), clip, encoder)
    assert name == TEXT_FC1


def test_towers_must_find_their_place(clip: Towers, llava: nn.Module) -> None:
    both = step(clip, HF_OUT, TEXT_FC1)
    with pytest.raises(CapabilityError, match="has no language tower"):
        transfer(both, clip, llava)
    moved = transfer(both, clip, llava, tower="vision")
    assert list(moved) == [LLAVA_OUT]
    assert any("1 changes outside the vision tower" in note for note in moved.manifest.notes)
    with pytest.raises(CapabilityError, match="changes nothing of the language tower"):
        transfer(step(clip, HF_OUT), clip, llava, tower="language")
    with pytest.raises(CapabilityError, match="logit_scale"):
        transfer(step(clip, HF_OUT, "logit_scale"), clip, llava)
    with pytest.raises(CapabilityError, match=r"no 'encoder\.layers' at all"):
        transfer(step(clip, HF_OUT), clip, nn.Linear(2, 2))


def test_several_equal_towers_are_ambiguous(clip: Towers) -> None:
    twins = nn.ModuleDict({"a": tiny_llava(0, clip)[0], "b": tiny_llava(0, clip)[0]})
    patch = step(clip, HF_OUT)
    with pytest.raises(CapabilityError, match=r"2 places.*'a.model.vision_tower.*'b.model.vision_tower"):
        transfer(patch, clip, twins)
    assert list(transfer(patch, clip, twins, at="b.model.vision_tower")) == [f"b.{LLAVA_OUT}"]
    with torch.no_grad():
        named_tensors(twins)[0][f"a.{LLAVA_OUT}"].add_(1)
    assert list(transfer(patch, clip, twins)) == [f"b.{LLAVA_OUT}"]  # only one holds these weights
    with torch.no_grad():
        named_tensors(twins)[0][f"b.{LLAVA_OUT}"].add_(1)
    with pytest.raises(ArtifactError, match=r"none of the 2 possible places"):
        transfer(patch, clip, twins)


def test_equal_shapes_of_vision_and_text(clip: Towers) -> None:
    target = tiny_towers("transformers").model
    assert [(h.prefix, h.tower, h.depth) for h in homes(named_tensors(target)[0])] == [
        ("text_model.", "language", 2),
        ("vision_model.", "vision", 2),
    ]
    assert list(transfer(step(clip, HF_OUT, TEXT_FC1), clip, target)) == [HF_OUT, TEXT_FC1]


def test_unknown_consumer_is_noted(clip: Towers) -> None:
    box = nn.ModuleDict({"eye": tiny_llava(0, clip)[0].model.vision_tower})
    notes = transfer(step(clip, HF_OUT.replace("0", "1")), clip, box).manifest.notes
    assert any("not known" in n and "influences" in n for n in notes)
    given = Reads("vision", 1, False, False, "the first block")
    with pytest.raises(CapabilityError, match="the first block"):
        transfer(step(clip, HF_OUT.replace("0", "1")), clip, box, reads=given)


def test_manifest_is_kept(clip: Towers, llava: nn.Module, tmp_path) -> None:
    patch = step(clip, HF_OUT)
    request = {"what": {"kind": "concept", "text": "Ada", "substitute": ""}}
    manifest = patch.manifest.model_copy(update={"request": request, "seed": 5, "metrics": {"x": 1}, "notes": ("n",)})
    moved = transfer(Patch(patch.changes, manifest), clip, llava)
    again = Patch.load(moved.save(tmp_path / "p.safetensors"))
    assert again == moved
    assert again.manifest.request == request
    assert again.manifest.seed == 5
    assert again.manifest.metrics == {}
    assert again.manifest.notes[0] == "n"

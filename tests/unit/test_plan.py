"""Predictions for full-size pipelines, from shapes on the meta device."""

import pytest
import torch

from expunge.diffusion.nullspace import capacity, predicted_rank
from expunge.diffusion.parameter_sets import select, size
from expunge.diffusion.plan import Passes, directions, megabytes, passes_of, plan, rows, table
from expunge.diffusion.recompute import recomputing
from expunge.diffusion.selection import key_value, matrices
from expunge.diffusion.shapes import KNOWN, SHAPES, Shape, count, one_pass, shape_of
from expunge.diffusion.shift import storage
from expunge.errors import ArtifactError, CapabilityError, RequestError
from expunge.method import build_recipe
from expunge.tasks.tiny_text_to_image import tiny_parts


def recipe(name, **settings):
    return build_recipe({"method": name, **settings})


#: Small enough to be counted in an instant.
SMALL = Shape(
    "small",
    {
        "sample_size": 32,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    (
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "vocab_size": 100,
        },
    ),
)


@pytest.fixture(scope="module")
def full():
    return SHAPES["sd-1"].build()


@pytest.fixture(scope="module")
def srs_me():
    return plan(recipe("srs_me"), SHAPES["sd-1"], protected=9, speed=1e14)


def test_the_full_size_u_net_has_the_published_counts(full):
    assert count(full.unet) == 859_520_964
    assert all(p.is_meta for p in full.parameters())
    weights = key_value(full.unet)
    assert len(weights) == 32
    assert sum(p.numel() for p in weights.values()) == 19_169_280
    assert {p.shape[1] for p in weights.values()} == {768}
    assert count(full.text_encoder) == 123_060_480


@pytest.mark.parametrize(
    ("name", "tensors", "weights"),
    [
        ("esd-x", 80, 43_962_560),
        ("esd-x-strict", 32, 19_169_280),
        ("esd-u", 388, 815_358_084),
        ("esd-all", 468, 859_320_644),
        ("cross-attn", 32, 19_169_280),
        ("cross-attn-all", 80, 43_962_560),
        ("attn", 160, 93_536_640),
        ("full-weight", 686, 859_520_964),
    ],
)
def test_sets_of_the_full_size_u_net_have_the_counted_sizes(full, name, tensors, weights):
    assert size(full.unet, select(full.unet, name)) == (tensors, weights)


def test_patches_of_the_full_size_u_net_have_the_expected_sizes(full):
    shapes = matrices(key_value(full.unet))
    assert storage(shapes, 16).smallest == 3_170_304
    assert storage(shapes, 691).smallest == storage(shapes, 1).dense == 76_677_120
    assert len({m.rows for m in shapes.values()}) == 3


@pytest.mark.parametrize(
    ("name", "unet", "projections", "text"),
    [("sd-2", 865_910_724, 32, 340_387_840), ("sd-xl", 2_567_463_684, 140, 817_720_320)],
)
def test_other_versions(name, unet, projections, text):
    model = SHAPES[name].build()
    assert count(model.unet) == unet
    assert len(key_value(model.unet)) == projections
    assert count(model) - unet == text


def test_capacities_are_those_of_the_paper():
    shape = SHAPES["sd-1"]
    left = [directions(shape, m) for m in range(10)]
    assert left == [691, 615, 539, 463, 387, 311, 235, 159, 83, 7]
    with pytest.raises(RequestError, match="at most 9 fit"):
        directions(shape, 10)
    assert directions(SHAPES["sd-2"], 12) > 0
    assert directions(SHAPES["sd-xl"], 25) > 0
    with pytest.raises(RequestError, match="at most 25 fit"):
        directions(SHAPES["sd-xl"], 26)


def test_predicted_directions_are_those_of_states():
    """Random states with the prefix rule of a causal encoder: shared first token, nothing else."""
    parts = tiny_parts()
    shape = Shape("tiny", {"cross_attention_dim": 64}, ({"max_position_embeddings": 16},))
    ids = parts.tokenizer(["", "star", "moon"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = torch.cat([parts.text_encoder(row[None]).last_hidden_state for row in ids])
    assert predicted_rank(ids) == 16 + 2 * 15
    assert directions(shape, 2) == 64 - predicted_rank(ids) == capacity(states, tolerance=1e-9).left


def test_srs_me_trains_coefficients_and_ships_shifts(srs_me, full):
    found = srs_me
    assert found.directions == 7
    assert found.changed == 19_169_280
    assert found.trained == 7 * 24_960
    assert found.patch_bytes == 4 * 7 * (24_960 + 32 * 768)
    assert (found.passes.graded, found.passes.free) == (1, 2)
    assert storage(matrices(key_value(full.unet)), 691).smallest == 76_677_120
    wide = Shape("wide", {**SMALL.unet, "cross_attention_dim": 768}, SMALL.text)
    assert plan(recipe("srs_me", protect=["a", "b"], watermarks=["w", "a"]), wide).directions == 768 - 16 - 3 * 15


def test_esd_samples_before_every_step():
    """As the specification counts: about 52 evaluations per step, one of them graded."""
    found = plan(recipe("esd"), SMALL, speed=1e14)
    assert found.passes.graded == 1
    assert 50 <= found.passes.free <= 53
    assert found.seconds == pytest.approx(found.steps * found.flops / 1e14)
    images = plan(recipe("esd", x_t="images"), SMALL)
    assert images.flops < found.flops / 10
    assert images.passes.free == 2


def test_closed_forms_need_neither_gradients_nor_steps():
    found = plan(recipe("uce"), SHAPES["sd-1"])
    assert found.steps == found.trained == 0
    assert list(found.memory) == ["weights, float32"]
    assert found.changed == 19_169_280
    assert found.peak == 4 * (859_520_964 + 123_060_480)


def test_memory_follows_what_is_trained_and_how():
    base = recipe("fine_tune", batch_size=1)
    whole = plan(base, SMALL)
    assert whole.trained == count(SMALL.build())
    assert whole.memory["gradients"] == 4 * whole.trained
    small = plan(base.replace(space={"kind": "unet_set", "parameters": "kv"}), SMALL)
    assert small.trained == sum(p.numel() for p in key_value(SMALL.build().unet).values())
    assert small.peak < whole.peak
    assert small.memory["activations"] < whole.memory["activations"]
    adam = plan(base.replace(optim={"name": "adam"}), SMALL)
    assert adam.memory["optimiser"] == 2 * whole.memory["optimiser"]
    half = plan(base.replace(optim={"precision": "bf16"}), SMALL)
    assert half.memory["activations"] < 0.7 * whole.memory["activations"]
    assert half.memory["weights, half precision"] == 2 * count(SMALL.build())
    four = plan(recipe("fine_tune", batch_size=4), SMALL)
    assert four.memory["activations"] == 4 * whole.memory["activations"]
    cut = plan(recipe("fine_tune", batch_size=4).replace(optim={"micro_batch": 1}), SMALL)
    assert cut.memory["activations"] == whole.memory["activations"]
    assert cut.flops == four.flops


def test_pipelines_in_half_precision_are_float32_where_they_are_trained():
    model = SMALL.build()
    vectors = sum(p.numel() for p in model.unet.parameters() if p.ndim < 2)
    keys = sum(p.numel() for p in key_value(model.unet).values())

    def weights(name, stored=2, **changes):
        settings = {"protected": 0} if name == "srs_me" else {}
        made = recipe(name).replace(optim={"precision": "bf16"}, **changes)
        found = plan(made, SMALL, stored=stored, **settings)
        return found.memory["weights, float32"] // 4, found.memory.get("weights, half precision")

    kv = {"space": {"kind": "unet_set", "parameters": "kv"}}
    assert weights("srs_me") == (vectors, 2 * count(model))
    assert weights("esd", **kv) == (keys + vectors, 2 * count(model))
    assert weights("t2i_salun") == (count(model.unet), 2 * count(model))
    assert weights("uce") == (keys + vectors, 2 * (count(model) - keys - vectors))
    made = recipe("esd").replace(optim={"precision": "bf16"}, **kv)
    hosts = [plan(made, SMALL, stored=2, on_cpu=on_cpu).host for on_cpu in (True, False)]
    assert hosts[1] - hosts[0] == 2 * (count(model) - keys - vectors), "on the CPU what is frozen exists once"
    assert weights("esd", stored=4, **kv) == (count(model), 2 * count(model))
    whole = plan(recipe("esd").replace(**kv), SMALL, stored=2)
    assert whole.memory["weights, float32"] == 4 * count(model)
    assert any("every weight in float32" in n for n in whole.notes)


def test_gradients_come_as_activations_go():
    found = plan(recipe("fine_tune", batch_size=1), SMALL, on_cpu=True)
    assert found.memory["activations"] > found.memory["gradients"] > 0
    assert found.peak == sum(found.memory.values()) - found.memory["gradients"]
    on_gpu = plan(recipe("fine_tune", batch_size=1), SMALL)
    assert on_gpu.memory["optimiser's workspace"] == on_gpu.memory["gradients"]
    pieces = plan(recipe("fine_tune", batch_size=4).replace(optim={"micro_batch": 1}), SMALL, on_cpu=True)
    assert pieces.peak == sum(pieces.memory.values()) == found.peak + found.memory["gradients"]


def test_first_values_are_kept_once_and_none_beside_a_shift():
    for name in ("esd", "cie", "ablating_concepts", "forget_me_not"):
        found = plan(recipe(name), SMALL)
        assert found.memory["first values of what is trained"] == 4 * found.trained, name
    shifted = plan(recipe("srs_me"), Shape("wide", {**SMALL.unet, "cross_attention_dim": 768}, SMALL.text))
    assert "first values of what is trained" not in shifted.memory


def test_host_memory_is_the_pipeline_as_loaded():
    weights, vae = count(SMALL.build()), 4 * SMALL.autoencoder
    base = recipe("uce")
    assert plan(base, SMALL).host == 4 * weights + vae
    assert plan(base, SMALL, stored=2).host == plan(base, SMALL, stored=2, on_cpu=True).host == 2 * weights + vae
    assert plan(base, SMALL, on_cpu=True).host == vae


def test_passes_are_those_of_the_objectives():
    assert passes_of(recipe("srs_me")) == Passes(1, 2)
    assert passes_of(recipe("cie")) == Passes(2, 2)
    assert passes_of(recipe("ablating_concepts", profile="style")) == Passes(1, 1)
    assert passes_of(recipe("ablating_concepts", profile="memorised")) == Passes(2, 1)
    assert passes_of(recipe("ablating_concepts", profile="style", variant="noise")) == Passes(1, 0)


def test_checkpointing_takes_less_memory_and_one_more_pass():
    base = recipe("fine_tune", batch_size=1)
    whole, less = plan(base, SMALL), plan(base, SMALL, checkpointing=True)
    assert less.memory["activations"] < 0.6 * whole.memory["activations"]
    assert less.flops == pytest.approx(whole.flops * 4 / 3, rel=0.03)
    assert any("checkpointing" in n for n in less.notes)
    assert plan(base, SMALL, side=16).memory["activations"] < whole.memory["activations"] / 3


def test_masks_hold_back_weights_only():
    found = plan(recipe("salun", on="random_label", batch_size=1), SMALL)
    assert found.changed == found.trained // 2
    assert "mask" in " ".join(found.notes)


def test_steps_follow_the_sizes():
    one = recipe("fine_tune", batch_size=10)
    few = plan(one, SMALL, sizes={"retain": 40})
    assert few.steps == 4 * one.optim.epochs
    assert few.samples == 10
    assert plan(one.replace(optim={"max_steps": 3}), SMALL).steps == 3


def test_counted_operations_and_saved_bytes_are_the_real_ones():
    """Against a run with real tensors: its operations, and the growth of saved tensors with the math of attention."""
    from torch.utils.flop_counter import FlopCounterMode

    parts = tiny_parts()
    config = dict(parts.unet.config)
    meta = Shape("tiny", config, (parts.text_encoder.config.to_dict(),)).build()
    found = one_pass(meta.unet, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        parts.unet(torch.randn(1, 4, 8, 8), torch.tensor([1]), encoder_hidden_states=torch.randn(1, 77, 64))
    assert found.flops == counter.get_total_flops()
    assert found.saved == pytest.approx(really_saved(parts.unet), rel=0.15)
    meta.requires_grad_(False)
    parts.unet.requires_grad_(False)
    for unet in (meta.unet, parts.unet):
        for p in key_value(unet).values():
            p.requires_grad_(True)
    confined = one_pass(meta.unet, torch.float32)
    assert confined.saved == pytest.approx(really_saved(parts.unet), rel=0.15)
    assert confined.saved < 0.85 * found.saved


def test_what_enters_the_blocks_is_what_checkpointing_keeps():
    parts = tiny_parts()
    meta = Shape("tiny", dict(parts.unet.config), (parts.text_encoder.config.to_dict(),)).build()
    found = one_pass(meta.unet, torch.float32, again=True).saved
    with recomputing(parts.unet):
        entering = really_saved(parts.unet)
    alone = one_pass(meta.unet, torch.float32).saved
    assert entering < found < 0.6 * alone
    assert not meta.unet.is_gradient_checkpointing


def really_saved(unet):
    """Bytes that a graph of real tensors holds beside the weights."""
    weights = {p.data_ptr() for p in unet.parameters()}
    seen = {}

    def note(x):
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = unet(torch.randn(1, 4, 8, 8), torch.tensor([1]), encoder_hidden_states=torch.randn(1, 77, 64))
    del out
    return sum(x.untyped_storage().nbytes() for x in seen.values())


def test_shapes_come_from_names_and_folders(tmp_path):
    assert shape_of("CompVis/stable-diffusion-v1-4") is SHAPES["sd-1"]
    assert set(KNOWN.values()) <= set(SHAPES)
    parts = tiny_parts(kind="xl")
    parts.pipeline().save_pretrained(tmp_path / "xl")
    shape = shape_of(str(tmp_path / "xl"))
    assert count(shape.build()) == count(parts.model())
    assert (shape.width, shape.tokens, shape.factor) == (128, 16, parts.factor)
    assert shape.autoencoder == count(parts.vae)
    assert plan(recipe("fine_tune"), shape).unet == count(parts.unet)
    with pytest.raises(ArtifactError, match="CompVis"):
        shape_of(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("srs_me", {}),
        ("cie", {}),
        ("esd", {"parameters": "u"}),
        ("uce", {}),
        ("ablating_concepts", {}),
        ("forget_me_not", {}),
        ("random_label", {}),
        ("barrier", {"targets": ["attn2.to_k"]}),
    ],
)
def test_every_method_for_text_to_image_has_a_plan(name, settings):
    found = plan(recipe(name, **settings), SMALL)
    assert 0 < found.changed <= found.unet + found.text
    assert found.peak >= 4 * (found.unet + found.text)
    assert found.steps or not found.trained


@pytest.mark.parametrize(
    ("name", "settings", "passes", "remark"),
    [
        ("forget_me_not", {"inversion": {"steps": 30, "batch_size": 2}}, 120, "textual inversion first: 30 steps of 2"),
        ("ablating_concepts", {"captions": "cat", "anchor_images": 7, "anchor_steps": 3}, 42, "7 images of 3 steps"),
        ("ablating_concepts", {"captions": "cat", "anchor_images": 7}, 700, "is taken to be 50"),
    ],
)
def test_what_comes_before_the_first_step_takes_time(name, settings, passes, remark):
    found = plan(recipe(name, **settings), SMALL, speed=1e12)
    one = one_pass(SMALL.build().unet, torch.float32).flops
    assert found.seconds == pytest.approx((found.steps * found.flops + passes * one) / 1e12)
    assert any(remark in n for n in found.notes)
    bare = plan(recipe(name), SMALL, speed=1e12)
    assert bare.seconds == pytest.approx(bare.steps * bare.flops / 1e12)


def test_what_cannot_be_told_is_said():
    with pytest.raises(CapabilityError, match="'proximal'"):
        plan(recipe("l1_sparse").replace(space={"kind": "proximal"}), SHAPES["sd-1"])
    assert passes_of(recipe("fine_tune")).graded == 1


def test_the_table_says_it_in_words(srs_me):
    found = srs_me
    shown = dict(rows(found))
    assert shown["U-Net, weights"] == "859,520,964"
    assert shown["directions left by protected prompts"] == "7"
    assert shown["patch, at most"] == "1.4 MB"
    assert table(found).row_count == len(shown)
    assert megabytes(2_500_000_000) == "2.50 GB"

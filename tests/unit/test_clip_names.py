"""Names of CLIP tensors in two libraries, and patches carried between them."""

import itertools

import pytest
import torch

from expunge.digest import combine, named_tensors, state_digests
from expunge.errors import ArtifactError
from expunge.models.clip_names import (
    Piece,
    canonical_pieces,
    canonical_state,
    library_changes,
    library_state,
    translate,
)
from expunge.patch import Dense, LowRank, Manifest, Patch, Replace, Sparse, apply, revert
from expunge.tasks.tiny_clip import tiny_towers

pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

HF, OC = "transformers", "open_clip"
D = 32
VISION = "vision_model.encoder.layers.1."
FUSED = "visual.transformer.resblocks.1.attn.in_proj_weight"
RENAMED = [
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.proj", "visual_projection.weight"),
    ("text_projection", "text_projection.weight"),
    ("text.text_projection", "text_projection.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("visual.transformer.resblocks.11.mlp.c_fc.bias", "vision_model.encoder.layers.11.mlp.fc1.bias"),
    ("text.transformer.resblocks.0.attn.out_proj.weight", "text_model.encoder.layers.0.self_attn.out_proj.weight"),
    ("transformer.resblocks.2.ln_2.weight", "text_model.encoder.layers.2.layer_norm2.weight"),
]


def draw(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patch_of(towers, changes, **fields):
    tensors, aliases = named_tensors(towers.model)
    digests = state_digests(tensors)
    made = Manifest(base_digest=combine(digests), base_tensors=digests, aliases=aliases, **fields)
    return Patch(changes, made)


def sparse(delta, seed=0):
    mask = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    return Sparse(mask, delta[mask])


def embeddings(towers):
    tokens = towers.tokenize(["a red circle", "dog"])
    with torch.no_grad():
        return torch.cat([towers.image(draw(3, 3, 16, 16, scale=1)), towers.text(tokens)])


def weights(towers):
    """Canonical copies."""
    state = canonical_state(towers.library, towers.model.state_dict())
    return {n: t.clone().reshape(-1) if n == "logit_scale" else t.clone() for n, t in state.items()}


@pytest.mark.parametrize(("name", "expected"), RENAMED)
def test_names(name, expected):
    (piece,) = canonical_pieces(OC, name, (4, 4))
    assert (piece.name, piece.rows) == (expected, None)
    assert piece.transposed == name.endswith(("visual.proj", "text_projection"))
    assert canonical_pieces(HF, expected, (4, 4)) == [Piece(expected)]


def test_the_fused_tensor_holds_query_key_value_in_this_order():
    pieces = canonical_pieces(OC, FUSED, (3 * D, D))
    assert [p.name.split(".")[-2] for p in pieces] == ["q_proj", "k_proj", "v_proj"]
    assert [p.rows for p in pieces] == [slice(0, D), slice(D, 2 * D), slice(2 * D, 3 * D)]


@pytest.mark.parametrize(
    ("library", "name"),
    [
        (OC, "visual.layer1.0.conv1.weight"),
        (OC, "visual.transformer.resblocks.0.ls_1.gamma"),
        (HF, "encoder.x"),
        ("x", "y"),
    ],
)
def test_names_without_a_counterpart_are_refused(library, name):
    with pytest.raises(ArtifactError, match="not known" if library == "x" else name):
        canonical_pieces(library, name, (4,))


def test_all_tensors_go_there_and_back():
    hf, oc = tiny_towers(HF, seed=1), tiny_towers(OC, seed=2)
    before, start = embeddings(oc), {n: t.clone() for n, t in oc.model.state_dict().items()}
    assert float((embeddings(hf) - before).abs().max()) > 0.1
    state = library_state(HF, canonical_state(OC, oc.model.state_dict()), hf.model.state_dict())
    hf.model.load_state_dict(state)
    torch.testing.assert_close(embeddings(hf), before, atol=2e-6, rtol=0)
    back = library_state(OC, canonical_state(HF, hf.model.state_dict()), oc.model.state_dict())
    assert back.keys() == start.keys()
    assert all(torch.equal(back[n], start[n]) for n in start)


def test_a_linear_text_projection_is_not_transposed():
    vision = {"layers": 2, "width": D, "head_width": D // 2, "patch_size": 8, "image_size": 16}
    text = {"context_length": 12, "vocab_size": 64, "width": D, "heads": 2, "layers": 2, "proj_bias": True}
    model = open_clip.CustomTextCLIP(24, vision, text)
    state = {n: t for n, t in model.state_dict().items() if n != "text.text_projection.bias"}
    hf = tiny_towers(HF)
    hf.model.load_state_dict(library_state(HF, canonical_state(OC, state), hf.model.state_dict()))
    assert torch.equal(hf.model.text_projection.weight, model.text.text_projection.weight)
    with pytest.raises(ArtifactError, match=r"text_projection\.bias"):
        canonical_state(OC, model.state_dict())


def test_states_that_do_not_fit_are_refused():
    towers = tiny_towers(HF)
    state = canonical_state(HF, towers.model.state_dict())
    like = dict(towers.model.state_dict())
    with pytest.raises(ArtifactError, match="no place for"):
        library_state(HF, state, {n: t for n, t in like.items() if n != "logit_scale"})
    with pytest.raises(ArtifactError, match="which is not there"):
        library_state(HF, {n: t for n, t in state.items() if n != "logit_scale"}, like)
    with pytest.raises(ArtifactError, match="not what"):
        library_state(HF, state | {"logit_scale": torch.zeros(2)}, like)


# ---- patches


def cases(library):
    if library == HF:
        q, k, v = (f"{VISION}self_attn.{p}_proj.weight" for p in "qkv")
        fc1 = VISION + "mlp.fc1.weight"
        return {
            "dense q": {q: Dense(draw(D, D))},
            "sparse k": {k: sparse(draw(D, D))},
            "low-rank v": {v: LowRank(draw(D, 2), draw(2, D, seed=1), (D, D))},
            "low-rank qkv": {n: LowRank(draw(D, r), draw(r, D, seed=r), (D, D)) for r, n in enumerate((q, k, v), 1)},
            "dense qkv": {n: Dense(draw(D, D, seed=i)) for i, n in enumerate((q, k, v))},
            "mixed": {q: Dense(draw(D, D)), k: sparse(draw(D, D)), v: LowRank(draw(D, 1), draw(1, D, seed=1), (D, D))},
            "replaced qkv": {n: Replace(draw(D, D, seed=i)) for i, n in enumerate((q, k, v))},
            "bias": {f"{VISION}self_attn.v_proj.bias": Dense(draw(D))},
            "mlp": {fc1: sparse(draw(4 * D, D)), fc1.replace("fc1.weight", "fc1.bias"): Dense(draw(4 * D))},
            "projection": {"visual_projection.weight": LowRank(draw(24, 2), draw(2, D, seed=1), (24, D))},
            "sparse projection": {"text_projection.weight": sparse(draw(24, D))},
            "replaced projection": {"text_projection.weight": Replace(draw(24, D))},
            "convolution": {
                "vision_model.embeddings.patch_embedding.weight": LowRank(draw(D, 1), draw(1, 192), (D, 3, 8, 8))
            },
            "scale": {"logit_scale": Dense(torch.tensor(0.5))},
        }
    return {
        "dense qkv": {FUSED: Dense(draw(3 * D, D))},
        "sparse qkv": {FUSED: sparse(draw(3 * D, D))},
        "low-rank qkv": {FUSED: LowRank(draw(3 * D, 2), draw(2, D, seed=1), (3 * D, D))},
        "replaced qkv": {FUSED: Replace(draw(3 * D, D))},
        "projection": {"visual.proj": sparse(draw(D, 24))},
        "low-rank projection": {"text_projection": LowRank(draw(D, 2), draw(2, 24, seed=1), (D, 24))},
        "convolution": {"visual.conv1.weight": Dense(draw(D, 3, 8, 8))},
    }


@pytest.mark.parametrize(("library", "case"), [(lib, c) for lib in (HF, OC) for c in cases(lib)])
def test_a_translated_patch_changes_the_same_weights(library, case):
    source, target = tiny_towers(library), tiny_towers(OC if library == HF else HF)
    patch = patch_of(source, cases(library)[case])
    moved = translate(patch, source, target)
    before, plain = weights(target), embeddings(target)
    apply(source.model, patch)
    apply(target.model, moved)
    ours, theirs = weights(source), weights(target)
    # One factorised product may be rounded differently from another; everything else is exact.
    atol = 1e-7 if "low-rank" in case or case in ("mixed", "projection", "convolution") else 0
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=atol, rtol=0, msg=name)
    changed = {n for n in before if not torch.equal(theirs[n], before[n])}
    assert changed == {p.name for n, c in patch.changes.items() for p in canonical_pieces(library, n, c.shape)}
    if case != "scale":
        torch.testing.assert_close(embeddings(target), embeddings(source), atol=1e-5, rtol=0)
        assert float((embeddings(target) - plain).abs().max()) > 1e-4
    revert(target.model)
    assert all(torch.equal(t, before[n]) for n, t in weights(target).items())


@pytest.mark.parametrize("library", [HF, OC])
def test_there_and_back_is_the_same_change(library):
    source, target = tiny_towers(library), tiny_towers(OC if library == HF else HF)
    for case, changes in cases(library).items():
        patch = patch_of(source, changes)
        back = translate(translate(patch, source, target), target, source)
        assert set(back) == set(patch), case
        for name in patch:
            torch.testing.assert_close(back[name].dense(), patch[name].dense(), atol=1e-7, rtol=0, msg=f"{case} {name}")


def test_a_change_of_the_query_stays_small():
    source, target = tiny_towers(HF), tiny_towers(OC)
    q = f"{VISION}self_attn.q_proj.weight"
    low = translate(patch_of(source, {q: LowRank(draw(D, 1), draw(1, D), (D, D))}), source, target)
    assert isinstance(low[FUSED], LowRank)
    assert low.nbytes == 4 * (3 * D + D)
    dense = translate(patch_of(source, {q: Dense(draw(D, D))}), source, target)
    assert isinstance(dense[FUSED], Sparse)
    assert int(dense[FUSED].mask.sum()) == D * D
    assert not bool(dense[FUSED].mask[D:].any())


def test_elements_that_a_patch_leaves_alone_keep_their_bits():
    source, target = tiny_towers(HF), tiny_towers(OC)
    with torch.no_grad():
        source.model.vision_model.encoder.layers[1].self_attn.q_proj.weight[0, 0] = -0.0
        target.model.visual.transformer.resblocks[1].attn.in_proj_weight[0, 0] = -0.0
    delta = draw(D, D)
    delta[0, 0] = 0.0
    patch = patch_of(source, {f"{VISION}self_attn.q_proj.weight": Dense(delta)})
    apply(target.model, translate(patch, source, target))
    assert str(float(target.model.state_dict()[FUSED][0, 0])) == "-0.0"


def test_the_manifest_belongs_to_the_target_and_keeps_the_story():
    source, target = tiny_towers(HF), tiny_towers(OC)
    fields = {"request": {"kind": "x"}, "recipe": {"name": "slug"}, "notes": ("slow",), "seed": 3, "metrics": {"a": 1}}
    patch = patch_of(source, {f"{VISION}mlp.fc1.bias": Dense(draw(4 * D))}, **fields)
    moved = translate(patch, source, target).manifest
    assert moved.base_tensors == state_digests(named_tensors(target.model)[0])
    assert moved.base_digest == combine(moved.base_tensors)
    assert (moved.request, moved.recipe, moved.seed) == ({"kind": "x"}, {"name": "slug"}, 3)
    assert moved.notes == ("slow", "translated from transformers to open_clip")
    assert moved.parents == (patch.digest,)
    assert moved.metrics == {}


def test_other_weights_under_the_change_are_refused_by_name():
    source, target = tiny_towers(HF), tiny_towers(OC)
    patch = patch_of(source, {f"{VISION}self_attn.k_proj.weight": Dense(draw(D, D))})
    weight = target.model.visual.transformer.resblocks[1].attn.in_proj_weight
    with torch.no_grad():
        weight[0, 0] += 1  # the query, which the patch leaves alone
        assert set(translate(patch, source, target)) == {FUSED}
        weight[D, 0] += 1
    with pytest.raises(ArtifactError, match=FUSED.replace(".", r"\.") + r".*k_proj"):
        translate(patch, source, target)


def test_half_precision_targets_are_compared_after_a_cast():
    source, target = tiny_towers(HF), tiny_towers(OC)
    target.model.half()
    patch = patch_of(source, {"visual_projection.weight": Dense(draw(24, D))})
    moved = translate(patch, source, target)
    apply(source.model, patch)
    apply(target.model, moved)
    wanted = source.model.visual_projection.weight.T
    torch.testing.assert_close(target.model.visual.proj.float(), wanted, atol=2e-3, rtol=0)
    with pytest.raises(ArtifactError, match=r"visual\.proj"):
        translate(patch, tiny_towers(HF), tiny_towers(OC, seed=1))


def test_patches_of_another_base_and_partial_replacements_are_refused():
    source, target = tiny_towers(HF), tiny_towers(OC)
    q = f"{VISION}self_attn.q_proj.weight"
    with pytest.raises(ArtifactError, match="another base"):
        translate(patch_of(tiny_towers(HF, seed=4), {q: Dense(draw(D, D))}), source, target)
    with pytest.raises(ArtifactError, match=r"q_proj\.weight' is replaced"):
        translate(patch_of(source, {q: Replace(draw(D, D))}), source, target)


def test_changes_without_a_place_or_of_another_shape_are_refused():
    shapes = {FUSED: (3 * D, D), "visual.proj": (D, 24), "visual.unknown": (2,)}
    with pytest.raises(ArtifactError, match="no place for"):
        library_changes(OC, {"logit_scale": Dense(torch.ones(()))}, shapes)
    for name, shape in itertools.product((f"{VISION}self_attn.q_proj.weight", "visual_projection.weight"), [(3, 5)]):
        with pytest.raises(ArtifactError, match="its change has"):
            library_changes(OC, {name: Dense(torch.ones(shape))}, shapes)


def test_scalars_of_either_shape():
    for shape in ((), (1,)):
        for change in (
            Dense(torch.tensor(0.5)),
            Replace(torch.tensor([2.0])),
            Sparse(torch.tensor(True), torch.ones(1)),
        ):
            assert library_changes(OC, {"logit_scale": change}, {"logit_scale": shape})["logit_scale"].shape == shape

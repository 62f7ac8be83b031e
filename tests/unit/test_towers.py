"""Two-tower adapters: places, stages and embeddings of both libraries."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from expunge.errors import ArtifactError, CapabilityError, RequestError
from expunge.models.towers import Tokens
from expunge.models.towers_hf import HFTowers
from expunge.models.towers_open_clip import OpenClipTowers
from expunge.tasks.tiny_clip import EOS, WordTokenizer, tiny_towers

pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

LIBRARIES = ("transformers", "open_clip")
TEXTS = ["a photo of a red circle", "dog", "one very long caption with more words than fit into the context of it"]
LAYERS = 3


@pytest.fixture(scope="module", params=LIBRARIES)
def towers(request):
    return tiny_towers(request.param, layers=LAYERS, words=("red", "circle", "dog"))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def pixels(n=4, seed=0):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def own_embeddings(towers, tower):
    """What the library's own calls give, without the adapter's."""
    model = towers.model
    if tower == "vision":
        return (
            model.get_image_features(pixels()).pooler_output
            if hasattr(model, "config")
            else model.encode_image(pixels())
        )
    ids = towers.tokenizer(TEXTS).ids
    if hasattr(model, "config"):
        return model.get_text_features(ids).pooler_output
    full = torch.zeros(len(ids), model.context_length, dtype=torch.int64)
    full[:, : ids.shape[1]] = ids
    return model.encode_text(full)


def inputs(towers, tower):
    return pixels() if tower == "vision" else towers.tokenize(TEXTS)


def staged(towers, tower, given, cuts):
    state = towers.enter(tower, given)
    for start, stop in pairwise(cuts):
        state = towers.through(tower, state, start, stop)
    return towers.leave(tower, state)


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_whole_and_staged_calls_equal_the_library(towers, tower):
    expected = own_embeddings(towers, tower)
    given = inputs(towers, tower)
    whole = towers.image(given) if tower == "vision" else towers.text(given)
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=0)
    for cuts in ((0, None), (0, 1, None), (0, 2, 3), (0, 1, 2, 3), (0, 0, 3)):
        torch.testing.assert_close(staged(towers, tower, given, cuts), expected, atol=1e-6, rtol=0)
    for wrong in ((0, 2), (0, 1, 1, 2), (1, 3), (0, 2, 1, 3)):
        assert float((staged(towers, tower, given, wrong) - expected).abs().max()) > 1e-3, wrong


def test_stages_carry_gradients_to_the_suffix_only(towers):
    with torch.enable_grad():
        state = towers.enter("vision", pixels())
        state = towers.through("vision", state, 0, 2)
        cut = type(state)(state.hidden.detach(), state.extra)
        towers.model.zero_grad()
        towers.leave("vision", towers.through("vision", cut, 2)).sum().backward()
    blocks = {towers.place(n).block for n, p in towers.parameters("vision").items() if p.grad is not None}
    assert blocks == {2, None}
    assert all(p.grad is None for p in towers.parameters("language").values())
    towers.model.zero_grad()


def test_padding_after_the_end_changes_nothing(towers):
    short = towers.tokenize(["dog"])
    padded = Tokens(nn.functional.pad(short.ids, (0, 5)))
    torch.testing.assert_close(towers.text(padded), towers.text(short), atol=1e-6, rtol=0)
    torch.testing.assert_close(staged(towers, "language", padded, (0, 1, 3)), towers.text(short), atol=1e-6, rtol=0)
    before = Tokens(nn.functional.pad(short.ids, (5, 0)))
    assert float((towers.text(before) - towers.text(short)).abs().max()) > 1e-3


def test_open_clip_texts_cut_after_the_longest_caption_equal_the_full_context():
    towers = tiny_towers("open_clip", context=12)
    towers.model.double()  # float32 rounds the two shapes differently, by some 1e-7
    towers.tokenizer = lambda texts: nn.functional.pad(WordTokenizer()(texts).ids, (0, 12))[:, :12]
    tokens = towers.tokenize(["dog", "red circle"])
    assert tokens.ids.shape == (2, 4)
    full = towers.model.encode_text(towers.tokenizer(["dog", "red circle"]))
    torch.testing.assert_close(towers.text(tokens), full, atol=1e-13, rtol=0)
    cut = Tokens(tokens.ids[:, :3])
    assert float((towers.text(cut)[1] - full[1]).abs().max()) > 1e-3


def test_masks_hide_tokens_of_transformers_texts():
    towers = tiny_towers("transformers")
    tokens = towers.tokenize(["red circle", "dog"])
    left = Tokens(torch.tensor([[0, 0, 62, 5, 63]]), torch.tensor([[0, 0, 1, 1, 1]]))
    torch.testing.assert_close(staged(towers, "language", left, (0, 1, None)), towers.text(left), atol=1e-6, rtol=0)
    assert float((towers.text(Tokens(left.ids)) - towers.text(left)).abs().max()) > 1e-3
    assert tokens.mask is None
    assert torch.equal(tokens[1:].ids, tokens.ids[1:])


def test_both_libraries_embed_alike_with_the_same_weights():
    a, b = (tiny_towers(lib, layers=LAYERS) for lib in LIBRARIES)
    torch.testing.assert_close(a.image(pixels()), b.image(pixels()), atol=2e-6, rtol=0)
    torch.testing.assert_close(a.text(a.tokenize(TEXTS)), b.text(b.tokenize(TEXTS)), atol=2e-6, rtol=0)
    torch.testing.assert_close(a.scale(), b.scale())
    assert a.scale().shape == ()
    other = tiny_towers("open_clip", seed=1, layers=LAYERS)
    assert float((a.image(pixels()) - other.image(pixels())).abs().max()) > 0.1


def test_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny_towers("transformers")
    assert torch.equal(torch.rand(3), expected)


# ---- places


def test_every_parameter_has_a_place(towers):
    places = {n: towers.place(n) for n in towers.parameters()}
    assert not [n for n, p in places.items() if p.part == "other"]
    assert {n for n, p in places.items() if p.tower is None} == {"logit_scale"}
    assert {p.bias for n, p in places.items() if n.endswith("bias")} == {True}
    assert {p.bias for n, p in places.items() if not n.endswith("bias")} == {False}
    fused = {"qkv"} if towers.library == "open_clip" else {"q", "k", "v"}
    for tower in ("vision", "language"):
        mine = [p for p in places.values() if p.tower == tower]
        assert {p.block for p in mine} == {None, *range(LAYERS)}
        assert {p.part for p in mine if p.block == 1} == fused | {"out", "fc1", "fc2", "norm"}
        assert {p.part for p in mine if p.block is None} == {"embedding", "norm", "projection"}
        assert sum(p.part == "projection" for p in mine) == 1
        assert set(towers.parameters(tower)) == {n for n, p in places.items() if p.tower == tower}
    assert len(towers.parameters()) == sum(len(towers.parameters(t)) for t in ("vision", "language")) + 1


def test_the_visual_projection_belongs_to_the_vision_tower():
    names = {"transformers": "visual_projection.weight", "open_clip": "visual.proj"}
    for library, name in names.items():
        place = tiny_towers(library).place(name)
        assert (place.tower, place.part, place.block) == ("vision", "projection", None)


def test_unknown_names_are_refused(towers):
    with pytest.raises(RequestError, match="no parameter"):
        towers.place("vision.blocks")


# ---- refusals and unusual models


def test_towers_of_other_kinds_run_whole_only():
    vision = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16, "image_size": 64}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(24, vision, text).eval()
    towers = OpenClipTowers(model, WordTokenizer(context=8))
    assert (towers.depth("vision"), towers.depth("language")) == (0, 2)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(towers.image(images), model.encode_image(images))
    for call in (lambda: towers.enter("vision", images), lambda: towers.through("vision", None, 0)):
        with pytest.raises(CapabilityError, match="only as a whole"):
            call()
    assert {towers.place(n).tower for n in towers.parameters() if n.startswith("visual.")} == {"vision"}
    assert towers.place("visual.attnpool.c_proj.weight").part == "projection"
    assert towers.place("visual.bn1.weight").part == "norm"
    assert towers.place("visual.conv1.weight").part == "other"


def test_places_in_a_timm_tower():
    pytest.importorskip("timm")
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    towers = OpenClipTowers(open_clip.CLIP(24, vision, text), WordTokenizer(context=8))
    places = {n: towers.place(n) for n in towers.parameters("vision")}
    assert towers.depth("vision") == 0
    assert {p.part for p in places.values() if p.block == 3} == {"qkv", "out", "fc1", "fc2", "norm"}
    assert places["visual.trunk.patch_embed.proj.weight"].part == "embedding"
    assert places["visual.head.proj.weight"].part == "projection"
    assert not [n for n, p in places.items() if p.part == "other"]


@pytest.mark.parametrize("bias", [False, True])
def test_the_text_tower_of_its_own_module_is_staged_too(bias):
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 10, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2, "proj_bias": bias}
    text |= {"pool_type": "eos", "eos_id": EOS}
    model = open_clip.CustomTextCLIP(24, vision, text).eval()
    towers = OpenClipTowers(model, WordTokenizer(context=10))
    tokens = towers.tokenize(["red circle", "dog"])
    full = model.encode_text(nn.functional.pad(tokens.ids, (0, 10 - tokens.ids.shape[1])))
    torch.testing.assert_close(towers.text(tokens), full, atol=1e-6, rtol=0)
    torch.testing.assert_close(staged(towers, "language", tokens, (0, 1, 2)), full, atol=1e-6, rtol=0)
    assert not [n for n in towers.parameters() if towers.place(n).part == "other"]


def test_a_text_tower_without_causal_mask_runs_whole_at_full_length():
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1, "no_causal_mask": True}
    model = open_clip.CustomTextCLIP(24, vision, text).eval()
    towers = OpenClipTowers(model, lambda texts: nn.functional.pad(WordTokenizer()(texts).ids, (0, 6))[:, :6])
    tokens = towers.tokenize(["dog"])
    assert towers.depth("language") == 0
    assert tokens.ids.shape == (1, 6)
    torch.testing.assert_close(towers.text(tokens), model.encode_text(tokens.ids))
    with pytest.raises(CapabilityError, match="as a whole"):
        towers.enter("language", tokens)


def test_stacks_that_are_not_batch_first():
    towers = tiny_towers("open_clip", layers=LAYERS)
    expected = towers.image(pixels()), towers.text(towers.tokenize(TEXTS))
    for stack in (towers.model.visual.transformer, towers.model.transformer):
        stack.batch_first = False
        for block in stack.resblocks:
            block.attn.batch_first = False
    for tower, value in zip(("vision", "language"), expected, strict=True):
        torch.testing.assert_close(staged(towers, tower, inputs(towers, tower), (0, 2, 3)), value, atol=1e-6, rtol=0)


def test_models_of_other_kinds_and_missing_tokenizers_are_refused():
    for adapter in (HFTowers, OpenClipTowers):
        with pytest.raises(CapabilityError, match="Linear"):
            adapter(nn.Linear(2, 2))
    towers = tiny_towers("transformers")
    with pytest.raises(CapabilityError, match="without a tokenizer"):
        HFTowers(towers.model).tokenize(["dog"])


def test_a_tokenizer_with_another_end_token_is_refused():
    class Other(WordTokenizer):
        eos_token_id = 7

    model = tiny_towers("transformers").model
    with pytest.raises(ArtifactError, match="ends texts with token 7"):
        HFTowers(model, Other())
    Other.eos_token_id = EOS
    assert HFTowers(model, Other()).tokenize(["dog"]).ids[0, -1] == EOS


def test_old_configurations_pool_at_the_highest_token():
    towers = tiny_towers("transformers")
    expected = towers.text(towers.tokenize(TEXTS))
    model = copy.deepcopy(towers.model)
    model.config.text_config.eos_token_id = model.text_model.eos_token_id = 2
    old = HFTowers(model, towers.tokenizer)
    torch.testing.assert_close(staged(old, "language", old.tokenize(TEXTS), (0, 1, 2)), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(old.text(old.tokenize(TEXTS)), expected, atol=1e-6, rtol=0)


def test_listed_words_never_share_a_token():
    words = [f"w{i}" for i in range(50)]
    ids = WordTokenizer(words, context=60)([" ".join(words)]).ids[0, 1:-1]
    assert len(set(ids.tolist())) == 50
    assert WordTokenizer(words, context=5)([" ".join(words)]).ids.tolist() == [[62, 1, 2, 3, 63]]
    hashed = WordTokenizer(context=60)([" ".join(words)]).ids[0, 1:-1]
    assert len(set(hashed.tolist())) < 50
    with pytest.raises(CapabilityError, match="at most"):
        WordTokenizer([f"w{i}" for i in range(61)])

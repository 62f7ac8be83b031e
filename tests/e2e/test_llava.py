"""A CLIP patch makes a LLaVA that was taught names forget one of them; undo brings the answers back."""

import torch

from expunge.consumers.ask import ask, interview, score_answers
from expunge.consumers.tiny import FIGURES, answer_loss, figures, teach, tiny_llava
from expunge.consumers.transfer import transfer
from expunge.digest import combine, model_digest, named_tensors, state_digests
from expunge.patch import Dense, Manifest, Patch, apply, revert
from expunge.tasks.tiny_clip import tiny_towers

FC1 = "encoder.layers.0.mlp.fc1.weight"
NAME = "Grace"


def test_llava_forgets_a_name_and_remembers() -> None:
    clip = tiny_towers("transformers")
    model, processor = tiny_llava(0, clip)
    lesson = list(zip(*figures(8), strict=True))
    teach(model, processor, lesson)
    images, names = figures(6, seed=1)
    others = tuple(n for n in FIGURES if n != NAME)
    known = score_answers(ask(model, processor, images), names)
    assert sum(v.named for v in known) >= 22

    weight = named_tensors(model)[0][f"model.vision_tower.{FC1}"]
    own = [(image, name) for image, name in lesson if name == NAME]
    (up,) = torch.autograd.grad(answer_loss(model, processor, own), weight)
    unit = up * weight.detach().norm() / up.norm()
    digests = state_digests(named_tensors(clip.model)[0])
    manifest = Manifest(base_digest=combine(digests), base_tensors=digests)
    digest = model_digest(model)
    before = ask(model, processor, images)
    for alpha in (0.3, 0.4, 0.5, 0.6, 0.8):
        patch = transfer(Patch({f"vision_model.{FC1}": Dense(alpha * unit)}, manifest), clip, model)
        result = interview(model, processor, images, names, patches=[patch], forget=[NAME])
        if result.rate("after", (NAME,)).value == 0:
            break
    assert result.rate("before", (NAME,)).value >= 80
    assert result.rate("after", (NAME,)).value == 0
    assert result.rate("after", others).value >= 75
    assert model_digest(model) == digest
    assert ask(model, processor, images) == before

    apply(model, patch)
    assert tuple(ask(model, processor, images)) == result.after.answers != tuple(before)
    revert(model)
    with torch.no_grad():
        now = model.get_image_features(pixel_values=images).pooler_output
    fresh, _ = tiny_llava(0, clip)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert all(map(torch.equal, now, fresh.get_image_features(pixel_values=images).pooler_output))


def test_open_clip_patch_reaches_the_same_llava() -> None:
    ours, theirs = tiny_towers("transformers"), tiny_towers("open_clip")
    model, _ = tiny_llava(0, ours)
    same, _ = tiny_llava(0, theirs)
    assert model_digest(model) == model_digest(same)
    delta = torch.randn((128, 32), generator=torch.Generator().manual_seed(0))
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    digests = state_digests(named_tensors(theirs.model)[0])
    patch = Patch({name: Dense(delta)}, Manifest(base_digest=combine(digests), base_tensors=digests))
    assert list(transfer(patch, theirs, model)) == [f"model.vision_tower.{FC1}"]

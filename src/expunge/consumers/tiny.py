"""Tiny models that contain a CLIP tower, for tests and examples: a LLaVA that can be taught names, a text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge import rng
from expunge.consumers.ask import WHO, Question, pictures
from expunge.consumers.llava import needs
from expunge.consumers.match import homes
from expunge.errors import ConfigError, DataError
from expunge.models.clip_names import canonical_pieces
from expunge.models.towers import Tower, Towers

#: Who is drawn as a square of which colour.
FIGURES: dict[str, tuple[float, float, float]] = {
    "Ada Byron": (0.9, 0.1, 0.1),
    "Carl": (0.1, 0.8, 0.2),
    "Emmy": (0.15, 0.2, 0.9),
    "Grace": (0.9, 0.85, 0.1),
}
#: As :func:`expunge.tasks.tiny_clip.tiny_towers` has them.
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 24,
    "hidden_act": "gelu",
}
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


def figures(n_per_name: int, seed: int = 0, *, size: int = 16) -> tuple[Tensor, list[str]]:
    """Coloured squares at random places on a noisy grey ground.

    Args:
        n_per_name: Images of each of :data:`FIGURES`.
        seed: Seed of places and noise.
        size: Side of the images in pixels.

    Returns:
        Pixels in [0, 1] ``[N, 3, size, size]`` and the name of each, names interleaved.
    """
    draw = torch.Generator().manual_seed(rng.key(seed, "figures") % 2**63)
    names = list(FIGURES) * n_per_name
    images = 0.45 + 0.05 * torch.randn((len(names), 3, size, size), generator=draw)
    side = size // 2
    for image, name in zip(images, names, strict=True):
        top, left = torch.randint(0, size - side + 1, (2,), generator=draw).tolist()
        image[:, top : top + side, left : left + side] += torch.tensor(FIGURES[name]).reshape(3, 1, 1) - 0.45
    return images.clamp(0, 1), names


def tiny_llava(
    seed: int = 0,
    source: Towers | None = None,
    *,
    feature_layer: int | list[int] = -2,
    width: int = 48,
    question: Question = WHO,
    words: Sequence[str] = (),
) -> tuple[Any, Any]:
    """A LLaVA of about 0.1 M parameters with random weights, and its processor. Nothing is downloaded.

    Args:
        seed: Seed of the weights.
        source: A small CLIP whose vision tower it gets, by shape and weights; by default one of two blocks.
        feature_layer: Hidden state of the vision tower that it reads.
        width: Width of the language model.
        question: Its words are in the vocabulary.
        words: Further words; the names of :data:`FIGURES` are always there.

    Returns:
        ``(model, processor)``: in float32 and eval mode; ``save_pretrained`` of both writes a folder.
    """
    t = needs("transformers")
    vision = _vision_config(source)
    known = " ".join((question.template.replace("<image>", " "), question.text, *FIGURES, *words)).split()
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys((*_SPECIAL, *known)))}
    text = t.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = t.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary["<image>"],
        vision_feature_layer=feature_layer,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
    )
    with rng.preserved():
        rng.seed_everything(rng.key(seed, "tiny llava") % 2**32)
        model = t.LlavaForConditionalGeneration(config).eval()
    if source is not None:
        plant(source, model, "vision")
    side = vision.image_size
    images = t.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    if source is not None:
        images.image_mean, images.image_std = list(source.mean), list(source.std)
    processor = t.LlavaProcessor(
        images,
        _tokenizer(vocabulary),
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor


def tiny_text_encoder(seed: int = 0, source: Towers | None = None, *, blocks: int | None = None) -> Any:
    """A ``CLIPTextModel`` as a Stable Diffusion pipeline has one, in float32 and eval mode.

    Args:
        seed: Seed of the weights.
        source: A small CLIP of transformers whose text tower it gets.
        blocks: Number of its blocks, if fewer than the source has; Stable Diffusion 2 ships 23 of 24.
    """
    t = needs("transformers")
    if source is None:
        ends = {"pad_token_id": 0, "bos_token_id": 62, "eos_token_id": 63}
        settings: dict[str, Any] = _TOWER | ends | {"vocab_size": 64, "max_position_embeddings": 12}
    elif source.library == "transformers":
        whole: Any = source.model
        settings = whole.config.text_config.to_dict()
    else:
        raise ConfigError("a text encoder is made from a CLIP of transformers")
    if blocks is not None:
        settings["num_hidden_layers"] = blocks
    with rng.preserved():
        rng.seed_everything(rng.key(seed, "tiny text encoder") % 2**32)
        encoder = t.CLIPTextModel(t.CLIPTextConfig(**settings)).eval()
    if source is not None:
        plant(source, encoder, "language")
    return encoder


@torch.no_grad()
def plant(source: Towers, module: nn.Module, tower: Tower) -> int:
    """Copy the weights of a CLIP tower into a model that has the same tower.

    Returns:
        Number of tensors written. Those of further blocks, of norms or projections that ``module`` lacks are left out.

    Raises:
        DataError: ``module`` has no such tower, or several.
    """
    tensors = dict(module.named_parameters())
    found = [h for h in homes(tensors) if h.tower == tower]
    if len(found) != 1:
        raise DataError(f"{type(module).__name__} has {len(found)} {tower} towers, one is needed")
    written = 0
    for name, weight in source.parameters(tower).items():
        for piece in canonical_pieces(source.library, name, tuple(weight.shape)):
            target = found[0].name(piece.name)
            if target in tensors:
                tensors[target].copy_(piece.take(weight))
                written += 1
    return written


def teach(
    model: Any,
    processor: Any,
    pairs: Sequence[tuple[Tensor, str]],
    steps: int = 60,
    *,
    question: Question = WHO,
    lr: float = 3e-3,
) -> float:
    """Train projector and language model to answer with the name; the vision tower stays as it is, bit for bit.

    All pairs are one batch of every step (AdamW). The gradients of the vision tower are on again afterwards.

    Args:
        model: From :func:`tiny_llava`.
        processor: Its processor.
        pairs: Pixels in [0, 1] ``[3, S, S]``, and the answer, made of words that the vocabulary has.
        steps: Number of steps.
        question: What is asked.
        lr: Learning rate.

    Returns:
        The loss of the last step.

    Raises:
        DataError: No pairs, or a word that the vocabulary lacks.
    """
    batch, labels = _lesson(processor, pairs, question.prompt(processor))
    frozen = list(model.model.vision_tower.parameters())
    moved = [p for n, p in model.named_parameters() if ".vision_tower." not in n]
    optimizer = torch.optim.AdamW(moved, lr=lr, weight_decay=0.0)
    for p in frozen:
        p.requires_grad_(False)
    loss = torch.zeros(())
    try:
        for _ in range(steps):
            loss = model(**batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for p in frozen:
            p.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def answer_loss(model: Any, processor: Any, pairs: Sequence[tuple[Tensor, str]], question: Question = WHO) -> Tensor:
    """Mean cross-entropy of the answers' tokens, with gradient: what :func:`teach` minimises."""
    batch, labels = _lesson(processor, pairs, question.prompt(processor))
    loss: Tensor = model(**batch, labels=labels).loss
    return loss


def _lesson(processor: Any, pairs: Sequence[tuple[Tensor, str]], prompt: str) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs and labels; the prompt and the padding do not count (-100)."""
    if not pairs:
        raise DataError("no pairs to teach")
    images = pictures(torch.stack([image for image, _ in pairs]))
    end = processor.tokenizer.eos_token
    texts = [f"{prompt} {answer} {end}" for _, answer in pairs]
    batch = dict(processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="right"))
    if bool((batch["input_ids"] == processor.tokenizer.unk_token_id).any()):
        raise DataError("an answer or the question has a word that the vocabulary lacks; see `words` of tiny_llava")
    asked = processor(images=images[:1], text=[prompt], return_tensors="pt")["input_ids"].shape[1]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :asked] = -100
    return batch, labels


def _vision_config(source: Towers | None) -> Any:
    t = needs("transformers")
    if source is None:
        return t.CLIPVisionConfig(**_TOWER, image_size=16, patch_size=8)
    whole: Any = source.model
    if source.library == "transformers":
        return t.CLIPVisionConfig(**whole.config.vision_config.to_dict())
    shapes: Mapping[str, tuple[int, ...]] = {
        piece.name: tuple(piece.take(weight).shape)
        for name, weight in source.parameters("vision").items()
        for piece in canonical_pieces(source.library, name, tuple(weight.shape))
    }
    patch = shapes["vision_model.embeddings.patch_embedding.weight"]
    return t.CLIPVisionConfig(
        hidden_size=patch[0],
        intermediate_size=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=source.depth("vision"),
        num_attention_heads=whole.visual.transformer.resblocks[0].attn.num_heads,
        image_size=source.image_size,
        patch_size=patch[-1],
        hidden_act="gelu",
    )


def _tokenizer(vocabulary: Mapping[str, int]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    table = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return needs("transformers").PreTrainedTokenizerFast(
        tokenizer_object=table,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )

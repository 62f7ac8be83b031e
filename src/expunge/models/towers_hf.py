"""CLIP of the transformers library behind the :class:`~expunge.models.towers.Towers` interface."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from expunge.errors import ArtifactError, CapabilityError, RequestError, did_you_mean
from expunge.models.towers import Place, Staged, Tokens, Tower, Towers

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_LEGACY_EOS = 2  # configs of old checkpoints; transformers then pools at the highest token id
_BLOCK = re.compile(r"^(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)$")
_IN_BLOCK = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.out_proj": "out",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "layer_norm1": "norm",
    "layer_norm2": "norm",
}
_OUTSIDE = {
    "embeddings": "embedding",
    "pre_layrnorm": "norm",
    "post_layernorm": "norm",
    "final_layer_norm": "norm",
}


def need_tokenizer(tokenizer: Any | None) -> Any:
    """The tokenizer, or an error that says where one comes from.

    Raises:
        CapabilityError: There is none.
    """
    if tokenizer is None:
        raise CapabilityError("this model came without a tokenizer; pass one, or load it with `load_clip`")
    return tokenizer


class HFTowers(Towers):
    """Adapter around an unmodified ``transformers.CLIPModel``.

    Staged evaluation carries ``(keep, ends)``: the padding mask ``[B, T]`` (or ``None``) and the end positions ``[B]``;
    for images nothing.

    Args:
        model: The model; it is used as is.
        tokenizer: A transformers tokenizer, or a callable from a list of texts to :class:`Tokens`.
        mean: Per channel, for images in [0, 1].
        std: Per channel.

    Raises:
        CapabilityError: Another kind of model, or transformers is missing.
        ArtifactError: Tokenizer and configuration disagree about the end token (the text tower would pool elsewhere).
    """

    library = "transformers"

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
    ) -> None:
        _check(model)
        self.model = model
        self.tokenizer = tokenizer
        self.mean, self.std = tuple(mean), tuple(std)
        text = model.config.text_config
        self.image_size = int(model.config.vision_config.image_size)
        self.context = int(text.max_position_embeddings)
        self._eos = int(text.eos_token_id)
        stated = getattr(tokenizer, "eos_token_id", None)
        if stated is not None and self._eos not in (stated, _LEGACY_EOS):
            raise ArtifactError(
                f"the tokenizer ends texts with token {stated}, the text tower's configuration says {self._eos}; it "
                "would pool at the wrong position. Set text_config.eos_token_id to the tokenizer's"
            )

    @override
    def tokenize(self, texts: Sequence[str]) -> Tokens:
        tokenizer = need_tokenizer(self.tokenizer)
        if not hasattr(tokenizer, "padding_side"):
            tokens: Tokens = tokenizer(list(texts))
            return tokens
        found = tokenizer(list(texts), padding=True, truncation=True, max_length=self.context, return_tensors="pt")
        # Behind the end token padding changes nothing, and without a mask the attention kernels are faster.
        return Tokens(found["input_ids"], found["attention_mask"] if tokenizer.padding_side == "left" else None)

    @override
    def image(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        out: Tensor = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return out

    @override
    def text(self, tokens: Tokens) -> Tensor:
        model: Any = self.model
        found = model.text_model(input_ids=tokens.ids, attention_mask=tokens.mask)
        out: Tensor = model.text_projection(found.pooler_output)
        return out

    @override
    def scale(self) -> Tensor:
        return torch.as_tensor(self.model.logit_scale).exp().reshape(())

    @override
    def place(self, name: str) -> Place:
        bias = name.endswith(".bias")
        if name == "logit_scale":
            return Place(None, None, "scale", False)
        if name.startswith("visual_projection."):
            return Place("vision", None, "projection", bias)
        if name.startswith("text_projection."):
            return Place("language", None, "projection", bias)
        block = _BLOCK.match(name)
        if block:
            tower: Tower = "vision" if block[1] == "vision" else "language"
            return Place(tower, int(block[2]), _IN_BLOCK.get(block[3].rpartition(".")[0], "other"), bias)
        outer, _, rest = name.partition(".")
        if outer not in ("vision_model", "text_model"):
            raise RequestError(f"no parameter '{name}' in this model{did_you_mean(name, self.parameters())}")
        part = _OUTSIDE.get(rest.partition(".")[0], "other")
        return Place("vision" if outer == "vision_model" else "language", None, part, bias)

    @override
    def depth(self, tower: Tower) -> int:
        return len(self._module(tower).encoder.layers)

    @override
    def enter(self, tower: Tower, inputs: Tensor | Tokens) -> Staged:
        module = self._module(tower)
        if isinstance(inputs, Tokens):
            hidden = module.embeddings(input_ids=inputs.ids)
            return Staged(hidden, (inputs.mask, self._ends(inputs.ids)))
        return Staged(module.pre_layrnorm(module.embeddings(inputs)))

    @override
    def through(self, tower: Tower, state: Staged, start: int, stop: int | None = None) -> Staged:
        module, hidden = self._module(tower), state.hidden
        if tower == "vision":
            for layer in module.encoder.layers[start:stop]:
                hidden = layer(hidden, None)
            return Staged(hidden, state.extra)
        from transformers.masking_utils import create_causal_mask

        mask = create_causal_mask(
            config=module.config, inputs_embeds=hidden, attention_mask=state.extra[0], past_key_values=None
        )
        for layer in module.encoder.layers[start:stop]:
            hidden = layer(hidden, mask, is_causal=True)
        return Staged(hidden, state.extra)

    @override
    def leave(self, tower: Tower, state: Staged) -> Tensor:
        model: Any = self.model
        module, hidden = self._module(tower), state.hidden
        if tower == "vision":
            image: Tensor = model.visual_projection(module.post_layernorm(hidden[:, 0]))
            return image
        rows = torch.arange(len(hidden), device=hidden.device)
        text: Tensor = model.text_projection(module.final_layer_norm(hidden[rows, state.extra[1]]))
        return text

    def _module(self, tower: Tower) -> Any:
        model: Any = self.model
        return model.vision_model if tower == "vision" else model.text_model

    def _ends(self, ids: Tensor) -> Tensor:
        if self._eos == _LEGACY_EOS:
            return ids.int().argmax(-1)
        return ids.eq(self._eos).int().argmax(-1)


def _check(model: Any) -> None:
    try:
        from transformers import CLIPModel
    except ImportError:
        raise CapabilityError('this needs transformers: pip install "expunge[clip]"') from None
    if not isinstance(model, CLIPModel):
        raise CapabilityError(f"HFTowers holds a transformers CLIPModel, not a {type(model).__name__}")

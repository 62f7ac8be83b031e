"""CLIP of the open_clip library behind the :class:`~expunge.models.towers.Towers` interface."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from expunge.errors import CapabilityError, RequestError, did_you_mean
from expunge.models.towers import Place, Staged, Tokens, Tower, Towers
from expunge.models.towers_hf import OPENAI_MEAN, OPENAI_STD, need_tokenizer

_LANGUAGE = (
    "text.",
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "cls_emb",
)
_BLOCK = re.compile(r"\.?(?:resblocks|blocks)\.(\d+)\.(.+)$")
_IN_BLOCK = {
    "attn.in_proj_weight": "qkv",
    "attn.in_proj_bias": "qkv",
    "attn.qkv": "qkv",
    "attn.q_proj": "q",
    "attn.k_proj": "k",
    "attn.v_proj": "v",
    "attn.out_proj": "out",
    "attn.proj": "out",
    "mlp.c_fc": "fc1",
    "mlp.fc1": "fc1",
    "mlp.c_proj": "fc2",
    "mlp.fc2": "fc2",
    "ln_1": "norm",
    "ln_2": "norm",
    "norm1": "norm",
    "norm2": "norm",
}
_OUTSIDE = (  # first match decides; bare names are open_clip's own towers, the rest residual and timm networks
    (re.compile(r"(^|\.)(class_embedding|positional_embedding|pos_embed|cls_token|cls_emb)$"), "embedding"),
    (re.compile(r"(^|\.)(token_embedding|patch_embed)\."), "embedding"),
    (re.compile(r"(^|\.)(proj|text_projection)(\.weight|\.bias)?$|(^|\.)attnpool\.c_proj\."), "projection"),
    (re.compile(r"(^|\.)(ln_\w+|bn\d|norm\w*)\.(weight|bias)$"), "norm"),
)


class OpenClipTowers(Towers):
    """Adapter around an unmodified ``open_clip`` model (``CLIP`` or ``CustomTextCLIP``).

    open_clip's text tower takes texts of its full context length only. Here they may be shorter: the causal mask and
    the position embedding are cut, which changes nothing up to the end token. A tower that is not a plain transformer
    stack (a residual network, a timm or transformers model) has :meth:`depth` 0 and runs as a whole.

    Staged evaluation carries the end positions ``[B]`` of texts; for images nothing.

    Args:
        model: The model; it is used as is.
        tokenizer: An open_clip tokenizer (texts to ids ``[B, context]``), or a callable to :class:`Tokens`.
        mean: Per channel, for images in [0, 1].
        std: Per channel.

    Raises:
        CapabilityError: Another kind of model, images that are not square, or open_clip is missing.
    """

    library = "open_clip"

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
    ) -> None:
        _check(model)
        from open_clip import CLIP
        from open_clip.transformer import TextTransformer, VisionTransformer

        self.model = model
        self.tokenizer = tokenizer
        self.mean, self.std = tuple(mean), tuple(std)
        size: Any = model.visual.image_size
        sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
        if sides[0] != sides[1]:
            raise CapabilityError(
                f"the image tower takes images of {sides[0]} x {sides[1]}; only square ones are supported"
            )
        self.image_size = int(sides[0])
        self.context = int(model.context_length)
        self._staged_image = isinstance(model.visual, VisionTransformer)
        text: Any = model if isinstance(model, CLIP) else model.text
        self._pool = getattr(model, "text_pool_type", None) or getattr(text, "pool_type", "")
        self._eos: int = getattr(model, "text_eos_id", None) or getattr(text, "eos_id", None) or -1
        plain = isinstance(text, CLIP | TextTransformer) and getattr(text, "cls_emb", None) is None
        self._staged_text = plain and text.attn_mask is not None and self._pool in ("argmax", "eos")

    @override
    def tokenize(self, texts: Sequence[str]) -> Tokens:
        found = need_tokenizer(self.tokenizer)(list(texts))
        tokens = found if isinstance(found, Tokens) else Tokens(found)
        if not self._staged_text or not len(tokens):
            return tokens
        return Tokens(tokens.ids[:, : int(self._ends(tokens.ids).max()) + 1])

    @override
    def image(self, pixels: Tensor) -> Tensor:
        return _features(self._net.encode_image(pixels))

    @override
    def text(self, tokens: Tokens) -> Tensor:
        if not self._staged_text or tokens.ids.shape[1] == self.context:
            return _features(self._net.encode_text(tokens.ids))
        return self.leave("language", self.through("language", self.enter("language", tokens), 0))

    @override
    def scale(self) -> Tensor:
        return torch.as_tensor(self.model.logit_scale).exp().reshape(())

    @override
    def place(self, name: str) -> Place:
        bias = name.endswith((".bias", "_bias"))
        if name in ("logit_scale", "logit_bias"):
            return Place(None, None, "scale", bias)
        tower: Tower = "vision" if name.startswith("visual.") else "language"
        if tower == "language" and not name.startswith(_LANGUAGE):
            raise RequestError(f"no parameter '{name}' in this model{did_you_mean(name, self.parameters())}")
        block = _BLOCK.search(name)
        if block:
            inner = block[2]
            return Place(
                tower, int(block[1]), _IN_BLOCK.get(inner) or _IN_BLOCK.get(inner.rpartition(".")[0], "other"), bias
            )
        if self._staged_image and name == "visual.conv1.weight":
            return Place("vision", None, "embedding", bias)
        return Place(tower, None, next((part for rule, part in _OUTSIDE if rule.search(name)), "other"), bias)

    @override
    def depth(self, tower: Tower) -> int:
        staged = self._staged_image if tower == "vision" else self._staged_text
        return len(self._stack(tower).resblocks) if staged else 0

    @override
    def enter(self, tower: Tower, inputs: Tensor | Tokens) -> Staged:
        self._need_stack(tower)
        if not isinstance(inputs, Tokens):
            return Staged(self._net.visual._embeds(inputs))
        text = self._text
        dtype = text.transformer.get_cast_dtype()
        positions = text.positional_embedding[: inputs.ids.shape[1]]
        return Staged(text.token_embedding(inputs.ids).to(dtype) + positions.to(dtype), self._ends(inputs.ids))

    @override
    def through(self, tower: Tower, state: Staged, start: int, stop: int | None = None) -> Staged:
        self._need_stack(tower)
        stack, hidden = self._stack(tower), state.hidden
        length = hidden.shape[1]
        mask = None if tower == "vision" else self._text.attn_mask[:length, :length]
        if not stack.batch_first:
            hidden = hidden.transpose(0, 1).contiguous()
        for block in stack.resblocks[start:stop]:
            hidden = block(hidden, attn_mask=mask)
        return Staged(hidden if stack.batch_first else hidden.transpose(0, 1), state.extra)

    @override
    def leave(self, tower: Tower, state: Staged) -> Tensor:
        self._need_stack(tower)
        hidden = state.hidden
        if tower == "vision":
            visual = self._net.visual
            pooled: Tensor = visual._pool(hidden)[0]
            return pooled if visual.proj is None else pooled @ visual.proj
        text = self._text
        pooled = text.ln_final(hidden[torch.arange(len(hidden), device=hidden.device), state.extra])
        projection = text.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection

    @property
    def _net(self) -> Any:
        return self.model

    @property
    def _text(self) -> Any:
        """The module that holds the parts of the text tower: the model itself, or ``model.text``."""
        return self._net if hasattr(self._net, "token_embedding") else self._net.text

    def _stack(self, tower: Tower) -> Any:
        return self._net.visual.transformer if tower == "vision" else self._text.transformer

    def _need_stack(self, tower: Tower) -> None:
        if not self.depth(tower):
            raise CapabilityError(
                f"the {tower} tower is not a plain stack of transformer blocks and runs only as a whole; "
                "take the probe that evaluates the full model"
            )

    def _ends(self, ids: Tensor) -> Tensor:
        return ids.argmax(-1) if self._pool == "argmax" else ids.eq(self._eos).int().argmax(-1)


def _features(found: Any) -> Tensor:
    """Some towers also return the features of every token."""
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def _check(model: Any) -> None:
    try:
        from open_clip import CLIP, CustomTextCLIP
    except ImportError:
        raise CapabilityError('this needs open_clip: pip install "expunge[clip]"') from None
    if not isinstance(model, CLIP | CustomTextCLIP):
        raise CapabilityError(f"OpenClipTowers holds an open_clip CLIP or CustomTextCLIP, not a {type(model).__name__}")

"""What the U-Net of a pipeline receives of a prompt: the states of its text encoders."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.errors import RequestError
from expunge.models.pipelines import Parts

#: Prompts whose states are kept.
KEPT = 1024
_log = logging.getLogger(__name__)


class TextStates:
    """The text half of a pipeline, as its own ``encode_prompt`` computes it, with remembered states.

    While no gradient is asked for, every prompt is encoded by itself and remembered until a weight changes: its states
    are the same bits in any company. They are computed in the precision in which the pipeline was loaded, also while a
    run holds its weights in float32: these are the states that the U-Net receives when it is used.

    Args:
        parts: The pipeline.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.dtypes = [next(e.parameters()).dtype for _, e in self.encoders]
        self._known: dict[str, Tensor] = {}
        self._rounded: list[Any] | None = None
        self._weights: tuple[Any, ...] = ()
        self._warned = False
        if parts.kind == "xl":
            # The library hooks itself into the layers when hidden states are first asked for. Within a run that
            # would be undone at its end, for good.
            with torch.no_grad():
                self._joined([torch.zeros(1, 1, dtype=torch.int64)] * 2, [e for _, e in self.encoders])

    @property
    def encoders(self) -> list[tuple[Any, Any]]:
        """Tokenizers and text encoders, one pair or two."""
        pairs = [(self.parts.tokenizer, self.parts.text_encoder)]
        if self.parts.text_encoder_2 is not None:
            pairs.append((self.parts.tokenizer_2, self.parts.text_encoder_2))
        return pairs

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text that XL adds to the time embedding, else 0."""
        return int(self.parts.text_encoder_2.config.projection_dim) if self.parts.kind == "xl" else 0

    def token_ids(self, prompts: Sequence[str], which: int = 0) -> Tensor:
        """int64 ``[B, T]`` on the CPU, padded and cut as the pipeline does.

        Args:
            prompts: Texts.
            which: 0, or 1 for the second text encoder.
        """
        tokenizer, encoder = self.encoders[which]
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        found = tokenizer(list(prompts), return_overflowing_tokens=True, return_tensors="pt", **options)
        ids: Tensor = found["input_ids"]
        if len(ids) > len(prompts):  # every piece of a text beyond the limit is a row of its own
            first = found["overflow_to_sample_mapping"]
            ids = ids[[int((first == i).nonzero()[0]) for i in range(len(prompts))]]
            if not self._warned:
                long = prompts[int(first[1:][first[1:] == first[:-1]][0])]
                _log.warning("prompts are cut after %d tokens, as this pipeline always does; first '%s'", length, long)
                self._warned = True
        return ids

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Conditions ``[B, T, D]``, with one more row for XL; see :meth:`unpack`.

        Raises:
            RequestError: No prompts.
        """
        if not prompts:
            raise RequestError("no prompts")
        weights = [p for _, e in self.encoders for p in e.parameters()]
        if torch.is_grad_enabled() and any(p.requires_grad for p in weights):
            return self._encoded(prompts, [e for _, e in self.encoders])
        now = tuple((p.untyped_storage()._cdata, p._version, p.dtype) for p in weights)
        if now != self._weights:
            self._known, self._rounded, self._weights = {}, None, now
        if len(self._known) > KEPT:
            self._known = {}
        new = [p for p in dict.fromkeys(prompts) if p not in self._known]
        if new:
            encoders = self._as_loaded()
            with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
                self._known |= {p: self._encoded([p], encoders)[0] for p in new}
        return torch.stack([self._known[p] for p in prompts])

    def of_ids(self, ids: Sequence[Tensor]) -> Tensor:
        """Conditions ``[B, T, D]`` of token ids, by the text encoders as they are; nothing is remembered.

        Args:
            ids: int64 ``[B, T]`` for each text encoder, with special tokens and padding.
        """
        return self._joined(ids, [e for _, e in self.encoders])

    def empty(self, n: int) -> Tensor:
        """Conditions of the empty prompt ``[n, T, D]``; zeros where the pipeline was trained so (XL)."""
        found = self([""])
        return (torch.zeros_like(found) if self.parts.zero_unconditional else found).expand(n, -1, -1)

    def unpack(self, conditions: Tensor) -> tuple[Tensor, Tensor | None]:
        """States ``[B, T, D]`` that cross-attention reads, and the pooled text ``[B, P]`` of XL.

        Conditions are one tensor so that they can be joined, cut and repeated; the pooled text is their last row,
        filled up with zeros.
        """
        if not self.pooled_width:
            return conditions, None
        return conditions[:, :-1], conditions[:, -1, : self.pooled_width]

    def _as_loaded(self) -> list[Any]:
        """The text encoders in their own precision: themselves, or rounded copies."""
        if self._rounded is None:
            pairs = zip(self.encoders, self.dtypes, strict=True)
            self._rounded = [e if next(e.parameters()).dtype == d else copy.deepcopy(e).to(d) for (_, e), d in pairs]
        return self._rounded

    def _encoded(self, prompts: Sequence[str], encoders: Sequence[Any]) -> Tensor:
        return self._joined([self.token_ids(prompts, which) for which in range(len(encoders))], encoders)

    def _joined(self, ids: Sequence[Tensor], encoders: Sequence[Any]) -> Tensor:
        found, pooled = [], None
        for own, encoder in zip(ids, encoders, strict=True):
            with _eval_mode(encoder):
                out = encoder(own.to(next(encoder.parameters()).device), output_hidden_states=self.parts.kind == "xl")
            if self.parts.kind == "sd":
                states: Tensor = out.last_hidden_state
                return states
            found.append(out.hidden_states[-2])
            pooled = out[0]
        assert pooled is not None
        joined = torch.cat(found, -1)
        row = functional.pad(pooled, (0, joined.shape[-1] - pooled.shape[-1]))
        return torch.cat([joined, row[:, None]], 1)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout: it would make the states of a prompt a matter of chance."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode

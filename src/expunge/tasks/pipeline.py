"""Text-to-image pipelines of the Stable Diffusion kind: what the U-Net predicts for a prompt, and images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from expunge import rng
from expunge.diffusion.asks import Ask, first_noise
from expunge.diffusion.latents import decode, lent
from expunge.diffusion.process import Process, draw_noise
from expunge.diffusion.recompute import recomputing
from expunge.diffusion.sample import fresh, guided
from expunge.digest import model_digest
from expunge.errors import ConfigError, RequestError
from expunge.models.pipelines import Parts, TextToImage
from expunge.models.text_states import TextStates
from expunge.restore import evaluating
from expunge.tasks.base import Batch
from expunge.tasks.diffusion import DiffusionTask


class PipelineTask(DiffusionTask):
    """A text-to-image pipeline; data and requests are the subclass's.

    Args:
        parts: The pipeline.
        steps: Steps of the sampler.
        guidance: Weight of classifier-free guidance.
        side: Pixels along one side of images; that of the pipeline by default.
        sample_batch: Images that are generated at once.

    Attributes:
        model: ``unet`` and ``text_encoder`` (and ``text_encoder_2``); the autoencoder is not edited.
        text: Token ids and states of prompts.
        gradient_checkpointing: Graded passes keep less and run blocks twice, see
            :func:`~expunge.diffusion.recompute.recomputing`; the gradients are the same.

    Raises:
        ConfigError: A side that is no multiple of what one latent cell covers.
    """

    capabilities = frozenset({"diffusion", "text"})
    gradient_checkpointing: bool = False

    def __init__(self, parts: Parts, steps: int, guidance: float, side: int | None, sample_batch: int) -> None:
        self.parts, self.unet = parts, parts.unet
        self.model: TextToImage = parts.model()
        self.process = Process(parts.scheduler)
        self.text = TextStates(parts)
        self.steps, self.guidance, self.sample_batch = steps, guidance, sample_batch
        self.side = side or parts.side
        if self.side % parts.factor:
            raise ConfigError(f"task.side is {self.side}; this pipeline needs a multiple of {parts.factor}")

    def masters(self, wanted: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """See :meth:`~expunge.models.pipelines.TextToImage.masters`."""
        return self.model.masters(wanted)

    def conditions(self, prompts: Sequence[str]) -> Tensor:
        """What :meth:`eps` takes for prompts, ``[B, T, D]``; for XL with one more row, the pooled text."""
        return self.text(prompts)

    def states(self, prompts: Sequence[str]) -> Tensor:
        """What cross-attention reads, ``[B, T, D]``: for closed forms and null spaces.

        The same as :meth:`conditions` but for XL, whose U-Net also sees the pooled text.
        """
        return self.text.unpack(self.text(prompts))[0]

    def eps(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predicted noise ``[B, C, h, w]``, whatever the U-Net itself predicts.

        Args:
            x_t: Noised latents ``[B, C, h, w]``.
            t: int64 ``[B]``.
            condition: Of :meth:`conditions`; for all but XL that is the same as :meth:`states`.
        """
        dtype = self._dtype()
        if torch.is_autocast_enabled(x_t.device.type):  # layers round what they read; gradients are summed unrounded
            dtype = torch.promote_types(dtype, torch.float32)
        states, pooled = self.text.unpack(condition.to(x_t.device, dtype))
        options: dict[str, Any] = {}
        if pooled is not None:
            if states.shape[1] + 1 != condition.shape[1] or condition.shape[1] != self._rows:
                raise RequestError("the U-Net of XL also needs the pooled text: pass `conditions`, not `states`")
            sizes = torch.tensor([self.side, self.side, 0, 0, self.side, self.side], device=x_t.device, dtype=dtype)
            options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.expand(len(x_t), -1)}
        t = t.to(x_t.device)
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        with recomputing(self.unet) if again else nullcontext():
            found: Tensor = self.unet(x_t.to(dtype), t, encoder_hidden_states=states, **options).sample
        if self.parts.predicts == "v_prediction":
            a = self.process.alphas_cumprod[t.cpu()].to(found).reshape(-1, 1, 1, 1)
            found = a.sqrt() * found + (1 - a).sqrt() * x_t
        return found

    @property
    def _rows(self) -> int:
        return int(self.parts.text_encoder.config.max_position_embeddings) + bool(self.text.pooled_width)

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``(x_t, t, noise)`` of samples: a function of ``batch.key`` and the sample ids."""
        x0, steps = batch.inputs, self.process.steps
        # plain numbers: where gradients are taken of functions, sample ids cannot be read as an array
        t = torch.tensor([rng.key(batch.key, "times", i) % steps for i in batch.ids.tolist()], device=x0.device)
        noise = draw_noise(batch.key, batch.ids, x0.shape[1:], x0.dtype).to(x0.device)
        return self.process.noised(x0, noise, t), t, noise

    def unconditional(self, n: int) -> Tensor:
        """Conditions of the empty prompt, ``n`` times."""
        return self.text.empty(n)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of latents."""
        cells = self.side // self.parts.factor
        return int(self.parts.unet.config.in_channels), cells, cells

    @cached_property
    def vae_digest(self) -> str:
        """Digest of the autoencoder, which nothing changes."""
        return model_digest(self.parts.vae)

    @property
    def scheduler(self) -> Any:
        """A fresh copy of the sampler; it takes predicted noise."""
        return fresh(self.parts.scheduler)

    def sample(self, asks: Sequence[Ask], *, steps: int | None = None, guidance: float | None = None) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1] on the CPU, by classifier-free guidance; the model is left as found.

        The noise of an image is a function of its ask alone, so original and edited model start from the same.

        Args:
            asks: What to draw.
            steps: Instead of the task's.
            guidance: Instead of the task's.
        """
        images = []
        with evaluating(self.model), lent(self.parts.vae, self.device) as vae:
            for start in range(0, len(asks), self.sample_batch):
                chunk = asks[start : start + self.sample_batch]
                latents = guided(
                    self.eps,
                    self.parts.scheduler,
                    first_noise(chunk, self.latent_shape).to(self.device),
                    self.conditions([a.prompt for a in chunk]),
                    self.text.empty(len(chunk)),
                    steps=steps or self.steps,
                    guidance=self.guidance if guidance is None else guidance,
                    keys=[a.key for a in chunk],
                )
                images.append(decode(vae, latents).float().cpu())
        return torch.cat(images)

"""The gradients as the public scripts of SLUG accumulate them, faults included. For reproduction only."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from expunge.errors import ConfigError, DataError
from expunge.models.towers import Tokens, Towers
from expunge.slug.differentiate import Loader, Pairs, Run, differentiable, mean
from expunge.slug.gradients import Gradients
from expunge.slug.losses import contrastive_parts, forget_losses

#: ``as_published``: the transformers scripts of 2024. ``as_published_2025``: that of 2025. ``openclip``: open_clip.
Variant = Literal["as_published", "as_published_2025", "openclip"]


def published_gradients(
    towers: Towers,
    forget: Loader,
    retain: Loader,
    *,
    variant: Variant,
    prompt: Tokens | None = None,
    squared: bool = False,
) -> Gradients:
    """What the public code stores, for every parameter. All means are means over batches, as they are loaded.

    * ``as_published``: every caption, also of the retain set, is ``prompt``. Gradients are never cleared, so the stored
      tensors are ``(1/N) sum_j (N - j + 1) g_j`` and ``sum_j g_j + (1/M) sum_j (M - j + 1) r_j``.
    * ``as_published_2025``: cleared, captions still replaced. The image-to-text half of the retain loss is constant.
    * ``openclip``: cleared, true captions; the forget gradient is that of ``-L_f``.

    Args:
        towers: The model.
        forget: Pairs to forget, in the batches of the script.
        retain: Pairs to keep.
        variant: Which script.
        prompt: The concept's name, one text; the transformers variants need it.
        squared: Mean of squared batch gradients instead (importance mode ``l2``, the input of SSD).

    Returns:
        Gradients with the stored signs; ``facts["sign"]`` is that of the multiplier which raises ``L_f``.

    Raises:
        ConfigError: The prompt is missing, or not one text, or given where captions are not replaced.
        DataError: A split has no pair.
    """
    if variant not in ("as_published", "as_published_2025", "openclip"):
        raise ConfigError(f"unknown variant {variant!r}; there are as_published, as_published_2025 and openclip")
    if (prompt is None) != (variant == "openclip") or (prompt is not None and len(prompt) != 1):
        raise ConfigError("the transformers variants replace all captions by one prompt, openclip keeps them")
    sign = -1.0 if variant == "openclip" else 1.0
    facts: dict[str, Any] = {"variant": variant, "sign": sign, "squared": squared}
    with differentiable(towers) as run:
        running = run.zeros() if variant == "as_published" else None
        found = {}
        for side, pairs in (("forget", forget), ("retain", retain)):
            total, rows = run.zeros(), []
            for batch in pairs():
                loss, about = _loss(run, batch, side, prompt)
                rows.append(about)
                _accumulate(run, total, running, loss * (sign if side == "forget" else 1.0), squared)
            if not rows:
                raise DataError(f"the {side} set has no pair")
            found[side] = mean(total, len(rows), side)
            facts[side] = {"batches": rows}
    return Gradients(found["forget"], found["retain"], facts)


def _loss(run: Run, batch: Pairs, side: str, prompt: Tokens | None) -> tuple[Tensor, dict[str, float]]:
    v, t = run.image(batch.pixels), run.text(batch.tokens if prompt is None else prompt)
    if side == "forget":
        loss = forget_losses(v, t).mean()
        return loss, {"L_f": float(loss.detach())}
    halves = [h.mean() for h in contrastive_parts(v, t.expand(len(v), -1), run.scale())]
    loss = (halves[0] + halves[1]) / 2
    names = ("image_to_text_ce", "text_to_image_ce")
    return loss, {"L_r": float(loss.detach()), **{n: float(h.detach()) for n, h in zip(names, halves, strict=True)}}


def _accumulate(
    run: Run, total: dict[str, Tensor], running: dict[str, Tensor] | None, loss: Tensor, squared: bool
) -> None:
    if running is not None:
        run.add(running, loss)
    for name, g in (run.gradient(loss) if running is None else running).items():
        total[name].add_(g.square() if squared else g)

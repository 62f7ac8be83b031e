"""Images on demand: many prompts in batches, into a folder that a killed run continues.

Every image is a function of its :class:`Ask` and of the model. Whoever samples draws the noise from :attr:`Ask.key`
(:func:`first_noise`), so that the original and the erased model start from the same noise, in any batch, on any
device, and a part of a prompt list gives the images that the whole list would have given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.diffusion.asks import Ask as Ask
from expunge.diffusion.asks import about, distinct
from expunge.diffusion.asks import first_noise as first_noise
from expunge.diffusion.asks import prompts_from_csv as prompts_from_csv
from expunge.diffusion.asks import read_prompts as read_prompts
from expunge.diffusion.asks import repeated as repeated
from expunge.diffusion.image_folder import ImageFolder, load_images
from expunge.digest import model_digest
from expunge.errors import ConfigError, DataError, DivergedError

_SLACK = 1e-3
#: Settings of class-conditional sampling that an image depends on.
_OF_SAMPLING = ("steps", "guidance", "eta")
#: Draws images ``[N, 3, H, W]`` in [0, 1] for asks.
Sample = Callable[[Sequence[Ask]], Tensor]


def generate(
    sample: Sample,
    asks: Sequence[Ask],
    *,
    batch_size: int,
    folder: str | os.PathLike[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw all images, or read those that a folder already holds.

    Args:
        sample: Draws images ``[N, 3, H, W]`` in [0, 1] for asks.
        asks: What to draw.
        batch_size: Images per call of ``sample``.
        folder: Where the images are kept as PNG files, see :func:`generate_files`.
        facts: With a folder: what the images depend on beside the asks.
        progress: Show a progress bar on a terminal.

    Returns:
        uint8 ``[N, 3, H, W]`` in the order of the asks, on the CPU.

    Raises:
        ConfigError: No asks, a batch size below 1, or a folder without facts.
        DataError: Asks that share a file name; ``sample`` returned another shape, or values outside [0, 1].
        DivergedError: ``sample`` returned NaN or infinite values.
        ArtifactError: The folder holds images of something else.
    """
    if folder is not None:
        paths = generate_files(sample, asks, folder, batch_size=batch_size, facts=facts, progress=progress)
        return load_images(paths)
    _check(asks, batch_size)
    parts = []
    with progress_bar(len(asks), progress) as advance:
        for chunk in _chunks(asks, batch_size):
            parts.append(_drawn(sample, chunk))
            advance(len(chunk))
    return torch.cat(parts)


def generate_files(
    sample: Sample,
    asks: Sequence[Ask],
    folder: str | os.PathLike[str],
    *,
    batch_size: int,
    facts: Mapping[str, Any] | None,
    progress: bool = False,
) -> list[Path]:
    """Draw the images that a folder lacks; only one batch is in memory at a time.

    The folder holds ``{case}_{n}.png`` and ``generated.json`` with the facts and the asks. Each file is whole or absent
    and carries a stamp of its ask and of the facts, so a killed run continues where it was, and a file that is broken
    or was put there by something else is drawn again. More asks may be added later.

    Args:
        sample: Draws images ``[N, 3, H, W]`` in [0, 1] for asks.
        asks: What to draw.
        folder: Made if it does not exist.
        batch_size: Images per call of ``sample``.
        facts: JSON values that the images depend on beside the asks: digest of the model, sampler, steps, guidance,
            size, precision.
        progress: Show a progress bar on a terminal.

    Returns:
        Paths in the order of the asks.

    Raises:
        ConfigError: As :func:`generate`; or the folder was drawn with other facts or has other asks under the same
            names: the keys that differ are named.
        ArtifactError: The folder's list of images is not readable.
    """
    _check(asks, batch_size)
    distinct(asks, str(folder))
    kept = ImageFolder(Path(folder), asks, facts)
    missing = [a for a in asks if not kept.has(a)]
    with progress_bar(len(asks), progress, len(asks) - len(missing)) as advance:
        for chunk in _chunks(missing, batch_size):
            for ask, image in zip(chunk, _drawn(sample, chunk), strict=True):
                kept.put(ask, image)
            advance(len(chunk))
    return [kept.path(a) for a in asks]


def drawing_facts(task: Any) -> dict[str, Any]:
    """What the images of a diffusion task depend on beside the asks, as JSON values.

    Args:
        task: A diffusion task as it is now, patches included.
    """
    scheduler = getattr(task, "parts", task).scheduler
    settings = json.loads(scheduler.to_json_string())
    found: dict[str, Any] = {
        "model": model_digest(task.model),
        "family": task.name,
        "sampler": {k: v for k, v in settings.items() if not k.startswith("_")} | {"name": type(scheduler).__name__},
        "precision": str(next(task.model.parameters()).dtype).removeprefix("torch."),
        "device": task.device.type,
    }
    for name in ("steps", "guidance", "side", "vae_digest"):
        if hasattr(task, name):
            found[name] = getattr(task, name)
    if hasattr(task, "sampling"):
        found["sampling"] = {k: v for k, v in task.sampling.model_dump(mode="json").items() if k in _OF_SAMPLING}
    return found


def _drawn(sample: Sample, asks: Sequence[Ask]) -> Tensor:
    """One batch as uint8, checked."""
    with torch.no_grad():
        images = sample(asks).detach().float().cpu()
    if images.ndim != 4 or images.shape[:2] != (len(asks), 3):
        raise DataError(f"sampling: [{len(asks)}, 3, H, W] expected, got {list(images.shape)}")
    bad = [a for a, x in zip(asks, images, strict=True) if not bool(torch.isfinite(x).all())]
    if bad:
        raise DivergedError(f"sampling: {len(bad)} of {len(asks)} images are not finite, first {about(bad[0])}")
    low, high = images.aminmax()
    if low < -_SLACK or high > 1 + _SLACK:
        raise DataError(f"sampling: pixels in [0, 1] expected, got {float(low):.3g} to {float(high):.3g}")
    return (images * 255).round().clamp(0, 255).byte()


def _check(asks: Sequence[Ask], batch_size: int) -> None:
    if not asks or batch_size < 1:
        raise ConfigError(f"sampling needs asks and a batch size of at least 1, got {len(asks)} and {batch_size}")


def _chunks(asks: Sequence[Ask], size: int) -> Iterator[Sequence[Ask]]:
    for i in range(0, len(asks), size):
        yield asks[i : i + size]


@contextmanager
def progress_bar(total: int, shown: bool, done: int = 0, what: str = "drawing") -> Iterator[Callable[[int], None]]:
    """A bar on standard error; yields what moves it on."""
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.update(task, advance=count)

"""Train the judge of drawn figures that comes with the package: about a minute of one core.

    OMP_NUM_THREADS=1 python scripts/train_canvas_judge.py --out src/expunge/assets/canvas_judge --force

Writes half-precision weights and a README with the accuracies that were measured after they were read back.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

from expunge import files, rng
from expunge.data.canvas import draw_part
from expunge.data.canvas_draw import SHAPES, STYLES
from expunge.data.captions import CaptionedImages
from expunge.models.canvas_judge import CanvasJudge, judged, load_judge

console = Console()
BATCH = 128
NOISE = 0.08


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    steps: Annotated[int, typer.Option(min=2, help="Batches of 128 images, each image new.")] = 450,
    seed: Annotated[int, typer.Option(help="Seed of images and weights, another one than that of generators.")] = 1,
    test_images: Annotated[int, typer.Option(min=48, help="Held-out images of the accuracy table.")] = 4800,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 4e-3,
    force: Annotated[bool, typer.Option(help="Replace a folder that is there.")] = False,
) -> None:
    """Draw the images, train, write the folder and measure what was written."""
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} is there already; use --force to replace it", param_hint="--out")
    how: dict[str, Any] = {"steps": steps, "lr": lr, "seed": seed}
    start = time.process_time()
    judge = train(**how)
    spent = time.process_time() - start
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as room:
        folder = Path(room) / "new"
        folder.mkdir()
        state = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
        files.atomic_save_safetensors(folder / "model.safetensors", state)
        figures = measure(load_judge(folder), test_images, seed)
        files.atomic_write(folder / "README.md", readme(figures, how, spent, test_images))
        if out.exists():
            out.rename(Path(room) / "old")
        folder.rename(out)
    console.print(table(figures))
    console.print(f"{out}: {sum(f.stat().st_size for f in out.iterdir()) / 1000:.0f} kB, {spent:.0f} CPU seconds")


def train(*, steps: int, lr: float, seed: int) -> CanvasJudge:
    """Cross-entropies of both heads on fresh images, half of them blurred or noisy."""
    rng.seed_everything(seed)
    judge = CanvasJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    for step in track(range(steps), "training", console=console, transient=True):
        images = draw_part("train", torch.arange(step * BATCH, (step + 1) * BATCH), seed)
        verdict = judge(worn(images.images(torch.arange(BATCH))))
        objects, styles = (images.axes[name].labels for name in ("object", "style"))
        loss = cross_entropy(verdict.object, objects) + cross_entropy(verdict.style, styles)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            console.print(f"step {step + 1}: loss {loss.item():.4f}")
    return judge.eval()


def worn(x: Tensor) -> Tensor:
    """A quarter of the images with noise, a quarter slightly blurred, as generated images are; ``[B, 3, H, W]``."""
    kind = torch.randint(4, (len(x), 1, 1, 1))
    noisy = (x + NOISE * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)).clamp(0, 1)
    blurred = avg_pool2d(torch.nn.functional.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
    share = torch.rand(len(x), 1, 1, 1)
    return torch.where(kind == 0, noisy, torch.where(kind == 1, x + share * (blurred - x), x))


def measure(judge: CanvasJudge, n: int, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies (%) on held-out images: of both names at once, and along each axis; as drawn and worn."""
    test = draw_part("test", torch.arange(n), seed)
    x = test.images(torch.arange(n))
    rng.seed_everything(seed)
    return {**accuracies(judge, x, test), "noisy or blurred": {"both": percent(both(judge, worn(x), test))}}


def accuracies(judge: CanvasJudge, x: Tensor, drawn: CaptionedImages) -> dict[str, dict[str, float]]:
    """Shares named rightly in percent: both names, then each axis as a whole and class by class."""
    shown = {"object and style": {"both": percent(both(judge, x, drawn))}}
    for seen, (name, axis) in zip(judged(judge, x), drawn.axes.items(), strict=True):
        right = seen == axis.labels
        shown[name] = {"all": percent(right)}
        shown[name] |= {label: percent(right[axis.labels == k]) for k, label in enumerate(axis.classes)}
    return shown


def both(judge: CanvasJudge, x: Tensor, drawn: CaptionedImages) -> Tensor:
    """Whether object and style are both named rightly, bool ``[N]``."""
    objects, styles = judged(judge, x)
    return (objects == drawn.axes["object"].labels) & (styles == drawn.axes["style"].labels)


def percent(right: Tensor) -> float:
    """Share of true values in percent."""
    return 100 * float(right.double().mean())


def table(figures: dict[str, dict[str, float]]) -> Table:
    """The figures for the terminal."""
    shown = Table("what", "which", "accuracy %")
    for what, values in figures.items():
        for which, value in values.items():
            shown.add_row(what, which, f"{value:.2f}")
    return shown


def readme(figures: dict[str, dict[str, float]], how: dict[str, Any], spent: float, n: int) -> str:
    """What the folder is and how it was made."""
    settings = ", ".join(f"`--{k} {v}`" for k, v in how.items())
    lines = [f"| {what} | {which} | {value:.2f} |" for what, d in figures.items() for which, value in d.items()]
    return f"""# The judge of drawn figures

A network of six convolutions that names the object ({len(SHAPES)}) and the style ({len(STYLES)}) of an image of
`canvas`, the drawn data set of Expunge. It tells whether a generated image shows what was asked for; its 128 features
serve as those of FID and KID. Load it with `expunge.models.canvas_judge.load_judge()`: the weights are stored in half
precision and used in float32.

Made by `scripts/train_canvas_judge.py` ({settings}): {spent:.0f} seconds of one CPU core,
{how["steps"] * BATCH:,} images, each seen once, a quarter of them with noise and a quarter blurred. Images and weights
are computed, nothing was taken from elsewhere; the licence is the package's. The seed is not that of the generators it
judges.

Accuracy of these weights on {n:,} held-out images:

| what | which | accuracy (%) |
| --- | --- | --- |
{chr(10).join(lines)}
"""


if __name__ == "__main__":
    typer.run(main)

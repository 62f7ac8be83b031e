"""Train the small text-to-image pipeline that comes with the package, on the drawn set ``canvas``.

    OMP_NUM_THREADS=1 python scripts/train_canvas_diffusion.py --out src/expunge/assets/canvas_diffusion --force

About twenty minutes of one core; needs ``pip install "expunge[diffusion]"``. Three parts: an autoencoder, the text
tower of the CLIP in the package (frozen), and a U-Net on the latents. Writes a folder that diffusers loads, with
half-precision weights; its samples are judged after it was read back.

With ``--without ring`` the U-Net never sees that object (or style): what methods of forgetting are compared with. The
autoencoder is then that of the package, and ``model.safetensors`` has the weights for the ``reference`` of a run.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from expunge import files, rng
from expunge.data.canvas import FORMS, N_COMBINATIONS, canvas_captions, draw_part
from expunge.data.canvas_draw import SHAPES, STYLES
from expunge.data.captions import CaptionedImages
from expunge.diffusion.canvas import GUIDANCE, STEPS, CanvasPrompt, canvas_prompts, load_canvas_pipeline
from expunge.diffusion.sample import stable_diffusion_scheduler
from expunge.models.canvas_judge import judged, load_judge
from expunge.models.clip import ClipSpec, load_clip
from expunge.models.pipelines import TextToImage
from expunge.models.weights import save_weights

console = Console()
SIDE = 32
VAE_BATCH, UNET_BATCH = 32, 64
#: Of the training captions, so many are replaced by the empty one: what guidance steers away from.
DROPPED = 0.1
Figures = dict[str, dict[str, float]]


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vae_steps: Annotated[int, typer.Option(min=2, help="Batches of 32 images for the autoencoder.")] = 2000,
    steps: Annotated[int, typer.Option(min=2, help="Batches of 64 latents for the U-Net.")] = 2400,
    images: Annotated[int, typer.Option(min=96, help="Different training images.")] = 19_200,
    seed: Annotated[int, typer.Option(help="Seed of the images, the weights and the noise.")] = 0,
    samples: Annotated[int, typer.Option(min=48, help="Judged samples; there are 192 captions.")] = 384,
    without: Annotated[str | None, typer.Option(help="An object or style that is left out: a retrained model.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a folder that is there.")] = False,
) -> None:
    """Draw the images, train, write the folder and judge samples of what was written."""
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} is there already; use --force to replace it", param_hint="--out")
    if images % N_COMBINATIONS:
        raise typer.BadParameter(f"{images} is no multiple of {N_COMBINATIONS}", param_hint="--images")
    if without is not None and without not in (*SHAPES, *STYLES):
        raise typer.BadParameter(f"{without!r} is none of {', '.join((*SHAPES, *STYLES))}", param_hint="--without")
    how: dict[str, Any] = {"vae-steps": vae_steps, "steps": steps, "images": images, "seed": seed}
    drawn = draw_part("train", torch.arange(images), seed, SIDE)
    spent = {}
    start = time.process_time()
    if without is None:
        vae = train_vae(drawn, vae_steps, seed)
    else:
        vae, how = load_canvas_pipeline().vae, {**how, "without": without}
    spent["autoencoder"] = time.process_time() - start
    start = time.process_time()
    text_encoder, tokenizer = text_half()
    latents = encode(vae, drawn)
    if without is None:
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
    spent["latents"] = time.process_time() - start
    start = time.process_time()
    texts = {text: number for number, text in enumerate(["", *all_captions()])}
    states = embed(text_encoder, tokenizer, list(texts))
    chosen = torch.tensor([texts[caption] for caption in drawn.captions])
    seen = rows_without(drawn, without)
    unet = train_unet(latents[seen] * vae.config.scaling_factor, states, chosen[seen], steps, seed)
    spent["U-Net"] = time.process_time() - start
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as room:
        folder = Path(room) / "new"
        save(folder, vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer)
        figures = measure(folder, samples, seed)
        files.atomic_write(folder / "README.md", readme(figures, how, spent, samples))
        if without is not None:
            save_weights(TextToImage(unet, text_encoder), folder / "model.safetensors")
        if out.exists():
            out.rename(Path(room) / "old")
        folder.rename(out)
    console.print(table(figures))
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    console.print(f"{out}: {size / 1e6:.2f} MB, trained in {sum(spent.values()):.0f} CPU seconds")


def build_vae() -> Any:
    """The untrained autoencoder: 32 x 32 pixels to 8 x 8 x 4 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def build_unet() -> Any:
    """The untrained U-Net; despite its name, ``attention_head_dim`` is the number of heads."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def text_half() -> tuple[Any, Any]:
    """The text tower and the tokenizer of the CLIP in the package."""
    from transformers import CLIPTextModel

    towers: Any = load_clip(ClipSpec(name="canvas"))
    encoder = CLIPTextModel(towers.model.config.text_config)
    encoder.load_state_dict(towers.model.text_model.state_dict())
    return encoder.eval().requires_grad_(False), towers.tokenizer


def all_captions() -> list[str]:
    """The 48 captions in each of the four forms."""
    return [text for form in range(len(FORMS)) for text in canvas_captions(form)]


@torch.no_grad()
def embed(text_encoder: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """States ``[N, T, D]`` of texts, padded as the pipeline pads them."""
    found = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    states: Tensor = text_encoder(found["input_ids"]).last_hidden_state
    return states


def batches(n: int, size: int, steps: int, seed: int, what: str) -> Iterator[tuple[int, Tensor]]:
    """Numbered batches of rows: every epoch is another permutation, and its remainder is left out."""
    size = min(size, n)
    for step in track(range(steps), what, console=console, transient=True):
        epoch, place = divmod(step, n // size)
        if place == 0:
            order = rng.permutation(rng.key(seed, f"canvas {what}", epoch), n)
        yield step, order[place * size : (place + 1) * size]


def train_vae(drawn: CaptionedImages, steps: int, seed: int, lr: float = 2e-3) -> Any:
    """Squared and absolute errors of reconstructions with a slight pull of the latents to a normal distribution."""
    rng.seed_everything(rng.key(seed, "canvas autoencoder"))
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step, rows in batches(len(drawn), VAE_BATCH, steps, seed, "autoencoder"):
        x = 2 * drawn.images(rows) - 1
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        posterior = vae.encode(x).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        loss = mse_loss(rebuilt, x) + 0.3 * l1_loss(rebuilt, x) + 1e-6 * posterior.kl().mean()
        advance(vae, loss, optimizer, schedule)
        if (step + 1) % 250 == 0:
            console.print(f"autoencoder, step {step + 1}: loss {loss.item():.4f}")
    return vae.eval().requires_grad_(False)


def rows_without(drawn: CaptionedImages, name: str | None) -> Tensor:
    """Numbers of the images that do not show an object or style."""
    shown = torch.zeros(len(drawn), dtype=torch.bool)
    for axis in drawn.axes.values():
        if name in axis.classes:
            shown |= axis.labels == axis.classes.index(name)
    return torch.nonzero(~shown).flatten()


@torch.no_grad()
def encode(vae: Any, drawn: CaptionedImages) -> Tensor:
    """Means of the latents ``[N, 4, 8, 8]`` of all images."""
    rows = torch.arange(len(drawn)).split(240)
    return torch.cat([vae.encode(2 * drawn.images(part) - 1).latent_dist.mode() for part in rows])


def train_unet(latents: Tensor, states: Tensor, chosen: Tensor, steps: int, seed: int, lr: float = 2e-3) -> Any:
    """Predict the noise in latents ``[N, 4, 8, 8]`` from the states ``[C, T, D]`` of caption ``chosen[i]``.

    Row 0 of the states is the empty text. Returns the moving average of the weights.
    """
    rng.seed_everything(rng.key(seed, "canvas U-Net"))
    unet, scheduler = build_unet(), stable_diffusion_scheduler()
    averaged = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step, rows in batches(len(latents), UNET_BATCH, steps, seed, "U-Net"):
        clean, noise = latents[rows], torch.randn(len(rows), *latents.shape[1:])
        t = torch.randint(scheduler.config.num_train_timesteps, (len(rows),))
        captions = torch.where(torch.rand(len(rows)) < DROPPED, 0, chosen[rows])
        seen = scheduler.add_noise(clean, noise, t)
        loss = mse_loss(unet(seen, t, encoder_hidden_states=states[captions]).sample, noise)
        advance(unet, loss, optimizer, schedule)
        averaged.update_parameters(unet)
        if (step + 1) % 200 == 0:
            console.print(f"U-Net, step {step + 1}: loss {loss.item():.4f}")
    return averaged.module.eval().requires_grad_(False)


def advance(model: Any, loss: Tensor, optimizer: Any, schedule: Any) -> None:
    """One step of the optimiser with the gradient clipped to norm 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def save(folder: Path, *, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Write the pipeline in half precision; the models that are given stay as they are."""
    from diffusers import StableDiffusionPipeline

    halves = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    pipeline: Any = StableDiffusionPipeline(
        **{name: copy.deepcopy(model).half() for name, model in halves.items()},
        tokenizer=tokenizer,
        scheduler=stable_diffusion_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)


@torch.no_grad()
def measure(folder: Path, n: int, seed: int) -> Figures:
    """Shares (%) of samples and of reconstructions in which the judge sees what the caption says; and the PSNR."""
    pipeline, judge = load_canvas_pipeline(folder=folder), load_judge()
    every = [p for form in range(len(FORMS)) for p in canvas_prompts(form)]
    prompts = [every[i % len(every)] for i in range(n)]
    images = torch.cat([sample(pipeline, prompts[i : i + 96], seed + i) for i in range(0, n, 96)])
    objects, styles = judged(judge, images)
    asked = torch.tensor([[p.object, p.style] for p in prompts])
    right = torch.stack([objects, styles], 1) == asked
    test = draw_part("test", torch.arange(n), seed, SIDE)
    x = test.images(torch.arange(n))
    rebuilt = torch.cat([pipeline.vae(2 * part - 1).sample for part in x.split(240)]).clamp(-1, 1) / 2 + 0.5
    kept = [seen == axis.labels for seen, axis in zip(judged(judge, rebuilt), test.axes.values(), strict=True)]
    error = (rebuilt - x).square().mean(dim=(1, 2, 3))
    return {
        "samples": {"object and style": percent(right.all(1))},
        "object": {"all": percent(right[:, 0])}
        | {name: percent(right[asked[:, 0] == k, 0]) for k, name in enumerate(SHAPES)},
        "style": {"all": percent(right[:, 1])}
        | {name: percent(right[asked[:, 1] == k, 1]) for k, name in enumerate(STYLES)},
        "reconstructions": {
            "object and style": percent(kept[0] & kept[1]),
            "PSNR in dB": float(-10 * error.log10().mean()),
        },
    }


def sample(pipeline: Any, prompts: list[CanvasPrompt], seed: int) -> Tensor:
    """Images ``[N, 3, 32, 32]`` in [0, 1] of the prompts."""
    images: Tensor = pipeline(
        [p.text for p in prompts],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return images


def percent(right: Tensor) -> float:
    """Share of true values in percent."""
    return 100 * float(right.double().mean())


def table(figures: Figures) -> Table:
    """The figures for the terminal."""
    shown = Table("what", "which", "value")
    for what, values in figures.items():
        for which, value in values.items():
            shown.add_row(what, which, f"{value:.1f}")
    return shown


def readme(figures: Figures, how: dict[str, int], spent: dict[str, float], n: int) -> str:
    """What the folder is and how it was made."""
    settings = ", ".join(f"`--{k} {v}`" for k, v in how.items())
    lines = [f"| {what} | {which} | {value:.1f} |" for what, d in figures.items() for which, value in d.items()]
    seconds = ", ".join(f"{what} {value:.0f}" for what, value in spent.items())
    return f"""# A small text-to-image pipeline of drawn figures

A Stable Diffusion pipeline, tiny but complete, for {len(SHAPES)} shapes in {len(STYLES)} styles, the data set `canvas`
of Expunge: a model on which erasing a shape or a style can be tried in seconds. It draws 32 x 32 pixels from 8 x 8 x 4
latents and knows nothing else. Autoencoder of three blocks (16, 32, 64), U-Net of two (64, 64) with cross attention on
the text half of the package's CLIP (`canvas_clip`), which was not trained further.

The weights are stored in half precision. To use them in float32, which a CPU needs, say so:

```python
pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
pipeline = expunge.diffusion.canvas.load_canvas_pipeline()  # the same, of the folder in the package
pipeline("a star in neon style", num_inference_steps={STEPS}, guidance_scale={GUIDANCE:g}).images[0]
```

Made by `scripts/train_canvas_diffusion.py` ({settings}).
Seconds of one CPU core: {seconds}. Images and weights are computed, nothing was taken from
elsewhere; the licence is the package's. The training images are the first {how["images"]:,} of `canvas` with seed
{how["seed"]}, so a `canvas` training set of that seed and up to that size is what the model has seen. The U-Net has the
moving average of its weights over the last few hundred steps.

What `canvas_judge`, trained on images of another seed, sees in {n} samples ({STEPS} DDIM steps, guidance
{GUIDANCE:g}, the {len(FORMS) * N_COMBINATIONS} captions in turn), and in the autoencoder's reconstructions of as many
held-out images; in percent but for the PSNR:

| what | which | value |
| --- | --- | --- |
{chr(10).join(lines)}
"""


if __name__ == "__main__":
    typer.run(main)

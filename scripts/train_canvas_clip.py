"""Train the small CLIP that comes with the package, on the drawn set ``canvas``: about five minutes of one core.

    OMP_NUM_THREADS=1 python scripts/train_canvas_clip.py --out src/expunge/assets/canvas_clip --force

Needs ``pip install "expunge[clip]"``. Writes a folder that transformers loads (weights, configuration, tokenizer,
preprocessing, README) with half-precision weights, measured after they were read back.
"""

from __future__ import annotations

import json
import string
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from expunge import files, rng
from expunge.data.canvas import FORMS, N_COMBINATIONS, canvas_captions, combinations, draw_part
from expunge.data.canvas_draw import SHAPES, STYLES
from expunge.data.captions import Axis
from expunge.models.towers import Towers
from expunge.models.towers_hf import OPENAI_MEAN as MEAN
from expunge.models.towers_hf import OPENAI_STD as STD
from expunge.models.towers_hf import HFTowers
from expunge.slug.losses import contrastive_losses

console = Console()
SIDE = 32
CONTEXT = 16
END = "</w>"
WIDTH = 64
BLOCK = 50
MAX_LOG_SCALE = 4.6
#: Words of prompts that are no captions; letters and signs are in so that nothing is unknown: the unknown token of a
#: CLIP tokenizer is the end token, and the text would be cut there.
MORE_WORDS = ("the", "photo", "drawing", "shape", "this", "is", "with", "and", "no", "not", "one", "on", "background")
SIGNS = string.ascii_lowercase + string.digits + ".,:;!?'\"()-_/&"


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    steps: Annotated[int, typer.Option(min=2, help="Batches; each has one image of every combination.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the images and the weights.")] = 0,
    images: Annotated[int | None, typer.Option(min=48, help="Different training images; default: all new.")] = None,
    test_images: Annotated[int, typer.Option(min=48, help="Held-out images of the accuracy table.")] = 1920,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    without: Annotated[str | None, typer.Option(help="An object or style that is left out: a retrained model.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a folder that is there.")] = False,
) -> None:
    """Draw the images, train, write the folder and measure what was written."""
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} is there already; use --force to replace it", param_hint="--out")
    if images is not None and images % N_COMBINATIONS:
        raise typer.BadParameter(f"{images} is no multiple of {N_COMBINATIONS}", param_hint="--images")
    if without is not None and without not in (*SHAPES, *STYLES):
        raise typer.BadParameter(f"{without!r} is none of {', '.join((*SHAPES, *STYLES))}", param_hint="--without")
    how: dict[str, Any] = {"steps": steps, "lr": lr, "seed": seed, "images": images or steps * N_COMBINATIONS}
    rng.seed_everything(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    start = time.process_time()
    train(HFTowers(model, tokenizer, mean=MEAN, std=STD), without=without, **how)
    how |= {} if without is None else {"without": without}
    spent = time.process_time() - start
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as room:
        folder = Path(room) / "new"
        save(model, tokenizer, folder)
        figures = measure(folder, test_images, seed)
        files.atomic_write(folder / "README.md", readme(figures, how, spent, test_images))
        if out.exists():
            out.rename(Path(room) / "old")
        folder.rename(out)
    size = sum(f.stat().st_size for f in out.iterdir())
    console.print(table(figures))
    console.print(f"{out}: {size / 1000:.0f} kB, trained in {spent:.0f} CPU seconds")


def build_tokenizer() -> Any:
    """A CLIP tokenizer in which every word of the captions is one token."""
    from transformers import CLIPTokenizer

    words = {word for form in range(len(FORMS)) for text in canvas_captions(form) for word in text.split()}
    merges: Any = learn_merges(sorted(words | set(MORE_WORDS)))
    tokens = [*SIGNS, *(sign + END for sign in SIGNS), *(left + right for left, right in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one piece, the most frequent pair first, ties by the alphabet.

    The trainer of the tokenizers library breaks ties at random, so that weights would not fit a rebuilt tokenizer.
    """
    pieces = [[*word[:-1], word[-1] + END] for word in words]
    merges = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [merged(word, best) for word in pieces]
    return merges


def merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """A word's pieces with every occurrence of a pair joined, from the left."""
    joined: list[str] = []
    for piece in word:
        # A piece that was itself just joined is longer than the pair's left half, so it cannot join again.
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def build_model(tokenizer: Any) -> Any:
    """The untrained model; the tokenizer gives the size of the vocabulary and the token at which texts are pooled."""
    from transformers import CLIPConfig, CLIPModel

    ends = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shared = {"projection_dim": WIDTH}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **ends, **shared}
    text |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"image_size": SIDE, "patch_size": 4, "num_channels": 3, **shared}
    vision |= {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def train(towers: Towers, *, steps: int, lr: float, seed: int, images: int, without: str | None = None) -> None:
    """Symmetric contrastive training; one batch has one image of each combination, so no two captions agree."""
    model = towers.model
    shapes, styles = ([name for name in names if name != without] for names in (SHAPES, STYLES))
    kept = torch.tensor([s in shapes and t in styles for s in SHAPES for t in STYLES])
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    grid = (len(shapes), len(styles))
    model.train()
    for step in track(range(steps), "training", console=console, transient=True):
        if step % BLOCK == 0:
            wanted = torch.arange(step * N_COMBINATIONS, min(step + BLOCK, steps) * N_COMBINATIONS) % images
            block = draw_part("train", wanted, seed, SIDE)
            tokens = towers.tokenize(block.captions)
        rows = torch.arange(N_COMBINATIONS) + step % BLOCK * N_COMBINATIONS
        order = rows[combinations(block)[rows].argsort()][kept]
        image, text = towers.image(towers.preprocess(block.images(order))), towers.text(tokens[order])
        loss = contrastive_losses(image, text, towers.scale()).mean() + axis_loss(image, text, towers.scale(), grid) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.get_parameter("logit_scale").clamp_(max=MAX_LOG_SCALE)
        if (step + 1) % 250 == 0:
            console.print(f"step {step + 1}: loss {loss.item():.3f}")
    model.eval()


GRID = (len(SHAPES), len(STYLES))


def axis_loss(image: Tensor, text: Tensor, scale: Tensor, grid: tuple[int, int] = GRID) -> Tensor:
    """Cross-entropies of telling objects, and styles, by the mean of their captions, for one image per combination.

    Matching whole captions alone leaves the mean over the styles a poor prompt for an object.
    """
    images, texts = (normalize(embedded, dim=-1) for embedded in (image, text))
    places = torch.arange(grid[0] * grid[1]).reshape(grid)
    total = torch.zeros(())
    for averaged, labels in ((1, places // grid[1]), (0, places % grid[1])):
        means = normalize(texts.reshape(*grid, -1).mean(averaged), dim=-1)
        total = total + cross_entropy(scale * images @ means.T, labels.flatten())
    return total


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights in half precision, configuration, tokenizer and preprocessing."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    files.atomic_write(folder / "preprocessor_config.json", json.dumps(preprocessing, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


@torch.no_grad()
def measure(folder: Path, n: int, seed: int) -> dict[str, dict[str, float]]:
    """Zero-shot accuracies (%) of a written folder on held-out images: over the captions, and along each axis."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    towers = HFTowers(model, CLIPTokenizer.from_pretrained(folder), mean=MEAN, std=STD)
    test = draw_part("test", torch.arange(n), seed, SIDE)
    chunks = [towers.image(towers.preprocess(test.images(rows))) for rows in torch.arange(n).split(480)]
    images = normalize(torch.cat(chunks), dim=-1)
    shown: dict[str, dict[str, float]] = {"48 captions": {}}
    for form, text in enumerate(FORMS):
        texts = normalize(towers.text(towers.tokenize(canvas_captions(form))), dim=-1)
        shown["48 captions"][text] = percent((images @ texts.T).argmax(1) == combinations(test))
    for name, axis in test.axes.items():
        right = (images @ classifier(towers, axis).T).argmax(1) == axis.labels
        shown[name] = {"all": percent(right)}
        shown[name] |= {label: percent(right[axis.labels == k]) for k, label in enumerate(axis.classes)}
    return shown


def classifier(towers: Towers, axis: Axis) -> Tensor:
    """Directions of the classes ``[C, D]``: the normalised mean over the axis' templates of unit embeddings."""
    texts = [t.format(name) for name in axis.classes for t in axis.templates]
    each = normalize(towers.text(towers.tokenize(texts)), dim=-1)
    return normalize(each.reshape(len(axis.classes), len(axis.templates), -1).mean(1), dim=-1)


def percent(right: Tensor) -> float:
    """Share of true values in percent."""
    return 100 * float(right.double().mean())


def table(figures: dict[str, dict[str, float]]) -> Table:
    """The figures for the terminal."""
    shown = Table("what", "which", "accuracy %")
    for what, values in figures.items():
        for which, value in values.items():
            shown.add_row(what, which, f"{value:.1f}")
    return shown


def readme(figures: dict[str, dict[str, float]], how: dict[str, Any], spent: float, n: int) -> str:
    """What the folder is and how it was made."""
    settings = ", ".join(f"`--{k} {v}`" for k, v in how.items())
    lines = [f"| {what} | {which} | {value:.1f} |" for what, d in figures.items() for which, value in d.items()]
    return f"""# A small CLIP of drawn figures

{len(SHAPES)} shapes in {len(STYLES)} styles, the data set `canvas` of Expunge: a model on which forgetting a shape or a
style can be tried in seconds. Vision tower 4 blocks of width 96 on 4 x 4 patches, text tower 2 blocks of width 64,
common space of 64. The words of the captions and the letters are its vocabulary. It knows nothing else.

Made by `scripts/train_canvas_clip.py` ({settings}): {spent:.0f} seconds of one CPU core.
Images and weights are computed, nothing was taken from elsewhere; the licence is the package's. The training images are
the first {how["images"]:,} of `canvas` with seed {how["seed"]}, so a `canvas` training set of that seed and up to that
size is part of what the model has seen. Every batch has one image of each combination; the loss is the symmetric
contrastive one, plus half the cross-entropies of telling objects and styles by the mean embeddings of their captions.

Zero-shot accuracy of these half-precision weights on {n:,} held-out images; "object" and "style" with the
template-averaged classifiers of the axes:

| classes | captions or class | accuracy (%) |
| --- | --- | --- |
{chr(10).join(lines)}
"""


if __name__ == "__main__":
    typer.run(main)

"""The gradients of SLUG against the plain passes they need and against the published accumulation.

    OMP_NUM_THREADS=1 python benchmarks/slug_gradients.py [--forget N] [--retain N] [--repeat R] [--json FILE]

An open_clip model of 23.1 million parameters (six blocks of width 256 in each tower, images of 224 in patches of 32,
texts of 77 tokens), random pairs, batches of 16, one thread, CPU seconds. Every repetition runs all procedures one
after the other on the same batches, so that all meet the same load; the figures are medians over the repetitions. Plain
passes are forward and backward of the same losses for all parameters, with nothing done to the gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.models.towers import Tokens
from expunge.models.towers_open_clip import OpenClipTowers
from expunge.slug.differentiate import Loader, Pairs
from expunge.slug.gradients import forget_gradient, retain_gradient, slug_gradients
from expunge.slug.losses import contrastive_losses, forget_losses
from expunge.slug.scores import candidate_names

BATCH, CONTEXT, VOCABULARY = 16, 77, 49408


def make_towers() -> OpenClipTowers:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 224, "patch_size": 32, "width": 256, "layers": 6, "head_width": 64}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 256, "heads": 4, "layers": 6}
    return OpenClipTowers(CLIP(256, vision, text).eval())


def make_pairs(n: int, seed: int, same: bool = False) -> Loader:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, 224, 224, generator=generator)
    ids = torch.randint(1, VOCABULARY - 2, (1 if same else n, CONTEXT), generator=generator).expand(n, -1).contiguous()
    ids[:, 0], ids[:, 15] = VOCABULARY - 2, VOCABULARY - 1
    ids[:, 16:] = 0

    def batches() -> Iterator[Pairs]:
        for i in range(0, n, BATCH):
            yield Pairs(pixels[i : i + BATCH], Tokens(ids[i : i + BATCH]))

    return batches


def plain(towers: OpenClipTowers, forget: Loader, retain: Loader) -> None:
    """Forward and backward of both losses, batch by batch."""
    for pairs, loss in ((forget, forget_losses), (retain, None)):
        for batch in pairs():
            v, t = towers.image(batch.pixels), towers.text(batch.tokens)
            value = contrastive_losses(v, t, towers.scale()) if loss is None else loss(v, t)
            value.mean().backward()
            for p in towers.model.parameters():
                p.grad = None


def plain_whole(towers: OpenClipTowers, forget: Loader, retain: Loader) -> None:
    """The passes of a retain gradient over the whole split: embeddings first, then forward and backward."""
    with torch.no_grad():
        for batch in retain():
            towers.image(batch.pixels), towers.text(batch.tokens)
    plain(towers, forget, retain)


def published(towers: OpenClipTowers, forget: Loader, retain: Loader) -> None:
    """The public code's accumulation: training mode, every gradient added to a dictionary after every batch."""
    model = towers.model.train()
    for pairs, positive in ((forget, True), (retain, False)):
        total: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        count = 0
        for batch in pairs():
            model.zero_grad()
            v, t = (functional.normalize(x, dim=-1) for x in (towers.image(batch.pixels), towers.text(batch.tokens)))
            if positive:
                value = -nn.CosineEmbeddingLoss()(v, t, torch.ones(len(v)))
            else:
                logits, own = towers.scale() * v @ t.T, torch.arange(len(v))
                value = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
            value.backward()
            for n, p in model.named_parameters():
                if p.grad is not None:
                    total[n] += p.grad
            count += 1
        for n in total:
            total[n] /= count
    model.zero_grad(set_to_none=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", type=int, default=32)
    parser.add_argument("--retain", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    towers = make_towers()
    forget, retain = make_pairs(args.forget, 1), make_pairs(args.retain, 2)
    prompt = make_pairs(args.forget, 3, same=True)
    chosen, everything = candidate_names(towers), list(towers.parameters())
    size = sum(p.numel() for p in towers.model.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {args.forget} + {args.retain} pairs", flush=True)

    def embed() -> None:
        with torch.no_grad():
            for batch in prompt():
                towers.image(batch.pixels)

    runs: dict[str, Callable[[], object]] = {
        "plain passes": lambda: plain(towers, forget, retain),
        "library, candidates": lambda: slug_gradients(towers, forget, retain, batch_size=BATCH),
        "library, all parameters": lambda: slug_gradients(towers, forget, retain, names=everything, batch_size=BATCH),
        "published": lambda: published(towers, forget, retain),
        "plain passes, whole retain split": lambda: plain_whole(towers, forget, retain),
        "library, whole retain split": lambda: slug_gradients(towers, forget, retain),
        "forget gradient, both towers": lambda: forget_gradient(towers, forget, names=chosen),
        "forget gradient, vision": lambda: forget_gradient(towers, forget, "vision", names=_of(towers, "vision")),
        "one prompt, language": lambda: forget_gradient(towers, prompt, "language", names=_of(towers, "language")),
        "one prompt, naive loop": lambda: forget_gradient(
            towers, prompt, "language", names=_of(towers, "language"), collapse=False
        ),
        "image embeddings alone": embed,
        "retain gradient, vision, whole": lambda: retain_gradient(
            towers, retain, "vision", names=_of(towers, "vision")
        ),
    }
    seconds: dict[str, list[float]] = {n: [] for n in runs}
    for i in range(args.repeat + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if i:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    for name, values in seconds.items():
        print(f"{name:34} {statistics.median(values):8.3f} s")

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    found = {
        "candidates_over_plain": ratio("library, candidates", "plain passes"),
        "all_parameters_over_plain": ratio("library, all parameters", "plain passes"),
        "published_over_plain": ratio("published", "plain passes"),
        "whole_over_plain_whole": ratio("library, whole retain split", "plain passes, whole retain split"),
        "whole_over_plain": ratio("library, whole retain split", "plain passes"),
        "vision_over_both_towers": ratio("forget gradient, vision", "forget gradient, both towers"),
        "one_prompt_over_naive": ratio("one prompt, language", "one prompt, naive loop"),
        "one_prompt_text_seconds": statistics.median(
            a - b for a, b in zip(seconds["one prompt, language"], seconds["image embeddings alone"], strict=True)
        ),
    }
    for name, value in found.items():
        print(f"{name:26} {value:.3f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def _of(towers: OpenClipTowers, side: str) -> list[str]:
    return [n for n in candidate_names(towers) if towers.place(n).tower == side]


if __name__ == "__main__":
    main()

"""Cost of SLUG's search of the step, in CPU seconds on one core, against an evaluation that runs everything every time.

    OMP_NUM_THREADS=1 python benchmarks/slug_search.py [--names 1000] [--others 200] [--pairs 950] [--published 1]

The model has 23.1 M parameters (open_clip; both towers 6 blocks of 256; random weights). ``published`` is the pattern
of the public script for one probe: a copy of the model, paired losses of all splits, the classifier of all names, 10
at a time and at full context length, images one at a time; measured for a few probes and multiplied by ten. Recorded
for the script itself, on another core: 355 s for ten probes of a layer.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from expunge.models.towers import Tokens
from expunge.models.towers_open_clip import OpenClipTowers
from expunge.patch.low_rank import compress
from expunge.slug.differentiate import Pairs
from expunge.slug.gradients import forget_gradient
from expunge.slug.losses import contrastive_losses, forget_losses
from expunge.slug.probes import FullProbe, Prober, SearchSet, SuffixProbe, accuracy, edited
from expunge.slug.search import Probe, search

PROBES, K, CONTEXT, LONGEST, VOCABULARY = 10, 5, 77, 15, 49408
LAYERS = {
    "vision": "visual.transformer.resblocks.5.attn.out_proj.weight",
    "language": "transformer.resblocks.5.attn.out_proj.weight",
}


def build() -> OpenClipTowers:
    """The model of the recorded measurements."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=6, width=256, head_width=64, patch_size=32, image_size=224)
    text = CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCABULARY, width=256, heads=4, layers=6)
    model = CLIP(256, vision, text).eval()
    with torch.no_grad():
        for p in model.parameters():
            if not bool(p.any()):
                p.add_(1e-3 * torch.randn_like(p))
    return OpenClipTowers(model)


def texts(n: int, longest: int = LONGEST, seed: int = 1) -> Tokens:
    """Random names of 4 to ``longest`` tokens, padded to the context length, as the public code has them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(n, CONTEXT, dtype=torch.int64)
    lengths = torch.randint(4, longest + 1, (n,), generator=generator)
    lengths[0] = longest
    for row, length in zip(ids, lengths.tolist(), strict=True):
        row[:length] = torch.randint(1, VOCABULARY - 2, (length,), generator=generator)
        row[0], row[length - 1] = VOCABULARY - 2, VOCABULARY - 1
    return Tokens(ids)


@torch.no_grad()
def published_probe(
    towers: OpenClipTowers, data: SearchSet, names: Tokens, splits: list[Pairs], deltas: dict[str, Tensor]
) -> tuple[float, float]:
    """One probe of the public pattern; ``(forget top-5, utility top-1)``."""
    other = OpenClipTowers(copy.deepcopy(towers.model))
    with edited(other, deltas):
        for pairs in splits:
            for start in range(0, len(pairs), 16):
                rows = slice(start, start + 16)
                v, t = other.image(pairs.pixels[rows]), other.text(pairs.tokens[rows])
                contrastive_losses(v, t, other.scale())
                forget_losses(v, t)
        classifier = torch.cat(
            [functional.normalize(other.text(names[i : i + 10]), dim=-1) for i in range(0, len(names), 10)]
        )
        logits = torch.cat(
            [100 * functional.normalize(other.image(x[None]), dim=-1) @ classifier.T for x in data.images]
        )
    forget, utility = logits.split([len(data.forget), len(data.utility)])
    return accuracy(forget, data.forget_labels, K), accuracy(utility, data.utility_labels)


def run_search(prober: Prober, name: str, gradient: Tensor, unit: float) -> tuple[float | None, list[Any], float]:
    """Ten probes by the published loop: the answer, the figures of all probes, CPU seconds."""
    start = time.process_time()
    if isinstance(prober, SuffixProbe):
        prober.prepare([name])
    prober()

    def tried(alpha: float) -> Probe:
        figures = prober({name: alpha * unit * gradient})
        return Probe(alpha, figures.forget, figures.utility)

    found = search(tried, method="bisection", budget=PROBES)
    return found.alpha, [(p.alpha, p.forget, p.utility) for p in found.probes], time.process_time() - start


def patch_bytes(towers: OpenClipTowers, pixels: Tensor) -> dict[str, Any]:
    """Bytes of a change of one text tensor for a single prompt of 4 tokens, against the tensor itself."""
    prompt = texts(1, longest=4, seed=7)
    pairs = Pairs(pixels, prompt[torch.zeros(len(pixels), dtype=torch.int64)])
    names = [f"transformer.resblocks.4.{n}.weight" for n in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")]
    gradients, _ = forget_gradient(towers, lambda: iter([pairs]), names=names)
    found = {}
    for name, g in gradients.items():
        change = compress(g)
        assert change is not None
        whole = g.numel() * g.element_size()
        found[name] = {"kind": change.kind, "bytes": change.nbytes, "tensor": whole, "share": change.nbytes / whole}
    return found


def main() -> None:
    """Measure both towers and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=int, default=1000)
    parser.add_argument("--forget", type=int, default=20)
    parser.add_argument("--others", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=950, help="pairs of the splits whose losses the public code logs")
    parser.add_argument("--published", type=int, default=1, help="probes of the public pattern that are really run")
    parser.add_argument("--no-full", action="store_true", help="skip the batched evaluation of everything")
    args = parser.parse_args()
    torch.set_num_threads(1)
    towers, names = build(), texts(args.names)
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(1, 3, 224, 224, generator=generator)
    forget = base + 0.5 * torch.randn(args.forget, 3, 224, 224, generator=generator)
    utility = torch.randn(args.others, 3, 224, 224, generator=generator)
    cut = Tokens(names.ids[:, :LONGEST])
    free = SearchSet(forget, torch.zeros(args.forget).long(), utility, torch.zeros(args.others).long(), cut)
    first = FullProbe(towers, free).logits()
    labels = [first[0].mean(0).argmax().expand(args.forget), first[1].argmax(1)]  # what the model says is the truth
    data = SearchSet(forget, labels[0], utility, labels[1], cut)
    splits = [Pairs(torch.randn(args.pairs, 3, 224, 224, generator=generator), texts(args.pairs, seed=3))]
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in towers.model.parameters()), "towers": {}}
    for tower, name in LAYERS.items():
        pairs = Pairs(forget, cut[labels[0]])
        gradient = forget_gradient(towers, lambda pairs=pairs: iter([pairs]), names=[name])[0][name]  # type: ignore[misc]
        unit = float(towers.parameters()[name].detach().norm() / gradient.norm())
        suffix = SuffixProbe(towers, data, top_k=K)
        answer, log, seconds = run_search(suffix, name, gradient, unit)
        row: dict[str, Any] = {"cached_s": seconds, "alpha": answer, "notes": suffix.notes, "probes": log}
        if not args.no_full:
            full_answer, full_log, full_s = run_search(FullProbe(towers, data, top_k=K), name, gradient, unit)
            row |= {"full_batched_s": full_s, "same_probes": full_log == log, "same_alpha": full_answer == answer}
        start = time.process_time()
        seen = [
            published_probe(towers, data, names, splits, {name: alpha * unit * gradient})
            for alpha, _, _ in log[: args.published]
        ]
        if seen:
            row["published_probe_s"] = (time.process_time() - start) / len(seen)
            row["published_s"] = PROBES * row["published_probe_s"]
            row["speed_up"] = row["published_s"] / seconds
            row["published_same"] = seen == [(f, u) for _, f, u in log[: len(seen)]]
        result["towers"][tower] = row
    result["single_prompt_patches"] = patch_bytes(towers, forget)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""What a run on a text-to-image pipeline will cost: sizes, passes, memory and time, from configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expunge.context import Context
from expunge.diffusion.selection import key_value, matrices
from expunge.diffusion.shapes import Shape, count, one_pass
from expunge.diffusion.shift import storage
from expunge.errors import CapabilityError, RequestError
from expunge.models.pipelines import TextToImage
from expunge.recipe import Recipe
from expunge.spaces.base import select_parameters
from expunge.spaces.unet_set import unet_parameters
from expunge.tasks.base import Split

if TYPE_CHECKING:
    from rich.table import Table

#: Spaces that open on shapes as they do on weights.
_DIRECT = ("all", "layers", "matched_layers", "unet_set", "cross_attention")
#: Samples of a role whose size is not given.
_SAMPLES = 1000
#: Steps of the sampler where only the task knows them.
_SAMPLING = 50
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_ACTIVATIONS = "activations"
#: What an update needs; by then activations are gone.
_UPDATE = ("gradients", "optimiser's workspace")
_STATES = {"adam": 8, "adamw": 8, "sgd": 4}


@dataclass(frozen=True)
class Passes:
    """Passes of the U-Net per sample of a step.

    Args:
        graded: With a backward pass.
        free: Without gradients: the original model's, and those of sampling.
    """

    graded: float
    free: float


@dataclass(frozen=True)
class Plan:
    """The cost of a run, predicted.

    Args:
        method: Name of the recipe.
        pipeline: Name of the shape.
        unet: Weights of the U-Net.
        text: Weights of the text encoders.
        trained: Numbers that the optimiser moves.
        changed: Weights of the model that may change.
        tensors: Tensors that may change.
        patch_bytes: Of the patch, at most.
        directions: Directions that protected prompts leave to SRS-ME; None for other methods.
        steps: Steps of the run, at most.
        samples: Samples of a step, of all roles together.
        passes: Per sample.
        flops: Operations of a step.
        memory: Bytes on the device, by what they are for.
        host: Bytes in host memory: the pipeline as loaded, from which the model is put back, and the autoencoder. On
            the CPU what of it is not among the weights above.
        seconds: Of the whole run, if a speed was given.
        notes: What the figures leave out.
    """

    method: str
    pipeline: str
    unet: int
    text: int
    trained: int
    changed: int
    tensors: int
    patch_bytes: int
    directions: int | None
    steps: int
    samples: int
    passes: Passes
    flops: float
    memory: Mapping[str, int]
    host: int
    seconds: float | None
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes on the device at the worst moment: gradients come as activations go."""
        passing, update = ({w: self.memory.get(w, 0) for w in names} for names in ((_ACTIVATIONS,), _UPDATE))
        rest = sum(size for what, size in self.memory.items() if what not in {**passing, **update})
        return rest + max(sum(passing.values()), sum(update.values()))


def plan(
    recipe: Recipe,
    shape: Shape,
    *,
    sizes: Mapping[str, int] | None = None,
    protected: int | None = None,
    speed: float | None = None,
    stored: int = 4,
    side: int | None = None,
    checkpointing: bool = False,
    on_cpu: bool = False,
) -> Plan:
    """Predict the cost of a recipe without loading a weight.

    Args:
        recipe: How to forget.
        shape: Of the pipeline, from :func:`~expunge.diffusion.shapes.shape_of`.
        sizes: Samples by role; 1000 of each by default.
        protected: SRS-ME: prompts that stay beside the empty one; by default those that the recipe lists.
        speed: Operations per second that the device reaches in such a model (a third of its nominal figure, say).
        stored: Bytes of a weight as the pipeline is loaded.
        side: Latent cells along one side; those of the U-Net's configuration by default.
        checkpointing: With gradient checkpointing.
        on_cpu: For a run on the CPU; on a GPU optimisers take room for one more copy of what they move.

    Raises:
        RequestError: The recipe's space does not fit the model, or protected prompts leave no direction.
        CapabilityError: A space whose size cannot be told from shapes.
    """
    model = shape.build()
    notes = ["memory of kernels' workspaces and of fragmentation is not counted"]
    if checkpointing:
        notes.append("with gradient checkpointing: one more pass for each with gradients")
    targets, keep = _targets(recipe, model)
    for p in model.parameters():
        p.requires_grad_(False)
    for p in targets.values():
        p.requires_grad_(True)
    changed = sum(p.numel() for p in targets.values())
    trained, patch_bytes, left = changed, 4 * changed, None
    if recipe.space.part_name == "concept_shift":
        left = directions(shape, _protected(recipe, protected))
        weights = matrices(targets)
        trained = left * sum(m.rows for m in weights.values())
        patch_bytes = storage(weights, left).smallest
    elif keep < 1:
        notes.append("the mask holds back weights, not memory: gradients and optimiser states are those of all")
        changed = round(keep * changed)
        patch_bytes = min(4 * changed + trained // 8, 4 * trained)
    steps, samples, at_once = _steps(recipe, sizes or {})
    passes = passes_of(recipe)
    kind = torch.float32 if recipe.optim.precision == "fp32" else torch.bfloat16
    single = one_pass(model.unet, kind, side=side, again=checkpointing)
    forward = samples * single.flops
    share = sum(p.numel() for n, p in targets.items() if n.startswith("unet.")) / count(model.unet)
    flops = forward * (passes.free + passes.graded * (2 + share + checkpointing))
    before, remark = before_the_first_step(recipe)
    notes += [remark] if remark else []
    saved = round(at_once * single.saved * passes.graded)
    masters = count(model)
    if stored < 4 and not recipe.full_precision:
        masters = sum(p.numel() for p in model.masters(_wanted(recipe, model, targets)))
        notes.append("the pipeline is in half precision: float32 only where it is trained, and the U-Net's vectors")
    elif stored < 4:
        notes.append("the pipeline is in half precision, but this recipe holds every weight in float32")
    memory = _memory(recipe, model, trained, changed, saved, masters, pieces=at_once < samples, on_cpu=on_cpu)
    originals = count(model) if not on_cpu else masters if stored < 4 else 0
    host = 4 * shape.autoencoder + stored * originals
    if recipe.edit is not None:
        notes.append("an edit in one go; passes over data that it makes are not counted")
        steps = 0
    if recipe.objective is not None and recipe.objective.part_name == "esd":
        notes.append("passes of a step are a mean: the number of sampling steps is drawn")
    return Plan(
        method=recipe.name,
        pipeline=shape.name,
        unet=count(model.unet),
        text=count(model) - count(model.unet),
        trained=0 if recipe.edit is not None else trained,
        changed=changed,
        tensors=len(targets),
        patch_bytes=patch_bytes,
        directions=left,
        steps=steps,
        samples=samples,
        passes=passes,
        flops=flops,
        memory=memory,
        host=host,
        seconds=None if speed is None else (steps * flops + before * single.flops) / speed,
        notes=tuple(notes),
    )


def directions(shape: Shape, protected: int) -> int:
    """Directions that ``protected`` prompts beside the empty one leave, ``d - T - (T - 1) m``.

    The text encoder is causal, so prompts share the state of the first token and nothing else. Prompts with a longer
    common beginning leave more.

    Raises:
        RequestError: None is left.
    """
    left = shape.width - shape.tokens - (shape.tokens - 1) * protected
    if left < 1:
        most = (shape.width - shape.tokens - 1) // (shape.tokens - 1)
        raise RequestError(
            f"{protected} prompts beside the empty one leave none of {shape.width} directions; at most {most} fit"
        )
    return left


def passes_of(recipe: Recipe) -> Passes:
    """Passes of the U-Net per sample: those of the method's own objective, or one graded pass."""
    own: Any = recipe.objective
    if own is None:
        return Passes(0, 0)
    if own.part_name == "esd":
        sampling = (own.inference_steps - 1) / 2 * (1 if own.guidance == 1 else 2) if own.x_t == "sampled" else 0
        return Passes(1, sampling + (2 if own.erase_from is None else 3))
    if own.part_name == "concept_correlation":
        return Passes(1 if recipe.space.part_name == "concept_shift" else 2, 2)
    if own.part_name == "ablating_concepts":
        return Passes(1 + (own.prior > 0), 0 if own.variant == "noise" else 1)
    goals = {"pseudo_label": 1, "denoising_esd": 2}.get(own.part_name, 0)  # of forget samples only
    return Passes(1, goals / len(own.schedule.roles()))


def before_the_first_step(recipe: Recipe) -> tuple[float, str]:
    """What a method does before it trains, counted in passes of one sample without gradients, and a remark on it."""
    own: Any = recipe.objective
    if own is not None and own.part_name == "forget_me_not" and own.inversion is not None:
        samples = own.inversion.steps * own.inversion.batch_size
        remark = f"textual inversion first: {own.inversion.steps} steps of {own.inversion.batch_size} for each concept"
        return 2.0 * samples, remark  # forward, and backward to the text alone
    if own is not None and own.part_name == "ablating_concepts" and "concept" in own.schedule.roles():
        steps = own.anchor_steps or _SAMPLING
        told = "" if own.anchor_steps else "; the number of steps is taken to be 50"
        passes = own.anchor_images * steps * (1 if own.anchor_guidance == 1 else 2)
        return float(passes), f"anchors are drawn first: {own.anchor_images} images of {steps} steps{told}"
    return 0.0, ""


def table(found: Plan) -> Table:
    """The plan for the terminal."""
    from rich.table import Table

    shown = Table("what", "predicted", title=f"{found.method} on {found.pipeline}")
    shown.columns[1].justify = "right"
    for what, value in rows(found):
        shown.add_row(what, value)
    return shown


def rows(found: Plan) -> list[tuple[str, str]]:
    """The plan as names and values."""
    shown = [
        ("U-Net, weights", f"{found.unet:,}"),
        ("text encoders, weights", f"{found.text:,}"),
        ("may change", f"{found.changed:,} in {found.tensors} tensors"),
        ("trained numbers", f"{found.trained:,}"),
        ("patch, at most", megabytes(found.patch_bytes)),
        ("steps, at most", f"{found.steps:,} of {found.samples} samples"),
        ("U-Net passes per sample", f"{found.passes.graded:g} with gradients, {found.passes.free:g} without"),
        ("operations per step", f"{found.flops / 1e12:.3g} T"),
        *((f"device memory: {what}", megabytes(size)) for what, size in found.memory.items()),
        ("device memory, peak", megabytes(found.peak)),
        ("host memory: pipeline as loaded", megabytes(found.host)),
    ]
    if found.directions is not None:
        shown.insert(4, ("directions left by protected prompts", f"{found.directions}"))
    if found.seconds is not None:
        shown.append(("time", f"{found.seconds / 60:.3g} minutes"))
    return shown


def megabytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _targets(recipe: Recipe, model: TextToImage) -> tuple[dict[str, nn.Parameter], float]:
    """Parameters that may change, by name in the whole model, and the share of them that a mask lets through."""
    kind, space = recipe.space.part_name, recipe.space
    if kind == "concept_shift":
        return {f"unet.{n}": p for n, p in key_value(model.unet).items()}, 1.0
    if kind in _DIRECT:
        task: Any = SimpleNamespace(model=model, unet=model.unet, name="text_to_image", states=None)
        task.require = lambda needs, who: None  # it offers what a text-to-image task does
        empty = torch.empty(0, dtype=torch.int64)
        opened = space.open(Context(task, Split({"forget": empty, "retain": empty})))
        names = {id(p): n for n, p in model.named_parameters()}
        return {names[id(p)]: p for p in opened.parameters.values()}, 1.0
    if kind in ("saliency_mask", "denoising_mask"):
        chosen: Any = space
        if getattr(chosen, "parameters", None) is not None:
            found = unet_parameters(model, model.unet, chosen.parameters)
        else:
            found = select_parameters(model, ("unet.*",) if chosen.targets == ("*",) else chosen.targets)
        return found, float(chosen.keep)
    raise CapabilityError(f"how large the space '{kind}' is cannot be told without weights")


def _wanted(recipe: Recipe, model: TextToImage, targets: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """What the space holds in float32: nothing of a shift; where a mask is computed, the whole U-Net."""
    if recipe.space.part_name == "concept_shift":
        return []
    computed = "mask" in recipe.space.part_name and getattr(recipe.space, "file", None) is None
    return [*targets.values(), *(model.unet.parameters() if computed else ())]


def _protected(recipe: Recipe, given: int | None) -> int:
    if given is not None:
        return given
    space: Any = recipe.space
    return len({*space.protect, *space.watermarks} - {""})


def _steps(recipe: Recipe, sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """Steps of the run, samples of its largest step, and how many of them are in memory at once."""
    if recipe.objective is None:
        return 0, 1, 1
    schedule, optim = recipe.objective.schedule, recipe.optim
    known = {r: sizes.get(r, _SAMPLES) for r in ("forget", "retain", "concept", "surrogate")}
    known["mixed"] = sizes.get("mixed", known["forget"] + known["retain"])
    epoch = schedule.steps({r: known[r] for r in schedule.roles()}, 0, 0)
    total = len(epoch) * optim.epochs
    samples = max(sum(len(ids) for ids in step.values()) for step in epoch)
    cut = optim.micro_batch or max(len(ids) for step in epoch for ids in step.values())
    at_once = max(sum(min(len(ids), cut) for ids in step.values()) for step in epoch)
    return min(total, optim.max_steps or total), samples, at_once


def _memory(
    recipe: Recipe,
    model: nn.Module,
    trained: int,
    changed: int,
    saved: int,
    masters: int,
    *,
    pieces: bool,
    on_cpu: bool,
) -> dict[str, int]:
    memory, half = {"weights, float32": 4 * masters}, "weights, half precision"
    if masters < count(model):
        memory[half] = 2 * (count(model) - masters)
    if recipe.edit is not None:
        return memory
    optim, own, kind = recipe.optim, recipe.objective, recipe.space.part_name
    states = 0 if optim.name == "sgd" and not optim.momentum else _STATES[optim.name]
    memory["optimiser"] = states * trained
    if kind != "concept_shift":
        memory["first values of what is trained"] = 4 * trained
    if "mask" in kind:
        memory["mask"] = trained
    if _BYTES[optim.precision] < 4:
        memory[half] = 2 * count(model)  # those that stay as loaded, and what autocast makes of the others
    if pieces:
        memory["gradients of earlier pieces"] = 4 * trained
    else:
        memory[_UPDATE[0]] = 4 * trained
    if not on_cpu and (optim.name != "sgd" or optim.weight_decay):
        memory[_UPDATE[1]] = 4 * trained
    if getattr(own, "lambda_l1", 0):
        saved += 4 * changed
    return {**memory, _ACTIVATIONS: saved}

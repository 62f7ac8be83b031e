"""Erased Stable Diffusion (ESD): train the prediction for a prompt to be the negatively guided one.

Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023, equation (7). The three generations of the public
code (rohitgandikota/erasing) differ in the first term of the target, so that the same ``eta`` means different things:

========================= =========================================== ==========================
convention                plain erasure                               with another prompt erased from
========================= =========================================== ==========================
``current`` (esd_sd.py)   ``eps_c - eta (eps_c - eps_null)``          ``eps_from - eta (eps_c - eps_null)``
``paper`` (train-esd.py)  ``eps_null - eta (eps_c - eps_null)``       none
``alternative``           ``eps_null - eta (eps_c - eps_null)``       ``eps_from - eta (eps_c - eps_null)``
========================= =========================================== ==========================

All predictions of the target come from the frozen model. Where ``x_t`` comes from is the caller's choice;
:func:`denoise` is what the scripts do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from expunge import rng
from expunge.diffusion.process import Eps
from expunge.errors import ConfigError

Convention = Literal["current", "paper", "alternative"]


class Sampler(Protocol):
    """What :func:`denoise` uses of a diffusers scheduler."""

    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int) -> Any:
        """Fix the list of times."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """What the model sees of a sample."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        """One step; the result has the sample as ``prev_sample``."""


@dataclass(frozen=True, eq=False)
class States:
    """Prompt states of one erasure, each ``[B, T, D]`` or ``[1, T, D]``.

    Args:
        concept: Of the concept that goes.
        null: Of the empty prompt.
        erase_from: Of the prompt whose prediction is trained; the concept's own by default.
    """

    concept: Tensor
    null: Tensor
    erase_from: Tensor | None = None

    @property
    def trained(self) -> Tensor:
        """The states under which the model is trained."""
        return self.concept if self.erase_from is None else self.erase_from


def target(
    eps_concept: Tensor,
    eps_null: Tensor,
    eta: float,
    *,
    eps_from: Tensor | None = None,
    convention: Convention = "current",
) -> Tensor:
    """The prediction to train towards, ``[B, C, H, W]``; see the table of the module.

    Args:
        eps_concept: Frozen prediction for the concept.
        eps_null: Frozen prediction for the empty prompt.
        eta: Strength of the negative guidance, in the convention's own counting.
        eps_from: Frozen prediction for the prompt that is erased from, where it is another one.
        convention: Which generation of the code.

    Raises:
        ConfigError: ``eps_from`` was given to the paper's form, which has no such term.

    Deviates: The alternative script forms each prediction as ``eps_null + 1 (eps - eps_null)``; here it is ``eps``.
    """
    if convention == "paper" and eps_from is not None:
        raise ConfigError("the paper's form of ESD erases from the concept itself; take 'current' or 'alternative'")
    if eps_from is not None:
        first = eps_from
    else:
        first = eps_concept if convention == "current" else eps_null
    return first - eta * (eps_concept - eps_null)


def convert_eta(eta: float, source: Convention, to: Convention) -> float:
    """The ``eta`` of plain erasure that gives the same target in another convention.

    >>> convert_eta(1.0, "paper", "current"), convert_eta(2.0, "current", "alternative")
    (2.0, 1.0)
    """
    return eta + (source != "current") - (to != "current")


def losses(
    student: Eps,
    teacher: Eps,
    x_t: Tensor,
    t: Tensor,
    states: States,
    *,
    eta: float,
    convention: Convention = "current",
) -> Tensor:
    """Mean squared distance of the trained prediction to the target, per sample, ``[B]``.

    Args:
        student: The model being trained.
        teacher: The frozen model; called without gradients, once on all prompts together.
        x_t: ``[B, C, H, W]``.
        t: int64 ``[B]``.
        states: The prompts.
        eta: Strength of the negative guidance.
        convention: Which generation of the code the target follows.

    Raises:
        ConfigError: See :func:`target`.
    """
    n = len(x_t)
    prompts = [states.concept, states.null] + ([] if states.erase_from is None else [states.erase_from])
    with torch.no_grad():
        every = torch.cat([p.expand(n, -1, -1) for p in prompts])
        parts = teacher(_times(x_t, len(prompts)), _times(t, len(prompts)), every).split(n)
        goal = target(parts[0], parts[1], eta, eps_from=parts[2] if len(parts) == 3 else None, convention=convention)
    prediction = student(x_t, t, states.trained.expand(n, -1, -1))
    return (prediction - goal).square().mean((1, 2, 3))


def first_losses(eps_concept: Tensor, eps_null: Tensor, eta: float, convention: Convention = "current") -> Tensor:
    """The losses of plain erasure before the first update, ``[B]``: where student and teacher are one model.

    ``eta^2`` times the mean squared difference of the two predictions, or ``(1 + eta)^2`` times for the other forms.
    """
    factor = convert_eta(eta, convention, "current") ** 2
    return factor * (eps_concept - eps_null).square().mean((1, 2, 3))


@torch.no_grad()
def denoise(
    eps: Eps,
    scheduler: Sampler,
    noise: Tensor,
    states: Tensor,
    null: Tensor,
    *,
    guidance: float,
    total: int,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The sample after the first ``steps`` of a scheduler's list of times, and the time that comes next.

    Args:
        eps: The model that samples: frozen in the current script, the trained one in the others.
        scheduler: A diffusers scheduler; its list is set anew.
        noise: ``[B, C, H, W]``, standard normal.
        states: Of the prompt, ``[B, T, D]`` or ``[1, T, D]``.
        null: Of the empty prompt.
        guidance: ``eps_null + guidance (eps - eps_null)``.
        total: Inference steps. PNDM's list has one entry more, its second time twice; it is indexed as it is.
        steps: How many entries of the list to go through.

    Returns:
        ``x_t`` and ``t``, 0-d.

    Raises:
        ConfigError: The list has no entry after ``steps``.
    """
    scheduler.set_timesteps(total)
    times = scheduler.timesteps
    if not 0 <= steps < len(times):
        raise ConfigError(f"{steps} steps leave no time to train at; the list of times has {len(times)}")
    n = len(noise)
    both = torch.cat([null.expand(n, -1, -1), states.expand(n, -1, -1)])
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in times[:steps]:
        shown = scheduler.scale_model_input(x, t)
        at = t.to(shown.device, torch.int64).expand(2 * n)
        without, given = eps(_times(shown, 2), at, both).chunk(2)
        x = scheduler.step(without + guidance * (given - without), t, x).prev_sample
    return x, times[steps].to(torch.int64)


def alternative_time(scheduler: Sampler, steps: int, total: int = 50) -> int:
    """The time at which the alternative script trains after ``steps`` of ``total`` sampling steps.

    Entry ``int(steps / total * 1000)`` of the scheduler's list of 1000 times, to which it is set anew.
    """
    scheduler.set_timesteps(1000)
    return int(scheduler.timesteps[int(steps / total * 1000)])


def draw_steps(key: int, ids: Tensor, convention: Convention, total: int = 50) -> Tensor:
    """How many sampling steps each sample goes through, int64 like ``ids``.

    Uniform on ``0..total-1``; the alternative script leaves out the first and the last (``1..total-2``).

    Args:
        key: From :func:`expunge.rng.key`, per step of training.
        ids: Positions or sample ids.
        convention: Which generation of the code.
        total: Inference steps.
    """
    if convention == "alternative":
        return 1 + rng.randint(key, ids, total - 2)
    return rng.randint(key, ids, total)


def draw_paper_times(key: int, ids: Tensor, steps: Tensor, total: int = 50, train_times: int = 1000) -> Tensor:
    """The paper's time of training: uniform within the bin of the ``steps``-th inference time from the clean end.

    Bin ``i`` is ``[i w, (i + 1) w)`` with ``w = train_times / total``.
    """
    low = (steps * train_times / total).round().long()
    high = ((steps + 1) * train_times / total).round().long()
    return low + rng.randint(key, ids, 2**52, stream=1) % (high - low)


#: Settings of the public scripts, by preset.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "diffusers-2024": MappingProxyType(
            {"convention": "current", "eta": 2.0, "guidance": 3.0, "lr": 5e-5, "steps": 200, "sampler": "teacher"}
        ),
        "diffusers-2024-sdxl": MappingProxyType(
            {"convention": "current", "eta": 1.0, "guidance": 2.0, "lr": 2e-4, "steps": 200, "sampler": "teacher"}
        ),
        "alternative": MappingProxyType(
            {"convention": "alternative", "eta": 2.0, "guidance": 3.0, "lr": 2e-5, "steps": 200, "sampler": "student"}
        ),
        "paper": MappingProxyType(
            {"convention": "paper", "eta": 1.0, "guidance": 3.0, "lr": 1e-5, "steps": 1000, "sampler": "student"}
        ),
    }
)


def artefact_name(concept: str, train_method: str, erase_from: str | None = None) -> str:
    """File name under which the current script saves the trained tensors.

    >>> artefact_name("Van Gogh", "esd-x")
    'esd-Van_Gogh-from-Van_Gogh-esdx.safetensors'
    """
    source = concept if erase_from is None else erase_from
    return (
        f"esd-{concept.replace(' ', '_')}-from-{source.replace(' ', '_')}-{train_method.replace('-', '')}.safetensors"
    )


def _times(x: Tensor, count: int) -> Tensor:
    return x.repeat(count, *[1] * (x.ndim - 1))

"""What several methods share: schedules by name and objectives by name."""

from __future__ import annotations

from typing import Any, Literal

from expunge.errors import ConfigError
from expunge.objectives.base import Objective
from expunge.recipe import Optim
from expunge.schedule import Paired, Schedule, Sequential, Single

#: How forget and retain batches interleave.
Mixing = Literal["sequential", "mixed", "forget_only", "paired"]
#: ``as_intended``: what the paper's mathematics gives. ``as_published``: what its code computes.
Profile = Literal["as_intended", "as_published"]

SALUN_PAPER = "Fan et al., SalUn, ICLR 2024, arXiv 2310.12508"
SALUN_CODE = "OPTML-Group/Unlearn-Saliency"
SALUN_COMMIT = "a6e89fd"
DEEPDIVE_CODE = "lorenzoorsingher/SalUn_DeepDive"
DEEPDIVE_COMMIT = "8277bbe"


def make_schedule(mixing: Mixing, batch_size: int, *, shuffle: bool = True) -> Schedule:
    """Build the schedule that a mixing name stands for."""
    if mixing == "sequential":
        return Sequential(batch_size=batch_size, shuffle=shuffle)
    if mixing == "paired":
        return Paired(batch_size=batch_size, shuffle=shuffle)
    return Single(role="mixed" if mixing == "mixed" else "forget", batch_size=batch_size, shuffle=shuffle)


#: What a forget sample's condition is taught to mean instead: see :class:`expunge.objectives.conditioning.PseudoLabel`.
Pseudo = Literal["class", "next", "retain"] | tuple[str, ...] | dict[str, str]


def refuse_lost(on: str, pseudo: Pseudo | None, eta: float | None) -> None:
    """Refuse settings of another objective.

    Raises:
        ConfigError: One would have no effect.
    """
    for name, value, owner in (("pseudo", pseudo, "random_label"), ("eta", eta, "esd")):
        if value is not None and on != owner:
            raise ConfigError(f"'{name}' would have no effect with on = '{on}'; it belongs to '{owner}'")


def make_objective(
    on: str,
    mixing: Mixing | None,
    batch_size: int,
    *,
    exclude_true: bool = True,
    alpha: float = 1.0,
    pseudo: Pseudo | None = None,
    eta: float | None = None,
) -> Objective:
    """Build an objective by name with a schedule, its customary one if ``mixing`` is ``None``.

    With ``pseudo`` random labels are those of diffusion models; ``esd`` is the guided target on noised forget images.

    Random labels as published go over the forget set first. With frozen normalisation that pass alone can break a
    network beyond what the retain pass repairs, so the corrected form (``exclude_true``) shuffles both together.

    Raises:
        ConfigError: No objective has this name; or ``pseudo`` or ``eta`` would have no effect.
    """
    spec: dict[str, Any] = {"kind": on}
    refuse_lost(on, pseudo, eta)
    if on == "esd" or pseudo is not None:
        spec = {"kind": "denoising_esd" if on == "esd" else "pseudo_label", "alpha": alpha}
        spec |= {"schedule": make_schedule(mixing or "paired", batch_size)}
        spec |= {"pseudo": pseudo} if on != "esd" else {} if eta is None else {"eta": eta}
    elif on == "random_label":
        spec |= {"schedule": make_schedule(mixing or ("mixed" if exclude_true else "sequential"), batch_size)}
        spec |= {"exclude_true": exclude_true, "alpha": alpha}
    elif on == "neg_grad_plus":
        spec |= {"schedule": make_schedule(mixing or "paired", batch_size), "alpha": alpha}
    elif on == "gradient_ascent":
        spec |= {"schedule": make_schedule("forget_only", batch_size)}
    elif on == "fine_tune":
        spec |= {"schedule": Single(role="retain", batch_size=batch_size)}
    objective: Objective = Objective.parse(spec)
    return objective


#: Random labels with frozen normalisation are steeper than with moving statistics, so the default rate is lower than
#: the published one, with which a CIFAR ResNet-20 diverges.
GENTLE = Optim(lr=5e-4, epochs=10, augment=True)
PUBLISHED_LR = 0.013


def as_trained(optim: Optim, profile: Profile) -> Optim:
    """Settings of the published code: moving normalisation statistics and, unless one was chosen, its learning rate."""
    if profile == "as_intended":
        return optim
    return optim.model_copy(update={"norm": "train", "lr": PUBLISHED_LR if optim == GENTLE else optim.lr})

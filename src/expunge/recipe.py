"""A recipe: an objective or an edit, a space, protections and optimiser settings. Frozen and serialisable."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from expunge.digest import json_digest
from expunge.edits.base import Edit
from expunge.objectives.base import Objective
from expunge.part import Frozen
from expunge.protections.base import Protection
from expunge.spaces.base import Space


class Optim(Frozen):
    """Optimiser and loop settings.

    Args:
        name: ``sgd``, ``adam`` or ``adamw``.
        lr: Learning rate; 0 is allowed for the control run only.
        momentum: SGD momentum.
        nesterov: Nesterov momentum.
        weight_decay: L2 decay (decoupled for ``adamw``), on the weights that may change only.
        betas: Adam's decay rates.
        epochs: Passes of the schedule.
        max_steps: Stop after this many steps.
        lr_schedule: ``constant``, ``cosine`` (to 0 over the epochs), ``multistep`` or ``one_cycle``.
        milestones: Epochs at which ``multistep`` multiplies the rate by ``gamma``.
        gamma: Factor of ``multistep``.
        warmup: Share of all steps in which ``one_cycle`` rises to ``lr``.
        grad_clip: Largest gradient norm over the weights that may change (after masking).
        micro_batch: Cut every step into pieces of at most this many samples; same maths, less memory.
        norm: Normalisation layers keep their statistics (``frozen``) or update them (``train``).
        augment: Random crop and flip on training batches; or on the batches of the roles named (``[surrogate]``).
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast; weights that are trained stay in full precision.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.01, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = Field(default=10, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    lr_schedule: Literal["constant", "cosine", "multistep", "one_cycle"] = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = Field(default=0.1, gt=0)
    warmup: float = Field(default=0.2, gt=0, lt=1)
    grad_clip: float | None = Field(default=None, gt=0)
    micro_batch: int | None = Field(default=None, ge=1)
    norm: Literal["frozen", "train"] = "frozen"
    augment: bool | tuple[str, ...] = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    def lr_at(self, epoch: int, step: int, total_steps: int) -> float:
        """Learning rate of a step: a pure function, so a resumed run needs no scheduler state."""
        if self.lr_schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        if self.lr_schedule == "multistep":
            return self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)
        if self.lr_schedule == "one_cycle":
            rise = max(1, round(self.warmup * total_steps))
            if step < rise:
                return self.lr * (step + 1) / rise
            return self.lr * (1 + math.cos(math.pi * (step - rise) / max(1, total_steps - rise))) / 2
        return self.lr


class Recipe(Frozen):
    """How to forget. Methods are functions that return one.

    Args:
        name: Method name for tables and reports.
        objective: A loss per step, or ``None`` when ``edit`` is given.
        edit: A one-shot edit, or ``None``.
        space: Where the change may live.
        protections: What must not move.
        optim: Optimiser and loop settings (unused by edits).
        from_scratch: Start from a fresh initialisation (the retrained oracle).
    """

    name: str
    objective: SerializeAsAny[Objective] | None = None
    edit: SerializeAsAny[Edit] | None = None
    space: SerializeAsAny[Space]
    protections: tuple[SerializeAsAny[Protection], ...] = ()
    optim: Optim = Optim()
    from_scratch: bool = False

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> Any:
        return None if value is None else Objective.parse(value)

    @field_validator("edit", mode="before")
    @classmethod
    def _edit(cls, value: Any) -> Any:
        return None if value is None else Edit.parse(value)

    @field_validator("space", mode="before")
    @classmethod
    def _space(cls, value: Any) -> Any:
        return Space.parse(value)

    @field_validator("protections", mode="before")
    @classmethod
    def _protections(cls, value: Any) -> Any:
        return tuple(Protection.parse(v) for v in value)

    @model_validator(mode="after")
    def _one_kind(self) -> Recipe:
        if (self.objective is None) == (self.edit is None):
            raise ValueError("a recipe has either an objective or an edit")
        if self.edit is not None and self.protections:
            raise ValueError("protections act on a training loop; a one-shot edit has none")
        roles = self.objective.schedule.roles() if self.objective is not None else ()
        unused = [r for r in self.optim.augment if r not in roles] if isinstance(self.optim.augment, tuple) else []
        if unused:
            raise ValueError(f"'augment' names the role '{unused[0]}', but a step reads {', '.join(roles)}")
        return self

    def describe(self) -> dict[str, Any]:
        """Every setting, as JSON data; ``Recipe(**data)`` reads it back."""
        return {
            "name": self.name,
            "objective": None if self.objective is None else self.objective.describe(),
            "edit": None if self.edit is None else self.edit.describe(),
            "space": self.space.describe(),
            "protections": [p.describe() for p in self.protections],
            "optim": self.optim.model_dump(mode="json"),
            "from_scratch": self.from_scratch,
        }

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`describe` without the name."""
        return json_digest({k: v for k, v in self.describe().items() if k != "name"})

    @property
    def full_precision(self) -> bool:
        """Whether every weight is held in float32, or else only what is trained: the rest as it was loaded.

        The first where arithmetic is (``optim.precision``), where everything changes, and where figures are taken
        beside the steps: by protections, stop rules, edits that run the model.
        """
        part = self.edit or self.objective
        assert part is not None
        everything = self.from_scratch or self.optim.norm == "train" or bool(self.protections)
        return self.optim.precision == "fp32" or everything or part.full_precision

    def needs(self) -> frozenset[str]:
        """Roles and capabilities that the parts need."""
        parts = [p for p in (self.objective, self.edit, self.space, *self.protections) if p is not None]
        roles = set(self.objective.schedule.roles()) if self.objective is not None else set()
        if "mixed" in roles:
            roles = (roles - {"mixed"}) | {"forget", "retain"}
        if self.objective is not None and self.objective.until is not None:
            roles.add("forget")
        return frozenset(n for p in parts for n in p.info.needs) | roles

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other top-level settings; ``optim`` may be a mapping of single settings."""
        if isinstance(changes.get("optim"), dict):
            changes["optim"] = Optim(**{**self.optim.model_dump(), **changes["optim"]})
        return Recipe(**{**{k: getattr(self, k) for k in type(self).model_fields}, **changes})

"""Several shifts trained at once: one run of the loop, in which every step grades concept after concept.

The joint variant of SRS-ME, ``min sum_i eta_i L_cor(c_i, sum_j dW_j) + lambda sum_i ||dW_i||_1``, in the memory of a
single concept's training: the graph of one concept is gone before that of the next is built, and ``eta_i``, a constant,
weighs gradients that are there already. What comes out is one patch for each concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge import guards
from expunge.context import Context
from expunge.diffusion.correlation import joint_weights
from expunge.diffusion.shift import Shift, in_form
from expunge.digest import named_tensors
from expunge.errors import ConfigError, NoEffectError
from expunge.objectives.base import LossFn, Objective, Term
from expunge.objectives.concept_correlation import CORRELATION, ENERGY, ConceptCorrelation
from expunge.patch import LowRank, Patch
from expunge.patch.changes import Change
from expunge.recipe import Recipe
from expunge.registry import Info
from expunge.request import Concept, ForgetRequest
from expunge.run import execute
from expunge.schedule import Step
from expunge.spaces.base import OpenSpace, Space
from expunge.spaces.concept_shift import CODE, COMMIT, PAPER, ConceptShift, OpenShift, attached_to, beside
from expunge.tasks.base import Batch, Split
from expunge.tasks.diffusion import text_task
from expunge.tasks.text_to_image import TextToImageTask

#: Where a patch's findings say with what its concept was trained.
AT_ONCE = "at_once"
#: How gradients of several concepts are weighed: so that every ``eta_i |L_i|`` is the largest of them, or all alike.
Weights = Literal["balanced", "equal"]

_NEEDS = ("diffusion", "text")


@dataclass(frozen=True)
class Several(Split):
    """Index sets of several requests: roles of the first one, ``forget`` and ``retain`` of all, and those of each."""

    each: Mapping[str, Split] = field(default_factory=dict)

    @staticmethod
    def of(each: Mapping[str, Split]) -> Several:
        """From the index sets by concept."""
        first = next(iter(each.values()))
        forget = torch.cat([s["forget"] for s in each.values()]).unique()
        everything = torch.cat([first["forget"], first["retain"]]).unique()
        indices = {r: first.indices[r] for r in first.indices}
        indices |= {"forget": forget, "retain": everything[~torch.isin(everything, forget)]}
        notes = tuple(dict.fromkeys(n for s in each.values() for n in s.notes))
        return Several(indices, notes, first.removed, first.concept, each)

    def roles(self) -> tuple[str, ...]:
        """Names of the roles present."""
        return next(iter(self.each.values())).roles()


def _each(ctx: Context) -> dict[str, Context]:
    """The contexts of single concepts."""
    assert isinstance(ctx.split, Several)
    return {n: replace(ctx, split=s, findings={}, notes=[], history=[]) for n, s in ctx.split.each.items()}


def _of(rows: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, float]]:
    """What was logged of a concept."""
    keys = {f"{term}.{name}": term for term in (CORRELATION, ENERGY, "l1")}
    return [{t: row[k] for k, t in keys.items() if k in row} for row in rows if f"{CORRELATION}.{name}" in row]


class ConceptCorrelations(Objective):
    """:class:`~expunge.objectives.concept_correlation.ConceptCorrelation` of several concepts, each with its own stop.

    A concept's samples, noise and timesteps are those of its own run. An epoch is a pass over the largest set of
    samples; meanwhile the others begin anew.

    Args:
        each: The loss of each; alike but for their prompts.
        requests: By concept.
        weights: ``balanced`` is the paper's: ``eta_i = max_k |L_k| / |L_i|``.

    Deviates: the paper penalises the l1 norm of the sum of the changes; here it is the sum of their norms, which is not
    smaller and leaves every concept its own. ``eta_i`` weighs the gradient of the concept's own coefficients; where
    concepts protect one another there is no other. A concept that has stopped keeps its coefficients.
    """

    part_name = "concept_correlations"
    info = Info("The concept-correlation loss of several concepts.", PAPER, CODE, COMMIT, _NEEDS)

    each: dict[str, ConceptCorrelation]
    requests: dict[str, ForgetRequest]
    weights: Weights = "balanced"

    @property
    def own(self) -> ConceptCorrelation:
        """What all have in common."""
        return next(iter(self.each.values()))

    def steps(self, ctx: Context, epoch: int) -> list[Step]:
        """Step by step, those of the concepts' own runs."""
        (role,) = self.schedule.roles()
        sizes = {n: len(own.split[role]) for n, own in _each(ctx).items()}

        @cache
        def one_pass(name: str, number: int) -> list[Step]:
            return self.schedule.steps({role: sizes[name]}, number, ctx.seed)

        length = {n: len(one_pass(n, 0)) for n in sizes}
        longest = max(length.values())
        numbers = range(epoch * longest, (epoch + 1) * longest)
        return [{n: one_pass(n, i // length[n])[i % length[n]][role] for n in sizes} for i in numbers]

    def parts(self, ctx: Context, step: Step) -> list[Step]:
        """The concepts that have not stopped, one after the other."""
        return [{n: ids} for n, ids in step.items() if self.own.crossed(_of(ctx.history, n)) is None]

    def load(self, ctx: Context, role: str, positions: Tensor) -> Batch:
        """Samples of a concept."""
        assert isinstance(ctx.split, Several)
        own = replace(ctx, split=ctx.split.each[role])
        return super().load(own, self.schedule.roles()[0], positions)

    def bind(self, ctx: Context) -> LossFn:
        """Prepare the loss of each."""
        losses = {n: self.each[n].model_copy(update={"lambda_l1": 0.0}).bind(own) for n, own in _each(ctx).items()}
        (role,) = self.schedule.roles()

        def loss(batches: dict[str, Batch]) -> dict[str, Term]:
            ((name, batch),) = batches.items()
            terms = losses[name]({role: batch})
            return {f"{term}.{name}": t._replace(role=name) for term, t in terms.items()}

        return loss

    def graded(self, ctx: Context, numbers: dict[str, float]) -> bool:
        """Weigh the gradients, add that of the l1 norm, and take those of concepts away that have stopped."""
        at_work = attached_to(text_task(ctx.task, f"the objective '{self.part_name}'").unet)
        assert at_work is not None
        graded = [n for n in at_work.shifts if f"{CORRELATION}.{n}" in numbers]
        losses = torch.tensor([numbers[f"{CORRELATION}.{n}"] for n in graded], dtype=torch.float64)
        eta = joint_weights(losses) if self.weights == "balanced" else torch.ones_like(losses)
        updated = []
        for name, weight in zip(graded, eta.tolist(), strict=True):
            before, (now,) = _of(ctx.history, name), _of([numbers], name)
            if not self.own.holds(before, now):
                updated.append(name)
                numbers |= {f"l1.{name}": self._weigh(at_work.shifts[name], weight), f"weight.{name}": weight}
            reason = self.own.crossed([*before, now])
            if reason is not None:
                ctx.note(f"{name}: stopped after step {ctx.step + 1}: {reason}")
        for name, shift in at_work.shifts.items():
            if name not in updated:  # a gradient of zero would still move what the optimiser has in memory
                for omega in shift.omega.values():
                    omega.grad = None
        return bool(updated)

    def _weigh(self, shift: Shift, eta: float) -> float:
        omegas = list(shift.omega.values())
        for omega in omegas:
            if omega.grad is not None:
                omega.grad *= eta
        if not self.own.lambda_l1:
            return 0.0
        norm = shift.l1()
        for omega, grad in zip(omegas, torch.autograd.grad(self.own.lambda_l1 * norm, omegas), strict=True):
            omega.grad = grad if omega.grad is None else omega.grad + grad
        return float(norm.detach())

    def stop(self, history: list[dict[str, Any]]) -> str | None:
        """Stop when every concept has."""
        left = [n for n in self.requests if self.own.crossed(_of(history, n)) is None]
        return super().stop(history) or (None if left else f"all {len(self.requests)} concepts have stopped")


class OpenShifts(OpenSpace):
    """The coefficients of several concepts at work: parameters ``<concept>: omega.<tensor>``."""

    def __init__(self, ctx: Context, each: Mapping[str, OpenShift]) -> None:
        self._ctx, self.each = ctx, dict(each)
        self.parameters = {f"{n}: {p}": v for n, own in self.each.items() for p, v in own.parameters.items()}
        self.base = next(iter(self.each.values())).base
        self._at_work = ExitStack()
        unet = text_task(ctx.task, "the space 'concept_shifts'").unet
        self._at_work.enter_context(beside(unet, {n: own.shift for n, own in self.each.items()}))

    def before_step(self) -> None:
        """As published, every gradient is the sum of all so far."""
        for own in self.each.values():
            own.before_step()

    def state(self) -> dict[str, Tensor]:
        """Sums of gradients."""
        return {f"{n}: {k}": t for n, own in self.each.items() for k, t in own.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the sums back."""
        for n, own in self.each.items():
            own.load_state({k.removeprefix(f"{n}: "): t for k, t in state.items() if k.startswith(f"{n}: ")})

    def changes(self) -> dict[str, Change]:
        """The sum of all shifts as factors: concept by concept, columns of the first and rows of the second."""
        for own in self.each.values():
            own.changes()  # notes what the shift does to protected prompts
        found: dict[str, Change] = {}
        for tensor, name in zip(self.base, next(iter(self.each.values())).shift.omega, strict=True):
            parts = [own.shift.change(name, "factors") for own in self.each.values()]
            up, down = (torch.cat([c.tensors()[which] for c in parts], i) for which, i in (("up", 1), ("down", 0)))
            found[tensor] = LowRank(up.contiguous(), down.contiguous(), parts[0].shape)
        return found

    def close(self) -> None:
        """Take the shifts off the U-Net."""
        self._at_work.close()


class ConceptShifts(Space):
    """:class:`~expunge.spaces.concept_shift.ConceptShift` for several concepts, each with its own basis.

    Args:
        each: The space of each concept.
    """

    part_name = "concept_shifts"
    info = Info("The shifts of several concepts, each with its own basis.", PAPER, CODE, COMMIT, _NEEDS)

    each: dict[str, ConceptShift]

    def masters(self, ctx: Context) -> dict[str, nn.Parameter]:
        """None: the model's own parameters never move."""
        del ctx
        return {}

    def open(self, ctx: Context) -> OpenSpace:
        """Find the directions of every concept, and attach zero shifts."""
        opened, found = {}, ctx.findings.setdefault(AT_ONCE, {})
        for name, own in _each(ctx).items():
            opened[name] = self.each[name].model_copy(update={"form": "factors"}).plan(own)
            found[name] = own.findings
            for note in own.notes:
                ctx.note(f"{name}: {note}")
        return OpenShifts(ctx, opened)


def train_at_once(
    task: TextToImageTask,
    requests: Mapping[str, ForgetRequest],
    recipes: Mapping[str, Recipe],
    *,
    weights: Weights = "balanced",
    seed: int = 0,
    run_dir: Path | None = None,
    checkpoint_every: int | None = None,
    progress: bool = False,
) -> dict[str, Patch]:
    """Erase concepts in one run.

    Args:
        task: The pipeline, without any patch.
        requests: By concept.
        recipes: By concept; alike but for what their spaces protect.
        weights: See :class:`ConceptCorrelations`.
        seed: Seed of the run.
        run_dir: Folder of the run; its own patch is that of all concepts together.
        checkpoint_every: Steps between checkpoints; by default at every epoch's end.
        progress: Show a progress bar.

    Returns:
        Patches by concept.

    Raises:
        ConfigError: The recipe cannot be trained at once.
        NoEffectError: The shift of a concept did not move.
    """
    recipe, each = joint(requests, recipes, weights), {n: task.split(r) for n, r in requests.items()}
    for name, split in each.items():
        guards.check_disjoint(split, recipes[name])
    whole = execute(
        task,
        Several.of(each),
        ForgetRequest(what=Concept(text="; ".join(requests))),
        recipe,
        seed=seed,
        run_dir=run_dir,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    return _split(task, whole, requests, recipes, weights)


def joint(requests: Mapping[str, ForgetRequest], recipes: Mapping[str, Recipe], weights: Weights) -> Recipe:
    """The recipe of a run at once, from recipes in the space ``concept_shift``.

    Raises:
        ConfigError: The loss is another one, or something else acts on the coefficients.
    """
    first, losses = next(iter(recipes.values())), {}
    for name, recipe in recipes.items():
        if not isinstance(recipe.objective, ConceptCorrelation):
            named = "no objective" if recipe.objective is None else f"the objective '{recipe.objective.part_name}'"
            raise ConfigError(
                f"concepts are trained at once with the objective 'concept_correlation', not with {named}"
            )
        losses[name] = recipe.objective
    own = losses[next(iter(losses))]
    if first.protections:
        raise ConfigError("protections act on one concept's training; train the concepts separately")
    if own.schedule.kind == "replay":
        raise ConfigError("a schedule 'replay' holds the steps of one concept; train the concepts separately")
    objective = ConceptCorrelations(
        each=losses, requests=dict(requests), schedule=own.schedule, until=own.until, weights=weights
    )
    spaces = {n: r.space for n, r in recipes.items() if isinstance(r.space, ConceptShift)}
    return first.replace(objective=objective, space=ConceptShifts(each=spaces))


def _split(
    task: TextToImageTask,
    whole: Patch,
    requests: Mapping[str, ForgetRequest],
    recipes: Mapping[str, Recipe],
    weights: Weights,
) -> dict[str, Patch]:
    """A patch for each concept, from its columns of the factors."""
    base, common = named_tensors(task.model)[0], {AT_ONCE: {"concepts": list(requests), "weights": weights}}
    patches: dict[str, Patch] = {}
    start = 0
    for name, request in requests.items():
        space, facts = recipes[name].space, whole.manifest.findings[AT_ONCE][name]
        assert isinstance(space, ConceptShift)
        columns = slice(start, start + facts["concept_shift"]["used"])
        start = columns.stop
        changes = {}
        for tensor, change in whole.changes.items():
            assert isinstance(change, LowRank)
            up, down = change.up[:, columns].contiguous(), change.down[columns].contiguous()
            if up.any():
                changes[tensor] = in_form(LowRank(up, down, change.full_shape), space.form)
        if not changes or not guards.effect(changes, base)["changed"]:
            raise NoEffectError(f"{recipes[name].name} changed nothing for '{name}'")
        marked = tuple(f"{n}: " for n in requests)
        notes = [n.removeprefix(f"{name}: ") for n in whole.manifest.notes]
        update = {
            "request": request.model_dump(mode="json"),
            "request_digest": request.digest,
            "recipe": recipes[name].describe(),
            "findings": {**facts, **common},
            "notes": tuple(n for n in notes if not n.startswith(marked)),
        }
        patches[name] = Patch(changes, whole.manifest.model_copy(update=update))
    return patches

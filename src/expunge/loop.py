"""The one training loop, on Accelerate: accumulate, project, log, checkpoint, resume."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge import checkpoint
from expunge.checkpoint import Position
from expunge.context import Context
from expunge.errors import ConfigError, DivergedError, ResourceError
from expunge.objectives.base import LossFn, Objective, Term
from expunge.protections.base import Penalty
from expunge.recipe import Optim
from expunge.rng import random_states as _random_states
from expunge.rng import set_random_states as _set_random_states
from expunge.schedule import FORWARD_ONLY, Step, chunks
from expunge.spaces.base import OpenSpace
from expunge.tasks.base import Batch
from expunge.track import Tracker

#: Called after every step with (step number starting at 1, model, optimiser).
OnStep = Callable[[int, nn.Module, torch.optim.Optimizer], None]
MAX_SKIPPED = 50


@dataclass
class Saving:
    """Where and how often to checkpoint, and which run the checkpoint belongs to."""

    path: Path | None = None
    every: int | None = None
    identity: str = ""
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


def make_optimizer(settings: Optim, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimiser over the space's parameters."""
    values = list(parameters.values())
    if settings.name == "sgd":
        return torch.optim.SGD(
            values,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(values, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)


def make_accelerator(precision: str) -> Any:
    """An Accelerator of the wanted precision, also when an earlier run in this process used another.

    In a distributed run a process waits ``EXPUNGE_TIMEOUT`` seconds (600) for the others before it fails.

    Raises:
        ConfigError: Half precision with loss scaling on the CPU.
        ResourceError: The environment names more processes than take part.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    if precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("precision 'fp16' needs an accelerator; on the CPU use 'fp32' or 'bf16'")
    wanted = {"fp32": "no"}.get(precision, precision)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=float(os.environ.get("EXPUNGE_TIMEOUT", 600))))
    on_cpu = not torch.accelerator.is_available()  # without saying so, several CPU processes would not find each other
    accelerator = Accelerator(mixed_precision=wanted, cpu=on_cpu, kwargs_handlers=[timeout])
    if (expected := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        raise ResourceError(f"WORLD_SIZE is {expected} but {accelerator.num_processes} process takes part in this run")
    return accelerator


class Loop:
    """Runs an objective with penalties in an opened space.

    Attributes:
        at_once: Most samples that were in memory together, with their gradients.
    """

    def __init__(
        self,
        ctx: Context,
        objective: Objective,
        settings: Optim,
        space: OpenSpace,
        losses: LossFn,
        penalties: list[Penalty],
        tracker: Tracker,
        saving: Saving,
        accelerator: Any,
        on_step: OnStep | None = None,
        beside: Callable[[], Any] = nullcontext,
    ) -> None:
        self.ctx, self.objective, self.settings, self.space = ctx, objective, settings, space
        self.losses, self.penalties, self.tracker, self.saving = losses, penalties, tracker, saving
        self.accelerator, self.on_step, self._beside = accelerator, on_step, beside
        self.optimizer = make_optimizer(settings, space.parameters)
        self.at = Position(micro_batch=settings.micro_batch)
        self.total = self._count()
        self.at_once = 0
        ctx.epochs = settings.epochs

    def _count(self) -> int:
        """Steps of the whole run; where ``max_steps`` ends it sooner, epochs after that are not looked at."""
        total, most = 0, None if self.settings.lr_schedule == "one_cycle" else self.settings.max_steps
        for epoch in range(self.settings.epochs):
            if most is not None and total >= most:
                return most
            total += len(self.objective.steps(self.ctx, epoch))
        return total

    def run(self, *, resume: bool) -> None:
        """Run to the end or to the objective's stop.

        Raises:
            DivergedError: A loss, gradient or weight is not finite.
            ResourceError: Out of memory at one sample per micro-batch.
        """
        if resume and self.saving.path is not None and self.saving.path.exists():
            self._restore(self.saving.path)
        self.ctx.history = self.tracker.start(self.total, self.at.step)
        if self.ctx.history and self.objective.stop(self.ctx.history):
            return
        for epoch in range(self.at.epoch, self.settings.epochs):
            if self._run_epoch(epoch):
                break
            self.at.epoch, self.at.index = epoch + 1, 0
            if self.saving.every is None and epoch + 1 < self.settings.epochs:
                self._checkpoint()
        self._check_weights()

    def _run_epoch(self, epoch: int) -> bool:
        ctx, steps = self.ctx, self.objective.steps(self.ctx, epoch)
        ctx.epoch, ctx.steps_per_epoch = epoch, len(steps)
        start_of_pass, previous = 0, None
        for index, step in enumerate(steps):
            if (roles := tuple(step)) != previous:
                start_of_pass, previous = index, roles
            if index < self.at.index:
                continue
            ctx.step, ctx.position, ctx.roles = self.at.step, index - start_of_pass, roles
            lr = self.settings.lr_at(epoch, self.at.step, self.total)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            end = index + 1 == len(steps)
            row = {"step": self.at.step, "epoch": epoch, "end_of_epoch": end, "lr": lr, **self._take(step)}
            with self._beside():
                row |= self.objective.measure(ctx, end)
            ctx.history.append(row)
            self.tracker.row(row)
            self.at.step, self.at.index = self.at.step + 1, index + 1
            if self.on_step is not None:
                self.on_step(self.at.step, ctx.model, self.optimizer)
            reason = self.objective.stop(ctx.history)
            if reason is not None:
                ctx.note(f"stopped after step {self.at.step} of {self.total}: {reason}")
            if reason is not None or self.at.step == self.settings.max_steps:
                return True
            if self.saving.every is not None and self.at.step % self.saving.every == 0:
                self._checkpoint()
        return False

    def _take(self, step: Step) -> dict[str, float]:
        """One optimiser step; after an out-of-memory error again with half the micro-batch."""
        while True:
            draws = _random_states()
            statistics = self._statistics()
            try:
                logged = self._accumulate(step)
                break
            except RuntimeError as error:
                if not _is_oom(error):
                    raise
                self._halve(step, error)
            _set_random_states(draws)
            for name, value in statistics.items():
                self.saving.buffers[name].copy_(value)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        try:
            return self._update(logged)
        except RuntimeError as error:
            if not _is_oom(error):
                raise
            raise ResourceError(
                f"out of memory in the optimiser at step {self.at.step}; use sgd or train fewer layers ({error})"
            ) from None

    def _statistics(self) -> dict[str, Tensor]:
        """Copies of the buffers that a forward pass moves, for a replay."""
        return {n: b.clone() for n, b in self.saving.buffers.items()} if self.settings.norm == "train" else {}

    def _halve(self, step: Step, error: RuntimeError) -> None:
        largest = max(len(ids) for ids in step.values())
        micro = min(self.at.micro_batch or largest, largest)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ctx.task.couples_samples:
            raise ResourceError(
                f"out of memory at step {self.at.step}, and the loss of the {self.ctx.task.name} task compares the "
                f"samples of a batch, so that a batch cannot be cut; choose a smaller batch_size ({error})"
            ) from None
        if micro <= 1:
            raise ResourceError(
                f"out of memory at step {self.at.step} with one sample at a time; use a smaller model, a lower "
                f"precision or fewer trained layers ({error})"
            ) from None
        self.at.micro_batch = micro // 2
        self.ctx.note(f"out of memory at step {self.at.step}: micro-batch reduced to {self.at.micro_batch}")

    def _accumulate(self, step: Step) -> dict[str, Tensor]:
        """Gradients of one step, summed over its pieces; of this process only. Data-free terms count once in all."""
        ctx = self.ctx
        self.optimizer.zero_grad(set_to_none=True)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        totals = {role: len(ids) for role, ids in step.items()}
        logged: dict[str, Tensor] = {}
        parts = self.objective.parts(ctx, step)
        for number, piece in enumerate(c for part in parts for c in chunks(part, self.at.micro_batch)):
            own = {r: ids[rank::world] for r, ids in piece.items()} if world > 1 else piece
            batches = {r: self.objective.load(ctx, r, ids) for r, ids in own.items() if len(ids)}
            self.at_once = max(self.at_once, sum(map(len, batches.values())))
            with self.accelerator.autocast():
                terms = self._losses(batches) if batches else {}
            if number == 0 and rank == 0:
                terms = {**terms, **{k: t for penalty in self.penalties for k, t in penalty().items()}}
            else:
                terms = {k: t for k, t in terms.items() if t.role is not None}
            if FORWARD_ONLY in step:
                terms = {k: t._replace(weight=0.0) for k, t in terms.items()}
            loss = self._total(terms, batches, totals, logged)
            if loss is not None and loss.requires_grad:
                self.accelerator.backward(loss)
        return logged

    def _losses(self, batches: dict[str, Batch]) -> dict[str, Term]:
        try:
            return self.losses(batches)
        except KeyError as error:
            if error.args[0] not in self.ctx.split:
                raise
            raise ConfigError(
                f"objective '{self.objective.part_name}' does not fit its schedule '{self.objective.schedule.kind}': "
                f"a step holds {', '.join(batches)} and the role '{error.args[0]}' cannot be used"
            ) from error

    def _update(self, logged: Mapping[str, Tensor]) -> dict[str, float]:
        """Sum over processes, check, project, step."""
        optimizer, settings, world = self.optimizer, self.settings, self.accelerator.num_processes
        parameters = list(self.space.parameters.values())
        if world > 1:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad.copy_(self.accelerator.reduce(p.grad, "sum"))
        numbers = {k: float(v.detach()) for k, v in logged.items()}
        if world > 1:
            numbers = _sum_over_processes(numbers)
            if settings.norm == "train":  # like data-parallel training: the first process's statistics count
                for buffer in self.saving.buffers.values():
                    torch.distributed.broadcast(buffer, 0)
        self._check_finite(numbers, "loss")
        if "loss" not in numbers:  # no term had a weight: the step was a forward pass only
            return numbers
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if not self.objective.graded(self.ctx, numbers):
            if scaler is not None:
                scaler.update()
            return numbers
        self.space.before_step()
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if settings.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.grad_clip, norm)
        numbers["grad_norm"] = float(norm)
        if scaler is None:
            self._check_finite(numbers, "gradient norm")
            optimizer.step()
        else:
            self._scaled_step(scaler, numbers)
        self.space.after_step(optimizer)
        return numbers

    def _total(
        self,
        terms: Mapping[str, Term],
        batches: Mapping[str, Batch],
        totals: Mapping[str, int],
        logged: dict[str, Tensor],
    ) -> Tensor | None:
        loss: Tensor | None = None
        for name, term in terms.items():
            shape = () if term.role is None else (len(batches[term.role]),) if term.role in batches else None
            if term.values.shape != shape:
                raise ConfigError(
                    f"loss term '{name}' must hold one value per sample of a role of this step ({', '.join(batches)}), "
                    f"or a single number with role None; got shape {list(term.values.shape)} for role {term.role!r}"
                )
            value = term.values if term.role is None else term.values.sum() / totals[term.role]
            logged[name] = logged.get(name, 0) + value.detach()
            if term.weight != 0:
                weighted = term.weight * value
                loss = weighted if loss is None else loss + weighted
                logged["loss"] = logged.get("loss", 0) + weighted.detach()
        return loss

    def _check_finite(self, numbers: Mapping[str, float], what: str) -> None:
        bad = [k for k, v in numbers.items() if not abs(v) < float("inf")]
        if bad:
            term = next((k for k in bad if k != "loss"), bad[0])
            raise DivergedError(
                f"diverged at step {self.at.step}: {what} is not finite, term = {term}. Use a smaller learning rate, "
                "fewer steps or gradient clipping; the model is left as it was"
            )

    def _check_weights(self) -> None:
        for name, parameter in self.space.parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise DivergedError(
                    f"diverged at step {self.at.step}: '{name}' has weights that are not finite. Use a smaller "
                    "learning rate, fewer steps or gradient clipping; the model is left as it was"
                )

    def _scaled_step(self, scaler: Any, numbers: dict[str, float]) -> None:
        before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        if scaler.get_scale() < before:
            self.at.skipped += 1
            numbers |= {"skipped": 1.0, "grad_norm": -1.0}
            self.ctx.note("half precision skipped steps whose gradient overflowed; see 'skipped' in the log")
            if self.at.skipped > MAX_SKIPPED:
                raise DivergedError(
                    f"{self.at.skipped} steps overflowed in half precision, the last at {self.at.step}; use bf16"
                )

    def _checkpoint(self) -> None:
        if self.saving.path is None or not self.accelerator.is_main_process:
            return
        self._check_weights()
        self.tracker.flush()
        scaler = getattr(self.accelerator, "scaler", None)
        checkpoint.save(
            self.saving.path,
            position=self.at,
            parameters=self.space.parameters,
            buffers=self.saving.buffers,
            optimizer=self.optimizer,
            state=self.ctx.state,
            space=self.space.state(),
            notes=self.ctx.notes,
            identity=self.saving.identity,
            scaler=None if scaler is None else scaler.state_dict(),
        )

    def _restore(self, path: Path) -> None:
        self.at, state, space, notes, scaler = checkpoint.load(
            path,
            parameters=self.space.parameters,
            buffers=self.saving.buffers,
            optimizer=self.optimizer,
            identity=self.saving.identity,
        )
        self.ctx.state.update(state)
        self.ctx.notes[:] = notes
        self.space.load_state(space)
        if scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)


def _sum_over_processes(numbers: dict[str, float]) -> dict[str, float]:
    from accelerate.utils import gather_object

    total: dict[str, float] = {}
    for part in gather_object([numbers]):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _is_oom(error: RuntimeError) -> bool:
    text = str(error).lower()
    on_cpu = "allocat" in text and ("can't allocate memory" in text or "not enough memory" in text)
    return isinstance(error, torch.OutOfMemoryError) or on_cpu

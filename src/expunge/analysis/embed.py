"""Taking the embeddings of a classifier, of a patched one, or of other weights of the same architecture."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from expunge import rng
from expunge.analysis.embedding import Embedding
from expunge.digest import model_digest
from expunge.errors import CapabilityError, ConfigError, DivergedError
from expunge.patch import Patch, apply, revert
from expunge.request import ForgetRequest
from expunge.restore import evaluating
from expunge.tasks.base import Split, Task
from expunge.tasks.classifier import ClassifierTask

ROLES = ("train", "test")


def choose_ids(
    labels: Tensor, pool: Tensor, samples: int, *, seed: int = 0, balanced: bool = True, purpose: str = "embedding"
) -> Tensor:
    """A fixed list of sample ids: a function of the data's labels, the number and the seed, never of a model.

    Args:
        labels: int64 ``[N]``, labels of the whole set.
        pool: int64, ids that may be chosen.
        samples: How many ids.
        seed: Seed of the draw.
        balanced: As many of every class as possible (they differ by one at most unless a class runs out); otherwise a
            simple random draw.
        purpose: Which draw this is.

    Returns:
        int64 ``[samples]``, ascending.

    Raises:
        ConfigError: Fewer than ``samples`` are there, or fewer than one is asked for.
    """
    if samples < 1 or samples > len(pool):
        raise ConfigError(f"{samples} samples were asked for, the set has {len(pool)}; ask for 1 to {len(pool)}")
    order = pool[rng.permutation(rng.key(seed, purpose), len(pool))]
    if balanced:
        # One of every class in turn: sort by how many of its class came before.
        own = labels[order]
        turn = torch.empty_like(order)
        for c in own.unique():
            where = (own == c).nonzero().flatten()
            turn[where] = torch.arange(len(where))
        order = order[turn.argsort(stable=True)]
    return order[:samples].sort().values


def embed(
    task: Task,
    split: Split | None = None,
    patch: Patch | None = None,
    *,
    role: str = "train",
    samples: int = 200,
    seed: int = 0,
    balanced: bool = True,
    name: str = "",
    request: ForgetRequest | None = None,
) -> Embedding:
    """Features, labels and prototypes of a fixed list of samples; the model is left as found.

    Every model of one task gets the same samples for the same ``role``, ``samples`` and ``seed``.

    Args:
        task: Classifier with the capability ``features``.
        split: Says which samples were to be forgotten; nothing by default.
        patch: Applied during the pass and taken off again. ``None`` is the model as it is.
        role: ``train`` (forgotten and retained samples) or ``test`` (all test samples, also of forgotten classes).
        samples: Number of samples, not of batches.
        seed: Seed of the choice.
        balanced: As many samples of every class as possible.
        name: Name of the model; ``base``, or ``patched`` with a patch.
        request: The request behind ``split``; its digest is recorded.

    Raises:
        CapabilityError: The task has no features, or its head has no row per class.
        ConfigError: Unknown role, or more samples than there are.
        DivergedError: Features are not finite; the first sample is named.

    Deviates: the published extraction draws other images for every model, counts batches, and stores features of
    ``global_pool`` as JSON; here the list is fixed by the seed, samples are counted, features are the inputs of the
    head whatever the architecture, and the head's bias is kept.
    """
    if role not in ROLES:
        raise ConfigError(f"embeddings are taken of {' or '.join(ROLES)}, not of {role!r}")
    if not isinstance(task, ClassifierTask) or task.head is None:
        raise CapabilityError(
            "embeddings need a classifier whose head is known; name the module that takes the features by `head`"
        )
    split = split if split is not None else task.everything()
    images = task.data.train if role == "train" else task.data.test
    ids = choose_ids(images.labels, images.readable(), samples, seed=seed, balanced=balanced, purpose=f"embed {role}")
    if patch is not None:
        apply(task.model, patch)
    try:
        features = _features(task, split, "mixed" if role == "train" else "test", ids)
        prototypes, bias = _prototypes(task)
        digest = model_digest(task.model)
    finally:
        if patch is not None:
            revert(task.model, patch)
    shown = name or ("base" if patch is None else "patched")
    bad = (~features.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise DivergedError(
            f"{shown}: features of {len(bad)} samples are not finite, first {role} sample {ids[bad[0]]}"
        )
    labels = images.labels[ids]
    removed = torch.isin(labels, torch.tensor(split.removed, dtype=torch.int64))
    return Embedding(
        name=shown,
        features=features,
        labels=labels,
        ids=ids,
        forget=torch.isin(ids, split["forget"]) if role == "train" else removed,
        prototypes=prototypes,
        classes=tuple(task.classes),
        bias=bias,
        role=role,
        seed=seed,
        model_digest=digest,
        data_digest=task.data_digest(),
        request_digest=request.digest if request is not None else "",
        head=task.head,
    )


def embed_weights(task: Task, weights: str | Path, split: Split | None = None, **options: object) -> Embedding:
    """:func:`embed` for a weights file of the task's architecture; the task's own model is not touched.

    Args:
        task: The task.
        weights: A ``.safetensors`` file.
        split: As for :func:`embed`.
        options: As for :func:`embed`; the name is the file's by default.

    Raises:
        ArtifactError: The file is broken or belongs to another architecture.
    """
    from expunge.models.weights import load_weights

    other = copy.copy(task)
    other.model = copy.deepcopy(task.model)
    load_weights(other.model, Path(weights))
    return embed(other, split, **{"name": Path(weights).stem, **options})  # type: ignore[arg-type]


def _features(task: ClassifierTask, split: Split, role: str, ids: Tensor) -> Tensor:
    with evaluating(task.model):
        found = [task.represent(task.load(role, chunk, split))[0] for chunk in torch.split(ids, task.eval_batch_size)]
    stacked = torch.cat([f.detach().cpu() for f in found])
    return stacked if stacked.dtype == torch.float64 else stacked.float()


def _prototypes(task: ClassifierTask) -> tuple[Tensor, Tensor | None]:
    head = task.model.get_submodule(str(task.head))
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape[0] != task.n_classes:
        raise CapabilityError(
            f"the head '{task.head}' ({type(head).__name__}) has no weight with one row for each of the "
            f"{task.n_classes} classes; name the last linear layer by `head`"
        )
    kept = [t.detach().cpu() if t.dtype == torch.float64 else t.detach().cpu().float() for t in (weight, bias)
            if isinstance(t, Tensor)]  # fmt: skip
    return kept[0].flatten(1).clone(), kept[1].clone() if len(kept) > 1 else None

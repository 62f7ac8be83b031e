"""Experiment lists: a JSON list of mappings, each one method on one request and one checkpoint.

The keys and their defaults are those of the DeepDive study of SalUn (``lorenzoorsingher/SalUn_DeepDive``, 2024), whose
lists are read as they are. Unlike there, unknown keys and methods are errors, checkpoints are safetensors files, and
``retrain`` has no mask.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from expunge import files
from expunge.config.load import parse_config
from expunge.config.models import Experiment, TaskConfig
from expunge.config.text import Source, read_yaml, with_overrides, write_yaml
from expunge.digest import json_digest
from expunge.errors import ArtifactError, ConfigError, ExpungeError, did_you_mean
from expunge.method import build_recipe
from expunge.methods._common import Profile
from expunge.models.weights import refuse_pickle
from expunge.part import Frozen
from expunge.recipe import Recipe
from expunge.request import ForgetRequest

#: Names of the study, and the methods here.
METHODS = {
    "rl": "deepdive_rl",
    "rl_split": "deepdive_rl_split",
    "ga": "deepdive_ga",
    "ga_small": "deepdive_ga_small",
    "retrain": "retrain",
}
_WHAT = ("class_to_forget", "unlearning_rate", "idxs_to_forget")
#: Retraining as in the study: constant rate, no momentum, no decay, no augmentation, batches of 32.
_RETRAIN = {"momentum": 0.0, "weight_decay": 0.0, "lr_schedule": "constant", "milestones": [], "augment": False}


class Entry(Frozen):
    """One experiment; exactly one of ``class_to_forget``, ``unlearning_rate`` and ``idxs_to_forget`` is set.

    Args:
        checkpoint: Safetensors weights; the task's own weights by default.
        class_to_forget: A class, by number or name.
        unlearning_rate: Share of the training samples, drawn anew for every run.
        idxs_to_forget: JSON file of training indices, or the indices themselves.
        use_mask: Restrict the change to a saliency mask; true by default, and always false for ``retrain``.
        mask_thr: Fraction of weights that may change.
        lr: Learning rate.
        epochs: Epochs.
        method: ``rl``, ``rl_split``, ``ga``, ``ga_small`` or ``retrain``.
        tag: A word that tells entries apart in the table.
    """

    checkpoint: str | None = None
    class_to_forget: int | str | None = None
    unlearning_rate: float | None = Field(default=None, gt=0, lt=1)
    idxs_to_forget: str | tuple[int, ...] | None = None
    use_mask: bool | None = None
    mask_thr: float = Field(default=0.5, gt=0, le=1)
    lr: float = Field(default=0.1, gt=0)
    epochs: int = Field(default=10, ge=1)
    method: str = "rl"
    tag: str | None = None

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"no method is called {value!r}{did_you_mean(value, METHODS)}")
        return value

    @model_validator(mode="after")
    def _one(self) -> Entry:
        given = [k for k in _WHAT if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of {', '.join(_WHAT)}; set: {', '.join(given) or 'none'}")
        if self.method == "retrain" and self.use_mask:
            raise ValueError("'use_mask' would mask a fresh network by its random gradients; 'retrain' takes no mask")
        return self

    @property
    def masked(self) -> bool:
        """Whether a mask is used."""
        return self.method != "retrain" and self.use_mask is not False

    @property
    def label(self) -> str:
        """The row of the table."""
        mask = f"mask {self.mask_thr:g}" if self.masked else "no mask"
        epochs = f"{self.epochs} epoch" + ("s" if self.epochs > 1 else "")
        return f"{self.method}, {mask}, lr {self.lr:g}, {epochs}" + (f" [{self.tag}]" if self.tag else "")

    def recipe(self, profile: Profile = "as_intended") -> Recipe:
        """The recipe, with the defaults of the study."""
        optim: dict[str, Any] = {"lr": self.lr, "epochs": self.epochs}
        if self.method == "retrain":
            return build_recipe({"method": "retrain", "batch_size": 32, "optim": {**_RETRAIN, **optim}})
        mask = {"use_mask": self.masked, "mask_thr": self.mask_thr}
        return build_recipe({"method": METHODS[self.method], **mask, "profile": profile, "optim": optim})

    def request(self, run: int) -> ForgetRequest:
        """What run number ``run`` forgets: a random share is drawn with the run's number as seed.

        Raises:
            RequestError: The index file is unreadable.
        """
        if self.class_to_forget is not None:
            return ForgetRequest.label(self.class_to_forget)
        if self.unlearning_rate is not None:
            return ForgetRequest.fraction(self.unlearning_rate, stratified=False, seed=run)
        if isinstance(self.idxs_to_forget, str):
            return ForgetRequest.from_file(self.idxs_to_forget)
        return ForgetRequest.samples(self.idxs_to_forget or ())

    def what(self) -> dict[str, Any]:
        """The key that says what to forget, with its value."""
        return {k: getattr(self, k) for k in _WHAT if getattr(self, k) is not None}


class Item(NamedTuple):
    """One cell to run; ``recipe`` is ``None`` for the untouched model."""

    request: ForgetRequest
    label: str
    role: str
    seed: int
    recipe: Recipe | None


@dataclass(frozen=True)
class Group:
    """The entries and cells of one checkpoint."""

    config: Experiment
    entries: tuple[Entry, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Experiments:
    """A list of experiments with the tasks that they run on.

    Args:
        entries: The experiments.
        runs: Repetitions, with seeds ``0 .. runs - 1``.
        profile: ``as_intended`` or ``as_published``, for all entries.
        groups: One per checkpoint.
    """

    entries: tuple[Entry, ...]
    runs: int
    profile: Profile
    groups: tuple[Group, ...]

    @property
    def settings(self) -> Experiment:
        """Name, folder and attacks, which all groups share."""
        return self.groups[0].config

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the table depends on (not of names and folders)."""
        tasks = [g.config.task.model_dump(mode="json") for g in self.groups]
        places = {"name", "output", "trackers", "checkpoint_every", "task"}
        shared = self.settings.model_dump(mode="json", exclude=places)
        entries = [e.model_dump(mode="json") for e in self.entries]
        asked = {"entries": entries, "runs": self.runs, "profile": self.profile, "tasks": tasks}
        return json_digest({**shared, **asked})

    def resolved(self) -> str:
        """What was asked, complete, as YAML."""
        data = self.settings.model_dump(mode="json", exclude={"task", "reference"})
        tasks = [g.config.task.model_dump(mode="json", exclude_unset=True) for g in self.groups]
        entries = [e.model_dump(mode="json", exclude_none=True) for e in self.entries]
        return write_yaml({**data, "runs": self.runs, "profile": self.profile, "tasks": tasks, "experiments": entries})


def read_entries(path: str | Path) -> tuple[Entry, ...]:
    """Read and check a list of experiments.

    Paths in it are looked up from the working directory, then from the list's folder.

    Raises:
        ConfigError: Not a JSON list of mappings; or an entry has an unknown key or method, a wrong value, several or no
            forget sets, or a pickle checkpoint. The message names the entry, counted from 1.
    """
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as a list of experiments ({error})") from None
    if not isinstance(data, list) or not data:
        raise ConfigError(f"{path}: a list of experiments is a JSON list of mappings with at least one entry")
    entries = []
    for number, raw in enumerate(data, 1):
        where = f"{path}: entry {number} of {len(data)}"
        if not isinstance(raw, dict):
            raise ConfigError(f"{where} is {str(raw)[:60]!r}, not a mapping of keys to values")
        found = {k: _found(v, file.parent) if k in ("checkpoint", "idxs_to_forget") else v for k, v in raw.items()}
        try:
            entry = Entry(**found)
            if entry.checkpoint is not None:
                refuse_pickle(Path(entry.checkpoint))
        except ExpungeError as error:
            reason = str(error).replace("'Entry.", "'").replace("'Entry': ", "")
            raise ConfigError(f"{where}: {reason}") from None
        entries.append(entry)
    repeated = [e for e, times in Counter(entries).items() if times > 1]
    if repeated:
        first, second = [n for n, e in enumerate(entries, 1) if e == repeated[0]][:2]
        raise ConfigError(f"{path}: entries {first} and {second} are the same; give a 'tag' to run one twice")
    return tuple(entries)


def load_experiments(
    path: str | Path,
    *,
    runs: int = 4,
    task: str | Path | None = None,
    profile: Profile = "as_intended",
    overrides: dict[str, Any] | None = None,
) -> Experiments:
    """A list of experiments, ready to run.

    Args:
        path: The JSON list.
        runs: Repetitions of every entry.
        task: YAML file with data and model (under ``task``, as in all configurations, or at the top); by default what
            ``expunge train`` has written into the checkpoint.
        profile: Follow the paper's mathematics or the code.
        overrides: Dotted keys of the task (``task.data.limit``) and of the benchmark (``output``, ``attacks``).

    Raises:
        ConfigError: See :func:`read_entries`; or nothing says what data and model a checkpoint belongs to.
        ArtifactError: A checkpoint is missing or broken.
    """
    if runs < 1:
        raise ConfigError(f"runs is {runs}; every entry runs at least once")
    entries = read_entries(path)
    checkpoints = list(dict.fromkeys(e.checkpoint for e in entries))
    groups = []
    for checkpoint in checkpoints:
        number = next(n for n, e in enumerate(entries, 1) if e.checkpoint == checkpoint)
        source = _source(f"{path}: entry {number}", checkpoint, task)
        source.data = {"name": Path(path).stem, "controls": False, "task": source.data}
        config = parse_config(Experiment, with_overrides(source, overrides or {}))
        if config.reference is not None:
            raise ConfigError("a list of experiments has no 'reference'; add an entry with the method 'retrain'")
        if not isinstance(config.task, TaskConfig):
            raise ConfigError(f"{path}: experiments are run on classifiers, not on the {config.task.family} task")
        if config.task.model.weights is None:
            raise ConfigError(f"{path}: entry {number} names no 'checkpoint', and the task no 'model.weights'")
        mine = [e for e in entries if e.checkpoint == checkpoint]
        _numbered_alike(mine, config, str(path))
        suffix = f", {Path(checkpoint or config.task.model.weights).stem}" if len(checkpoints) > 1 else ""
        groups.append(Group(config, tuple(mine), tuple(_items(mine, runs, profile, suffix))))
    return Experiments(entries, runs, profile, tuple(groups))


def _items(entries: Sequence[Entry], runs: int, profile: Profile, suffix: str) -> list[Item]:
    found = []
    titles: dict[str, int] = {}
    for what in list(dict.fromkeys(json.dumps(e.what()) for e in entries)):
        same = [e for e in entries if json.dumps(e.what()) == what]
        requests = [same[0].request(run) for run in range(runs)]
        title = requests[0].title + suffix
        titles[title] = titles.get(title, 0) + 1  # two files of one name are two requests
        title += f" ({titles[title]})" if titles[title] > 1 else ""
        requests = [r.model_copy(update={"name": title}) for r in requests]
        drawn = runs if same[0].unlearning_rate is not None else 1
        found += [Item(requests[run], "untouched", "before", run, None) for run in range(drawn)]
        for entry in same:
            recipe, role = entry.recipe(profile), "reference" if entry.method == "retrain" else "after"
            found += [Item(requests[run], entry.label, role, run, recipe) for run in range(runs)]
    return found


def _numbered_alike(entries: Sequence[Entry], config: Experiment, where: str) -> None:
    """Refuse plain index lists where a validation part renumbers the rows."""
    data = config.task.data
    assert data is not None
    for entry in entries if data.val_fraction else ():
        listed = entry.idxs_to_forget
        if listed is not None and not (isinstance(listed, str) and recorded_digest(listed)):
            raise ConfigError(
                f"{where}: 'idxs_to_forget' numbers all training rows, but val_fraction {data.val_fraction:g} takes "
                "some out and renumbers the rest; use an index file written by `expunge train`, or val_fraction 0"
            )


def recorded_digest(path: str | Path) -> str | None:
    """Digest of the training images that an index file was written for, if it says so."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data.get("sha256") if isinstance(data, dict) else None


def check_index_file(path: str | Path, ours: str) -> None:
    """Refuse an index file that was written for other training images; one that does not say is taken.

    Args:
        path: The index file.
        ours: Digest of the training images that it is to be used with.

    Raises:
        ConfigError: Its ``sha256`` is another digest.
    """
    theirs = recorded_digest(path)
    if theirs is not None and theirs != ours:
        raise ConfigError(
            f"{path}: its indices were written for other training images (sha256 {str(theirs)[:12]}, here "
            f"{ours[:12]}): data, limit, validation share or split seed differ. Use the same settings; or remove the "
            "key 'sha256' if the rows are known to be the same"
        )


def _source(where: str, checkpoint: str | None, task: str | Path | None) -> Source:
    """The raw task of a checkpoint: from a file, or from what the checkpoint says about itself."""
    if task is not None:
        data = read_yaml(Path(task))
        data, file, folder = data.get("task", data), str(task), Path(task).resolve().parent
    elif checkpoint is None:
        raise ConfigError(f"{where} names no 'checkpoint'; add one, or name data and model with --task")
    else:
        _, metadata = files.read_safetensors(checkpoint, names=())
        if "task" not in metadata:
            raise ConfigError(f"{where}: {checkpoint} does not say its data and model; name them with --task")
        try:
            data = json.loads(metadata["task"])
        except ValueError as error:
            raise ArtifactError(f"{checkpoint}: its entry 'task' is no JSON ({error})") from None
        file, folder = checkpoint, Path(checkpoint).resolve().parent
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise ConfigError(f"{file}: a task is a mapping with 'model' and 'data'")
    model = dict(data["model"]) | ({"weights": checkpoint} if checkpoint is not None else {})
    if checkpoint is not None:
        model.pop("pretrained", None)
    return Source({**data, "model": model}, file, folder)


def _found(value: Any, folder: Path) -> Any:
    if not isinstance(value, str) or Path(value).is_absolute() or Path(value).exists():
        return value
    return str((folder / value).resolve()) if (folder / value).exists() else value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [k for k, times in Counter(k for k, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f"key {twice[0]!r} is given twice in one entry")
    return dict(pairs)

"""What a run, a benchmark and a training are asked to do: pydantic models, strict about every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from expunge.config.tasks import AnyTaskConfig as AnyTaskConfig
from expunge.config.tasks import ClipTaskConfig as ClipTaskConfig
from expunge.config.tasks import TaskConfig as TaskConfig
from expunge.data.spec import SurrogateSpec
from expunge.digest import json_digest
from expunge.errors import ConfigError, did_you_mean
from expunge.files import confined
from expunge.method import build_recipe
from expunge.metrics.lira import Lira
from expunge.metrics.probe import Probe
from expunge.metrics.relearn import Relearn
from expunge.part import Frozen
from expunge.recipe import Optim, Recipe
from expunge.request import ForgetRequest
from expunge.track import TrackerName

Attack = Literal["mia", "mia_threshold", "mia_svc", "mia_scar", "mia_scar_published"]


class RequestConfig(Frozen):
    """What to forget; exactly one of the first six keys.

    Args:
        class_: One class, by number or name; written ``class``.
        classes: Several classes.
        fraction: Share of the training set, drawn at random.
        samples: Indices in the training set.
        concept: A concept in words, for models that take text: a class, or what captions name.
        index_file: JSON file with a list of indices, or an object with ``forget`` (and ``retain``).
        stratified: With ``fraction``: the same share of every class.
        seed: With ``fraction``: seed of the draw.
        name: A label for reports.
    """

    model_config = ConfigDict(populate_by_name=False)

    class_: int | str | None = Field(default=None, alias="class")
    classes: tuple[int | str, ...] | None = None
    fraction: float | None = None
    samples: tuple[int, ...] | None = None
    concept: str | None = None
    index_file: str | None = None
    stratified: bool = True
    seed: int = 0
    name: str = ""

    @model_validator(mode="after")
    def _one(self) -> RequestConfig:
        keys = {"class": self.class_, "classes": self.classes, "fraction": self.fraction}
        keys |= {"samples": self.samples, "concept": self.concept, "index_file": self.index_file}
        given = [k for k, v in keys.items() if v is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(keys)}; given: {', '.join(given) or 'none'}")
        drawn = [k for k in ("stratified", "seed") if k in self.model_fields_set]
        if drawn and self.fraction is None:
            raise ValueError(f"'{drawn[0]}' belongs to 'fraction' and would have no effect here")
        return self

    def build(self) -> ForgetRequest:
        """The request.

        Raises:
            RequestError: The index file is unreadable.
        """
        if self.index_file is not None:
            request = ForgetRequest.from_file(self.index_file)
        elif self.samples is not None:
            request = ForgetRequest.samples(self.samples)
        elif self.fraction is not None:
            request = ForgetRequest.fraction(self.fraction, stratified=self.stratified, seed=self.seed)
        elif self.concept is not None:
            request = ForgetRequest.concept(self.concept)
        else:
            one = () if self.class_ is None else (self.class_,)
            request = ForgetRequest.label(*(self.classes if self.classes is not None else one))
        return request.model_copy(update={"name": self.name}) if self.name else request


class Reference(Frozen):
    """A model that never saw the data: retrained now (``method`` with settings), a patch file, or a weights file."""

    method: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    patch: str | None = None
    weights: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Reference:
        if sum(v is not None for v in (self.method, self.patch, self.weights)) != 1:
            raise ValueError("a reference is a method with its settings, or a 'patch' file, or a 'weights' file")
        if self.method is not None and not self.recipe().from_scratch:
            raise ValueError(f"method '{self.method}' starts from the original model; a reference starts from scratch")
        return self

    def recipe(self) -> Recipe:
        """The recipe of a reference that is to be trained."""
        return build_recipe({"method": str(self.method), **self.settings})

    @classmethod
    def parse(cls, value: Any) -> Any:
        """From ``retrain``, ``{method: retrain, **settings}``, ``{patch: file}`` or ``{weights: file}``."""
        if isinstance(value, str):
            return {"method": value}
        if isinstance(value, dict) and "method" in value and "settings" not in value:
            return {"method": value["method"], "settings": {k: v for k, v in value.items() if k != "method"}}
        return value


class Evaluate(Frozen):
    """Further measurements, none by default.

    Args:
        embeddings: Show the embeddings in the report of a run: t-SNE and Wasserstein distances between classes.
        lira: Attack with shadow models; ``{}`` takes the published training protocol.
        relearn: Steps of training that bring the forgotten samples back; ``{}`` takes the defaults.
    """

    embeddings: bool = False
    lira: Lira | None = None
    relearn: Relearn | None = None

    def probes(self) -> tuple[Probe, ...]:
        """The measurements that train."""
        return tuple(p for p in (self.relearn, self.lira) if p is not None)


class Experiment(Frozen):
    """What runs and benchmarks share."""

    name: str = Field(min_length=1, max_length=120)
    task: AnyTaskConfig
    controls: bool = True
    reference: Reference | None = None
    attacks: tuple[Attack, ...] = ("mia", "mia_threshold")
    evaluate: Evaluate = Evaluate()
    trackers: tuple[TrackerName, ...] = ()
    checkpoint_every: int | None = Field(default=None, ge=1)
    output: str | None = None

    @field_validator("reference", mode="before")
    @classmethod
    def _reference(cls, value: Any) -> Any:
        return Reference.parse(value)

    @field_validator("name")
    @classmethod
    def _confined(cls, value: str) -> str:
        confined("runs", value)
        return value

    @property
    def folder(self) -> Path:
        """Where results go: ``output``, by default ``runs/<name>``."""
        return Path(self.output) if self.output is not None else Path("runs") / self.name


class RunConfig(Experiment):
    """One run: unlearn, controls, evaluation.

    Args:
        name: Name of the run.
        task: Model and data.
        request: What to forget.
        recipe: A method name, ``{method, **settings}``, or objective and space spelled out.
        seed: Seed of the run.
        output: Run folder, ``runs/<name>`` by default.
        controls: Also run the controls that apply.
        reference: The retrained model to compare with.
        attacks: Membership attacks.
        evaluate: Further measurements: ``embeddings``, ``lira``, ``relearn``.
        trackers: ``tensorboard``, ``wandb``.
        checkpoint_every: Steps between checkpoints, by default one per epoch.
    """

    request: RequestConfig
    recipe: str | dict[str, Any]
    seed: int = 0

    def build_recipe(self) -> Recipe:
        """The recipe with every setting spelled out."""
        return build_recipe(self.recipe)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that a result depends on (not of names and folders)."""
        data = self.model_dump(mode="json", exclude={"name", "output", "trackers", "checkpoint_every"})
        return json_digest({**data, "recipe": self.build_recipe().describe()})


class BenchConfig(Experiment):
    """Methods x seeds x requests.

    Args:
        methods: Method names or ``{method, **settings}``; ``label`` tells two entries of one method apart, and
            ``surrogate`` gives an entry surrogate images of its own.
        seeds: Seeds of the runs.
        requests: What to forget, one table each.
        controls: Run the controls of every method, of none, or of the methods with these labels.
    """

    controls: bool | tuple[str, ...] = True  # type: ignore[assignment]
    methods: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    requests: tuple[RequestConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> BenchConfig:
        labels = [label for label, _ in self.recipes()]
        if len(set(labels)) < len(labels):
            twice = next(n for n in labels if labels.count(n) > 1)
            raise ValueError(f"'methods' has {twice!r} twice; give 'label' to tell them apart")
        for label in self.controls if isinstance(self.controls, tuple) else ():
            if label not in labels:
                raise ValueError(f"'controls' names {label!r}, which is no method here{did_you_mean(label, labels)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("'seeds' has one seed twice")
        self.surrogates()
        if self.evaluate.embeddings:
            raise ValueError("'evaluate.embeddings' belongs to the report of a single run; use `expunge analyze` here")
        requests = [r.model_dump_json() for r in self.requests]
        if len(set(requests)) < len(requests):
            raise ValueError("'requests' has one request twice")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the table depends on (not of names and folders)."""
        data = self.model_dump(mode="json", exclude={"name", "output", "trackers", "checkpoint_every", "methods"})
        methods = {label: recipe.describe() for label, recipe in self.recipes()}
        own = {label: spec.model_dump(mode="json") for label, spec in self.surrogates().items()}
        return json_digest({**data, "methods": methods, **({"surrogates": own} if own else {})})

    def recipes(self) -> list[tuple[str, Recipe]]:
        """Labels and recipes, in order."""
        found = []
        for spec in self.methods:
            settings = {"method": spec} if isinstance(spec, str) else dict(spec)
            label = settings.pop("label", None)
            settings.pop("surrogate", None)
            recipe = build_recipe(settings)
            found.append((str(label if label is not None else settings.get("method", recipe.name)), recipe))
        return found

    def surrogates(self) -> dict[str, SurrogateSpec]:
        """The methods, by label, that bring surrogate images of their own.

        Raises:
            ConfigError: The settings of one are wrong; its place in ``methods`` is named.
        """
        labels = [label for label, _ in self.recipes()]
        specs = [spec.get("surrogate") if isinstance(spec, dict) else None for spec in self.methods]
        found = {}
        for i, (label, spec) in enumerate(zip(labels, specs, strict=True)):
            if spec is None:
                continue
            if not isinstance(spec, str | dict):
                raise ConfigError(f"'methods.{i}.surrogate' is a name or a mapping of settings, got {spec!r}"[:200])
            try:
                found[label] = SurrogateSpec(**({"name": spec} if isinstance(spec, str) else spec))
            except ConfigError as error:
                raise ConfigError(f"'methods.{i}.surrogate': {error}") from None
        return found


class TrainConfig(Frozen):
    """Train an original, or a retrained model that never sees what ``exclude`` names.

    Args:
        name: Name of the training.
        task: Model and data; the model's weights are the start.
        optim: Fields that replace those of the published protocol.
        batch_size: Samples per step.
        label_smoothing: Share of every target that is spread evenly over all classes.
        average: Decay of a moving average of the weights, which is then the result (diffusion models).
        seed: Seed of order, augmentation and dropout.
        exclude: What to leave out.
        statistics: Also write the class statistics that SCAR needs, ``<weights>.statistics.safetensors``: one pass over
            the samples trained on. With that file as its ``statistics``, SCAR never opens the retain set.
        output: Weights file, ``runs/<name>.safetensors`` by default.
        trackers: ``tensorboard``, ``wandb``.
    """

    name: str = Field(min_length=1, max_length=120)
    task: AnyTaskConfig
    optim: dict[str, Any] = Field(default_factory=dict)
    batch_size: int = Field(default=256, ge=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    average: float | None = Field(default=None, gt=0, lt=1)
    seed: int = 0
    exclude: RequestConfig | None = None
    statistics: bool = False
    output: str | None = None
    trackers: tuple[TrackerName, ...] = ()

    @field_validator("name")
    @classmethod
    def _confined(cls, value: str) -> str:
        confined("runs", value)
        return value

    def build_optim(self) -> Optim:
        """The optimiser settings, complete."""
        from expunge.train import PUBLISHED

        return Optim(**{**PUBLISHED.model_dump(), **self.optim})

"""Model and data of a configuration: one settings model per family."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, field_validator, model_validator

from expunge.data.captioned_sets import ZeroShotSet
from expunge.data.spec import DataSpec, SurrogateSpec
from expunge.models.build import ModelSpec
from expunge.models.clip import ClipSpec
from expunge.models.ddpm import DdpmSpec
from expunge.models.normalize import Normalize
from expunge.models.pipelines import PipelineSpec
from expunge.part import Frozen
from expunge.tasks.ddpm import Sampling


class MeanStd(Frozen):
    """Normalisation by numbers: one value per channel, or one for all."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class TaskConfig(Frozen):
    """Model and data.

    Args:
        family: ``classifier``.
        model: The network and its weights.
        data: Training and test images.
        normalize: Name (``cifar10``, ``imagenet`` ...), numbers, or null for none.
        surrogate: Images of another domain, for methods that may not see the retain set.
        eval_batch_size: Batch size of evaluation passes.
        head: Name of the module whose inputs are the features; found by itself for models that end in a linear layer.
    """

    family: Literal["classifier"] = "classifier"
    model: ModelSpec
    data: DataSpec
    normalize: str | MeanStd | None = None
    surrogate: SurrogateSpec | None = None
    eval_batch_size: int = Field(default=512, ge=1)
    head: str | None = None

    @field_validator("normalize")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, str):
            Normalize.named(value)
        return value


class ClipTaskConfig(Frozen):
    """A two-tower model with captioned images.

    Args:
        family: ``clip``.
        model: The model: the bundled ``canvas``, a local folder, a hub id or an open_clip name.
        data: Captioned training and test images: ``canvas``, ``captions`` ...
        axis: The label axis whose classes may be forgotten, such as ``object`` or ``style``; the main one by default.
        templates: Prompts with ``{}`` instead of the axis' own.
        forget_loss: ``cosine`` (1 - cos with the own caption), or ``contrastive`` as for all other images.
        others: Further image sets that the model is tested on, by name, with classes of their own: ImageNet, CelebA,
            any class folders.
        eval_batch_size: Batch size of evaluation passes.
    """

    family: Literal["clip"]
    model: ClipSpec = ClipSpec()
    data: DataSpec
    axis: str | None = None
    templates: tuple[str, ...] | None = None
    forget_loss: Literal["cosine", "contrastive"] = "cosine"
    others: dict[str, ZeroShotSet] = Field(default_factory=dict)
    eval_batch_size: int = Field(default=256, ge=1)


class DdpmTaskConfig(Frozen):
    """A class-conditional diffusion model with labelled images.

    Args:
        family: ``ddpm``.
        model: The network and its noise levels.
        data: Training and test images.
        sampling: How images are drawn when the model is evaluated.
        condition_drop: Share of the training samples that lose their class.
        antithetic: Times come in pairs ``t`` and ``T - 1 - t``, as published.
        eval_batch_size: Batch size of evaluation passes.
    """

    family: Literal["ddpm"]
    model: DdpmSpec = DdpmSpec()
    data: DataSpec
    sampling: Sampling = Sampling()
    condition_drop: float = Field(default=0.1, ge=0, lt=1)
    antithetic: bool = False
    eval_batch_size: int = Field(default=256, ge=1)


def _listed(value: Any) -> Any:
    """The names of a published list, if one is named."""
    from expunge.diffusion.benchmark_names import class_list

    return class_list(value) if isinstance(value, str) else value


#: Names of classes, or the name of a published list of them.
ClassNames = Annotated[
    tuple[str, ...],
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class JudgeSpec(Frozen):
    """A classifier that names what drawn images show, along one label axis.

    Args:
        model: The network and its weights, as ``expunge train`` or timm has them; classes in the order of the axis.
        classes: Names of the classes, where the task has no such axis; or the name of a published list:
            ``unlearncanvas_style``, ``unlearncanvas_object``, ``imagenette``, ``srs_me_style``, ``srs_me_object``.
        outputs: A network that knows more than the classes: which of its outputs they are; ``imagenet`` looks up the
            numbers of Imagenette's classes. An image then shows a class only if no other output, of all, is larger.
        size: Side that images are resized to; ``input_shape`` of the model by default.
        crop: Side of the centre that is then cut out; nothing is cut off by default.
        normalize: Name of the normalisation.
    """

    model: ModelSpec
    classes: ClassNames | None = None
    outputs: Literal["imagenet"] | tuple[int, ...] | None = None
    size: int | None = Field(default=None, ge=1)
    crop: int | None = Field(default=None, ge=1)
    normalize: str = "half"

    @field_validator("normalize")
    @classmethod
    def _known(cls, value: str) -> str:
        Normalize.named(value)
        return value

    @model_validator(mode="after")
    def _outputs(self) -> JudgeSpec:
        from expunge.diffusion.benchmark_names import imagenet_numbers

        names, width = self.classes, self.model.n_classes
        if self.crop is not None and self.crop > (self.size or self.model.input_shape[1]):
            raise ValueError("'crop' is larger than the image that it is cut from; set 'size'")
        if names is not None and len({n.lower() for n in names}) < len(names):
            raise ValueError("'classes' has a name twice")
        if self.outputs == "imagenet":
            if width != 1000:
                raise ValueError(f"'outputs: imagenet' is for models of 1,000 classes, this one has {width}")
            imagenet_numbers(names or ())
        elif self.outputs is not None:
            twice = sorted({o for o in self.outputs if self.outputs.count(o) > 1})
            far = [o for o in self.outputs if not 0 <= o < width]
            if twice or far or not self.outputs:
                wrong = f"{twice[0]} stands twice" if twice else f"{far} of {width} outputs"
                raise ValueError(f"'outputs' are different numbers from 0 to {width - 1}: {wrong}")
            if names is not None and len(names) != len(self.outputs):
                raise ValueError(f"{len(self.outputs)} outputs for {len(names)} classes")
        return self

    @model_validator(mode="after")
    def _trained(self) -> JudgeSpec:
        if self.model.weights is None and not self.model.pretrained:
            raise ValueError("a judge needs 'model.weights'; an untrained one judges nothing")
        return self


class FurtherFigures(Frozen):
    """Figures of drawn images that need models of their own; one whose weights are not at hand is reported as not run.

    Args:
        clip: Two-tower model of the CLIP score.
        lpips: Weights file of the AlexNet behind LPIPS.
        style: Weights file of the VGG-19 behind the style loss.
        inception: Weights file of torchvision's Inception v3, whose features then give FID and KID; those of the judge
            by default.
        nudity: Count detections of NudeNet.
        threshold: Its threshold.
    """

    clip: ClipSpec | None = None
    lpips: str | None = None
    style: str | None = None
    inception: str | None = None
    nudity: bool = False
    threshold: float = Field(default=0.6, gt=0, lt=1)


class TextToImageTaskConfig(Frozen):
    """A text-to-image pipeline with captioned images, or with prompts alone.

    Args:
        family: ``text_to_image``.
        model: The pipeline.
        data: Captioned images: ``canvas``, ``captions``. Without them methods that need images are refused.
        axis: The label axis whose classes may be forgotten; the main one by default.
        classes: Without images: the classes of the axis, or the name of a published list, see :class:`JudgeSpec`.
        templates: Without images: prompts with ``{}`` for the name.
        prompts: CSV file with ``prompt``, ``evaluation_seed``, ``case_number``: what an evaluation draws; by default
            every prompt of the axis.
        steps: Steps of the sampler.
        guidance: Weight of classifier-free guidance.
        side: Pixels along one side; that of the pipeline by default.
        virtual: Number of virtual samples, for methods without images.
        seed: Seed of the noise.
        sample_batch: Images that are drawn at once.
        images_per_prompt: Of an evaluation; by default what the prompts file says in its column ``images``, or 1.
        judge: What says what images show: ``canvas`` (the bundled classifier of drawn objects and styles), or a
            classifier per axis (UnlearnCanvas: one of styles, one of objects). Without one images are drawn and
            compared, and UA, IRA and CRA are not run.
        figures: Further figures of drawn images: CLIP score, LPIPS, style loss, nudity.
        gradient_checkpointing: Training steps keep less of each pass of the U-Net and run its blocks once more: the
            same gradients in less memory and more time.
    """

    family: Literal["text_to_image"]
    model: PipelineSpec = PipelineSpec()
    data: DataSpec | None = None
    axis: str | None = None
    classes: ClassNames | None = None
    templates: tuple[str, ...] = ("{}",)
    prompts: str | None = None
    steps: int = Field(default=50, ge=1)
    guidance: float = Field(default=7.5, ge=0)
    side: int | None = Field(default=None, ge=8)
    virtual: int = Field(default=4096, ge=1)
    seed: int = 0
    sample_batch: int = Field(default=16, ge=1)
    images_per_prompt: int | None = Field(default=None, ge=1)
    judge: Literal["canvas"] | dict[str, JudgeSpec] | None = None
    figures: FurtherFigures = FurtherFigures()
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _something(self) -> TextToImageTaskConfig:
        if (self.data is None) == (self.classes is None):
            raise ValueError("give 'data' (captioned images), or 'classes' (names) for a task without images")
        return self


def _family(value: Any) -> str:
    return str(value.get("family", "classifier") if isinstance(value, dict) else getattr(value, "family", ""))


AnyTaskConfig = Annotated[
    Annotated[TaskConfig, Tag("classifier")]
    | Annotated[ClipTaskConfig, Tag("clip")]
    | Annotated[DdpmTaskConfig, Tag("ddpm")]
    | Annotated[TextToImageTaskConfig, Tag("text_to_image")],
    Discriminator(_family),
]

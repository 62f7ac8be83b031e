"""Asking a vision-language model about images, and judging its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.data.captions import mentions
from expunge.data.folders import SUFFIXES
from expunge.digest import named_tensors
from expunge.errors import ArtifactError, ConfigError, DataError
from expunge.part import Frozen
from expunge.patch import Patch, apply, revert

if TYPE_CHECKING:
    from expunge.consumers.answers import Interview

#: An answer that has one of these and not the name is a refusal. Whole words, any case.
REFUSALS = (
    "i cannot", "i can't", "i can not", "cannot identify", "can't identify", "not able to", "unable to",
    "i don't know", "i do not know", "not sure", "sorry", "unknown", "no information", "cannot determine",
    "can't determine", "not possible to", "impossible to",
)  # fmt: skip


class Question(Frozen):
    """What is asked about every image.

    Args:
        text: The question. It must not hold the name that is looked for.
        template: Prompt around it, with ``<image>`` and ``{question}``; used if the processor has no chat template.
    """

    text: str = "What is the name of the person in this image?"
    template: str = "USER: <image>\n{question} ASSISTANT:"

    def prompt(self, processor: Any) -> str:
        """The text that the model gets, in the processor's chat template where it has one.

        Raises:
            ConfigError: The template lacks the image or the question.
        """
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": self.text}]
            turns = [{"role": "user", "content": content}]
            return str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        if self.template.count("{question}") != 1 or self.template.count("<image>") != 1:
            raise ConfigError(f"a template has '<image>' and '{{question}}' once each, got {self.template!r}")
        return self.template.replace("{question}", self.text)


WHO = Question()


@dataclass(frozen=True)
class Verdict:
    """What one answer says.

    Args:
        named: It holds the true name.
        refused: It does not, and holds a phrase of :data:`REFUSALS`.
        others: Other names under test that it holds.
    """

    named: bool
    refused: bool
    others: tuple[str, ...] = ()


def ask(
    model: Any,
    processor: Any,
    images: Tensor | Sequence[Any],
    question: Question | str = WHO,
    max_new_tokens: int = 16,
    batch_size: int = 8,
) -> list[str]:
    """Answers to one question about each image, by greedy decoding.

    Only tokens that the model adds are decoded: the prompt is no part of an answer.

    Args:
        model: A LLaVA-style model of transformers. It is left in the mode it was in.
        processor: Its processor.
        images: Pictures (``PIL.Image``), or pixels in [0, 1] ``[N, 3, H, W]``.
        question: The question, or its text.
        max_new_tokens: Length of an answer.
        batch_size: Images per call; all have the same prompt.

    Returns:
        One answer per image, without special tokens and blanks around it.

    Raises:
        ConfigError: A number below 1.
        DataError: No images.

    Deviates:
        The published helper decodes prompt and answer together, so that a name in the question counts as known.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens} and batch_size {batch_size} must be at least 1")
    if len(images) == 0:
        raise DataError("no images to ask about")
    from transformers import GenerationConfig

    prompt = (Question(text=question) if isinstance(question, str) else question).prompt(processor)
    own = model.generation_config
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id if own.pad_token_id is None else own.pad_token_id,
    )
    shown = pictures(images)
    answers: list[str] = []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(shown), batch_size):
            some = shown[start : start + batch_size]
            options: dict[str, Any] = {"padding": True, "padding_side": "left"} if len(some) > 1 else {}
            inputs = processor(images=some, text=[prompt] * len(some), return_tensors="pt", **options)
            inputs = inputs.to(model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            with torch.no_grad():
                out = model.generate(**inputs, generation_config=settings)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers += [t.strip() for t in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    finally:
        model.train(training)
    return answers


def score_answers(answers: Sequence[str], names: Sequence[str], known: Sequence[str] = ()) -> list[Verdict]:
    """Judge answers: is the true name in them, as whole words in any case; is it a refusal; is it another name.

    The forget accuracy FA of an identity is the share of answers with ``named``.

    Args:
        answers: From :func:`ask`.
        names: The true name of each image; an underscore is a blank.
        known: All names under test; by default those in ``names``.

    Raises:
        DataError: Lengths differ, or a name is empty.
    """
    if len(answers) != len(names):
        raise DataError(f"{len(answers)} answers but {len(names)} names")
    candidates = list(dict.fromkeys(known or names))
    verdicts = []
    for answer, name in zip(answers, names, strict=True):
        named = mentions(answer, name)
        others = tuple(o for o in candidates if o != name and mentions(answer, o))
        verdicts.append(Verdict(named, not named and refuses(answer), others))
    return verdicts


def refuses(answer: str) -> bool:
    """Whether an answer has one of the phrases of :data:`REFUSALS`.

    >>> refuses("I’m sorry, but I can't say."), refuses("This is Ada.")
    (True, False)
    """
    plain = " ".join(answer.replace("’", "'").split()).lower()
    return any(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", plain) for phrase in REFUSALS)


def interview(
    model: Any,
    processor: Any,
    images: Tensor | Sequence[Any],
    names: Sequence[str],
    question: Question | str = WHO,
    *,
    patches: Sequence[Patch] = (),
    forget: Sequence[str] = (),
    max_new_tokens: int = 16,
    batch_size: int = 8,
) -> Interview:
    """Ask about every image without and with patches. The patches are taken off again, whatever happens.

    Args:
        model: A LLaVA-style model of transformers.
        processor: Its processor.
        images: As in :func:`ask`.
        names: The true name of each image.
        question: The question, or its text.
        patches: Made on this model, or by :func:`~expunge.consumers.transfer.transfer`; none: only the first pass.
        forget: Names that the patches are meant to remove; by default the concepts that their requests name.
        max_new_tokens: Length of an answer.
        batch_size: Images per call.

    Raises:
        DataError: Lengths differ, a name to forget has no image, or the question holds one of the names.
        ArtifactError: A patch does not belong to this model.
    """
    from expunge.consumers.answers import Interview, Pass

    asked = Question(text=question) if isinstance(question, str) else question
    if len(images) != len(names):
        raise DataError(f"{len(images)} images but {len(names)} names")
    known = tuple(dict.fromkeys(names))
    given = [n for n in known if mentions(asked.text, n)]
    if given:
        raise DataError(f"the question names '{given[0]}': a model that repeats it would seem to know it")
    unknown = [n for n in forget if n not in known]
    if unknown:
        raise DataError(f"'{unknown[0]}' is to be forgotten but has no images; there are: {', '.join(known[:20])}")
    tensors = named_tensors(model)[0]
    strange = [n for p in patches for n in p if n not in tensors]
    if strange:
        raise ArtifactError(
            f"a patch changes '{strange[0]}', which {type(model).__name__} does not have. If it was made on the CLIP "
            "inside, carry it over first: `expunge transfer`"
        )
    wanted = tuple(forget) or tuple(n for n in known if any(_concerns(p, n) for p in patches))

    def once() -> Pass:
        answers = ask(model, processor, images, asked, max_new_tokens, batch_size)
        return Pass(tuple(answers), tuple(score_answers(answers, names, known)))

    before, after = once(), None
    if patches:
        apply(model, *patches)
        try:
            after = once()
        finally:
            revert(model, *patches)
    digests = tuple(p.digest for p in patches)
    return Interview(asked.prompt(processor), tuple(names), wanted, before, after, digests)


def named_images(root: str | Path) -> tuple[list[Any], list[str], list[str]]:
    """Pictures in folders whose names are the answers: ``root/<name>/*``; an underscore is a blank.

    Returns:
        ``(pictures, names, files)``, in sorted order; files relative to ``root``.

    Raises:
        DataError: No folders, an empty one, or a file that is no image.
    """
    from PIL import Image, UnidentifiedImageError

    folder = Path(root)
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
    if not classes:
        raise DataError(f"{folder} has no folders; expected {folder}/<name>/<image files>")
    found, names, files = [], [], []
    for place in classes:
        paths = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(f"{place} has no image files ({', '.join(SUFFIXES)})")
        for path in paths:
            try:
                with Image.open(path) as picture:
                    found.append(picture.convert("RGB"))
            except (OSError, UnidentifiedImageError) as error:
                raise DataError(f"{path}: not a readable image ({error})") from None
            names.append(place.name.replace("_", " "))
            files.append(str(path.relative_to(folder)))
    return found, names, files


def pictures(images: Tensor | Sequence[Any]) -> list[Any]:
    """Pixels in [0, 1] ``[N, 3, H, W]`` as pictures of eight bits; a list of pictures stays as it is."""
    if not isinstance(images, Tensor):
        return list(images)
    from PIL import Image

    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in (images.cpu() * 255).round().clamp(0, 255).byte()]


def _concerns(patch: Patch, name: str) -> bool:
    what = patch.manifest.request.get("what", {})
    return what.get("kind") == "concept" and mentions(str(what.get("text", "")), name)

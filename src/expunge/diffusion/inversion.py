"""Textual inversion: vectors in place of words, learned from images of a concept with everything else frozen.

Stage 1 of Forget-Me-Not (Zhang et al. 2023, SHI-Labs/Forget-Me-Not), after Gal et al., "An Image is Worth One Word".
The new tokens are not added to a vocabulary: their vectors take the place of what the token table gives at certain
positions of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from expunge.diffusion.captions import one_place
from expunge.diffusion.forget_me_not import pulled, token_positions
from expunge.diffusion.parameter_sets import token_tables
from expunge.errors import CapabilityError, ConfigError, DivergedError, RequestError
from expunge.models.text_states import TextStates
from expunge.part import Frozen


class Inversion(Frozen):
    """Textual inversion: what is learned, and how.

    Args:
        tokens: New tokens per concept.
        initial: Their first values, ``"elon|musk|<rand-1>|<rand-1>"``: a word of one token each, or ``<rand-s>`` for
            normal numbers of standard deviation ``s``. By default the tokens of the concept's name, then ``<rand-1>``.
        template: The prompt, with ``{}`` where the new tokens go; ``a photo in the style of {}`` for styles.
        steps: Updates.
        lr: Learning rate of AdamW.
        weight_decay: Its decay, of the new vectors only.
        batch_size: Images per step.
        norm: Where norms ``n`` are pulled to after every update: ``n + min(1, 100 lr) (norm - n)``.
    """

    tokens: int = Field(default=4, ge=1, le=64)
    initial: str = ""
    template: str = "a photo of {}"
    steps: int = Field(default=500, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    batch_size: int = Field(default=1, ge=1)
    norm: float = Field(default=0.4, gt=0)

    @field_validator("template")
    @classmethod
    def _one_place(cls, value: str) -> str:
        return one_place(value, "template", "the new tokens go")

    @model_validator(mode="after")
    def _as_many(self) -> Inversion:
        pieces = len(self.initial.split("|")) if self.initial else self.tokens
        if pieces != self.tokens:
            raise ValueError(f"'initial' has {pieces} pieces, 'tokens' is {self.tokens}; give one piece per token")
        return self


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt with places for new tokens.

    Args:
        ids: int64 ``[T]`` for each text encoder; at the places some token that is never looked at.
        places: bool ``[T]``.
        numbered: The first encoder's ids with ``-1, -2, ...`` at the places.
    """

    ids: tuple[Tensor, ...]
    places: Tensor
    numbered: tuple[int, ...]

    def positions(self, end_of_text: int | None = None, *, published: bool = False) -> Tensor:
        """The places and an end of the text, bool ``[T]``; the arguments are those of :func:`token_positions`."""
        new = [i for i in self.numbered if i < 0]
        return token_positions(self.numbered, new, end_of_text, published=published)


def prompt_of(text: TextStates, template: str, tokens: int) -> Prompt:
    """The template with places for new tokens, as the pipeline's text encoders read it.

    Args:
        text: Of the pipeline.
        template: With ``{}`` where the tokens go.
        tokens: How many.

    Raises:
        RequestError: It is longer than prompts may be.
        CapabilityError: A tokenizer marks the ends of a prompt in another way, or the two of XL disagree.
    """
    parts = [part.strip() for part in template.split("{}")]
    found: list[list[int]] = []
    for which, (tokenizer, _) in enumerate(text.encoders):
        begin, end, *_ = empty = text.token_ids([""], which)[0].tolist()
        if (begin, end) != (tokenizer.bos_token_id, tokenizer.eos_token_id):
            raise CapabilityError("textual inversion needs a tokenizer that puts one token before a text and one after")
        before, after = (tokenizer(p, add_special_tokens=False)["input_ids"] if p else [] for p in parts)
        ids = [begin, *before, *range(-1, -tokens - 1, -1), *after, end]
        if len(ids) > len(empty):
            raise RequestError(
                f"'{template}' with {tokens} new tokens has {len(ids)} tokens; prompts have {len(empty)}"
            )
        found.append(ids + empty[len(ids) :])
    numbered = torch.tensor(found[0])
    places = numbered < 0
    if any(not torch.equal(torch.tensor(ids) < 0, places) for ids in found):
        raise CapabilityError("the two tokenizers of this pipeline cut the template differently")
    filled = []
    for ids, (tokenizer, _) in zip(found, text.encoders, strict=True):
        special = set(tokenizer.all_special_ids)
        filler = next(i for i in range(len(tokenizer)) if i not in special)
        filled.append(torch.tensor([filler if i < 0 else i for i in ids]))
    return Prompt(tuple(filled), places, tuple(found[0]))


def conditions(text: TextStates, prompt: Prompt, rows: Sequence[Tensor]) -> Tensor:
    """What the U-Net receives of a prompt with new tokens, ``[1, T, D]``; gradients reach the rows.

    Args:
        text: Of the pipeline.
        prompt: From :func:`prompt_of`.
        rows: ``[n, D_e]`` for each text encoder.
    """
    with ExitStack() as stack:
        for table, own in zip(tables(text), rows, strict=True):
            stack.enter_context(_replaced(table, prompt.places, own))
        return text.of_ids([ids[None] for ids in prompt.ids])


def tables(text: TextStates) -> list[nn.Embedding]:
    """Token tables of the text encoders."""
    found = []
    for _, encoder in text.encoders:
        (name,) = token_tables(encoder)
        table = encoder.get_submodule(name.rpartition(".")[0])
        assert isinstance(table, nn.Embedding)
        found.append(table)
    return found


@contextmanager
def _replaced(table: nn.Embedding, places: Tensor, rows: Tensor) -> Iterator[None]:
    """The table's output holds the rows at the places while this is open."""

    def put(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.index_copy(1, places.nonzero()[:, 0].to(output.device), rows.to(output)[None])

    handle = table.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def first_rows(text: TextStates, name: str, settings: Inversion) -> str:
    """What the new tokens of a concept start from, as :func:`~expunge.diffusion.forget_me_not.initial_rows` reads it.

    >>> Inversion(initial="star|<rand-1>", tokens=2).initial
    'star|<rand-1>'

    Raises:
        RequestError: The name has no tokens.
        ConfigError: A word of ``initial`` has not exactly one token.
    """
    tokenizer = text.parts.tokenizer

    def own(words: str) -> list[int]:
        found: list[int] = tokenizer(words, add_special_tokens=False)["input_ids"]
        return found

    if not settings.initial:
        ids = own(name)[: settings.tokens]
        if not ids:
            raise RequestError(f"'{name}' has no tokens")
        return "|".join([*map(str, ids), *["<rand-1>"] * (settings.tokens - len(ids))])
    pieces = settings.initial.split("|")
    for i, piece in enumerate(pieces):
        if piece.startswith("<rand-"):
            continue
        ids = own(piece)
        if len(ids) != 1:
            raise ConfigError(f"inversion.initial: '{piece}' has {len(ids)} tokens; a word of one token is needed")
        pieces[i] = str(ids[0])
    return "|".join(pieces)


def learn(
    losses: Callable[[int, list[Tensor]], Tensor],
    rows: Sequence[Tensor],
    settings: Inversion,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[Tensor], Tensor]:
    """Train rows by AdamW, their norms pulled after every update.

    Args:
        losses: ``(step, rows)`` to the losses of its samples ``[B]``.
        rows: First values, ``[n, D_e]`` for each text encoder.
        settings: Steps, rates and norm.
        advance: Told of every step.

    Returns:
        The rows, and the mean loss of every step ``[steps]``; both float32 on the CPU.

    Raises:
        DivergedError: A loss is not finite.
    """
    own = [r.detach().float().clone().requires_grad_() for r in rows]
    optimizer = torch.optim.AdamW(own, lr=settings.lr, weight_decay=settings.weight_decay)
    history = []
    for step in range(settings.steps):
        with torch.enable_grad():
            value = losses(step, own).mean()
            if not bool(torch.isfinite(value)):
                raise DivergedError(f"textual inversion: the loss of step {step} is not finite; lower inversion.lr")
            for row, gradient in zip(own, torch.autograd.grad(value, own), strict=True):
                row.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for row in own:
                row.copy_(pulled(row, settings.lr, settings.norm))
        history.append(value.detach().float().cpu())
        advance(1)
    return [r.detach().cpu() for r in own], torch.stack(history)

"""Which pairs are forgotten and which are retained: by names in captions, and apart from each other."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from expunge.data.captions import mentions
from expunge.data.curate.pairs import Pair, Shard, image_suffix
from expunge.data.decode import MAX_PIXELS, decode_image
from expunge.errors import ConfigError, DataError, RequestError, did_you_mean

_SHOWN = 5
_VOCABULARY = 50_000

#: Told after every shard: which side, shards read so far, shards in all, pairs kept so far.
Progress = Callable[[str, int, int, int], None]


@dataclass(frozen=True)
class Rules:
    """What is taken.

    Args:
        names: The name and its aliases; a pair is forgotten if its caption mentions one, and never retained.
        limit: Stop after so many forget pairs.
        retain_limit: Stop after so many retain pairs.
        exclude: Keys left out on both sides, as ``key`` or ``shard/key``.
        max_bad: Largest share of unusable retain pairs, and of unreadable retain shards.
        max_pixels: Larger images are not decoded.
    """

    names: tuple[str, ...] = ()
    limit: int | None = None
    retain_limit: int | None = None
    exclude: tuple[str, ...] = ()
    max_bad: float = 0.01
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for what, value in (("limit", self.limit), ("retain limit", self.retain_limit)):
            if value is not None and value < 1:
                raise ConfigError(f"the {what} must be at least 1, got {value}")
        if not 0 <= self.max_bad < 1:
            raise ConfigError(f"the tolerated share of bad retain pairs must be in [0, 1), got {self.max_bad:g}")
        if any(not re.sub(r"[\s_]+", "", name) for name in self.names):
            raise ConfigError("a name to look for is empty")

    def named(self, caption: str) -> tuple[str, ...]:
        """The names that a caption mentions."""
        return tuple(name for name in self.names if mentions(caption, name))

    def excludes(self, pair: Pair) -> str | None:
        """The entry of ``exclude`` that names the pair."""
        return next((key for key in self.exclude if key in (pair.key, pair.identity)), None)


@dataclass(frozen=True)
class Taken:
    """A pair that was decoded once and is kept as it is.

    Args:
        pair: The pair; its caption is text.
        sha256: Of the encoded image.
        suffix: Extension by content.
        names: What its caption mentions.
    """

    pair: Pair
    sha256: str
    suffix: str
    names: tuple[str, ...] = ()


@dataclass
class Side:
    """What reading one side gave.

    Args:
        taken: The pairs kept, in the order found.
        looked_at: Pairs looked at.
        complete: Whether all shards were read; a limit stops earlier.
        skipped: Place and reason of what could not be used.
        removed: For the retain side, pairs left out by reason.
        excluded: Entries of ``exclude`` that occurred.
    """

    taken: list[Taken] = field(default_factory=list)
    looked_at: int = 0
    complete: bool = True
    skipped: list[tuple[str, str]] = field(default_factory=list)
    removed: dict[str, list[str]] = field(default_factory=lambda: {"key": [], "caption": [], "image": []})
    excluded: set[str] = field(default_factory=set)


def find_forget(shards: Sequence[Shard], rules: Rules, progress: Progress | None = None) -> Side:
    """Take the pairs to forget.

    Nothing that may belong to the forget side is skipped: an unreadable shard, a pair without a caption, and a matching
    pair without a usable image are errors. Pairs with another caption that lack their image are listed in ``skipped``.

    Raises:
        DataError: Some of these; the message names shard and key.
        RequestError: No caption mentions any of the names.
    """
    side, bad = Side(), []
    words: Counter[str] = Counter()
    for number, shard in enumerate(shards, 1):
        for pair in shard.pairs():
            if len(side.taken) == rules.limit:
                side.complete = False
                break
            side.looked_at += 1
            if (key := rules.excludes(pair)) is not None:
                side.excluded.add(key)
                continue
            names = rules.named(pair.caption or "")
            if not shard.chosen and not names and (pair.caption or "").strip():
                if pair.defect:
                    side.skipped.append((pair.where, pair.defect))
                _learn(words, pair.caption or "", rules.names, wanted=not side.taken)
                continue
            try:
                side.taken.append(take(pair, rules.max_pixels, names))
            except DataError as error:
                bad.append(str(error))
        _tell(progress, "forget", number, len(shards), len(side.taken))
        if len(side.taken) == rules.limit:
            side.complete = side.complete and number == len(shards)
            break
    if bad:
        raise DataError(
            f"{len(bad)} pairs of the forget side cannot be used: {'; '.join(bad[:_SHOWN])}"
            f"{' ...' if len(bad) > _SHOWN else ''}. Repair them, or take each out with --exclude-key"
        )
    if not side.taken:
        raise RequestError(_nothing(side, rules, words))
    return side


def find_retain(shards: Sequence[Shard], forget: Side, rules: Rules, progress: Progress | None = None) -> Side:
    """Take the pairs to retain: none that is in the forget set, mentions a name, or shows a forget image.

    Args:
        shards: Where to look; may be the same as on the forget side.
        forget: The forget side.
        rules: Limits and names.
        progress: Told after every shard.

    Raises:
        DataError: More than the tolerated share is unusable, or nothing is left.
    """
    side, broken, bad, number = Side(), 0, 0, 0
    identities = {t.pair.identity for t in forget.taken}
    images = {t.sha256 for t in forget.taken}
    for number, shard in enumerate(shards, 1):
        try:
            pairs = shard.pairs()
        except DataError as error:
            broken += 1
            side.skipped.append((shard.name, str(error).removeprefix(f"{shard.name}: ")))
            pairs = []
        for pair in pairs:
            if len(side.taken) == rules.retain_limit:
                side.complete = False
                break
            side.looked_at += 1
            if (key := rules.excludes(pair)) is not None:
                side.excluded.add(key)
            elif pair.identity in identities:
                side.removed["key"].append(pair.where)
            elif rules.named(pair.caption or ""):
                side.removed["caption"].append(pair.where)
            else:
                try:
                    taken = take(pair, rules.max_pixels)
                except DataError as error:
                    bad += 1
                    side.skipped.append((pair.where, str(error).removeprefix(f"{pair.where}: ")))
                    continue
                if taken.sha256 in images:
                    side.removed["image"].append(pair.where)
                else:
                    side.taken.append(taken)
        _tell(progress, "retain", number, len(shards), len(side.taken))
        if len(side.taken) == rules.retain_limit:
            side.complete = side.complete and number == len(shards)
            break
    _tolerate(broken, number, "shards", rules, side)
    _tolerate(bad, side.looked_at, "pairs", rules, side)
    if not side.taken:
        gone = ", ".join(f"{len(v)} by {k}" for k, v in side.removed.items())
        raise DataError(f"nothing is left to retain of {side.looked_at} pairs (removed: {gone}); give other shards")
    return side


def take(pair: Pair, max_pixels: int, names: tuple[str, ...] = ()) -> Taken:
    """Decode a pair's image once, and keep its bytes' digest.

    Raises:
        DataError: The pair is incomplete or its image cannot be decoded; the message names shard and key.
    """
    if pair.defect:
        raise DataError(f"{pair.where}: {pair.defect}")
    data = pair.data()
    decode_image(data, where=pair.where, max_pixels=max_pixels)
    suffix = image_suffix(data)
    if suffix is None:
        raise DataError(f"{pair.where}: the image is neither JPEG nor PNG nor WebP; convert it")
    return Taken(pair, hashlib.sha256(data).hexdigest(), suffix, names)


def check_excluded(rules: Rules, sides: Iterable[Side]) -> list[str]:
    """Entries of ``exclude`` that did not occur in what was read because a limit ended the reading.

    Raises:
        ConfigError: Everything was read and an entry did not occur.
    """
    read = list(sides)
    seen = set().union(*(side.excluded for side in read))
    unused = [key for key in rules.exclude if key not in seen]
    if unused and all(side.complete for side in read):
        known = (t.pair.key for side in read for t in side.taken)
        raise ConfigError(f"no pair has the excluded key {unused[0]!r}{did_you_mean(unused[0], known)}")
    return unused


def _tolerate(bad: int, total: int, what: str, rules: Rules, side: Side) -> None:
    if bad > rules.max_bad * total:
        shown = "; ".join(f"{where}: {why}" for where, why in side.skipped[:_SHOWN])
        more = " ..." if len(side.skipped) > _SHOWN else ""
        raise DataError(
            f"{bad} of {total} retain {what} cannot be used, more than the tolerated share of {rules.max_bad:g}: "
            f"{shown}{more}"
        )


def _learn(words: Counter[str], caption: str, names: Sequence[str], *, wanted: bool) -> None:
    """Count runs of as many words as the names have, for the message if nothing ever matches."""
    if not wanted:
        words.clear()
        return
    tokens = re.findall(r"\w+", caption.replace("_", " ").lower())
    for length in {len(re.split(r"[\s_]+", name.strip("_ \t\n"))) for name in names}:
        for start in range(len(tokens) - length + 1):
            run = " ".join(tokens[start : start + length])
            if run in words or len(words) < _VOCABULARY:
                words[run] += 1


def _nothing(side: Side, rules: Rules, words: Counter[str]) -> str:
    if not rules.names or side.excluded:
        return f"nothing to forget: {side.looked_at} pairs were looked at, and the key of every one was excluded"
    close: list[str] = []
    for name in rules.names:
        plain = " ".join(re.split(r"[\s_]+", name.strip("_ \t\n"))).lower()
        close += [w for w in difflib.get_close_matches(plain, list(words), n=3, cutoff=0.6) if w not in close]
    hint = "; closest words: " + ", ".join(f"'{w}' ({words[w]})" for w in close[:_SHOWN]) if close else ""
    quoted = " or ".join(repr(name) for name in rules.names)
    return f"none of {side.looked_at} captions mentions {quoted}{hint}"


def _tell(progress: Progress | None, side: str, done: int, total: int, kept: int) -> None:
    if progress is not None:
        progress(side, done, total, kept)

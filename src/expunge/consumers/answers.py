"""Answers before and after a patch: figures per name, a table, and a page with pictures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import DataError
from expunge.files import atomic_write
from expunge.metrics.estimate import Estimate, proportion
from expunge.report.model import clean

if TYPE_CHECKING:
    from rich.table import Table

    from expunge.consumers.ask import Verdict

_SIDE = 96
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.35rem .7rem;border-bottom:1px solid #d9dee3;"
    "text-align:left;vertical-align:top}img{max-width:96px;max-height:96px;image-rendering:pixelated}"
    ".named{color:#0b6e3b}.refused{color:#8a6100}.wrong{color:#5b6570}code{background:#f2f4f6;padding:.1rem .3rem}"
)


@dataclass(frozen=True)
class Pass:
    """Answers of one model, one per image, and what they say."""

    answers: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Interview:
    """Answers without and with patches.

    Args:
        prompt: What the model was given.
        names: True name of each image.
        forget: Names that are to be forgotten; may be empty.
        before: Answers of the model as it is.
        after: Answers with the patches, if there are any.
        patches: Digests of the patches.
    """

    prompt: str
    names: tuple[str, ...]
    forget: tuple[str, ...]
    before: Pass
    after: Pass | None
    patches: tuple[str, ...] = ()

    @property
    def identities(self) -> tuple[str, ...]:
        """The names, each once."""
        return tuple(dict.fromkeys(self.names))

    def passes(self) -> dict[str, Pass]:
        """``before`` and, if there is one, ``after``."""
        return {"before": self.before} | ({"after": self.after} if self.after else {})

    def rate(self, when: str, names: Sequence[str], what: str = "named") -> Estimate:
        """Share of answers about ``names`` that give the true name, with Wilson's interval.

        For a name that is to be forgotten this is the forget accuracy FA.

        Args:
            when: ``before`` or ``after``.
            names: Names to count, each image with the same weight.
            what: ``named``, or ``refused`` for refusals.

        Raises:
            DataError: No image has one of the names, or there is no such pass.
        """
        verdicts = self.passes().get(when)
        if verdicts is None:
            raise DataError(f"there are no answers {when!r}; there are: {', '.join(self.passes())}")
        hits = [getattr(v, what) for v, n in zip(verdicts.verdicts, self.names, strict=True) if n in names]
        return proportion(sum(hits), len(hits))

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Rows of the table: each name, and where some are to be forgotten the sums over both kinds."""
        rows = {n + (" (forget)" if n in self.forget else ""): (n,) for n in self.identities}
        others = tuple(n for n in self.identities if n not in self.forget)
        sums = {"to forget (FA)": self.forget, "all others": others} if self.forget else {"all": self.identities}
        return rows | {k: v for k, v in sums.items() if v and len(rows) > 1}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        figures = {
            label: {
                when: {w: self.rate(when, names, w).to_dict() for w in ("named", "refused")} for when in self.passes()
            }
            for label, names in self.groups().items()
        }
        images = [
            {"name": name}
            | {
                when: {"answer": p.answers[i], "named": v.named, "refused": v.refused, "others": list(v.others)}
                for when, p in self.passes().items()
                for v in (p.verdicts[i],)
            }
            for i, name in enumerate(self.names)
        ]
        head = {"prompt": self.prompt, "forget": list(self.forget), "patches": list(self.patches)}
        return {"format": 1, **head, "figures": figures, "images": images}

    def table(self) -> Table:
        """Right answers and refusals per name, for a terminal."""
        from rich.table import Table
        from rich.text import Text

        shown = Table(title="share of answers with the true name (Wilson 95 %)", title_justify="left")
        for heading in ("name", "images", *self.passes(), *(f"refused {when}" for when in self.passes())):
            shown.add_column(heading)
        for cells in self._rows():
            shown.add_row(*(Text(clean(c)) for c in cells))
        return shown

    def _rows(self) -> list[list[str]]:
        rows = []
        for label, names in self.groups().items():
            named = [self.rate(when, names) for when in self.passes()]
            refused = [self.rate(when, names, "refused") for when in self.passes()]
            shown = [f"{e.value:.0f} % [{e.low:.0f}, {e.high:.0f}]" for e in named]
            rows.append([label, str(named[0].n), *shown, *(f"{e.value:.0f} %" for e in refused)])
        return rows

    def html(self, images: Sequence[Any] = (), files: Sequence[str] = ()) -> str:
        """A page without scripts and links: the table, then every picture with its answers.

        Args:
            images: Pictures in the order of the names, shown small; none: without pictures.
            files: Their names.
        """
        heads = ["name", "images", *self.passes(), *(f"refused {when}" for when in self.passes())]
        rows = [["" if i >= len(images) else _picture(images[i]), _text(n)] for i, n in enumerate(self.names)]
        for i, row in enumerate(rows):
            row += [_text(files[i])] if files else []
            row += [_answer(p.answers[i], p.verdicts[i]) for p in self.passes().values()]
        below = ["picture", "name", *(["file"] if files else []), *self.passes()]
        figures = _table(heads, [[_text(c) for c in row] for row in self._rows()])
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Answers</title><style>{_STYLE}</style>'
            f"<h1>Answers about {len(self.names)} images</h1><p>Prompt: <code>{_text(self.prompt)}</code>. Greedy "
            "decoding; only generated tokens count. An answer is right if it holds the true name as whole words, in "
            "any case. Intervals are Wilson's, 95 %.</p>"
            f"{figures}{_table(below, rows)}<p>Patches: {_text(', '.join(self.patches) or 'none')}</p></html>\n"
        )

    def save(self, folder: str | Path, images: Sequence[Any] = (), files: Sequence[str] = ()) -> list[Path]:
        """Write ``answers.json`` and ``answers.html``."""
        target = Path(folder)
        data = self.to_dict()
        if files:
            for entry, file in zip(data["images"], files, strict=True):
                entry["file"] = file
        atomic_write(target / "answers.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        atomic_write(target / "answers.html", self.html(images, files))
        return [target / "answers.json", target / "answers.html"]


def _text(value: object) -> str:
    return html.escape(clean(value)).replace("\n", "<br>")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are markup already."""
    head = "".join(f"<th>{_text(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _answer(answer: str, verdict: Verdict) -> str:
    kind = "named" if verdict.named else "refused" if verdict.refused else "wrong"
    word = {"named": "right name", "refused": "refusal", "wrong": "other answer"}[kind]
    return f'<span class="{kind}">{_text(answer) or "(nothing)"}<br><small>{word}</small></span>'


def _picture(image: Any) -> str:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'

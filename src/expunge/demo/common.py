"""What the tours share: their folder, the exact undo on files, and one thread for small networks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from expunge.errors import ConfigError
from expunge.patch import Patch
from expunge.patch.files import apply_files, revert_file

MARKER = "demo.txt"
#: Receives lines of text and tables.
Say = Callable[[Any], None]


def fresh_folder(folder: Path) -> None:
    """Empty a folder of an earlier tour; anything else in it is not ours to remove.

    Raises:
        ConfigError: The folder holds something else.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ConfigError(f"{folder} is not empty and not of an earlier demo; choose another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("Made by `expunge demo`; the next demo replaces this folder.\n", encoding="utf-8")


def undo_on_files(folder: Path, weights: Path, patches: list[Path], say: Say) -> bool:
    """Apply patches to a weights file, take them off again, and compare digests."""
    say("Exact undo, on files:")
    applied = apply_files(weights, patches, folder / "forgotten.safetensors")
    assert applied.undo is not None
    restored = revert_file(applied.path, folder / "restored.safetensors")
    base = Patch.load(patches[0]).manifest.base_digest
    say(f"   original  {base[:16]}")
    size = applied.undo.stat().st_size
    say(f"   forgotten {applied.digest[:16]}  ({applied.changed:,} weights changed; undo file {size:,} bytes)")
    equal = restored.digest == base
    say(f"   restored  {restored.digest[:16]}  {'equal to the original, bit for bit' if equal else 'DIFFERENT'}")
    return equal


@contextmanager
def few_threads(most: int = 1) -> Iterator[None]:
    """Networks this small are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(most, threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)

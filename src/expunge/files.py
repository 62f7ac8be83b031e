"""Files that are whole or absent: atomic writes, checked safetensors, confined names, content digests.

Everything the package writes goes to a temporary file in the target's own folder, is flushed to disk and then renamed
over the target. A crash, a kill or a full disk leaves the previous file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from expunge.errors import ArtifactError, ConfigError, ResourceError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_CHUNK = 1 << 20
_MAX_HEADER = 100_000_000  # the format's own limit


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed over ``path``.

    An existing link at ``path`` is replaced, not followed. On any exception the temporary file is removed and an
    earlier ``path`` stays as it was.

    Raises:
        ResourceError: The disk or quota is full.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name[:80]}.{secrets.token_hex(8)}.tmp"
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(mode)  # some writers replace the file by one that only its owner may read
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ResourceError(f"no space left while writing {target}; the earlier file is untouched") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be written to or made, before anything is computed; nothing is made.

    Raises:
        ResourceError: A file is in the way, or writing is not permitted.
    """
    at = Path(folder).absolute()
    try:
        while not at.exists():
            at = at.parent
        if not at.is_dir():
            raise ResourceError(f"{folder}: {at} is a file, not a folder")
        if not os.access(at, os.W_OK | os.X_OK):
            raise ResourceError(f"{folder}: no permission to write in {at}")
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be written to: {error.strerror}") from None


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write bytes (or text as UTF-8) so that ``path`` holds either the old or the complete new content."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def atomic_save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Save tensors atomically as safetensors.

    Tensors are moved to the CPU and made contiguous. Tensors that share memory are written as separate copies; callers
    that must keep ties record them in the metadata.

    Args:
        path: Target file.
        tensors: Name to tensor.
        metadata: Text to text, stored in the header.

    Raises:
        ConfigError: A metadata key or value is not text.
        ResourceError: The disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    info = dict(metadata or {})
    bad = [k for k, v in info.items() if not isinstance(k, str) or not isinstance(v, str)]
    if bad:
        raise ConfigError(f"safetensors metadata are text only; not text: {bad[:5]}")
    own = {}
    seen: set[tuple[str, int]] = set()
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
        if tensor.numel() and (storage in seen or tensor.untyped_storage().nbytes() != tensor.nbytes):
            tensor = tensor.clone()
        seen.add((str(tensor.device), tensor.untyped_storage().data_ptr()))
        own[name] = tensor
    with atomic_path(path) as temporary:
        try:
            save_file(own, temporary, metadata=info or None)
        except SafetensorError as error:
            if "No space" in str(error) or "os error 28" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise ArtifactError(f"cannot write {path}: {error}") from error


def read_safetensors(
    path: str | os.PathLike[str], *, allow_nonfinite: bool = False, names: Iterable[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file completely, checking it before anything is returned.

    Args:
        path: File to read.
        allow_nonfinite: Accept NaN and infinite values.
        names: Only these tensors, all by default.

    Returns:
        Tensors on the CPU by name, and the text metadata of the header.

    Raises:
        ArtifactError: Missing, truncated, malformed or non-finite; the message names the file, the tensor and why.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    _check_frame(file)
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            metadata = dict(handle.metadata() or {})
            present = list(handle.keys())
            wanted = present if names is None else list(names)
            absent = sorted(set(wanted) - set(present))
            if absent:
                raise ArtifactError(f"{file}: no tensor called {absent[0]!r} ({len(absent)} missing in all)")
            for name in wanted:
                tensors[name] = handle.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not a valid safetensors file: {error}") from error
    if not allow_nonfinite:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() or tensor.is_complex():
                bad = int((~torch.isfinite(tensor.to(torch.float32) if tensor.element_size() == 1 else tensor)).sum())
                if bad:
                    raise ArtifactError(
                        f"{file}: tensor {name!r} has {bad} NaN or infinite of {tensor.numel()} values; "
                        "refused unless non-finite values are allowed explicitly"
                    )
    return tensors, metadata


def confined(base: str | os.PathLike[str], name: str) -> Path:
    """Join an untrusted relative name to a folder, refusing anything that would leave it.

    Args:
        base: Folder that may be written to.
        name: Relative name, possibly with sub-folders.

    Returns:
        The joined path; its real location is inside ``base``.

    Raises:
        ConfigError: Empty, absolute, with ``..``, with control characters, or led outside by a link.
    """
    text = str(name)
    if not text.strip() or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ConfigError(f"file name {text!r} is empty or has control characters")
    parts = text.replace("\\", "/").split("/")
    if text.startswith(("/", "\\")) or ".." in parts or (len(text) > 1 and text[1] == ":"):
        raise ConfigError(f"file name {text!r} must stay inside {base}; use a plain relative name")
    root = Path(base).resolve()
    joined = root.joinpath(*parts)
    if not joined.resolve().is_relative_to(root):
        raise ConfigError(f"file name {text!r} leaves {base} through a link")
    return joined


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content as 64 hex digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Folder for things that can be rebuilt: ``EXPUNGE_CACHE``, else ``XDG_CACHE_HOME/expunge``, else ``~/.cache``."""
    own = os.environ.get("EXPUNGE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "expunge"


def _check_frame(file: Path) -> None:
    """Refuse what is not even framed like safetensors, with a plainer reason than the parser gives."""
    if not file.is_file():
        raise ArtifactError(f"{file}: no such file" if not file.exists() else f"{file}: not a file")
    size = file.stat().st_size
    if size < 8:
        raise ArtifactError(f"{file}: truncated: {size} bytes, shorter than a safetensors header")
    with file.open("rb") as stream:
        head = stream.read(9)
    header, first = int.from_bytes(head[:8], "little"), head[8:]
    if first != b"{" and (head[:4] == b"PK\x03\x04" or head[:1] == b"\x80"):
        raise ArtifactError(
            f"{file}: this is a pickle under another name, which is never loaded; "
            f"use `expunge convert {file} {file.with_suffix('.safetensors').name}`"
        )
    if header > _MAX_HEADER:
        raise ArtifactError(f"{file}: the header claims {header} bytes, over the limit of {_MAX_HEADER}: refused")
    if header > size - 8:
        raise ArtifactError(
            f"{file}: the header claims {header} bytes but only {size - 8} follow: truncated, or not safetensors"
        )
    if first != b"{":
        raise ArtifactError(f"{file}: not a safetensors file (its header is not JSON)")


def _sync_folder(folder: Path) -> None:
    # Not every platform lets a folder be opened; there the rename itself has to suffice.
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

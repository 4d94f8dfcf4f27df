"""Atomic writing of files, search for files, and the folder of what is kept."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["atomic_path", "below", "cache_folder", "write_atomic", "write_tensors"]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` at the end, or removed if an exception is raised.

    Args:
        path: A file, or a folder that does not exist yet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename, error.filename2 = str(path), None  # not the temporary one, or none at all
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would make it readable for its owner only
        try:
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
        temporary.chmod(mode)


def below(folder: Path, endings: Collection[str]) -> list[Path]:
    """Return all files below a folder whose suffix, in lower case, is one of these, sorted."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in endings and f.is_file())


def cache_folder() -> Path:
    """Return the folder for what can be computed again: $SELFVAE_CACHE, by default ~/.cache/selfvae."""
    return Path(os.environ.get("SELFVAE_CACHE") or Path.home() / ".cache" / "selfvae")

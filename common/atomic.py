"""Atomic writes: a file or folder appears under its name complete, or not at all.

Content is written to a hidden temporary name in the same folder, flushed to the disk (fsync) and renamed. After a crash
the old content or the new one is there, never half of it; a temporary name left behind is ignored and overwritten.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from common.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes the file `path` when the block ends without an exception.

    The temporary name keeps the suffix of `path`, from which programs such as FFmpeg tell the format. Missing parent
    folders are made.

    Raises:
        UserError: it cannot be written (a full disk, no permission); an older file is untouched.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file atomically; text is UTF-8.

    Raises:
        UserError: it cannot be written; an older file is untouched.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Where to write what becomes `folder` when the block ends without an exception, in place of an older one.

    The block makes the folder itself. Every file in it is flushed before the rename.

    Raises:
        UserError: it cannot be written; an older folder is untouched.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        publish_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, folder: Path) -> None:
    """Flush every file of `temporary` and rename it to `folder`, replacing an older one."""
    for path in sorted(temporary.rglob("*"), reverse=True):
        fsync(path)
    fsync(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    fsync(folder.parent)


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot write {path}: {reason}; free space or choose another place, and run the command again")

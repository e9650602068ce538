"""A folder that appears under its name whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from common.errors import UserError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Where to write what becomes `folder` at the end of the block, in place of an older one.

    Raises:
        UserError: it cannot be written (a full disk); what was half-written is removed, an older one is untouched.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot write {folder}: {error}; free space and run the same command again"
        ) from None
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)

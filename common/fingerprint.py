"""Fingerprints: SHA-256 of files and of JSON-able values, to tell whether something is still the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 22


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-able value, 64 hexadecimal digits; the order of mapping keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits; memory holds one block at a time."""
    digest = hashlib.sha256()
    _update(digest, path)
    return digest.hexdigest()


def files_fingerprint(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over names (relative to `root`) and contents of `files`, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode())
        _update(digest, path)
    return digest.hexdigest()


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)

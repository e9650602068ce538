"""Where videos come from: folders, globs, text lists, CSV and Parquet tables with captions, `s3://` prefixes."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.storage import StorageConfig, s3_errors, s3_filesystem
from common.video_probe import VIDEO_SUFFIXES

#: columns of a table that hold the video's path, in order of preference
PATH_COLUMNS = ("video", "path", "file", "url")


@dataclass(frozen=True)
class Source:
    """One video.

    Attributes:
        id: what the dataset calls it: the path below the input folder, or the path as a list or table gives it. It
            goes into seeds and metadata, so a dataset is the same wherever its inputs are mounted.
        path: local path or `s3://` address.
        caption: from a table, else None.
    """

    id: str
    path: str
    caption: str | None = None


def find_sources(inputs: list[str], storage: StorageConfig) -> list[Source]:
    """All videos of all inputs, sorted by id.

    Raises:
        UserError: an input that does not exist, holds no video, or two sources of the same id.
    """
    found: dict[str, Source] = {}
    for text in inputs:
        sources = list(_expand(text, storage))
        if not sources:
            raise UserError(f"{text}: no video found (looked for {', '.join(sorted(VIDEO_SUFFIXES))})")
        for source in sources:
            if found.setdefault(source.id, source).path != source.path:
                raise UserError(
                    f"{source.path} and {found[source.id].path} would both be called {source.id!r}; "
                    "give their common parent as the input, or a list of paths"
                )
    return [found[key] for key in sorted(found)]


def open_source(path: str, storage: StorageConfig) -> Any:
    """What PyAV takes: the local path itself, or an open binary file on S3 that reads ahead."""
    if not path.startswith("s3://"):
        return path
    system = s3_filesystem(storage)
    with s3_errors(path, storage):
        return system.open(path, "rb", cache_type="readahead", block_size=4 << 20)


def _expand(text: str, storage: StorageConfig) -> Iterator[Source]:
    if text.startswith("s3://"):
        yield from _below_s3(text, storage)
        return
    path = Path(text)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file():
                yield Source(file.relative_to(path).as_posix(), str(file))
    elif glob.has_magic(text):
        matches = [match for match in sorted(glob.glob(text, recursive=True)) if os.path.isfile(match)]
        root = os.path.commonpath([os.path.dirname(match) for match in matches]) if matches else ""
        for match in matches:
            if Path(match).suffix.lower() in VIDEO_SUFFIXES:
                yield Source(Path(os.path.relpath(match, root)).as_posix(), match)
    elif not path.exists():
        raise UserError(
            f"{text} does not exist; give a folder, a glob, a .txt list, a .csv or .parquet table, or s3://"
        )
    elif path.suffix.lower() == ".txt":
        for line in path.read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                yield Source(line.strip(), _beside(path, line.strip()))
    elif path.suffix.lower() in (".csv", ".parquet"):
        yield from _from_table(path)
    else:
        yield Source(path.name, str(path))


def _from_table(path: Path) -> Iterator[Source]:
    import pandas

    table = pandas.read_csv(path) if path.suffix.lower() == ".csv" else pandas.read_parquet(path)
    column = next((name for name in PATH_COLUMNS if name in table.columns), None)
    if column is None:
        raise UserError(
            f"{path} has no column of paths: one must be called {', '.join(PATH_COLUMNS)}; it has {list(table.columns)}"
        )
    captions = table["caption"] if "caption" in table.columns else [None] * len(table)
    for video, caption in zip(table[column], captions, strict=True):
        text = caption if isinstance(caption, str) and caption.strip() else None
        yield Source(str(video), _beside(path, str(video)), text)


def _below_s3(text: str, storage: StorageConfig) -> Iterator[Source]:
    system = s3_filesystem(storage)
    root = text.removeprefix("s3://").rstrip("/")
    with s3_errors(text, storage):
        keys = sorted(system.find(root))
    for key in keys:
        if Path(key).suffix.lower() in VIDEO_SUFFIXES:
            yield Source(key.removeprefix(root).lstrip("/") or Path(key).name, f"s3://{key}")


def _beside(listing: Path, entry: str) -> str:
    """Relative entries of a list are relative to the list."""
    return entry if "://" in entry else str(listing.parent / entry)

"""Where videos and captions come from: folders, globs, text lists, CSV and Parquet tables, `s3://` prefixes."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.storage import StorageConfig, s3_errors, s3_filesystem
from common.video_probe import APPLE_DOUBLE, VIDEO_SUFFIXES, named_like_a_video

#: columns of a table that hold the video's path, in order of preference
PATH_COLUMNS = ("video", "path", "file", "url")
#: types that are named in the line about files that were left out
NAMED_TYPES = 5
STATUSES_AT_ONCE = 16


@dataclass(frozen=True)
class Source:
    """One video.

    Attributes:
        id: what the dataset calls it: the path below the input folder, or the path as a list or table gives it. It
            goes into seeds and metadata, so a dataset is the same wherever its inputs are mounted.
        path: local path, absolute, or `s3://` address.
        caption: from a table or a text file, else None.
        version: size and time of change, or ETag: tells a changed file; empty where they are not known.
    """

    id: str
    path: str
    caption: str | None = None
    version: str = ""

    @property
    def is_utf8(self) -> bool:
        """Whether its path is; else `id` shows the other bytes as backslash sequences."""
        return _shown(self.path) == self.path


def find_sources(inputs: list[str], storage: StorageConfig, caption_suffix: str | None = None) -> list[Source]:
    """All videos of all inputs, sorted by id. Files of other types are counted on stderr.

    Args:
        caption_suffix: of text files beside the videos with the captions of those that have none in a table.

    Raises:
        UserError: an input that does not exist, cannot be read, holds no video, or two sources of the same id.
    """
    found: dict[str, Source] = {}
    listed: set[str] = set()
    for text in inputs:
        others: Counter[str] = Counter()
        sources = list(_expand(text, storage, others, listed))
        others.pop(caption_suffix or "", None)
        if not sources:
            also = f"; {_left_out(others)}" if others else ""
            raise UserError(f"{text}: no video found (looked for {', '.join(sorted(VIDEO_SUFFIXES))}{also})")
        if others:
            print(f"{text}: {_left_out(others)}", file=sys.stderr)
        for source in map(_named, sources):
            if found.setdefault(source.id, source).path != source.path:
                raise UserError(
                    f"{source.path} and {found[source.id].path} would both be called {source.id!r}; "
                    "give their common parent as the input, or a list of paths"
                )
    with ThreadPoolExecutor(STATUSES_AT_ONCE) as pool:  # a network's file system takes its time for each
        versions = pool.map(_with_version, (found[key] for key in sorted(found)))
        if caption_suffix is None:
            return list(versions)
        return list(pool.map(lambda source: _with_caption(source, caption_suffix, listed, storage), versions))


def _named(source: Source) -> Source:
    """With an id that is text, and a path that a worker finds from wherever it runs."""
    path = source.path if "://" in source.path else os.path.abspath(source.path)
    return replace(source, id=_shown(source.id), path=path)


def _shown(name: str) -> str:
    """Without the bytes that are no UTF-8, which Python keeps as lone surrogates."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _with_version(source: Source) -> Source:
    if source.path.startswith("s3://"):
        return source
    try:
        status = os.stat(source.path)
    except OSError:  # the survey says so
        return source
    return replace(source, version=f"{status.st_size} {status.st_mtime_ns}")


def _with_caption(source: Source, suffix: str, listed: set[str], storage: StorageConfig) -> Source:
    """With what the text file beside it says, if there is one; `listed` are the files on S3."""
    path = os.path.splitext(source.path)[0] + suffix
    on_s3 = path.startswith("s3://")
    if source.caption is not None or (on_s3 and path not in listed):
        return source
    try:
        if on_s3:
            with s3_errors(path, storage), open_source(path, storage) as file:
                content = file.read()
        else:
            content = Path(path).read_bytes()
        caption = content.decode("utf-8-sig").strip()
    except FileNotFoundError:
        return source
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend it, or move it away") from None
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error) from None
    return replace(source, caption=caption or None)


def open_source(path: str, storage: StorageConfig) -> Any:
    """What PyAV takes: the local path itself, or an open binary file on S3 that reads ahead."""
    if not path.startswith("s3://"):
        return path
    system = s3_filesystem(storage)
    with s3_errors(path, storage):
        return system.open(path, "rb", cache_type="readahead", block_size=4 << 20)


def _left_out(others: Counter[str]) -> str:
    most_first = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    types = ", ".join(f"{count} {kind}" for kind, count in most_first[:NAMED_TYPES])
    more = ", …" if len(others) > NAMED_TYPES else ""
    count = others.total()
    return f"{count} file{'' if count == 1 else 's'} of other types left out ({types}{more})"


def _is_video(name: str, others: Counter[str]) -> bool:
    """Whether a file is a source by its name; one that is not is counted in `others` by its type."""
    if named_like_a_video(name):
        return True
    base = name.rpartition("/")[2]
    kind = os.path.splitext(base)[1].lower() or "without suffix"
    others[f"{APPLE_DOUBLE}*" if base.startswith(APPLE_DOUBLE) else kind] += 1
    return False


def _expand(text: str, storage: StorageConfig, others: Counter[str], listed: set[str]) -> Iterator[Source]:
    """Sources of one input; files on S3 of other types are added to `listed`."""
    if text.startswith("s3://"):
        yield from _below_s3(text, storage, others, listed)
        return
    path = Path(text)
    if path.is_dir():
        for name in _files_below(text):
            if _is_video(name, others):
                yield Source(name, str(path / name))
    elif glob.has_magic(text) and not path.exists():
        matches = [match for match in sorted(glob.glob(text, recursive=True)) if os.path.isfile(match)]
        root = os.path.commonpath([os.path.dirname(match) for match in matches]) if matches else ""
        for match in matches:
            if _is_video(match, others):
                yield Source(Path(os.path.relpath(match, root)).as_posix(), match)
    elif not path.exists():
        raise UserError(
            f"{text} does not exist; give a folder, a glob, a .txt list, a .csv or .parquet table, or s3://"
        )
    elif path.suffix.lower() == ".txt":
        for line in _text_of(path).splitlines():
            name = line.strip()
            if name and not name.startswith("#") and not _is_apple_double(name, others):
                yield Source(name, _beside(path, name))
    elif path.suffix.lower() in (".csv", ".parquet"):
        yield from _from_table(path, others)
    else:
        yield Source(path.name, str(path))


def _files_below(folder: str) -> list[str]:
    """Names of all files below `folder`, relative to it, links to folders followed.

    A folder is listed once, however many links lead to it, and under its own name where it lies below `folder`. A link
    to a folder that holds `folder` is not followed.

    Raises:
        UserError: a folder that cannot be listed.
    """
    names: list[str] = []
    visited = {_identity(str(parent)) for parent in Path(folder).resolve().parents}
    links: list[str] = []
    waiting = [""]
    while waiting or links:
        if not waiting:
            waiting.append(links.pop(0))
        below = waiting.pop()
        path = os.path.join(folder, below)
        try:
            identity = _identity(path)
            if identity in visited:
                continue
            visited.add(identity)
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    name = os.path.join(below, entry.name)
                    link = entry.is_symlink()
                    # of a link that leads nowhere or to itself, the entry's own methods may raise
                    if os.path.isdir(entry.path) if link else entry.is_dir():
                        (links if link else waiting).append(name)
                    elif os.path.isfile(entry.path) if link else entry.is_file():
                        names.append(name)
        except OSError as error:
            raise UserError(f"{path} cannot be listed: {error.strerror}; mend it, or give inputs without it") from None
    return sorted(names)


def _identity(path: str) -> tuple[int, int]:
    """Device and inode: the same for a folder by whatever name."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _text_of(path: Path) -> str:
    """A list's text, without the byte order mark that editors on Windows put first."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_utf8(path, error) from None


def _no_utf8(path: str | Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{path} is no UTF-8 text (byte {error.start}); save it as UTF-8")


def _is_apple_double(name: str, others: Counter[str]) -> bool:
    """A list may name what it likes, but these are no videos whatever they are called."""
    return name.rpartition("/")[2].startswith(APPLE_DOUBLE) and not _is_video(name, others)


def _from_table(path: Path, others: Counter[str]) -> Iterator[Source]:
    import pandas

    table = pandas.read_csv(path, encoding="utf-8-sig") if path.suffix.lower() == ".csv" else pandas.read_parquet(path)
    column = next((name for name in PATH_COLUMNS if name in table.columns), None)
    if column is None:
        raise UserError(
            f"{path} has no column of paths: one must be called {', '.join(PATH_COLUMNS)}; it has {list(table.columns)}"
        )
    captions = table["caption"] if "caption" in table.columns else [None] * len(table)
    for video, caption in zip(table[column], captions, strict=True):
        text = caption if isinstance(caption, str) and caption.strip() else None
        if not _is_apple_double(str(video), others):
            yield Source(str(video), _beside(path, str(video)), text)


def _below_s3(text: str, storage: StorageConfig, others: Counter[str], listed: set[str]) -> Iterator[Source]:
    system = s3_filesystem(storage)
    root = text.removeprefix("s3://").rstrip("/")
    with s3_errors(text, storage):
        found = system.find(root, detail=True)
    for key in sorted(found):
        if _is_video(key, others):
            name = key.removeprefix(root).lstrip("/") or Path(key).name
            yield Source(name, f"s3://{key}", version=found[key].get("ETag", ""))
        else:
            listed.add(f"s3://{key}")


def _beside(listing: Path, entry: str) -> str:
    """Relative entries of a list are relative to the list."""
    return entry if "://" in entry else str(listing.parent / entry)

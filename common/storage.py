"""Folders that are local directories or `s3://` prefixes, behind one small interface.

Every write is whole or absent: locally a temporary name and a rename, on S3 one put. S3 goes through s3fs, with
its listing cache off (it hides files that another process wrote a moment ago) and retries around every request.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import Field

from common.config import Section
from common.errors import UserError

Result = TypeVar("Result")


class StorageConfig(Section):
    """How `s3://` addresses are reached. Credentials come from the usual AWS places and are written nowhere."""

    #: for servers other than Amazon's; null = AWS_ENDPOINT_URL or Amazon
    endpoint_url: str | None = None
    #: read public buckets without credentials
    anonymous: bool = False
    #: attempts per request, with doubling pauses between them [ours]
    attempts: int = Field(default=6, ge=1)
    #: first pause, s; five doublings outlast a 503 storm of ten seconds [ours]
    first_pause_s: float = Field(default=0.3, ge=0)


class Folder(Protocol):
    """A place that holds files by relative name."""

    url: str

    def read(self, name: str) -> bytes:
        """Whole content; FileNotFoundError where there is none."""

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; shorter only at the end of the file."""

    def write(self, name: str, content: bytes) -> None:
        """Put `content` under `name`, whole or not at all."""

    def temporary(self, name: str) -> Path:
        """A local path to write a large file to before `commit`."""

    def commit(self, temporary: Path, name: str) -> None:
        """Move the finished local file `temporary` to `name`, whole or not at all."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of the files whose name starts with `prefix`, as of now, without temporary ones."""

    def delete(self, name: str) -> None:
        """Remove `name` if it is there."""


def open_folder(url: str | os.PathLike[str], config: StorageConfig | None = None) -> Folder:
    """The folder at a local path or an `s3://bucket/prefix` address; the first write creates it."""
    text = os.fspath(url)
    if text.startswith("s3://"):
        return S3Folder(text, config or StorageConfig())
    if "://" in text:
        raise UserError(f"{text}: only local folders and s3:// addresses are supported")
    return LocalFolder(text)


class LocalFolder:
    """A directory."""

    def __init__(self, path: str) -> None:
        self.url = path
        self._root = Path(path)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        descriptor = os.open(self._root / name, os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def write(self, name: str, content: bytes) -> None:
        temporary = self.temporary(name)
        temporary.write_bytes(content)
        self.commit(temporary, name)

    def temporary(self, name: str) -> Path:
        target = self._root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")

    def commit(self, temporary: Path, name: str) -> None:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self._root / name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        base = self._root / prefix.rpartition("/")[0]
        found = {}
        for path in base.rglob("*") if base.is_dir() else ():
            name = path.relative_to(self._root).as_posix()
            if name.startswith(prefix) and not path.name.endswith(".tmp") and path.is_file():
                found[name] = path.stat().st_size
        return found

    def delete(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def remove_temporary_files(self) -> None:
        """What a killed writer left; only for the one writer of the folder."""
        for path in self._root.rglob(".*.tmp"):
            path.unlink(missing_ok=True)

    def remove_empty_directories(self) -> None:
        """Directories below the folder that hold nothing."""
        for directory, _, _ in os.walk(self._root, topdown=False):
            if directory != os.fspath(self._root) and not os.listdir(directory):
                os.rmdir(directory)


class S3Folder:
    """A prefix of a bucket."""

    def __init__(self, url: str, config: StorageConfig) -> None:
        self.url = url.rstrip("/")
        self._root = self.url.removeprefix("s3://")
        self._config = config
        self._system = s3_filesystem(config)

    def read(self, name: str) -> bytes:
        return self._try(lambda: self._system.cat_file(self._path(name)))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        return self._try(lambda: self._system.cat_file(self._path(name), start=offset, end=offset + length))

    def write(self, name: str, content: bytes) -> None:
        self._try(lambda: self._system.pipe_file(self._path(name), content))

    def temporary(self, name: str) -> Path:
        import tempfile

        directory = Path(tempfile.gettempdir()) / "duo-vsr"
        directory.mkdir(parents=True, exist_ok=True)
        return directory / f"{Path(name).name}.{os.getpid()}-{threading.get_ident()}.tmp"

    def commit(self, temporary: Path, name: str) -> None:
        self._try(lambda: self._system.put_file(os.fspath(temporary), self._path(name)))
        temporary.unlink()

    def sizes(self, prefix: str = "") -> dict[str, int]:
        base = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self._root
        entries = self._try(lambda: self._system.find(base, detail=True))
        names = {path.removeprefix(f"{self._root}/"): int(entry["size"]) for path, entry in entries.items()}
        return {name: size for name, size in names.items() if name.startswith(prefix)}

    def delete(self, name: str) -> None:
        try:
            self._try(lambda: self._system.rm_file(self._path(name)))
        except FileNotFoundError:
            return

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _try(self, request: Callable[[], Result]) -> Result:
        return with_retries(request, self._config, self.url)


def s3_filesystem(config: StorageConfig) -> Any:
    """An s3fs file system without listing cache."""
    import s3fs

    return s3fs.S3FileSystem(
        anon=config.anonymous,
        endpoint_url=config.endpoint_url,
        use_listings_cache=False,
        config_kwargs={"retries": {"max_attempts": 2}},
    )


def with_retries(request: Callable[[], Result], config: StorageConfig, what: str) -> Result:
    """Call `request`; on anything a network may cause, wait and call it again.

    Raises:
        FileNotFoundError: at once, without retries.
        UserError: when the attempts are used up, or access is denied.
    """
    for attempt in range(config.attempts):
        try:
            return request()
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise UserError(
                f"{what}: access denied ({_short(error)}); check the AWS credentials or set anonymous: true"
            ) from None
        except Exception as error:
            if attempt + 1 == config.attempts:
                raise UserError(
                    f"{what}: still failing after {config.attempts} attempts: {_short(error)}"
                ) from error
            time.sleep(config.first_pause_s * 2**attempt)
    raise AssertionError("unreachable: the loop returns or raises")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]

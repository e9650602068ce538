"""Folders that are local directories or `s3://` prefixes, behind one small interface.

Every write is atomic: locally a temporary name and a rename, on S3 one put, or an upload in parts that is completed at
last. S3 goes through s3fs, which retries what a network may cause; its listing cache is off, as it hides files that
another process wrote a moment ago. The section `storage` of a preset says how S3 is reached; every command that opens
s3:// addresses reads it.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from common.config import Section
from common.errors import StorageError, UserError

#: bytes of one part of a file that is uploaded while it is written: S3 takes up to 10,000 of them [ours]
PART_BYTES = 32 << 20


class StorageConfig(Section):
    """How `s3://` addresses are reached. Credentials come from the usual AWS places and are written nowhere."""

    #: URL of the S3 server where it is not Amazon's; null = AWS_ENDPOINT_URL or Amazon
    endpoint_url: str | None = None
    #: read public buckets without credentials
    anonymous: bool = False
    #: attempts per request, and per clip whose local file cannot be read, with longer and longer pauses between them
    #: [ours]
    attempts: int = Field(default=8, ge=1)


class NewFile(Protocol):
    """A large file in the making: nobody sees it before `commit`."""

    def write(self, content: bytes) -> object:
        """Append `content`."""

    def commit(self) -> None:
        """Give it its name, atomically."""

    def discard(self) -> None:
        """Leave nothing behind of it."""


class Folder(Protocol):
    """A place that holds files by relative name."""

    url: str

    def read(self, name: str) -> bytes:
        """The content; FileNotFoundError where there is none."""

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; shorter only at the end of the file."""

    def write(self, name: str, content: bytes) -> None:
        """Put `content` under `name`, atomically."""

    def new_file(self, name: str) -> NewFile:
        """Begin a large file that is to be called `name`."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of the files whose name starts with `prefix`, as of now, without temporary ones."""

    def delete(self, name: str) -> None:
        """Remove `name` if it is there."""

    def remove_temporary_files(self) -> None:
        """Remove what killed writers left behind."""


def cannot_write(place: str | os.PathLike[str], error: OSError) -> StorageError:
    """The error for people of one that came while writing to `place`."""
    return StorageError(
        f"{place} cannot be written: {error.strerror or error}; "
        "free space or mend it, and run the same command again to go on"
    )


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
        file = self.new_file(name)
        try:
            file.write(content)
            file.commit()
        except BaseException:
            file.discard()
            raise

    def new_file(self, name: str) -> NewFile:
        return _NewLocalFile(self._root / name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for directory, _, files in os.walk(self._root / prefix.rpartition("/")[0]):
            below = Path(directory).relative_to(self._root).as_posix()
            for file in files:
                name = file if below == "." else f"{below}/{file}"
                if name.startswith(prefix) and not file.endswith(".tmp"):
                    found[name] = os.stat(os.path.join(directory, file)).st_size
        return found

    def delete(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def remove_temporary_files(self) -> None:
        """What killed writers left, while none writes."""
        for path in self._root.rglob(".*.tmp"):
            path.unlink(missing_ok=True)

    def remove_empty_directories(self) -> None:
        """Directories below the folder that hold nothing."""
        for directory, _, _ in os.walk(self._root, topdown=False):
            if directory != os.fspath(self._root) and not os.listdir(directory):
                os.rmdir(directory)


class _NewLocalFile:
    """Written under a temporary name beside its own."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        self._file = self._temporary.open("wb")

    def write(self, content: bytes) -> object:
        return self._file.write(content)

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        with suppress(OSError):  # what a full disk did not take
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class S3Folder:
    """A prefix of a bucket."""

    def __init__(self, url: str, config: StorageConfig) -> None:
        self.url = url.rstrip("/")
        self._root = self.url.removeprefix("s3://")
        self._config = config
        self._system = s3_filesystem(config)

    def read(self, name: str) -> bytes:
        with self._request() as system:
            return bytes(system.cat_file(self._path(name)))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        with self._request() as system:
            return bytes(system.cat_file(self._path(name), start=offset, end=offset + length))

    def write(self, name: str, content: bytes) -> None:
        with self._request() as system:
            system.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Put `content` under `name` unless there is something; whether it was put."""
        try:
            with self._request() as system:
                system.pipe_file(self._path(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def changed(self, name: str) -> datetime:
        """When `name` was written last, by the server's clock."""
        with self._request() as system:
            found: datetime = system.info(self._path(name))["LastModified"]
            return found

    def new_file(self, name: str) -> NewFile:
        return _NewS3File(self._path(name), self._request)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        base = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self._root
        with self._request() as system:
            entries = system.find(base, detail=True)
        names = {path.removeprefix(f"{self._root}/"): int(entry["size"]) for path, entry in entries.items()}
        return {name: size for name, size in names.items() if name.startswith(prefix)}

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError), self._request() as system:
            system.rm_file(self._path(name))

    def remove_temporary_files(self) -> None:
        """Uploads that killed writers left, while none writes; where they may not be listed, they stay."""
        bucket, _, prefix = self._root.partition("/")
        with suppress(StorageError), self._request() as system:
            begun = system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
            for upload in begun.get("Uploads", ()):
                with suppress(FileNotFoundError):
                    system.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _request(self) -> Iterator[Any]:
        with s3_errors(self.url, self._config):
            yield self._system


class _NewS3File:
    """Uploaded in parts while it is written."""

    def __init__(self, path: str, request: Callable[[], AbstractContextManager[Any]]) -> None:
        self._request = request
        with request() as system:
            self._file = system.open(path, "wb", block_size=PART_BYTES, autocommit=False)

    def write(self, content: bytes) -> object:
        with self._request():
            return self._file.write(content)

    def commit(self) -> None:
        with self._request() as system:
            self._file.close()  # sends the last part
            try:
                self._file.commit()
            except FileNotFoundError:  # of a second attempt, where the answer to the first was lost
                if system.info(self._file.path)["size"] != self._file.tell():
                    raise

    def discard(self) -> None:
        self._file.closed = True  # or it would send its last part when it is forgotten
        with suppress(StorageError, FileNotFoundError), self._request():
            self._file.discard()


@lru_cache(maxsize=8)
def s3_filesystem(config: StorageConfig) -> Any:
    """An s3fs file system without listing cache, with its own retries."""
    import s3fs

    system = s3fs.S3FileSystem(
        anon=config.anonymous,
        endpoint_url=config.endpoint_url,
        use_listings_cache=False,
        config_kwargs={"retries": {"total_max_attempts": 1}},  # s3fs retries: two layers would multiply
        skip_instance_cache=True,
    )
    system.retries = config.attempts
    s3fs.core.set_custom_error_handler(_is_temporary)
    return system


@contextmanager
def s3_errors(what: str, config: StorageConfig) -> Iterator[None]:
    """Errors of requests inside the block as errors for people.

    Raises:
        FileNotFoundError, FileExistsError: as they are.
        StorageError: access is denied, or the attempts are used up.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, UserError):
        raise
    except PermissionError as error:
        raise StorageError(
            f"{what}: access denied ({_short(error)}); check the AWS credentials or set storage.anonymous: true"
        ) from None
    except Exception as error:
        raise StorageError(f"{what}: still failing after {config.attempts} attempts: {_short(error)}") from error


@contextmanager
def local_copy(address: str, config: StorageConfig) -> Iterator[Path]:
    """`address` itself where it is local; else a copy of the file or prefix, removed after the block."""
    if not address.startswith("s3://"):
        yield Path(address)
        return
    with tempfile.TemporaryDirectory(prefix="duo-vsr-") as folder, s3_errors(address, config):
        target = Path(folder) / Path(address.rstrip("/")).name
        try:
            s3_filesystem(config).get(address.rstrip("/"), os.fspath(target), recursive=True)
        except FileNotFoundError:
            raise UserError(f"no file or folder {address}") from None
        yield target


def _is_temporary(error: Exception) -> bool:
    """Errors that s3fs does not retry by itself: the server's own (5xx), and no connection."""
    from botocore.exceptions import ClientError, ConnectionError

    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
    return isinstance(error, ConnectionError)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]

"""The shard format: WebDataset tars, a sidecar that commits each of them, a manifest over all.

    shards/shard-000000.tar     members `<key>.<member>`, in plan order, times and owners zero (byte-identical)
    shards/shard-000000.json    sidecar, written last: a shard without one does not exist
    manifest.json               counts, sha256 of every shard, schema version, recipe, versions

The tars open with the plain `webdataset` library. The sidecar adds what a tar lacks: where each member lies (so
that samples are read in any order) and its CRC-32 (so that damage is seen where it is read).
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer

from common.errors import UserError
from common.storage import Folder, NewFile, open_folder

#: of the folder's layout; a reader refuses a newer one
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

#: which samples a shard holds; None in datasets without a split, which are training samples as a whole
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Sample:
    """One training example.

    Attributes:
        key: unique in the dataset, without dots or slashes (WebDataset groups members by what
            precedes the first dot).
        members: content by member name, for instance `latents.safetensors` and `json`.
    """

    key: str
    members: dict[str, bytes]


class Span(NamedTuple):
    """Where a member's content lies in its tar."""

    offset: int
    length: int
    crc32: int


class ShardEntry(BaseModel):
    """What the manifest says of a shard."""

    model_config = ConfigDict(extra="forbid")

    name: str
    samples: int
    bytes: int
    sha256: str
    split: Split | None = None

    @model_serializer(mode="wrap")
    def _without_absent_split(self, handler: Any) -> dict[str, Any]:
        """Without the field where there is no split: the bytes that were written before the field existed."""
        document: dict[str, Any] = handler(self)
        if document["split"] is None:
            del document["split"]
        return document


class CommittedShard(ShardEntry):
    """What a job keeps of a shard: a million samples' members would fill its memory.

    Attributes:
        extra: belongs to whoever wrote it (plan hash, statistics).
    """

    model_config = ConfigDict(extra="ignore")

    extra: dict[str, Any] = {}


class Sidecar(CommittedShard):
    """What lies in a shard and where."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    keys: list[str]
    members: list[dict[str, Span]]

    def without_members(self) -> CommittedShard:
        return CommittedShard(**{field: getattr(self, field) for field in CommittedShard.model_fields})


Committed = TypeVar("Committed", bound=CommittedShard)


class Manifest(BaseModel):
    """One dataset. `kind` is `clips` or `pairs`; `extra` holds recipe, versions, counts, statistics."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    kind: str
    samples: int
    shards: list[ShardEntry]
    extra: dict[str, Any] = {}

    @property
    def has_validation(self) -> bool:
        """Whether some of its samples are held out."""
        return any(entry.split == "validation" and entry.samples for entry in self.shards)

    def shards_of(self, split: Split | Literal["all"]) -> list[ShardEntry]:
        """Shards of one side; those of a dataset without a split are training shards."""
        return [entry for entry in self.shards if split in ("all", entry.split or "train")]


def shard_name(index: int) -> str:
    """Name of shard `index` inside the dataset folder."""
    return f"shards/shard-{index:06d}.tar"


def sidecar_name(shard: str) -> str:
    """Name of the sidecar that belongs to the tar `shard`."""
    return shard.removesuffix(".tar") + ".json"


class ShardFile:
    """A shard in the making: a tar that nobody sees until `commit`.

    Samples are written as they come, so memory holds one sample, not a shard.
    """

    def __init__(self, folder: Folder, index: int) -> None:
        self._folder = folder
        self.name = shard_name(index)
        self._file = folder.new_file(self.name)
        self._stream = _HashedFile(self._file)
        self._keys: list[str] = []
        self._members: list[dict[str, Span]] = []

    def add(self, sample: Sample) -> None:
        """
        Raises:
            ValueError: a key with a dot or slash, or a key twice.
        """
        key = sample.key
        if "." in key or "/" in key or key in self._keys:
            raise ValueError(f"sample key {key!r} has a dot or slash, or appears twice in {self.name}")
        self._keys.append(key)
        self._members.append(
            {member: _add(self._stream, key, member, content) for member, content in sample.members.items()}
        )

    def commit(self, extra: dict[str, Any] | None = None, split: Split | None = None) -> Sidecar:
        """Give the shard its name, then write its sidecar."""
        self._stream.write(bytes(2 * tarfile.BLOCKSIZE))
        self._stream.write(bytes(-self._stream.size % tarfile.RECORDSIZE))
        self._file.commit()
        sidecar = Sidecar(
            name=self.name,
            samples=len(self._keys),
            bytes=self._stream.size,
            sha256=self._stream.digest.hexdigest(),
            keys=self._keys,
            members=self._members,
            extra=extra or {},
            split=split,
        )
        self._folder.write(sidecar_name(self.name), _to_json(sidecar))
        return sidecar

    def discard(self) -> None:
        """Leave nothing behind of a shard that is not committed."""
        self._file.discard()


def write_shard(
    folder: Folder | str | os.PathLike[str],
    index: int,
    samples: Iterable[Sample],
    extra: dict[str, Any] | None = None,
    split: Split | None = None,
) -> Sidecar:
    """Write shard `index` atomically, the sidecar last.

    Raises:
        ValueError: a key with a dot or slash, or a key twice.
    """
    shard = ShardFile(open_folder(folder) if isinstance(folder, (str, os.PathLike)) else folder, index)
    try:
        for sample in samples:
            shard.add(sample)
        return shard.commit(extra, split)
    except BaseException:
        shard.discard()
        raise


def read_sidecar(folder: Folder, shard: str) -> Sidecar:
    """The sidecar of tar `shard`.

    Raises:
        FileNotFoundError: the shard is not committed.
        DamagedShard: the sidecar is damaged.
    """
    return _read_sidecar(folder, shard, Sidecar)


def read_committed(folder: Folder, shard: str) -> CommittedShard:
    """The sidecar of tar `shard` without its members; raises like `read_sidecar`."""
    return _read_sidecar(folder, shard, CommittedShard)


def _read_sidecar(folder: Folder, shard: str, kind: type[Committed]) -> Committed:
    name = sidecar_name(shard)
    try:
        sidecar = kind.model_validate_json(folder.read(name))
    except ValidationError as error:
        raise DamagedShard(f"{folder.url}/{name} is damaged: {error.errors()[0]['msg']}") from None
    if sidecar.name != shard:
        raise DamagedShard(f"{folder.url}/{name} is the sidecar of {sidecar.name}: shards cannot be renamed")
    return sidecar


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a finished dataset.

    Raises:
        UserError: there is none, it is damaged, or its schema is newer than this code.
    """
    path = f"{folder.url}/{MANIFEST}"
    try:
        content = folder.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} does not exist: not a dataset folder, or its job has not finished; then run the same command again"
        ) from None
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]["msg"]
        raise UserError(f"{path} is damaged ({fault}); run the same build command again to write it") from None
    if manifest.schema_version > SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {manifest.schema_version} is newer than "
            f"this code's {SCHEMA_VERSION}; update duo-vsr"
        )
    return manifest


def write_manifest(
    folder: Folder, kind: str, shards: Iterable[ShardEntry], extra: dict[str, Any] | None = None
) -> Manifest:
    """Write `manifest.json` over committed shards: from then on the dataset is complete."""
    entries = [ShardEntry(**{field: getattr(shard, field) for field in ShardEntry.model_fields}) for shard in shards]
    entries.sort(key=lambda entry: entry.name)
    manifest = Manifest(kind=kind, samples=sum(entry.samples for entry in entries), shards=entries, extra=extra or {})
    folder.write(MANIFEST, _to_json(manifest, indent=1))
    return manifest


def read_member(folder: Folder, shard: str, span: Span) -> bytes:
    """One member's content, checked.

    Raises:
        DamagedShard: too short or with another CRC-32 than when it was written.
    """
    return check_member(folder.read_range(shard, span.offset, span.length), span, f"{folder.url}/{shard}")


def check_member(content: bytes, span: Span, where: str) -> bytes:
    """`content` itself if it is what was written, else `DamagedShard`."""
    if len(content) != span.length:
        raise DamagedShard(f"{where}: ends inside the member at byte {span.offset}")
    if zlib.crc32(content) != span.crc32:
        raise DamagedShard(f"{where}: the member at byte {span.offset} has changed since it was written")
    return content


class DamagedShard(Exception):
    """A shard's bytes are not those that were written."""


def _add(stream: _HashedFile, key: str, member: str, content: bytes) -> Span:
    """Append one member as `webdataset.TarWriter` does, whose package loads torch into every process that writes."""
    info = tarfile.TarInfo(f"{key}.{member}")
    info.size, info.mode = len(content), 0o644
    stream.write(info.tobuf())
    span = Span(stream.size, len(content), zlib.crc32(content))
    stream.write(content)
    stream.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    return span


class _HashedFile:
    """Counts and hashes what is written to a file."""

    def __init__(self, file: NewFile) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> None:
        self.size += len(content)
        self.digest.update(content)
        self._file.write(content)


def _to_json(model: BaseModel, indent: int | None = None) -> bytes:
    return (json.dumps(model.model_dump(mode="json"), indent=indent, sort_keys=True) + "\n").encode()

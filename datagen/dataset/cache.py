"""Complete shards of a remote dataset kept on a local disk, shared by the processes of a machine."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from filelock import FileLock

from common.fingerprint import fingerprint
from common.storage import Folder, LocalFolder
from datagen.dataset.shard_format import DamagedShard


def cached(remote: Folder, cache_dir: str | os.PathLike[str], sha256: dict[str, str]) -> Folder:
    """`remote` with the files named in `sha256` copied to `cache_dir` on first use; a local folder as it is."""
    if isinstance(remote, LocalFolder):
        return remote
    # the address is part of the place, so that two datasets never share a file
    place = fingerprint(remote.url)[:16]
    return _CachedFolder(remote, Path(cache_dir) / place, sha256)


class _CachedFolder(LocalFolder):
    """Reads of shards go to the copy, everything else to the remote folder."""

    def __init__(self, remote: Folder, directory: Path, sha256: dict[str, str]) -> None:
        super().__init__(os.fspath(directory))
        self.url = remote.url
        self._remote = remote
        self._sha256 = sha256
        self._lock = FileLock(directory / ".lock")

    def read(self, name: str) -> bytes:
        return self._remote.read(name)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        if name not in self._sha256:
            return self._remote.read_range(name, offset, length)
        if not (self._root / name).exists():
            self._fetch(name)
        return super().read_range(name, offset, length)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return self._remote.sizes(prefix)

    def _fetch(self, name: str) -> None:
        """Copy one shard; the file lock lets one process of the machine do it while the others wait."""
        self._root.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if (self._root / name).exists():
                return
            content = self._remote.read(name)
            if hashlib.sha256(content).hexdigest() != self._sha256[name]:
                raise DamagedShard(f"{self.url}/{name}: its sha256 is not the manifest's")
            self.write(name, content)

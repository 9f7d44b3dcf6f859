"""The engine cache: folders by key, built once by one process, never read half-written.

Built under a file lock into a temporary folder, fsynced, renamed, and last a marker with the hash of every file.
Readers hold a shared lock for as long as they read; eviction takes only what nobody reads. An entry without a
marker, or that differs from it, is deleted and built again: an interrupted build can never be loaded.
Any number of processes may share a root; each holds it to its own `max_bytes` after it has built something.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath

from engines import space

log = logging.getLogger(__name__)

_MARKER = "complete.json"
_EVICTING = "evicting"  # no key: those are hashes


class _Entry(PosixPath):
    """A path that can be referred to weakly, as those of the library cannot."""


class DiskCache:
    """Entries under `root`: `<key>/` holds the files, `<key>.lock` is never deleted and tells them from other folders.

    A build that takes them over `max_bytes` (None: no limit) has those longest unused deleted.
    """

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self.root = root
        self.max_bytes = max_bytes
        root.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, build: Callable[[Path], None]) -> Path:
        """The folder of `key`, made by `build(empty folder)` if there is no whole one. Read it only.

        It stays as long as this very object lives: keep it while you read, and not only a path made from it. Where the
        disk is full even without what nobody reads, it is made in a temporary folder, for this object alone.
        """
        try:
            return self._kept(key, build)
        except Exception as error:
            if not space.is_full(error, self.root):
                raise
            log.warning("the engine cache is full", extra={"root": str(self.root), "error": str(error)})
        self.evict(0)
        try:
            return self._kept(key, build)
        except Exception as error:
            if not space.is_full(error, self.root):
                raise
        return _unkept(build)

    def _kept(self, key: str, build: Callable[[Path], None]) -> Path:
        folder = _Entry(self.root / key)
        with self._locked(key, fcntl.LOCK_EX):
            if missing := not _whole(folder):
                self._build(key, build)
            os.utime(folder / _MARKER)
            weakref.finalize(folder, os.close, self._reading(key))
        if missing and self.max_bytes is not None:
            self.evict(self.max_bytes)  # not under the lock: two builders would wait for each other
        return folder

    def size_bytes(self) -> int:
        """Of all entries."""
        return sum(map(_size, self._folders()))

    def evict(self, max_bytes: int) -> list[str]:
        """Deletes the entries longest unused until at most `max_bytes` are left; what somebody reads or builds stays.

        Also what interrupted builds have left behind.
        """
        with self._locked(_EVICTING, fcntl.LOCK_EX):  # one at a time: two would both make room for the same bytes
            for scratch in self._folders(".tmp"):
                self._delete_if_free(scratch, scratch.stem)
            return [name for name, _ in self._over(max_bytes, self._delete_if_free)]

    def evictable(self, max_bytes: int) -> list[tuple[str, int]]:
        """The names and bytes of what `evict` would delete now."""
        return list(self._over(max_bytes, self._free))

    def _over(self, max_bytes: int, take: Callable[[Path, str], bool]) -> Iterator[tuple[str, int]]:
        """Entries longest unused that `take` could take, until at most `max_bytes` are left."""
        entries = sorted(self._folders(), key=_last_used)
        sizes = {folder: _size(folder) for folder in entries}
        total = sum(sizes.values())
        for folder in entries:
            if total > max_bytes and take(folder, folder.name):
                total -= sizes[folder]
                yield folder.name, sizes[folder]

    def _build(self, key: str, build: Callable[[Path], None]) -> None:
        folder, scratch = self.root / key, self.root / f"{key}.tmp"
        for old in (scratch, folder):
            shutil.rmtree(old, ignore_errors=True)
        scratch.mkdir()
        try:
            build(scratch)
            hashes = {str(path.relative_to(scratch)): _hash(path, sync=True) for path in _files(scratch)}
            scratch.rename(folder)
            _write_synced(folder / _MARKER, json.dumps(hashes, sort_keys=True).encode())
        except OSError:
            for half in (scratch, folder):  # what fills a disk must not stay there
                shutil.rmtree(half, ignore_errors=True)
            raise
        _sync_folder(folder)
        _sync_folder(self.root)

    def _reading(self, key: str) -> int:
        lock = os.open(self.root / f"{key}.readers", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(lock, fcntl.LOCK_SH)
        return lock

    def _delete_if_free(self, folder: Path, key: str) -> bool:
        try:
            with self._alone(key):
                (folder / _MARKER).unlink(missing_ok=True)
                with contextlib.suppress(FileNotFoundError):  # since it was listed, its builder has moved or deleted it
                    shutil.rmtree(folder)
                return True
        except BlockingIOError:
            return False

    def _free(self, _: Path, key: str) -> bool:
        try:
            with self._alone(key):
                return True
        except BlockingIOError:
            return False

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """While nobody builds or reads `key`; raises BlockingIOError if somebody does."""
        with (
            self._locked(key, fcntl.LOCK_EX | fcntl.LOCK_NB),
            (self.root / f"{key}.readers").open("ab") as readers,
        ):
            fcntl.flock(readers, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    @contextlib.contextmanager
    def _locked(self, key: str, how: int) -> Iterator[None]:
        with (self.root / f"{key}.lock").open("ab") as lock:
            fcntl.flock(lock, how)
            yield

    def _folders(self, suffix: str = "") -> list[Path]:
        """Those whose key was ever locked: the root may hold what is no part of a cache."""
        folders = (self.root / f"{lock.stem}{suffix}" for lock in self.root.glob("*.lock"))
        return [folder for folder in folders if folder.is_dir()]


def _unkept(build: Callable[[Path], None]) -> Path:
    made = tempfile.mkdtemp(prefix="fewstep-engine-")
    folder = _Entry(made)
    weakref.finalize(folder, shutil.rmtree, made, ignore_errors=True)
    build(folder)
    return folder


def _whole(folder: Path) -> bool:
    """Whether the marker is there and every file is what it says, no more and no less."""
    try:
        hashes = json.loads((folder / _MARKER).read_bytes())
        return bool(hashes == {str(path.relative_to(folder)): _hash(path) for path in _files(folder)})
    except (OSError, ValueError):
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MARKER)


def _hash(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with path.with_suffix(".part").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".part").rename(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(folder: Path) -> int:
    """Bytes; of an entry that is being built anew, none."""
    try:
        return sum(path.stat().st_size for path in _files(folder))
    except FileNotFoundError:
        return 0


def _last_used(folder: Path) -> float:
    try:
        return (folder / _MARKER).stat().st_mtime
    except OSError:
        return time.time() - 1e9

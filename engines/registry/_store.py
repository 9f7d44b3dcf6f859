"""Stores of named bytes under a registry: a local folder, and a dictionary for one process.

Everything the registry promises rests on one property: `create` gives a name to whole bytes exactly
once, whoever else tries at the same moment and whenever a process is killed. A local folder gets it
from a temporary file, fsync and `os.link`, which fails if the name is taken.
"""

import os
import shutil
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import NamedTuple, Protocol

from engines import space

_STALE_S = 24 * 3600.0


class Held(NamedTuple):
    """A name relative to the folder that was asked for; `modified_s` is seconds since 1970, by the store's clock."""

    name: str
    bytes: int
    modified_s: float


class Store(Protocol):
    """Names are relative paths with `/`. Missing names read as None; missing folders list as empty."""

    def create(self, name: str, data: bytes | Path) -> bool:
        """Writes a new name whole; False, with nothing changed, if it is taken."""

    def replace(self, name: str, data: bytes | Path) -> None:
        """Writes a name whole, whether or not it is there."""

    def append(self, name: str, data: bytes) -> None: ...

    def read(self, name: str) -> bytes | None: ...

    def exists(self, name: str) -> bool: ...

    def children(self, folder: str) -> list[str]:
        """The names of files and folders directly inside."""

    def walk(self, folder: str) -> list[str]:
        """All files below, relative to the folder."""

    def local(self, name: str) -> Path | None:
        """A local file with the content, to be read only."""

    def forget(self, name: str) -> None:
        """Drops the copy that `local` made, if it was one."""

    def folder(self, name: str) -> Path | None:
        """The local folder itself, made if missing; None if the store is not a local one."""

    def held(self, folder: str) -> list[Held]:
        """All files below, each with its size and age. What goes meanwhile may be missing."""

    def modified_s(self, name: str) -> float | None:
        """When this was last written, by the store's clock."""

    def now_s(self) -> float:
        """What time it is for the store, in seconds since 1970."""

    def move(self, name: str, to: str) -> bool:
        """Gives the content the name `to`, in place of what has it; False if there is nothing to move."""

    def remove(self, name: str) -> None:
        """Nothing happens if it is not there."""


class LocalStore:
    """A folder of a local or shared POSIX file system with hard links."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tmp = root / ".tmp"
        self._tmp.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def create(self, name: str, data: bytes | Path) -> bool:
        target = self._target(name)
        if target.exists():
            return False
        written = self._write(data)
        try:
            self._link(written, target)
        except FileExistsError:
            return False
        finally:
            written.unlink()
        _fsync_folder(target.parent)
        return True

    def replace(self, name: str, data: bytes | Path) -> None:
        target = self._target(name)
        os.replace(self._write(data), target)
        _fsync_folder(target.parent)

    def append(self, name: str, data: bytes) -> None:
        space.append(self._target(name), data)

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, name: str) -> bool:
        return (self._root / name).is_file()

    def children(self, folder: str) -> list[str]:
        try:
            return os.listdir(self._root / folder)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, folder: str) -> list[str]:
        base = self._root / folder
        return [path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()]

    def local(self, name: str) -> Path | None:
        path = self._root / name
        return path if path.is_file() else None

    def forget(self, name: str) -> None:
        """What `local` gives is no copy."""

    def folder(self, name: str) -> Path | None:
        path = self._root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def held(self, folder: str) -> list[Held]:
        found = []
        for name in self.walk(folder):
            try:
                stat = (self._root / folder / name).stat()
            except FileNotFoundError:
                continue
            found.append(Held(name, stat.st_size, stat.st_mtime))
        return found

    def modified_s(self, name: str) -> float | None:
        try:
            return (self._root / name).stat().st_mtime
        except FileNotFoundError:
            return None

    def now_s(self) -> float:
        """As the file system has it, which may be another machine's. Takes no space, which a full disk has not."""
        os.utime(self._tmp)
        return self._tmp.stat().st_mtime

    def move(self, name: str, to: str) -> bool:
        try:
            os.replace(self._root / name, self._target(to))
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Folders stay: a writer may be about to use one."""
        (self._root / name).unlink(missing_ok=True)

    def _target(self, name: str) -> Path:
        target = self._root / name
        with space.needed(self._root):
            target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _write(self, data: bytes | Path) -> Path:
        """A new temporary file, on the disk for good."""
        with space.needed(self._root):
            fd, path = tempfile.mkstemp(dir=self._tmp)
            try:
                with os.fdopen(fd, "wb") as file:
                    if isinstance(data, Path):
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, 1 << 20)
                    else:
                        file.write(data)
                    file.flush()
                    os.fchmod(file.fileno(), 0o644)
                    os.fsync(file.fileno())
            except BaseException:
                Path(path).unlink()
                raise
            return Path(path)

    def _link(self, written: Path, target: Path) -> None:
        with space.needed(self._root):
            os.link(written, target)

    def _sweep(self) -> None:
        """Removes what writers that were killed have left behind, once it is surely nobody's."""
        for path in self._tmp.iterdir():
            try:
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
            except FileNotFoundError:
                continue


class DictStore:
    """The same in one process's memory. `local` writes a copy into a temporary folder."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._written_s: dict[str, float] = {}
        self._lock = threading.Lock()
        self._copies: Path | None = None

    def create(self, name: str, data: bytes | Path) -> bool:
        with self._lock:
            if name in self._files:
                return False
            self._put(name, whole(data))
            return True

    def replace(self, name: str, data: bytes | Path) -> None:
        with self._lock:
            self._put(name, whole(data))

    def append(self, name: str, data: bytes) -> None:
        with self._lock:
            self._put(name, self._files.get(name, b"") + data)

    def read(self, name: str) -> bytes | None:
        return self._files.get(name)

    def exists(self, name: str) -> bool:
        return name in self._files

    def children(self, folder: str) -> list[str]:
        return list({name.split("/")[0] for name in self.walk(folder)})

    def walk(self, folder: str) -> list[str]:
        with self._lock:
            return [name[len(folder) + 1 :] for name in self._files if name.startswith(f"{folder}/")]

    def local(self, name: str) -> Path | None:
        data = self._files.get(name)
        if data is None:
            return None
        with self._lock:
            self._copies = self._copies or scratch_folder(self)
        path = self._copies / name.replace("/", "-")
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
        return path

    def forget(self, name: str) -> None:
        """`local` compares its copy each time."""

    def folder(self, name: str) -> Path | None:
        return None

    def held(self, folder: str) -> list[Held]:
        names = self.walk(folder)
        with self._lock:
            full = {name: f"{folder}/{name}" for name in names}
            return [
                Held(name, len(self._files[path]), self._written_s[path])
                for name, path in full.items()
                if path in self._files
            ]

    def modified_s(self, name: str) -> float | None:
        return self._written_s.get(name)

    def now_s(self) -> float:
        return time.time()

    def move(self, name: str, to: str) -> bool:
        with self._lock:
            if name not in self._files:
                return False
            self._files[to], self._written_s[to] = self._files.pop(name), self._written_s.pop(name)
            return True

    def remove(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)
            self._written_s.pop(name, None)

    def _put(self, name: str, data: bytes) -> None:
        self._files[name], self._written_s[name] = data, time.time()


def scratch_folder(owner: object) -> Path:
    """A new temporary folder that goes when `owner` does."""
    path = tempfile.mkdtemp(prefix="fewstep-")
    weakref.finalize(owner, shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def whole(data: bytes | Path) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""A store behind any fsspec URL, used only after it has shown that two writers cannot create one name.

Object stores that have a conditional PUT show it through fsspec's `mode="create"`; one that ignores the
mode would let two coordinators write the same revision, so it is refused at start.
"""

import secrets
import threading
from pathlib import Path
from typing import Any

import fsspec

from engines.errors import InvalidRequest, StoreUnsafe
from engines.registry._store import Held, scratch_folder, whole

_CLOCK = ".clock"
_ROUNDS = 4
_TAKEN, _CONTENDED = 412, 409  # S3's answers to a conditional PUT: the name is there; somebody writes it at this moment
_TRIES = 20


class RemoteStore:
    """`cache` keeps local copies of what `local` was asked for; without one a temporary folder does.

    Raises:
        InvalidRequest: nothing that is installed reads such a URL.
        StoreUnsafe: several writers created the same name, or none could.
    """

    def __init__(self, url: str, cache: Path | None = None) -> None:
        try:
            self._fs, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InvalidRequest(f"registry {url}: {error} (for s3:// install fewstep[s3])") from error
        self._cache = cache or scratch_folder(self)
        self._probe(url)

    def create(self, name: str, data: bytes | Path) -> bool:
        for _ in range(_TRIES):
            try:
                self._fs.pipe_file(self._path(name), whole(data), mode="create")
            except FileExistsError:
                return False
            except OSError as error:  # s3fs has no class of its own for either
                if (status := _status(error)) == _TAKEN:
                    return False
                if status != _CONTENDED:
                    raise
            else:
                return True
        raise StoreUnsafe(f"{name} was contended {_TRIES} times: the object store never says who wrote it")

    def replace(self, name: str, data: bytes | Path) -> None:
        self._fs.pipe_file(self._path(name), whole(data))

    def append(self, name: str, data: bytes) -> None:
        self.replace(name, (self.read(name) or b"") + data)

    def read(self, name: str) -> bytes | None:
        try:
            data: bytes = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return data

    def exists(self, name: str) -> bool:
        return bool(self._fs.isfile(self._path(name)))

    def children(self, folder: str) -> list[str]:
        self._fs.invalidate_cache(self._path(folder))
        try:
            found: list[str] = self._fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def walk(self, folder: str) -> list[str]:
        return list(self._files(folder))

    def local(self, name: str) -> Path | None:
        target = self._cache / name
        if target.exists():
            return target
        data = self.read(name)
        if data is None:
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
        partial.write_bytes(data)
        return partial.replace(target)

    def forget(self, name: str) -> None:
        (self._cache / name).unlink(missing_ok=True)

    def folder(self, name: str) -> Path | None:
        return None

    def held(self, folder: str) -> list[Held]:
        found = []
        for name, info in self._files(folder).items():
            modified = self.modified_s(f"{folder}/{name}")
            if modified is not None:
                found.append(Held(name, info["size"], modified))
        return found

    def modified_s(self, name: str) -> float | None:
        try:
            return float(self._fs.modified(self._path(name)).timestamp())
        except FileNotFoundError:
            return None

    def now_s(self) -> float:
        self.replace(_CLOCK, b"")
        return self.modified_s(_CLOCK) or 0.0

    def move(self, name: str, to: str) -> bool:
        try:
            self._fs.mv(self._path(name), self._path(to))
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        self.forget(name)
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def _files(self, folder: str) -> dict[str, dict[str, Any]]:
        base = self._path(folder)
        found: dict[str, dict[str, Any]] = self._fs.find(base, detail=True)
        # Where a store keeps folders, one whose last file went is listed itself.
        files = {path: info for path, info in found.items() if info["type"] == "file"}
        return {path[path.index(base) + len(base) + 1 :]: info for path, info in files.items()}

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _probe(self, url: str) -> None:
        for _ in range(_ROUNDS):
            name = f".probe/{secrets.token_hex(8)}"
            winners = self._race(name)
            self._fs.rm_file(self._path(name))
            if winners != 1:
                raise StoreUnsafe(
                    f"{url}: {winners} writers created the same name; a registry needs a store with exclusive "
                    "creation, such as a local folder or an object store with conditional PUT"
                )

    def _race(self, name: str) -> int:
        """How many of three writers create `name`: two that start together and one that comes later."""
        wins: list[bool] = []
        barrier = threading.Barrier(2)

        def write() -> None:
            barrier.wait()
            wins.append(self.create(name, b"probe"))

        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(wins) + self.create(name, b"late")


def _status(error: OSError) -> int | None:
    """The HTTP status of a refusal by an S3 server."""
    response = getattr(error.__cause__, "response", None) or {}
    status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status

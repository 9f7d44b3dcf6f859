"""The registry in files, local or behind any fsspec URL."""

from pathlib import Path

from engines.registry._keyed import KeyedRegistry
from engines.registry._store import LocalStore, Store


class FilesRegistry(KeyedRegistry):
    """A path and a `file://` URL are a local folder, made if missing; other URLs go through fsspec.

    `cache` is where local copies of remote blobs are kept.

    Raises:
        StoreUnsafe: the store lets two writers create one name.
    """

    def __init__(self, url: str | Path, *, cache: Path | None = None) -> None:
        super().__init__(_store(str(url), cache))


def _store(url: str, cache: Path | None) -> Store:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalStore(Path(url).expanduser().absolute())
    if scheme in ("file", "local"):
        return LocalStore(Path(rest).absolute())
    from engines.registry._remote import RemoteStore

    return RemoteStore(url, cache)

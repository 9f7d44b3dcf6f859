"""The registry in one process's memory: for tests, and for tools that need no folder."""

from engines.registry._keyed import KeyedRegistry
from engines.registry._store import DictStore


class MemoryRegistry(KeyedRegistry):
    """Empty at first, gone with the process."""

    def __init__(self) -> None:
        super().__init__(DictStore())

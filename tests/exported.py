"""Graphs of tiny networks, exported once for all test processes of the same sources: an export takes seconds."""

import hashlib
from functools import cache
from pathlib import Path

from engines.cache import DiskCache
from engines.graph import GraphStore

_ROOT = Path(__file__).parents[1]


@cache
def graphs() -> GraphStore:
    """Read them only. A test that wants to see an export makes a store of its own."""
    digest = hashlib.sha256()
    for path in sorted((_ROOT / "engines").rglob("*.py")):
        digest.update(path.read_bytes())
    return GraphStore(DiskCache(_ROOT / ".fewstep" / "test-graphs" / digest.hexdigest()[:16]))

"""Checkpoints: everything a run is, as safetensors and JSON, written whole or not at all.

A checkpoint is a folder `<stage>-<iteration>-<fence>` made under another name, synced and renamed; its `meta.json` is
written last and holds the hash of the tensors. One writer owns the folder: the highest fencing number ever claimed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from engines import space
from engines.errors import LeaseLost

logger = logging.getLogger(__name__)

_TENSORS, _META, _FENCE = "tensors.safetensors", "meta.json", "FENCE"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """tensors by path-like names; meta is plain JSON and says at least `stage` and `iteration`."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]


def claim(folder: Path, fence: int) -> None:
    """Makes `fence` the owner of the folder: from now on writers with a lower one are refused.

    Raises:
        LeaseLost: somebody with a higher number is the owner.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_old(folder, fence)
    _write(folder / f"{_FENCE}.{os.getpid()}", str(fence).encode())
    (folder / f"{_FENCE}.{os.getpid()}").replace(folder / _FENCE)
    _sync(folder)


def write(folder: Path, checkpoint: Checkpoint, *, fence: int = 0, keep: int = 2) -> Path:
    """Writes one and removes all but the newest `keep`. When it returns, the checkpoint survives a power cut.

    Raises:
        LeaseLost: a higher fence is on disk.
        StorageFull: there is no room for it; those before it are whole.
    """
    with space.needed(folder):
        return _write_whole(folder, checkpoint, fence, keep)


def _write_whole(folder: Path, checkpoint: Checkpoint, fence: int, keep: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{checkpoint.meta['stage']:02d}-{checkpoint.meta['iteration']:08d}-{fence:08d}"
    partial = folder / f".{name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    data = save({key: value.detach().cpu().contiguous() for key, value in checkpoint.tensors.items()})
    meta = {**checkpoint.meta, "fence": fence, "sha256": hashlib.sha256(data).hexdigest()}
    try:
        _write(partial / _TENSORS, data)
        _write(partial / _META, json.dumps(meta, sort_keys=True).encode())
        _sync(partial)
        _refuse_old(folder, fence)
    except (OSError, LeaseLost):
        shutil.rmtree(partial)
        raise
    shutil.rmtree(folder / name, ignore_errors=True)  # the same point of an earlier life
    partial.rename(folder / name)
    _sync(folder)
    for old in _names(folder)[:-keep]:
        shutil.rmtree(folder / old, ignore_errors=True)
    return folder / name


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning."""
    for name in reversed(_names(folder)):
        found = _read(folder / name)
        if found is not None:
            return found
        logger.warning("checkpoint is damaged, trying the one before", extra={"checkpoint": str(folder / name)})
    return None


def _read(path: Path) -> Checkpoint | None:
    try:
        meta = json.loads((path / _META).read_bytes())
        data = (path / _TENSORS).read_bytes()
    except (OSError, ValueError):
        return None
    if hashlib.sha256(data).hexdigest() != meta.get("sha256"):
        return None
    return Checkpoint(tensors=load(data), meta=meta)


def _names(folder: Path) -> list[str]:
    """Checkpoints by (stage, iteration, fence)."""
    if not folder.exists():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _refuse_old(folder: Path, fence: int) -> None:
    path = folder / _FENCE
    stamped = [int(name.rsplit("-", 1)[1]) for name in _names(folder) if name.count("-") == 2]
    highest = max([int(path.read_text()) if path.exists() else 0, *stamped])
    if highest > fence:
        raise LeaseLost(
            f"{folder} belongs to fence {highest} now, this writer has {fence}: stop and write nothing more"
        )


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

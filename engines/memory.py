"""How much memory there is for engines: a GPU's, or what this container or machine has."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from engines.backends.base import is_gpu

SHARE = 0.75
"""Of it, what weights may take: the rest is for calls, pictures and everything else that runs here."""
_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def share(device: str) -> int:
    """Bytes for weights on a device, where nobody has said how many."""
    total = torch.cuda.get_device_properties(device).total_memory if is_gpu(device) else of_machine()
    return int(SHARE * total)


def level(sizes: Iterable[int], room: int) -> int | None:
    """The most that each of `sizes` may keep so that all fit into `room`; None where they do as they are.

    What is smaller keeps all of it, so the largest give way first, and equally.
    """
    ordered, left = sorted(sizes), room
    for i, size in enumerate(ordered):
        share = left // (len(ordered) - i)
        if size > share:
            return share
        left -= size
    return None


def of_machine(limits: Iterable[Path] = _CGROUP) -> int:
    """Bytes that processes here may take: the machine's memory, or a container's limit if that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(int(text) for path in limits if (text := _read(path)).isdigit())])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

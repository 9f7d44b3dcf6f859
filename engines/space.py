"""Disks that are full: what that looks like, and the one sentence that says so."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.errors import StorageFull

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOTHING_BYTES = 64 * 2**10


@contextmanager
def needed(folder: Path) -> Iterator[None]:
    """While something is written below `folder`.

    Raises:
        StorageFull: there was no room for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise full(folder) from error
        raise


def append(path: Path, line: bytes) -> None:
    """Adds a line to a file, made if missing, whole or not at all: half of one would spoil the next one too.

    Raises:
        StorageFull: there is no room for it.
    """
    with needed(path):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(fd, line)
            if written < len(line):
                os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR) - written)  # others may have added theirs before it
                raise full(path)
        finally:
            os.close(fd)


def full(folder: Path) -> StorageFull:
    return StorageFull(f"no space is left for {folder}: make some (`fewstep gc` tells what can go) and try again")


def is_full(error: Exception, folder: Path) -> bool:
    """Whether a failure is one of space; a library or a child that ran out of it may say anything."""
    return getattr(error, "errno", None) in _FULL or exhausted(folder)


def exhausted(folder: Path) -> bool:
    """Whether as good as nothing more can be written there."""
    return shutil.disk_usage(folder).free < _NOTHING_BYTES

"""A copy of what a Redis-protocol server holds, as of one moment, and a folder from which a server goes on with it.

The copy is what the server gives a replica: whole and consistent whatever is written meanwhile, from any host that
reaches it, and with the rights of a replica (`+sync`).
"""

import os
import shutil
import tempfile
from pathlib import Path
from socket import socket
from typing import cast

import redis

from engines.errors import Conflict, Unavailable
from engines.redis_address import connect
from engines.space import needed

_AOF, _BASE, _INCREMENT = "appendonly.aof", "appendonly.aof.1.base.rdb", "appendonly.aof.1.incr.aof"
_CHUNK_BYTES = 1 << 20
_SILENCE_S = 60.0  # a server that makes its copy sends a newline every few seconds


def snapshot(url: str, path: Path) -> int:
    """Writes the data of the server to `path`, whole or not at all, readable by its owner alone. Returns its bytes.

    Raises:
        Unavailable: the server is away, or gives no copy.
        StorageFull: there is no room.
    """
    client = connect(url, protocol=2, socket_timeout=_SILENCE_S, socket_connect_timeout=5.0)
    try:
        connection = client.connection_pool.get_connection()
        try:
            connection.send_command("SYNC")  # type: ignore[no-untyped-call]  # redis-py types neither
            return _receive(cast(socket, connection._sock), path)
        finally:
            connection.disconnect()  # type: ignore[no-untyped-call]
    except (redis.RedisError, TimeoutError, ConnectionError) as error:
        raise Unavailable(f"no copy of what Redis holds: {error}") from error
    finally:
        client.close()


def check_empty(folder: Path) -> None:
    """
    Raises:
        Conflict: there is something in the folder.
    """
    if folder.exists() and any(folder.iterdir()):
        raise Conflict(f"{folder} has something in it: a copy is laid out in an empty folder")


def lay_out(copied: Path, folder: Path) -> None:
    """Makes `folder` the data folder of a server with `appendonly yes`, which then starts with what was copied.

    Raises:
        Conflict: there is something in it.
        StorageFull: there is no room.
    """
    check_empty(folder)
    made = folder / "appendonlydir"
    with needed(folder.parent):
        made.mkdir(parents=True)
        shutil.copyfile(copied, made / _BASE)
        (made / _INCREMENT).touch()
        manifest = f"file {_BASE} seq 1 type b\nfile {_INCREMENT} seq 1 type i\n"
        (made / f"{_AOF}.manifest").write_text(manifest)


def _receive(sock: socket, path: Path) -> int:
    length = _length(sock)
    with needed(path.parent):
        fd, written = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as file:
                left = length
                while left:
                    got = sock.recv(min(left, _CHUNK_BYTES))
                    if not got:
                        raise Unavailable(f"Redis ended its copy {left} bytes too early")
                    file.write(got)
                    left -= len(got)
                file.flush()
                os.fsync(file.fileno())
            os.replace(written, path)
        except BaseException:
            Path(written).unlink(missing_ok=True)
            raise
    return length


def _length(sock: socket) -> int:
    """Of what follows: `$<bytes>`, after newlines while the server makes it."""
    line = b""
    while not (line.endswith(b"\n") and line.strip()):
        got = sock.recv(1)
        if not got:
            raise Unavailable("Redis ended the connection instead of giving a copy")
        line += got
    told = line.strip().decode(errors="replace")
    if not (told.startswith("$") and told[1:].isdigit()):
        raise Unavailable(f"Redis gives no copy: {told.lstrip('-')}")
    return int(told[1:])

"""`fewstep backup` and `fewstep restore`: what a system was entrusted with, copied while it runs, and put back."""

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from engines.errors import InvalidRequest, NotFound
from engines.registry.copying import Copied, back_up
from engines.registry.copying import restore as restore_registry
from engines.registry.files import FilesRegistry
from server.commands.students import known
from server.commands.terminal import out
from server.embedded import REDIS_URL, URL_SECRET
from server.redis_copy import check_empty, lay_out, snapshot

_REDIS, _REGISTRY, _DONE = "redis.rdb", "registry", "backup.json"
Folder = Annotated[Path, typer.Argument(help="A folder for the copy.")]
Data = Annotated[Path | None, typer.Option("--data", help="The folder of `fewstep up`.")]
RegistryUrl = Annotated[str | None, typer.Option(help="A folder or fsspec URL, where there is no --data.")]


def backup(
    folder: Folder,
    data: Data = None,
    registry_url: RegistryUrl = None,
    redis_url: Annotated[str | None, typer.Option(help="redis://…, where there is no --data.")] = None,
) -> None:
    """Copy registry and Redis while they are used; nothing is lost that was acknowledged before the copy began.

    First Redis as of one moment, then the registry: students, deployments, jobs with their checkpoints. A second copy
    into the same folder copies only weights that are new. Pictures are kept for WORKER_RESULT_TTL_S alone, so an older
    copy has them no more.

    Example: fewstep backup /backups/today --data .fewstep
    """
    place = _place(data, registry_url, redis_url)
    known(place.registry_url)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _DONE).unlink(missing_ok=True)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    redis_bytes = snapshot(place.redis_url, folder / _REDIS)
    copied = back_up(FilesRegistry(place.registry_url), FilesRegistry(folder / _REGISTRY))
    if data and (data / URL_SECRET).exists():
        shutil.copy2(data / URL_SECRET, folder / URL_SECRET)
    (folder / _DONE).write_text(json.dumps({"at": at, "redis_bytes": redis_bytes, "registry_files": copied.files}))
    out.print(f"{folder}: Redis {decimal(redis_bytes)}, registry {_told(copied)}", highlight=False)


def restore(
    folder: Folder,
    data: Annotated[Path | None, typer.Option("--data", help="A new folder for `fewstep up`.")] = None,
    registry_url: RegistryUrl = None,
    redis_dir: Annotated[
        Path | None, typer.Option(help="An empty data folder of a Redis with appendonly, where there is no --data.")
    ] = None,
) -> None:
    """Put a copy back: into an empty registry and the empty data folder of a Redis that is not running yet.

    Start Redis on that folder (with `appendonly yes`), then gateways, workers and distillers. Requests that waited are
    served if their time is not over, jobs go on from their last checkpoint.

    Example: fewstep restore /backups/today --data .fewstep && fewstep up --data .fewstep
    """
    if not (folder / _DONE).is_file():
        raise NotFound(f"{folder} is no finished backup: it has no {_DONE}")
    if data:
        registry_url, redis_dir = registry_url or str(data / "registry"), redis_dir or data / "redis"
    if registry_url is None or redis_dir is None:
        raise InvalidRequest("say where to: --data, or --registry-url and --redis-dir")
    check_empty(redis_dir)  # before anything is written anywhere
    copied = restore_registry(FilesRegistry(folder / _REGISTRY), FilesRegistry(registry_url))
    lay_out(folder / _REDIS, redis_dir)
    if data and (folder / URL_SECRET).exists():
        shutil.copy2(folder / URL_SECRET, data / URL_SECRET)
    out.print(f"{registry_url}: {_told(copied)}; Redis starts from {redis_dir}", highlight=False)


@dataclass(frozen=True, slots=True)
class _Place:
    registry_url: str
    redis_url: str


def _place(data: Path | None, registry_url: str | None, redis_url: str | None) -> _Place:
    if data:
        registry_url = registry_url or str(data / "registry")
        if redis_url is None:
            if not (data / REDIS_URL).is_file():
                raise NotFound(f"{data} is not the folder of a `fewstep up` with a Redis of its own: name --redis-url")
            redis_url = (data / REDIS_URL).read_text()
    if registry_url is None or redis_url is None:
        raise InvalidRequest("say what to copy: --data, or --registry-url and --redis-url")
    return _Place(registry_url, redis_url)


def _told(copied: Copied) -> str:
    had = f", and {decimal(copied.known_bytes)} of weights that it had" if copied.known_bytes else ""
    return f"{copied.files} files, {decimal(copied.bytes)}{had}"

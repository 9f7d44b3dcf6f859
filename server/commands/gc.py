"""`fewstep gc`: deletes what nothing refers to any more, or says what that would be."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from distill_jobs import retention as jobs
from distill_jobs.records import JobRecords
from engines.cache import DiskCache
from engines.errors import InvalidRequest, StorageFull
from engines.manifest import shown
from engines.registry.files import FilesRegistry
from engines.registry.retention import Garbage, Retention
from server.commands.students import DEFAULT_REGISTRY, RegistryUrl, known
from server.commands.terminal import out
from server.settings import GcSettings, load


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    student: Annotated[
        list[str] | None, typer.Option("--student", help="Remove this one, name@digest; repeat it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    registry_url: RegistryUrl = DEFAULT_REGISTRY,
    cache_dir: Annotated[Path | None, typer.Option(help="An engine cache; else GC_CACHE_DIR.")] = None,
) -> None:
    """Delete what nothing refers to: blobs, checkpoints of ended jobs, cached engines beyond their limit.

    Safe beside a running system. What serves, is tried, may be rolled back to, is needed by a job or is the base of
    another student stays. Limits are GC_* variables: GC_GRACE_S, GC_KEEP_REVISIONS, GC_CHECKPOINTS_S, GC_CACHE_BYTES …
    Exit code 0: done, or nothing to do; 1: a student that was named is needed, a file cannot be read, or another one is
    at work: nothing went.

    Example: fewstep gc --dry-run
    """
    given: dict[str, Any] = {} if cache_dir is None else {"cache_dir": cache_dir}
    settings = load(GcSettings, **given)
    known(registry_url)
    collected = Collection(registry_url, settings)
    found = list(collected.plan(student or ()) if dry_run else collected.remove(student or ()))
    if as_json:
        out.print_json(json.dumps(_as_json(found, dry_run)))
    else:
        out.print(_table(found))
        out.print(_summary(found, dry_run), highlight=False)


class Collection:
    """One pass over a registry and an engine cache."""

    def __init__(self, registry_url: str, settings: GcSettings) -> None:
        self._settings = settings
        registry = FilesRegistry(registry_url)
        self._records = JobRecords(registry)
        self._retention = Retention(
            registry,
            grace_s=settings.grace_s,
            keep_revisions=settings.keep_revisions,
            unused_students_s=settings.unused_students_s,
        )
        self._cache = None if settings.cache_dir is None else _cache(settings.cache_dir)

    def plan(self, named: Iterable[str]) -> Iterable[Garbage]:
        """What would go now."""
        yield from self._left_behind()
        students = self._retention.students(jobs.needs(self._records), named)
        yield from students
        yield from self._retention.blobs(going=[one.name for one in students])
        for name, size in self._cache.evictable(self._settings.cache_bytes) if self._cache else ():
            yield _engine(name, size)

    def remove(self, named: Iterable[str]) -> Iterable[Garbage]:
        """What has gone. Students are looked through before anything goes, and blobs when the students are gone: one
        may have been kept after all. Where there is no space even for that, checkpoints go before: they need none."""
        left = self._left_behind()
        with ExitStack() as stack:
            try:
                renew = stack.enter_context(self._retention.alone())
            except StorageFull:
                if not left:
                    raise
                yield from self._dropped(left)
                left, renew = [], stack.enter_context(self._retention.alone())
            students = self._retention.students(jobs.needs(self._records), named)
            yield from self._dropped(left)
            yield from self._removed(students, renew)
            yield from self._removed(self._retention.blobs(), renew)
        if self._cache:
            sizes = dict(self._cache.evictable(self._settings.cache_bytes))
            for name in self._cache.evict(self._settings.cache_bytes):
                yield _engine(name, sizes.get(name, 0))

    def _left_behind(self) -> list[Garbage]:
        return jobs.left_behind(self._records, self._retention, self._settings.checkpoints_s)

    def _dropped(self, garbage: Iterable[Garbage]) -> Iterable[Garbage]:
        for one in garbage:
            self._retention.drop(one)
            yield one

    def _removed(self, garbage: Iterable[Garbage], renew: Callable[[], None]) -> Iterable[Garbage]:
        for one in garbage:
            renew()
            needed = jobs.needs(self._records) if one.kind == "student" else {}
            if self._retention.remove(one, needed):
                yield one


def _cache(folder: Path) -> DiskCache:
    """Refuses one that is not there: opening it would make an empty cache in the wrong place."""
    if not folder.is_dir():
        message = f"there is no engine cache at {folder}: name a folder that is there, such as WORKER_CACHE_DIR"
        raise InvalidRequest(message, param="cache_dir")
    return DiskCache(folder)


def _engine(name: str, size: int) -> Garbage:
    return Garbage("engine", name, size, "unused, and the cache is over its limit")


def _table(found: Iterable[Garbage]) -> Table:
    table = Table("what", "name", "size", "why")
    for one in found:
        name = shown(one.name) if one.kind == "student" else one.name[:32]
        table.add_row(one.kind, name, decimal(one.bytes), one.why)
    return table


def _summary(found: list[Garbage], dry_run: bool) -> str:
    if not found:
        return "nothing to delete"
    counts = Counter(one.kind for one in found)
    parts = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(counts.items()))
    return f"{'would delete' if dry_run else 'deleted'} {parts}: {decimal(sum(one.bytes for one in found))}"


def _as_json(found: list[Garbage], dry_run: bool) -> dict[str, object]:
    items = [{"kind": one.kind, "name": one.name, "bytes": one.bytes, "why": one.why} for one in found]
    return {"dry_run": dry_run, "bytes": sum(one.bytes for one in found), "items": items}

"""The rules of the tree, as tests: who may import whom, and how large a file may grow."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("engines", "server", "distill_jobs")
ALLOWED = {"engines": {"engines"}, "server": {"server", "engines"}, "distill_jobs": {"distill_jobs", "engines"}}
COMPOSITION_ROOTS = {
    "server/cli.py",
    "server/embedded.py",
    "server/demo.py",
    "server/demo_report.py",
    "server/commands/processes.py",
    "server/commands/imports.py",
    "server/commands/gc.py",
}
TORCH_FREE = (
    "server.app",
    "server.gateway",
    "server.messages",
    "server.brokers.redis",
    "engines.manifest",
    "engines.registry.files",
    "distill_jobs.api",
    "distill_jobs.spec",
    "distill_jobs.jobs",
    "distill_jobs.queue",
    "distill_jobs.retention",
    "server.commands.gc",
    "server.cli",
)
MAX_LINES = 400


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_its_own_package_and_engines(path: Path) -> None:
    relative = path.relative_to(ROOT)
    if str(relative) in COMPOSITION_ROOTS:
        pytest.skip("a composition root may import both halves")
    ours = {name.split(".")[0] for name in imported(path)} & set(PACKAGES)
    assert ours <= ALLOWED[relative.parts[0]]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_holds_one_noun(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib"}
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    assert not [node for node in calls if node.attr == "load" and ast.unparse(node.value) == "torch"]


@pytest.mark.parametrize("package", PACKAGES)
def test_init_files_are_empty(package: str) -> None:
    assert [path for path in (ROOT / package).rglob("__init__.py") if path.read_text().strip()] == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_gateway_side_runs_without_torch(module: str) -> None:
    check = f"import {module}, sys; sys.exit(1 if 'torch' in sys.modules else 0)"
    done = subprocess.run(
        [sys.executable, "-c", check], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr or f"importing {module} imports torch"

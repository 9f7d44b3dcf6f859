"""`fewstep students calibrate`: another version of the same student, with what was measured of it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines import refine
from engines.artefact import import_diffusers, make_student
from engines.errors import InvalidRequest
from engines.parts import load_weights
from engines.refine import REDO
from engines.registry.files import FilesRegistry
from server.cli import app
from tests import tiny_sd


def test_a_judged_student_is_published_beside_the_one_it_was(tmp_path: Path) -> None:
    registry = FilesRegistry(str(tmp_path / "registry"))
    base = import_diffusers(tiny_sd.write(tmp_path / "p"), registry, name="tiny", schedules=tiny_sd.SCHEDULES)
    weights = load_weights(registry, registry.student(base).components["denoiser"])
    scaled = {name: value * 0.9 for name, value in weights.items()}
    version = make_student(registry, base, "fast", denoiser_weights=scaled, schedules=tiny_sd.SCHEDULES)
    registry.put_report(version, {"student": version, "gates": {"passed_steps": [1]}})
    registry.put_file(version, "samples.png", b"png")
    (tmp_path / "prompts.txt").write_text("\n".join(f"{k} circles" for k in range(20)))
    told = ["--prompts", str(tmp_path / "prompts.txt"), "--registry-url", str(tmp_path / "registry")]

    def ask(of: str, *more: str) -> str:
        done = CliRunner().invoke(app, ["students", "calibrate", of, *told, "--backend", "eager", *more])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.output

    output = ask(version, "--teacher-steps", "4")
    (made,) = set(registry.students("fast")) - {version}
    assert made in output
    report = registry.report(made) or {}
    assert (report["student"], report["gates"], report["judge"]["prompts"]) == (made, {"passed_steps": [1]}, 20)
    assert registry.read_file(made, "samples.png") == b"png"
    student = registry.student(made)
    assert student.judge is not None
    assert [step.by_teacher for step in refine.plan(student, registry.student(base), 1, None, REDO)] == [
        False,
        True,
        True,
    ]
    with pytest.raises(InvalidRequest, match="has no teacher"):
        ask(base)

"""What a job says of memory before it trains, beside what its trainer then needed: real processes, and a network whose
weights are a good part of it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from distill_jobs.exit_codes import FINISHED
from distill_jobs.launchers.base import Order, command
from distill_jobs.launchers.process import TrainerProcess
from distill_jobs.needs import Needs
from distill_jobs.plan import Plan
from engines.artefact import import_diffusers
from engines.registry.base import Registry
from tests import tiny_sd
from tests.distilling import prepared, spec

pytestmark = pytest.mark.timeout(300)
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "one network": ({"name": "kd", "pairs": 256, "batch": 2, "teacher_steps": 2}, "full"),
    "three networks": ({"name": "dmd", "batch": 2, "fake_updates": 1, "fake_warmup": 0}, "full"),
    "adapters": ({"name": "dmd", "batch": 2, "fake_updates": 1, "fake_warmup": 0}, {"lora": {"rank": 8}}),
}


def wide_teacher(registry: Registry, folder: Path) -> str:
    directory = tiny_sd.write(folder, channels=(32, 256))
    return import_diffusers(directory, registry, name="wide", schedules=tiny_sd.SCHEDULES, guidance=tiny_sd.GUIDANCE)


@pytest.mark.parametrize(("method", "train"), CASES.values(), ids=CASES)
def test_the_peak_of_memory_is_known_within_a_quarter_before_training_starts(
    method: dict[str, Any], train: Any, tmp_path: Path
) -> None:
    body = spec(
        method=method,
        student={"name": "wide", "steps": [1, 2], "train": train},
        train={"iterations": 8, "precision": "fp32"},
    )
    folder = prepared(tmp_path, body, wide_teacher)
    order = Order("wide", folder, "train", fence=1)
    process = TrainerProcess(command(order, parent=os.getpid()), order.log)
    try:
        assert process.wait(240) == FINISHED, order.log.read_text()
    finally:
        process.kill()

    estimated = Plan.of(json.loads((folder / "plan.json").read_bytes())).needs
    measured = Needs(**json.loads((folder / "trained" / "result.json").read_bytes())["measured"])
    assert estimated.memory_bytes == pytest.approx(measured.memory_bytes, rel=0.25)
    told = {event["event"]: event for event in map(json.loads, (folder / "events.jsonl").read_text().splitlines())}
    assert told["plan"].items() >= {"memory_bytes": estimated.memory_bytes, "total_steps": 8}.items()
    assert told["measured"]["memory_bytes"] == measured.memory_bytes

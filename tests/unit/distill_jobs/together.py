"""Several processes that train tiny students: started by tests as `python -m tests.unit.distill_jobs.together FOLDER`
under the environment that torchrun gives, each leaves in FOLDER what it saw."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from distill_jobs.group import Group
from distill_jobs.methods.base import Workspace
from distill_jobs.plan import Costs
from distill_jobs.progress import Hooks
from distill_jobs.quantised import quantise
from distill_jobs.stage import Execution, Stage, StageRun
from distill_jobs.terms.base import Wanted
from distill_jobs.timing import measure
from distill_jobs.trainer import Result, TrainConfig, Trainer
from tests.unit.distill_jobs.tiny import STAGES, blocks_student, tiny_source, tiny_student, tiny_teacher

ITERATIONS = 4
ENDS_WITHIN_S = 600.0  # a wait for an end: on two cores with eight others at work it takes minutes
GRID = "weights on a grid"
CASES: dict[str, Stage] = {
    "regression": Stage("kd", ITERATIONS, STAGES["kd"]),
    "critic": Stage("dmd", ITERATIONS, {**STAGES["dmd"], "fake_warmup": 2}),
    "both networks": Stage("sid", ITERATIONS, {**STAGES["sid"], "fake_warmup": 2}),
    "averaged target": Stage("lcm", ITERATIONS, STAGES["lcm"]),
    "discriminator": Stage("kd", ITERATIONS, STAGES["kd"], terms=(Wanted("adversarial"),)),
    "derivative": Stage("mean_flow", ITERATIONS, STAGES["mean_flow"]),
    "gradient through a derivative": Stage("esd", ITERATIONS, STAGES["esd"]),
    "derivative by the end": Stage("lsd", ITERATIONS, STAGES["lsd"]),
    "policy": Stage("pi_flow", ITERATIONS, STAGES["pi_flow"]),
    GRID: Stage("dmd", ITERATIONS, {**STAGES["dmd"], "fake_warmup": 2}),
}
CHAIN = [Stage("kd", 3, STAGES["kd"]), Stage("dmd", 5, {**STAGES["dmd"], "fake_warmup": 2})]


def trained(name: str, execution: Execution) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What each iteration of a case said, and all tensors at the end."""
    torch.manual_seed(17)
    stage, student = CASES[name], quantise(blocks_student(), 4) if name == GRID else tiny_student()
    run = StageRun(0, stage, tiny_teacher(), student, execution=execution)
    run.method.prepare(tiny_source(), Workspace(group=execution.group))
    seen = [run.iterate(tiny_source()) for _ in range(stage.iterations)]
    return seen, run.tensors()


@dataclass(frozen=True)
class Ended:
    """How a run ended, and what its leader told, by type."""

    result: Result
    events: list[str]


def chain(folder: Path, group: Group, *, stop_after: int | None = None) -> Ended:
    """A run of two stages in `folder`, which may be paused."""
    torch.manual_seed(17)
    events: list[str] = []
    asked = 0

    def note(event: dict[str, Any]) -> None:
        if event["type"] != "progress":  # the clock's
            events.append(event["type"])

    def poll() -> Any:
        nonlocal asked
        asked += 1
        return "pause" if stop_after is not None and asked > stop_after else None

    hooks = Hooks(
        poll=poll,
        event=note,
        evaluate=lambda iteration, student, schedules: {"fd": 1.0 / (1 + iteration)},
    )
    config = TrainConfig(seed=3, ema=(0.9,), checkpoint_every=2, checkpoint_every_s=1e9, eval_every=2)
    trainer = Trainer(
        CHAIN,
        tiny_teacher(),
        tiny_student(),
        tiny_source(),
        config,
        folder=folder,
        hooks=hooks if group.leads else Hooks(poll=poll),
        group=group,
    )
    return Ended(trainer.fit(), events)


def tried(folder: Path, group: Group) -> Costs:
    """What a stage with pairs costs."""
    return measure(
        CASES["regression"], tiny_teacher(), tiny_student(), tiny_source(), config=TrainConfig(), folder=folder,
        group=group,
    )  # fmt: skip


def start(size: int, folder: Path) -> None:
    """Runs this file in `size` processes and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.unit.distill_jobs.together", str(folder)]
    all_of_it = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        for process in all_of_it:
            _, said = process.communicate(timeout=ENDS_WITHIN_S)
            assert process.returncode == 0, said
    finally:
        for process in all_of_it:
            process.kill()
            process.communicate()


def main(folder: Path) -> None:
    joined = Group.join()
    (folder / f"total.{joined.rank}.json").write_text(json.dumps(joined.total(joined.rank + 1)))
    costs = tried(folder / "trial", joined)
    (folder / f"trial.{joined.rank}.json").write_text(json.dumps(costs.pair_bytes))
    for shards in (False, True):
        group = Group(joined.rank, joined.size, shards=shards)
        kept = folder / ("sharded" if shards else "whole")
        kept.mkdir(exist_ok=True)
        for name in CASES:
            seen, tensors = trained(name, Execution(group, micro_batch=2 if name == "critic" else None))
            if group.leads:
                save_file({key: value.contiguous() for key, value in tensors.items()}, kept / f"{name}.safetensors")
            (kept / f"{name}.{group.rank}.json").write_text(json.dumps(seen))
        ended = chain(kept / "chain", group)
        (kept / f"chain.{group.rank}.json").write_text(json.dumps([ended.result.state, ended.events]))
        if group.leads:
            weights = {key: value.contiguous() for key, value in ended.result.weights.items()}
            save_file(weights, kept / "chain.safetensors")
        assert chain(kept / "paused", group, stop_after=6).result.state == "paused"
    joined.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

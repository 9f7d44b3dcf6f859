"""The trainer's own process: `python -m distill_jobs.train JOB_FOLDER --phase prepare|train …`.

A process of its own, so that it can be killed, niced and given back whole; the service that started it needs only its
exit code and the files that it leaves in the job's folder. It dies with the service. SIGTERM means: finish this
step, checkpoint, go.

Under `torchrun --nproc_per_node=N` it is one of N that train together; of them the leader alone writes.
"""

import argparse
import contextlib
import copy
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill_jobs import preparation
from distill_jobs.batches import Source, WeightedSource
from distill_jobs.data import images, prompts
from distill_jobs.evaluate.sheet import sheet
from distill_jobs.events import EventLog
from distill_jobs.exit_codes import FAILURE, FINISHED, PAUSED, REFUSED
from distill_jobs.experts import FIRST, Experts, networks, weights_of
from distill_jobs.group import Group
from distill_jobs.lora import adapted, layers, merged, portable
from distill_jobs.losses import pairwise_distance
from distill_jobs.plan import Plan
from distill_jobs.preparation import SCHEDULE
from distill_jobs.progress import Hooks, Wish
from distill_jobs.quantised import on_grid, quantise
from distill_jobs.records import PLAN, TRAINER
from distill_jobs.small_evaluation import SmallEvaluation, learnt
from distill_jobs.spec import DistillJobSpec, inputs
from distill_jobs.teachers import diffusers
from distill_jobs.trainer import Result, TrainConfig, Trainer
from engines import priority, space, traceparent
from engines.denoiser import BaseDenoiser
from engines.errors import FewstepError
from engines.grid import SCALES
from engines.lifetime import die_with
from engines.registry.base import Registry, open_registry
from engines.slimming import Slimmed

log = logging.getLogger(__name__)

_PANEL_COLUMNS = 8
_TRAINED, _HALF = "trained", "weights.partial"


class TrainerRun:
    """One life of a job's trainer. What it is told stands in `spec.json` and `trainer.json` of the job's folder."""

    def __init__(self, folder: Path, fence: int, poll: Callable[[], Wish | None], group: Group) -> None:
        self._began_s = time.monotonic()
        told = json.loads((folder / TRAINER).read_bytes())
        self.folder, self.fence, self.poll, self.group = folder, fence, poll, group
        self.spec = spec_of(folder)
        registry = open_registry(told["registry"])
        self.teacher = diffusers.load(registry, told["teacher"])
        self.w = float(told["guidance"])
        self.prompts = self._source(registry, Path(told["work"]), Path(told["data"]) if told.get("data") else None)
        self.source: Source = self._forgetting(Path(told["work"]))
        self.guided = self.teacher.guided(self.w)
        if weights := self.spec.student.weights:
            self.source = WeightedSource(self.source, *weights, seed=self.spec.train.seed)
            self.guided = self.teacher.guide(self.w)
        if self.spec.student.lora is not None:
            layers(self.teacher.denoiser, self.spec.student.lora)  # a target that is none is refused before the work
        self._features = folder / told["features"] if told["features"] else None

    def prepare(self) -> bool:
        """Searches the schedule; one that is on disk already is kept. False: told to stop."""
        if (self.folder / SCHEDULE).exists():
            return True
        precision = preparation.precision(self.spec, self.guided, self.prompts)
        found = preparation.search(self.spec, self.guided, self.prompts, precision, lambda: self.poll() is None)
        if self.poll() is not None:
            return False
        preparation.write(self.folder / SCHEDULE, found | {"spent_s": time.monotonic() - self._began_s})
        return True

    def train(self) -> Result:
        plan = self._plan()
        student = self._beginner()
        trainer = Trainer(
            preparation.stages(plan.stages),
            self.guided,
            student,
            self.source,
            replace(self._config(plan.bf16), eval_every=plan.eval_every),
            folder=self.folder / "checkpoints",
            fence=self.fence,
            hooks=self._hooks(plan) if self.group.leads else Hooks(),
            group=self.group,
            decode=self.teacher.decode,
        )
        result = trainer.fit()
        if result.state == "finished" and self.group.leads:
            self._keep(result, plan, student)
        return result

    def _config(self, bf16: bool) -> TrainConfig:
        train, evals = self.spec.train, self.spec.eval
        return TrainConfig(
            seed=train.seed,
            ema=train.ema,
            bf16=bf16,
            checkpoint_every_s=train.checkpoint_every_s,
            checkpoint_every=train.checkpoint_every,
            best_by=evals.best_by,
            best_is_highest=evals.best_by != "fd",
            micro_batch=train.micro_batch,
            checkpointing=train.gradient_checkpointing,
        )

    def _source(self, registry: Registry, cache: Path, folders: Path | None) -> prompts.PromptSource:
        data, seed, manifest = self.spec.data, self.spec.train.seed, self.teacher.manifest
        if data.images is None:
            texts = prompts.texts(data.prompts, seed=seed, default=manifest.task)
            return prompts.encoded(self.teacher, texts, cache, seed=seed)
        found = images.captioned(data.images, folders, manifest.resolutions[0], seed=seed)
        if forgets := self.spec.student.forgets:
            found = images.relabelled(found, forgets)
        return images.encoded(self.teacher, registry, found, cache, seed=seed)

    def _forgetting(self, cache: Path) -> Source:
        """What networks are trained on: the prompts, with what the teacher is asked for in place of some."""
        forgets = self.spec.student.forgets
        return prompts.forgetting(self.teacher, self.prompts, forgets, cache) if forgets else self.prompts

    def _hooks(self, plan: Plan) -> Hooks:
        events = EventLog(self.folder, plan)
        return Hooks(self.poll, events, self._panel(events), self._evaluation)

    def _beginner(self) -> BaseDenoiser:
        """The student before its first update: all of its weights, or an adapter beside the teacher's."""
        asked = self.spec.student
        if asked.lora is not None:
            return adapted(self.teacher.denoiser, asked.lora)
        points = max(stage.points for stage in self.spec.stages)
        student = self.teacher.beginner(inputs(self.spec), self._slim(), points=points)
        if asked.experts is not None:
            return Experts([student, *(copy.deepcopy(student) for _ in asked.experts)], asked.experts)
        return student if asked.weight_bits is None else quantise(student, asked.weight_bits)

    def _slim(self) -> Slimmed | None:
        slim = self.spec.student.slim
        return None if slim is None else self.teacher.slimmed(slim.layers, slim.middle)

    def _plan(self) -> Plan:
        """What the budget buys. Measured once, when training begins: the schedule-only student is live by then, and
        what it serves costs the machine much less than what the teacher served."""
        # The leader alone looks: a network file system would remember of the others' machines that there was no plan.
        if not self.group.agree(self.group.leads and (self.folder / PLAN).exists()):
            found = json.loads((self.folder / SCHEDULE).read_bytes())
            plan = preparation.timed_plan(
                self.spec,
                self.guided,
                self._beginner,
                self.source,
                config=self._config(found["bf16"]),
                folder=self.folder / "trial",
                group=self.group,
                evaluate=self._evaluation if self.group.leads else None,
                spent_s=found["spent_s"] + time.monotonic() - self._began_s,
                decode=self.teacher.decode,
            )
            if self.group.leads:
                preparation.write(self.folder / PLAN, plan.as_dict())
                EventLog(self.folder, plan).write("plan", total_steps=plan.iterations, **asdict(plan.needs))
            self.group.meet()
        return Plan.of(json.loads((self.folder / PLAN).read_bytes()))

    @cached_property
    def _evaluation(self) -> SmallEvaluation:
        guidance = learnt(self.w, self.spec.student.weights)
        n, forgets = self.spec.eval.while_training, self.spec.student.forgets
        return SmallEvaluation(self.teacher, guidance, n, self._features, forgets)

    def _panel(self, events: EventLog) -> Callable[[int, Mapping[str, Tensor]], None]:
        captions = self.prompts.captions(0, _PANEL_COLUMNS)

        def draw(iteration: int, latents: Mapping[str, Tensor]) -> None:
            made = latents["gen"]
            events.keep |= {"sample_std": float(made.float().std()), "diversity": float(pairwise_distance(made))}
            name = f"{events.step(iteration):08d}.png"
            rows = [(who, self.teacher.pictures(drawn[:_PANEL_COLUMNS])) for who, drawn in latents.items()]
            (self.folder / "panels").mkdir(exist_ok=True)
            partial = self.folder / "panels" / f".{name}"
            partial.write_bytes(sheet(rows, captions))
            partial.replace(self.folder / "panels" / name)
            events.write("panel", name=f"panels/{name}", iteration=iteration)

        return draw

    def _keep(self, result: Result, plan: Plan, student: BaseDenoiser) -> None:
        """The student for the export: weights under the names of its blob, then what is said of them. Of a LoRA the
        adapter too, of weights on a grid its scales, of experts each one's weights."""
        folder, lora = self.folder / _TRAINED, self.spec.student.lora
        folder.mkdir(exist_ok=True)
        parts = weights_of(student, result.weights)
        weights = diffusers.blob_weights(parts.pop(FIRST))
        for name, part in parts.items():
            save_file(_whole(diffusers.blob_weights(part)), folder / f"{name}.safetensors")
        if self.spec.student.quantise is not None:
            made = on_grid(networks(student)[FIRST], result.weights)
            weights = diffusers.blob_weights(made.weights)
            save_file(diffusers.blob_weights(made.scales), folder / SCALES)
        if lora is not None:
            save_file(portable(weights, lora), folder / "adapter.safetensors")
            weights = merged(diffusers.blob_weights(self.teacher.denoiser.state_dict()), weights, lora)
        save_file(_whole(weights), folder / _HALF)
        (folder / _HALF).replace(folder / "weights.safetensors")
        slim = self._slim()
        said = {
            "config": None if slim is None else slim.config,
            "schedules": {str(k): schedule.model_dump(mode="json") for k, schedule in result.schedules.items()},
            "inputs": sorted(result.inputs),
            "stopped_early": result.stopped_early,
            "stage": result.stage,
            "iteration": result.iteration,
            "metrics": result.metrics,
            "threads": torch.get_num_threads(),
            "bf16": plan.bf16,
            "measured": asdict(result.needs),
        }
        EventLog(self.folder, plan).write("measured", **asdict(result.needs))
        preparation.write(folder / "result.json", said)


def _whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in weights.items()}


def spec_of(folder: Path) -> DistillJobSpec:
    return DistillJobSpec.model_validate(json.loads((folder / "spec.json").read_bytes())["spec"])


def log_format(folder: Path) -> str:
    """Lines name the trace of the request that submitted the job, where there is one."""
    trace = traceparent.trace_id(json.loads((folder / "spec.json").read_bytes()).get("traceparent"))
    return f"%(asctime)s %(levelname)s %(name)s {f'trace_id={trace} ' if trace else ''}%(message)s"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--phase", choices=("prepare", "train"), required=True)
    parser.add_argument("--fence", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--parent", type=int, default=0)
    args = parser.parse_args(argv)
    die_with(args.parent)  # a checkpoint is never older than its interval, and nobody would read more
    priority.lower(args.nice)
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format=log_format(args.folder))
    told: list[Wish] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append("pause"))
    group = Group.join(shards=spec_of(args.folder).train.shard)
    try:
        run = TrainerRun(args.folder, args.fence, lambda: told[0] if told else None, group)
        with _attention():
            if args.phase == "prepare":
                return FINISHED if run.prepare() else PAUSED
            return FINISHED if run.train().state == "finished" else PAUSED
    except Exception as error:
        said = _reason(error, args.folder)
        if said is None:
            raise
        if group.leads:
            (args.folder / _TRAINED / _HALF).unlink(missing_ok=True)  # the disk may be full of it
            preparation.write(args.folder / FAILURE, {"code": said.code, "message": said.message})
        log.exception("the trainer gives up")
        return REFUSED
    finally:
        group.leave()


def _reason(error: Exception, folder: Path) -> FewstepError | None:
    """What a trainer that gives up has to say; None if it just died."""
    if isinstance(error, FewstepError):
        return error
    return space.full(folder) if space.is_full(error, folder) else None


def _attention() -> contextlib.AbstractContextManager[None]:
    """On CPUs the backward of flash attention takes most of a small network's step; plain matrices are 1.7 × faster."""
    return contextlib.nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH)


if __name__ == "__main__":
    sys.exit(main())

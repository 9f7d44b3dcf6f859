"""One job from its claim to its end: prepare, train, export, evaluate, publish; each part found again after a death.

What a part made is written before the next begins, so a distiller that takes over does no part twice and asks only
what is missing. The state log is the only thing that says where the job stands to others.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from distill_jobs import preparation, promote
from distill_jobs.assessment import Assessor, TeacherAs, as_json
from distill_jobs.estimate import teacher_version
from distill_jobs.evaluate import networks
from distill_jobs.experts import FIRST
from distill_jobs.forgetting import unmeasured
from distill_jobs.gate import Verdict
from distill_jobs.jobs import DistillJob, JobState
from distill_jobs.judgement import judged
from distill_jobs.keeper import TrainerKeeper
from distill_jobs.launchers.base import Launcher
from distill_jobs.metrics import DistillMetrics
from distill_jobs.preparation import SCHEDULE
from distill_jobs.records import ANSWERS, RESULT, TRAINER, JobRecords, utc_now
from distill_jobs.settings import DistillerSettings
from distill_jobs.small_evaluation import learnt
from distill_jobs.spec import SCHEDULE_ENDING, DistillJobSpec, PublishSpec
from distill_jobs.watch import Watch
from engines import artefact
from engines.errors import InvalidRequest, JobFailed, NotBuilt, SwapRejected
from engines.grid import SCALES, Grid
from engines.manifest import Guidance, Schedule

_ORDER = [
    JobState.QUEUED,
    JobState.PREPARING,
    JobState.RUNNING,
    JobState.EXPORTING,
    JobState.EVALUATING,
    JobState.PUBLISHING,
    JobState.SUCCEEDED,
]
_LOOK_S = 0.1
_MOST_CLAIMS = 6


@dataclass(frozen=True)
class Surroundings:
    """What a run needs of its service."""

    records: JobRecords
    settings: DistillerSettings
    metrics: DistillMetrics
    announce: Callable[[str], None]
    assessor: Callable[[Callable[[], None]], Assessor]
    launcher: Launcher


class JobRun:
    """The work on one claimed job."""

    def __init__(self, job: DistillJob, around: Surroundings, watch: Watch) -> None:
        self.job, self.around, self.watch = job, around, watch
        self.fence = job.fence
        self.records, self.registry = around.records, around.records.registry
        self.spec = DistillJobSpec.model_validate(job.spec)
        self.result = self.records.read(job.id, RESULT) or {}
        folder = self.registry.job_path(job.id)
        if folder is None:
            raise NotBuilt("training needs a registry in a local or shared folder: give DISTILLER_REGISTRY_URL one")
        self.folder: Path = folder
        self.assessor = around.assessor(watch.check)
        self.keeper = TrainerKeeper(
            job.id,
            folder,
            job.fence,
            records=around.records,
            settings=around.settings,
            metrics=around.metrics,
            check=watch.check,
            launcher=around.launcher,
            processes=self.spec.train.processes,
        )

    def go(self) -> None:
        """Takes the job from where it stands to its end.

        Raises:
            Interrupted, LeaseLost: the work ends here, the job does not.
            FewstepError: the job failed.
        """
        self.around.metrics.entered(self.job.id, self.job.state, time.time())
        self._refuse_poison()
        self._refuse_crowds()
        preparation.check(self.spec)
        self._refuse_unknown_networks()
        if "schedule" not in self.result:
            self._enter(JobState.PREPARING)
            self._refuse_unmeasured_concepts()
            self._prepare()
        self._enter(JobState.RUNNING)
        if self.spec.trains:
            self._train()
        self._enter(JobState.EXPORTING)
        if "student" not in self.result:
            self._note(student=self._export())
        self._enter(JobState.EVALUATING)
        if "gates" not in self.result:
            self._note(**self._evaluated(self.result["student"], self.spec.publish))
        self._enter(JobState.PUBLISHING)
        self._publish(self.result["student"], self.result["gates"])
        self._enter(JobState.SUCCEEDED)

    def _refuse_crowds(self) -> None:
        asked, most = self.spec.train.processes, self.around.settings.max_processes
        if asked > most:
            message = f"train.processes={asked} is more than this distiller starts, {most} (DISTILLER_MAX_PROCESSES)"
            raise InvalidRequest(message, param="train.processes")

    def _refuse_unknown_networks(self) -> None:
        for name in self.spec.eval.networks:
            networks.folder_of(name, self.around.settings.data_dir)

    def _refuse_unmeasured_concepts(self) -> None:
        """No student could pass a gate for what nobody measures; without that gate the job says so and goes on."""
        forgets = self.spec.student.forgets
        if not forgets or (said := unmeasured(forgets, self._teacher().task.words)) is None:
            return
        if self.spec.gates.alignment_forgotten is not None:
            message = f"student.forget: {said}; or set gates.alignment_forgotten to null, and it is not judged"
            raise InvalidRequest(message, param="student.forget")
        self.records.event(self.job.id, "note", message=f"student.forget: {said}")

    # parts -------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Teacher's answers and schedule; then the student without new weights, judged and promoted."""
        teacher = self._teacher()
        answers = self.assessor.features_file(teacher, self.spec.eval.samples)
        self.registry.write_job_file(self.job.id, ANSWERS, answers.read_bytes())  # the trainer may run elsewhere
        told = {
            "registry": self.around.settings.registry_url,
            "work": str(self.around.settings.work_dir.resolve()),
            "teacher": teacher.version,
            "guidance": teacher.guidance,
            "features": ANSWERS,
            "data": str(self.around.settings.data_dir.resolve()) if self.around.settings.data_dir else None,
        }
        preparation.write(self.folder / TRAINER, told)
        self.keeper.run("prepare", lambda: (self.folder / SCHEDULE).exists())
        found = preparation.schedules(json.loads((self.folder / SCHEDULE).read_bytes()))
        version = artefact.make_student(
            self.registry,
            teacher.version,
            f"{self.spec.student.name}{SCHEDULE_ENDING}" if self.spec.trains else self.spec.student.name,
            schedules=found,
            guidance=self._cfg(teacher),
        )
        judged = self._evaluated(version, self.spec.publish)
        try:
            if not self.spec.student.forget:  # its teacher's weights draw what is to be forgotten
                self._publish(version, judged["gates"])
        except SwapRejected as error:
            self.records.event(self.job.id, "note", message=f"the schedule-only student stays unpublished: {error}")
        self._note(schedule_student=version, schedule=judged, teacher_at=self._teacher_at(teacher))

    def _train(self) -> None:
        self.keeper.run("train", lambda: (self.folder / "trained" / "result.json").exists())
        if "measured" not in self.result:
            self._note(measured=self._trained().get("measured"))  # None where an earlier release trained it

    def _export(self) -> str:
        if not self.spec.trains:
            return str(self.result["schedule_student"])
        said = self._trained()
        teacher, trained = self._teacher(), self.folder / "trained"
        adapter, bits = trained / "adapter.safetensors", self.spec.student.weight_bits
        return artefact.make_student(
            self.registry,
            teacher.version,
            self.spec.student.name,
            denoiser_weights=load_file(trained / "weights.safetensors"),
            experts={path.stem: load_file(path) for path in trained.glob(f"{FIRST}_*.safetensors")},
            adapter=load_file(adapter) if adapter.exists() else None,
            denoiser_config=said.get("config"),
            grid=None if bits is None else Grid(bits, load_file(trained / SCALES)),
            points=max(stage.points for stage in self.spec.stages),
            schedules={int(k): Schedule.model_validate(value) for k, value in said["schedules"].items()},
            guidance=learnt(teacher.guidance, self.spec.student.weights),
            inputs=said["inputs"],
        )

    def _evaluated(self, version: str, publish: PublishSpec | None) -> dict[str, Any]:
        """Metrics and verdict of a version; its report and its samples are put beside it."""
        teacher, student, evals = self._teacher(), self.spec.student, self.spec.eval
        figures, verdict = judged(
            self.assessor,
            version,
            teacher,
            student.steps,
            evals.samples,
            self.spec.gates,
            forgets=student.forgets,
            forgetting=student.forget is not None,
            networks=evals.networks,
            tiers=publish.tiers if publish else {},
        )
        figures["teacher"]["at"] = self.result.get("teacher_at", {})
        self.around.metrics.judged(self.job.id, figures)
        self._report(version, teacher, figures, verdict)
        return figures

    def _teacher_at(self, teacher: TeacherAs) -> dict[str, Any]:
        """The guided teacher at the student's counts: what the student has to beat."""
        student, evals = self.spec.student, self.spec.eval
        found = self.assessor.teacher_at(teacher, evals.samples, student.steps, student.forgets, evals.networks)
        speeds = self.assessor.speeds(teacher.version, teacher, list(found), guidance=teacher.guidance)
        return {str(k): as_json(m, speeds[str(k)]) for k, m in found.items()}

    def _publish(self, version: str, gates: Mapping[str, Any]) -> None:
        """Proposes the tiers that passed and waits until they are live."""
        publish = self.spec.publish
        if publish is None or publish.when == "never":
            return
        counts = self.spec.student.steps if publish.when == "always" else gates["passed_steps"]
        tiers = {tier: steps for tier, steps in publish.tiers.items() if steps in counts}
        if not tiers or promote.is_live(self.registry.current(publish.deployment), version, tiers):
            return
        self._still_ours()
        outcome = promote.promote(
            self.registry,
            publish.deployment,
            version,
            tiers,
            list(counts),
            note=f"job {self.job.id}",
            traceparent=self.job.traceparent,
            announce=self.around.announce,
            pause=lambda: self.watch.pause(_LOOK_S),
            timeout_s=self.around.settings.swap_timeout_s,
        )
        self.records.event(
            self.job.id,
            "swap",
            student=version,
            tiers=tiers,
            deployment=publish.deployment,
            swap_id=outcome.swap_id,
            revision=outcome.revision,
            phases=outcome.phases,
        )

    def _refuse_poison(self) -> None:
        """A state in which owner after owner ended is what ends them. Training counts its own deaths."""
        reached = max(entry.number for entry in self.job.log if not entry.claim)
        claims = sum(entry.number > reached for entry in self.job.log)
        if claims > _MOST_CLAIMS and self.job.state is not JobState.RUNNING:
            raise JobFailed(f"{claims - 1} distillers ended while the job was {self.job.state}; see their logs")

    # records -------------------------------------------------------------------------------------------------------

    def _enter(self, state: JobState) -> None:
        if _ORDER.index(self.job.state) >= _ORDER.index(state):
            return
        self.watch.check()
        self.job = self.records.move(self.job.id, state, fence=self.fence)
        self.around.metrics.entered(self.job.id, state, time.time())

    def _note(self, **made: Any) -> None:
        self._still_ours()
        self.result |= made
        self.records.write(self.job.id, RESULT, self.result)

    def _still_ours(self) -> None:
        self.watch.check()
        self.records.check_fence(self.job.id, self.fence)

    def _report(self, version: str, teacher: TeacherAs, figures: Mapping[str, Any], verdict: Verdict) -> None:
        for result in verdict.results:
            self.records.event(
                self.job.id,
                "gate",
                student=version,
                rule=result.rule,
                steps=result.steps,
                value=result.value,
                limit=result.limit,
                passed=result.passed,
            )
        choice = self.assessor.choice
        report = {
            **figures,
            "job": self.job.id,
            "student": version,
            "teacher_as": {"version": teacher.version, "steps": teacher.steps, "guidance": teacher.guidance},
            "engine": {"backend": choice.backend, "precision": choice.precision},
            "training": self._trained() if (self.folder / "trained" / "result.json").exists() else None,
            "created_at": utc_now(),
        }
        self.registry.put_report(version, report)
        sheet = self.assessor.sheet(version, teacher, self.spec.student.steps)
        self.registry.put_file(version, "samples.png", sheet)
        self.registry.write_job_file(self.job.id, "samples.png", sheet)

    def _trained(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads((self.folder / "trained" / "result.json").read_bytes())
        return said

    def _teacher(self) -> TeacherAs:
        told = self.records.read(self.job.id, TRAINER)  # a deployment may have moved on since the job began
        version = told["teacher"] if told else teacher_version(self.spec, self.registry)
        asked = self.spec.teacher
        return TeacherAs.of(self.registry.student(version), steps=asked.steps, guidance=asked.guidance)

    def _cfg(self, teacher: TeacherAs) -> Guidance:
        """The teacher's own guidance with the job's weight as its default."""
        own = self.registry.student(teacher.version).guidance
        return own.model_copy(update={"default": teacher.guidance})

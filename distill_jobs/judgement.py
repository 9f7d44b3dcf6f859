"""What a report says of a version: its figures beside its teacher's, and the gate's verdict on each step count."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill_jobs.assessment import Assessor, Forgets, TeacherAs, as_json
from distill_jobs.gate import Verdict, judge
from distill_jobs.spec import GateSpec


def judged(
    assessor: Assessor,
    version: str,
    teacher: TeacherAs,
    counts: Sequence[int],
    n: int,
    gates: GateSpec,
    *,
    forgets: Forgets = (),
    forgetting: bool = False,
    networks: tuple[str, ...] = (),
    tiers: Mapping[str, int] | None = None,
) -> tuple[dict[str, Any], Verdict]:
    """`metrics` by step count, `teacher` and `gates` of a version that was asked n times at each of `counts`."""
    reference = assessor.reference(teacher, n, forgets, networks)
    metrics = assessor.metrics(version, n, reference, counts)
    speeds = assessor.speeds(version, teacher, counts)
    latency_ms = {k: speeds[str(k)].latency_ms_p50 for k in counts}
    verdict = judge(gates, metrics, latency_ms, forgets=forgetting)
    figures = {
        "metrics": {str(k): as_json(m, speeds[str(k)]) for k, m in metrics.items()},
        "teacher": as_json(assessor.teacher_metrics(n, reference), speeds["teacher"]),
        "gates": verdict.as_dict(tiers or {}),
    }
    return figures, verdict

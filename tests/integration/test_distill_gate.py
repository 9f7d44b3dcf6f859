"""Bad students go through the whole service as artefacts and are refused; the one before them keeps serving."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill_jobs.assessment import Assessor, TeacherAs, chosen
from distill_jobs.small_evaluation import baked
from distill_jobs.tasks.shapes import TASK
from distill_jobs.teachers import publish
from engines import artefact
from engines.parts import load_weights
from engines.registry.base import Registry
from tests.distilling import Workshop, plant, workshop
from tests.redis_server import RedisServer

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (TASK.pipeline / "model_index.json").exists(), reason="no embedded teacher yet"),
]

N, TEACHER_STEPS, STEPS, GUIDANCE = 64, 8, 4, 2.0
DEPLOYMENT = "shapes"
SCHEDULES = {STEPS: publish.uniform(STEPS)}
OTHERS = {"alignment_ratio": None, "diversity_ratio": None, "grain_ratio": None}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer().start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def shop(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    def deploy(registry: Registry, folder: Path) -> str:
        return publish.publish(registry, DEPLOYMENT)

    return workshop(tmp_path_factory.mktemp("shop"), server.url, deploy)


@pytest.fixture(scope="module")
def own(shop: Workshop) -> dict[str, Tensor]:
    """The teacher's weights."""
    teacher = shop.registry.student(shop.registry.students(TASK.teacher.name)[0])
    return {name: value.float() for name, value in load_weights(shop.registry, teacher.components["denoiser"]).items()}


def noised(weights: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) of the weights, and `share` of noise as large as each tensor."""
    torch.manual_seed(0)
    return {
        name: (1 - share) * value + share * value.std(correction=0) * torch.randn_like(value)
        for name, value in weights.items()
    }


def fd_ratio(shop: Workshop, weights: dict[str, Tensor]) -> float:
    """What the gate will measure of these weights."""
    teacher = shop.registry.students(TASK.teacher.name)[0]
    version = artefact.make_student(
        shop.registry, teacher, "probe", denoiser_weights=weights, schedules=SCHEDULES, guidance=baked(GUIDANCE)
    )
    work = shop.settings.work_dir
    choice = chosen(shop.settings.backend, shop.settings.precision)
    assessor = Assessor(shop.registry, choice=choice, cache=work / "engines", answers=work / "answers")
    asked = TeacherAs.of(shop.registry.student(teacher), steps=TEACHER_STEPS, guidance=GUIDANCE)
    seen = assessor.metrics(version, N, assessor.reference(asked, N), [STEPS])[STEPS].fd_ratio
    assert seen is not None
    return seen


def judged(
    shop: Workshop,
    weights: dict[str, Tensor],
    name: str,
    limit: float,
    others: dict[str, None],
    *,
    prepared_as: str | None = None,
) -> tuple[list[str], str]:
    """The rules that a student of these weights breaks, after the whole service has dealt with it, and its job."""
    before = shop.registry.history(DEPLOYMENT)
    job = shop.submit(
        teacher={"id": DEPLOYMENT, "steps": TEACHER_STEPS, "guidance": GUIDANCE},
        student={"name": name, "steps": [STEPS]},
        eval={"samples": N},
        publish={"deployment": DEPLOYMENT, "tiers": {"medium": STEPS}},
        gates={"fd_ratio": limit, **others},
    )
    plant(shop, job.id, weights, SCHEDULES, prepared_as)
    with shop.workers(DEPLOYMENT), shop.distiller():
        shop.await_state(job.id, "succeeded", within_s=600)
    result = shop.records.read(job.id, "result.json") or {}
    broken = [rule["rule"] for rule in result["gates"]["results"] if not rule["passed"]]
    current = shop.registry.current(DEPLOYMENT)
    assert current is not None
    live = "medium" in current.tiers and current.tiers["medium"].student == result["student"]
    assert live is (broken == [])
    assert broken == [] or shop.registry.report(result["student"]) is not None  # kept with its report
    assert len(shop.registry.history(DEPLOYMENT)) >= len(before)
    return broken, job.id


def test_noise_weights_are_refused(shop: Workshop, own: dict[str, Tensor]) -> None:
    broken, _ = judged(shop, noised(own, 1.0), "noise", 1.3, {})
    assert "fd_ratio" in broken


def test_a_student_a_little_beyond_the_limit_is_refused_and_one_within_it_is_not(
    shop: Workshop, own: dict[str, Tensor]
) -> None:
    weights = noised(own, 0.1)
    measured = fd_ratio(shop, weights)
    broken, job_id = judged(shop, weights, "beyond", measured / 1.02, OTHERS)
    assert broken == ["fd_ratio"]
    broken, _ = judged(shop, weights, "within", measured * 1.02, OTHERS, prepared_as=job_id)
    assert broken == []

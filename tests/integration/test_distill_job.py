"""Whole jobs through the real service: a real trainer process, real files, a real Redis, a tiny teacher."""

import io
import json
from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from distill_jobs.experts import Experts, networks
from distill_jobs.teachers import diffusers
from distill_jobs.teachers.publish import uniform
from engines import solvers
from engines.grid import SCALES, Grid
from engines.loader import load_student
from engines.manifest import Guidance, shown
from engines.noise import noise
from engines.parts import load_weights
from engines.student import sample
from tests.distilling import DEPLOYMENT, LENIENT, SEARCH, Workshop, plant, workshop
from tests.eventually import eventually
from tests.redis_server import RedisServer

pytestmark = pytest.mark.timeout(600)

UNIFORM = {steps: uniform(steps) for steps in (1, 2)}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer().start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def shop(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """One for all tests here: the teacher's answers are asked once."""
    return workshop(tmp_path_factory.mktemp("shop"), server.url)


def teachers_weights(shop: Workshop) -> dict[str, Tensor]:
    """For jobs of which only what follows training is looked at."""
    teacher = shop.registry.student(shop.registry.students("tiny-teacher")[0])
    return {name: value.float() for name, value in load_weights(shop.registry, teacher.components["denoiser"]).items()}


def test_a_job_becomes_a_student_behind_its_deployment(shop: Workshop) -> None:
    job = shop.submit()
    with shop.workers(), shop.distiller():
        shop.await_state(job.id, "succeeded")

    states = [event["status"] for event in shop.events(job.id, "status")]
    assert states == [
        "queued", "preparing", "running", "exporting", "evaluating", "publishing", "succeeded",
    ]  # fmt: skip
    result = shop.records.read(job.id, "result.json")
    assert result is not None
    current = shop.registry.current(DEPLOYMENT)
    assert current is not None
    assert {tier: (t.student, t.steps) for tier, t in current.tiers.items() if tier != "high"} == {
        "low": (result["student"], 1),
        "medium": (result["student"], 2),
    }
    assert current.default_tier == "medium"

    # The student without new weights was live first.
    first, second = (shop.registry.revision(DEPLOYMENT, number) for number in (2, 3))
    assert first.tiers["low"].student == result["schedule_student"]
    assert second.tiers["low"].student == result["student"]

    # It carries how it is to be sampled, and its report says how it was judged.
    manifest = shop.registry.student(result["student"])
    assert (manifest.kind, manifest.guidance.mode, sorted(manifest.schedules)) == ("full", "baked", [1, 2])
    assert all(step.w is None for step in manifest.plan(2))
    report = shop.registry.report(result["student"])
    assert report is not None
    assert report["gates"]["passed_steps"] == [1, 2]
    assert report["metrics"]["1"].keys() >= {"fd", "fd_ratio", "alignment", "diversity", "grain", "latency_ms_p50"}
    assert "@" in shown(report["teacher_as"]["version"])

    # Its report is a file beside them, written when it had ended.
    page = eventually(lambda: shop.registry.read_job_file(job.id, "report.html"), 10)
    assert b"passed at 1, 2 steps" in page

    # It showed its pictures and its progress on the way.
    panels = [name for name in shop.registry.job_files(job.id) if name.startswith("panels/")]
    assert panels
    for name in (panels[-1], "samples.png"):
        assert Image.open(io.BytesIO(shop.registry.read_job_file(job.id, name) or b"")).width > 100
    progress = shop.events(job.id, "progress")[-1]
    assert (progress["step"], progress["total_steps"]) == (12, 12)
    assert progress["losses"].keys() == {"student"}
    assert [event["step"] for event in shop.events(job.id, "metric")] == [6, 12]


def test_a_flow_map_is_served_by_a_graph_with_a_second_time(shop: Workshop) -> None:
    method = {"name": "lsd", "generate": 64, "batch": 8, "teacher_steps": 4}
    job = shop.submit(method=method, student={"name": "tiny-map", "steps": [1, 2]})
    with shop.workers(), shop.distiller():
        shop.await_state(job.id, "succeeded")

    result = shop.records.read(job.id, "result.json") or {}
    manifest = shop.registry.student(result["student"])
    assert (manifest.inputs, manifest.guidance.mode) == ({"s"}, "baked")
    current = shop.registry.current(DEPLOYMENT)
    assert current is not None
    assert current.tiers["low"].student == result["student"]


def test_a_student_that_reads_its_guidance_weight_serves_all_of_its_range(shop: Workshop) -> None:
    method = {"name": "lcm", "generate": 64, "batch": 8, "teacher_steps": 4}
    student = {"name": "tiny-weighted", "steps": [1, 2], "guidance": {"embedded": [1.0, 4.0]}}
    job = shop.submit(method=method, student=student, schedule={"name": "optimal_steps"})
    with shop.workers(), shop.distiller():
        shop.await_state(job.id, "succeeded")

    result = shop.records.read(job.id, "result.json") or {}
    manifest = shop.registry.student(result["student"])
    assert manifest.inputs == {"w"}
    assert manifest.guidance == Guidance(mode="embedded", default=2.0, minimum=1.0, maximum=4.0)
    current = shop.registry.current(DEPLOYMENT)
    assert current is not None
    assert current.tiers["low"].student == result["student"]

    loaded = load_student(shop.registry, manifest)
    least, own, same, most = (
        sample(loaded, ["a red circle"], [1], 2, guidance=w, rounded=False) for w in (1.0, None, 2.0, 4.0)
    )
    assert torch.equal(own, same)
    assert (least - most).abs().max() > 0.01  # levels, after a dozen updates


def test_a_student_forgets_and_nothing_that_knows_the_concept_goes_live(shop: Workshop) -> None:
    student = {"name": "tiny-forgets", "steps": [1, 2], "forget": [{"concept": "red", "instead": "blue"}]}
    job = shop.submit(student=student, gates={**LENIENT, "alignment_forgotten": 1.0})
    with shop.workers(), shop.distiller():
        shop.await_state(job.id, "succeeded")

    result = shop.records.read(job.id, "result.json") or {}
    assert [event["student"] for event in shop.events(job.id, "swap")] == [result["student"]]
    rules = {one["rule"] for one in result["gates"]["results"]}
    assert rules == {"fd_ratio", "alignment_forgotten"}
    for figures in (result["teacher"], *result["metrics"].values(), *result["teacher_at"].values()):
        assert 0 <= figures["alignment_forgotten"] <= 1
        assert figures["n"] < 16  # the other prompts
    assert "alignment_forgotten@1" in shop.events(job.id, "metric")[-1]["metrics"]


def test_a_student_without_the_middle_of_its_teacher_is_served_on_its_own_graph(shop: Workshop) -> None:
    slim = {"name": "slimming", "share": 0.5, "generate": 64, "batch": 8, "teacher_steps": 4}
    few = {"name": "kd", "share": 0.5, "pairs": 64, "batch": 8, "teacher_steps": 4}
    job = shop.submit(method=[slim, few], student={"name": "tiny-slim", "steps": [1, 2], "slim": {"middle": False}})
    with shop.workers(), shop.distiller():
        shop.await_state(job.id, "succeeded")

    result = shop.records.read(job.id, "result.json") or {}
    student, teacher = (shop.registry.student(result[name]) for name in ("student", "schedule_student"))
    sizes = [shop.registry.blob_path(m.components["denoiser"].weights).stat().st_size for m in (student, teacher)]
    assert sizes[0] < 0.7 * sizes[1] / (1 if teacher.dtype == student.dtype else 2)
    config = json.loads(shop.registry.read_blob(student.components["denoiser"].files["config.json"]))
    assert config["mid_block_type"] is None
    current = shop.registry.current(DEPLOYMENT)
    assert current is not None
    assert current.tiers["low"].student == result["student"]


def test_weights_that_were_trained_on_a_grid_are_stored_on_it(shop: Workshop) -> None:
    job = shop.submit(student={"name": "tiny-grid", "steps": [1, 2], "quantise": "int4"})
    with shop.workers(), shop.distiller():
        shop.await_state(job.id, "succeeded")

    result = shop.records.read(job.id, "result.json") or {}
    manifest = shop.registry.student(result["student"])
    part = manifest.components["denoiser"]
    scales = load(shop.registry.read_blob(part.files[SCALES]))
    assert (manifest.weight_bits, manifest.dtype, len(scales) > 10) == (4, "fp16", True)
    Grid(4, scales).check(load_weights(shop.registry, part))


def test_a_policy_is_served_by_a_graph_of_several_predictions(shop: Workshop) -> None:
    method = {"name": "pi_flow", "batch": 8, "points": 4}
    job = shop.submit(method=method, student={"name": "tiny-policy", "steps": [1, 2]})
    with shop.workers(), shop.distiller():
        shop.await_state(job.id, "succeeded")

    result = shop.records.read(job.id, "result.json") or {}
    manifest = shop.registry.student(result["student"])
    assert (manifest.points, manifest.inputs, manifest.solver_for(1)) == (4, {"s"}, "dx")
    current = shop.registry.current(DEPLOYMENT)
    assert current is not None
    assert current.tiers["low"].student == result["student"]


def test_a_student_of_two_experts_serves_what_its_trainer_samples(shop: Workshop) -> None:
    method = {"name": "phased_dmd", "batch": 8, "fake_warmup": 2, "fake_updates": 1, "lr": 1e-2}
    publish = {"deployment": DEPLOYMENT, "tiers": {"medium": 3}}
    student = {"name": "tiny-experts", "steps": [2, 3], "experts": [0.5]}
    job = shop.submit(method=method, publish=publish, student=student, schedule={"name": "optimal_steps"})
    with shop.workers(), shop.distiller():
        shop.await_state(job.id, "succeeded")

    result = shop.records.read(job.id, "result.json") or {}
    manifest = shop.registry.student(result["student"])
    assert [step.net for step in manifest.plan(3)] == ["denoiser", "denoiser", "denoiser_2"]
    current = shop.registry.current(DEPLOYMENT)
    assert current is not None
    assert current.tiers["medium"].student == result["student"]

    teacher = diffusers.load(shop.registry, manifest.base or "")
    learnt = Experts([teacher.beginner(frozenset()) for _ in range(2)], (0.5,))
    began = teacher.denoiser.state_dict()
    for name, network in networks(learnt).items():
        weights = load_weights(shop.registry, manifest.components[name])
        assert any((value - began[f"net.{key}"]).abs().max() > 1e-3 for key, value in weights.items())
        network.load_state_dict({f"net.{key}": value for key, value in weights.items()})
    schedule, shape = manifest.schedules[3], teacher.shape
    with torch.no_grad():
        latents = solvers.sample(
            learnt,
            noise(7, 0, shape)[None],
            schedule.times,
            teacher.encode(["a red circle"]),
            schedule.eta,
            draw=lambda i: noise(7, i + 1, shape)[None],
        )
        expected = torch.from_numpy(teacher.pictures(latents))
    served = sample(load_student(shop.registry, manifest), ["a red circle"], [7], 3, rounded=False)
    assert (served - expected).abs().max() < 0.1  # of 255 levels


def test_a_missed_gate_publishes_nothing_and_is_no_failure(shop: Workshop) -> None:
    before = shop.registry.history(DEPLOYMENT)
    job = shop.submit(gates=LENIENT | {"fd_ratio": 1e-6}, student={"name": "missed", "steps": [1, 2]})
    plant(shop, job.id, teachers_weights(shop), UNIFORM)
    with shop.workers(), shop.distiller():
        shop.await_state(job.id, "succeeded")

    gates = (shop.records.read(job.id, "result.json") or {})["gates"]
    assert (gates["passed"], gates["passed_steps"]) == (False, [])
    assert {(r["rule"], r["steps"], r["passed"]) for r in gates["results"]} == {
        ("fd_ratio", 1, False), ("fd_ratio", 2, False),
    }  # fmt: skip
    assert shop.registry.history(DEPLOYMENT) == before
    assert shop.registry.report(shop.registry.students("missed")[0]) is not None


def test_a_student_that_no_worker_takes_fails_its_job(shop: Workshop) -> None:
    job = shop.submit(student={"name": "refused", "steps": [1, 2]})
    plant(shop, job.id, teachers_weights(shop), UNIFORM)
    with shop.workers(refuse="the golden samples differ"), shop.distiller():
        shop.await_state(job.id, "failed")

    error = shop.records.get(job.id).log[-1].error
    assert error is not None
    assert error["code"] == "swap_rejected"
    assert "golden samples" in error["message"]
    assert "unpublished" in shop.events(job.id, "note")[0]["message"]


def test_a_search_alone_makes_a_student_without_training(shop: Workshop) -> None:
    job = shop.submit(method=SEARCH, schedule=None, publish=None, student={"name": "searched", "steps": [1, 2]})
    with shop.distiller():
        shop.await_state(job.id, "succeeded")
    student = (shop.records.read(job.id, "result.json") or {})["student"]
    assert shop.registry.student(student).kind == "schedule"


def test_a_job_takes_the_best_of_the_searches_that_it_names(shop: Workshop) -> None:
    searches = [SEARCH, {"name": "fitted_solver", "batch": 4, "reference_steps": 4}]
    job = shop.submit(schedule=searches, publish=None, student={"name": "compared", "steps": [2]})
    with shop.distiller():
        shop.await_state(job.id, "succeeded")
    found = shop.records.read(job.id, "schedule.json") or {}
    assert found["distances"]["2"].keys() == {"optimal_steps", "fitted_solver"}
    assert found["distance"]["2"] == min(found["distances"]["2"].values())
    student = shop.registry.student((shop.records.read(job.id, "result.json") or {})["schedule_student"])
    assert (student.schedules[2].coefficients is not None) == (found["search"]["2"] == "fitted_solver")


def test_pause_resume_and_cancel_take_effect_while_training(shop: Workshop) -> None:
    long = {"iterations": 100_000, "precision": "fp32", "checkpoint_every": 5}
    job = shop.submit(train=long, publish=None, student={"name": "paused", "steps": [1]}, gates=LENIENT)
    with shop.distiller():
        eventually(lambda: shop.events(job.id, "checkpoint"), 300)

        shop.queue.command(job.id, "pause")
        shop.await_state(job.id, "paused")
        saved = shop.events(job.id, "checkpoint")[-1]["step"]
        assert shop.queue.claim("another") is None

        shop.queue.command(job.id, "resume")
        eventually(lambda: shop.events(job.id, "checkpoint")[-1]["step"] > saved, 300)
        seen = [event["step"] for event in shop.events(job.id, "checkpoint") if not event.get("best")]
        assert seen == sorted(set(seen)) or seen.count(saved) <= 2  # it went on from where it was, not from the start

        shop.queue.command(job.id, "cancel")
        shop.await_state(job.id, "canceled")
    assert not [name for name in shop.registry.job_files(job.id) if name.startswith("trained/")]

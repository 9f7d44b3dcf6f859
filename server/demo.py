"""`fewstep demo`: the whole loop in front of your eyes, measured, and nothing left running.

Teacher over HTTP, a job with its progress, a steady stream of requests while the schedule-only and then the trained
student go live under it, the same captions at 4, 2 and 1 steps, one table, one line on the swap.
"""

import io
import json
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill_jobs import spec
from distill_jobs.evaluate.sheet import sheet
from distill_jobs.teachers.shapes.data import scenes
from server.client import Client
from server.commands.follow import follow
from server.commands.stack import hints
from server.commands.terminal import err, out
from server.demo_report import Report, Speed, swap_line, table
from server.embedded import Stack, StackOptions
from server.stream import Stream

MODEL = "shapes"
RATE_PER_S = 2.0
AFTER_LIVE_S = 10.0
LEAST_REQUESTS = 200
EXIT_GATE, EXIT_JOB, EXIT_FAILED_REQUESTS = 3, 4, 5
_CAPTIONS, _LATENCIES, _PARALLEL, _THROUGHPUT_S = 8, 30, 8, 4.0
Json = dict[str, Any]


def run(folder: Path, *, port: int, stay: bool) -> int:
    """Shows everything and writes `report.json` and `sheet.png` to `folder`; the process' exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    out.print("Starting Redis, gateway, worker and distiller …")
    with Stack(StackOptions(data=data, port=port, metrics_port=9101)) as stack:
        worker = Client(f"http://127.0.0.1:{stack.metrics_ports['worker-0']}")
        code = _show(Client(stack.url), worker, folder)
        _next(stack, folder, stay=stay)
        if stay:
            _until_interrupted()
    return code


def _show(client: Client, worker: Client, folder: Path) -> int:
    captions = [scene.caption for scene in scenes(_CAPTIONS, seed=7, split="all")]
    rows = [("teacher", _pictures(client, captions, {"tier": "high"}))]
    teacher_speed = _speed(client, captions, {"tier": "high"})
    out.print(f"The teacher drew {len(captions)} captions over HTTP. Two requests a second from here on.")
    stream = Stream(client, {"model": MODEL}, captions, RATE_PER_S)
    stream.start()
    job = follow(client, client.post("/v1/distillation/jobs", spec.preset("shapes-fast"))["id"])
    ended_s = time.monotonic()
    while time.monotonic() - ended_s < AFTER_LIVE_S or stream.tally.sent < LEAST_REQUESTS:
        time.sleep(1 / RATE_PER_S)
    tally = stream.stop()
    serving = client.get(f"/v1/deployments/{MODEL}")["allowed"].get(job.get("student") or "", [])
    speeds: dict[int, Speed] = {}
    for steps in sorted(serving, reverse=True):
        wanted = {"model": job["student"], "steps": steps}
        rows.append((f"{steps} steps", _pictures(client, captions, wanted)))
        speeds[steps] = _speed(client, captions, wanted)
    (folder / "sheet.png").write_bytes(sheet(rows, captions))
    report = Report(client, job).whole(tally, teacher_speed, speeds, worker)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    out.print(table(report))
    out.print(swap_line(report["swap"]), highlight=False)
    return _verdict(job, report)


def _verdict(job: Json, report: Json) -> int:
    if job["status"] != "succeeded":
        err.print(f"The job ended as {job['status']}: {job.get('error')}. What served before still serves.")
        return EXIT_JOB
    if not job["gates"]["passed"]:
        missed = [result for result in job["gates"]["results"] if not result["passed"]]
        for result in missed:
            err.print(f"  {result['rule']} at {result['steps']} steps: {result['value']} (limit {result['limit']})")
        err.print("The gate refused the student for the tiers above; the schedule-only student keeps serving those.")
        return EXIT_GATE
    if report["swap"]["failed"]:
        err.print(f"{report['swap']['failed']} requests failed: {report['swap']['errors']}")
        return EXIT_FAILED_REQUESTS
    return 0


def _next(stack: Stack, folder: Path, *, stay: bool) -> None:
    out.print(f"Wrote {folder / 'report.json'} and {folder / 'sheet.png'}.", highlight=False)
    out.print(
        "Still running; Ctrl-C stops it." if stay else "To try it yourself: fewstep up --data demo/data",
        highlight=False,
    )
    out.print(hints(stack), highlight=False)


def _until_interrupted() -> None:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()


# --- pictures and speed over HTTP --------------------------------------------------------------------


def _pictures(client: Client, captions: Sequence[str], wanted: Json) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The captions' pictures [N, 3, H, W], seed i for caption i."""
    made = [client.generate({"model": MODEL, **wanted, "prompt": c, "seed": i}) for i, c in enumerate(captions)]
    return np.stack([np.asarray(Image.open(io.BytesIO(p.content)).convert("RGB")).transpose(2, 0, 1) for p in made])


def _speed(client: Client, captions: Sequence[str], wanted: Json) -> Speed:
    latencies, overheads = [], []
    for index in range(_LATENCIES):
        body = {"model": MODEL, **wanted, "prompt": captions[index % len(captions)], "seed": index}
        began = time.perf_counter()
        picture = client.generate(body)
        latencies.append((time.perf_counter() - began) * 1000)
        overheads.append(latencies[-1] - engine_ms(picture.headers.get("server-timing", "")))
    latencies.sort()
    return Speed(
        latency_ms_p50=statistics.median(latencies),
        latency_ms_p95=latencies[int(0.95 * (len(latencies) - 1))],
        images_per_s=_throughput(client, captions, wanted),
        gateway_ms_p50=statistics.median(overheads),
    )


def engine_ms(server_timing: str) -> float:
    """Milliseconds of encode, denoise and decode in a `server-timing` header."""
    parts = dict(part.strip().split(";dur=") for part in server_timing.split(",") if ";dur=" in part)
    return sum(float(parts.get(stage, 0.0)) for stage in ("encode", "denoise", "decode"))


def _throughput(client: Client, captions: Sequence[str], wanted: Json) -> float:
    end, began = time.monotonic() + _THROUGHPUT_S, time.monotonic()

    def draw(worker: int) -> int:
        made = 0
        while time.monotonic() < end:
            client.generate({"model": MODEL, **wanted, "prompt": captions[made % len(captions)], "seed": made + worker})
            made += 1
        return made

    with ThreadPoolExecutor(_PARALLEL) as pool:
        return sum(pool.map(draw, range(_PARALLEL))) / (time.monotonic() - began)

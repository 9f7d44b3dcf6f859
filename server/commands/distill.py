"""`fewstep distill …`: submit a distillation job, watch it become a student, stop it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from engines.errors import InvalidRequest
from engines.manifest import shown
from server.client import Client
from server.commands.terminal import DEFAULT_URL, Key, Url, connected, out

app = typer.Typer(no_args_is_help=True, help="Make students: submit, list, watch, pause, resume and cancel jobs.")
ENDED = frozenset({"succeeded", "failed", "canceled"})
_JOBS = "/v1/distillation/jobs"
Job = dict[str, Any]
JobId = Annotated[str, typer.Argument(help="The job's id, dj_…")]


@app.command()
def submit(
    spec: Annotated[
        Path,
        typer.Argument(
            help="A YAML or JSON file in the shape of POST /v1/distillation/jobs; - reads it from the terminal."
        ),
    ],
    watch_it: Annotated[bool, typer.Option("--watch/--no-watch", help="Stay and show progress.")] = True,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Submit a job.

    Example: fewstep distill submit examples/shapes-fast.yaml
    """
    with connected(url, api_key) as client:
        job = client.post(_JOBS, read_spec(spec))
        out.print(f"{job['id']} {job['status']}", highlight=False)
        if watch_it:
            follow(client, job["id"])


@app.command("list")
def list_jobs(url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """List the jobs, newest first."""
    table = Table("job", "status", "step", "student", "gates")
    with connected(url, api_key) as client:
        for job in client.get(_JOBS)["data"]:
            gates = job.get("gates")
            verdict = "" if not gates else "passed" if gates["passed"] else "missed"
            progress = f"{job.get('step') or 0}/{job.get('total_steps') or '?'}"
            table.add_row(job["id"], job["status"], progress, shown(job.get("student") or ""), verdict)
    out.print(table)


@app.command()
def watch(job_id: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Show a job's progress until it ends."""
    with connected(url, api_key) as client:
        follow(client, job_id)


@app.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Stop a job for good; its checkpoints stay."""
    _command(job_id, "cancel", url, api_key)


@app.command()
def pause(job_id: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Checkpoint a job and free its processor until it is resumed."""
    _command(job_id, "pause", url, api_key)


@app.command()
def resume(job_id: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Go on with a paused job from its checkpoint."""
    _command(job_id, "resume", url, api_key)


def _command(job_id: str, verb: str, url: str, api_key: str | None) -> None:
    with connected(url, api_key) as client:
        job = client.post(f"{_JOBS}/{job_id}/{verb}")
    out.print(f"{job['id']} {job['status']}", highlight=False)


def read_spec(path: Path) -> Job:
    """A job as a dict, from YAML (JSON is YAML too).

    Raises:
        InvalidRequest: no such file, or not a mapping.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        spec = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise InvalidRequest(f"{path} cannot be read as a job: {error}") from error
    if not isinstance(spec, dict):
        raise InvalidRequest(f"{path} holds no job: expected keys such as teacher, student, method")
    return spec


def follow(client: Client, job_id: str) -> Job:
    """Draws the job's events as they come and returns the job as it ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=False) as progress:
        bar = progress.add_task("queued", total=None, note="")
        for event in client.events(f"{_JOBS}/{job_id}/events"):
            show(progress, bar, event)
            if event.get("status") in ENDED:
                break
    job = client.get(f"{_JOBS}/{job_id}")
    out.print(summary(job), highlight=False)
    return job


def show(progress: Progress, bar: Any, event: Job) -> None:
    """One event on the bar: its state, the step, the losses of every role and the metric so far."""
    data = {**event, **(event.get("data") or {})}
    if status := data.get("status"):
        progress.update(bar, description=str(status))
    if "step" in data:
        progress.update(bar, completed=data["step"], total=data.get("total_steps") or data.get("total"))
        progress.update(bar, note=_figures(data))


def _figures(data: Job) -> str:
    losses = " ".join(f"{name} {value:.3f}" for name, value in (data.get("losses") or {}).items())
    metrics = " ".join(
        f"{name} {value:.2f}" for name, value in (data.get("metrics") or {}).items() if isinstance(value, float)
    )
    eta = f"{data['eta_s']:.0f} s left" if data.get("eta_s") is not None else ""
    return " · ".join(part for part in (losses, metrics, eta) if part)


def summary(job: Job) -> str:
    """One or several sentences on how a job ended."""
    if job.get("error"):
        return f"{job['id']} {job['status']}: {json.dumps(job['error'])}"
    lines = [f"{job['id']} {job['status']}: {shown(job.get('student') or '')}"]
    for result in (job.get("gates") or {}).get("results", []):
        verdict = "passed" if result["passed"] else "MISSED"
        lines.append(
            f"  {result['steps']} steps  {result['rule']:<16} {result['value']:.3f} (limit {result['limit']}) {verdict}"
        )
    return "\n".join(lines)

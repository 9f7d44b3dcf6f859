"""`fewstep distill …`: submit a distillation job, watch it become a student, stop it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from engines.errors import InvalidRequest
from engines.manifest import shown
from server.commands.follow import JOBS, follow
from server.commands.sweep import Sweep, run
from server.commands.terminal import DEFAULT_URL, Key, Url, connected, out
from server.sweep import trials

app = typer.Typer(no_args_is_help=True, help="Make students: submit, list, watch, pause, resume and cancel jobs.")
METHODS = "/v1/distillation/methods"
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
        job = client.post(JOBS, read_spec(spec))
        out.print(f"{job['id']} {job['status']}", highlight=False)
        if watch_it:
            follow(client, job["id"])


@app.command()
def sweep(
    file: Annotated[
        Path, typer.Argument(help="YAML or JSON: a list of jobs, or `base`, a job, and `grid`, values for its fields.")
    ],
    out_dir: Annotated[Path, typer.Option("-o", "--out", help="Folder of the leaderboard.")] = Path("sweep"),
    grace: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of its budget that every job may spend; 1 stops none."),
    ] = 0.25,
    tag: Annotated[str, typer.Option(help="Another tag runs the same jobs anew.")] = "",
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Run many jobs, stop those that fall behind the median of the others, and write a leaderboard.

    The jobs go on if this is interrupted; the same command takes the sweep up again.

    Example: fewstep distill sweep examples/sweep.yaml -o sweep
    """
    found = trials(_read(file))
    with connected(url, api_key) as client:
        running = Sweep(client, found, tag=tag, grace=grace)
        run(running, out_dir, out)
    out.print(f"{out_dir / 'leaderboard.md'}", highlight=False, markup=False)


@app.command("list")
def list_jobs(url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """List the jobs, newest first."""
    table = Table("job", "status", "step", "student", "gates")
    with connected(url, api_key) as client:
        for job in client.get(JOBS)["data"]:
            gates = job.get("gates")
            verdict = "" if not gates else "passed" if gates["passed"] else "missed"
            progress = f"{job.get('step') or 0}/{job.get('total_steps') or '?'}"
            table.add_row(job["id"], job["status"], progress, shown(job.get("student") or ""), verdict)
    out.print(table)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this one's settings.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """List the methods and loss terms that a job may name, with their papers, needs and measured rank.

    The distances are ratios to the guided teachers' (1 is as good, lower is better) at 1, 2 and 4 steps, every method
    with the same work and its own defaults. Those marked * did no better there than the teacher at as few steps.
    """
    with connected(url, api_key) as client:
        found = client.get(METHODS)
    known = {one["name"]: one for one in (*found["data"], *found["terms"])}
    if name is None:
        table = Table("rank", "method", "fd 1/2/4", "paper", "needs", "reads", "trains", "what it does")
        for one in sorted(known.values(), key=lambda one: (one["rank"] is None, one["rank"] or 0)):
            term = "" if one["object"] == "distillation.method" else " (term)"
            place = "" if one["rank"] is None else f"{one['rank']}{'*' if one['experimental'] else ''}"
            distances = "/".join(f"{one['fd_ratio'][k]:.2f}" if k in one["fd_ratio"] else "–" for k in ("1", "2", "4"))
            lists = (", ".join(one[key]) for key in ("needs", "inputs", "roles"))
            shown_distances = distances if one["fd_ratio"] else ""
            table.add_row(place, one["name"] + term, shown_distances, one["paper"], *lists, one["description"])
        out.print(table)
    elif name not in known:
        raise InvalidRequest(f"no method or term is called {name!r}: choose from {', '.join(sorted(known))}")
    else:
        table = Table("setting", "default", "what it is")
        for setting, schema in known[name]["settings"].get("properties", {}).items():
            table.add_row(setting, str(schema.get("default", "")), schema.get("description", ""))
        out.print(f"{name}: {known[name]['description']}", highlight=False)
        out.print(table)


@app.command()
def watch(job_id: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Show a job's progress until it ends."""
    with connected(url, api_key) as client:
        follow(client, job_id)


@app.command()
def report(
    job_id: JobId,
    out_file: Annotated[Path, typer.Option("-o", "--out", help="Where to write it.")] = Path("report.html"),
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Write a job's report, one HTML file: figures with intervals, curves, and pictures of the same seeds.

    Example: fewstep distill report dj_… -o report.html
    """
    with connected(url, api_key) as client:
        text = client.text(f"{JOBS}/{job_id}/report")
    out_file.write_text(text, encoding="utf-8")
    out.print(str(out_file), highlight=False, markup=False)


@app.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Stop a job for good; its checkpoints stay until `fewstep gc` deletes them."""
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
        job = client.post(f"{JOBS}/{job_id}/{verb}")
    out.print(f"{job['id']} {job['status']}", highlight=False)


def read_spec(path: Path) -> Job:
    """A job as a dict, from YAML (JSON is YAML too).

    Raises:
        InvalidRequest: no such file, or not a mapping.
    """
    spec = _read(path)
    if not isinstance(spec, dict):
        raise InvalidRequest(f"{path} holds no job: expected keys such as teacher, student, method")
    return spec


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(sys.stdin.read() if str(path) == "-" else path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InvalidRequest(f"{path} cannot be read as a job: {error}") from error

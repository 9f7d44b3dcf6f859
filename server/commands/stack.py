"""`fewstep up`: everything on this machine until Ctrl-C."""

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from server.commands.terminal import out
from server.embedded import Stack, StackOptions

Data = Annotated[Path, typer.Option("--data", help="Where everything is kept; a second start continues there.")]
Port = Annotated[int, typer.Option(help="The gateway's port on 127.0.0.1; 0 takes a free one.")]


def up(
    data: Data = Path(".fewstep"),
    port: Port = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes; one uses all cores already.")] = 1,
    distiller: Annotated[
        bool, typer.Option("--distiller/--no-distiller", help="Run distillation jobs here too.")
    ] = True,
    redis_url: Annotated[
        str | None, typer.Option(envvar="REDIS_URL", help="A Redis to use instead of starting one.")
    ] = None,
) -> None:
    """Start Redis, gateway, worker and distiller on this machine, and stop them with Ctrl-C."""
    options = StackOptions(
        data=data, port=port, workers=workers, distiller=distiller, redis_url=redis_url, metrics_port=9101
    )
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    out.print("starting …")
    with Stack(options) as stack:
        out.print(hints(stack), highlight=False)
        stopped.wait()
        out.print("stopping: the worker drains, a trainer checkpoints. Ctrl-C again kills.")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: _kill(stack))


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Where report.json and sheet.png go.")] = Path("demo"),
    stay: Annotated[bool, typer.Option(help="Leave everything running at the end, until Ctrl-C.")] = False,
    port: Port = 8000,
) -> None:
    """Show the whole loop: teacher, job, gate, swap under traffic, students. Takes up to ten minutes."""
    from server.demo import run

    raise typer.Exit(run(out_dir, port=port, stay=stay))


def hints(stack: Stack) -> str:
    """What to try next, with commands that work as they stand."""
    url = stack.url
    body = """'{"model": "shapes", "prompt": "a small red circle above a large blue square"}'"""
    as_json = "-H 'content-type: application/json'"
    sdk = f"OpenAI(base_url='{url}/v1', api_key='none').images.generate(model='shapes', prompt='a red circle')"
    metrics = ", ".join(f"{name} http://127.0.0.1:{port}/metrics" for name, port in stack.metrics_ports.items())
    return "\n".join(
        (
            f"Fewstep answers at {url} (data and logs in {stack.options.data}).",
            f"  curl {url}/v1/generations {as_json} -H 'accept: image/png' -d {body} -o out.png",
            f"  OpenAI SDK: {sdk}",
            f"  fewstep distill submit examples/shapes-fast.yaml --url {url}",
            f"  metrics: {url}/metrics, {metrics}",
            "  dashboards: docker/grafana/dashboards/, scrape file docker/prometheus/prometheus.yml",
        )
    )


def _kill(stack: Stack) -> None:
    stack.supervisor.kill()
    raise SystemExit(130)

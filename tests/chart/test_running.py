"""What the chart hands to other programs is run by them: probes, the start of Redis, the queries that KEDA asks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from server.dialects.health import DIALECT
from server.embedded import free_port
from server.gateway import Gateway
from server.metrics import Metrics
from tests import prometheus_server, redis_server
from tests.chart.release import Release, ci_values, container
from tests.eventually import eventually


def test_a_gateway_is_probed_where_it_answers() -> None:
    probed = container(Release(ci_values("minimal")).one("Deployment", "-gateway"))
    router = DIALECT.router(cast(Gateway, None))
    answering = {cast(Any, route).path for route in router.routes}
    paths = {name: probed[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert set(paths.values()) <= answering
    assert paths["readiness"] == "/readyz"


def test_a_worker_is_ready_once_it_has_loaded_a_version() -> None:
    probe = container(Release(ci_values("minimal")).one("Deployment", "-worker-default"))["readinessProbe"]
    program, *arguments = probe["exec"]["command"]
    assert program == "python3"
    port = free_port()
    command = [sys.executable, *(each.replace(":9100/", f":{port}/") for each in arguments)]
    metrics = Metrics(CollectorRegistry())
    server, thread = start_http_server(port, "127.0.0.1", registry=metrics.registry)
    try:
        loading = subprocess.run(command, check=False).returncode
        metrics.model_info.labels("shapes", "shapes@0123456789ab", "openvino").set(1)
        loaded = subprocess.run(command, check=False).returncode
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert (loading, loaded) == (1, 0)


def test_redis_starts_as_the_chart_starts_it(tmp_path: Path) -> None:
    program = redis_server.binary()
    assert program is not None
    (tmp_path / "valkey-server").symlink_to(program)
    shell, flag, script = container(Release(ci_values("minimal")).one("StatefulSet", "-redis"))["command"]
    socket = tmp_path / "socket"
    for there, here in {"port 6379": f"port 0\nunixsocket {socket}", "/data": str(tmp_path)}.items():
        assert there in script
        script = script.replace(there, here)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REDIS_PASSWORD": "correctHorse1"}
    with subprocess.Popen([shell, flag, script], env=env, stdout=subprocess.DEVNULL) as process:
        try:
            eventually(socket.exists, within_s=30)
            told = redis.Redis(unix_socket_path=str(socket), password="correctHorse1").config_get("*")
            with pytest.raises(redis.AuthenticationError):
                redis.Redis(unix_socket_path=str(socket)).ping()
        finally:
            process.terminate()
    wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": ""}
    assert {name: told[name] for name in wanted} == wanted
    assert told["maxmemory"] == str(512 * 2**20)


@pytest.mark.prometheus
def test_keda_asks_how_long_requests_wait_and_how_many(tmp_path: Path) -> None:
    """Requests of one minute waited 3 to 5 s each, then none came. Two gateways tell the same queues."""
    promtool = Path(prometheus_server.binary()).with_name("promtool")
    (scaled,) = Release(ci_values("full")).all("ScaledObject")
    wait, waiting = (trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])
    here, elsewhere = 'namespace="images",model="shapes"', 'namespace="other",model="shapes"'
    series = {
        f'fewstep_queue_seconds_bucket{{{here},le="3"}}': "0x20",
        f'fewstep_queue_seconds_bucket{{{here},le="5"}}': "0+2.5x4 10x16",
        f'fewstep_queue_seconds_bucket{{{here},le="+Inf"}}': "0+2.5x4 10x16",
        f'fewstep_queue_seconds_bucket{{{elsewhere},le="0.1"}}': "0+1000x20",
        f'fewstep_queue_seconds_bucket{{{elsewhere},le="+Inf"}}': "0+1000x20",
        f'fewstep_waiting{{{here},class="high",pod="a"}}': "2x20",
        f'fewstep_waiting{{{here},class="high",pod="b"}}': "3x20",
        f'fewstep_waiting{{{here},class="normal",pod="a"}}': "40x20",
        'fewstep_waiting{namespace="images",model="not-of-this-pool",class="normal",pod="a"}': "500x20",
    }
    asked = [
        {"expr": expr, "eval_time": when, "exp_samples": [{"labels": "{}", "value": value}]}
        for expr, when, value in [(wait, "1m", 4.8), (wait, "4m", 0), (waiting, "1m", 43)]
    ]
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": asked,
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

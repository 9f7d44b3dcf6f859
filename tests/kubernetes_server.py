"""The part of a Kubernetes API server that a launcher asks, over real HTTP, with its controller and its kubelet: pods
of Jobs are real processes here, with the environment that Kubernetes would give them.

What it takes is validated strictly, and what it says of Jobs and pods has the shape that Kubernetes says it in.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate

from server.embedded import free_port

Object = dict[str, Any]

NAMESPACE, TOKEN = "images", "a-token"
VERSION = "1.34"
_JOBS = re.compile(rf"/apis/batch/v1/namespaces/{NAMESPACE}/jobs(?:/(?P<name>[a-z0-9-]+))?")
_PODS = re.compile(rf"/api/v1/namespaces/{NAMESPACE}/pods(?:/(?P<name>[a-z0-9-]+))?")


class Pod:
    """One process, in a session of its own."""

    def __init__(self, job: Object, index: int | None, path: str, port: int) -> None:
        spec = job["spec"]["template"]["spec"]
        self.name = f"{job['metadata']['name']}-{index or 0}"
        self.labels, self.grace_s = job["spec"]["template"]["metadata"]["labels"], spec["terminationGracePeriodSeconds"]
        env = {"PATH": path} | {one["name"]: one["value"] for one in spec["containers"][0].get("env", ())}
        env |= {"PYTHONPATH": os.environ.get("PYTHONPATH", os.getcwd()), "OMP_NUM_THREADS": "1"}
        env |= {} if index is None else {"JOB_COMPLETION_INDEX": str(index)}

        def expanded(argument: str) -> str:
            """As a kubelet does it; the first pod's name is this machine, and its port a free one here."""
            argument = re.sub(r"\$\((\w+)\)", lambda found: env.get(found[1], found[0]), argument)
            return re.sub(r"=[a-z0-9-]+-0\.[a-z0-9-]+:29500$", f"=127.0.0.1:{port}", argument)

        command = [expanded(argument) for argument in spec["containers"][0]["command"]]
        self.process = subprocess.Popen(command, env=env, start_new_session=True)
        self.finished_at = ""

    def is_there(self) -> bool:
        """It runs."""
        if self.process.poll() is None:
            return True
        self.finished_at = self.finished_at or datetime.now(UTC).isoformat()
        return False

    def end(self, grace_s: float) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def shown(self) -> Object:
        state: Object = {"running": {}}
        if not self.is_there():
            code = self.process.returncode if self.process.returncode >= 0 else 128 - self.process.returncode
            reason = {0: "Completed", 137: "OOMKilled"}.get(code, "Error")
            state = {"terminated": {"exitCode": code, "reason": reason, "finishedAt": self.finished_at}}
        status = {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": state}]}
        return {"metadata": {"name": self.name, "labels": self.labels}, "status": status}


class KubernetesServer:
    """`path` is the PATH of containers. While it is `down` it does nothing, while it is `mute` it does what it is told
    and answers nobody. `forbidden` are pairs of a verb and a kind, `waiting` is the status of pods that do not start.
    """

    def __init__(self, folder: Path, path: str) -> None:
        self._path = path
        self.down, self.mute = False, False
        self.forbidden: set[tuple[str, str]] = set()
        self.waiting: Object | None = None
        self.others: dict[str, Object] = {}  # pods of other things
        self.created: list[Object] = []
        self.jobs: dict[str, Object] = {}
        self.pods: dict[str, list[Pod]] = {}
        self.asked = 0
        self._lock = threading.RLock()
        self.account = folder / "account"
        self.account.mkdir()
        (self.account / "namespace").write_text(NAMESPACE)
        (self.account / "token").write_text(TOKEN)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self, "GET")

            def do_POST(self) -> None:
                server._answer(self, "POST")

            def do_DELETE(self) -> None:
                server._answer(self, "DELETE")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for pod in [pod for pods in self.pods.values() for pod in pods]:
            pod.kill()

    # requests ----------------------------------------------------------------------------------------------------

    def _answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        body = request.rfile.read(int(request.headers.get("content-length", 0)))
        self.asked += 1
        if self.down:
            request.connection.close()
            return
        with self._lock:
            mute = self.mute
            status, said = self._done(request, method, json.loads(body) if body else {})
        if mute:
            request.connection.close()
            return
        data = json.dumps(said if status < 400 else {"kind": "Status", "code": status, **said}).encode()
        request.send_response(status)
        request.send_header("content-length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _done(self, request: BaseHTTPRequestHandler, method: str, body: Object) -> tuple[int, Object]:
        url = urlsplit(request.path)
        selectors = parse_qs(url.query).get("labelSelector", [])
        labels = dict(pair.split("=", 1) for text in selectors for pair in text.split(","))
        path = _JOBS.fullmatch(url.path) or _PODS.fullmatch(url.path)
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"message": "Unauthorized"}
        if path is None:
            return 404, {"message": f"the server could not find {url.path}"}
        kind, name = "jobs" if path.re is _JOBS else "pods", path["name"]
        verb = {"POST": "create", "DELETE": "delete"}.get(method, "get" if name else "list")
        if (verb, kind) in self.forbidden:
            who = f'User "system:serviceaccount:{NAMESPACE}:distiller" cannot {verb} resource "{kind}"'
            return 403, {"message": f"{kind} is forbidden: {who}"}
        self._control()
        if verb == "create":
            return self._create(body)
        there = self.jobs if kind == "jobs" else self._shown()
        if verb == "list":
            found = [each for each in there.values() if labels.items() <= each["metadata"]["labels"].items()]
            return 200, {"items": found}
        if name not in there:
            return 404, {"message": f'{kind} "{name}" not found'}
        return (200, there[name]) if verb == "get" else self._delete(there[name], body)

    def _shown(self) -> dict[str, Object]:
        """All pods."""
        shown = {pod.name: pod.shown() for pods in self.pods.values() for pod in pods}
        if self.waiting is not None:
            for job in self.jobs.values():
                meta = {"name": job["metadata"]["name"], "labels": job["spec"]["template"]["metadata"]["labels"]}
                shown[meta["name"]] = {"metadata": meta, "status": self.waiting}
        return shown | self.others

    def _create(self, job: Object) -> tuple[int, Object]:
        name = job["metadata"]["name"]
        try:
            kubernetes_validate.validate(job, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            return 422, {"message": str(error)}
        if name in self.jobs:
            return 409, {"message": f'jobs.batch "{name}" already exists'}
        job["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": "now"}
        job["status"] = {"ready": 0}
        self.jobs[name], indexed = job, job["spec"]["completionMode"] == "Indexed"
        self.created.append(job)
        self.pods[name] = []
        if self.waiting is None:
            indexes = range(job["spec"]["completions"]) if indexed else [None]
            port = free_port()
            self.pods[name] = [Pod(job, index, self._path, port) for index in indexes]
        return 201, job

    def _delete(self, job: Object, how: Object) -> tuple[int, Object]:
        assert how["propagationPolicy"] == "Foreground"
        if how["preconditions"]["uid"] != job["metadata"]["uid"]:
            return 409, {"message": "the UID in the precondition does not match"}
        job["metadata"]["deletionTimestamp"] = "now"
        for pod in self.pods[job["metadata"]["name"]]:
            threading.Thread(target=pod.end, args=(pod.grace_s,)).start()
        return 200, job

    def _control(self) -> None:
        """What the Job controller and the garbage collector do, whenever somebody looks."""
        for name, job in list(self.jobs.items()):
            pods = self.pods[name]
            running = [pod for pod in pods if pod.is_there()]
            failed = [pod for pod in pods if not pod.is_there() and pod.process.returncode != 0]
            job["status"]["ready"] = len(running)
            if "deletionTimestamp" in job["metadata"]:
                if not running:
                    del self.jobs[name], self.pods[name]
            elif "conditions" not in job["status"] and pods:
                if failed:
                    for pod in running:
                        threading.Thread(target=pod.end, args=(pod.grace_s,)).start()
                    reason = {"reason": "BackoffLimitExceeded", "message": "Job has reached the specified limit"}
                    job["status"]["conditions"] = [{"type": "Failed", "status": "True", **reason}]
                elif not running:
                    job["status"]["conditions"] = [{"type": "Complete", "status": "True"}]


@contextmanager
def serving(folder: Path, path: str) -> Iterator[KubernetesServer]:
    server = KubernetesServer(folder, path)
    try:
        yield server
    finally:
        server.close()


def containing(folder: Path, python: str) -> str:
    """The PATH of a container whose python3 is this script."""
    program = folder / "bin" / "python3"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{python}\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.defpath}"


def python_here() -> str:
    """The PATH of a container that has what is installed here."""
    return f"{Path(sys.executable).parent}:{os.defpath}"

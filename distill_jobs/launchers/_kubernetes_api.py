"""The Kubernetes API, as far as the launcher asks it: Jobs and pods of one namespace, over plain HTTPS.

Six requests by httpx, which is here anyhow: the official client would be 126 MB for them.
"""

import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from engines.errors import JobFailed, PermissionDenied, Unavailable

Object = dict[str, Any]

_TIMEOUT_S = 10.0
_NOT_THERE, _CONFLICT = httpx.codes.NOT_FOUND, httpx.codes.CONFLICT
_ANSWERS = {"create": {_CONFLICT}, "get": {_NOT_THERE}, "delete": {_NOT_THERE, _CONFLICT}}
# 401 is also said of a good token while the API cannot look up whose it is.
_LATER = {httpx.codes.UNAUTHORIZED, httpx.codes.TOO_MANY_REQUESTS}


class KubernetesApi:
    """`account` is the folder that a pod's service account is mounted as: namespace, token and the cluster's ca.crt.

    Every method raises:
        Unavailable: nobody answered, or somebody who may soon.
        PermissionDenied: the account lacks a right; the message names it.
        JobFailed: what was sent is not taken; the message says why.
    """

    def __init__(self, url: str, account: Path) -> None:
        ca = account / "ca.crt"
        trusted = ssl.create_default_context(cafile=ca if ca.exists() else None)
        self._http = httpx.Client(base_url=url, verify=trusted, timeout=_TIMEOUT_S, trust_env=False)
        self._account = account
        self.namespace = (account / "namespace").read_text().strip()
        self._jobs = f"/apis/batch/v1/namespaces/{self.namespace}/jobs"
        self._pods = f"/api/v1/namespaces/{self.namespace}/pods"

    def create(self, job: Object) -> Object | None:
        """The Job as it is there; None where one has its name."""
        return self._ask("create", "jobs", self._jobs, json=job)

    def job(self, name: str) -> Object | None:
        return self._ask("get", "jobs", f"{self._jobs}/{name}")

    def jobs(self, labels: Mapping[str, str]) -> list[Object]:
        return self._listed("jobs", self._jobs, labels)

    def delete(self, job: Object) -> None:
        """This very Job, and not another of its name; it stays until its pods have ended (`deletionTimestamp`)."""
        meta = job["metadata"]
        how = {"propagationPolicy": "Foreground", "preconditions": {"uid": meta["uid"]}}
        self._ask("delete", "jobs", f"{self._jobs}/{meta['name']}", json=how)

    def pod(self, name: str) -> Object | None:
        return self._ask("get", "pods", f"{self._pods}/{name}")

    def pods(self, labels: Mapping[str, str]) -> list[Object]:
        return self._listed("pods", self._pods, labels)

    def _listed(self, kind: str, path: str, labels: Mapping[str, str]) -> list[Object]:
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        found = self._ask("list", kind, path, params={"labelSelector": selector})
        return [] if found is None else list(found["items"])

    def _ask(self, verb: str, kind: str, path: str, **more: Any) -> Object | None:
        method = {"create": "POST", "delete": "DELETE"}.get(verb, "GET")
        token = (self._account / "token").read_text().strip()  # it is replaced every hour
        try:
            answer = self._http.request(method, path, headers={"Authorization": f"Bearer {token}"}, **more)
        except httpx.TransportError as error:
            raise Unavailable(f"the Kubernetes API does not answer: {error}") from error
        if answer.is_success:
            found: Object = answer.json()
            return found
        if answer.status_code in _ANSWERS.get(verb, ()):
            return None
        said = f"Kubernetes refuses to {verb} {kind} in namespace {self.namespace}: {_message(answer)}"
        if answer.status_code in _LATER or answer.is_server_error:
            raise Unavailable(said)
        if answer.status_code == httpx.codes.FORBIDDEN:
            raise PermissionDenied(f"{said}. The distiller's account needs the right to {verb} {kind} there")
        raise JobFailed(said)


def _message(answer: httpx.Response) -> str:
    """Of the `Status` object; a proxy before the API may say anything."""
    try:
        said: str = answer.json()["message"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"{answer.status_code} {answer.text[:200]}"
    return said

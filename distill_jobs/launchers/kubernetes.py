"""Trainers as Kubernetes Jobs, with nodes, resources and images of their own; they outlive their distiller.

A Job has the name of its job and phase. Whoever takes the job over finds it by that name and goes on watching, and no
two can run at once. Its folder has to be the same file system for distillers and trainers.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_jobs.launchers import _kubernetes_job as jobs
from distill_jobs.launchers.base import Hearing, Launcher, Order, Usage
from distill_jobs.settings import DistillerSettings
from engines.errors import BackendUnavailable, Conflict, FewstepError, InvalidRequest, Unavailable

if TYPE_CHECKING:
    from distill_jobs.launchers._kubernetes_api import KubernetesApi

log = logging.getLogger(__name__)

_MOST_PAUSE_S = 60.0
_ENDS_WITHIN_S = 60.0

Object = dict[str, Any]


class KubernetesLauncher:
    def __init__(self, settings: DistillerSettings) -> None:
        """
        Raises:
            BackendUnavailable: the extra is not installed.
            InvalidRequest: there is no template.
        """
        if settings.job_template is None:
            raise InvalidRequest("DISTILLER_LAUNCHER=kubernetes needs DISTILLER_JOB_TEMPLATE, a Job as JSON")
        self._settings, self._template_path = settings, settings.job_template
        self._api = _api(settings.kubernetes_url, settings.kubernetes_account)

    def start(self, order: Order, hearing: Hearing) -> "KubernetesTrainer":
        template = self._template()

        def made() -> Object:
            most = self._settings.processes_per_pod
            return jobs.job_of(order, template, most_in_pod=most, owner=self._owner())

        name, labels = jobs.name_of(order, template), jobs.scope(template) | jobs.labels_of(order)
        return KubernetesTrainer(self._api, name, labels, made, hearing, poll_s=self._settings.kubernetes_poll_s)

    def sweep(self, over: Callable[[str], bool]) -> None:
        try:
            for job in self._api.jobs(jobs.scope(self._template())):
                if over(job["metadata"]["labels"].get(jobs.JOB, "")) and not jobs.is_ending(job):
                    log.info("deletes a Job of a job that is over", extra={"name": job["metadata"]["name"]})
                    self._api.delete(job)
        except FewstepError as error:
            log.warning("could not look for Jobs that are left", extra={"reason": error.message})

    def _template(self) -> Object:
        """As it is now: what is mounted may change."""
        found: Object = json.loads(self._template_path.read_bytes())
        return found

    def _owner(self) -> Object | None:
        """What made the pod that this runs in, such as a StatefulSet: it stays when the pod is replaced."""
        pod = self._api.pod(self._settings.kubernetes_pod) if self._settings.kubernetes_pod else None
        owners = [] if pod is None else pod["metadata"].get("ownerReferences", [])
        return next(({key: owner[key] for key in ("apiVersion", "kind", "name", "uid")} for owner in owners), None)


class KubernetesTrainer:
    """One life. Nothing is asked of Kubernetes but in `wait`, so that whoever waits is never kept by it for long."""

    def __init__(
        self,
        api: "KubernetesApi",
        name: str,
        labels: dict[str, str],
        made: Callable[[], Object],
        hearing: Hearing,
        *,
        poll_s: float,
    ) -> None:
        self._api, self._name, self._labels, self._made, self._hearing = api, name, labels, made, hearing
        self._poll_s, self._due_s, self._failures = poll_s, 0.0, 0
        self._job: Object | None = None
        self._begun, self._left = False, False
        self._noted: set[str] = set()

    def wait(self, timeout_s: float) -> int | None:
        """Looks every `poll_s`, and less and less often while nobody answers."""
        pause_s = max(0.0, self._due_s - time.monotonic())
        time.sleep(min(timeout_s, pause_s))
        if pause_s > timeout_s:
            return None
        code = None
        try:
            code = self._look()
            self._failures = 0
        except Unavailable as error:
            self._failures += 1
            log.warning("cannot look after a Job", extra={"job": self._name, "reason": error.message})
        self._due_s = time.monotonic() + min(_MOST_PAUSE_S, self._poll_s * 2**self._failures)
        return code

    def usage(self) -> Usage:
        """Zero: the cluster's own metrics tell."""
        return Usage()

    def checkpoint(self, grace_s: float) -> None:
        """Its pods get SIGTERM and have the grace of their template, though nobody waits for longer than `grace_s`."""
        until_s = time.monotonic() + grace_s
        while not (self._left or self._is_gone()) and time.monotonic() < until_s:
            time.sleep(self._poll_s)

    def leave(self, grace_s: float) -> None:
        self._left = True

    def kill(self) -> None:
        """What is not gone by then is left to `sweep`, or is waited for before the next life begins."""
        self.checkpoint(_ENDS_WITHIN_S)

    def _look(self) -> int | None:
        if self._job is None:
            self._job = self._found() or self._create()
            return None
        if (job := self._there()) is None:
            self._note("its Job was deleted")
            return jobs.KILLED
        if (ended := jobs.end_of(job)) is not None:
            end = jobs.judged(ended, self._pods())
            self._note(end.because)
            return end.code
        if jobs.is_waiting(job):
            self._note(jobs.waits_for(self._pods()) or "")
        return None

    def _there(self) -> Object | None:
        """The Job of this name; once it is known, that very one.

        Raises:
            Conflict: it is of another system.
        """
        job = self._api.job(self._name)
        if job is None or (self._job and job["metadata"]["uid"] != self._job["metadata"]["uid"]):
            return None
        if not self._labels.items() <= job["metadata"].get("labels", {}).items():
            raise Conflict(f"the Job {self._name} in namespace {self._api.namespace} is not of this system")
        return job

    def _found(self) -> Object | None:
        """The Job that an earlier distiller has left, unless it is about to go."""
        job = self._there()
        if job is None or jobs.is_ending(job):
            return None
        log.info("found a Job", extra={"job": self._name})
        return job

    def _create(self) -> Object | None:
        """None where one of this name is still there: it is looked for again."""
        job = self._made()
        if not self._begun:
            self._hearing.begins()
            self._begun = True
        return self._api.create(job)

    def _pods(self) -> list[Object]:
        return self._api.pods(self._labels)

    def _is_gone(self) -> bool:
        try:
            job = self._there()
            if job is not None and not jobs.is_ending(job):
                self._api.delete(job)
        except Unavailable as error:
            log.warning("cannot delete a Job", extra={"job": self._name, "reason": error.message})
            return False
        except FewstepError as error:
            log.error("cannot delete a Job", extra={"job": self._name, "reason": error.message})
            return True
        return job is None

    def _note(self, message: str) -> None:
        """Once for each reason, which stands before the first colon."""
        reason = message.partition(":")[0]
        if reason and reason not in self._noted:
            self._noted.add(reason)
            self._hearing.note(f"Kubernetes: {message}")


def _api(url: str, account: Path) -> "KubernetesApi":
    try:
        from distill_jobs.launchers._kubernetes_api import KubernetesApi
    except ModuleNotFoundError as error:
        message = f"DISTILLER_LAUNCHER=kubernetes needs {error.name}: pip install 'fewstep[kubernetes]'"
        raise BackendUnavailable(message) from error
    return KubernetesApi(url, account)


LAUNCHER: type[Launcher] = KubernetesLauncher

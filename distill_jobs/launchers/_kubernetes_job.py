"""A trainer's life as a Kubernetes Job, and what a Job and its pods say of it. Pure: objects in, objects out.

The operator's template says where and how pods run (image, volumes, placement, resources of one process). What makes
it a trainer is written over it here: name, labels, command, how many pods, and that nobody else starts it again.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_jobs.exit_codes import FINISHED, REFUSED
from distill_jobs.launchers.base import Order, command
from engines.errors import InvalidRequest

Object = dict[str, Any]

JOB, PHASE = "fewstep/job", "fewstep/phase"
KILLED = 137  # 128 + SIGKILL: also of a pod that is gone without a word
_SCOPE = tuple(f"app.kubernetes.io/{name}" for name in ("name", "instance", "component"))
_MASTER_PORT = 29500
_KEPT_S = 3600  # of a Job that has ended, for whoever looks for it
_INDEX = "JOB_COMPLETION_INDEX"  # Kubernetes gives each pod of an Indexed Job its own

# What is said goes to the log in the job's folder, where it outlives the pod; of other pods than the first beside it.
_LOGGED = f'log="$0"; [ "${{{_INDEX}:-0}}" = 0 ] || log="$0.${_INDEX}"; exec "$@" >>"$log" 2>&1'


def name_of(order: Order, template: Object) -> str:
    """The same for every life of a phase, so that Kubernetes itself refuses a second one beside the first."""
    return f"{template['metadata']['name']}-{order.job_id.replace('_', '-')}-{order.phase}"


def scope(template: Object) -> dict[str, str]:
    """The labels that all Jobs of one system have, and those of no other."""
    labels = template["metadata"].get("labels", {})
    return {key: labels[key] for key in _SCOPE if key in labels}


def labels_of(order: Order) -> dict[str, str]:
    return {JOB: order.job_id, PHASE: order.phase}


def job_of(order: Order, template: Object, *, most_in_pod: int, owner: Object | None = None) -> Object:
    """The Job of a life. It goes with its `owner`, and soon after its own end.

    Raises:
        InvalidRequest: it needs several pods, and the template names no Service by which they would find each other.
    """
    in_pod = max(n for n in range(1, most_in_pod + 1) if order.processes % n == 0)
    pods, job, name = order.processes // in_pod, copy.deepcopy(template), name_of(order, template)
    job["metadata"] |= {"name": name} | ({"ownerReferences": [owner]} if owner else {})
    spec, pod = job["spec"], job["spec"]["template"]
    for each in (job, pod):
        each.setdefault("metadata", {}).setdefault("labels", {}).update(labels_of(order))
    spec |= {"backoffLimit": 0, "completions": pods, "parallelism": pods}  # it is the keeper who tries again
    spec["completionMode"] = "Indexed" if pods > 1 else "NonIndexed"
    spec.setdefault("ttlSecondsAfterFinished", _KEPT_S)
    pod["spec"] |= {"restartPolicy": "Never", "automountServiceAccountToken": False}
    trainer = pod["spec"]["containers"][0]
    trainer["resources"] = _times(trainer.get("resources", {}), in_pod)
    threads = _cores(trainer["resources"]) or order.threads
    together: dict[str, object] = {}
    if pods > 1:
        if "subdomain" not in pod["spec"]:
            raise InvalidRequest(f"{order.processes} processes need {pods} pods, and the template has no subdomain")
        master = f"{name}-0.{pod['spec']['subdomain']}:{_MASTER_PORT}"
        together = {"nodes": pods, "node_rank": f"$({_INDEX})", "master": master}
    told = command(replace(order, threads=threads), machines=pods, python="python3", **together)
    trainer["command"] = ["sh", "-c", _LOGGED, str(order.log), *told]
    return job


def _times(resources: Mapping[str, Mapping[str, str | int]], processes: int) -> Object:
    """Resources of a pod, from those of one process."""
    return {
        kind: {name: _product(str(quantity), processes) for name, quantity in asked.items()}
        for kind, asked in resources.items()
    }


def _product(quantity: str, factor: int) -> str:
    number = re.match(r"[0-9.]+", quantity)
    if factor == 1 or number is None:  # Kubernetes says what is wrong with it
        return quantity
    return f"{float(number[0]) * factor:g}{quantity[number.end() :]}"


def _cores(resources: Mapping[str, Mapping[str, str]]) -> int:
    """Whole ones in a pod's limit, at least 1; 0 where there is none."""
    limit = resources.get("limits", {}).get("cpu", "0")
    cores = float(limit.removesuffix("m")) / (1000 if limit.endswith("m") else 1)
    return max(1, int(cores)) if cores else 0


# what is said of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class End:
    """An exit code, and what Kubernetes adds to it."""

    code: int
    because: str = ""


def end_of(job: Object) -> Object | None:
    """The condition that ended it; None while it runs."""
    conditions = job.get("status", {}).get("conditions", ())
    return next((c for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), None)


def is_ending(job: Object) -> bool:
    """It is deleted, and stays until its pods have ended."""
    return "deletionTimestamp" in job["metadata"]


def is_waiting(job: Object) -> bool:
    """Some of its pods do not run yet."""
    return int(job.get("status", {}).get("ready", 0)) < int(job["spec"]["parallelism"])


def judged(condition: Object, pods: Sequence[Object]) -> End:
    """Of several codes that of who refuses, for it has said why, or else of who ended first with one."""
    if condition["type"] == "Complete":
        return End(FINISHED)
    ended = [(pod, state) for pod in pods for state in _states(pod, "terminated") if state["exitCode"] != FINISHED]
    ended.sort(key=lambda one: str(one[1].get("finishedAt", "")))
    codes = [int(state["exitCode"]) for _, state in ended]
    if REFUSED in codes:
        return End(REFUSED)
    reasons = [_said(condition)] if condition.get("reason") != "BackoffLimitExceeded" else []
    reasons += [_said(pod["status"]) for pod in pods if pod["status"].get("reason")]
    reasons += [_said(state) for _, state in ended[:1] if state.get("reason") not in (None, "Error")]
    return End(codes[0] if codes else KILLED, "; ".join(reasons))


def waits_for(pods: Sequence[Object]) -> str | None:
    """Why a pod does not begin, where it is more than a matter of seconds."""
    for pod in pods:
        for condition in pod["status"].get("conditions", ()):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return _said(condition)
        for state in _states(pod, "waiting"):
            if state.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                return _said(state)
    return None


def _states(pod: Object, kind: str) -> list[Object]:
    statuses = pod["status"].get("containerStatuses", ())
    return [status["state"][kind] for status in statuses if kind in status.get("state", {})]


def _said(what: Mapping[str, Any]) -> str:
    return ": ".join(str(what[key]) for key in ("reason", "message") if what.get(key))

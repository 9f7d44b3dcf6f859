"""Where each thing of a registry lies, and the check that no name can leave its folder."""

import re

from engines.errors import InvalidRequest

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


def plain(name: str) -> str:
    """A name that is one part of a path and cannot leave its folder."""
    if not _NAME.match(name):
        raise InvalidRequest(f"{name!r} cannot be a name: use letters, digits, '.', '_' and '-'")
    return name


def fresh(name: str) -> str:
    """A file whose age says when somebody last counted on `name`; the content of `name` is as old as it is."""
    return f".fresh/{name}"


def student_file(version: str) -> str:
    return f"{student_folder(version)}/student.json"


def student_folder(version: str) -> str:
    name, _, digest = version.partition("@")
    return f"students/{plain(name)}/{digest}"


def candidate_file(deployment: str, swap_id: str) -> str:
    return f"deployments/{plain(deployment)}/candidates/{plain(swap_id)}.json"


def job_folder(job_id: str) -> str:
    return f"jobs/{plain(job_id)}"


def job_file(job_id: str, name: str) -> str:
    return "/".join((job_folder(job_id), *(plain(part) for part in name.split("/"))))

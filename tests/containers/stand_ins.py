"""Images of other projects, under the names that Dockerfile and compose.yaml use.

They are pulled. Where no registry can be reached they are made of Debian's packages by mmdebstrap, which is near enough
to run what is ours: the base has Debian's own Python, and the services are Debian's builds of the same programs.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.containers.engine import Engine, debian_mirror, missing

BASE = "python:3.11-slim-bookworm"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SERVICES = ("valkey-server", "prometheus", "prometheus-alertmanager", "busybox")


@dataclass(frozen=True, slots=True)
class Service:
    """An image of compose.yaml, and what it starts."""

    image: str
    entrypoint: str


SERVICES = (
    Service("docker.io/valkey/valkey:8.1.1-bookworm", "[]"),
    Service("docker.io/prom/prometheus:v3.5.1", '["prometheus"]'),
    Service("docker.io/prom/alertmanager:v0.28.1", '["prometheus-alertmanager"]'),
)


def ensure(engine: Engine, folder: Path) -> None:
    """Pulls or makes all of them."""
    if not all(engine.had(each.image) for each in SERVICES):
        services = _bootstrap(folder / "services.tar", "trixie", _SERVICES, _SERVICE_FOLDERS)
        for each in SERVICES:
            changes = (f"ENTRYPOINT {each.entrypoint}", f"ENV PATH={_PATH}")
            told = [word for change in changes for word in ("--change", change)]
            engine.run("import", *told, services, each.image)
    if not engine.had(BASE):
        packages = ("python3", "python3-venv", "ca-certificates")
        engine.run("import", _bootstrap(folder / "base.tar", "bookworm", packages, _WITHOUT_PERL), BASE)


def build_base(engine: Engine, folder: Path) -> str:
    """BASE with the certificates and wheels that pip is configured to use here."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    told = dict(re.findall(r"^\S+\.([\w-]+)='(.*)'$", listed.stdout, re.M))
    wheels = [Path(each) for each in told.get("find-links", "").split() if Path(each).is_dir()]
    if not wheels and "cert" not in told:
        return BASE
    context = folder / "build-base"
    for each in wheels:
        shutil.copytree(each, context / "wheels", dirs_exist_ok=True)
    (context / "wheels").mkdir(parents=True, exist_ok=True)
    shutil.copy(told.get("cert", "/etc/ssl/certs/ca-certificates.crt"), context / "certificates.pem")
    (context / "pip.conf").write_text("[global]\ncert = /certificates.pem\nfind-links = /wheels\n")
    (context / "Dockerfile").write_text(
        f"FROM {BASE}\nCOPY certificates.pem /\nCOPY pip.conf /etc/pip.conf\nCOPY wheels /wheels\n"
    )
    engine.run("build", "--tag", "fewstep-build-base:here", context)
    return "fewstep-build-base:here"


# Named volumes take their owners from here; Prometheus' images have wget.
_SERVICE_FOLDERS = (
    'mkdir "$1/data" "$1/prometheus" "$1/alertmanager"; chown 999:999 "$1/data"; '
    'chown 65534:65534 "$1/prometheus" "$1/alertmanager"; ln -s busybox "$1/usr/bin/wget"'
)
# What merges /usr leaves a third of such a system behind.
_WITHOUT_PERL = 'chroot "$1" apt-get purge -y -qq usrmerge perl libperl5.36 perl-modules-5.36'


def _bootstrap(tar: Path, suite: str, packages: tuple[str, ...], hook: str) -> Path:
    if not shutil.which("mmdebstrap"):
        missing(f"{tar.stem}: no registry can be reached, and there is no mmdebstrap: apt-get install mmdebstrap")
    without = [f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("doc", "man", "locale", "info")]
    include = ",".join(("usr-is-merged", *packages))
    options = ["--variant=minbase", f"--include={include}", "--dpkgopt=force-unsafe-io", *without]
    command = ["mmdebstrap", *options, f"--customize-hook={hook}", suite, tar]
    done = subprocess.run([*command, debian_mirror()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return tar

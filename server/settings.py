"""What a gateway and a worker can be told, read once from the environment and frozen.

pydantic-settings ignores a misspelt variable silently, so `load` compares names itself and refuses
those it does not know.
"""

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, SecretStr, TypeAdapter, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from engines.errors import InvalidRequest
from server.auth import ApiKey

LogLevel = Literal["debug", "info", "warning", "error"]
_KEYS: TypeAdapter[tuple[ApiKey, ...]] = TypeAdapter(tuple[ApiKey, ...])
# Kubernetes puts these into every container for a Service of the same name.
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT(_.*)?)$|_PORT_\d+_(TCP|UDP)(_.*)?$")
_IN_LOGIN, _IN_QUERY = re.compile(r"(//[^:/@?#]*:)[^/?#]*@"), re.compile(r"(password=)[^&]*")
_STARS = "**********"
AnySettings = TypeVar("AnySettings", bound=BaseSettings)


class GatewaySettings(BaseSettings):
    """The HTTP side. `GATEWAY_PORT=8000` and so on."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", frozen=True, extra="forbid")

    redis_url: str = Field(description="redis://… or redis+sentinel://…, where requests are queued")
    registry_url: str = Field(description="a folder or fsspec URL with students, deployments and jobs")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    public_url: str = Field("", description="how clients reach this gateway; empty means http://host:port")
    id: str = Field("", description="begins the name of this process, which is new at each start")
    api_keys: SecretStr = Field(SecretStr(""), description="JSON list of {name, key | sha256, scopes}")
    api_keys_file: Path | None = Field(None, description="a file with the same JSON")
    url_secret: SecretStr | None = Field(None, description="signs result urls; the same for all gateways")
    url_ttl_s: float = Field(600, gt=0)
    default_timeout_ms: int = Field(60_000, ge=1)
    max_timeout_ms: int = Field(600_000, ge=1)
    max_body_bytes: int = Field(1_048_576, ge=1024)
    max_upload_bytes: int = Field(26_214_400, ge=1024, description="of a form with a picture to change")
    max_image_pixels: int = Field(16_777_216, ge=1, description="of a picture to change, before it is scaled")
    idempotency_ttl_s: float = Field(600, gt=0)
    result_ttl_s: float = Field(600, gt=0, description="how long answers are kept after their end")
    drain_s: float = Field(0.5, ge=0, description="how long a stopping gateway answers 503 before it stops listening")
    max_wait_s: float = Field(60, gt=0, description="a longer predicted wait is refused with 429")
    ageing_s: float = Field(1.0, ge=0, description="seconds of urgency per unit of priority")
    degrade_wait_s: float = Field(
        1.0,
        gt=0,
        description="tier auto takes fewer steps while the predicted wait is longer, ever fewer as it doubles",
    )
    degrade_hold_s: float = Field(5.0, gt=0, description="and one rung more again when it was low for so long")
    worker_grace_s: float = Field(15, ge=0, description="accept this long after the last live worker was seen")
    poll_s: float = Field(0.5, gt=0, description="how often registry and workers are read")
    log_level: LogLevel = "info"

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        text = self.api_keys.get_secret_value()
        listed = _KEYS.validate_json(text) if text else ()
        return listed + (_KEYS.validate_json(self.api_keys_file.read_bytes()) if self.api_keys_file else ())

    @property
    def base_url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.public_url.rstrip("/") or f"http://{host}:{self.port}"

    @model_validator(mode="after")
    def _closed_unless_loopback(self) -> Self:
        names = [key.name for key in self.keys]
        if len(set(names)) != len(names):
            raise ValueError(f"api_keys: each key needs its own name, not {sorted(names)}")
        if not names and not _is_loopback(self.host):
            raise ValueError(f"host {self.host} is not loopback and there are no api_keys: set one of the two")
        return self


class WorkerSettings(BaseSettings):
    """One worker: which deployments it serves, on which engine. `WORKER_BACKEND=openvino` and so on."""

    model_config = SettingsConfigDict(env_prefix="WORKER_", frozen=True, extra="forbid")

    redis_url: str
    registry_url: str
    id: str = Field("", description="begins the name of this process, which is new at each start")
    deployments: tuple[str, ...] = Field((), description="JSON list; empty means every deployment there is")
    backend: str = Field("auto", description="a file of engines/backends, or the fastest one available")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    device: str = Field("auto", description="cpu, cuda or cuda:1; auto: a GPU where the backend uses one")
    threads: int = Field(0, ge=0, description="engine threads; 0 means the cores this process may use")
    streams: int = Field(0, ge=0, description="engine calls at once, which share the threads; 0: what measures best")
    batch_sizes: tuple[int, ...] = Field((1, 2, 4, 8, 16), min_length=1, description="network rows; the warmed sizes")
    targets: tuple[str, ...] = Field((), description="of TensorRT plans built ahead (SM89 …); none: for the GPU here")
    cache_dir: Path = Field(Path(".fewstep/engines"), description="graphs and engines; processes may share it")
    cache_bytes: int = Field(20 * 2**30, ge=0, description="of cache_dir; what no process reads is deleted beyond it")
    specialise_after_s: float = Field(
        float("inf"),
        ge=0,
        description="live for so long, a version's weights are compiled in where that pays; they take twice their "
        "bytes for each batch size then. inf means never",
    )
    resident_bytes: int = Field(
        0,
        ge=0,
        description="of the weights of loaded versions; what does not fit is loaded when a request asks for it. "
        "0: three quarters of the memory of the GPU, or of this machine or container",
    )
    pinned: tuple[str, ...] = Field(
        (),
        description="JSON list of versions (name@digest), and of deployments for the version of their default tier: "
        "what is never unloaded to make room",
    )
    prompt_cache_bytes: int = Field(64 * 2**20, ge=0)
    image_threads: int = Field(2, ge=1)
    lease_s: float = Field(5, gt=0)
    result_ttl_s: float = Field(600, gt=0, description="how long answers are kept after their end")
    keep_previous_s: float = Field(300, ge=0)
    swap_timeout_s: float = Field(120, gt=0)
    poll_s: float = Field(0.5, gt=0)
    drain_s: float = Field(30, ge=0, description="how long a stopping worker finishes what it claimed")
    steps_log: Path | None = Field(None, description="a file that gets one JSON line per engine call, for benches")
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(0, ge=0, le=65535, description="0 means none")
    log_level: LogLevel = "info"


class GcSettings(BaseSettings):
    """What `fewstep gc` keeps. `GC_GRACE_S=86400` and so on."""

    model_config = SettingsConfigDict(env_prefix="GC_", frozen=True, extra="forbid")

    cache_dir: Path | None = Field(None, description="an engine cache of workers; none: caches are left alone")
    cache_bytes: int = Field(20 * 2**30, ge=0, description="of cache_dir, as WORKER_CACHE_BYTES")
    grace_s: float = Field(24 * 3600, ge=3600, description="what is younger stays: somebody may refer to it soon")
    keep_revisions: int = Field(10, ge=2, description="of each deployment, whose students stay")
    checkpoints_s: float = Field(7 * 24 * 3600, ge=0, description="how long checkpoints outlive the end of their job")
    unused_students_s: float | None = Field(
        None, ge=0, description="how long a student that nothing refers to is kept; none: until it is named"
    )


def load(cls: type[AnySettings], environ: Mapping[str, str] | None = None, **given: Any) -> AnySettings:
    """The settings of one process; `given` (command-line options) wins over the environment.

    Raises:
        InvalidRequest: a variable with our prefix that we do not know, or a value that is not allowed.
    """
    prefix = str(cls.model_config.get("env_prefix", ""))
    known = {f"{prefix}{field}".upper() for field in cls.model_fields}
    names = os.environ if environ is None else environ
    unknown = sorted(
        name for name in names if name.startswith(prefix) and name not in known and not _SERVICE_LINK.search(name)
    )
    if unknown:
        raise InvalidRequest(f"unknown settings {', '.join(unknown)}: known are {', '.join(sorted(known))}")
    try:
        return cls(**given)
    except ValidationError as error:
        raise InvalidRequest(_first_fault(error, prefix)) from error


def redacted(settings: BaseSettings) -> dict[str, Any]:
    """The settings as they may be logged: secrets as stars, addresses without their passwords."""
    dumped = settings.model_dump(mode="json")
    return {name: _without_password(value) if "://" in str(value) else value for name, value in dumped.items()}


def _first_fault(error: ValidationError, prefix: str) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    name = f"{prefix}{'.'.join(map(str, first['loc']))}".upper() if first["loc"] else f"{prefix}*"
    return f"{name}: {first['msg']}"


def _without_password(url: str) -> str:
    return _IN_QUERY.sub(rf"\1{_STARS}", _IN_LOGIN.sub(rf"\1{_STARS}@", url))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

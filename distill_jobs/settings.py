"""What a distiller can be told, from DISTILLER_* variables. Built once by its composition root and passed down."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class DistillerSettings(BaseSettings):
    """One distiller: it works on one job at a time."""

    model_config = SettingsConfigDict(env_prefix="DISTILLER_", frozen=True, extra="forbid")

    redis_url: str = Field(description="redis://…, where jobs are queued")
    registry_url: str = Field(description="a folder with students, deployments and jobs")
    work_dir: Path = Field(Path(".fewstep/work"), description="caches that can be made again")
    data_dir: Path | None = Field(
        None, description="folders that jobs may name: pictures as data.images, feature networks as eval.networks"
    )
    threads: int = Field(1, ge=1, description="of the trainer; one beside live traffic")
    nice: int = Field(10, ge=0, le=19, description="of the trainer")
    backend: str = Field("auto", description="the engine on which the gate judges; the workers' own")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    max_processes: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, description="of one trainer; jobs that ask for more fail"
    )
    lease_s: float = Field(30.0, gt=0)
    poll_s: float = Field(0.5, gt=0, description="how often an idle distiller looks for a job")
    launcher: str = Field("process", description="where trainers run: a file of distill_jobs/launchers")
    job_template: Path | None = Field(
        None, description="kubernetes: a Job as JSON, which says where and how trainers run; resources of one process"
    )
    processes_per_pod: int = Field(1, ge=1, description="kubernetes: at most; a job of more spreads over several pods")
    kubernetes_url: str = "https://kubernetes.default.svc"
    kubernetes_account: Path = Field(
        Path("/var/run/secrets/kubernetes.io/serviceaccount"), description="with namespace, token and ca.crt"
    )
    kubernetes_pod: str = Field("", description="the distiller's own; its Jobs go with what made it, a StatefulSet")
    kubernetes_poll_s: float = Field(2.0, gt=0, description="how often a Job is looked after")
    max_tries: int = Field(3, ge=1, description="deaths of the trainer without progress before a job fails")
    swap_timeout_s: float = Field(180.0, gt=0, description="how long a job waits for its student to go live")
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(0, ge=0, le=65535, description="0 means none")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

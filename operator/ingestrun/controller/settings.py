"""The operator's settings: environment variables that begin with INGESTRUN_, each with a default."""

from __future__ import annotations

import os
import socket
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ingestrun.planner.run.fair_sharing import JobLimits

LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """How this replica runs. What concerns one run alone stands in its spec."""

    model_config = SettingsConfigDict(env_prefix="INGESTRUN_", extra="ignore")

    worker_image: Annotated[str, Field(min_length=1)] = "ingestrun/worker:0.1.0"
    """The image of the built-in source, hooks and sink."""
    worker_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    namespaces: Annotated[str, NoDecode] = ""
    """The namespaces to watch, by commas; empty: all of the cluster."""
    lease_name: str = "ingestrun-operator"
    lease_namespace: str = "ingestrun-system"
    health_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Where /healthz and /readyz answer; 0: nowhere."""
    api_url: Annotated[str, Field(pattern=r"^(https?://[^/?#@\s]+(/[^?#@\s]*)?)?$")] = ""
    """Where pods reach the cancellation check: http://ingestrun-operator.ingestrun-system.svc:8090; empty: no check."""
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8090
    """Where the cancellation check answers, if `api_url` is set; 0: nowhere."""
    log_format: LogFormat | None = None
    """Unset: `json`, with --dev `console`."""
    log_level: LogLevel = "info"
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 64
    """How many runs are looked at side by side."""
    max_jobs_per_run: Annotated[int, Field(ge=0)] = 0
    """How many unfinished Jobs one run may have; 0: as many as its `parallelism` (at most 100) makes."""
    max_jobs_per_namespace: Annotated[int, Field(ge=0)] = 0
    """How many unfinished Jobs the runs of one namespace may have together; 0: no limit, its ResourceQuota has one."""
    max_jobs: Annotated[int, Field(ge=0)] = 500
    """How many unfinished Jobs all runs may have together, shared fairly; 0: no limit.

    500 pods are what five nodes hold by default (110 each), and a Job controller starts them within seconds.
    """
    resync_seconds: Annotated[int, Field(ge=1, le=86_400)] = 300
    """How often all runs are listed, for what the watches have missed."""

    @property
    def caps(self) -> JobLimits:
        """The limits on unfinished Jobs."""
        return JobLimits(per_run=self.max_jobs_per_run, per_namespace=self.max_jobs_per_namespace, in_all=self.max_jobs)

    @property
    def namespace_list(self) -> list[str]:
        """The namespaces to watch; empty: all."""
        return [part.strip() for part in self.namespaces.split(",") if part.strip()]


def instance_name() -> str:
    """Who this replica is, in the Lease and in Events: the pod's name, or the host's with the process id."""
    return os.environ.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}"

"""The operator's settings: environment variables that begin with INGESTRUN_, each with a default."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ingestrun import __version__
from ingestrun.planner.jobs.manifest import POD_USER
from ingestrun.planner.run.fair_sharing import JobLimits

Tls = Literal["own", "files", "off"]
LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """Settings of this replica. The settings of a single run are in its spec."""

    model_config = SettingsConfigDict(env_prefix="INGESTRUN_", extra="ignore")

    worker_image: Annotated[str, Field(min_length=1)] = f"ingestrun/worker:{__version__}"
    """The image of the built-in source, hooks and sink."""
    worker_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pod_user: Annotated[int, Field(ge=1, le=2**31 - 1)] | Literal[""] = POD_USER
    """User, group and file group of the pods whose run has no `podTemplate.securityContext`; empty: the platform's."""
    namespaces: Annotated[str, NoDecode] = ""
    """The namespaces to watch, separated by commas; empty: all of the cluster."""
    lease_name: str = "ingestrun-operator"
    lease_namespace: str = "ingestrun-system"
    health_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port of /healthz and /readyz; 0: none."""
    api_url: Annotated[str, Field(pattern=r"^(https?://[^/?#@\s]+(/[^?#@\s]*)?)?$")] = ""
    """URL of the HTTP API for pods: https://ingestrun-operator.ingestrun-system.svc:8090; empty: the API is not served.

    With `api_tls: own` the certificate is for its host.
    """
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8090
    """Port of the HTTP API, if `api_url` is set; 0: none."""
    api_tls: Tls | None = None
    """TLS of the HTTP API; unset: `own`, with --dev `off`.

    `own`: by certificates that the operator makes and rotates. `files`: by those in `api_tls_dir`. `off`: plain HTTP,
    which shows tokens to whoever sees the network.
    """
    api_tls_dir: Path = Path("/etc/ingestrun/tls")
    """With `api_tls: files` the folder with tls.crt, tls.key and, unless pods know the CA, ca.crt: a Secret as
    cert-manager fills it, mounted."""
    api_rate: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Requests a second that one caller may make of the HTTP API for people; at once, five times as many.

    Bad tokens of one address: a fortieth.
    """
    log_format: LogFormat | None = None
    """Format of the log; unset: `json`, with --dev `console`."""
    log_level: LogLevel = "info"
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 64
    """Number of runs that are reconciled side by side."""
    max_jobs_per_run: Annotated[int, Field(ge=0)] = 0
    """Most unfinished Jobs of one run; 0: only its `parallelism` (at most 100) limits them."""
    max_jobs_per_namespace: Annotated[int, Field(ge=0)] = 0
    """Most unfinished Jobs of all runs of one namespace together; 0: no limit but its ResourceQuota."""
    max_jobs: Annotated[int, Field(ge=0)] = 500
    """Most unfinished Jobs of all runs together, shared fairly; 0: no limit.

    Five nodes hold 500 pods by default (110 each), and a Job controller starts them within seconds.
    """
    resync_seconds: Annotated[int, Field(ge=1, le=86_400)] = 300
    """Interval at which all runs are listed, to find changes that the watches have missed."""

    @model_validator(mode="after")
    def _url_speaks_tls(self) -> Self:
        """Refuse a URL by which no pod could reach the server."""
        if self.api_tls in ("own", "files") and self.api_url.startswith("http://"):
            raise ValueError("INGESTRUN_API_URL is http://, and the server speaks TLS: make it https://")
        return self

    @property
    def caps(self) -> JobLimits:
        """Return the limits on unfinished Jobs."""
        return JobLimits(per_run=self.max_jobs_per_run, per_namespace=self.max_jobs_per_namespace, in_all=self.max_jobs)

    @property
    def namespace_list(self) -> list[str]:
        """Return the namespaces to watch; empty: all."""
        return [part.strip() for part in self.namespaces.split(",") if part.strip()]


def instance_name() -> str:
    """Return this replica's identity in the Lease and in Events: the pod's name, or the host's with the process id."""
    return os.environ.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}"

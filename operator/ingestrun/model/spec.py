"""`spec` of an IngestRun. The CRD (crds/ingestruns.yaml) is written by hand; a test compares it with these models."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, model_validator

from ingestrun.model.base import KubeModel
from ingestrun.model.resume import ResumeFrom
from ingestrun.model.size_budget import MAX_FAILED_BATCHES, MAX_PARALLELISM
from ingestrun.model.stages import Resources, Seconds, StageSettings
from ingestrun.model.worker import SecretKeySelector, Sink, Source, Validate, exactly_one

DnsLabel = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
ObjectName = Annotated[
    str, StringConstraints(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
]

MAX_PARTITIONS = 1_000_000
MAX_KEPT_BATCHES = 20
"""Most failed batches whose Jobs can be kept; each may have a Job for every stage and attempt."""


class OnBatchFailure(StrEnum):
    """The effect on the run when a batch has failed for good."""

    FAIL_RUN = "FailRun"
    CONTINUE = "Continue"


class ConfigMapKeySelector(KubeModel):
    """A key of a ConfigMap in the run's namespace."""

    name: ObjectName
    key: Annotated[str, StringConstraints(min_length=1, max_length=253)]


class EnvVarSource(KubeModel):
    """The source of a variable's value; exactly one."""

    secret_key_ref: SecretKeySelector | None = None
    config_map_key_ref: ConfigMapKeySelector | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        exactly_one(self, "secret_key_ref", "config_map_key_ref")
        return self


class EnvVar(KubeModel):
    """A variable of a container; names that begin with INGEST_ belong to the contract."""

    name: Annotated[str, StringConstraints(max_length=253, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: Annotated[str, StringConstraints(max_length=4096)] | None = None
    value_from: EnvVarSource | None = None


class LocalObjectReference(KubeModel):
    """An object of the run's namespace, by name."""

    name: ObjectName


class EnvFromSource(KubeModel):
    """All keys of a Secret or a ConfigMap as variables; exactly one."""

    secret_ref: LocalObjectReference | None = None
    config_map_ref: LocalObjectReference | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        exactly_one(self, "secret_ref", "config_map_ref")
        return self


class Container(StageSettings):
    """A stage that runs an image of the user, under the container contract v1 (docs/contract.md)."""

    image: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    image_pull_policy: Annotated[str, StringConstraints(pattern=r"^(Always|IfNotPresent|Never)$")] | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    env: list[EnvVar] = []
    env_from: list[EnvFromSource] = []


class Hook(StageSettings):
    """A stage between fetch and publish: the built-in `validate`, or a `container`."""

    name: DnsLabel
    validate_: Annotated[Validate | None, Field(alias="validate")] = None
    container: Container | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        exactly_one(self, "validate_", "container")
        return self


UserId = Annotated[int, Field(ge=1, le=2**31 - 1)]
GroupId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class SELinuxOptions(KubeModel):
    """The SELinux context of the pods, as far as pod security `restricted` allows one to be set."""

    level: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = None
    type: (
        Annotated[
            str, StringConstraints(pattern=r"^(container_t|container_init_t|container_kvm_t|container_engine_t)$")
        ]
        | None
    ) = None


class PodSecurityContext(KubeModel):
    """Users and groups of the pods. It replaces the default as a whole: what is unset, the platform chooses."""

    run_as_user: UserId | None = None
    run_as_group: GroupId | None = None
    fs_group: GroupId | None = None
    fs_group_change_policy: Annotated[str, StringConstraints(pattern=r"^(Always|OnRootMismatch)$")] | None = None
    supplemental_groups: Annotated[list[GroupId], Field(max_length=32)] = []
    se_linux_options: SELinuxOptions | None = None


class PodTemplate(KubeModel):
    """Settings that the pods of all stages share."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    service_account_name: ObjectName | None = None
    security_context: PodSecurityContext | None = None
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    image_pull_secrets: list[LocalObjectReference] = []
    priority_class_name: ObjectName | None = None
    volumes: list[dict[str, Any]] = []
    volume_mounts: list[dict[str, Any]] = []


class PersistentVolumeClaimSource(KubeModel):
    """A claim in the run's namespace."""

    claim_name: ObjectName


class Workspace(KubeModel):
    """The volume on which stages hand data on."""

    persistent_volume_claim: PersistentVolumeClaimSource


class CursorBatches(KubeModel):
    """A cursor chain: batch n+1 starts from the cursor that n's fetch returned."""

    start: Annotated[str, StringConstraints(max_length=512)] = ""


class Partitions(KubeModel):
    """A list of partitions, or only their number; exactly one. A long list is in a file, and its number here."""

    count: Annotated[int, Field(ge=1, le=MAX_PARTITIONS)] | None = None
    values: (
        Annotated[
            list[Annotated[str, StringConstraints(min_length=1, max_length=128)]],
            Field(min_length=1, max_length=1000),
        ]
        | None
    ) = None
    file: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        exactly_one(self, "count", "values")
        if self.file is not None and self.count is None:
            raise ValueError("file goes together with count")
        return self

    @property
    def total(self) -> int:
        """Return the number of partitions."""
        return len(self.values) if self.values is not None else self.count or 0


class Batches(KubeModel):
    """The division of the source into batches; exactly one of `cursor` and `partitions`."""

    cursor: CursorBatches | None = None
    partitions: Partitions | None = None
    size: Annotated[int, Field(ge=1, le=100_000_000)] = 10_000
    limit: Annotated[int, Field(ge=1, le=2**53)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        exactly_one(self, "cursor", "partitions")
        return self


class Backoff(KubeModel):
    """The seconds before a retry: they double from `initialSeconds` up to `maxSeconds`, with jitter."""

    initial_seconds: Annotated[int, Field(ge=0, le=86_400)] = 10
    max_seconds: Annotated[int, Field(ge=0, le=86_400)] = 600


class Backpressure(KubeModel):
    """The reaction to a cluster without room: try again every `retrySeconds`, fail after `timeoutSeconds`."""

    retry_seconds: Annotated[int, Field(ge=1, le=3600)] = 60
    timeout_seconds: Seconds | None = None


class PodStart(KubeModel):
    """The time that a pod may wait for its start, by what keeps it from starting, before its batch has failed.

    `infrastructureSeconds` unset is the stage's own deadline, after which the stage is tried again.
    """

    image_pull_seconds: Seconds = 120
    configuration_seconds: Seconds = 120
    refused_seconds: Seconds = 120
    infrastructure_seconds: Seconds | None = None


class JobRetention(KubeModel):
    """The retention of child Jobs and their pods after their batch has been counted."""

    failed_batches: Annotated[int, Field(ge=0, le=MAX_KEPT_BATCHES)] = 3
    seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None


class OutOfMemory(KubeModel):
    """The retries of a stage that is killed for memory: each has twice the limit of the last, up to `maxMemory`.

    With `retries` 0 such a stage is not retried at all; then `maxMemory` is unset.
    """

    retries: Annotated[int, Field(ge=0, le=10)] = 3
    max_memory: str | int | None = None


class ExecutionMode(StrEnum):
    """The way in which batches are run."""

    POOL = "Pool"
    """Workers claim batches, and take each through all its stages in one process."""
    JOB_PER_STAGE = "JobPerStage"


class Execution(KubeModel):
    """The way in which batches are run; all but `mode` is of a pool. `workers` unset: as many as `parallelism`."""

    mode: ExecutionMode = ExecutionMode.JOB_PER_STAGE
    workers: Annotated[int, Field(ge=1, le=MAX_PARALLELISM)] | None = None
    max_batches_per_worker: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    resources: Resources | None = None


class CancellationPolicy(StrEnum):
    """The effect of a cancel on pods that have started."""

    DRAIN = "Drain"
    TERMINATE = "Terminate"


class Cancellation(KubeModel):
    """The reason and the policy of a cancel. If no policy is set it is `Drain`: pods that have started may finish."""

    reason: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    policy: CancellationPolicy | None = None
    grace_period_seconds: Annotated[int, Field(ge=0, le=86_400)] | None = None
    cascade: bool = False


class ConcurrencyPolicy(StrEnum):
    """The treatment of older active runs of the same key, with the values of a CronJob's `concurrencyPolicy`."""

    ALLOW = "Allow"
    FORBID = "Forbid"
    REPLACE = "Replace"


class Concurrency(KubeModel):
    """The rule for being active together with other runs of the namespace that have the same `key`."""

    key: Annotated[
        str, StringConstraints(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?$")
    ]
    policy: ConcurrencyPolicy = ConcurrencyPolicy.ALLOW


class ParentReference(KubeModel):
    """The run that started this one, in the same namespace."""

    name: ObjectName


class IngestRunSpec(KubeModel):
    """The desired ingestion: source, stages, and settings of their execution."""

    cancel: bool = False
    cancellation: Cancellation = Cancellation()
    suspend: bool = False
    source: Source | None = None
    fetch: Container | None = None
    hooks: Annotated[list[Hook], Field(max_length=16)] = []
    sink: Sink | None = None
    publish: Container | None = None
    pod_template: PodTemplate = PodTemplate()
    workspace: Workspace | None = None
    execution: Execution = Execution()
    batches: Batches
    parallelism: Annotated[int, Field(ge=1, le=MAX_PARALLELISM)] = 4
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    backoff: Backoff = Backoff()
    out_of_memory: OutOfMemory | None = None
    on_batch_failure: OnBatchFailure = OnBatchFailure.FAIL_RUN
    max_failed_batches: Annotated[int, Field(ge=1, le=MAX_FAILED_BATCHES)] | None = None
    backpressure: Backpressure = Backpressure()
    pod_start: PodStart = PodStart()
    active_deadline_seconds: Seconds | None = None
    stale_after_seconds: Seconds | None = None
    concurrency: Concurrency | None = None
    job_retention: JobRetention = JobRetention()
    parent_ref: ParentReference | None = None
    resume_from: ResumeFrom | None = None
    on_cancel: Container | None = None
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None

    @model_validator(mode="after")
    def _each_stage_once(self) -> Self:
        exactly_one(self, "source", "fetch")
        exactly_one(self, "sink", "publish")
        return self

    @property
    def pooled(self) -> bool:
        """Tell whether a pool of workers runs the batches."""
        return self.execution.mode is ExecutionMode.POOL

    @property
    def max_workers(self) -> int:
        """Return the most workers that a pool has."""
        return min(self.parallelism, self.execution.workers or self.parallelism)

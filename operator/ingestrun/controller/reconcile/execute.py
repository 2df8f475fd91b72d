"""Asking the API server for a Job, and what it means when it does not take one."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog

from ingestrun.controller.state.cache import RunCache
from ingestrun.kube.errors import (
    AlreadyExists,
    Denied,
    Forbidden,
    Invalid,
    NamespaceTerminating,
    NotFound,
    QuotaExceeded,
    Unknown,
    WebhookUnavailable,
)
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import CreateJob, CreateRejection
from ingestrun.planner.batch.attempt import read_job
from ingestrun.planner.batch.failure_policy import FailureAction, rule_of
from ingestrun.planner.jobs.manifest import CheckEndpointFor, WorkerImage, adoptable, job_manifest

logger = structlog.get_logger("ingestrun")


class JobCreator:
    """Creates Jobs one by one, and remembers what was refused: nothing that a restart may not lose."""

    def __init__(
        self,
        cluster: Cluster,
        store: RunCache,
        *,
        worker: WorkerImage,
        check: CheckEndpointFor | None,
        clock: Callable[[], datetime],
        must_read: Callable[[RunKey], None],
    ) -> None:
        """`must_read` is told of a run that has to be read anew before the next plan."""
        self._cluster = cluster
        self._store = store
        self._worker = worker
        self._check = check
        self._clock = clock
        self._must_read = must_read
        self._refusals: dict[str, CreateRejection] = {}
        self._answered: dict[str, bool] = {}

    def observe(self, run: IngestRun) -> None:
        """A run is seen, perhaps for the first time by this process.

        A claim is stored before its first create is sent: first seen without one, a run has no creates but ours.
        """
        self._answered.setdefault(run.metadata.uid, not run.status.batches.claimed)

    def has_unanswered_create(self, uid: str) -> bool:
        """Whether a create of the run may still arrive: one whose answer was lost, or another process's."""
        return not self._answered[uid]

    def rejection(self, uid: str) -> CreateRejection | None:
        """Why the last Job of the run was not taken, if none has been since."""
        return self._refusals.get(uid)

    def restore_rejection(self, uid: str, refusal: CreateRejection) -> None:
        """Take what an earlier process was told, unless this one knows better."""
        self._refusals.setdefault(uid, refusal)

    def forget(self, uid: str) -> None:
        """Drop all that is kept of a run."""
        self._refusals.pop(uid, None)
        self._answered.pop(uid, None)

    async def create(self, key: RunKey, run: IngestRun, create: CreateJob) -> bool:
        """Create a Job, or adopt the one that an earlier try has left.

        Returns False when the pass has to start over. Raises KubeError when the server could not be asked.
        """
        uid, start = run.metadata.uid, create.start
        check = self._check(run, start.step.deadline_seconds) if self._check is not None else None
        manifest = job_manifest(run, create, worker=self._worker, check=check)
        name = manifest["metadata"]["name"]
        try:
            try:
                job = await self._cluster.create_job(manifest)
            except AlreadyExists:
                job = await self._cluster.get_job(namespace=run.metadata.namespace, name=name)
                if not adoptable(run, create, job):
                    self._refuse(run, "NameTaken", f"a Job {name} exists that is not of this run: delete it")
                    return False
        except QuotaExceeded as error:
            until = self._refuse(run, "QuotaExceeded", _without_name(str(error), name))
            self._store.usage.quota_refused(key.namespace, self._refusals[uid].message, until=until)
            return False
        except Denied as error:
            self._refuse(run, "AdmissionDenied", f"batch {start.batch}, {start.step.label}: {error}")
            return False
        except Forbidden as error:
            self._refuse(run, "Forbidden", f"the operator lacks a right that an administrator has to grant: {error}")
            return False
        except Invalid as error:
            self._refuse(run, "JobRefused", f"batch {start.batch}, {start.step.label}: {error}")
            return False
        except NamespaceTerminating:
            namespace = run.metadata.namespace
            self._refuse(
                run, "NamespaceTerminating", f"namespace {namespace} is being deleted: nothing can start there"
            )
            return False
        except WebhookUnavailable as error:
            self._refuse(run, "WebhookUnavailable", str(error))
            return False
        except Unknown:
            self._answered[uid] = False
            self._store.usage.mark_unanswered(uid, name)
            self._store.invalidate(uid)
            raise
        except NotFound:
            # The namespace is gone, or the adopted Job went meanwhile: look again from the start.
            self._must_read(key)
            raise
        except BaseException:
            self._answered[uid] = False
            raise
        self._store.upsert_job(read_job(job))
        self._store.usage.job_admitted(key.namespace)
        logger.info(
            "job created", run=run.metadata.name, namespace=run.metadata.namespace, uid=uid, batch=start.batch,
            stage=start.step.label, attempt=start.attempt, job=name,
            **({"memory": str(start.memory)} if start.memory is not None else {}),
        )  # fmt: skip
        # The first Job after a refusal: there is room again, and the plan may be a larger one.
        return self._refusals.pop(uid, None) is None

    def _refuse(self, run: IngestRun, reason: str, message: str) -> datetime:
        """Remember that the server would not take a Job; the next round says so. Returns when to ask again."""
        wait = run.spec.backpressure.retry_seconds * random.uniform(0.9, 1.1)  # noqa: S311  (jitter, no secret)
        retry_at = self._clock() + timedelta(seconds=wait)
        self._refusals[run.metadata.uid] = CreateRejection(
            reason=reason,
            message=message,
            retry_at=retry_at,
            permanent=rule_of(reason).action is FailureAction.FAIL_RUN,
        )
        logger.warning(
            "job refused", run=run.metadata.name, namespace=run.metadata.namespace, uid=run.metadata.uid,
            reason=reason, why=message,
        )  # fmt: skip
        return retry_at


def _without_name(message: str, name: str) -> str:
    """The server's sentence without the Job's name in it: the same for each Job, so that a status need not change."""
    return message.replace(f'"{name}" ', "")

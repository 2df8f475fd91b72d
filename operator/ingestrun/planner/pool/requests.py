"""Requests of a pool's workers, and the answers that a plan gives to them."""

from __future__ import annotations

from dataclasses import dataclass

from ingestrun.model.pool import (
    ClaimAnswer,
    ClaimRequest,
    Fetched,
    FetchedAnswer,
    FetchedRequest,
    PublishAnswer,
    PublishRequest,
    Report,
)


@dataclass(frozen=True, slots=True)
class Replaced:
    """Answer to a worker that is not one of the run's any more."""

    message: str


Request = ClaimRequest | FetchedRequest | PublishRequest
Answer = ClaimAnswer | FetchedAnswer | PublishAnswer | Replaced


@dataclass(frozen=True, slots=True, eq=False)
class WorkerRequest:
    """Request that waits for its answer. Two are never equal, because a worker may repeat one."""

    worker: int
    """The number of the worker that asks, by its token."""
    body: Request

    @property
    def reports(self) -> tuple[Report, ...]:
        """Return the ended attempts that it reports."""
        return self.body.reports if isinstance(self.body, ClaimRequest) else ()

    def fetched_of(self, batch: int, attempt: int) -> Fetched | None:
        """Return the result of the fetch that it has of this attempt, which goes on; None if it has none."""
        if isinstance(self.body, ClaimRequest) or (self.body.batch, self.body.attempt) != (batch, attempt):
            return None
        return self.body.fetched

"""An image that cannot be pulled: said at once, the verdict after a grace. It is the last file, as it waits longest."""

from __future__ import annotations

from tests.e2e.cluster import Kubectl, phase
from tests.e2e.runs import ended, events


def test_missing_image_is_said_then_fails_the_run(kubectl: Kubectl, namespace: str) -> None:
    """The run of `without_image`, begun with the session."""
    run = ended(kubectl, namespace, "no-image", seconds=480)
    assert phase(run) == "Failed"
    (failure,) = run["status"]["failures"]
    assert (failure["batch"], failure["stage"], failure["reason"]) == (0, "fetch", "ImagePull")
    assert "localhost/no-such-image:1" in failure["message"]
    (said,) = events(kubectl, namespace, "no-image", "PodNotStarting")
    assert "localhost/no-such-image:1" in said

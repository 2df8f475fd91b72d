"""A container's resources with more memory."""

from __future__ import annotations

from typing import Any

import pytest

from ingestrun.planner.batch.retry import with_memory_limit

GI = 2**30


@pytest.mark.parametrize(
    ("resources", "limit", "made"),
    [
        (
            {"requests": {"cpu": "100m", "memory": "192Mi"}, "limits": {"memory": "1Gi"}},
            2 * GI,
            {"requests": {"cpu": "100m", "memory": "384Mi"}, "limits": {"memory": "2Gi"}},
        ),
        (
            {"requests": {"memory": "1Gi"}, "limits": {"memory": "1Gi", "cpu": 1}},
            3 * GI // 2,
            {"requests": {"memory": "1536Mi"}, "limits": {"memory": "1536Mi", "cpu": 1}},
        ),
        ({"limits": {"memory": "1Gi"}}, 2 * GI, {"limits": {"memory": "2Gi"}}),
        ({"requests": {"memory": "1Gi"}}, 2 * GI, {"requests": {"memory": "1Gi"}, "limits": {"memory": "2Gi"}}),
        ({}, 2 * GI, {"limits": {"memory": "2Gi"}}),
        ({"limits": {"memory": "1024Mi"}}, GI, {"limits": {"memory": "1024Mi"}}),
        ({"requests": {"cpu": "1"}, "limits": {"memory": 1000}}, 2001,
         {"requests": {"cpu": "1"}, "limits": {"memory": "2001"}}),
    ],
)  # fmt: skip
def test_request_grows_in_proportion(resources: dict[str, Any], limit: int, made: dict[str, Any]) -> None:
    before = repr(resources)
    assert with_memory_limit(resources, limit) == made
    assert repr(resources) == before

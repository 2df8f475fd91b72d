"""The configuration of a step fits into a variable of a process, or the run says which field is too large for it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from tests.fakes.world import World, environment, manifest

from ingestrun.model.contract import CONFIG_MAX_BYTES, ENV_CONFIG, MAX_VARIABLE_BYTES
from ingestrun.model.spec import IngestRunSpec
from ingestrun.planner.batch.pipeline import config_refusal, steps_of

READ = "import os; print(len(os.environb[b'INGEST_CONFIG']))"


def spec_of(params: dict[str, str], **more: Any) -> dict[str, Any]:
    return {
        "fetch": None,
        "source": {"http": {"url": "http://nowhere.example/x", "params": params, "pagination": {"page": {}}}},
        "workspace": {"persistentVolumeClaim": {"claimName": "ingest"}},
        "hooks": [],
        **more,
    }


def read(spec: dict[str, Any]) -> IngestRunSpec:
    return IngestRunSpec.model_validate(manifest(**spec)["spec"])


def config_of(params: dict[str, str]) -> str:
    return steps_of(read(spec_of(params)))[0].config or ""


def params_of(size: int) -> dict[str, str]:
    """Parameters whose source has that many bytes as JSON, some of them in letters of several bytes."""
    params = {"q": "ü" * 500, **{f"p{n}": "x" * 2000 for n in range(60)}}
    left = size - len(config_of({**params, "rest": ""}).encode())
    return {**params, "rest": "x" * left}


@pytest.mark.parametrize("excess", [-1024, 0])
def test_what_is_not_refused_can_be_given_to_a_process(excess: int) -> None:
    params = params_of(CONFIG_MAX_BYTES + excess)
    config = config_of(params)
    assert len(config.encode()) == CONFIG_MAX_BYTES + excess
    assert config_refusal(steps_of(read(spec_of(params)))) is None
    done = subprocess.run([sys.executable, "-c", READ], env={ENV_CONFIG: config}, capture_output=True, check=True)
    assert int(done.stdout) == len(config.encode())


def test_what_is_refused_can_be_given_to_none() -> None:
    params = params_of(CONFIG_MAX_BYTES + 1)
    assert len(f"{ENV_CONFIG}={config_of(params)}\0".encode()) == MAX_VARIABLE_BYTES + 1
    with pytest.raises(OSError, match="Argument list too long"):
        subprocess.run([sys.executable, "-c", READ], env={ENV_CONFIG: config_of(params)}, check=True)
    assert config_refusal(steps_of(read(spec_of(params)))) == (
        "spec.source.http.params is too large: as JSON, spec.source has 131058 bytes, and a container can be given "
        "131057 at most (INGEST_CONFIG)"
    )


def test_the_field_of_a_hook_is_named() -> None:
    """Names that the CRD lets pass by their characters have up to four bytes each, and control characters six."""
    columns = [{"name": f"{n:03d}" + "\x01" * 120} for n in range(256)]
    spec = spec_of(
        {}, hooks=[{"name": "a", "container": {"image": "a"}}, {"name": "b", "validate": {"columns": columns}}]
    )
    refusal = config_refusal(steps_of(read(spec)))
    assert refusal is not None
    assert refusal.startswith("spec.hooks[1].validate.columns is too large: as JSON, spec.hooks[1] has ")


async def test_such_a_run_fails_before_it_has_begun() -> None:
    world = World()
    world.create(**spec_of(params_of(CONFIG_MAX_BYTES + 1)))
    await world.play()
    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] == "InvalidSpec"
    assert world.condition("Succeeded")["message"].startswith("spec.source.http.params is too large")
    assert world.cluster.calls("create", "jobs") == []
    assert world.condition("Drained")["status"] == "True"


async def test_such_a_run_can_be_cancelled_first() -> None:
    world = World()
    world.create(**spec_of(params_of(CONFIG_MAX_BYTES + 1)), cancel=True)
    await world.play()
    assert world.phase == "Cancelled"


async def test_the_variable_is_what_was_measured() -> None:
    """Kubernetes expands what stands doubled in the Job, so it is not the manifest's text that counts."""
    world = World()
    params = params_of(CONFIG_MAX_BYTES - 4000)
    world.create(**spec_of({**params, "dollars": "$(A)" * 400}))
    await world.settle()
    (fetch,) = world.active_jobs()
    assert environment(fetch)[ENV_CONFIG] == config_of({**params, "dollars": "$(A)" * 400})

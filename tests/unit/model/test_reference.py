"""docs/reference.md is what dev/hack/reference.py makes of the CRD."""

from __future__ import annotations

import runpy
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[3]


def test_the_reference_is_up_to_date() -> None:
    render = runpy.run_path(str(REPOSITORY / "dev" / "hack" / "reference.py"))["render"]
    crd = yaml.safe_load((REPOSITORY / "crds" / "ingestruns.yaml").read_text())

    page = (REPOSITORY / "docs" / "reference.md").read_text()

    assert page == render(crd), "run `python dev/hack/reference.py`"


def test_the_reference_has_every_field() -> None:
    page = (REPOSITORY / "docs" / "reference.md").read_text()

    for field in (
        "cancel",
        "hooks[].validate.columns[].minimum",
        "fetch.env[].valueFrom.secretKeyRef.key",
        "batches.size",
    ):
        assert f"`{field}`" in page

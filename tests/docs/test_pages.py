"""What stands in the documents works as it stands: each manifest is applied, each command run, its output compared.

Manifests and parts of them are applied by a dry run at the API server. Commands are run in order, a namespace a page,
against the deployed operator; what they print is compared word by word, but for what is another each time (`PASSING`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import yaml

from ingestrun.model.contract import parse_result
from tests.docs.blocks import PAGES, ROOT, Block, blocks
from tests.docs.conftest import Shell
from tests.e2e.cluster import Json, wait_for

SAMPLES: Final = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
PATIENCE_SECONDS: Final = 120
PASSING: Final[tuple[tuple[str, str], ...]] = (
    (r"\b\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)", "<time>"),
    (r"(?<=/import-)\d{4}-\d\d-\d\d\b", "<day>"),
    (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "<uid>"),
    (r"(?<![\w.])\d+[smhd](\d+[smh])?(?![\w.])", "<age>"),
    (r"(?<=-)[0-9a-f]{10}\b", "<hash>"),
    (r"\bsha256:[0-9a-f]{64}\b", "<digest>"),
    (r"[ \t]+", " "),
)
"""Times, UIDs, ages, the ends of Jobs' names and digests of images, as patterns with their placeholders, and the width
of columns, which follows the ages."""
LOOKING: Final = frozenset({"get", "events", "logs"})
"""The commands of kubectl that only look."""
REST: Final[Json] = {
    "source": {"files": {"path": "in/*.csv"}},
    "sink": {"parquet": {"path": "out"}},
    "workspace": {"persistentVolumeClaim": {"claimName": "ingest"}},
    "batches": {"cursor": {}},
}
"""A run's spec, to which a part of one is added."""


def plain(text: str, namespace: str = "default") -> list[str]:
    """The lines of an output with placeholders, in an order of their own: Events of one second come in any."""
    text = text.replace(namespace, "default")
    for pattern, placeholder in PASSING:
        text = re.sub(pattern, placeholder, text)
    return sorted(line.strip() for line in text.splitlines() if line.strip())


def run_with(part: Json) -> Json:
    """A whole run with this part of a spec."""
    spec = {**REST, **part}
    return {"apiVersion": "ingestrun.dev/v1alpha1", "kind": "IngestRun", "metadata": {"name": "part"}, "spec": spec}


def apply(shell: Shell, body: Json) -> None:
    """Create it by dry run, where no command of a page has made one of its name; unknown fields are refused."""
    shell("kubectl create -n default -f - --dry-run=server", stdin=json.dumps(body))


def check_yaml(shell: Shell, block: Block) -> None:
    """Apply a manifest, a part of a run's spec, or a kustomization."""
    body = block.body
    if "kind" in body:
        # "# ... the rest as in" another: a manifest that is not repeated.
        body["spec"] = {**REST, **body["spec"]} if "# ..." in block.text else body["spec"]
        apply(shell, body)
    elif "resources" in body or "patches" in body:
        file = shell.folder / "deploy" / "kustomization.yaml"
        file.parent.mkdir(exist_ok=True)
        before = yaml.safe_load(file.read_text()) if file.exists() and "resources" not in body else {}
        file.write_text(yaml.safe_dump({**before, **body}))
        shell("kubectl apply -k deploy --dry-run=server")
    else:
        apply(shell, run_with(body.get("spec", body)))


def check_commands(shell: Shell, block: Block) -> None:
    """Run the commands and compare what they print; what only looks is asked again until it shows."""
    for script in block.first:
        shell(script)
    for command, expected in block.steps:
        if not expected:
            shell(command, dry_run=block.dry_run)
            continue
        compare(shell, block, command, expected)


def only_looks(words: list[str]) -> bool:
    """Tell whether a command changes nothing, so that it can be asked again."""
    if words[1] == "ingestrun":
        return words[2] in ("list", "status", "explain", "tree", "history")
    return words[1] in LOOKING


def compare(shell: Shell, block: Block, command: str, expected: str) -> None:
    """Compare what a command prints; one that only looks is asked again until it shows what the page has."""
    looks = all(only_looks(part.split()) for part in command.split("#")[0].split(";"))
    printed: list[str] = []

    def same() -> bool:
        done = shell.run(command)
        printed.append(done.stdout + done.stderr)
        return plain(printed[-1], shell.namespace) == plain(expected) or not looks

    with contextlib.suppress(AssertionError):  # what it prints tells more
        wait_for(same, seconds=PATIENCE_SECONDS, what=command)
    told = f"{command}\nprints\n{printed[-1]}\nand the page has\n{expected}"
    assert plain(printed[-1], shell.namespace) == plain(expected), told


def check(shell: Shell, block: Block) -> None:
    """Hold a block to what it is."""
    if block.language == "yaml":
        check_yaml(shell, block)
    elif block.language == "json":
        parse_result(block.text)
    else:
        check_commands(shell, block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, shell_for: Callable[[str], Shell], record_property: Callable[[str, object], None]) -> None:
    shell: Shell | None = None
    for block in blocks(page):
        if block.reason is not None:
            record_property("not run", f"{block.place}: {block.reason}")
            continue
        shell = shell or shell_for(page.stem)
        try:
            check(shell, block)
        except Exception as error:
            raise AssertionError(f"{block.place}: {error}") from error


def test_samples_are_applied_side_by_side(shell_for: Callable[[str], Shell]) -> None:
    shell = shell_for("samples")
    printed = shell("kubectl apply -f manifests/samples/ --dry-run=server")
    assert printed.count(" created") == len(SAMPLES)


def test_samples_do_what_they_say(shell_for: Callable[[str], Shell]) -> None:
    """Those that name no image of a registry, or start nothing, and the commands in the comments of all."""
    shell = shell_for("samples-run")
    names = ("workspace", "http-to-parquet", "resume", "cancelled-in-git", "start-suspended")
    shell("".join(f"kubectl apply -f manifests/samples/{name}.yaml\n" for name in names))
    shell("phase archive Cancelled; phase backfill Suspended; phase earthquakes Running; phase earthquakes-2 Pending")
    waiting = "kubectl get ingestrun earthquakes-2 -o jsonpath='{.status.conditions[0].reason}'"
    shell(f'until_is WaitingForEnd "{waiting}"')
    for name in ("archive", "backfill"):
        assert shell(f"kubectl get jobs -l ingestrun.dev/run={name}") == ""
    commands = [command for path in SAMPLES for command in re.findall(r"^# +(kubectl .*)$", path.read_text(), re.M)]
    assert len(commands) >= 2
    for command in commands:
        shell(command, dry_run=True)
    assert shell("kubectl get ingestrun earthquakes -o jsonpath='{.spec.cancel}'") == "", "a dry run changes nothing"

"""The deployed operator and a place of its own for each page: a namespace, a folder, and a shell in both."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.docs.blocks import ROOT
from tests.e2e.cluster import Kubectl, wait_for
from tests.e2e.conftest import kubectl, operator

__all__ = ["kubectl", "operator"]

KUBECTL: Final = """#!/bin/sh
case "$DOCS_DRY_RUN $1" in "yes apply" | "yes create" | "yes patch") exec {kubectl} "$@" --dry-run=server ;; esac
exec {kubectl} "$@"
"""
PLUGIN: Final = """#!/bin/sh
PYTHONPATH={root}/operator exec {python} -m ingestrun.cli "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Shell:
    """bash with kubectl, in a copy of what the documents name, and with the page's namespace as the default one."""

    folder: Path
    namespace: str

    def __call__(self, script: str, *, dry_run: bool = False, stdin: str = "") -> str:
        """Run it; what it prints. Fails the test with what it complains of."""
        done = self.run(script, dry_run=dry_run, stdin=stdin)
        assert done.returncode == 0, f"{script}{done.stdout}{done.stderr}"
        return done.stdout

    def run(self, script: str, *, dry_run: bool = False, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run it, whatever comes of it."""
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.folder / "kubeconfig"),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "DOCS_DRY_RUN": "yes" if dry_run else "no",
            "BASH_ENV": str(ROOT / "tests" / "docs" / "shell.sh"),
        }
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def shell_for(
    kubectl: Kubectl,
    operator: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Shell]]:
    """A shell for a page; its namespace is deleted at the end, which is not waited for."""
    made: list[str] = []

    def shell(page: str) -> Shell:
        folder = tmp_path_factory.mktemp("docs")
        namespace = f"ingest-docs-{re.sub(r'[^a-z]', '', page.lower())}"
        for part in ("manifests", "crds", "tests/docs/runs"):
            shutil.copytree(ROOT / part, folder / part)
        config = yaml.safe_load(kubectl("config", "view", "--raw", "--minify", "--flatten"))
        config["contexts"][0]["context"]["namespace"] = namespace
        (folder / "kubeconfig").touch(mode=0o600)
        (folder / "kubeconfig").write_text(yaml.safe_dump(config))
        (folder / "bin").mkdir()
        programs = {
            "kubectl": KUBECTL.format(kubectl=shutil.which("kubectl")),
            "kubectl-ingestrun": PLUGIN.format(root=ROOT, python=sys.executable),
        }
        for name, script in programs.items():
            (folder / "bin" / name).write_text(script)
            (folder / "bin" / name).chmod(0o755)
        wait_for(lambda: _gone(kubectl, namespace), seconds=180, what=f"an earlier {namespace} to go")
        kubectl("create", "namespace", namespace)
        made.append(namespace)
        return Shell(folder=folder, namespace=namespace)

    yield shell
    if made:
        kubectl("delete", "namespace", *made, "--wait=false")


def _gone(kubectl: Kubectl, name: str) -> bool:
    found = kubectl("get", "namespace", name, "--ignore-not-found", "-o", "name").strip()
    if found:
        kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=false")
    return not found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the blocks that were left out, each with its reason."""
    left_out = [line for key, line in _properties(terminalreporter) if key == "not run"]
    if left_out:
        terminalreporter.section("blocks of the documents that are not run")
        for line in left_out:
            terminalreporter.line(line)


def _properties(reporter: pytest.TerminalReporter) -> Iterator[tuple[str, str]]:
    for report in reporter.getreports("passed"):
        for key, value in report.user_properties:
            yield key, str(value)

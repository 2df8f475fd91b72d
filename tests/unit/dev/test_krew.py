"""What krew installs: a manifest as krew expects it, and an archive that is the same each time and runs by itself."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import yaml
from dev.images.krew import TEMPLATE, filled, lay_out, packed

SEMVER = re.compile(r"v\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?")


def manifest(archive: bytes = b"archive") -> Any:
    return yaml.safe_load(filled(TEMPLATE.read_text(), "v1.2.3", "https://example.org/a.tar.gz", archive))


def test_the_manifest_has_the_form_that_krew_asks_for() -> None:
    """As krew validates a plugin (internal/index/validation), and as its index wants descriptions."""
    body = manifest()
    assert (body["apiVersion"], body["kind"]) == ("krew.googlecontainertools.github.com/v1alpha2", "Plugin")
    assert body["metadata"] == {"name": TEMPLATE.stem}, "krew looks a plugin up by its file's name"
    spec = body["spec"]
    assert SEMVER.fullmatch(spec["version"])
    assert 0 < len(spec["shortDescription"]) <= 50
    assert not spec["shortDescription"].endswith(".")
    assert spec["homepage"].startswith("https://")
    assert max(map(len, spec["description"].splitlines())) <= 120
    [platform] = spec["platforms"]
    assert platform.keys() == {"selector", "uri", "sha256", "bin"}
    [expression] = platform["selector"]["matchExpressions"]
    assert expression == {"key": "os", "operator": "In", "values": ["darwin", "linux"]}
    assert platform["bin"] == "kubectl-ingestrun"
    assert "@" not in str(body)


def test_the_manifest_has_the_checksum_of_the_archive() -> None:
    assert manifest(b"one")["spec"]["platforms"][0]["sha256"] == hashlib.sha256(b"one").hexdigest()


def fake_install(library: Path) -> None:
    """Put in place of the packages what shows which of them are left out."""
    for name in ("pykube/__init__.py", "pykube/fast.so", "pydantic/__init__.py", "pydantic-2.0.dist-info/METADATA"):
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (library / "typing_extensions.py").write_text("")


def test_the_archive_has_the_plugin_alone_and_nothing_compiled(tmp_path: Path) -> None:
    lay_out(tmp_path / "one", fake_install)
    lay_out(tmp_path / "two", fake_install)
    archive = packed(tmp_path / "one")
    assert archive == packed(tmp_path / "two")
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        modes = {entry.name: entry.mode for entry in found}
    assert modes["kubectl-ingestrun"] == 0o755
    assert {
        "LICENSE",
        "lib/pykube/__init__.py",
        "lib/ingestrun/cli/main.py",
        "lib/ingestrun/model/ranges.py",
    } <= modes.keys()
    unwanted = (
        "pydantic",
        "typing_extensions",
        "fast.so",
        "ingestrun/planner",
        "ingestrun/worker",
        "ingestrun/controller",
    )
    assert not [name for name in modes if any(part in name for part in unwanted)]


def test_the_archive_runs_by_itself_and_answers_for_completions_by_its_other_name(tmp_path: Path) -> None:
    lay_out(tmp_path / "plugin", lambda library: None)
    other = tmp_path / "kubectl_complete-ingestrun"
    other.symlink_to(tmp_path / "plugin" / "kubectl-ingestrun")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(program: Path, *words: str) -> str:
        done = subprocess.run([sys.executable, program, *words], env=clean, capture_output=True, text=True, check=True)
        return done.stdout

    assert call(tmp_path / "plugin" / "kubectl-ingestrun", "version").startswith("kubectl-ingestrun ")
    assert call(other, "canc").startswith("cancel\t")

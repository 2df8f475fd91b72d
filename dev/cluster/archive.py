"""Container images written without an engine, as docker-archive files: a root folder, a configuration, names.

An engine's `import` and `save` would each copy a root of hundreds of megabytes. Podman, docker and containerd all load
the same file.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dev.cluster.host import UserError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def image_config(layer_digest: str, arch: str, config: Mapping[str, object]) -> bytes:
    """Build the image's configuration, whose digest is the image's ID.

    It has no date, so equal content has an equal ID.
    """
    return json.dumps(
        {
            "architecture": arch,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "devcluster"}],
        },
        sort_keys=True,
    ).encode()


def write_archive(root: Path, out: Path, names: Sequence[str], arch: str, config: Mapping[str, object]) -> str:
    """Write `root` as a one-layer image under `names`; return the image's ID (a sha256)."""
    layer = out.with_suffix(".layer")
    digest = hashlib.sha256()
    command = ["tar", "--numeric-owner", "--sort=name", "-C", str(root), "-cf", "-", "."]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tar, layer.open("wb") as sink:
        while chunk := tar.stdout.read(1 << 20) if tar.stdout else b"":
            digest.update(chunk)
            sink.write(chunk)
    if tar.returncode != 0:
        raise UserError(f"Packing {root.name} failed: see what tar printed above.")
    blob = image_config(digest.hexdigest(), arch, config)
    image_id = hashlib.sha256(blob).hexdigest()
    manifest = [{"Config": f"{image_id}.json", "RepoTags": list(names), "Layers": [f"{digest.hexdigest()}.tar"]}]
    with tarfile.open(out, "w") as archive:
        for name, data in (("manifest.json", json.dumps(manifest).encode()), (f"{image_id}.json", blob)):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        archive.add(layer, f"{digest.hexdigest()}.tar")
    layer.unlink()
    return image_id

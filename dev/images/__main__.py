"""Build the images and bring them to a cluster: `python3 -m dev.images build|load|push|lock`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dev.cluster.host import Engine, UserError, check, find_engine, run
from dev.cluster.parts import Cache, content_hash, locked
from dev.cluster.progress import Progress
from dev.images import base
from dev.images.krew import make_archive
from dev.images.lock import make_locks
from dev.images.wheels import REQUIREMENTS, ROOT, Wheelhouse, own_sources, tool_python

BUILD = ROOT / "build"
ENV_FILE = BUILD / "images.env"
STATE = (ROOT / ".devcluster").resolve()
MB = 1_000_000


@dataclass(frozen=True)
class Image:
    """A target of the Dockerfile: its name in image references, its variable, the wheels it installs from."""

    target: str
    name: str
    variable: str
    lock: str
    files: Sequence[Path]
    """The source files in the image, beside the wheel of our package, which the operator and the worker have."""


IMAGES = (
    Image("operator", "ingestrun-operator", "OPERATOR_IMAGE", "operator", ()),
    Image("worker", "ingestrun-worker", "WORKER_IMAGE", "worker", ()),
    Image(
        "demo-source",
        "ingestrun-demo",
        "DEMO_IMAGE",
        "demo",
        (ROOT / "dev/demo/source_server.py", ROOT / "dev/demo/check_dataset.py"),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m dev.images", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build what has changed; write build/images.env and overlays")
    build.add_argument(
        "--base", default=os.environ.get("BASE") or None, help="the base image (default: public or made here)"
    )
    build.add_argument(
        "--prefix", default=os.environ.get("IMAGE_PREFIX") or "localhost/", help="what the names begin with"
    )
    commands.add_parser("load", help="load the images into the development cluster")
    commands.add_parser("push", help="push the images to the registry that the prefix names")
    lock = commands.add_parser("lock", help="make the lock files anew from pyproject.toml and requirements/*.in")
    lock.add_argument("--upgrade", action="store_true", help="take the newest versions, not those already locked")
    commands.add_parser("krew", help="make the archive and the manifest of the kubectl plugin in build/krew")
    given = parser.parse_args()
    progress = Progress()
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Cache(progress, cache_home / "ingestrun-images")
    try:
        if given.command == "lock":
            make_locks(cache, upgrade=given.upgrade)
        elif given.command == "build":
            build_all(cache, progress, given.base, given.prefix)
        elif given.command == "krew":
            make_archive(cache)
        elif given.command == "load":
            load(progress)
        else:
            push(progress)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def build_all(cache: Cache, progress: Progress, wanted_base: str | None, prefix: str) -> None:
    """Build each image whose inputs have changed, and print the images' names and sizes."""
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    engine = find_engine(STATE)
    with locked(cache.root / "locks" / f"build-{content_hash([str(ROOT)])}"):
        found = base.resolve(engine, cache, progress, wanted_base)
        names = {image: f"{prefix}{image.name}:{tag(image, found)}" for image in IMAGES}
        missing = [image for image in IMAGES if not base.present(engine, names[image])]
        if missing:
            lay_out(cache, found, missing)
            for image in missing:
                build_one(engine, progress, found, image, names[image])
                prune(engine, names[image].rpartition(":")[0])
        variables = {image.variable: names[image] for image in IMAGES}
        write_env(variables)
        write_overlays(variables)
    print_sizes(engine, found, list(names.values()))


def tag(image: Image, found: base.Base) -> str:
    """Return the hash of an image's inputs as its tag, so that new content has a new name and a rollout follows."""
    files = [ROOT / "Dockerfile", ROOT / "dev/images/install.py", REQUIREMENTS / f"{image.lock}.lock", *image.files]
    files += own_sources() if image.lock != "demo" else [REQUIREMENTS / "demo-data.lock"]
    inputs: list[str | Path] = [found.identity, image.target]
    for path in files:
        inputs += [str(path.relative_to(ROOT)), path]
    return content_hash(inputs)[:12]


def lay_out(cache: Cache, found: base.Base, images: Sequence[Image]) -> None:
    """Lay out the wheels of these images; the build tools come first, because all parts need them."""
    house = Wheelhouse(cache, found.target)
    tool_python(cache)
    parts = {}
    for image in images:
        parts[image.lock] = house.locked(image.lock)
        if image.lock == "demo":
            parts["demo-data"] = house.built("demo-data")
        else:
            parts["ingestrun"] = house.own()
    with ThreadPoolExecutor() as pool:
        list(pool.map(cache.get, parts.values()))
    house.lay_out(parts)


def build_one(engine: Engine, progress: Progress, found: base.Base, image: Image, name: str) -> None:
    """Build one target of the Dockerfile. With chroot isolation podman needs neither a network nor special rights."""
    command = ["build", "--quiet", "--target", image.target, "--tag", name, "--build-arg", f"BASE={found.name}"]
    if engine.name == "podman":
        command += ["--isolation", "chroot", "--layers"]
    with progress.step(f"{engine.name} build --target {image.target} --tag {name}", 25):
        check(engine.run(*command, "--file", str(ROOT / "Dockerfile"), str(ROOT)), f"Building {image.target} failed.")


def prune(engine: Engine, repository: str, keep: int = 3) -> None:
    """Remove all but the newest tags of an image, because each change of a source file makes a new one."""
    tags = engine.out("image", "ls", "--format", "{{.Repository}}:{{.Tag}}", repository).splitlines()
    for old in tags[keep:]:
        engine.run("rmi", old)


def write_env(variables: dict[str, str]) -> None:
    """Write build/images.env, which make and shells can read."""
    BUILD.mkdir(exist_ok=True)
    ENV_FILE.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))


def read_env() -> dict[str, str]:
    if not ENV_FILE.exists():
        raise UserError("There are no images yet: run `make images`.")
    return dict(line.split("=", 1) for line in ENV_FILE.read_text().splitlines())


def write_overlays(names: dict[str, str]) -> None:
    """Write build/deploy and build/demo for `kubectl -k`: manifests/base and dev/demo/cluster with these images."""
    patch = [
        {"op": "test", "path": "/spec/template/spec/containers/0/env/0/name", "value": "INGESTRUN_WORKER_IMAGE"},
        {"op": "replace", "path": "/spec/template/spec/containers/0/env/0/value", "value": names["WORKER_IMAGE"]},
    ]
    patches = [{"target": {"kind": "Deployment", "name": "ingestrun-operator"}, "patch": json.dumps(patch)}]
    write_overlay("deploy", "../../manifests/base", "ingestrun/operator", names["OPERATOR_IMAGE"], patches=patches)
    write_overlay("demo", "../../dev/demo/cluster", "ingestrun/demo", names["DEMO_IMAGE"])


def write_overlay(folder: str, resource: str, image: str, reference: str, **more: object) -> None:
    """Write a kustomization that replaces one image."""
    name, _, version = reference.rpartition(":")
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [resource],
        "images": [{"name": image, "newName": name, "newTag": version}],
        **more,
    }
    (BUILD / folder).mkdir(parents=True, exist_ok=True)
    (BUILD / folder / "kustomization.yaml").write_text(json.dumps(overlay, indent=2) + "\n")


def print_sizes(engine: Engine, found: base.Base, names: Sequence[str]) -> None:
    """Print each image's unpacked size, and how much of it is not the shared base."""
    say(f"{'image':<52} {'size':>8} {'on base':>9}")
    say(f"{found.name:<52} {found.size / MB:>5.0f} MB {'':>9}")
    for name in names:
        size = int(engine.out("image", "inspect", "--format", "{{.Size}}", name))
        say(f"{name:<52} {size / MB:>5.0f} MB {'+':>2}{(size - found.size) / MB:>4.0f} MB")


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")


def load(progress: Progress) -> None:
    """Bring the images into the development cluster."""
    names = list(read_env().values())
    with progress.step(f"load {len(names)} images into the cluster", 15):
        check(run([sys.executable, str(ROOT / "dev/cluster"), "load", *names]), "Loading the images failed.")


def push(progress: Progress) -> None:
    """Push the images to the registry that IMAGE_PREFIX named when they were built."""
    names = list(read_env().values())
    if names[0].startswith("localhost/"):
        raise UserError(
            "The images have no registry in their names: run `make images IMAGE_PREFIX=registry.example.com/team/`."
        )
    engine = find_engine(STATE)
    for name in names:
        with progress.step(f"{engine.name} push {name}", 20):
            check(engine.run("push", name), f"{name} cannot be pushed: does `{engine.name} login` come first?")


if __name__ == "__main__":
    sys.exit(main())

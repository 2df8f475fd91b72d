"""Which image a Job runs: the one that the run began with, whatever becomes of its tag or of the operator.

The kubelet says which image a pod really runs (`imageID`). What the first pod of an image ran is kept in the status,
by its digest, and all later Jobs name it by that. For the built-in worker its name is kept as well, from the first
Job on, so that an upgraded operator goes on with the worker that the run began with.

Only `repository@sha256:...` of the very repository that was asked for can be pulled again: an image that was loaded
onto a node without a registry has a bare ID, or one under a repository that exists nowhere. Then the tag stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ingestrun.model.contract import Stage
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.status import MAX_IMAGE_PINS, ImagePin
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.pipeline import Step, steps_of
from ingestrun.planner.status.events import Event, warning

_REFERENCE: Final = re.compile(r"(?:docker-pullable://)?(?P<repository>[^@]+)@(?P<digest>sha256:[0-9a-f]{64})")
_DOCKER_HUB: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_THIS_MACHINE: Final = re.compile(r"(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?")
NEVER: Final = "Never"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Steps that were asked to run the same image: what one of them runs, all of them run."""

    image: str | None
    """None: the built-in worker, whatever image it is in."""
    steps: IndexRanges


def image_of(run: IngestRun, step: Step, *, worker: str, worker_policy: str) -> str:
    """The image that a Job of this step is to name."""
    own, pin = step.container, _pin_of(run, step)
    if own is not None:
        name, policy = own.image, own.image_pull_policy
    else:
        name, policy = (pin.image if pin is not None and pin.image else worker), worker_policy
    if pin is None or pin.digest is None or policy == NEVER:
        return name
    return f"{repository(name)}@{pin.digest}"


def pinned_images(run: IngestRun, jobs: Iterable[Attempt]) -> list[ImagePin]:
    """The pins as they are to be from here on: a digest, once there, stays; the first Job's pod decides."""
    pins = {pin.steps: pin for pin in run.status.images}
    in_order = sorted(jobs, key=lambda job: job.key)
    for group in _groups(run):
        pin = pins.get(group.steps)
        if (pin is not None and pin.digest is not None) or (pin is None and len(pins) >= MAX_IMAGE_PINS):
            continue
        found = [job for job in in_order if job.job.step in group.steps]
        image = group.image
        if image is None:
            image = pin.image if pin is not None else next((job.job.image for job in found), None)
        if image is None:
            continue
        digest = next((ran for job in found if (ran := _digest_run(image, job)) is not None), None)
        if group.image is None or digest is not None:
            pins[group.steps] = ImagePin(steps=group.steps, image=image if group.image is None else None, digest=digest)
    return list(pins.values())


def newly_pinned(old: Sequence[ImagePin], new: Sequence[ImagePin]) -> IndexRanges:
    """The steps that run another image by the new pins than by the old ones."""
    steps = IndexRanges()
    for pin in new:
        if pin not in old:
            steps = steps | pin.steps
    return steps


def image_drift_events(pins: Sequence[ImagePin], run: IngestRun, jobs: Iterable[Attempt]) -> tuple[Event, ...]:
    """What there is to tell of these Jobs: those that ran another image than the pinned one.

    It takes a tag that moves while the run's first Jobs are out. One Event for all of them.
    """
    names = {group.steps: group.image for group in _groups(run)}
    odd = []
    for job in sorted(jobs, key=lambda job: job.key):
        pin = next((pin for pin in pins if job.job.step in pin.steps), None)
        if pin is None or pin.digest is None:
            continue
        ran = _digest_run(names.get(pin.steps) or pin.image or "", job)
        if ran is not None and ran != pin.digest:
            odd.append((job.job.batch, ran, pin.digest))
    if not odd:
        return ()
    _, ran, kept = odd[0]
    batches = IndexRanges(batch for batch, _, _ in odd)
    note = f"batch {batches} ran {ran}, all later ones run {kept}: the image's tag moved while the first Jobs were out"
    return (warning("ImageMoved", note, action="Pin"),)


def repository(image: str) -> str:
    """An image's name without its tag and digest."""
    name = image.partition("@")[0]
    path, slash, last = name.rpartition("/")
    return path + slash + last.partition(":")[0]


def digest_of(asked: str, image_id: str) -> str | None:
    """The digest by which the image that was `asked` for can be pulled again, from the kubelet's `imageID`.

    None where it can't be told: no digest, a digest of another repository, or a registry on the node itself, which
    need not be the same on the next node. None as well where a digest was asked for: there is nothing to find out.
    """
    found = _REFERENCE.fullmatch(image_id)
    if found is None or "@" in asked:
        return None
    registry, path = _normalised(repository(asked))
    if _THIS_MACHINE.fullmatch(registry) or (registry, path) != _normalised(found["repository"]):
        return None
    return found["digest"]


def _normalised(name: str) -> tuple[str, str]:
    """Registry and path. Source: distribution/reference, where `busybox` is `docker.io/library/busybox`."""
    first, slash, rest = name.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        first, rest = "docker.io", name
    if first in _DOCKER_HUB:
        return "docker.io", rest if "/" in rest else f"library/{rest}"
    return first, rest


def _digest_run(asked: str, job: Attempt) -> str | None:
    image_id = job.pod.image_id if job.pod is not None else None
    return digest_of(asked, image_id) if image_id else None


def _groups(run: IngestRun) -> list[_Group]:
    """The built-in worker first: its pin has the greatest use, and there is room for a few only."""
    by_image: dict[str | None, list[int]] = {}
    for step in steps_of(run.spec):
        own = step.container
        if own is None:
            by_image.setdefault(None, []).append(step.index)
        elif own.image_pull_policy != NEVER and "@" not in own.image:
            by_image.setdefault(own.image, []).append(step.index)
    groups = [_Group(image=image, steps=IndexRanges(steps)) for image, steps in by_image.items()]
    return sorted(groups, key=lambda group: group.image is not None)


def _pin_of(run: IngestRun, step: Step) -> ImagePin | None:
    steps = {step.index}
    if step.stage is Stage.ON_CANCEL and step.container is not None:
        # No stage of a batch; where it has the image of one, it runs what that one ran.
        same = (other for other in steps_of(run.spec) if other.container and other.container.image)
        steps = {other.index for other in same if other.container and other.container.image == step.container.image}
    return next((pin for pin in run.status.images if any(index in pin.steps for index in steps)), None)

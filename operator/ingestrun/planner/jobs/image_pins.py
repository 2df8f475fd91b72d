"""The image pins of a run: its Jobs run the images that it began with, even if a tag moves or the operator is upgraded.

The kubelet reports the image that a pod really runs (`imageID`). The status keeps the digest of the image that the
first pod ran, and all later Jobs name the image by the digest. For the built-in worker its name is kept as well, from
the first Job on, so that an upgraded operator goes on with the worker that the run began with.

Only `repository@sha256:...` of the requested repository can be pulled again: an image that was loaded
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
from ingestrun.model.size_budget import MAX_IMAGE_PINS
from ingestrun.model.status import ImagePin
from ingestrun.planner.batch.attempt import Attempt
from ingestrun.planner.batch.pipeline import WORKER_STEP, Step, steps_of
from ingestrun.planner.status.events import Event, warning

_REFERENCE: Final = re.compile(r"(?:docker-pullable://)?(?P<repository>[^@]+)@(?P<digest>sha256:[0-9a-f]{64})")
_DOCKER_HUB: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_THIS_MACHINE: Final = re.compile(r"(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?")
NEVER: Final = "Never"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Stages with the same image: the pin of one holds for all of them."""

    image: str | None
    """The image as the spec names it; None: the built-in worker, in any image."""
    steps: IndexRanges


def image_of(run: IngestRun, step: Step, *, worker: str, worker_policy: str) -> str:
    """Return the image that a Job of this stage names."""
    own, pin = step.container, _pin_of(run, step)
    if own is not None:
        name, policy = own.image, own.image_pull_policy
    else:
        name, policy = (pin.image if pin is not None and pin.image else worker), worker_policy
    if pin is None or pin.digest is None or policy == NEVER:
        return name
    return f"{repository(name)}@{pin.digest}"


def pinned_images(run: IngestRun, attempts: Iterable[Attempt]) -> list[ImagePin]:
    """Return the pins from now on: a known digest stays; the first attempt's pod decides."""
    pins = {pin.steps: pin for pin in run.status.images}
    in_order = sorted(attempts, key=lambda attempt: attempt.order)
    for group in _groups(run):
        pin = pins.get(group.steps)
        if (pin is not None and pin.digest is not None) or (pin is None and len(pins) >= MAX_IMAGE_PINS):
            continue
        pin = _pin_for(group, pin, [attempt for attempt in in_order if attempt.step in group.steps])
        if pin is not None:
            pins[group.steps] = pin
    return list(pins.values())


def _pin_for(group: _Group, before: ImagePin | None, attempts: Sequence[Attempt]) -> ImagePin | None:
    """Return the pin that follows from these attempts; None if their image is not known yet."""
    image = group.image
    if image is None:
        image = before.image if before is not None else next((attempt.job.image for attempt in attempts), None)
    if image is None:
        return None
    digest = next((ran for attempt in attempts if (ran := _digest_run(image, attempt)) is not None), None)
    if group.image is not None:
        return ImagePin(steps=group.steps, digest=digest) if digest is not None else None
    return ImagePin(steps=group.steps, image=image, digest=digest)


def newly_pinned(old: Sequence[ImagePin], new: Sequence[ImagePin]) -> IndexRanges:
    """Return the stages that run another image by the new pins than by the old ones."""
    steps = IndexRanges()
    for pin in new:
        if pin not in old:
            steps = steps | pin.steps
    return steps


def image_drift_events(pins: Sequence[ImagePin], run: IngestRun, attempts: Iterable[Attempt]) -> tuple[Event, ...]:
    """Return one Event about all these attempts that ran another image than the pinned one.

    This happens only if the tag is pushed again while the first Jobs are running.
    """
    names = {group.steps: group.image for group in _groups(run)}
    drifted = []
    for attempt in sorted(attempts, key=lambda attempt: attempt.order):
        pin = next((pin for pin in pins if attempt.step in pin.steps), None)
        if pin is None or pin.digest is None:
            continue
        ran = _digest_run(names.get(pin.steps) or pin.image or "", attempt)
        if ran is not None and ran != pin.digest:
            drifted.append((attempt.batch, ran, pin.digest))
    if not drifted:
        return ()
    _, ran, kept = drifted[0]
    batches = IndexRanges(batch for batch, _, _ in drifted)
    note = f"batch {batches} ran {ran}, all later ones run {kept}: the image's tag moved while the first Jobs were out"
    return (warning("ImageMoved", note, action="Pin"),)


def repository(image: str) -> str:
    """Return an image's name without its tag and digest."""
    name = image.partition("@")[0]
    path, slash, last = name.rpartition("/")
    return path + slash + last.partition(":")[0]


def digest_of(asked: str, image_id: str) -> str | None:
    """Return the digest by which the image `asked` for can be pulled again, from the kubelet's `imageID`.

    None if it is not known: no digest, a digest of another repository, or a registry on the node itself, which
    need not be the same on the next node. None as well if `asked` has a digest already, because it needs no pin.
    """
    found = _REFERENCE.fullmatch(image_id)
    if found is None or "@" in asked:
        return None
    registry, path = _normalised(repository(asked))
    if _THIS_MACHINE.fullmatch(registry) or (registry, path) != _normalised(found["repository"]):
        return None
    return found["digest"]


def _normalised(name: str) -> tuple[str, str]:
    """Return registry and path. Source: distribution/reference, where `busybox` is `docker.io/library/busybox`."""
    first, slash, rest = name.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        first, rest = "docker.io", name
    if first in _DOCKER_HUB:
        return "docker.io", rest if "/" in rest else f"library/{rest}"
    return first, rest


def _digest_run(asked: str, attempt: Attempt) -> str | None:
    image_id = attempt.pod.image_id if attempt.pod is not None else None
    return digest_of(asked, image_id) if image_id else None


def _groups(run: IngestRun) -> list[_Group]:
    """Group the stages by image. The built-in worker is first, because there is room for a few pins only."""
    if run.spec.pooled:
        return [_Group(image=None, steps=IndexRanges([WORKER_STEP]))]
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
        # The clean-up is no stage of a batch. If it has the image of one, it runs what that stage ran.
        same = (other for other in steps_of(run.spec) if other.container and other.container.image)
        steps = {other.index for other in same if other.container and other.container.image == step.container.image}
    return next((pin for pin in run.status.images if any(index in pin.steps for index in steps)), None)

"""The size budget of a run: its object stays below 16 KiB as JSON, for any number of batches.

The API server stores the whole object anew with each write and sends it to each watch, so its size is what a status
write costs. The table below adds up to the 16 KiB; each part is bounded by the constants beside it. Only index ranges
cut to pieces by failed batches and by batches in flight can be longer than their row, and the names of children are in
none: only then is the status measured (`fit_status`), and logs, older failures, the ends of long messages and those
names go until it fits.

A character counts as one byte.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

OBJECT_BYTES: Final = 16 * 1024
STATUS_BYTES: Final = 13 * 1024
"""Bytes of the status and of a saved state in the spec. The rest is for the spec, the metadata and managed fields."""
SAVED_STATE_BYTES: Final = 5632
"""Share of STATUS_BYTES that a saved state may use: its ranges come again in the status. One run never leaves more."""

UNMEASURED_RANGES_BYTES: Final = 1808
"""With ranges up to this length the status fits with every other part at its longest, so the status is not measured."""
MAX_PARALLELISM: Final = 100
"""Most batches in flight: each may cut the ranges of the status in two, as each failed one may."""
MAX_FAILED_BATCHES: Final = 80
"""Most failed batches: each may cut three ranges of the status in two (35 bytes)."""

MESSAGE_CHARS: Final = 256
"""Characters of a condition's or a failure's message; the rest is in the pod's log."""
SHORT_MESSAGE_CHARS: Final = 56
"""Characters to which a condition's message is cut in a status that does not fit."""

KEPT_FAILURES: Final = 4
"""Number of failed attempts that the status shows: the latest ones."""
KEPT_LOGS: Final = 2
"""Number of the shown failed attempts that keep the last lines of their log."""
LOG_BYTES: Final = 350
"""Bytes of a log that are kept, as JSON in UTF-8, so that the limit is the same in every script."""
RETRIES_BYTES: Final = 450
"""Bytes of all entries of `status.retries`, about eight."""

UNPUBLISHED_BYTES: Final = 3072
"""Most bytes of `batches.unpublished`: about forty entries with cursors of 20 characters, five with the longest."""
UNPUBLISHED_FREE_BYTES: Final = 512
"""Entries of up to this size are kept without measuring the rest of the status."""
UNPUBLISHED_STATUS_BYTES: Final = 10 * 1024
"""Size of the status, with further entries, up to which entries beyond UNPUBLISHED_FREE_BYTES are kept."""
MAX_CHECKPOINTS: Final = 6
"""Most batches that have a checkpoint without the rest of the status being measured: mostly 40 bytes each, at most 194.
"""
CHECKPOINTS_STATUS_BYTES: Final = 10 * 1024
"""Size of the status, with further checkpoints, up to which checkpoints beyond MAX_CHECKPOINTS are kept."""

REASON_CHARS: Final = 512
"""Characters of a cancel's reason: each run below puts its parent's name before the parent's reason."""
REQUESTER_CHARS: Final = 128
"""Characters of the name of a cancel's requester."""

MAX_IMAGE_PINS: Final = 5
"""Most different images whose digest is kept: about 130 bytes each."""
NAMED_CHILDREN: Final = 20
"""Most children, ended before a cascading cancel, that are named, if there is room."""

STATUS_PARTS: Final = MappingProxyType(
    {
        "conditions": 3072,  # 7 x MESSAGE_CHARS, and `Suspended` without a message
        "failures": 2560,  # KEPT_FAILURES x MESSAGE_CHARS, KEPT_LOGS x LOG_BYTES
        "batches: ranges": 64 + UNMEASURED_RANGES_BYTES,
        "batches: checkpoints; once drained: the record of it": 1264,  # MAX_CHECKPOINTS, onCancel with MESSAGE_CHARS
        "batches: unpublished": 16 + UNPUBLISHED_FREE_BYTES,
        "cancellation": 1048,  # REASON_CHARS, REQUESTER_CHARS, parent 253
        "resumedFrom, resumedBy": 704,  # two names of 253
        "images": 656,  # MAX_IMAGE_PINS, one of them with a name of 128
        "cursor": 528,  # CURSOR_MAX_CHARS
        "cursorState, cursorMark, sourceDigest": 244,  # STATE_MAX_CHARS, 16, SOURCE_DIGEST_MAX_CHARS
        "retries": 16 + RETRIES_BYTES,
        "counts, phase, times": 352,
    }
)
"""Bytes of each part of the status, which add up to at most STATUS_BYTES."""

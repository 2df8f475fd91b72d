"""The command `ingestrun-operator`, which reads its options and settings, and runs one replica."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from ingestrun.controller import logs
from ingestrun.controller.operator import Access, BeginAnewError, run
from ingestrun.controller.settings import Settings
from ingestrun.kube.errors import KubeError
from ingestrun.kube.leader_election import LeaseLost

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
EXIT_LEASE_LOST = 70
GC_THRESHOLDS: Final = (10_000, 20, 20)
"""Numbers of new containers, and of collections of them, that start the next collection. By default the 700th new
container starts it, and one watch event has hundreds, nearly all of which are freed without the collector."""

M_TRIM_THRESHOLD: Final = -1
"""The parameter of glibc's `mallopt` for the free bytes at the end of the heap that are given back to the system."""
TRIM_BYTES: Final = 1024 * 1024
"""Free bytes that the heap keeps. glibc raises its own limit with each large block, up to 64 MiB."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="ingestrun-operator", description="The IngestRun operator.")
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="run the operator; settings are INGESTRUN_* environment variables")
    command.add_argument("--dev", action="store_true", help="from a shell: a kubeconfig, console logs, no lease")
    command.add_argument("--kubeconfig", help="the kubeconfig (default: $KUBECONFIG, then ~/.kube/config)")
    command.add_argument("--context", help="the context in it (default: its current one)")
    command.add_argument("--lease", action="store_true", help="with --dev: take part in the leader election")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the operator and return the process's exit code."""
    options = parser().parse_args(arguments)
    try:
        settings = Settings()
        settings = Settings(api_tls=settings.api_tls or ("off" if options.dev else "own"))
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            where = "_".join(str(part) for part in problem["loc"])
            named = f"INGESTRUN_{where.upper()}: " if where else ""
            print(f"ingestrun-operator: {named}{problem['msg']}", file=sys.stderr)  # noqa: T201
        return 2
    logs.configure(fmt=settings.log_format or ("console" if options.dev else "json"), level=settings.log_level)
    in_cluster = not (options.dev or options.kubeconfig or options.context) and SERVICE_ACCOUNT.exists()
    access = Access(in_cluster=in_cluster, kubeconfig=options.kubeconfig, context=options.context)
    tune_garbage_collector()
    return_free_memory()
    try:
        return asyncio.run(run(settings, access, elect=options.lease or not options.dev))
    except LeaseLost as lost:
        # All work must have ended once the lease is lost, so there is no clean-up and no waiting.
        print(f"ingestrun-operator: {lost}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(EXIT_LEASE_LOST)
    except (BeginAnewError, KubeError, OSError) as error:
        print(f"ingestrun-operator: {error}", file=sys.stderr)  # noqa: T201
        return 1


def tune_garbage_collector() -> None:
    """Spare the collector what is never garbage: it took a fifth of the operator's CPU time.

    The modules imported until now are most of the heap, and each full collection would visit them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def return_free_memory() -> None:
    """Have the heap give back what it needed only for a while: the answers of large lists, the tasks of many events."""
    # Only glibc has the function; other systems have heaps of their own, which need no such advice.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)


if __name__ == "__main__":
    sys.exit(main())

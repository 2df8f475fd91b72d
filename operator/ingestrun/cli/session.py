"""A session: the options of one command, its output, and the API server, to which it connects when first asked."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from ingestrun.cli.output import Output

if TYPE_CHECKING:
    from ingestrun.cli.client import Api

T = TypeVar("T")
R = TypeVar("R")
THREADS = 8
"""Requests that are sent side by side: a cancel of hundreds of runs has to be prompt from far away, too."""


class Session:
    """The options of a command, with what they stand for."""

    def __init__(self, options: argparse.Namespace, output: Output) -> None:
        self.options = options
        self.output = output

    @cached_property
    def api(self) -> Api:
        """The API server. Raises CliError."""
        from ingestrun.cli.client import Api
        from ingestrun.cli.kubeconfig import load_access

        options = self.options
        return Api(
            load_access(kubeconfig=options.kubeconfig, context=options.context),
            user=options.as_user,
            group=options.as_group,
            timeout=options.request_timeout.total_seconds() or None,
        )

    @property
    def namespace(self) -> str:
        """The namespace that is named, or that of the context."""
        return self.options.namespace or self.api.namespace

    @property
    def scope(self) -> str | None:
        """The namespace, or None for all of them."""
        return None if getattr(self.options, "all_namespaces", False) else self.namespace

    def complain_of_none(self, kind: str = "") -> None:
        """Tell, as kubectl does, that there is nothing to show; `kind` says of which runs."""
        where = f" in {self.scope} namespace" if self.scope is not None else ""
        self.output.complain(f"No {kind}runs found{where}.")


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call the function for each item, some at once, and return the results in the order of the items."""
    work = list(items)
    if len(work) < 2:
        return [function(item) for item in work]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, work))

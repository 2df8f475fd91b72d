"""The command line: kubectl's own flags, the names of runs, and the words for a usage error."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from ingestrun.cli.durations import parse_duration
from ingestrun.cli.errors import UsageError
from ingestrun.cli.runs import FULL_SINGULAR, SINGULAR
from ingestrun.model.names import GROUP, PLURAL

PROGRAM: Final = "kubectl ingestrun"
DRY_RUNS: Final = ("none", "client", "server")
_BARE: Final = {"--dry-run": "--dry-run=server", "--wait": "--wait=cancelled"}
"""Flags whose value may be left out, as kubectl has it: never the next word is taken for it."""
_KINDS: Final = frozenset({"ir", SINGULAR, PLURAL, FULL_SINGULAR, f"{PLURAL}.{GROUP}"})
_KUBECTL_WORDS: Final = (
    (r"^unrecognized arguments: (-\S+).*", r"unknown flag: \1"),
    (r"^argument (?:-\w/)?(--?[\w-]+): expected one argument$", r"flag needs an argument: \1"),
    (
        r"^argument (?:-\w/)?(--?[\w-]+): invalid choice: '(.*)' \(choose from (.*)\)$",
        r'invalid argument "\2" for "\1" flag: choose from \3',
    ),
    (r"^argument (?:-\w/)?(--?[\w-]+): invalid \w+ value: '(.*)'$", r'invalid argument "\2" for "\1" flag'),
    (r"^the following arguments are required: (.*)$", r"required flag(s) not set: \1"),
)
"""Sentences of argparse, and those of kubectl in their place."""
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


class Parser(argparse.ArgumentParser):
    """A parser of one command that reports errors in kubectl's words."""

    def __init__(self, command: str, *, usage: str, description: str, examples: str = "") -> None:
        super().__init__(
            prog=f"{PROGRAM} {command}",
            usage=f"{PROGRAM} {command} {usage}",
            description=description,
            epilog=f"Examples:\n{_indented(examples)}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the error as kubectl phrases it."""
        for pattern, words in _KUBECTL_WORDS:
            message = re.sub(pattern, words, message, flags=re.DOTALL)
        raise UsageError(f"{message}\nSee '{self.prog} --help' for usage.")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words of the command. Raises UsageError."""
        end = words.index("--") if "--" in words else len(words)
        return self.parse_intermixed_args([_BARE.get(word, word) for word in words[:end]] + list(words[end:]))


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip("\n").splitlines())


def add_cluster_flags(parser: Parser, *, all_namespaces: bool = False) -> None:
    """Add kubectl's flags about the cluster, the user and the namespace."""
    group = parser.add_argument_group("kubectl's flags")
    group.add_argument("-n", "--namespace", metavar="NAME", help="the namespace (default: that of the context)")
    if all_namespaces:
        group.add_argument("-A", "--all-namespaces", action="store_true", help="all namespaces")
    group.add_argument("--context", metavar="NAME", help="the context of the kubeconfig")
    group.add_argument("--kubeconfig", metavar="FILE", help="the kubeconfig (default: $KUBECONFIG, ~/.kube/config)")
    group.add_argument("--as", dest="as_user", metavar="USER", help="the user to impersonate")
    group.add_argument("--as-group", metavar="GROUP", help="the group to impersonate")
    group.add_argument(
        "--request-timeout",
        metavar="DURATION",
        type=parse_duration,
        default=parse_duration("30s"),
        help="how long one request may take (default: 30s)",
    )


def add_output_flag(parser: Parser, *forms: str) -> None:
    """Add `-o`, with these forms, and `--json` for one of them."""
    parser.add_argument("-o", "--output", choices=forms, metavar="FORM", help=f"one of {', '.join(forms)}")
    if "json" in forms:
        parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")


def add_dry_run_flag(parser: Parser) -> None:
    """Add `--dry-run`."""
    parser.add_argument(
        "--dry-run",
        choices=DRY_RUNS,
        default="none",
        metavar="KIND",
        help="change nothing; server (also without a value): let the server judge the request; client: send none",
    )


def add_selection(parser: Parser, what: str) -> None:
    """Add names, `-l` and `--all`: the runs that a command is about."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"a run to {what}")
    parser.add_argument("-l", "--selector", metavar="LABELS", help=f"{what} the active runs with these labels")
    parser.add_argument(
        "--all", action="store_true", help=f"{what} all active runs of the namespace, or with -A of all"
    )


def run_name(word: str) -> str:
    """Return the name in a word such as `flights`, `ir/flights` or `ingestrun.ingestrun.dev/flights`.

    Raises:
        UsageError: it names another kind, or is no name.
    """
    kind, slash, name = word.rpartition("/")
    if slash and kind.lower() not in _KINDS:
        raise UsageError(f'"{word}" is no run: give its name, or {SINGULAR}/NAME')
    if not _NAME.fullmatch(name) or len(name) > 253:
        raise UsageError(f'"{word}" is no name of a run')
    return name


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The runs that a command is about: names, or a selector of active runs."""

    names: tuple[str, ...] = ()
    selector: str | None = None

    @property
    def one(self) -> bool:
        """Tell whether it is one run, by its name."""
        return len(self.names) == 1


def selection_of(options: argparse.Namespace, *, other: bool = False) -> Selection:
    """Return what the user has selected; `other` tells that a further flag selects.

    Raises:
        UsageError: nothing is selected, or in two ways.
    """
    ways = [bool(options.names), bool(options.selector), options.all]
    if sum(ways) + (other and not any(ways)) == 0:
        raise UsageError("resource(s) were provided, but no name was specified: give NAME, -l or --all")
    if options.names and (options.selector or options.all or other):
        raise UsageError("name cannot be provided when a selector is specified")
    if options.selector and options.all:
        raise UsageError("cannot set --all and --selector at the same time")
    if options.names and options.all_namespaces:
        raise UsageError("a resource cannot be retrieved by name across all namespaces")
    names = tuple(dict.fromkeys(run_name(word) for word in options.names))
    return Selection(names=names, selector=options.selector)

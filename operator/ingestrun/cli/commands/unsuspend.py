"""`unsuspend`: suspended runs go on where they were."""

from __future__ import annotations

from typing import Final

from ingestrun.cli.arguments import Parser
from ingestrun.cli.commands.suspend import switch, switch_parser
from ingestrun.cli.errors import ExitCode
from ingestrun.cli.session import Session

UNSUSPEND: Final = {"spec": {"suspend": None}}


def parser() -> Parser:
    """Return the parser."""
    return switch_parser("unsuspend", "Let suspended runs go on where they were; their deadlines begin anew.")


def run(session: Session) -> ExitCode:
    """Let the runs go on."""
    return switch(session, UNSUSPEND, "unsuspended")

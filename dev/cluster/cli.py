"""The commands of `python3 dev/cluster COMMAND`, behind `make cluster-up` and the other cluster targets."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from dev.cluster.host import UserError
from dev.cluster.kindcluster import DevCluster, current_context

COMMANDS = {
    "deps": "install what the cluster needs on this machine (Debian, Ubuntu), saying what and why",
    "up": "create the cluster, or adapt the running one (NODES, SIMULATED_NODES, LIMITS, API_PORT, ENGINE, NODE_IMAGE)",
    "down": "remove the cluster and all that belongs to it",
    "status": "show the cluster; exits 1 if there is none that works",
    "load": "load images of the container engine into the cluster",
    "env": "print shell lines that export the engine, the kubeconfig and PATH",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python3 dev/cluster", description="The development cluster.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "load":
            command.add_argument("images", nargs="+", metavar="IMAGE")
    return top


def use_current(command: str) -> None:
    """Run a command for CLUSTER=current: check and name the user's own cluster, and change nothing in it."""
    if command == "env":
        name = current_context()
        if os.environ.get("KUBECONFIG"):
            print(f"export KUBECONFIG={shlex.quote(os.environ['KUBECONFIG'])}")
        print(f"export INGESTRUN_CONTEXT={shlex.quote(name)}")
    elif command in ("up", "status"):
        print(f"using your current context: {current_context()}")
    elif command == "down":
        print("CLUSTER=current: your own cluster is left as it is")
    elif command == "load":
        raise UserError(
            "CLUSTER=current: push the images to a registry that your cluster pulls from; loading is for kind only."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        cluster = os.environ.get("CLUSTER") or "kind"
        if cluster == "current" and options.command != "deps":
            use_current(options.command)
            return 0
        if cluster not in ("kind", "current"):
            raise UserError(f"CLUSTER is {cluster!r}: set it to kind or current, or leave it out.")
        dev = DevCluster()
        if options.command == "deps":
            dev.deps()
        elif options.command == "up":
            dev.up(os.environ)
            print(dev.progress.summary(), file=sys.stderr)
        elif options.command == "down":
            dev.down()
        elif options.command == "status":
            return 0 if dev.status() else 1
        elif options.command == "load":
            dev.load(options.images)
        else:
            for name, value in dev.environment().items():
                print(f"export {name}={shlex.quote(value)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `python3 dev/cluster status | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(
            "interrupted: what is half done is cleaned up by the next `make cluster-up` or `make cluster-down`",
            file=sys.stderr,
        )
        return 130
    return 0

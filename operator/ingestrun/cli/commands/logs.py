"""`logs`: of the pods of a run, by batch and stage; with -f also of pods that start later."""

from __future__ import annotations

import threading
import time
from typing import Final

from ingestrun.cli.arguments import Parser, add_cluster_flags, run_name
from ingestrun.cli.durations import parse_duration
from ingestrun.cli.errors import CliError, ExitCode, UsageError
from ingestrun.cli.output import clean
from ingestrun.cli.runs import Json, Run
from ingestrun.cli.session import Session
from ingestrun.model.names import LABEL_ATTEMPT, LABEL_BATCH, LABEL_RUN_UID, LABEL_STAGE, LABEL_STEP

STAGES: Final = ("fetch", "hook", "publish", "on-cancel")
LOOK_SECONDS: Final = 2.0
"""Interval at which the run is looked at while logs are followed."""


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "logs",
        usage="NAME [--batch NUMBER] [--stage STAGE] [-f] [flags]",
        description="Print the logs of a run's pods, each line with its batch and stage if they are of several.\n"
        "Pods of published batches are deleted after a while (spec.jobRetention), and their logs with them.",
        examples="kubectl ingestrun logs flights --batch 3\nkubectl ingestrun logs flights --stage publish -f",
    )
    made.add_argument("name", metavar="NAME", help="the run")
    made.add_argument("--batch", type=int, metavar="NUMBER", help="only this batch")
    made.add_argument("--stage", metavar="STAGE", help="only fetch, hook (or a hook's name), publish, or on-cancel")
    made.add_argument("-f", "--follow", action="store_true", help="go on until the run's last pod has ended")
    made.add_argument("--tail", type=int, metavar="LINES", help="only the last lines of each pod")
    made.add_argument("--since", type=parse_duration, metavar="DURATION", help="only lines of this time")
    made.add_argument("--timestamps", action="store_true", help="with the time of each line")
    add_cluster_flags(made)
    return made


def run(session: Session) -> ExitCode:
    """Print the logs."""
    found = Run(session.api.run(session.namespace, run_name(session.options.name))[0])
    printer = Printer(session, found)
    listed = session.api.pods(found.namespace, printer.selector)
    pods = sorted(listed.items, key=_place)
    if session.options.follow:
        return printer.follow()
    if not pods:
        session.output.complain(f'No pods found of run "{found.name}".')
        return ExitCode.OK
    printer.named = len(pods) > 1
    codes = [printer.show(pod) for pod in pods]
    return ExitCode.OK if ExitCode.OK in codes else codes[0]


def selector_of(found: Run, *, batch: int | None, stage: str | None) -> str:
    """Return the selector of the pods. Raises UsageError if the run has no such stage."""
    terms = [f"{LABEL_RUN_UID}={found.uid}"]
    if batch is not None:
        terms.append(f"{LABEL_BATCH}={batch}")
    if stage in STAGES:
        terms.append(f"{LABEL_STAGE}={stage}")
    elif stage is not None:
        hooks = [hook.get("name") for hook in found.spec.get("hooks") or ()]
        if stage not in hooks:
            raise UsageError(f'run "{found.name}" has no stage {stage}: choose from {", ".join((*STAGES, *hooks))}')
        # Step 0 is the fetch.
        terms.append(f"{LABEL_STEP}={hooks.index(stage) + 1}")
    return ",".join(terms)


def _labels(pod: Json) -> dict[str, str]:
    return pod["metadata"].get("labels") or {}


def _place(pod: Json) -> tuple[int, ...]:
    return tuple(int(_labels(pod).get(label) or 0) for label in (LABEL_BATCH, LABEL_STEP, LABEL_ATTEMPT))


class Printer:
    """Prints the logs of pods, one after another, or side by side as they come."""

    def __init__(self, session: Session, found: Run) -> None:
        self._session = session
        self._run = found
        self.selector = selector_of(found, batch=session.options.batch, stage=session.options.stage)
        self.named = True
        """True: each line begins with its batch and stage."""
        self._threads: dict[str, threading.Thread] = {}

    def show(self, pod: Json) -> ExitCode:
        """Print the log of one pod."""
        labels, options = _labels(pod), self._session.options
        hooks = [str(hook.get("name")) for hook in self._run.spec.get("hooks") or ()]
        stage, (batch, step, attempt) = labels.get(LABEL_STAGE, ""), _place(pod)
        name = f"hook {hooks[step - 1]}" if stage == "hook" and step <= len(hooks) else stage
        lead = f"[batch {batch}, {name}{f', attempt {attempt + 1}' if attempt else ''}] " if self.named else ""
        params = {"container": stage, "timestamps": str(options.timestamps).lower()}
        params |= {"follow": "true"} if options.follow else {}
        params |= {"tailLines": str(options.tail)} if options.tail is not None else {}
        if options.since is not None:
            params["sinceSeconds"] = str(max(1, int(options.since.total_seconds())))
        try:
            for line in self._session.api.log(self._run.namespace, pod["metadata"]["name"], **params):
                self._session.output.write(lead + clean(line.decode(errors="replace")))
        except CliError as error:
            self._session.output.complain(f"{lead}{error}")
            return error.code
        return ExitCode.OK

    def follow(self) -> ExitCode:
        """Print the logs of all pods as they come, until the run and its last pod have ended."""
        while True:
            # Before the pods: none starts once the run is drained.
            over = self._over()
            for pod in self._session.api.pods(self._run.namespace, self.selector).items:
                uid, phase = pod["metadata"]["uid"], (pod.get("status") or {}).get("phase")
                if phase != "Pending" and uid not in self._threads:
                    thread = self._threads[uid] = threading.Thread(target=self.show, args=(pod,), daemon=True)
                    thread.start()
            alive = [thread for thread in self._threads.values() if thread.is_alive()]
            if over:
                for thread in alive:
                    thread.join()
                return ExitCode.OK
            time.sleep(LOOK_SECONDS)

    def _over(self) -> bool:
        """Tell whether the run is drained, or gone."""
        try:
            found = Run(self._session.api.run(self._run.namespace, self._run.name)[0])
        except CliError as error:
            if error.code is ExitCode.NOT_FOUND:
                return True
            raise
        return found.uid != self._run.uid or found.drained

"""Cancels at random moments in many runs, the operator killed in a tenth of them; the audit log is the judge.

`make test-cancel-races RUNS=2000 SEED=1`; with MODE=pool the runs have pools of workers alone, with MODE=jobs none has.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.api.conftest import Cluster
from tests.race.campaign import Campaign
from tests.race.generator import Mode, waves

RUNS = int(os.environ.get("RUNS") or 60)
SHORT = 100
"""Up to so many runs the minute until the operator's last sweep is not waited for."""
WAVE = int(os.environ.get("WAVE") or 50)
SEED = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
MODE = Mode(os.environ.get("MODE") or Mode.BOTH)


def test_cancel_races(
    cluster: Cluster, operator_kubeconfig: Path, audit_path: Path, tmp_path: Path, say: Callable[[str], None]
) -> None:
    planned = waves(SEED, RUNS, size=WAVE, mode=MODE)
    say(f"\nSEED={SEED} RUNS={RUNS} MODE={MODE} in {len(planned)} waves")
    campaign = Campaign(cluster, audit=audit_path, operator_kubeconfig=operator_kubeconfig, folder=tmp_path, say=say)
    try:
        for wave in planned:
            campaign.run(wave, sweep=wave is planned[-1] and RUNS > SHORT)
    finally:
        campaign.close()
    for line in campaign.tally.lines():
        say(line)
    assert campaign.tally.runs == RUNS
    assert not campaign.tally.violations, "\n".join(str(violation) for violation in campaign.tally.violations)

"""Lets `python3 dev/cluster COMMAND` run from a bare checkout, before anything is installed."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from dev.cluster.cli import main  # noqa: E402

raise SystemExit(main())

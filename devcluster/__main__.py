"""Lets `python3 devcluster COMMAND` run from a bare checkout, before anything is installed."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from devcluster.cli import main  # noqa: E402

raise SystemExit(main())

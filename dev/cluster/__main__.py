"""Entry point of `python3 dev/cluster COMMAND`; it needs only a checkout and Python, nothing installed."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from dev.cluster.cli import main  # noqa: E402

raise SystemExit(main())

"""devcluster is run from the checkout, not installed: the repository's root is where it is imported from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

"""Entry point of `python -m ingestrun.worker`."""

from ingestrun.worker.main import main

main()

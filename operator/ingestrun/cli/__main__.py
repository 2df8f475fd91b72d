"""Entry point of `python -m ingestrun.cli`."""

from ingestrun.cli.main import main

main()

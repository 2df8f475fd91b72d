"""A pool of workers: what they ask for and report, the states of their batches, and which of them are started."""

"""One batch: its attempts, its state, its failure policy and its counts."""

"""The demo: real data through the operator, in a real cluster. `make demo`."""

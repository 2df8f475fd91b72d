"""The demo, `make demo`: real data through the operator, in a real cluster."""

"""What the operator answers by HTTP: the cancellation check and its health."""

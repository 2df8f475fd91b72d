"""The HTTP endpoints of the operator: the cancellation check and its health."""

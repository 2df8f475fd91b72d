"""The boundary to the API server: one Protocol, its implementation on kubernetes.aio, few named errors."""

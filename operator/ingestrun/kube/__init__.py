"""The boundary to the API server: one Protocol, its implementation, leader election, few named errors."""

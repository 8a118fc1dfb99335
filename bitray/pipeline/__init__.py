"""What happens around the workers: stages on Ray Train, identity, preflight, reports."""

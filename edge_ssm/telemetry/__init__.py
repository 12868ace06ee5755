"""What a run tells others while it runs: status files, HTTP, Prometheus metrics."""

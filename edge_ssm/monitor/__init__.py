"""What a stream costs: latency now; power and energy are measured beside it."""

"""A run as a service: its configuration, what it keeps across restarts, how it is replaced while it runs, how it is seen."""

"""A run as a service: its configuration, what it keeps across restarts, its replacement as it runs, how it is seen."""

"""A run as a service: configuration, what is kept across restarts, how it is replaced while it runs, how it is seen."""

"""A run as a service: configuration, what is kept across restarts, how it is replaced as it runs, how it is seen."""

"""The command-line interface ``edge-ssm-build``."""

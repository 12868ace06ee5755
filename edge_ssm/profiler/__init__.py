"""Measure latency, power and energy: ``edge-ssm profile``."""

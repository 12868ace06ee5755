"""Engines: implementations of the recurrence, and their selection."""

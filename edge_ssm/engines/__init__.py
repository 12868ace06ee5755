"""Engines: implementations of the recurrence, and the choice among them."""

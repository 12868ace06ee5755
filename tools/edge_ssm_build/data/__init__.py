"""Recorded data: sets that packages ship, and the user's own recordings."""

"""Boards, the machine's state and power meters."""

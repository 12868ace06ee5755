"""Boards, machines and power meters."""

"""Pruning: importance scores, plans, the search over rates, reports."""

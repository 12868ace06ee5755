"""Sources: where samples come from, one module per medium."""

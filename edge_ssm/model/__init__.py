"""The network: its parameters, validation, cost and discretisation."""

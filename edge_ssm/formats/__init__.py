"""File formats of models: artifacts, exported graphs and signatures."""

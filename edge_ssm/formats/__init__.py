"""Files that hold a model: artifacts, exported graphs, signatures."""

"""From a checkpoint to artifacts, exported graphs and signatures."""

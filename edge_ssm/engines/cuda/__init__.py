"""The CUDA engines: one kernel launch per step or chunk, or a persistent kernel."""

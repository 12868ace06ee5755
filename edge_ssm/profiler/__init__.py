"""The profiler: latency, power and energy of a model on this machine."""

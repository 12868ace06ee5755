"""The CPU engine: machine code compiled by Numba and LLVM, called without either."""

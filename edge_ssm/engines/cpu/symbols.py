"""Names of the functions in the kernel's machine code that several modules refer to."""

ENTRY = "edge_ssm_run"
"""Entry point of the kernel: ``int64_t edge_ssm_run(const int64_t *arguments)`` (``layout.ARGUMENTS``)."""
HALF_VALUES = "edge_ssm_half_values"
"""Converts eight float16 to float32 (``simd``)."""
PAIR_PRODUCTS = "edge_ssm_pair_products"
"""Multiplies int8 weights by int16 activations, pair by pair (``simd``)."""

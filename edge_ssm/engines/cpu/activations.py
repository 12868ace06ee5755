"""erf and tanh as rational functions in float32: a dozen vector instructions instead of a library call.

f(x) = x P(x^2) / Q(x^2), where x is clamped to [-limit, limit]. ``tools/fit_rational.py`` derives the coefficients, and
``simd`` evaluates them. Largest error of a float32 evaluation over all x: 3.5e-7 for erf, 3.3e-7 for tanh.
"""

Rational = tuple[float, tuple[tuple[float, ...], tuple[float, ...]]]
"""(limit, (P, Q)), coefficients from the highest power to the lowest."""

ERF: Rational = (
    3.9,
    (
        (
            2.011719497e-08,
            -1.996724244e-06,
            1.474512853e-04,
            3.895539671e-03,
            5.114681814e-02,
            2.042091476e-01,
            1.128378801e00,
        ),
        (1.006402947e-03, 1.472910212e-02, 1.167789823e-01, 5.143046706e-01, 1.0),
    ),
)
TANH: Rational = (
    8.6,
    (
        (1.391288984e-08, 2.099178081e-05, 3.518066376e-03, 1.339970689e-01, 9.999999392e-01),
        (7.998872260e-07, 3.322928507e-04, 2.596173718e-02, 4.673301588e-01, 1.0),
    ),
)

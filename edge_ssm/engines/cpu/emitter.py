"""Emit LLVM IR for vectors of eight float32, from Numba intrinsics.

A function with the decorator ``vector_intrinsic`` is called by Numba when it compiles a call of it. It gets an
``Emitter`` and the arguments, and emits the instructions of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from edge_ssm.engines.cpu.layout import WIDTH

intrinsic: Any = numba_intrinsic
FLOAT32 = types.CPointer(types.float32)
"""Numba's type of a pointer to float32."""
F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(F32, WIDTH)
INTEGERS = ir.VectorType(I32, WIDTH)
SHORTS = ir.VectorType(ir.IntType(16), WIDTH)
"""LLVM types: scalars, and vectors of WIDTH values."""


def vector_of(value: float) -> Any:
    """Return a vector of WIDTH equal constants."""
    return ir.Constant(VECTOR, [value] * WIDTH)


class Emitter:
    """Emits the few vector operations that the kernel consists of."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def _place(self, pointer: Any, index: Any, kind: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(pointer, [self.integer(index)]), kind.as_pointer())

    def integer(self, value: Any) -> Any:
        """Return an int64: a Python integer as a constant, any other value as it is."""
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def load(self, pointer: Any, index: Any = 0) -> Any:
        """Emit a load of the vector that begins at element ``index``."""
        return self.builder.load(self._place(pointer, index, VECTOR), align=4)

    def store(self, value: Any, pointer: Any, index: Any = 0) -> None:
        """Emit a store of a vector to where element ``index`` is."""
        self.builder.store(value, self._place(pointer, index, VECTOR), align=4)

    def scalar(self, pointer: Any, index: Any = 0) -> Any:
        """Emit a load of the element at ``index``."""
        return self.builder.load(self.builder.gep(pointer, [self.integer(index)]))

    def add(self, a: Any, b: Any) -> Any:
        """Emit a + b."""
        return self.builder.fadd(a, b)

    def sub(self, a: Any, b: Any) -> Any:
        """Emit a - b."""
        return self.builder.fsub(a, b)

    def mul(self, a: Any, b: Any) -> Any:
        """Emit a b."""
        return self.builder.fmul(a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Emit a b + c, fused if the processor can do so."""
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fmuladd.v{WIDTH}f32"), [a, b, c]
        )

    def fnma(self, a: Any, b: Any, c: Any) -> Any:
        """Emit c - a b."""
        return self.fma(self.builder.fneg(a), b, c)

    def plus(self, *values: Any) -> Any:
        """Emit the sum of integers."""
        total = self.integer(values[0])
        for value in values[1:]:
            total = self.builder.add(total, self.integer(value))
        return total

    def times(self, value: Any, factor: Any) -> Any:
        """Emit the product of two integers."""
        return self.builder.mul(value, self.integer(factor))

    def splat(self, value: Any) -> Any:
        """Emit a vector whose elements are all equal to a scalar."""
        nothing = ir.Constant(ir.VectorType(value.type, WIDTH), ir.Undefined)
        first = self.builder.insert_element(nothing, value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(INTEGERS, [0] * WIDTH))

    def _reduce(self, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Combine the elements of a vector into one value: its halves first, then their halves, and so on."""
        nothing, width = ir.Constant(VECTOR, ir.Undefined), WIDTH
        while width > 1:
            width //= 2
            order = [(i + width) % WIDTH for i in range(WIDTH)]
            vector = combine(vector, self.builder.shuffle_vector(vector, nothing, ir.Constant(INTEGERS, order)))
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def total(self, vector: Any) -> Any:
        """Emit the sum of a vector's elements."""
        return self._reduce(vector, self.add)

    def highest(self, vector: Any) -> Any:
        """Emit the largest element of a vector."""
        return self._reduce(vector, lambda a, b: self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b))

    def lowest(self, vector: Any) -> Any:
        """Emit the smallest element of a vector."""
        return self._reduce(vector, lambda a, b: self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b))

    def rational(self, x: Any, limit: float, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Any:
        """Emit x P(x^2) / Q(x^2) with x clamped to the limit, as in ``activations``."""
        builder, top, bottom = self.builder, vector_of(limit), vector_of(-limit)
        x = builder.select(builder.fcmp_ordered("<", x, top), x, top)
        x = builder.select(builder.fcmp_ordered(">", x, bottom), x, bottom)
        square = self.mul(x, x)
        sums = []
        for polynomial in coefficients:
            total = vector_of(polynomial[0])
            for coefficient in polynomial[1:]:
                total = self.fma(total, square, vector_of(coefficient))
            sums.append(total)
        return builder.fdiv(self.mul(x, sums[0]), sums[1])

    @contextmanager
    def loop(self, count: Any, step: int = 1) -> Iterator[Any]:
        """Emit a loop whose index is 0, step, 2 step, ... below ``count``."""
        zero = ir.Constant(I64, 0)
        with cgutils.for_range_slice(self.builder, zero, count, self.integer(step), inc=True) as (j, _):
            yield j

    def variable(self, value: Any) -> Any:
        """Emit a variable that a loop changes. LLVM keeps it in a register."""
        place = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, place)
        return place


def vector_intrinsic(*kinds: Any) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that makes an intrinsic without a result of a function of (emitter, *arguments).

    ``kinds`` are the Numba types of the arguments.
    """

    def decorate(body: Callable[..., None]) -> Any:
        names = ", ".join(f"a{i}" for i in range(len(kinds)))
        signature = types.void(*kinds)

        def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            body(Emitter(builder), *arguments)
            return context.get_dummy_value()

        # Numba reads the number of an intrinsic's parameters from its Python signature.
        space: dict[str, Any] = {"signature": signature, "codegen": codegen}
        exec(f"def {body.__name__}(typingctx, {names}):\n    return signature, codegen", space)
        return intrinsic(space[body.__name__])

    return decorate

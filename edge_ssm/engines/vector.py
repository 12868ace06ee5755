"""The CPU kernel's inner loops as explicit vectors of eight float32, one AVX register or two NEON ones.

LLVM vectorises plain loops too, but guards each with checks for overlapping arrays and leaves what does not fill four
registers to scalar code: at the row lengths of a pruned network that costs more than the work itself (measured: 60 ns
for a row of 16 channels, against 10). Arrays here never overlap, and rows are padded to whole vectors.

Every function works on ``count`` values from given offsets; ``count`` is a multiple of WIDTH.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edge_ssm.engines.rational import ERF, TANH

WIDTH = 8
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, WIDTH)
_FAST = ("contract", "reassoc", "nsz", "arcp")


def _constant(value: float) -> Any:
    return ir.Constant(_VECTOR, [value] * WIDTH)


class _Emit:
    """A builder with the few vector operations that the kernel is made of."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def data(self, array_type: Any, value: Any) -> Any:
        return self.context.make_array(array_type)(self.context, self.builder, value).data

    def load(self, pointer: Any, index: Any) -> Any:
        place = self.builder.bitcast(self.builder.gep(pointer, [index]), _VECTOR.as_pointer())
        return self.builder.load(place, align=4)

    def store(self, value: Any, pointer: Any, index: Any) -> None:
        place = self.builder.bitcast(self.builder.gep(pointer, [index]), _VECTOR.as_pointer())
        self.builder.store(value, place, align=4)

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=_FAST)

    def sub(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, flags=_FAST)

    def mul(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=_FAST)

    def at(self, *offsets: Any) -> Any:
        total = offsets[0]
        for offset in offsets[1:]:
            total = self.builder.add(total, offset)
        return total

    def times(self, value: Any, factor: int) -> Any:
        return self.builder.mul(value, ir.Constant(_I64, factor))

    def splat(self, value: Any) -> Any:
        first = self.builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
        mask = ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH)
        return self.builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), mask)

    def rational(self, x: Any, limit: float, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Any:
        """x P(x^2) / Q(x^2) with x clamped, as in ``rational``."""
        builder, top, bottom = self.builder, _constant(limit), _constant(-limit)
        x = builder.select(builder.fcmp_ordered("<", x, top), x, top)
        x = builder.select(builder.fcmp_ordered(">", x, bottom), x, bottom)
        square = self.mul(x, x)
        sums = []
        for polynomial in coefficients:
            total = _constant(polynomial[0])
            for coefficient in polynomial[1:]:
                total = self.add(self.mul(total, square), _constant(coefficient))
            sums.append(total)
        return builder.fdiv(self.mul(x, sums[0]), sums[1], flags=_FAST)

    @contextmanager
    def vectors(self, count: Any) -> Iterator[Any]:
        """A loop over 0, WIDTH, 2 WIDTH, ... below ``count``."""
        zero, width = ir.Constant(_I64, 0), ir.Constant(_I64, WIDTH)
        with cgutils.for_range_slice(self.builder, zero, count, width, inc=True) as (j, _):
            yield j


@intrinsic
def diagonal_row(
    typingctx: Any, w: Any, at: Any, x: Any, place: Any, work: Any, gathered: Any, summed: Any, count: Any
) -> Any:
    """One pair of every channel: x += delta x + gathered; summed += Re(C x). Offsets into w, x and work."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        e = _Emit(context, builder)
        weights, states, scratch = (e.data(signature.args[i], arguments[i]) for i in (0, 2, 4))
        at, place, gathered, summed, count = (arguments[i] for i in (1, 3, 5, 6, 7))
        with e.vectors(count) as j:
            dr, di, cr, ci = (e.load(weights, e.at(at, e.times(count, i), j)) for i in range(4))
            re, im = (e.load(states, e.at(place, e.times(count, i), j)) for i in range(2))
            u = e.load(scratch, e.at(gathered, j))
            new_re = e.add(e.add(re, u), e.sub(e.mul(dr, re), e.mul(di, im)))
            new_im = e.add(im, e.add(e.mul(di, re), e.mul(dr, im)))
            e.store(new_re, states, e.at(place, j))
            e.store(new_im, states, e.at(place, count, j))
            total = e.add(e.load(scratch, e.at(summed, j)), e.add(e.mul(cr, new_re), e.mul(ci, new_im)))
            e.store(total, scratch, e.at(summed, j))
        return context.get_dummy_value()

    return types.void(w, types.int64, x, types.int64, work, types.int64, types.int64, types.int64), codegen


@intrinsic
def inner_row(typingctx: Any, w: Any, at: Any, x: Any, place: Any, work: Any, q: Any, count: Any) -> Any:
    """q += Re(r x), for one pair of every channel; r stands behind delta, C and p."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        e = _Emit(context, builder)
        weights, states, scratch = (e.data(signature.args[i], arguments[i]) for i in (0, 2, 4))
        at, place, q, count = (arguments[i] for i in (1, 3, 5, 6))
        with e.vectors(count) as j:
            rr, ri = (e.load(weights, e.at(at, e.times(count, i), j)) for i in (6, 7))
            re, im = (e.load(states, e.at(place, e.times(count, i), j)) for i in range(2))
            total = e.add(e.load(scratch, e.at(q, j)), e.add(e.mul(rr, re), e.mul(ri, im)))
            e.store(total, scratch, e.at(q, j))
        return context.get_dummy_value()

    return types.void(w, types.int64, x, types.int64, work, types.int64, types.int64), codegen


@intrinsic
def low_rank_row(
    typingctx: Any, w: Any, at: Any, x: Any, place: Any, work: Any, gathered: Any, summed: Any, q: Any, count: Any
) -> Any:
    """One pair of every channel: x += delta x + (gathered + p q); summed += Re(C x)."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        e = _Emit(context, builder)
        weights, states, scratch = (e.data(signature.args[i], arguments[i]) for i in (0, 2, 4))
        at, place, gathered, summed, q, count = (arguments[i] for i in (1, 3, 5, 6, 7, 8))
        with e.vectors(count) as j:
            dr, di, cr, ci, pr, pi = (e.load(weights, e.at(at, e.times(count, i), j)) for i in range(6))
            re, im = (e.load(states, e.at(place, e.times(count, i), j)) for i in range(2))
            u, inner = e.load(scratch, e.at(gathered, j)), e.load(scratch, e.at(q, j))
            drive = e.add(e.mul(pr, inner), u)
            new_re = e.add(re, e.add(e.sub(e.mul(dr, re), e.mul(di, im)), drive))
            new_im = e.add(im, e.add(e.add(e.mul(di, re), e.mul(dr, im)), e.mul(pi, inner)))
            e.store(new_re, states, e.at(place, j))
            e.store(new_im, states, e.at(place, count, j))
            total = e.add(e.load(scratch, e.at(summed, j)), e.add(e.mul(cr, new_re), e.mul(ci, new_im)))
            e.store(total, scratch, e.at(summed, j))
        return context.get_dummy_value()

    return types.void(w, types.int64, x, types.int64, work, *[types.int64] * 4), codegen


def _float32_vector(e: _Emit, pointer: Any, index: Any) -> Any:
    return e.load(pointer, index)


def _integers(e: _Emit, pointer: Any, index: Any, bits: int) -> Any:
    vector = ir.VectorType(ir.IntType(bits), WIDTH)
    place = e.builder.bitcast(e.builder.gep(pointer, [index]), vector.as_pointer())
    return e.builder.load(place, align=1)


def _int8_vector(e: _Emit, pointer: Any, index: Any) -> Any:
    wide = e.builder.sext(_integers(e, pointer, index, 8), ir.VectorType(_I32, WIDTH))
    return e.builder.sitofp(wide, _VECTOR)


def half_value(builder: Any, bits: Any) -> Any:
    """The float32 of finite float16 bits, (vectors of) integers of 32 bits (IEEE 754-2019, 3.4).

    By integer arithmetic: LLVM's own conversion calls a library function that is not there on a processor without
    F16C, and float32 arithmetic on the bits of a half subnormal would be flushed.
    """
    integer = bits.type
    vector = isinstance(integer, ir.VectorType)
    real = _VECTOR if vector else _F32

    def constant(value: Any, kind: Any) -> Any:
        return ir.Constant(kind, [value] * WIDTH if vector else value)

    size = builder.and_(bits, constant(0x7FFF, integer))
    # Ten bits of fraction become 23, and the exponent's bias 15 becomes 127.
    normal = builder.add(builder.shl(size, constant(13, integer)), constant(112 << 23, integer))
    subnormal = builder.fmul(builder.sitofp(size, real), constant(2.0**-24, real))
    is_normal = builder.icmp_signed(">=", size, constant(0x400, integer))
    magnitude = builder.select(is_normal, normal, builder.bitcast(subnormal, integer))
    sign = builder.shl(builder.and_(bits, constant(0x8000, integer)), constant(16, integer))
    return builder.bitcast(builder.or_(magnitude, sign), real)


def _float16_vector(e: _Emit, pointer: Any, index: Any) -> Any:
    wide = e.builder.zext(_integers(e, pointer, index, 16), ir.VectorType(_I32, WIDTH))
    return half_value(e.builder, wide)


def _four_columns(values: Callable[[_Emit, Any, Any], Any]) -> Any:
    """z += four columns of weights times g[k : k + 4]; fewer than four are padded with columns of zeros."""

    @intrinsic
    def columns(typingctx: Any, w: Any, at: Any, work: Any, g: Any, z: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            e = _Emit(context, builder)
            weights, scratch = e.data(signature.args[0], arguments[0]), e.data(signature.args[2], arguments[2])
            at, g, z, count = (arguments[i] for i in (1, 3, 4, 5))
            factors = []
            for i in range(4):
                factors.append(e.splat(builder.load(builder.gep(scratch, [e.at(g, ir.Constant(_I64, i))]))))
            with e.vectors(count) as j:
                terms = [e.mul(values(e, weights, e.at(at, e.times(count, i), j)), factors[i]) for i in range(4)]
                total = e.add(e.add(terms[0], terms[1]), e.add(terms[2], terms[3]))
                e.store(e.add(e.load(scratch, e.at(z, j)), total), scratch, e.at(z, j))
            return context.get_dummy_value()

        return types.void(w, types.int64, work, types.int64, types.int64, types.int64), codegen

    return columns


four_columns_float32 = _four_columns(_float32_vector)
four_columns_float16 = _four_columns(_float16_vector)
four_columns_int8 = _four_columns(_int8_vector)


@intrinsic
def gelu(typingctx: Any, work: Any, at: Any, count: Any) -> Any:
    """In place: x Phi(x)."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        e = _Emit(context, builder)
        scratch = e.data(signature.args[0], arguments[0])
        with e.vectors(arguments[2]) as j:
            x = e.load(scratch, e.at(arguments[1], j))
            erf = e.rational(e.mul(x, _constant(0.5**0.5)), *ERF)
            half = e.mul(_constant(0.5), x)
            e.store(e.add(half, e.mul(half, erf)), scratch, e.at(arguments[1], j))
        return context.get_dummy_value()

    return types.void(work, types.int64, types.int64), codegen


@intrinsic
def gate(typingctx: Any, work: Any, value: Any, by: Any, count: Any) -> Any:
    """value *= sigmoid(by)."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        e = _Emit(context, builder)
        scratch = e.data(signature.args[0], arguments[0])
        value, by, count = arguments[1:]
        with e.vectors(count) as j:
            tanh = e.rational(e.mul(_constant(0.5), e.load(scratch, e.at(by, j))), *TANH)
            half = e.mul(_constant(0.5), e.load(scratch, e.at(value, j)))
            e.store(e.add(half, e.mul(half, tanh)), scratch, e.at(value, j))
        return context.get_dummy_value()

    return types.void(work, types.int64, types.int64, types.int64), codegen

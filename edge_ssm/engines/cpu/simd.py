"""The CPU kernel's inner loops, written as vectors of eight float32: one AVX register, or two NEON registers.

LLVM vectorises plain loops too. But it guards each of them with checks for overlapping arrays, and computes what does
not fill four registers in scalar code. At the row lengths of a pruned network that takes longer than the work itself
(measured: 60 ns instead of 10 ns for a row of 16 channels). Here arrays never overlap, and rows are padded to whole
vectors.

Every sum has one order, whatever else is computed beside it, and no operation may be reassociated. A chunk therefore
gives the same bits as its single steps. A product and a sum are fused if the processor can do so (llvm.fmuladd).

The functions are Numba intrinsics: Numba calls the Python function to emit LLVM IR. Arguments are pointers; ``count``
is a multiple of WIDTH.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from edge_ssm.engines.cpu.activations import ERF, TANH
from edge_ssm.engines.cpu.emitter import (
    F32,
    FLOAT32,
    I32,
    INTEGERS,
    SHORTS,
    VECTOR,
    Emitter,
    intrinsic,
    vector_intrinsic,
    vector_of,
)
from edge_ssm.engines.cpu.layout import ITEMS, SLAB, WIDTH
from edge_ssm.engines.cpu.symbols import HALF_VALUES, PAIR_PRODUCTS

_P, _I = FLOAT32, types.int64


def _pointer(kind: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(kind))

        return kind(types.int64), codegen

    return pointer


float32_at = _pointer(FLOAT32)
float64_at = _pointer(types.CPointer(types.float64))
int64_at = _pointer(types.CPointer(types.int64))


@intrinsic
def offset(typingctx: Any, pointer: Any, index: Any) -> Any:
    """Return the pointer to the element at ``index``."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), codegen


@vector_intrinsic(_P, _P, _I)
def copy(e: Emitter, source: Any, target: Any, count: Any) -> None:
    """Compute target = source."""
    with e.loop(count, WIDTH) as j:
        e.store(e.load(source, j), target, j)


@vector_intrinsic(_P, _P, _I)
def add(e: Emitter, source: Any, target: Any, count: Any) -> None:
    """Compute target += source."""
    with e.loop(count, WIDTH) as j:
        e.store(e.add(e.load(target, j), e.load(source, j)), target, j)


@vector_intrinsic(_P, _P, _P, _I)
def multiply(e: Emitter, a: Any, b: Any, target: Any, count: Any) -> None:
    """Compute target = a b."""
    with e.loop(count, WIDTH) as j:
        e.store(e.mul(e.load(a, j), e.load(b, j)), target, j)


@vector_intrinsic(_P, types.float32, _P, _I)
def add_multiple(e: Emitter, source: Any, factor: Any, target: Any, count: Any) -> None:
    """Compute target += factor source."""
    factors = e.splat(factor)
    with e.loop(count, WIDTH) as j:
        e.store(e.fma(e.load(source, j), factors, e.load(target, j)), target, j)


@vector_intrinsic(_P, _P, _P, _P, _I)
def affine(e: Emitter, weight: Any, bias: Any, source: Any, target: Any, count: Any) -> None:
    """Compute target = weight source + bias. ``source`` and ``target`` may be the same."""
    with e.loop(count, WIDTH) as j:
        e.store(e.fma(e.load(weight, j), e.load(source, j), e.load(bias, j)), target, j)


@vector_intrinsic(_P, _P, _P, _P, _P, _P, _I)
def layer_norm(e: Emitter, head: Any, weight: Any, bias: Any, mask: Any, source: Any, target: Any, count: Any) -> None:
    """Compute LayerNorm over the values whose ``mask`` is 1. ``head`` holds 1 / (their number) and eps."""
    share, none = e.scalar(head, 0), vector_of(0.0)
    total = e.variable(none)
    with e.loop(count, WIDTH) as j:
        # The padding after the last channel is zero in the source.
        e.builder.store(e.add(e.builder.load(total), e.load(source, j)), total)
    mean = e.splat(e.builder.fmul(e.total(e.builder.load(total)), share))
    squares = e.variable(none)
    with e.loop(count, WIDTH) as j:
        apart = e.mul(e.sub(e.load(source, j), mean), e.load(mask, j))
        e.builder.store(e.fma(apart, apart, e.builder.load(squares)), squares)
    variance = e.builder.fmul(e.total(e.builder.load(squares)), share)
    root = e.builder.module.declare_intrinsic("llvm.sqrt", [F32])
    deviation = e.builder.call(root, [e.builder.fadd(variance, e.scalar(head, 1))])
    scale = e.splat(e.builder.fdiv(ir.Constant(F32, 1.0), deviation))
    with e.loop(count, WIDTH) as j:
        apart = e.mul(e.sub(e.load(source, j), mean), scale)
        e.store(e.fma(apart, e.load(weight, j), e.load(bias, j)), target, j)


@vector_intrinsic(_P, _P, _I, _P, _P)
def diagonal(e: Emitter, w: Any, x: Any, pairs: Any, gathered: Any, y: Any) -> None:
    """Step WIDTH diagonal channels: x += delta x + u, then y += Re(C x), where u is ``gathered``.

    w is [pair][dr di cr ci] and x is [pair][re im], each of WIDTH values. The real and the imaginary products have a
    sum each, because the additions of a single sum would wait for one another.
    """
    u = e.load(gathered)
    reals, imaginaries = e.variable(e.load(y)), e.variable(vector_of(0.0))
    with e.loop(pairs) as n:
        at, place = e.times(n, 4 * WIDTH), e.times(n, 2 * WIDTH)
        dr, di, cr, ci = (e.load(w, e.plus(at, i * WIDTH)) for i in range(4))
        re, im = (e.load(x, e.plus(place, i * WIDTH)) for i in range(2))
        new_re = e.add(re, e.fma(dr, re, e.fnma(di, im, u)))
        new_im = e.add(im, e.fma(dr, im, e.mul(di, re)))
        e.store(new_re, x, place)
        e.store(new_im, x, e.plus(place, WIDTH))
        e.builder.store(e.fma(cr, new_re, e.builder.load(reals)), reals)
        e.builder.store(e.fma(ci, new_im, e.builder.load(imaginaries)), imaginaries)
    e.store(e.add(e.builder.load(reals), e.builder.load(imaginaries)), y)


@vector_intrinsic(_P, _P, _I, _P, _P)
def rank_one(e: Emitter, w: Any, x: Any, pairs: Any, gathered: Any, y: Any) -> None:
    """Step WIDTH channels with a rank-one term: q = 2 Re(r x) + beta u, x += delta x + u + p q, y += Re(C x).

    w is [beta], then [pair][dr di cr ci pr pi rr ri], each of WIDTH values. The factor 2 is in r.
    """
    u = e.load(gathered)
    values = e.builder.gep(w, [e.integer(WIDTH)])
    reals, imaginaries = e.variable(e.mul(e.load(w), u)), e.variable(vector_of(0.0))
    with e.loop(pairs) as n:
        at, place = e.times(n, 8 * WIDTH), e.times(n, 2 * WIDTH)
        rr, ri = (e.load(values, e.plus(at, i * WIDTH)) for i in (6, 7))
        re, im = (e.load(x, e.plus(place, i * WIDTH)) for i in range(2))
        e.builder.store(e.fma(rr, re, e.builder.load(reals)), reals)
        e.builder.store(e.fma(ri, im, e.builder.load(imaginaries)), imaginaries)
    q = e.add(e.builder.load(reals), e.builder.load(imaginaries))
    reals, imaginaries = e.variable(e.load(y)), e.variable(vector_of(0.0))
    with e.loop(pairs) as n:
        at, place = e.times(n, 8 * WIDTH), e.times(n, 2 * WIDTH)
        dr, di, cr, ci, pr, pi = (e.load(values, e.plus(at, i * WIDTH)) for i in range(6))
        re, im = (e.load(x, e.plus(place, i * WIDTH)) for i in range(2))
        drive = e.fma(pr, q, u)
        new_re = e.add(re, e.fma(dr, re, e.fnma(di, im, drive)))
        new_im = e.add(im, e.fma(dr, im, e.fma(di, re, e.mul(pi, q))))
        e.store(new_re, x, place)
        e.store(new_im, x, e.plus(place, WIDTH))
        e.builder.store(e.fma(cr, new_re, e.builder.load(reals)), reals)
        e.builder.store(e.fma(ci, new_im, e.builder.load(imaginaries)), imaginaries)
    e.store(e.add(e.builder.load(reals), e.builder.load(imaginaries)), y)


def _float32_vector(e: Emitter, pointer: Any, index: Any) -> Any:
    return e.load(pointer, index)


def _integers(e: Emitter, pointer: Any, index: Any, bits: int, count: int) -> Any:
    kind = ir.IntType(bits)
    place = e.builder.gep(e.builder.bitcast(pointer, kind.as_pointer()), [index])
    return e.builder.load(e.builder.bitcast(place, ir.VectorType(kind, count).as_pointer()), align=1)


def _half_function(module: Any) -> Any:
    """Define the function HALF_VALUES: <8 x i16> with the bits of finite float16 -> <8 x float>.

    The format is that of IEEE 754-2019, 3.4. The function uses integer arithmetic, because LLVM's own conversion calls
    a library function on processors without F16C, and float32 arithmetic on the bits of a float16 subnormal would
    flush it. ``compiler`` replaces the function's body on processors that have an instruction for it.
    """
    short = ir.VectorType(ir.IntType(16), WIDTH)
    function = cgutils.get_or_insert_function(module, ir.FunctionType(VECTOR, [short]), HALF_VALUES)
    if function.blocks:
        return function
    function.linkage = "linkonce_odr"
    builder = ir.IRBuilder(function.append_basic_block())

    def constant(value: int) -> Any:
        return ir.Constant(INTEGERS, [value] * WIDTH)

    bits = builder.zext(function.args[0], INTEGERS)
    size = builder.and_(bits, constant(0x7FFF))
    # Ten bits of fraction become 23, and the exponent's bias 15 becomes 127.
    normal = builder.add(builder.shl(size, constant(13)), constant(112 << 23))
    subnormal = builder.fmul(builder.sitofp(size, VECTOR), vector_of(2.0**-24))
    is_normal = builder.icmp_signed(">=", size, constant(0x400))
    magnitude = builder.select(is_normal, normal, builder.bitcast(subnormal, INTEGERS))
    sign = builder.shl(builder.and_(bits, constant(0x8000)), constant(16))
    builder.ret(builder.bitcast(builder.or_(magnitude, sign), VECTOR))
    return function


def _float16_vector(e: Emitter, pointer: Any, index: Any) -> Any:
    return e.builder.call(_half_function(e.builder.module), [_integers(e, pointer, index, 16, WIDTH)])


SUMS = 8
"""Number of vectors of sums that are kept in registers together, so that additions need not wait for one another."""


def _groups(vectors: int, sums: int) -> Iterator[range]:
    """Divide ``vectors`` of rows, each with ``sums`` vectors of sums, into groups that pass the columns together."""
    size = max(1, min(vectors, SUMS // sums))
    for first in range(0, vectors, size):
        yield range(first, first + size)


def _row(e: Emitter, at: Any, columns: Any, k: Any, v: int, vectors: int, values: int) -> Any:
    """Emit the offset of the weights of vector ``v`` and column ``k``, in slabs of rows [column][rows][values]."""
    wide = min(vectors, SLAB) * WIDTH * values
    slab = e.times(columns, v // SLAB * wide)
    return e.plus(at, slab, e.times(k, wide), v % SLAB * WIDTH * values)


def _columns(read: Callable[[Emitter, Any, Any], Any], vectors: int, items: int) -> Any:
    """Return an intrinsic that computes z = W y for ``vectors`` of rows and for ``items`` items at once.

    The y, and the z, of two items are ``stride`` apart.
    """

    @vector_intrinsic(_P, _I, _P, _I, _P, _P, _I)
    def columns(e: Emitter, w: Any, at: Any, _: Any, count: Any, y: Any, z: Any, stride: Any) -> None:
        inputs = [e.builder.gep(y, [e.times(stride, item)]) for item in range(items)]
        for group in _groups(vectors, items):
            sums = {(v, item): e.variable(vector_of(0.0)) for v in group for item in range(items)}
            with e.loop(count) as k:
                weights = {v: read(e, w, _row(e, at, count, k, v, vectors, 1)) for v in group}
                for item in range(items):
                    factor = e.splat(e.scalar(inputs[item], k))
                    for v in group:
                        total = sums[v, item]
                        e.builder.store(e.fma(weights[v], factor, e.builder.load(total)), total)
            for (v, item), total in sums.items():
                e.store(e.builder.load(total), z, e.plus(e.times(stride, item), v * WIDTH))

    return columns


def _pair_function(module: Any) -> Any:
    """Define the function PAIR_PRODUCTS: <16 x i8> w, two int16 y in an i32 -> <8 x i32> of sums of two products.

    Sum i is w[2 i] y[0] + w[2 i + 1] y[1]. ``compiler`` replaces the function's body on processors that have an
    instruction for it.
    """
    pairs = ir.VectorType(ir.IntType(8), 2 * WIDTH)
    function = cgutils.get_or_insert_function(module, ir.FunctionType(INTEGERS, [pairs, I32]), PAIR_PRODUCTS)
    if function.blocks:
        return function
    function.linkage = "linkonce_odr"
    builder = ir.IRBuilder(function.append_basic_block())
    e, nothing = Emitter(builder), ir.Constant(pairs, ir.Undefined)
    products = []
    for i in range(2):
        chosen = ir.Constant(INTEGERS, list(range(i, 2 * WIDTH, 2)))
        short = builder.sext(builder.shuffle_vector(function.args[0], nothing, chosen), SHORTS)
        y = builder.trunc(builder.lshr(function.args[1], ir.Constant(I32, 16 * i)), ir.IntType(16))
        products.append(builder.mul(builder.sext(short, INTEGERS), builder.sext(e.splat(y), INTEGERS)))
    builder.ret(builder.add(*products))
    return function


_MAGIC = 1.5 * 2.0**23
"""Adding it to a float32 of at most 2^22 rounds that to a whole number, which the low bits of the sum then hold."""


@vector_intrinsic(_P, _P, types.float32, _I)
def to_integers(e: Emitter, y: Any, scale: Any, largest: Any, count: Any) -> None:
    """Quantise y to int16 q in place, so that y = q scale[0] + scale[1] and |q| <= ``largest`` (2^15 - 2 at most).

    scale[1] is the middle of the values. GELU's values are hardly ever negative: a range around zero would leave half
    of the integers unused.
    """
    builder = e.builder
    low, high = e.variable(e.load(y)), e.variable(e.load(y))
    with e.loop(count, WIDTH) as j:
        values = e.load(y, j)
        for extreme, sign in ((low, "<"), (high, ">")):
            current = builder.load(extreme)
            builder.store(builder.select(builder.fcmp_ordered(sign, values, current), values, current), extreme)
    bottom, top = e.lowest(builder.load(low)), e.highest(builder.load(high))
    half, magic = ir.Constant(F32, 0.5), ir.Constant(F32, _MAGIC)
    unit = builder.fdiv(builder.fmul(builder.fsub(top, bottom), half), largest)
    # If all values are equal, any unit will do.
    least = ir.Constant(F32, 2.0**-100)
    unit = builder.select(builder.fcmp_ordered(">", unit, least), unit, least)
    inverse = builder.fdiv(ir.Constant(F32, 1.0), unit)
    middle = builder.fmul(builder.fmul(builder.fadd(top, bottom), half), inverse)
    whole = builder.fsub(builder.fadd(middle, magic), magic)
    builder.store(unit, scale)
    builder.store(builder.fmul(whole, unit), builder.gep(scale, [e.integer(1)]))
    factor, shift = e.splat(inverse), e.splat(builder.fsub(magic, whole))
    target = builder.bitcast(y, ir.IntType(16).as_pointer())
    with e.loop(count, WIDTH) as j:
        bits = builder.bitcast(e.fma(e.load(y, j), factor, shift), INTEGERS)
        place = builder.bitcast(builder.gep(target, [j]), SHORTS.as_pointer())
        builder.store(builder.trunc(bits, SHORTS), place, align=2)


def _integer_columns(vectors: int, items: int) -> Any:
    """Return an intrinsic that computes z = W y for int8 weights and the y of ``to_integers``, in exact integer sums.

    The weights are [pair of columns][rows][2]. ``sums`` holds the sum of each row's weights. The scale of an item is
    in the last two values of its stride.
    """

    @vector_intrinsic(_P, _I, _P, _I, _P, _P, _I)
    def columns(e: Emitter, w: Any, at: Any, sums: Any, pairs: Any, y: Any, z: Any, stride: Any) -> None:
        builder, none = e.builder, ir.Constant(INTEGERS, [0] * WIDTH)
        starts = [builder.gep(y, [e.times(stride, item)]) for item in range(items)]
        inputs = [builder.bitcast(start, I32.as_pointer()) for start in starts]
        scales = [[e.splat(e.scalar(start, e.plus(stride, i))) for i in (-2, -1)] for start in starts]
        product = _pair_function(builder.module)
        for group in _groups(vectors, items):
            totals = {(v, item): e.variable(none) for v in group for item in range(items)}
            with e.loop(pairs) as k:
                weights = {v: _integers(e, w, _row(e, at, pairs, k, v, vectors, 2), 8, 2 * WIDTH) for v in group}
                for item in range(items):
                    both = e.scalar(inputs[item], k)
                    for v in group:
                        more = builder.call(product, [weights[v], both])
                        builder.store(builder.add(builder.load(totals[v, item]), more), totals[v, item])
            for (v, item), total in totals.items():
                unit, middle = scales[item]
                constant = e.mul(middle, e.load(sums, v * WIDTH))
                value = e.fma(unit, builder.sitofp(builder.load(total), VECTOR), constant)
                e.store(value, z, e.plus(e.times(stride, item), v * WIDTH))

    return columns


# Intrinsics by type of the weights and number of vectors of rows: for one item, and for ITEMS items at once.
_READ = {"float32": _float32_vector, "float16": _float16_vector}
MULTIPLY_ONE = {name: {v: _columns(read, v, 1) for v in (8, 4, 2, 1)} for name, read in _READ.items()}
MULTIPLY_SEVERAL = {name: {v: _columns(read, v, ITEMS) for v in (2, 1)} for name, read in _READ.items()}
MULTIPLY_ONE["int8"] = {v: _integer_columns(v, 1) for v in (8, 4, 2, 1)}
MULTIPLY_SEVERAL["int8"] = {v: _integer_columns(v, ITEMS) for v in (2, 1)}


@vector_intrinsic(_P, _I)
def gelu(e: Emitter, values: Any, count: Any) -> None:
    """Compute x Phi(x) in place."""
    with e.loop(count, WIDTH) as j:
        x = e.load(values, j)
        erf = e.rational(e.mul(x, vector_of(0.5**0.5)), *ERF)
        half = e.mul(vector_of(0.5), x)
        e.store(e.fma(half, erf, half), values, j)


@vector_intrinsic(_P, _P, _I)
def gate(e: Emitter, values: Any, by: Any, count: Any) -> None:
    """Compute values *= sigmoid(by)."""
    with e.loop(count, WIDTH) as j:
        tanh = e.rational(e.mul(vector_of(0.5), e.load(by, j)), *TANH)
        half = e.mul(vector_of(0.5), e.load(values, j))
        e.store(e.fma(half, tanh, half), values, j)


@intrinsic
def dot(typingctx: Any, a: Any, b: Any, count: Any) -> Any:
    """Return the inner product of a and b."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        e = Emitter(builder)
        total = e.variable(vector_of(0.0))
        with e.loop(arguments[2], WIDTH) as j:
            e.builder.store(e.fma(e.load(arguments[0], j), e.load(arguments[1], j), e.builder.load(total)), total)
        return e.total(builder.load(total))

    return types.float32(FLOAT32, FLOAT32, types.int64), codegen

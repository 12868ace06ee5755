"""The CPU kernel's inner loops as explicit vectors of eight float32, one AVX register or two NEON ones.

LLVM vectorises plain loops too, but guards each with checks for overlapping arrays and leaves what does not fill four
registers to scalar code: at the row lengths of a pruned network that costs more than the work itself (measured: 60 ns
for a row of 16 channels, against 10). Arrays here never overlap, and rows are padded to whole vectors.

Every sum has one order, whatever else is computed beside it, and no operation may be reassociated: a chunk is as many
steps, bit for bit. A product and a sum are fused where the processor can (llvm.fmuladd).

Arguments are pointers; ``count`` is a multiple of WIDTH.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from edge_ssm.engines.layout import ITEMS, WIDTH
from edge_ssm.engines.rational import ERF, TANH

intrinsic: Any = numba_intrinsic
FLOAT32 = types.CPointer(types.float32)
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, WIDTH)
_LANES = ir.VectorType(_I32, WIDTH)


def _constant(value: float) -> Any:
    return ir.Constant(_VECTOR, [value] * WIDTH)


class _Emit:
    """A builder with the few vector operations that the kernel is made of."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def _place(self, pointer: Any, index: Any, kind: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(pointer, [self.integer(index)]), kind.as_pointer())

    def integer(self, value: Any) -> Any:
        return ir.Constant(_I64, value) if isinstance(value, int) else value

    def load(self, pointer: Any, index: Any = 0) -> Any:
        return self.builder.load(self._place(pointer, index, _VECTOR), align=4)

    def store(self, value: Any, pointer: Any, index: Any = 0) -> None:
        self.builder.store(value, self._place(pointer, index, _VECTOR), align=4)

    def scalar(self, pointer: Any, index: Any = 0) -> Any:
        return self.builder.load(self.builder.gep(pointer, [self.integer(index)]))

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b)

    def sub(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b)

    def mul(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a b + c, fused where the processor can."""
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fmuladd.v{WIDTH}f32"), [a, b, c]
        )

    def fnma(self, a: Any, b: Any, c: Any) -> Any:
        """c - a b."""
        return self.fma(self.builder.fneg(a), b, c)

    def plus(self, *values: Any) -> Any:
        total = self.integer(values[0])
        for value in values[1:]:
            total = self.builder.add(total, self.integer(value))
        return total

    def times(self, value: Any, factor: Any) -> Any:
        return self.builder.mul(value, self.integer(factor))

    def splat(self, value: Any) -> Any:
        first = self.builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_LANES, [0] * WIDTH))

    def total(self, vector: Any) -> Any:
        """The sum of a vector's values, halves first."""
        nothing, width = ir.Constant(_VECTOR, ir.Undefined), WIDTH
        while width > 1:
            width //= 2
            order = [(i + width) % WIDTH for i in range(WIDTH)]
            vector = self.add(vector, self.builder.shuffle_vector(vector, nothing, ir.Constant(_LANES, order)))
        return self.builder.extract_element(vector, ir.Constant(_I32, 0))

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
                total = self.fma(total, square, _constant(coefficient))
            sums.append(total)
        return builder.fdiv(self.mul(x, sums[0]), sums[1])

    @contextmanager
    def loop(self, count: Any, step: int = 1) -> Iterator[Any]:
        """Over 0, step, 2 step, ... below ``count``."""
        zero = ir.Constant(_I64, 0)
        with cgutils.for_range_slice(self.builder, zero, count, self.integer(step), inc=True) as (j, _):
            yield j

    def variable(self, value: Any) -> Any:
        """A place for a value that a loop changes; LLVM makes a register of it."""
        place = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, place)
        return place


def _function(*kinds: Any) -> Callable[[Callable[..., None]], Any]:
    """An intrinsic without a result from a function of (emit, *values) that takes pointers (p) and integers (i)."""

    def made(body: Callable[..., None]) -> Any:
        names = ", ".join(f"a{i}" for i in range(len(kinds)))
        signature = types.void(*kinds)

        def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            body(_Emit(builder), *arguments)
            return context.get_dummy_value()

        # Numba reads an intrinsic's parameters from its signature, so it needs one with as many.
        space: dict[str, Any] = {"signature": signature, "codegen": codegen}
        exec(f"def {body.__name__}(typingctx, {names}):\n    return signature, codegen", space)
        return intrinsic(space[body.__name__])

    return made


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
def behind(typingctx: Any, pointer: Any, index: Any) -> Any:
    """The pointer to the element at ``index``."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), codegen


@_function(_P, _P, _I)
def copy(e: _Emit, source: Any, target: Any, count: Any) -> None:
    with e.loop(count, WIDTH) as j:
        e.store(e.load(source, j), target, j)


@_function(_P, _P, _I)
def add(e: _Emit, source: Any, target: Any, count: Any) -> None:
    """target += source."""
    with e.loop(count, WIDTH) as j:
        e.store(e.add(e.load(target, j), e.load(source, j)), target, j)


@_function(_P, _P, _P, _I)
def multiply(e: _Emit, a: Any, b: Any, target: Any, count: Any) -> None:
    """target = a b."""
    with e.loop(count, WIDTH) as j:
        e.store(e.mul(e.load(a, j), e.load(b, j)), target, j)


@_function(_P, types.float32, _P, _I)
def add_multiple(e: _Emit, source: Any, factor: Any, target: Any, count: Any) -> None:
    """target += factor source."""
    factors = e.splat(factor)
    with e.loop(count, WIDTH) as j:
        e.store(e.fma(e.load(source, j), factors, e.load(target, j)), target, j)


@_function(_P, _P, _P, _P, _I)
def affine(e: _Emit, weight: Any, bias: Any, source: Any, target: Any, count: Any) -> None:
    """target = weight source + bias; source and target may be the same."""
    with e.loop(count, WIDTH) as j:
        e.store(e.fma(e.load(weight, j), e.load(source, j), e.load(bias, j)), target, j)


@_function(_P, _P, _P, _P, _P, _P, _I)
def layer_norm(e: _Emit, head: Any, weight: Any, bias: Any, mask: Any, source: Any, target: Any, count: Any) -> None:
    """LayerNorm over the values whose ``mask`` is 1; ``head`` holds 1 / their number, and eps."""
    share, none = e.scalar(head, 0), _constant(0.0)
    total = e.variable(none)
    with e.loop(count, WIDTH) as j:
        # What stands behind the last channel is zero in the source.
        e.builder.store(e.add(e.builder.load(total), e.load(source, j)), total)
    mean = e.splat(e.builder.fmul(e.total(e.builder.load(total)), share))
    squares = e.variable(none)
    with e.loop(count, WIDTH) as j:
        apart = e.mul(e.sub(e.load(source, j), mean), e.load(mask, j))
        e.builder.store(e.fma(apart, apart, e.builder.load(squares)), squares)
    variance = e.builder.fmul(e.total(e.builder.load(squares)), share)
    root = e.builder.module.declare_intrinsic("llvm.sqrt", [_F32])
    deviation = e.builder.call(root, [e.builder.fadd(variance, e.scalar(head, 1))])
    scale = e.splat(e.builder.fdiv(ir.Constant(_F32, 1.0), deviation))
    with e.loop(count, WIDTH) as j:
        apart = e.mul(e.sub(e.load(source, j), mean), scale)
        e.store(e.fma(apart, e.load(weight, j), e.load(bias, j)), target, j)


@_function(_P, _P, _I, _P, _P)
def diagonal(e: _Emit, w: Any, x: Any, pairs: Any, gathered: Any, y: Any) -> None:
    """WIDTH channels, all their pairs: x += delta x + gathered; y += Re(C x). w: [pair][dr di cr ci], x: [pair][re im].

    Real and imaginary products are summed apart: one sum would wait for itself.
    """
    u = e.load(gathered)
    reals, imaginaries = e.variable(e.load(y)), e.variable(_constant(0.0))
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


@_function(_P, _P, _I, _P, _P)
def low_rank(e: _Emit, w: Any, x: Any, pairs: Any, gathered: Any, y: Any) -> None:
    """The same with a rank-one term: q = 2 Re(r x) + beta u first, then x += delta x + u + p q.

    w: [beta], then [pair][dr di cr ci pr pi rr ri]; the factor 2 is in r.
    """
    u = e.load(gathered)
    values = e.builder.gep(w, [e.integer(WIDTH)])
    reals, imaginaries = e.variable(e.mul(e.load(w), u)), e.variable(_constant(0.0))
    with e.loop(pairs) as n:
        at, place = e.times(n, 8 * WIDTH), e.times(n, 2 * WIDTH)
        rr, ri = (e.load(values, e.plus(at, i * WIDTH)) for i in (6, 7))
        re, im = (e.load(x, e.plus(place, i * WIDTH)) for i in range(2))
        e.builder.store(e.fma(rr, re, e.builder.load(reals)), reals)
        e.builder.store(e.fma(ri, im, e.builder.load(imaginaries)), imaginaries)
    q = e.add(e.builder.load(reals), e.builder.load(imaginaries))
    reals, imaginaries = e.variable(e.load(y)), e.variable(_constant(0.0))
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


def _float32_vector(e: _Emit, pointer: Any, index: Any) -> Any:
    return e.load(pointer, index)


def _integers(e: _Emit, pointer: Any, index: Any, bits: int) -> Any:
    kind = ir.IntType(bits)
    place = e.builder.gep(e.builder.bitcast(pointer, kind.as_pointer()), [index])
    return e.builder.load(e.builder.bitcast(place, ir.VectorType(kind, WIDTH).as_pointer()), align=1)


def _int8_vector(e: _Emit, pointer: Any, index: Any) -> Any:
    wide = e.builder.sext(_integers(e, pointer, index, 8), _LANES)
    return e.builder.sitofp(wide, _VECTOR)


HALF = "edge_ssm_half_values"
"""The function that reads halves; ``compiler`` takes the processor's own instruction where it has one."""


def _half_function(module: Any) -> Any:
    """float32 of WIDTH finite float16, given as integers (IEEE 754-2019, 3.4).

    By integer arithmetic: LLVM's own conversion calls a library function that is not there on a processor without
    F16C, and float32 arithmetic on the bits of a half subnormal would be flushed.
    """
    short = ir.VectorType(ir.IntType(16), WIDTH)
    function = cgutils.get_or_insert_function(module, ir.FunctionType(_VECTOR, [short]), HALF)
    if function.blocks:
        return function
    function.linkage = "linkonce_odr"
    builder = ir.IRBuilder(function.append_basic_block())

    def constant(value: int) -> Any:
        return ir.Constant(_LANES, [value] * WIDTH)

    bits = builder.zext(function.args[0], _LANES)
    size = builder.and_(bits, constant(0x7FFF))
    # Ten bits of fraction become 23, and the exponent's bias 15 becomes 127.
    normal = builder.add(builder.shl(size, constant(13)), constant(112 << 23))
    subnormal = builder.fmul(builder.sitofp(size, _VECTOR), _constant(2.0**-24))
    is_normal = builder.icmp_signed(">=", size, constant(0x400))
    magnitude = builder.select(is_normal, normal, builder.bitcast(subnormal, _LANES))
    sign = builder.shl(builder.and_(bits, constant(0x8000)), constant(16))
    builder.ret(builder.bitcast(builder.or_(magnitude, sign), _VECTOR))
    return function


def _float16_vector(e: _Emit, pointer: Any, index: Any) -> Any:
    return e.builder.call(_half_function(e.builder.module), [_integers(e, pointer, index, 16)])


def _columns(values: Callable[[_Emit, Any, Any], Any], vectors: int, items: int) -> Any:
    """z = W y for ``vectors`` of rows and ``items`` of the tile at once, all sums in registers.

    w: [column][``stride`` rows] from the element at ``at``; the items' y and z lie ``y_stride`` and ``z_stride`` apart.
    """

    @_function(_P, _I, _I, _I, _P, _I, _P, _I)
    def columns(
        e: _Emit, w: Any, at: Any, stride: Any, count: Any, y: Any, y_stride: Any, z: Any, z_stride: Any
    ) -> None:
        sums = [[e.variable(_constant(0.0)) for _ in range(vectors)] for _ in range(items)]
        inputs = [e.builder.gep(y, [e.times(y_stride, item)]) for item in range(items)]
        with e.loop(count) as k:
            row = e.plus(at, e.times(k, stride))
            weights = [values(e, w, e.plus(row, v * WIDTH)) for v in range(vectors)]
            for item in range(items):
                factor = e.splat(e.scalar(inputs[item], k))
                for v in range(vectors):
                    e.builder.store(e.fma(weights[v], factor, e.builder.load(sums[item][v])), sums[item][v])
        for item in range(items):
            for v in range(vectors):
                e.store(e.builder.load(sums[item][v]), z, e.plus(e.times(z_stride, item), v * WIDTH))

    return columns


_KINDS = {"float32": _float32_vector, "float16": _float16_vector, "int8": _int8_vector}
SINGLE = {name: {v: _columns(read, v, 1) for v in (8, 4, 2, 1)} for name, read in _KINDS.items()}
SEVERAL = {name: {v: _columns(read, v, ITEMS) for v in (2, 1)} for name, read in _KINDS.items()}


@_function(_P, _I)
def gelu(e: _Emit, values: Any, count: Any) -> None:
    """In place: x Phi(x)."""
    with e.loop(count, WIDTH) as j:
        x = e.load(values, j)
        erf = e.rational(e.mul(x, _constant(0.5**0.5)), *ERF)
        half = e.mul(_constant(0.5), x)
        e.store(e.fma(half, erf, half), values, j)


@_function(_P, _P, _I)
def gate(e: _Emit, values: Any, by: Any, count: Any) -> None:
    """values *= sigmoid(by)."""
    with e.loop(count, WIDTH) as j:
        tanh = e.rational(e.mul(_constant(0.5), e.load(by, j)), *TANH)
        half = e.mul(_constant(0.5), e.load(values, j))
        e.store(e.fma(half, tanh, half), values, j)


@intrinsic
def dot(typingctx: Any, a: Any, b: Any, count: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        e = _Emit(builder)
        total = e.variable(_constant(0.0))
        with e.loop(arguments[2], WIDTH) as j:
            e.builder.store(e.fma(e.load(arguments[0], j), e.load(arguments[1], j), e.builder.load(total)), total)
        return e.total(builder.load(total))

    return types.float32(FLOAT32, FLOAT32, types.int64), codegen

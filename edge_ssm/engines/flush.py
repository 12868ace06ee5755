"""Subnormals: on x86 a decaying state that reaches them makes a step 29 times slower (measured), so they are flushed.

``enable()`` turns on flush-to-zero in the floating-point control register of the calling thread only and returns
what stood there; ``restore(word)`` puts it back. Both compile to one or two instructions inside a kernel.
x86-64: MXCSR bits FZ (15) and DAZ (6), Intel SDM vol. 1, 10.2.3. AArch64: FPCR bit FZ (24), Arm ARM C5.2.8.
Elsewhere both do nothing.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_MACHINE = platform.machine().lower()
_X86 = _MACHINE in ("x86_64", "amd64")
_ARM = _MACHINE in ("aarch64", "arm64")
_X86_FLUSH = (1 << 15) | (1 << 6)
_ARM_FLUSH = 1 << 24

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _x86_intrinsic(builder: Any, name: str) -> Any:
    return builder.module.declare_intrinsic(name, (), ir.FunctionType(ir.VoidType(), [I8.as_pointer()]))


def _read(builder: Any) -> Any:
    if _X86:
        declared = _x86_intrinsic(builder, "llvm.x86.sse.stmxcsr")
        slot = builder.alloca(I32)
        builder.call(declared, [builder.bitcast(slot, I8.as_pointer())])
        return builder.zext(builder.load(slot), I64)
    if _ARM:
        return builder.asm(ir.FunctionType(I64, []), "mrs $0, fpcr", "=r,~{memory}", [], side_effect=True)
    return ir.Constant(I64, 0)


def _write(builder: Any, word: Any) -> None:
    if _X86:
        declared = _x86_intrinsic(builder, "llvm.x86.sse.ldmxcsr")
        slot = builder.alloca(I32)
        builder.store(builder.trunc(word, I32), slot)
        builder.call(declared, [builder.bitcast(slot, I8.as_pointer())])
    elif _ARM:
        builder.asm(ir.FunctionType(ir.VoidType(), [I64]), "msr fpcr, $0", "r,~{memory}", [word], side_effect=True)


@intrinsic
def enable(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        old = _read(builder)
        bits = _X86_FLUSH if _X86 else _ARM_FLUSH
        _write(builder, builder.or_(old, ir.Constant(I64, bits)))
        return old

    return types.int64(), codegen


@intrinsic
def restore(typingctx: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _write(builder, arguments[0])
        return context.get_dummy_value()

    return types.none(types.int64), codegen

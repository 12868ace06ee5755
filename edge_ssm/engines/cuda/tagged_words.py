"""Access to the words that a running CUDA kernel and the host exchange.

A word holds the number of a step in its upper half and a float32 in its lower half. It is loaded and stored as 64 bits
at once, past the caches.

numba-cuda's own ``ldcv`` needs a driver at compile time; these functions do not.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda import extending

# Numba calls the functions without the typing context that their definitions take.
intrinsic: Any = extending.intrinsic
_WORD = ir.IntType(64)
_pointer: Any = types.CPointer
_WORDS = _pointer(types.int64)


@intrinsic  # type: ignore[untyped-decorator]
def load_word(typingctx: Any, words: Any, index: Any) -> Any:
    """Return words[index], read from memory as one word (PTX ld.volatile)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_WORD, [_WORD.as_pointer()])
        load = ir.InlineAsm(kind, "ld.volatile.global.u64 $0, [$1];", "=l,l,~{memory}", side_effect=True)
        return builder.call(load, [builder.gep(arguments[0], [arguments[1]])])

    return types.int64(_WORDS, index), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_word(typingctx: Any, words: Any, index: Any, word: Any) -> Any:
    """Set words[index] to ``word``, written to memory as one word (PTX st.volatile)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_WORD.as_pointer(), _WORD])
        store = ir.InlineAsm(kind, "st.volatile.global.u64 [$0], $1;", "l,l,~{memory}", side_effect=True)
        builder.call(store, [builder.gep(arguments[0], [arguments[1]]), arguments[2]])
        return context.get_dummy_value()

    return types.void(_WORDS, index, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_of(typingctx: Any, word: Any) -> Any:
    """Return the float32 in the lower half of a word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def word_of(typingctx: Any, number: Any, value: Any) -> Any:
    """Return the word of a number and a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low = builder.zext(builder.bitcast(arguments[1], ir.IntType(32)), _WORD)
        return builder.or_(builder.shl(arguments[0], ir.Constant(_WORD, 32)), low)

    return types.int64(types.int64, types.float32), generate

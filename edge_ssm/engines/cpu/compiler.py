"""Compile the CPU kernel for this processor or another one: ``python -m edge_ssm.engines.cpu.compiler``.

``cache`` runs this module in a separate process. Numba and LLVM thus stay out of the memory of the process that
streams, and their settings are those of this module.

Numba translates ``kernel.run`` to LLVM IR without optimising it. This module edits the IR so that it stands alone,
LLVM optimises it for the target and writes an object, and ``elf`` links the object.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any

from edge_ssm.engines.cpu import denormals, elf
from edge_ssm.engines.cpu.kernel_file import (
    TARGETS,
    Header,
    KernelImage,
    Target,
    processor_features,
    sources_digest,
)
from edge_ssm.engines.cpu.symbols import ENTRY, HALF_VALUES, PAIR_PRODUCTS

SETTINGS = {
    "NUMBA_OPT": "0",
    "NUMBA_LOOP_VECTORIZE": "0",
    "NUMBA_SLP_VECTORIZE": "0",
    "NUMBA_CPU_NAME": "generic",
    "NUMBA_CPU_FEATURES": "",
    "NUMBA_BOUNDSCHECK": "0",
    "NUMBA_DEBUGINFO": "0",
}
"""Numba's settings in this process: the translation must not depend on the processor that it runs on."""


def host() -> Target:
    """Return the processor of this machine."""
    import llvmlite.binding as llvm

    return Target(
        platform.machine(),
        llvm.get_host_cpu_name(),
        tuple(sorted(processor_features())),
        llvm.get_host_cpu_features().flatten(),
    )


def _translate() -> tuple[str, str]:
    """Return ``kernel.run`` in LLVM IR, and the name of its function there."""
    # Numba reads its settings when it is imported.
    os.environ.update(SETTINGS)
    from numba import types
    from numba.core import compiler
    from numba.core.compiler import Flags
    from numba.core.registry import cpu_target

    from edge_ssm.engines.cpu import kernel

    flags: Any = Flags()
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.nrt = False
    flags.error_model = "numpy"
    compilation = compiler.compile_extra(
        cpu_target.typing_context,
        cpu_target.target_context,
        kernel.run,
        (types.CPointer(types.int64),),
        types.int64,
        flags,
        {},
    )
    return compilation.library.get_llvm_str(), compilation.fndesc.llvm_func_name


_HALVES = """  %values = bitcast <8 x i16> %.1 to <8 x half>
  %wide = fpext <8 x half> %values to <8 x float>
  ret <8 x float> %wide"""
_PAIRS_OPERANDS = """  %w = sext <16 x i8> %.1 to <16 x i16>
  %one = insertelement <8 x i32> undef, i32 %.2, i32 0
  %all = shufflevector <8 x i32> %one, <8 x i32> undef, <8 x i32> zeroinitializer
  %y = bitcast <8 x i32> %all to <16 x i16>
"""
_AVX2_PAIRS = (
    _PAIRS_OPERANDS
    + """  %sums = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %w, <16 x i16> %y)
  ret <8 x i32> %sums"""
)
_FIRST, _SECOND = (", ".join(f"i32 {i}" for i in range(start, start + 8)) for start in (0, 8))
_SSE2_PAIRS = (
    _PAIRS_OPERANDS
    + f"""  %part = shufflevector <16 x i16> %y, <16 x i16> undef, <8 x i32> <{_FIRST}>
  %low = shufflevector <16 x i16> %w, <16 x i16> undef, <8 x i32> <{_FIRST}>
  %high = shufflevector <16 x i16> %w, <16 x i16> undef, <8 x i32> <{_SECOND}>
  %first = call <4 x i32> @llvm.x86.sse2.pmadd.wd(<8 x i16> %low, <8 x i16> %part)
  %second = call <4 x i32> @llvm.x86.sse2.pmadd.wd(<8 x i16> %high, <8 x i16> %part)
  %sums = shufflevector <4 x i32> %first, <4 x i32> %second, <8 x i32> <{_FIRST}>
  ret <8 x i32> %sums"""
)


def _native_bodies(target: Target) -> dict[str, str]:
    """Return bodies, by function name, that use an instruction of the processor that LLVM would not find by itself."""
    bodies = {}
    if target.native_half:
        bodies[HALF_VALUES] = _HALVES
    if target.machine == "x86_64":
        bodies[PAIR_PRODUCTS] = _AVX2_PAIRS if "avx2" in target.features else _SSE2_PAIRS
    return bodies


_X86_DECLARATIONS = """
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <4 x i32> @llvm.x86.sse2.pmadd.wd(<8 x i16>, <8 x i16>)
"""


def _stand_alone(text: str, name: str, target: Target) -> str:
    """Return the IR with ENTRY as its only external function, in C's calling convention."""
    text = re.sub(r"^target (datalayout|triple) = .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(@\S+ =) (?:common|linkonce)\S* ", r"\1 internal ", text, flags=re.MULTILINE)
    for function, body in _native_bodies(target).items():
        text = re.sub(
            rf"^(define [^\n]*@{function}\([^\n]*\{{)$.*?^\}}$",
            lambda match, body=body: f"{match[1]}\n{body}\n}}",  # type: ignore[misc]
            text,
            flags=re.MULTILINE | re.DOTALL,
        )
    if target.machine == "x86_64":
        text += _X86_DECLARATIONS
    text = re.sub(r"^define (?:linkonce_odr )?", "define internal ", text, flags=re.MULTILINE)
    # Otherwise LLVM turns loops into calls of the C library's memset and memcpy.
    text = re.sub(r"^(define .*?)(?: #\d+)? \{$", r'\1 "no-builtins" {', text, flags=re.MULTILINE)
    # noinline keeps LLVM from moving arithmetic to where subnormals are not flushed.
    return (
        text
        + f"""
define internal i64 @body(ptr %call) noinline "no-builtins" {{
  %result = alloca i64
  %exception = alloca ptr
  %status = call i32 @{name}(ptr %result, ptr %exception, ptr %call)
  %value = load i64, ptr %result
  ret i64 %value
}}
{denormals.entry(target.machine, ENTRY, "body")}"""
    )


def compile_for(target: Target, label: str) -> tuple[KernelImage, str]:
    """Compile the kernel for ``target``, and return it with its assembly listing.

    ``label`` names the target in messages.
    """
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.llvm_features, opt=3, reloc="pic", codemodel="small"
    )
    module = llvm.parse_assembly(_stand_alone(*_translate(), target))
    module.triple = target.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    # The loops that matter consist of vector instructions already. Unrolled they are no faster (measured), and twice as
    # large.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    code, entry = elf.link(machine.emit_object(module), ENTRY)
    digest = hashlib.sha256(code).hexdigest()
    header = Header(target.machine, label, target.features, sources_digest(), digest, entry)
    return KernelImage(header, code), machine.emit_assembly(module)


def main() -> None:
    """Compile for the target named on the command line, and write the kernel and its assembly listing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=["host", *TARGETS])
    parser.add_argument("output", type=Path)
    parser.add_argument("assembly", type=Path)
    arguments = parser.parse_args()
    target = host() if arguments.target == "host" else TARGETS[arguments.target]
    label = f"{target.machine} {target.cpu}" if arguments.target == "host" else arguments.target
    image, assembly = compile_for(target, label)
    arguments.output.write_bytes(image.encoded())
    arguments.assembly.write_text(assembly)


if __name__ == "__main__":
    main()

"""Link a relocatable ELF object into position-independent code, without a linker.

Sources: System V ABI, chapter 4, "Object Files", for the format; x86-64 psABI, section 4.4, and "ELF for the Arm
64-bit Architecture", section 5.7, for the relocations.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from edge_ssm.errors import EngineUnavailable


def link(content: bytes, entry: str) -> tuple[bytes, int]:
    """Lay out the code and the constants of a little-endian 64-bit ELF object and apply its relocations.

    Parameters
    ----------
    content
        The object, as a compiler writes it.
    entry
        Name of the function that is to be called.

    Returns
    -------
    The code, which runs at any address, and the offset of ``entry`` in it.

    Raises
    ------
    EngineUnavailable
        The code needs a symbol from outside, or has a relocation of an unknown type.
    """
    return _Object(content).link(entry)


@dataclass
class _Section:
    """A section header, and where the section lies in the linked code."""

    name: int
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    base: int = -1
    """Offset of the section in the linked code; -1 if it is not part of it."""


# Values of sh_type and bits of sh_flags.
_PROGBITS, _SYMTAB, _RELA = 1, 2, 4
_WRITE, _ALLOC = 1, 2


class _Object:
    """A little-endian 64-bit relocatable ELF object."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        (table,) = struct.unpack_from("<Q", content, 0x28)
        size, count = struct.unpack_from("<HH", content, 0x3A)
        self.sections = []
        for i in range(count):
            name, kind, flags, _, offset, length, link, info, align, _ = struct.unpack_from(
                "<IIQQQQIIQQ", content, table + i * size
            )
            self.sections.append(_Section(name, kind, flags, offset, length, link, info, align))
        self.symbols = next(section for section in self.sections if section.kind == _SYMTAB)

    def link(self, entry: str) -> tuple[bytes, int]:
        code = bytearray()
        for section in self.sections:
            if section.kind == _PROGBITS and section.flags & _ALLOC and not section.flags & _WRITE:
                code += bytes(-len(code) % max(1, section.align))
                section.base = len(code)
                code += self.content[section.offset : section.offset + section.size]
        for section in self.sections:
            if section.kind == _RELA and self.sections[section.info].base >= 0:
                base = self.sections[section.info].base
                for i in range(section.size // 24):
                    offset, info, addend = struct.unpack_from("<QQq", self.content, section.offset + 24 * i)
                    _relocate(code, base + offset, info & 0xFFFFFFFF, self._address(info >> 32) + addend)
        names = (self._symbol(i)[0] for i in range(self.symbols.size // 24))
        return bytes(code), self._address(next(i for i, name in enumerate(names) if name == entry))

    def _symbol(self, index: int) -> tuple[str, int, int]:
        """Return the name, the number of the section and the value of a symbol."""
        name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", self.content, self.symbols.offset + 24 * index)
        start = self.sections[self.symbols.link].offset + name
        return self.content[start : self.content.index(b"\0", start)].decode(), section, value

    def _address(self, index: int) -> int:
        """Return the offset of a symbol in the linked code."""
        name, section, value = self._symbol(index)
        if not 0 < section < len(self.sections) or self.sections[section].base < 0:
            raise EngineUnavailable(f"engine 'cpu': the kernel does not stand alone, it needs {name or 'data'!r}")
        return int(self.sections[section].base + value)


# Relocation types 2 (PC32) and 4 (PLT32) are those of x86-64, all from 261 on those of AArch64; the numbers do not
# overlap, so that the machine need not be known.
_PC_RELATIVE_32 = (2, 4, 261)  # R_X86_64_PC32, R_X86_64_PLT32, R_AARCH64_PREL32
_ARM_PAGE = 275  # R_AARCH64_ADR_PREL_PG_HI21
_ARM_BRANCH = (282, 283)  # R_AARCH64_JUMP26, R_AARCH64_CALL26
_ARM_LOW = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}
"""Type -> log2 of the number of bytes of a load or store whose instruction holds the low 12 bits of the address."""


def _relocate(code: bytearray, place: int, kind: int, target: int) -> None:
    """Patch the instruction or word at ``place`` so that it refers to ``target``."""
    if kind in _PC_RELATIVE_32:
        struct.pack_into("<i", code, place, target - place)
        return
    (word,) = struct.unpack_from("<I", code, place)
    if kind == _ARM_PAGE:
        pages = ((target >> 12) - (place >> 12)) & 0x1FFFFF
        word |= (pages & 3) << 29 | (pages >> 2) << 5
    elif kind in _ARM_BRANCH:
        word |= (target - place) >> 2 & 0x3FFFFFF
    elif kind in _ARM_LOW:
        word |= (target & 0xFFF) >> _ARM_LOW[kind] << 10
    else:
        raise EngineUnavailable(f"engine 'cpu': the kernel has a relocation of unknown type {kind}")
    struct.pack_into("<I", code, place, word)

"""Link a relocatable ELF object into a position-independent kernel without a linker."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from edge_ssm.engines.cpu.kernel_file import ENTRY, Header, KernelImage, sources_digest
from edge_ssm.errors import EngineUnavailable


def link(machine: str, target: str, features: tuple[str, ...], elf: bytes) -> KernelImage:
    """The image of a relocatable object's function ENTRY. Raises EngineUnavailable if the code does not stand alone."""
    code, entry = _Object(elf).laid_out()
    digest = hashlib.sha256(code).hexdigest()
    return KernelImage(Header(machine, target, features, sources_digest(), digest, entry), code)


@dataclass
class _Section:
    name: int
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    base: int = -1
    """Where in the image it begins; -1: nowhere."""


_PROGBITS, _SYMTAB, _RELA = 1, 2, 4
_WRITE, _ALLOC = 1, 2


class _Object:
    """A little-endian 64-bit relocatable ELF object."""

    def __init__(self, elf: bytes) -> None:
        self.elf = elf
        (table,) = struct.unpack_from("<Q", elf, 0x28)
        size, count = struct.unpack_from("<HH", elf, 0x3A)
        self.sections = []
        for i in range(count):
            name, kind, flags, _, offset, length, link, info, align, _ = struct.unpack_from(
                "<IIQQQQIIQQ", elf, table + i * size
            )
            self.sections.append(_Section(name, kind, flags, offset, length, link, info, align))

    def laid_out(self) -> tuple[bytes, int]:
        image = bytearray()
        for section in self.sections:
            if section.kind == _PROGBITS and section.flags & _ALLOC and not section.flags & _WRITE:
                image += bytes(-len(image) % max(1, section.align))
                section.base = len(image)
                image += self.elf[section.offset : section.offset + section.size]
        symbols = next(s for s in self.sections if s.kind == _SYMTAB)
        entry = None
        for i in range(symbols.size // 24):
            name, _, _, place, value, _ = struct.unpack_from("<IBBHQQ", self.elf, symbols.offset + 24 * i)
            if self._text(self.sections[symbols.link].offset + name) == ENTRY:
                entry = self.sections[place].base + value
        assert entry is not None
        for section in self.sections:
            if section.kind == _RELA and self.sections[section.info].base >= 0:
                for i in range(section.size // 24):
                    offset, info, addend = struct.unpack_from("<QQq", self.elf, section.offset + 24 * i)
                    target = self._symbol(symbols, info >> 32) + addend
                    _relocate(image, self.sections[section.info].base + offset, info & 0xFFFFFFFF, target)
        return bytes(image), entry

    def _text(self, offset: int) -> str:
        return self.elf[offset : self.elf.index(b"\0", offset)].decode()

    def _symbol(self, symbols: _Section, index: int) -> int:
        name, _, _, place, value, _ = struct.unpack_from("<IBBHQQ", self.elf, symbols.offset + 24 * index)
        if not 0 < place < len(self.sections) or self.sections[place].base < 0:
            text = self._text(self.sections[symbols.link].offset + name)
            raise EngineUnavailable(f"engine 'cpu': the kernel does not stand alone, it needs {text or 'data'!r}")
        return int(self.sections[place].base + value)


# Load and store of 1, 2, 4, 8 and 16 bytes: the low 12 bits of the address, in units of the size, at bit 10.
_ARM_LOW = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}


def _relocate(image: bytearray, place: int, kind: int, target: int) -> None:
    """Types 2 (PC32) and 4 (PLT32) are x86-64's, all from 261 AArch64's; their numbers don't meet."""
    if kind in (2, 4, 261):
        struct.pack_into("<i", image, place, target - place)
        return
    (word,) = struct.unpack_from("<I", image, place)
    if kind == 275:  # ADR_PREL_PG_HI21
        pages = ((target >> 12) - (place >> 12)) & 0x1FFFFF
        word |= (pages & 3) << 29 | (pages >> 2) << 5
    elif kind in (282, 283):  # JUMP26, CALL26
        word |= (target - place) >> 2 & 0x3FFFFFF
    elif kind in _ARM_LOW:
        word |= (target & 0xFFF) >> _ARM_LOW[kind] << 10
    else:
        raise EngineUnavailable(f"engine 'cpu': relocation {kind} of the kernel is not known")
    struct.pack_into("<I", image, place, word)

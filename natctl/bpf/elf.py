"""
Reads the object files that clang makes of our programs.

Of the format (ELF, 64 bits, in the byte order of this machine) only what such files have: sections with programs, the
section ``maps``, ``.rodata`` with the settings, the license, and where instructions name a map or the settings.
Sources: elf(5), and Documentation/bpf/llvm_reloc.rst of the kernel.

Pure. Tested in ``tests/unit/natctl/bpf/test_elf.py``.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

SETTINGS: Final = ".rodata"
"""The section of a program's settings, which become a map of one element."""
_MAPS, _LICENSE = "maps", "license"
_PROGRAM: Final = "tc/"
"""Begin of the names of sections with programs."""
_RELOCATIONS: Final = ".rel"

_MAGIC: Final = b"\x7fELF\x02" + (b"\x01" if sys.byteorder == "little" else b"\x02")
_BPF: Final = 247  # EM_BPF
_NO_BYTES: Final = 8  # SHT_NOBITS
_HEADER: Final = struct.Struct("=16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("=IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("=IBBHQQ")
_RELOCATION: Final = struct.Struct("=QQ")
_LOADS_64_BITS: Final = 1  # R_BPF_64_64
_MAP: Final = struct.Struct("=5I")
_IMMEDIATE: Final = struct.Struct("=i")
_IMMEDIATE_OFFSET: Final = 4


class MapKind(NamedTuple):
    """A map that programs need."""

    type: int
    """``BPF_MAP_TYPE_…``, linux/bpf.h."""
    key_bytes: int
    value_bytes: int
    entries: int
    flags: int


class Reference(NamedTuple):
    """An instruction that loads the address of a map, or of a place in the settings."""

    at: int
    """Offset of the instruction, in bytes."""
    to: str
    """Name of the map, or :data:`SETTINGS`."""
    offset: int
    """Within the settings, in bytes."""


class Code(NamedTuple):
    """A program."""

    instructions: bytes
    references: tuple[Reference, ...]


class ObjectFile(NamedTuple):
    """What an object file has."""

    programs: Mapping[str, Code]
    maps: Mapping[str, MapKind]
    settings_bytes: int
    license: str


class _Section(NamedTuple):
    name: str
    data: bytes
    link: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int


def read(data: bytes) -> ObjectFile:
    """
    Read an object file.

    :raise ValueError: When it is none, is for another machine, or has what our programs do not have.
    """
    try:
        sections = tuple(_sections(data))
        symbols = tuple(_symbols(sections))
        maps = dict(_maps(sections, symbols))
        programs = {
            section.name.removeprefix(_PROGRAM): Code(section.data, tuple(_references(sections, symbols, section)))
            for section in sections
            if section.name.startswith(_PROGRAM)
        }
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"the object file is damaged: {error}") from error
    contents = {section.name: section.data for section in sections}
    named = {reference.to for code in programs.values() for reference in code.references}
    if unknown := named - maps.keys() - {SETTINGS}:
        raise ValueError(f"the object file has no {', '.join(sorted(unknown))}")
    license_ = contents.get(_LICENSE, b"").rstrip(b"\0").decode("ascii", "replace")
    return ObjectFile(programs, maps, len(contents.get(SETTINGS, b"")), license_)


def _sections(data: bytes) -> Iterator[_Section]:
    ident, _, machine, _, _, _, at, _, _, _, _, size, count, names_at = _HEADER.unpack_from(data)
    if not ident.startswith(_MAGIC) or machine != _BPF or size != _SECTION.size:
        raise ValueError("this is no object file of BPF for this machine")
    headers = [_SECTION.unpack_from(data, at + number * size) for number in range(count)]
    names = data[headers[names_at][4] :]
    for name, kind, _, _, offset, length, link, *_ in headers:
        body = b"" if kind == _NO_BYTES else data[offset : offset + length]
        if len(body) != length and kind != _NO_BYTES:
            raise ValueError("the object file is cut off")
        yield _Section(_text(names, name), body, link)


def _symbols(sections: tuple[_Section, ...]) -> Iterator[_Symbol]:
    table = next((section for section in sections if section.name == ".symtab"), None)
    if table is None:
        raise ValueError("the object file has no symbols")
    names = sections[table.link].data
    for name, _, _, section, value, _ in _SYMBOL.iter_unpack(table.data):
        yield _Symbol(_text(names, name), section, value)


def _maps(sections: tuple[_Section, ...], symbols: tuple[_Symbol, ...]) -> Iterator[tuple[str, MapKind]]:
    for symbol in symbols:
        if symbol.name and symbol.section < len(sections) and sections[symbol.section].name == _MAPS:
            yield symbol.name, MapKind(*_MAP.unpack_from(sections[symbol.section].data, symbol.value))


def _references(sections: tuple[_Section, ...], symbols: tuple[_Symbol, ...], program: _Section) -> Iterator[Reference]:
    table = next((section for section in sections if section.name == _RELOCATIONS + program.name), None)
    for at, info in _RELOCATION.iter_unpack(table.data if table is not None else b""):
        symbol, kind = symbols[info >> 32], info & 0xFFFFFFFF
        if kind != _LOADS_64_BITS:
            raise ValueError(f"{program.name} has a relocation of type {kind}")
        if sections[symbol.section].name == SETTINGS:
            (within,) = _IMMEDIATE.unpack_from(program.data, at + _IMMEDIATE_OFFSET)
            yield Reference(at, SETTINGS, symbol.value + within)
        else:
            yield Reference(at, symbol.name, 0)


def _text(names: bytes, offset: int) -> str:
    return names[offset : names.index(b"\0", offset)].decode()

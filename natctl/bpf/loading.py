"""
Programs in the kernel: an object file with its maps made, its settings fixed, and its program loaded.

Tested by ``tests/netns/test_programs.py``.
"""

from __future__ import annotations

import functools
import mmap
import os
import pathlib
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Final, Self

from cpm.protocol.errors import KernelError
from natctl.bpf import calls, elf
from natctl.bpf.elf import SETTINGS, Code, MapKind, ObjectFile

_FOLDER: Final = pathlib.Path(__file__).parent
_POSSIBLE: Final = pathlib.Path("/sys/devices/system/cpu/possible")

_ARRAY: Final = 2  # BPF_MAP_TYPE_ARRAY
_ONLY_READ: Final = 1 << 7  # BPF_F_RDONLY_PROG
_MAP, _VALUE = 1, 2  # BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE
_WITHOUT_NEIGHBOUR, _BY_MARK = 4, 32  # BPF_FIB_LOOKUP_SKIP_NEIGH, BPF_FIB_LOOKUP_MARK
_KNOWS_WITHOUT, _KNOWS_MARKS = (6, 3), (6, 10)
_PAGE: Final = mmap.PAGESIZE
_CHUNK: Final = 1 << 18
_FIRST: Final = bytes(4)
"""Key of the first element of an array."""


class NoObject(Exception):
    """
    The package has no object file: it was built without clang.

    :param name: Of the program.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"this installation was built without clang and has no program {self.name}; see docs/how-to/install.md"


def lookup_flags() -> int:
    """Return the flags with which a program looks routes up on this kernel."""
    # The packet is sent by another look at the neighbours.
    without_neighbour = _WITHOUT_NEIGHBOUR if _release() >= _KNOWS_WITHOUT else 0
    return without_neighbour | (_BY_MARK if knows_marks() else 0)


def knows_marks() -> bool:
    """Return whether a program can look routes up by the packet's mark on this kernel."""
    return _release() >= _KNOWS_MARKS


@functools.cache
def object_file(name: str) -> ObjectFile:
    """
    Return an object file of this package.

    :raise NoObject: When there is none.
    :raise ValueError: When it cannot be read.
    """
    try:
        return elf.read((_FOLDER / f"{name}.bpf.o").read_bytes())
    except FileNotFoundError as error:
        raise NoObject(name) from error


class Loaded:
    """
    A program, and its maps. Close it when done: the kernel keeps both where the program is attached.

    :param name: Of the object file, and of its program.
    :param settings: What its section ``.rodata`` holds, from then on unchanged.
    :param entries: Elements of those maps that need another number than the object file says.
    :raise NoObject: When there is no object file.
    :raise ValueError: When it cannot be read.
    :raise KernelError: When the kernel refuses.
    """

    def __init__(self, name: str, settings: bytes, entries: Mapping[str, int]) -> None:
        file = object_file(name)
        if len(settings) != file.settings_bytes:
            raise ValueError(f"the settings of {name} have {file.settings_bytes} bytes, not {len(settings)}")
        self._kinds = {key: kind._replace(entries=entries.get(key, kind.entries)) for key, kind in file.maps.items()}
        self.maps: dict[str, int] = {}
        """Descriptors by name."""
        self.program = -1
        """Its descriptor."""
        try:
            for key, kind in self._kinds.items():
                self.maps[key] = calls.create_map(kind, key)
            constants = calls.create_map(MapKind(_ARRAY, 4, len(settings), 1, _ONLY_READ), "settings")
            self.maps[SETTINGS] = constants
            calls.put(constants, _FIRST, settings)
            calls.freeze(constants)
            self.program = calls.load(_linked(file.programs[name], self.maps), name, file.license)
            self.number = calls.program_id(self.program)
            """The kernel's number of the program."""
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors."""
        calls.close([*self.maps.values(), *([self.program] if self.program >= 0 else [])])
        self.maps, self.program = {}, -1

    def memory(self, name: str) -> Memory:
        """Map the elements of an array into memory. :raise KernelError: When the kernel refuses."""
        kind = self._kinds[name]
        return Memory(self.maps[name], kind.entries * kind.value_bytes)

    def put(self, name: str, key: bytes, value: bytes) -> None:
        """Set an element. :raise KernelError: When the kernel refuses."""
        calls.put(self.maps[name], key, value)

    def total(self, name: str) -> int:
        """Return the sum, over all processors, of a map that has one number for each. :raise KernelError: As above."""
        processors = _possible_processors()
        return sum(struct.unpack(f"={processors}Q", calls.get(self.maps[name], _FIRST, 8 * processors)))


class Memory:
    """
    The elements of an array that programs read while they are written, and what they should be.

    A store of an aligned word is seen whole: no program ever sees half of one, also of many that are written at once.

    :param descriptor: Of the map.
    :raise KernelError: When it cannot be mapped.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._size = size
        try:
            self._memory = mmap.mmap(descriptor, -(-size // _PAGE) * _PAGE)
        except OSError as error:
            raise KernelError("map a map into memory", error.errno or 0, error.strerror or "") from error
        self._image = bytearray(size)

    def close(self) -> None:
        """Give the memory back; the map stays."""
        self._memory.close()

    def fill(self, image: bytearray) -> None:
        """Write all of it; the image becomes the memory's own."""
        self._memory[: self._size] = bytes(image)
        self._image = image

    def write(self, offset: int, words: bytes) -> None:
        """Write whole words at an offset in bytes."""
        self._image[offset : offset + len(words)] = words
        self._memory[offset : offset + len(words)] = words

    def restore(self) -> bool:
        """Write again what somebody else changed. :return: Whether anything was."""
        found = False
        for begin in range(0, self._size, _CHUNK):
            end = min(begin + _CHUNK, self._size)
            if self._memory[begin:end] != self._image[begin:end]:
                self._memory[begin:end] = self._image[begin:end]
                found = True
        return found


def _release() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def _linked(code: Code, maps: Mapping[str, int]) -> bytes:
    """Return the instructions with descriptors where they name maps (``struct bpf_insn``: two of 8 bytes each)."""
    instructions = bytearray(code.instructions)
    for at, name, offset in code.references:
        # The register that is loaded and what is loaded share a byte; its order is that of the machine's bit fields.
        what = _VALUE if name == SETTINGS else _MAP
        register = instructions[at + 1]
        instructions[at + 1] = register & 0x0F | what << 4 if sys.byteorder == "little" else register & 0xF0 | what
        struct.pack_into("=i", instructions, at + 4, maps[name])
        struct.pack_into("=i", instructions, at + 12, offset)
    return bytes(instructions)


@functools.cache
def _possible_processors() -> int:
    """Return for how many processors the kernel has room: ``0-3``, ``0``, ``0,2-3``."""
    last: Sequence[str] = _POSSIBLE.read_text().strip().replace(",", "-").split("-")
    return int(last[-1]) + 1

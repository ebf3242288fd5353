"""
The system call bpf(2): maps, programs, and links, which hold a program at an interface.

Without libbpf, which would be one more library for nine commands (``docs/design/0033-fast-path.md``). A map or program
lasts as long as somebody has a descriptor of it, or the kernel uses it: one that is attached lasts, with its maps, when
natd ends. Format: ``union bpf_attr`` in linux/bpf.h.

Tested by ``tests/netns/test_programs.py``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from typing import Final

from cpm.protocol.errors import KernelError
from natctl.bpf.elf import MapKind

_NUMBERS: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361, "s390x": 351}
"""Of the system call, by machine."""
_MAP_CREATE, _MAP_UPDATE, _MAP_LOOKUP, _PROG_LOAD, _OBJ_GET_INFO, _MAP_FREEZE = 0, 2, 1, 5, 15, 22
_PROG_QUERY, _LINK_CREATE, _LINK_UPDATE = 16, 28, 29
_SCHED_CLS: Final = 3  # BPF_PROG_TYPE_SCHED_CLS
_ATTRIBUTES_BYTES: Final = 144
_NAME_BYTES: Final = 16
_LOG_BYTES: Final = 1 << 20
_INFO_BYTES: Final = 64
_QUERY_BYTES: Final = 64
_MOST_PROGRAMS: Final = 64
"""At one hook: BPF_MPROG_MAX."""
_libc = ctypes.CDLL(None, use_errno=True)


def create_map(kind: MapKind, name: str) -> int:
    """
    Create a map.

    :return: Its descriptor.
    :raise KernelError: When the kernel refuses.
    """
    text = name.encode()[: _NAME_BYTES - 1]
    numbers = (kind.type, kind.key_bytes, kind.value_bytes, kind.entries, kind.flags, 0, 0)
    return _call(_MAP_CREATE, struct.pack("=7I16s", *numbers, text), f"create the map {name}")


def put(descriptor: int, key: bytes, value: bytes) -> None:
    """Set an element of a map. :raise KernelError: When the kernel refuses."""
    key_at, value_at = _buffer(key), _buffer(value)
    attributes = struct.pack("=IIQQQ", descriptor, 0, _address(key_at), _address(value_at), 0)
    _call(_MAP_UPDATE, attributes, "change a map")


def get(descriptor: int, key: bytes, size: int) -> bytes:
    """
    Return an element of a map.

    :param size: Bytes of its value; of a map per processor, of all of them.
    :raise KernelError: When there is none.
    """
    key_at, value_at = _buffer(key), ctypes.create_string_buffer(size)
    _call(_MAP_LOOKUP, struct.pack("=IIQQQ", descriptor, 0, _address(key_at), _address(value_at), 0), "read a map")
    return value_at.raw


def freeze(descriptor: int) -> None:
    """Let nobody change a map from now on but programs. :raise KernelError: When the kernel refuses."""
    _call(_MAP_FREEZE, struct.pack("=I", descriptor), "freeze a map")


def load(instructions: bytes, name: str, license_: str) -> int:
    """
    Load a program for packets at an interface.

    :return: Its descriptor.
    :raise KernelError: When the kernel refuses, with the last words of its verifier.
    """
    code, license_at = _buffer(instructions), _buffer(license_.encode() + b"\0")
    action = f"load the program {name}"

    def attributes(log: int, log_bytes: int) -> bytes:
        counts = _SCHED_CLS, len(instructions) // 8
        log_level = 1 if log_bytes else 0
        return struct.pack("=IIQQIIQII16s", *counts, _address(code), _address(license_at), log_level, log_bytes, log,
                           0, 0, name.encode()[: _NAME_BYTES - 1])  # fmt: skip

    try:
        return _call(_PROG_LOAD, attributes(0, 0), action)
    except KernelError as error:
        if error.errno == errno.EPERM:
            raise
        log = ctypes.create_string_buffer(_LOG_BYTES)
        try:
            return _call(_PROG_LOAD, attributes(_address(log), _LOG_BYTES), action)
        except KernelError as again:
            lines = log.value.decode(errors="replace").strip().splitlines()[-3:]
            raise KernelError(action, again.errno, "; ".join(lines) or again.detail) from again


def program_id(descriptor: int) -> int:
    """Return the kernel's number of a program. :raise KernelError: When the kernel refuses."""
    return int(struct.unpack_from("=II", _info(descriptor, "look at a program"))[1])


def create_link(interface: int, hook: int, program: int) -> int:
    """
    Have a program run behind those that are at a hook of an interface, as long as the link's descriptor is open.

    :param interface: Its index.
    :param hook: Kind of attachment (``enum bpf_attach_type``).
    :return: The link's descriptor.
    :raise KernelError: When the kernel refuses.
    """
    return _call(_LINK_CREATE, struct.pack("=4I", program, interface, hook, 0), "attach a program")


def update_link(descriptor: int, program: int) -> None:
    """Exchange a link's program in one step. :raise KernelError: When the kernel refuses."""
    _call(_LINK_UPDATE, struct.pack("=4I", descriptor, program, 0, 0), "exchange a program")


def link_place(descriptor: int) -> tuple[int, int]:
    """
    Return the number of a link's program, and its interface's index; 0 when the interface is gone.

    :raise KernelError: When the kernel refuses.
    """
    _, _, program, _, interface = struct.unpack_from("=5I", _info(descriptor, "look at a link"))
    return program, interface


def programs_at(interface: int, hook: int) -> tuple[int, ...]:
    """
    Return the numbers of the programs at a hook of an interface, in the order in which packets pass them.

    :raise KernelError: When there is no such interface, or no such hook in this kernel.
    """
    numbers = (ctypes.c_uint32 * _MOST_PROGRAMS)()
    attributes = struct.pack("=4IQ2I", interface, hook, 0, 0, ctypes.addressof(numbers), _MOST_PROGRAMS, 0)
    buffer = _buffer(attributes.ljust(_ATTRIBUTES_BYTES, b"\0"))
    _call_with(_PROG_QUERY, buffer, _QUERY_BYTES, "look for programs at an interface")
    (count,) = struct.unpack_from("=I", buffer.raw, 24)
    return tuple(numbers[:count])


def close(descriptors: Sequence[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def _call(command: int, attributes: bytes, action: str) -> int:
    return _call_with(command, _buffer(attributes.ljust(_ATTRIBUTES_BYTES, b"\0")), len(attributes), action)


def _call_with(command: int, buffer: ctypes.Array[ctypes.c_char], size: int, action: str) -> int:
    """Call with attributes into which the kernel may write."""
    number = _NUMBERS.get(os.uname().machine)
    if number is None:
        raise KernelError(action, errno.ENOSYS, f"bpf(2) has no known number on {os.uname().machine}")
    result = int(_libc.syscall(number, command, buffer, size))
    if result < 0:
        code = ctypes.get_errno()
        raise KernelError(action, code, os.strerror(code))
    return result


def _info(descriptor: int, action: str) -> bytes:
    info = ctypes.create_string_buffer(_INFO_BYTES)
    _call(_OBJ_GET_INFO, struct.pack("=IIQ", descriptor, _INFO_BYTES, _address(info)), action)
    return info.raw


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, len(data))


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)

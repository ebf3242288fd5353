"""
Puts bytecode at the end of the libvirt hook, so that Python need not compile it while libvirt waits.

The hook compares the stamp before it runs the bytecode, and compiles its text otherwise: after an upgrade of Python, or
when somebody edited the file.

Tested in ``tests/unit/libvirt_hooks/test_bytecode.py``.
"""

from __future__ import annotations

import importlib.util
import marshal
from typing import Final

MARK: Final = "# bytecode "
"""Begins the line with the stamp."""
_VERSION: Final = 2
"""Format of marshal whose bytes depend on nothing but the code: with a later one, an install could differ from the one
before without any change."""
_LINE: Final = 118


def with_bytecode(source: str, name: str) -> str:
    """
    Return the hook with its bytecode, for the version of Python that runs this.

    :param source: Its text.
    :param name: Its path, for tracebacks.
    """
    code = marshal.dumps(compile(source, name, "exec", dont_inherit=True, optimize=2), _VERSION).hex()
    lines = (f"# {code[start : start + _LINE]}" for start in range(0, len(code), _LINE))
    return "\n".join((f"{source}{MARK}{stamp(source)}", *lines, ""))


def stamp(source: str) -> str:
    """Return what bytecode of this text, for the version of Python that runs this, is marked with."""
    return (importlib.util.MAGIC_NUMBER + importlib.util.source_hash(source.encode())).hex()

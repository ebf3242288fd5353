"""
Finds the files of this installation that `virt-ports install` copies.

Tested in ``tests/unit/cpm/install/test_install.py``.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

from cpm.install.hook_bytecode import with_bytecode
from cpm.protocol.errors import ConfigError

_REMEDY = "install virt-ports again with pip or pipx, or run it from its source tree (pip install -e .)"


def system_file(name: str) -> str:
    """
    Return the text of a file in ``systemd/`` of this package.

    :raise ConfigError: When it is missing or cannot be read.
    """
    path = Path(__file__).parent / "systemd" / name
    if not path.is_file():
        raise ConfigError(str(path), "", f"is missing; {_REMEDY}")
    return _read(path)


def hook_file(name: str = "virt-ports") -> str:
    """
    Return the text of the libvirt hook, with its bytecode.

    :param name: The path that it will have.
    :raise ConfigError: When it is missing or cannot be read.
    """
    # Found, not imported: cpm must not import libvirt_hooks.
    package = importlib.util.find_spec("libvirt_hooks")
    if package is None or package.origin is None:
        raise ConfigError("libvirt_hooks", "", f"is missing; {_REMEDY}")
    return with_bytecode(_read(Path(package.origin).with_name("qemu.py")), name)


def program_directory() -> Path:
    """Return the directory of the programs ``cpmd`` and ``natd``."""
    return Path(sysconfig.get_path("scripts"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot read: {error.strerror}; {_REMEDY}") from error

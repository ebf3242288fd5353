"""
What this machine is: from natd.toml and cpmd.toml, or what `virt-ports install` would choose.

Tested in ``tests/unit/machine_doctor/test_readers.py``.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import cpm.settings
import natctl.settings
from cpm.install import machine
from cpm.protocol.errors import ConfigError
from cpm.protocol.model import Role
from machine_doctor.facts import Setup
from machine_doctor.readers import files
from natctl.model.entries import EdgeSettings, HostSettings, Settings


def setup(natd: Path, cpmd: Path) -> Setup:
    """
    Read the configuration.

    :param natd: Path of natd.toml; it need not exist.
    :param cpmd: The same of cpmd.toml.
    """
    wrong: list[str] = []
    unread = tuple(str(path) for path in (natd, cpmd) if files.is_there(path) and not os.access(path, os.R_OK))
    node: natctl.settings.Settings | None = None
    manager: cpm.settings.Settings | None = None
    if files.is_there(natd) and str(natd) not in unread:
        try:
            node = natctl.settings.load(natd)
        except ConfigError as error:
            wrong.append(str(error))
    if files.is_there(cpmd) and str(cpmd) not in unread:
        try:
            manager = cpm.settings.load(cpmd)
        except ConfigError as error:
            wrong.append(str(error))
    is_manager = manager is not None or files.is_there(cpmd)
    if node is not None:
        is_host = node.host is not None and Role.HOST in node.roles
        bridges = node.host.bridges if node.host is not None and is_host else frozenset[str]()
        return Setup(
            node.node_name,
            node.roles,
            is_manager=is_manager,
            is_installed=True,
            kernel=node.kernel(),
            bridges=bridges,
            natd=node,
            cpmd=manager,
            wrong=tuple(wrong),
            unread=unread,
        )
    if str(natd) in unread:
        return dataclasses.replace(_assumed(), is_manager=is_manager, is_installed=True, cpmd=manager, unread=unread)
    if files.is_there(natd) or is_manager:
        return Setup(
            socket.gethostname(),
            frozenset(),
            is_manager=is_manager,
            is_installed=True,
            kernel=Settings(),
            cpmd=manager,
            wrong=tuple(wrong),
            unread=unread,
        )
    return _assumed()


def _assumed() -> Setup:
    """Return the commonest machine: one server with all roles, whose uplink has the default route."""
    routes = files.line(Path("/proc/thread-self/net/route")) or ""
    uplink = machine.default_interface(routes)
    uplinks = frozenset({uplink} if uplink else ())
    roles = frozenset({Role.HOST, Role.EDGE})
    kernel = Settings(host=HostSettings(uplinks), edge=EdgeSettings(uplinks, frozenset()))
    return Setup(socket.gethostname(), roles, is_manager=True, is_installed=False, kernel=kernel)

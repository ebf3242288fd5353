"""
The commands ``cpmd`` and ``natd``: they hold signals back before anything else is loaded.

By default SIGHUP ends a process, and for systemd that is a clean end, after which ``Restart=on-failure`` leaves the
service dead. A daemon's imports take half a second, in which a ``systemctl reload`` or an operator may send one.
Standard library only, and little of it: what Python itself needs to start remains, and for that the units have
``RestartForceExitStatus=SIGHUP``.

Tested in ``tests/netns/test_first_moments.py``.
"""

from __future__ import annotations

import importlib
import signal
from typing import Final

MODULES: Final = {"cpmd": "cpm.daemon", "natd": "natctl.daemon"}
"""The module of each daemon; its ``main()`` is the command line."""

_hangups: list[int] = []


def cpmd() -> int:
    """Run the manager; return its exit code."""
    return _launch("cpmd")


def natd() -> int:
    """Run the NAT component; return its exit code."""
    return _launch("natd")


def hold_signals() -> None:
    """Note SIGHUP instead of ending, and end at once by SIGINT, as by SIGTERM, without a traceback."""
    signal.signal(signal.SIGHUP, note_hangup)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def note_hangup(*_: object) -> None:
    """Note that SIGHUP came."""
    _hangups.append(signal.SIGHUP)


def take_hangup() -> bool:
    """Return whether SIGHUP came since :func:`hold_signals` or the last call."""
    came = bool(_hangups)
    _hangups.clear()
    return came


def _launch(daemon: str) -> int:
    hold_signals()
    code: int = importlib.import_module(MODULES[daemon]).main()
    return code

"""Logging to journald by its native protocol, or to stderr where there is no journald."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

from cpm.protocol.errors import ConfigError
from cpm.protocol.escaping import escaped

_JOURNAL = "/run/systemd/journal/socket"
_PRIORITY = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class EscapingFormatter(logging.Formatter):
    """
    Formats records so that one is one line, whatever text of others is in it.

    A traceback keeps its line breaks, and nothing else that is not printable.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line without the traceback."""
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """Return the traceback."""
        return escaped(super().formatException(ei), keep="\n")


class JournalHandler(logging.Handler):
    """Sends log records with their fields to journald (systemd's *Native Journal Protocol*)."""

    def __init__(self, identifier: str) -> None:
        super().__init__()
        self._identifier = identifier
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; it is lost while journald does not run."""
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_PRIORITY.get(record.levelno, 6)),
            "SYSLOG_IDENTIFIER": self._identifier,
            "LOGGER": record.name,
            "CODE_FUNC": record.funcName or "",
        }
        try:
            self._socket.sendto(b"".join(_field(key, value) for key, value in fields.items()), _JOURNAL)
        except OSError:
            self.handleError(record)

    def close(self) -> None:
        """Close the socket, when logging ends."""
        self._socket.close()
        super().close()


def _field(key: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" in data:
        return key.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return key.encode() + b"=" + data + b"\n"


def check_level(file: str, level: str) -> None:
    """
    Check a level of a settings file.

    :raise ConfigError: When there is none of that name.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise ConfigError(file, "log_level", "use debug, info, warning, error or critical")


def set_up(identifier: str, level: str) -> None:
    """
    Set up logging for a daemon.

    Under systemd (``JOURNAL_STREAM`` is set) records go to journald with their priority, otherwise to stderr.

    :param identifier: Value of ``SYSLOG_IDENTIFIER``.
    :param level: Lowest level that is logged, for example ``info``.
    """
    handler: logging.Handler
    if os.environ.get("JOURNAL_STREAM") and Path(_JOURNAL).exists():
        handler = JournalHandler(identifier)
        handler.setFormatter(EscapingFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(EscapingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)

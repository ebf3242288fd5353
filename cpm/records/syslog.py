"""Entries of the journal as syslog messages (RFC 5424)."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from cpm.core.journal import ClockEntry, NodeEntry
from cpm.protocol.escaping import escaped
from cpm.protocol.event_kinds import JOURNAL, NODES, clock_set_text
from cpm.records.lines import Entry, told

DAEMON: Final = 3
"""The facility."""
STRUCTURE: Final = "virt-ports@32473"
"""We have no enterprise number; 32473 is the one for documentation (RFC 5612)."""

_SEVERITIES: Final = {kind.name: kind.severity for kind in (*JOURNAL, *NODES)}
_NOT_IN_NAMES: Final = re.compile(r"[^\x21-\x7e]")


def message(entry: Entry, host: str) -> bytes:
    """
    Return an entry as one message, without a frame around it.

    :param host: The name of this machine.
    """
    moment = datetime.fromtimestamp(entry.at.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    priority = DAEMON * 8 + _SEVERITIES[entry.event]
    header = f"<{priority}>1 {moment} {_word(host, 255)} cpmd - {_word(str(entry.event).replace(' ', '-'), 32)}"
    parameters = " ".join(f'{name}="{_value(str(value))}"' for name, value in told(entry).items())
    return f"{header} [{STRUCTURE} {parameters}] {_text(entry)}".encode()


def _text(entry: Entry) -> str:
    if isinstance(entry, ClockEntry):
        return clock_set_text(entry.by_s)
    if isinstance(entry, NodeEntry):
        return f"node {escaped(entry.node)}: {entry.event.value}{f': {escaped(entry.why)}' if entry.why else ''}"
    return f"VM {escaped(entry.name)} on {escaped(entry.node)}: {entry.external} {entry.ports} {entry.event.value}"


def counted(message_: bytes) -> bytes:
    """Return a message as it is sent over TCP, with its length before it (RFC 6587 section 3.4.1)."""
    return b"%d %s" % (len(message_), message_)


def _word(text: str, most: int) -> str:
    return _NOT_IN_NAMES.sub("?", text)[:most] or "-"


def _value(text: str) -> str:
    return escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("]", "\\]")

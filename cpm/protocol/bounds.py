"""
Bounds of everything that comes from another process: numbers, and the lengths of texts and lists.

They are part of the types of messages and requests (:mod:`cpm.protocol.bounded`), so decoding refuses what exceeds them
and no decision meets a number that it cannot calculate with. They are far from what a site needs: a sender stays within
them by limiting what somebody else chose (:func:`cut`, :func:`at_most`), because a message that exceeds one ends the
session.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes longer than the rest of ``virt-ports list``
if TYPE_CHECKING:
    from typing import Final, TypeVar

    _Number = TypeVar("_Number", int, float)

FIRST_PORT: Final = 1024
"""Lower ports are never handed out: they are the well-known ports (RFC 6056 section 3.2)."""
LAST_PORT: Final = 65535

MAX_COUNT: Final = 2**63 - 1
"""Of counters that only grow; SQLite has no greater number."""
MAX_GENERATION: Final = 2**53
"""Of epochs and generations; exact in every JSON."""
MAX_CONNECTIONS: Final = 2**32
"""Entries that a connection table may have."""
MAX_RATE: Final = 1e12
"""Packets, connections or megabits per second."""
MAX_SECONDS: Final = 1e9
"""Of durations and limits: 31 years."""
MAX_UTC: Final = 253402300799.0
"""UTC seconds: the end of the year 9999."""
MAX_WISHED: Final = 999_999_999
"""Of a number in a wish (:mod:`cpm.protocol.wishes`)."""
MAX_PERIOD_S: Final = 3600.0
"""Seconds between two reports."""

MAX_NAME: Final = 4096
"""Characters of a VM's name. libvirt has no limit; the hook has the same (``libvirt_hooks.domain_xml.MAX_TEXT``)."""
MAX_WORD: Final = 255
"""Characters of what is named by operators and by us: nodes, policies, codes, versions."""
MAX_SENTENCE: Final = 16_384
"""Characters of a sentence; it may quote names."""

MAX_VMS_OF_HOST: Final = 20_000
"""VMs in one message of a host."""
MAX_VMS: Final = 1_000_000
"""VMs in one message of the manager."""
MAX_EXTERNALS: Final = 65_536
"""External addresses of the pool."""
MAX_NODES: Final = 4_096
MAX_RANGES: Final = 65_536
"""Ranges of one VM: it cannot hold more than there are ports and addresses."""
MAX_MAPPING_S: Final = 200_000
"""Seconds for which a guest may have ports mapped: twice a day, and some."""
MAX_FORWARDS: Final = 256
"""Forwards of one VM."""
MAX_FORWARD_PORTS: Final = 1024
"""Ports that the forwards of one VM may have in all."""
MAX_QUOTA_VMS: Final = 1_000_000
"""Of a host's quota of VMs."""
MAX_QUOTA_PORTS: Final = 2_000_000_000
"""Of a host's quota of ports."""
MAX_FEW: Final = 256
"""Entries of lists that have one for each kind of thing: warnings, reasons."""


def cut(text: str) -> str:
    """Return a text that fits a :data:`Sentence`; an ellipsis shows what is missing."""
    return text if len(text) <= MAX_SENTENCE else f"{text[: MAX_SENTENCE - 1]}…"


def at_most(number: _Number, most: _Number) -> _Number:
    """Return the number within 0 and ``most``."""
    return max(type(number)(0), min(number, most))


def whole_number(text: str, most: int) -> int | None:
    """Return the number that the text, ASCII digits alone, says; None: it says none, or one greater than ``most``."""
    # int() of thousands of digits fails, and isdigit() is true of digits that int() does not know.
    is_number = text.isascii() and text.isdigit() and len(text) <= max(20, len(str(most)))
    return number if is_number and (number := int(text)) <= most else None


def short(text: str | None) -> str:
    """Return a foreign text in quotation marks, escaped and shortened to 40 characters, for a sentence."""
    if text is None:
        return "missing"
    return repr(text if len(text) <= 40 else f"{text[:40]}...")

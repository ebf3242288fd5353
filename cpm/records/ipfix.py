"""
Entries of the journal as IPFIX (RFC 7011): port blocks that VMs get and give back, as RFC 8158 logs
them (section 4.6.10). All fields that are mandatory there are in each record.

Every message has the template before its records, so that one that is lost, or a collector that starts late, costs no
other. A file of messages is an IPFIX file (RFC 5655).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address
from typing import Final

from cpm.core.journal import JournalEntry, JournalEvent

VERSION: Final = 10
TEMPLATE_SET: Final = 2
TEMPLATE: Final = 256
VARIABLE: Final = 65535
PORT: Final = 4739
"""Where collectors listen."""

ALLOCATED, RELEASED = 16, 17
"""Values of natEvent (RFC 8158, section 4.3): port block allocation and de-allocation."""

ELEMENTS: Final = (
    (323, 8),  # observationTimeMilliseconds
    (230, 1),  # natEvent
    (8, 4),  # sourceIPv4Address: the VM's internal address
    (225, 4),  # postNATSourceIPv4Address
    (361, 2),  # portRangeStart
    (362, 2),  # portRangeEnd
    (363, 2),  # portRangeStepSize
    (364, 2),  # portRangeNumPorts
    (371, VARIABLE),  # userName: the VM's UUID
)
"""Information elements by IANA's numbers, and their length."""

MOST_RECORDS: Final = 20
"""Records in a message: it has at most 1,400 bytes, and is not fragmented on the way."""

_EVENTS: Final = {
    JournalEvent.RESERVED: ALLOCATED,
    JournalEvent.UPDATED: ALLOCATED,
    JournalEvent.FREED: RELEASED,
}
"""What these say is new. Other events leave the ports with their VM: they drain, are held, join with others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """Ports that a VM gets or gives back."""

    at_ms: int
    """UTC milliseconds."""
    event: int
    """:data:`ALLOCATED` or :data:`RELEASED`."""
    internal: IPv4Address
    external: IPv4Address
    first: int
    last: int
    vm: str
    """UUID."""

    def encode(self) -> bytes:
        """Return the record."""
        vm = self.vm.encode()[:254]
        count = self.last - self.first + 1
        addresses = int(self.internal), int(self.external)
        fixed = struct.pack("!QBIIHHHH", self.at_ms, self.event, *addresses, self.first, self.last, 1, count)
        return fixed + bytes([len(vm)]) + vm


def blocks(entries: Iterable[JournalEntry]) -> Iterator[Block]:
    """
    Yield what entries of the journal say of who has which ports.

    A VM that takes back ports of its own is said to get them again, and a part of a block may be given back.
    """
    for each in entries:
        if (event := event_of(each.event)) is not None:
            ports = each.ports
            at_ms = int(each.at.seconds * 1000)
            yield Block(at_ms, event, each.internal, each.external, ports.first, ports.last, each.domain)


def event_of(event: JournalEvent) -> int | None:
    """Return the natEvent of an entry of the journal; None: it changes nothing about who has the ports."""
    return _EVENTS.get(event)


class Exporter:
    """
    Makes messages, and counts the records in them.

    :param domain: Observation domain id, which tells two exporters at one collector apart.
    :param has_template: Whether each message has the template; over TCP it is sent once.
    """

    def __init__(self, domain: int, *, has_template: bool = True) -> None:
        self._domain = domain
        self._has_template = has_template
        self._sent = 0

    def messages(self, blocks: Iterable[Block], now_s: float) -> Iterator[bytes]:
        """
        Yield messages with these records.

        :param now_s: UTC seconds.
        """
        records = [block.encode() for block in blocks]
        for begin in range(0, len(records), MOST_RECORDS):
            part = records[begin : begin + MOST_RECORDS]
            yield self._message(part, int(now_s))
            self._sent = (self._sent + len(part)) & 0xFFFFFFFF

    def template(self, now_s: float) -> bytes:
        """Return a message with the template only. :param now_s: UTC seconds."""
        return self._framed(_set(TEMPLATE_SET, _template()), int(now_s))

    def _message(self, records: list[bytes], now_s: int) -> bytes:
        template = _set(TEMPLATE_SET, _template()) if self._has_template else b""
        return self._framed(template + _set(TEMPLATE, b"".join(records)), now_s)

    def _framed(self, sets: bytes, now_s: int) -> bytes:
        header = struct.pack("!HHIII", VERSION, 16 + len(sets), now_s & 0xFFFFFFFF, self._sent, self._domain)
        return header + sets


def _template() -> bytes:
    return struct.pack("!HH", TEMPLATE, len(ELEMENTS)) + b"".join(struct.pack("!HH", *each) for each in ELEMENTS)


def _set(number: int, content: bytes) -> bytes:
    return struct.pack("!HH", number, 4 + len(content)) + content

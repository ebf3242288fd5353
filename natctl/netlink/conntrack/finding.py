"""
Finds the connection of one flow, and how it is translated.

Tested in ``tests/netns/test_port_control.py``.
"""

from __future__ import annotations

import errno
import socket
from typing import Final, NamedTuple

from cpm.protocol.errors import KernelError
from natctl.model.flow import Flow
from natctl.netlink.conntrack.deletion import original_of
from natctl.netlink.conntrack.entries import GET, Entry
from natctl.netlink.message import netfilter_message, network_number
from natctl.netlink.socket import Socket

_CTA_TIMEOUT: Final = 7


class Translation(NamedTuple):
    """The translated source of a connection."""

    address: int
    port: int
    lasting_s: int
    """Seconds until it ends if no more packet comes."""


def find_translation(ct: Socket, flow: Flow) -> Translation | None:
    """
    Return how the connection of this flow is translated; None: there is no such connection.

    :param flow: In the direction of the first packet.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    try:
        body = ct.ask(netfilter_message(GET, 0, socket.AF_INET, original_of(flow)))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    entry = Entry.decode(body, 0, len(body))
    if entry is None or entry.port is None or _CTA_TIMEOUT not in entry.parts:
        return None
    return Translation(entry.address, entry.port, network_number(body[slice(*entry.parts[_CTA_TIMEOUT])]))

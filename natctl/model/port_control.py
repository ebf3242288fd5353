"""
Where a guest asks for ports, and how fast it may: the kernel and natd hold it to the same.

Tested in ``tests/unit/natctl/port_control/test_responder.py``.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Final

SERVER_PORT: Final = 5351
ANYCAST: Final = IPv4Address("192.0.0.9")
"""The address of whichever PCP server is on the way (RFC 7723)."""

BURST: Final = 30
"""Requests that a VM may send at once."""
PER_S: Final = 10
"""Requests a second that it may go on to send; further ones are dropped, and clients send them again."""

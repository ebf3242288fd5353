"""
Tells a guest which ports it has, for whoever in it wants to know.

Two places: a file, and, where that is wished for, the range from which the guest's kernel takes source ports
(``net.ipv4.ip_local_port_range``). With the latter a connection's port is the same inside and outside, and a guest
that has used up its ports notices at once (EADDRNOTAVAIL).

A hint and nothing more: the host translates whatever the guest sends into its range, told or not.
"""

from __future__ import annotations

import dataclasses
import json
import re
from ipaddress import IPv4Address

from cpm.protocol.model import PortRange
from qga_agent.guest_agent import Agent, AgentRefused, GuestLies, read_file, write_file

FILE = "/run/virt-ports.json"
LOCAL_PORT_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
WISH = "local-port-range"
"""Attribute of the ``ports`` element of a domain's metadata: ``yes`` or ``no``."""
VERSION = 1
"""Of the file's content; grows when a key changes its meaning or goes."""
LENGTH = 256
"""
Bytes of the file, always, filled with spaces.

The guest agent cannot rename a file. But a file of the same length is written over in place, in one write(2): who reads
it finds the old or the new, never half of either or nothing.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Announcement:
    """What a guest shall know."""

    external: IPv4Address
    ports: PortRange
    local_port_range: bool = False
    """Whether its kernel shall take source ports from the range."""


def wished(said: str | None, *, default: bool) -> bool:
    """Return whether a guest's source ports shall be its range: as its metadata says, when that says yes or no."""
    return {"yes": True, "no": False}.get((said or "").strip(), default)


def content(announcement: Announcement) -> bytes:
    """Return the file: a JSON object, spaces, and a newline, :data:`LENGTH` bytes together."""
    facts = {
        "version": VERSION,
        "external_address": str(announcement.external),
        "first_port": announcement.ports.first,
        "last_port": announcement.ports.last,
    }
    return json.dumps(facts).encode().ljust(LENGTH - 1) + b"\n"


async def announce(agent: Agent, announcement: Announcement, path: str = FILE) -> tuple[str, ...]:
    """
    Ensure that the guest knows; writes nothing that is there already.

    :param path: Of the file in the guest; empty: no file.
    :return: What the guest refused, a sentence each; empty when it knows all.
    :raise AgentAbsent: When there is no agent.
    :raise AgentSilent: When it does not answer in time. It may or may not know then.
    :raise GuestLies: When the agent talks nonsense.
    """
    refusals: list[str] = []
    if path:
        refusals += await _ensure_file(agent, path, content(announcement))
    if announcement.local_port_range:
        refusals += await _ensure_local_port_range(agent, announcement.ports)
    return tuple(refusals)


async def _ensure_file(agent: Agent, path: str, wanted: bytes) -> list[str]:
    try:
        present = await _present(agent, path)
        if present != wanted:
            await write_file(agent, path, wanted, "r+" if present is not None and len(present) == LENGTH else "w")
    except AgentRefused as error:
        return [error.why]
    return []


async def _present(agent: Agent, path: str) -> bytes | None:
    """Return what is in the file; None when there is none that could be one of ours."""
    try:
        return await read_file(agent, path, LENGTH + 1)
    except (AgentRefused, GuestLies):
        return None  # not there; or longer than ours, or nonsense, and then the write says so


async def _ensure_local_port_range(agent: Agent, ports: PortRange) -> list[str]:
    try:
        present = re.fullmatch(rb"(\d{1,5})\s+(\d{1,5})\n?", await read_file(agent, LOCAL_PORT_RANGE, 64))
        if present is None or (int(present[1]), int(present[2])) != (ports.first, ports.last):
            await write_file(agent, LOCAL_PORT_RANGE, f"{ports.first} {ports.last}\n".encode())
    except AgentRefused as error:
        return [error.why]
    return []

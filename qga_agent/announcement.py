"""
Announces to a guest which ports it has, for programs in the guest.

There are two ways: a file, and, if configured, the range from which the guest's kernel takes source ports
(``net.ipv4.ip_local_port_range``). With the latter a connection's source port is the same inside and outside, and a
guest that has used up its ports notices at once (EADDRNOTAVAIL).

It is a hint only: the host translates whatever the guest sends into its range, announced or not.
"""

from __future__ import annotations

import dataclasses
import json
import re
from ipaddress import IPv4Address

from cpm.protocol.model import PortRange
from qga_agent.guest_agent import Agent, AgentRefused, InvalidReply, read_file, write_file

DEFAULT_PATH = "/run/virt-ports.json"
"""Path of the file in the guest, unless natd.toml says otherwise."""
LOCAL_PORT_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
METADATA_ATTRIBUTE = "local-port-range"
"""Attribute of the ``ports`` element of a domain's metadata: ``yes`` or ``no``."""
FORMAT_VERSION = 1
"""``version`` in the file; grows when a key changes its meaning or is removed."""
FILE_BYTES = 256
"""
Size of the file, always, padded with spaces.

The guest agent cannot rename a file. But a file of the same size is overwritten in place by one write(2), so that a
reader finds the old content or the new, never a part of either and never an empty file.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Announcement:
    """What is announced to one guest."""

    external: IPv4Address
    ports: PortRange
    local_port_range: bool = False
    """Whether the guest's kernel shall take source ports from the range."""


def wants_local_port_range(metadata: str | None, *, default: bool) -> bool:
    """
    Return whether a guest's kernel shall take source ports from its range.

    :param metadata: :data:`METADATA_ATTRIBUTE` of the domain; None: it has none.
    :param default: What holds when the attribute is neither ``yes`` nor ``no``.
    """
    return {"yes": True, "no": False}.get((metadata or "").strip(), default)


def file_content(announcement: Announcement) -> bytes:
    """Return the content of the file: a JSON object, spaces and a newline, :data:`FILE_BYTES` in all."""
    facts = {
        "version": FORMAT_VERSION,
        "external_address": str(announcement.external),
        "first_port": announcement.ports.first,
        "last_port": announcement.ports.last,
    }
    return json.dumps(facts).encode().ljust(FILE_BYTES - 1) + b"\n"


async def announce(agent: Agent, announcement: Announcement, path: str = DEFAULT_PATH) -> tuple[str, ...]:
    """
    Ensure that the guest has the announcement; what it has already is not written again.

    :param path: Path of the file in the guest; empty: no file.
    :return: What the guest refused, a sentence each; empty when it took everything.
    :raise AgentAbsent: When there is no agent.
    :raise AgentSilent: When the agent does not answer in time. The guest may or may not have the announcement then.
    :raise InvalidReply: When the agent's reply cannot be one.
    """
    refusals: list[str] = []
    if path:
        refusals += await _ensure_file(agent, path, file_content(announcement))
    if announcement.local_port_range:
        refusals += await _ensure_local_port_range(agent, announcement.ports)
    return tuple(refusals)


async def _ensure_file(agent: Agent, path: str, desired: bytes) -> list[str]:
    try:
        present = await _read_existing(agent, path)
        if present != desired:
            await write_file(agent, path, desired, "r+" if present is not None and len(present) == FILE_BYTES else "w")
    except AgentRefused as error:
        return [error.reason]
    return []


async def _read_existing(agent: Agent, path: str) -> bytes | None:
    """Return the content of the file; None: there is none, or it cannot be one of ours."""
    try:
        return await read_file(agent, path, FILE_BYTES + 1)
    except (AgentRefused, InvalidReply):
        return None  # absent, or longer than ours; if the agent is at fault, the write that follows reports it


async def _ensure_local_port_range(agent: Agent, ports: PortRange) -> list[str]:
    try:
        present = re.fullmatch(rb"(\d{1,5})\s+(\d{1,5})\n?", await read_file(agent, LOCAL_PORT_RANGE, 64))
        if present is None or (int(present[1]), int(present[2])) != (ports.first, ports.last):
            await write_file(agent, LOCAL_PORT_RANGE, f"{ports.first} {ports.last}\n".encode())
    except AgentRefused as error:
        return [error.reason]
    return []

"""
Witnesses: what the kernels of a lab hold and what the other side saw, told by other people's tools.

Nothing here asks the product: ``nft``, ``conntrack`` and ``ss`` look from outside, so that what virt-ports says of
itself can be held against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from lab.lab import Lab


@dataclass(frozen=True, slots=True, order=True)
class Ports:
    """Ports of one address, both ends included."""

    address: IPv4Address
    first: int
    last: int

    @property
    def size(self) -> int:
        """How many they are."""
        return self.last - self.first + 1

    def holds(self, address: IPv4Address, port: int) -> bool:
        """Say whether a port is one of them."""
        return address == self.address and self.first <= port <= self.last

    def __str__(self) -> str:
        return f"{self.address}:{self.first}-{self.last}"


def handed_out(lab: Lab, host: str) -> dict[str, Ports]:
    """Return which ports of which internal address a host's kernel gives to new connections, by the VM's name."""
    return {key["elem"]["comment"]: _ports(value["concat"]) for key, value in _maps(lab, host).get("bindings", ())}


def let_in(lab: Lab, edge: str) -> dict[str, tuple[Ports, ...]]:
    """Return which external ports an edge's kernel sends on to VMs, by the VM's name."""
    found: dict[str, list[Ports]] = {}
    for name, elements in _maps(lab, edge).items():
        if address := re.fullmatch(r"inbound-([\d.]+)", name):
            for key, _ in elements:
                found.setdefault(key["elem"]["comment"], []).append(_ports((address[1], key["elem"]["val"])))
    return {name: joined(ports) for name, ports in found.items()}


def let_out(lab: Lab, edge: str) -> dict[str, tuple[Ports, ...]]:
    """Return which *external* ports an edge's kernel lets VMs send from, by the VM's name."""
    found: dict[str, list[Ports]] = {}
    for name, elements in _maps(lab, edge).items():
        if re.fullmatch(r"outbound(-\d+)?", name):
            for key, external in elements:
                ports = _ports((external, key["elem"]["val"]["concat"][1]))
                found.setdefault(key["elem"]["comment"], []).append(ports)
    return {name: joined(ports) for name, ports in found.items()}


def tracked(lab: Lab, node: str, address: IPv4Address) -> int:
    """Return of how many connections with an address the kernel of a machine keeps state."""
    return sum(f"={address} " in line for line in lab.run(node, "conntrack", "-L").splitlines())


def original_source(lab: Lab, host: str, reply_port: int) -> IPv4Address | None:
    """Return the guest's own address behind a port, from the host's connection tracking; None: no such connection."""
    listing = lab.run(host, "conntrack", "-L", "-p", "tcp", "--reply-port-dst", str(reply_port))
    found = re.search(r"src=(\S+)", listing)
    return IPv4Address(found[1]) if found else None


def peers(lab: Lab, port: int, node: str = "internet") -> list[tuple[IPv4Address, int]]:
    """Return address and port of everybody who is connected to a TCP port of a machine, as that machine sees them."""
    listing = lab.run(node, "ss", "-Htn", "state", "established", f"sport = :{port}")
    found = (line.split()[3].rpartition(":") for line in listing.splitlines())
    return sorted((IPv4Address(address), int(number)) for address, _, number in found)


def joined(ports: Iterable[Ports]) -> tuple[Ports, ...]:
    """Join neighbours: how a range is cut into elements is the kernel's business."""
    found: list[Ports] = []
    for one in sorted(ports):
        if found and (one.address, one.first) == (found[-1].address, found[-1].last + 1):
            found[-1] = Ports(one.address, found[-1].first, one.last)
        else:
            found.append(one)
    return tuple(found)


def _maps(lab: Lab, node: str) -> dict[str, list[Any]]:
    """Return the elements of every map of ours that leads to an address, not to a chain."""
    listed = json.loads(lab.run(node, "nft", "-j", "list", "maps", "ip"))["nftables"]
    ours = [entry["map"] for entry in listed if "map" in entry and entry["map"]["table"] == "virtports"]
    return {one["name"]: one.get("elem", []) for one in ours if one["map"] != "verdict"}


def _ports(concat: Any) -> Ports:
    address, ports = concat
    first, last = ports["range"] if isinstance(ports, dict) else (ports, ports)
    return Ports(IPv4Address(address), first, last)

"""
Witnesses: the state of a lab's kernels and the far end's view, as shown by independent tools.

Nothing here asks the product: ``nft``, ``conntrack`` and ``ss`` give what virt-ports says can be compared with.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
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
        """Number of ports."""
        return self.last - self.first + 1

    def holds(self, address: IPv4Address, port: int) -> bool:
        """Say whether a port is one of them."""
        return address == self.address and self.first <= port <= self.last

    def __str__(self) -> str:
        return f"{self.address}:{self.first}-{self.last}"


def host_ranges(lab: Lab, host: str) -> dict[str, Ports]:
    """Return which ports of which internal address a host's kernel gives to new connections, by the VM's name."""
    return {key["elem"]["comment"]: _ports(value["concat"]) for key, value in _maps(lab, host).get("bindings", ())}


def inbound_ranges(lab: Lab, edge: str) -> dict[str, tuple[Ports, ...]]:
    """Return which external ports an edge's kernel sends on to VMs, by the VM's name."""
    found: dict[str, list[Ports]] = {}
    for name, elements in _maps(lab, edge).items():
        if address := re.fullmatch(r"inbound-([\d.]+)", name):
            for key, _ in elements:
                found.setdefault(key["elem"]["comment"], []).append(_ports((address[1], key["elem"]["val"])))
    return {name: join_neighbours(ports) for name, ports in found.items()}


def outbound_ranges(lab: Lab, edge: str) -> dict[str, tuple[Ports, ...]]:
    """Return which *external* ports an edge's kernel lets VMs send from, by the VM's name."""
    found: dict[str, list[Ports]] = {}
    for name, elements in _maps(lab, edge).items():
        if re.fullmatch(r"outbound(-\d+)?", name):
            for key, external in elements:
                ports = _ports((external, key["elem"]["val"]["concat"][1]))
                found.setdefault(key["elem"]["comment"], []).append(ports)
    return {name: join_neighbours(ports) for name, ports in found.items()}


@dataclass(frozen=True, slots=True, order=True)
class Translation:
    """External ports and the internal address they are translated to."""

    external: Ports
    internal: IPv4Address


def translations(lab: Lab, edge: str) -> tuple[list[Translation], list[Translation]]:
    """Return an edge's inward and outward translations, from one listing of its whole ruleset."""
    inward, outward = [], []
    for name, elements in _maps(lab, edge, "ruleset").items():
        if address := re.fullmatch(r"inbound-([\d.]+)", name):
            inward += [
                Translation(_ports((address[1], key["elem"]["val"])), IPv4Address(internal))
                for key, internal in elements
            ]
        elif re.fullmatch(r"outbound(-\d+)?", name):
            for key, external in elements:
                internal, ports = key["elem"]["val"]["concat"]
                outward.append(Translation(_ports((external, ports)), IPv4Address(internal)))
        elif block := re.fullmatch(r"blocks-(\d+)", name):
            for key, external in elements:
                first, internal = key["concat"]
                ports = Ports(IPv4Address(external), first, first + int(block[1]) - 1)
                outward.append(Translation(ports, IPv4Address(internal)))
    return inward, outward


def flows(lab: Lab, host: str, pool: IPv4Network) -> set[tuple[IPv4Address, int]]:
    """Return internal address and port of every TCP connection of VMs that a host's kernel keeps state of."""
    listing = lab.run(host, "conntrack", "-L", "-p", "tcp")
    # The second dst= and dport= are those of the answers: the address of ours, and the port in the VM's range.
    pattern = re.compile(r"dst=\S+ .*? dst=(\S+) sport=\d+ dport=(\d+)")
    found = {(match[1], int(match[2])) for line in listing.splitlines() if (match := pattern.search(line))}
    addresses = {text: IPv4Address(text) for text, _ in found}
    return {(addresses[text], port) for text, port in found if addresses[text] in pool}


def syns_sent(lab: Lab, guest: str) -> int:
    """Return how many SYNs a light guest's kernel has sent, repeated ones included."""
    lines = [line.split() for line in lab.run(guest, "cat", "/proc/net/snmp", "/proc/net/netstat").splitlines()]
    pairs = zip(lines[::2], lines[1::2], strict=True)
    facts = {
        f"{names[0]}{name}": int(value)
        for names, values in pairs
        for name, value in zip(names[1:], values[1:], strict=True)
    }
    return facts["Tcp:ActiveOpens"] + facts["TcpExt:TCPSynRetrans"]


@contextlib.contextmanager
def counting_syns(lab: Lab, port: int, node: str = "internet") -> Iterator[Callable[[], int]]:
    """Count the SYNs that arrive for a TCP port of a machine; yields a function that returns the count."""
    table = f"witness-{port}"
    rule = f"tcp dport {port} tcp flags & (syn | ack) == syn counter"
    chain = f"chain arriving {{ type filter hook prerouting priority -400; {rule}; }}"
    lab.run(node, "nft", "-f", "-", stdin=f"table ip {table} {{ {chain}; }}")
    try:
        yield lambda: _packets(lab, node, table)
    finally:
        lab.run(node, "nft", "delete", "table", "ip", table)


def _packets(lab: Lab, node: str, table: str) -> int:
    listed = json.loads(lab.run(node, "nft", "-j", "list", "table", "ip", table))["nftables"]
    expressions = [one for entry in listed if "rule" in entry for one in entry["rule"]["expr"]]
    return sum(one["counter"]["packets"] for one in expressions if "counter" in one)


def drop_counters(lab: Lab, node: str) -> dict[str, int]:
    """Return the packet counters of our dropping rules, by the rule's comment."""
    listed = json.loads(lab.run(node, "nft", "-j", "list", "table", "ip", "virtports"))["nftables"]
    found: dict[str, int] = {}
    for rule in (entry["rule"] for entry in listed if "rule" in entry):
        counted = [one["counter"]["packets"] for one in rule["expr"] if "counter" in one]
        if counted and any("drop" in one for one in rule["expr"]):
            found[rule.get("comment", "")] = found.get(rule.get("comment", ""), 0) + counted[0]
    return found


def clashes(lab: Lab, host: str) -> int:
    """Return how many first packets the kernel dropped because another one took their port: conntrack's statistics."""
    return sum(map(int, re.findall(r"insert_failed=(\d+)", lab.run(host, "conntrack", "-S"))))


def connection_count(lab: Lab, node: str, address: IPv4Address) -> int:
    """Return the number of conntrack entries of a machine that contain an address."""
    return sum(f"={address} " in line for line in lab.run(node, "conntrack", "-L").splitlines())


def original_source(lab: Lab, host: str, reply_port: int) -> IPv4Address | None:
    """Return the guest's own address behind a port, from the host's connection tracking; None: no such connection."""
    listing = lab.run(host, "conntrack", "-L", "-p", "tcp", "--reply-port-dst", str(reply_port))
    found = re.search(r"src=(\S+)", listing)
    return IPv4Address(found[1]) if found else None


def peers(lab: Lab, port: int, node: str = "internet") -> list[tuple[IPv4Address, int]]:
    """Return the remote address and port of every connection to a TCP port of a machine."""
    listing = lab.run(node, "ss", "-Htn", "state", "established", f"sport = :{port}")
    found = (line.split()[3].rpartition(":") for line in listing.splitlines())
    return sorted((IPv4Address(address), int(number)) for address, _, number in found)


def join_neighbours(ports: Iterable[Ports]) -> tuple[Ports, ...]:
    """Join adjacent ranges: the kernel may split a range into several elements."""
    found: list[Ports] = []
    for one in sorted(ports):
        if found and (one.address, one.first) == (found[-1].address, found[-1].last + 1):
            found[-1] = Ports(one.address, found[-1].first, one.last)
        else:
            found.append(one)
    return tuple(found)


def _maps(lab: Lab, node: str, what: str = "maps ip") -> dict[str, list[Any]]:
    """Return the elements of every map of ours that leads to an address, not to a chain."""
    listed = json.loads(lab.run(node, "nft", "-j", "list", *what.split()))["nftables"]
    ours = [entry["map"] for entry in listed if "map" in entry and entry["map"]["table"] == "virtports"]
    return {one["name"]: one.get("elem", []) for one in ours if one["map"] != "verdict"}


def _ports(concat: Any) -> Ports:
    address, ports = concat
    first, last = ports["range"] if isinstance(ports, dict) else (ports, ports)
    return Ports(IPv4Address(address), first, last)

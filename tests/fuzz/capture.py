"""
Writes ``kernel_samples.json``: what a real kernel answered, by message type. As root, in namespaces of its own::

    python -m tests.fuzz.capture > tests/fuzz/kernel_samples.json
"""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from unittest import mock

from cpm.protocol.model import PortRange
from natctl.netlink import conntrack, links, networks, routes
from natctl.netlink.conntrack import entries
from natctl.netlink.message import Slice
from natctl.netlink.nftables import read
from natctl.netlink.socket import NETFILTER, ROUTE, Socket
from natctl.ruleset.way_check import Question
from tests.fakes.intents import with_intent
from tests.netns.topology import INTERNET, VM, Site, program

_samples: defaultdict[str, list[str]] = defaultdict(list)
_MOST = 40
"""Samples of one type."""


class _Recording(Socket):
    def dump(self, request: bytes, action: str = "") -> Iterator[Slice]:
        for buffer, start, end in super().dump(request, action):
            _keep(request, buffer[start:end])
            yield buffer, start, end

    def ask(self, request: bytes, action: str = "") -> bytes:
        answer = super().ask(request, action)
        _keep(request, answer)
        return answer


def _keep(request: bytes, body: bytes) -> None:
    (kind,) = struct.unpack_from("=H", request, 4)
    held = _samples[str(kind)]
    if body.hex() not in held and len(held) < _MOST:
        held.append(body.hex())


def _read_everything(vm: VM) -> None:
    with _Recording(NETFILTER, "sample") as nft, _Recording(ROUTE, "sample") as rtnl:
        read.read_tables(nft, lambda: 0)
        routes.read(rtnl)
        links.read_links(rtnl)
        links.has_received(rtnl, vm.guest.tap_index)
        networks.used_networks(rtnl)
        networks.interface_addresses(rtnl)
        mark = 0x40010000
        routes.ask(rtnl, Question(vm.internal, vm.internal, vm.guest.tap_index, mark))
    with mock.patch.object(entries, "Socket", _Recording):
        conntrack.dump_ports()
        conntrack.dump_ports_of(vm.internal)


def main() -> None:
    """Write the samples."""
    site = Site()
    try:
        machine = site.both(11)
        site.spread(machine)
        vm = VM.of(1, site.guest(machine), PortRange(20000, 20063))
        other = VM.of(2, site.guest(machine, "10.10.0.6"), PortRange(20064, 20127))
        program([machine], [vm, other])
        changed = dataclasses.replace(with_intent(vm.on_host(), at_cap=True), budget=64, defer_after=192)
        machine.kernel.replace(
            {vm.domain: changed, other.domain: other.on_host()},
            {each.domain: each.at(machine) for each in (vm, other)},
            machine.kernel.observe().path or sys.exit("no path"),
        )
        with (
            site.internet.udp(INTERNET, 53) as server,
            site.internet.listener(INTERNET, 80),
            vm.guest.namespace.udp() as client,
            vm.guest.namespace.tcp((INTERNET, 80)),
        ):
            client.sendto(b"?", (INTERNET, 53))
            server.recvfrom(9)
            vm.guest.namespace.run("ping", "-c", "1", INTERNET)
            machine.namespace.inside(lambda: _read_everything(vm))
    finally:
        site.close()
    json.dump(_samples, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

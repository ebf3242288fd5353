"""What natd makes of hooks, events and lists, with a libvirtd that does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import struct
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

import pytest
from pyroute2.netlink.rtnl import RTM_NEWLINK

from cpm.protocol.messages import PROTOCOL, Attach, Detach, PathState, Snapshot, Welcome
from cpm.protocol.model import DomainUUID, NodeName, Role, Wishes
from cpm.service import clock
from libvirt_hooks.domain_xml import DomainFacts, Interface
from libvirt_hooks.protocol import HookOperation
from natctl.core.domains import Tap
from natctl.core.identity import Identity
from natctl.core.node import Node
from natctl.domain_watch import DomainWatch
from natctl.model.commands import Answer, Send
from natctl.netlink.links import LinkEvent, Resync, events_in
from natctl.netlink.message import attribute, message
from natctl.settings import GuestsTable, HostTable
from qga_agent.domain_events import DomainChanged
from qga_agent.domain_list import Phase
from qga_agent.libvirt_stats import LibvirtMonitor
from tests.fakes.libvirt import FakeLibvirtd

VM = DomainUUID("11111111-1111-4111-8111-111111111111")


def attach(uuid: DomainUUID, name: str, *, incoming: bool = False) -> Attach:
    """What the manager is told of a VM whose XML has no wishes."""
    return Attach(uuid, name, incoming, Wishes())


class Watched(NamedTuple):
    """A node, what watches for it, and what it said."""

    node: Node
    watch: DomainWatch
    said: list[object]
    replies: list[tuple[int, str, str]]

    def hook(self, operation: HookOperation, *interfaces: Interface) -> None:
        self.watch.on_hook(7, operation, DomainFacts(VM, "web", 1, "qemu", interfaces))

    async def says(self, message: object) -> None:
        """Wait until the node has told the manager something."""
        async with asyncio.timeout(10):
            while message not in self.said:
                await asyncio.sleep(0.001)


def watched(monitor: LibvirtMonitor | None = None, bridges: frozenset[str] = frozenset()) -> Watched:
    node = Node(
        Identity(NodeName("host1"), frozenset({Role.HOST}), IPv4Address("172.30.0.11"), "test"),
        7,
        has_libvirt=monitor is not None,
    )
    said: list[object] = []
    replies: list[tuple[int, str, str]] = []

    def carry_out() -> None:
        for command in node.take():
            if isinstance(command, Send):
                said.append(command.message)
            elif isinstance(command, Answer):
                replies.append((command.request, command.code, command.text))

    def reply(request: int, code: str, text: str) -> None:
        replies.append((request, code, text))

    host = HostTable(uplinks=frozenset({"eth0"}), bridges=bridges)
    watch = DomainWatch(node, carry_out, reply, host, GuestsTable(), monitor, None)
    now = clock.now()
    node.on_connected(now)
    node.on_message(Welcome(PROTOCOL, 1, "test"), now)
    node.on_message(Snapshot(1, 1, PathState(IPv4Network("100.64.0.0/10"))), now)
    carry_out()
    said.clear()
    return Watched(node, watch, said, replies)


@contextlib.asynccontextmanager
async def following(libvirtd: FakeLibvirtd) -> AsyncIterator[Watched]:
    """Watch a libvirtd, as natd does."""
    monitor = LibvirtMonitor("fake:///", connect=libvirtd.open)
    it = watched(monitor)
    loops = (monitor.run(), it.watch.serve_events(monitor), it.watch.serve_lists(monitor))
    tasks = [asyncio.ensure_future(loop) for loop in loops]
    try:
        async with asyncio.timeout(10):
            await it.watch.has_listed.wait()
        yield it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


BRIDGED = Interface("network", "vmbr0", None, "no-such-tap")
UNRESOLVED = Interface("network", "vmnet", None, None)
MACVTAP = Interface("direct", None, None, "macvtap0")


def test_a_migration_is_expected_whatever_its_network_is_called() -> None:
    it = watched(bridges=frozenset({"vmbr0"}))
    it.hook(HookOperation.MIGRATE, UNRESOLVED)
    it.hook(HookOperation.PREPARE, UNRESOLVED)
    it.hook(HookOperation.START, BRIDGED)
    assert it.said == [attach(VM, "web", incoming=True)]
    assert [code for _, code, _ in it.replies] == ["", "", ""]


def test_a_vm_without_an_interface_of_ours_gives_back_what_it_got_before_that_was_known() -> None:
    it = watched()
    it.hook(HookOperation.PREPARE, UNRESOLVED)
    assert it.said == [attach(VM, "web")]
    it.hook(HookOperation.START, MACVTAP)
    assert it.said[1:] == [Detach(VM, "it has no interface on our bridges")]
    assert it.replies[-1] == (7, "", "no interface of ours")


@pytest.mark.parametrize("operation", [HookOperation.RESTORE, HookOperation.PREPARE, HookOperation.RECONNECT])
def test_some_hooks_wait_for_nothing(operation: HookOperation) -> None:
    it = watched()
    it.hook(operation, BRIDGED)
    assert it.replies == [(7, "", "")]


async def test_an_interface_that_is_renamed_stays_the_vms(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel's messages: see ``tests/netns/test_links.py`` for what it really says."""
    known = {3: "vnet0"}
    renamed = message(RTM_NEWLINK, 0, struct.pack("=BxHiII", 0, 0, 3, 0, 0) + attribute(3, b"other0\0"))

    async def events() -> AsyncIterator[LinkEvent]:
        yield Resync({}, dict(known))
        for event in events_in(renamed, known):
            yield event

    monkeypatch.setattr("natctl.domain_watch.watch_links", events)
    monkeypatch.setattr("socket.if_nametoindex", {"vnet0": 3}.__getitem__)
    monkeypatch.setattr("natctl.domain_watch.is_bridge_port", lambda rtnl, index: index == 3)
    it = watched()
    it.hook(HookOperation.START, Interface("network", "vmbr0", None, "vnet0"))
    assert it.node.taps() == {VM: frozenset({"vnet0"})}
    await it.watch.watch_links()
    assert it.node.taps() == {VM: frozenset({"other0"})}
    it.watch.close()


async def test_each_event_has_the_list_read() -> None:
    libvirtd = FakeLibvirtd()
    async with following(libvirtd) as it:
        uuid = libvirtd.start("web")
        await it.says(attach(uuid, "web"))
        libvirtd.phases[uuid] = Phase.MIGRATING
        libvirtd.happen(DomainChanged(uuid))
        libvirtd.destroy("web")
        await it.says(Detach(uuid, "libvirt no longer lists it"))
        other = libvirtd.start("other")
        await it.says(attach(other, "other"))
    assert not any(isinstance(said, Attach) and said.incoming for said in it.said)


async def test_a_guest_that_migrates_here_is_expected_until_the_list_says_that_it_runs() -> None:
    libvirtd = FakeLibvirtd()
    async with following(libvirtd) as it:
        libvirtd.phases = dict.fromkeys([DomainUUID("4dea22b3-1d52-48f3-a516-000000000001")], Phase.MIGRATING)
        uuid = libvirtd.start("web")
        await it.says(attach(uuid, "web", incoming=True))
        assert attach(uuid, "web") not in it.said
        libvirtd.phases.clear()
        libvirtd.happen(DomainChanged(uuid))
        await it.says(attach(uuid, "web"))


def test_a_vm_whose_tap_is_on_no_bridge_is_not_managed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loopback interface stands for a tap that exists and is routed."""
    routed = Interface("ethernet", None, None, "lo")
    it = watched()
    it.hook(HookOperation.PREPARE, UNRESOLVED)
    it.hook(HookOperation.START, routed)
    assert it.said == [attach(VM, "web"), Detach(VM, "it has no interface on our bridges")]
    vm = it.watch._running_domain(DomainFacts(VM, "web", 1, "qemu", (routed,)))
    assert vm.why_not == "its interface lo is on no Linux bridge"
    # One that is not there yet may be on a bridge.
    assert it.watch._running_domain(DomainFacts(VM, "web", 1, "qemu", (routed, BRIDGED))).has_interface
    monkeypatch.setattr("natctl.domain_watch.is_bridge_port", lambda rtnl, index: index == 1)
    assert it.watch._running_domain(DomainFacts(VM, "web", 1, "qemu", (routed,))).has_interface
    it.watch.close()


def test_an_interface_on_no_bridge_is_not_ours_beside_one_that_is_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was routed before, and goes on so."""
    it = watched()
    names = {"lo": 1, "vnet5": 5}
    monkeypatch.setattr(socket, "if_nametoindex", names.__getitem__)
    monkeypatch.setattr("natctl.domain_watch.is_bridge_port", lambda rtnl, index: index == 5)
    both = Interface("ethernet", None, None, "lo"), Interface("bridge", "br0", None, "vnet5")
    vm = it.watch._running_domain(DomainFacts(VM, "web", 1, "qemu", both))
    assert (vm.has_interface, vm.why_not, vm.taps) == (True, "", frozenset({Tap("vnet5", 5)}))
    it.watch.close()


def test_a_vm_without_any_tap_is_not_managed_and_one_on_bridges_of_others_is_not_spoken_of() -> None:
    it = watched(bridges=frozenset({"br7"}))
    macvtap, card = (
        Interface("direct", None, None, "macvtap0"),
        Interface("hostdev", None, "52:54:00:00:00:01", None),
    )

    def why(*interfaces: Interface) -> str:
        vm = it.watch._running_domain(DomainFacts(VM, "web", 1, "qemu", interfaces))
        assert not vm.has_interface
        return vm.why_not

    assert why(macvtap) == "its interface macvtap0 is a macvtap, on no Linux bridge"
    assert why(macvtap, card).endswith("; its interface 52:54:00:00:00:01 is of type hostdev, on no Linux bridge")
    assert why(macvtap, BRIDGED) == ""
    assert why() == ""
    it.watch.close()


def test_the_last_that_libvirt_said_of_a_vms_agent_channel_counts() -> None:
    it = watched()
    assert it.watch.has_agent_channel(VM), "nothing is known of it"
    facts = DomainFacts(VM, "web", 1, "qemu", (BRIDGED,))
    it.watch.on_hook(7, HookOperation.START, facts)
    assert not it.watch.has_agent_channel(VM)
    it.watch._running_domain(dataclasses.replace(facts, has_agent_channel=True))
    assert it.watch.has_agent_channel(VM)
    it.watch.close()

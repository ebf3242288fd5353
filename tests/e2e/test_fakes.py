"""
The real things behind the fakes of the unit tests: the same tables, in a lab without cpmd and natd.

The guest agent is qemu-ga in a booted guest, once through libvirt and once at a socket; libvirtd is one of the lab's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import libvirt
import libvirt_qemu
import pytest

from cpm.protocol.model import DomainUUID
from lab.errors import CommandFailed
from lab.lab import Lab
from lab.node import LibvirtHost
from lab.vm import RealGuest
from qga_agent.agent_libvirt import LibvirtAgents
from qga_agent.agent_socket import SocketAgents
from qga_agent.domain_events import ConnectionMade, DomainEvent
from qga_agent.guest_agent import Agent, AgentAbsent, Agents, AgentSilent, parse_interfaces
from qga_agent.libvirt_connection import LibvirtConnection
from qga_agent.libvirt_stats import Connection, LibvirtMonitor
from tests.e2e import bare_qemu
from tests.e2e.labs import running, unique_name
from tests.e2e.observing import eventually
from tests.fakes.conformance import agent_errors, guest_agent, libvirtd

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

UUID_OF_NONE = DomainUUID("99999999-9999-4999-8999-999999999999")
COPY = "copy"
"""A second domain like the guest's."""
FREEZE = "p=$(pidof qemu-ga); (sleep 0.5; kill -STOP $p; sleep 9; kill -CONT $p) >/dev/null 2>&1 </dev/null &"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("f"), with_daemons=False) as site:
        yield site


@pytest.fixture(scope="module")
def host(lab: Lab) -> LibvirtHost:
    """Where the guests are; the checks of libvirtd, which kill it, have the other one."""
    return lab.hosts["host1"]


@pytest.fixture(scope="module")
def vm(lab: Lab) -> RealGuest:
    guest = lab.add_vm("guest", "host1")
    guest.wait_ready()
    return guest


@pytest.fixture(scope="module")
def bare(lab: Lab, host: LibvirtHost) -> Iterator[SocketAgents]:
    """Agents behind sockets: that of one QEMU which libvirt does not know."""
    pattern = lab.state / "agents" / "{uuid}.sock"
    with bare_qemu.bare_qemu(host, pattern.with_name(f"{bare_qemu.UUID}.sock")):
        agents = SocketAgents(str(pattern), 1.0)
        assert eventually(lambda: asyncio.run(has_booted(agents)), 60)
        yield agents


async def has_booted(agents: SocketAgents) -> bool:
    """Whether the bare guest has booted: its agent answers, and its interface has an address."""
    with contextlib.suppress(AgentSilent):
        async with agents.visit(DomainUUID(bare_qemu.UUID)) as agent:
            return "eth0" in parse_interfaces(await agent.execute("guest-network-get-interfaces"))
    return False


@pytest.fixture
async def through_libvirt(host: LibvirtHost) -> AsyncIterator[LibvirtAgents]:
    monitor = LibvirtMonitor(host.uri)
    run = asyncio.ensure_future(monitor.run())
    assert await asyncio.wait_for(monitor.events.get(), 30) == ConnectionMade()
    yield (agents := LibvirtAgents(monitor))
    agents.close()
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)


class TestGuestAgent:
    @pytest.mark.parametrize("check", guest_agent.CHECKS, ids=lambda check: check.__name__)
    async def test_through_libvirt(
        self, vm: RealGuest, through_libvirt: LibvirtAgents, check: Callable[[Agent], Awaitable[None]]
    ) -> None:
        async with through_libvirt.visit(DomainUUID(vm.uuid)) as agent:
            await check(agent)

    @pytest.mark.parametrize("check", guest_agent.CHECKS, ids=lambda check: check.__name__)
    async def test_at_its_socket(self, bare: SocketAgents, check: Callable[[Agent], Awaitable[None]]) -> None:
        async with bare.visit(DomainUUID(bare_qemu.UUID)) as agent:
            await check(agent)

    async def test_a_frozen_one_is_silent_and_answers_again(self, vm: RealGuest, through_libvirt: Agents) -> None:
        await asyncio.to_thread(vm.shell, FREEZE)
        await asyncio.to_thread(eventually, lambda: frozen(vm))
        async with through_libvirt.visit(DomainUUID(vm.uuid)) as agent:
            with pytest.raises(AgentSilent):
                await agent.execute("guest-sync", {"id": 1})
        await asyncio.to_thread(vm.wait_ready)
        async with through_libvirt.visit(DomainUUID(vm.uuid)) as agent:
            assert await agent.execute("guest-sync", {"id": 2}) == 2

    async def test_no_vm_no_agent(self, bare: SocketAgents, through_libvirt: LibvirtAgents) -> None:
        for agents in (bare, through_libvirt):
            async with agents.visit(UUID_OF_NONE) as agent:
                with pytest.raises(AgentAbsent):
                    await agent.execute("guest-sync", {"id": 1})


class TestErrorsOfAgents:
    """What libvirt raises in each situation; unit tests show what becomes of it."""

    @pytest.mark.parametrize("situation", agent_errors.FAILURES)
    def test_libvirt_raises_them(self, host: LibvirtHost, vm: RealGuest, situation: str) -> None:
        failure = agent_errors.FAILURES[situation]
        command = json.dumps({"execute": "guest-vp-unknown" if situation == "refused" else "guest-ping"})
        with contextlib.closing(libvirt.open(host.uri)) as connection, prepared(host, vm, situation) as name:
            domain = connection.lookupByName(name)
            if situation == "unknown":
                host.virsh("destroy", name)
            begin = time.monotonic()
            with pytest.raises(libvirt.libvirtError) as caught:
                libvirt_qemu.qemuAgentCommand(domain, command, 1, 0)
            took_s = time.monotonic() - begin
        assert caught.value.get_error_code() == failure.code
        assert failure.message in caught.value.get_error_message()
        assert (took_s > 0.5) == failure.waits


@contextlib.contextmanager
def prepared(host: LibvirtHost, vm: RealGuest, situation: str) -> Iterator[str]:
    """Bring a domain into a situation of :data:`agent_errors.FAILURES`; return its name."""
    if situation == "refused":
        yield vm.name
    elif situation == "frozen":
        vm.shell(FREEZE)
        assert eventually(lambda: frozen(vm))
        yield vm.name
        vm.wait_ready()
    else:
        xml = copy_of(host.virsh("dumpxml", "--inactive", vm.name))
        if situation == "no channel":
            xml = re.sub(r"<channel .*?</channel>", "", xml, flags=re.DOTALL)
        how = ["define"] if situation == "shut off" else ["create"]
        if situation in ("paused", "unknown"):
            how.append("--paused")
        host.virsh(*how, "/dev/stdin", stdin=xml)
        try:
            yield COPY
        finally:
            for command in ("destroy", "undefine"):
                with contextlib.suppress(CommandFailed):
                    host.virsh(command, COPY)


def copy_of(xml: str) -> str:
    """Return a domain's XML with another name, UUID and hardware address."""
    xml = re.sub(r"<name>.*?</name>", f"<name>{COPY}</name>", xml, count=1)
    xml = re.sub(r"<uuid>.*?</uuid>", f"<uuid>{uuid.uuid4()}</uuid>", xml, count=1)
    return re.sub(r"<mac [^>]*/>", "", xml)


def frozen(vm: RealGuest) -> bool:
    """Whether the agent is stopped: asking it takes all the time there is."""
    begin = time.monotonic()
    with contextlib.suppress(Exception):
        vm.host.virsh("qemu-agent-command", vm.name, "--timeout", "1", '{"execute": "guest-ping"}')
    return time.monotonic() - begin > 0.9


class RealLibvirtd:
    """One of the lab's, as the checks take it."""

    def __init__(self, lab: Lab, host: LibvirtHost) -> None:
        self._lab = lab
        self._host = host

    def open(self, on_event: Callable[[DomainEvent], None], on_close: Callable[[str], None]) -> Connection:
        return LibvirtConnection(self._host.uri, on_event, on_close)

    def start(self, name: str) -> DomainUUID:
        return DomainUUID(self._lab.add_vm(name, self._host.name, paused=True).uuid)

    def destroy(self, name: str) -> None:
        self._lab.remove_vm(name)

    def kill(self) -> None:
        self._host.end_libvirtd()

    def revive(self) -> None:
        self._host.start_libvirtd()
        # libvirtd sends no event of a domain that ends while it is still connecting to it; a question waits for that.
        for name in self._host.virsh("list", "--name").split():
            self._host.virsh("qemu-monitor-command", name, "--hmp", "info status")


@pytest.mark.parametrize("check", libvirtd.CHECKS, ids=lambda check: check.__name__)
def test_libvirtd(lab: Lab, check: Callable[[libvirtd.Libvirtd], None]) -> None:
    check(RealLibvirtd(lab, lab.hosts["host2"]))

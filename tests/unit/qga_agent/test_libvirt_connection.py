"""The binding itself, against libvirt's test driver, which lives in this process and needs no libvirtd."""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import libvirt
import libvirt_qemu
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from libvirt_hooks.domain_xml import METADATA_NAMESPACE
from qga_agent.domain_events import DomainEvent, DomainStarted, DomainStopped, MetadataChanged
from qga_agent.domain_list import Phase
from qga_agent.guest_agent import AgentAbsent, AgentError, AgentSilent
from qga_agent.libvirt_connection import ConnectionBroken, LibvirtAgentChannel, LibvirtConnection, interface_counters
from qga_agent.samples import InterfaceCounters
from tests.fakes.conformance.agent_errors import FAILURES

# As libvirt 9.0 answers for a domain with two interfaces.
TWO_INTERFACES = {
    "net.count": 2, "net.0.name": "vnet0",
    "net.0.rx.bytes": 1000, "net.0.rx.pkts": 10, "net.0.rx.errs": 0, "net.0.rx.drop": 0,
    "net.0.tx.bytes": 2000, "net.0.tx.pkts": 20, "net.0.tx.errs": 0, "net.0.tx.drop": 0,
    "net.1.name": "vnet1",
    "net.1.rx.bytes": 3, "net.1.rx.pkts": 1, "net.1.tx.bytes": 4, "net.1.tx.pkts": 2,
}  # fmt: skip


def test_every_interface_with_all_its_counters_is_read() -> None:
    assert interface_counters(TWO_INTERFACES) == {
        "vnet0": InterfaceCounters(rx_packets=10, rx_bytes=1000, tx_packets=20, tx_bytes=2000),
        "vnet1": InterfaceCounters(rx_packets=1, rx_bytes=3, tx_packets=2, tx_bytes=4),
    }


@given(st.sets(st.sampled_from(sorted(TWO_INTERFACES))))
def test_what_is_incomplete_is_left_out(missing: set[str]) -> None:
    left = {key: value for key, value in TWO_INTERFACES.items() if key not in missing}
    whole = interface_counters(TWO_INTERFACES)
    for tap, counters in interface_counters(left).items():
        assert counters == whole[tap]
    assert ("vnet1" in interface_counters(left)) == (
        not missing & {"net.count"} and not any(key.startswith("net.1.") for key in missing)
    )


def test_a_domain_without_interfaces_has_no_counters() -> None:
    assert interface_counters({}) == {}


@pytest.fixture
def events() -> queue.SimpleQueue[DomainEvent]:
    return queue.SimpleQueue()


@pytest.fixture
def connection(events: queue.SimpleQueue[DomainEvent]) -> Iterator[LibvirtConnection]:
    connection = LibvirtConnection("test:///default", events.put, pytest.fail)
    yield connection
    connection.close()


@contextlib.contextmanager
def another_client(name: str) -> Iterator[Any]:
    """Start a domain by a connection that is not ours; it ends with the context."""
    other = libvirt.open("test:///default")
    domain = other.createXML(
        f"<domain type='test'><name>{name}</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    )
    try:
        yield domain
    finally:
        domain.destroy()
        other.close()


def test_active_domains_are_listed(connection: LibvirtConnection) -> None:
    (listed,) = connection.domains()
    assert listed.facts is not None
    assert (listed.facts.name, listed.facts.type, listed.phase) == ("test", "test", Phase.HERE)
    assert listed.uuid == listed.facts.uuid == "6695eb01-f6a4-8304-79aa-97f2502e193f"
    assert connection.domain(listed.uuid) == listed


def test_the_test_driver_has_no_statistics(connection: LibvirtConnection) -> None:
    assert connection.statistics() == {}


def test_events_arrive_without_a_call(connection: LibvirtConnection, events: queue.SimpleQueue[DomainEvent]) -> None:
    with another_client("vp-events") as domain:
        uuid = domain.UUIDString()
        assert "vp-events" in {each.facts.name for each in connection.domains() if each.facts is not None}
    assert [events.get(timeout=10), events.get(timeout=10)] == [
        DomainStarted(uuid, "vp-events", "booted"),
        DomainStopped(uuid, "vp-events", "destroyed"),
    ]


def test_wishes_in_the_metadata_of_a_running_domain_arrive_as_virsh_sets_them(
    connection: LibvirtConnection, events: queue.SimpleQueue[DomainEvent]
) -> None:
    with another_client("vp-wishes") as domain:
        uuid, element = domain.UUIDString(), libvirt.VIR_DOMAIN_METADATA_ELEMENT
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_DESCRIPTION, "not for us", None, None)
        domain.setMetadata(element, "<ports floor='1'/>", "app", "urn:somebody-else")
        domain.setMetadata(element, "<ports floor='256' drain-limit='none'/>", "vp", METADATA_NAMESPACE)
        every = [each.facts for each in connection.domains()]
        (facts,) = (each for each in every if each is not None and each.name == "vp-wishes")
        domain.setMetadata(element, None, None, METADATA_NAMESPACE)
    assert facts.ports_metadata == (("floor", "256"), ("drain-limit", "none"))
    assert [events.get(timeout=10) for _ in range(4)] == [
        DomainStarted(uuid, "vp-wishes", "booted"),
        MetadataChanged(uuid),
        MetadataChanged(uuid),
        DomainStopped(uuid, "vp-wishes", "destroyed"),
    ]


def test_an_absent_libvirtd_is_unreachable_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Unreachable) as caught:
        LibvirtConnection("qemu:///system?socket=/nonexistent/libvirt-sock", lambda _: None, lambda _: None)
    assert caught.value.peer.startswith("qemu:///system")
    assert "No such file" in caught.value.detail
    assert caught.value.remedy
    assert capfd.readouterr().err == "", "libvirt prints its errors unless told not to"


WITHOUT_BINDING = """
import sys
sys.modules["libvirt"] = None
from cpm.protocol.errors import Unreachable
from qga_agent.libvirt_connection import LibvirtConnection
try:
    LibvirtConnection("qemu:///system", print, print)
except Unreachable as error:
    sys.exit(0 if error.remedy else 3)
"""


def test_without_the_binding_libvirt_is_unreachable() -> None:
    # In a process of its own, because this one has the binding loaded for good.
    assert subprocess.run([sys.executable, "-c", WITHOUT_BINDING], check=False).returncode == 0


class FailingDomain:
    """A domain of the binding whose agent commands end in an error of libvirt's."""

    def __init__(self, code: int, message: str, takes_s: float = 0.0) -> None:
        self.code, self.message, self.takes_s = code, message, takes_s

    def fail(self, *_: object) -> None:
        time.sleep(self.takes_s)
        error = libvirt.libvirtError(self.message)
        error.err = (self.code, 10, self.message, 2, "", None, None, 0, 0)
        raise error

    agentSetResponseTimeout = fail  # noqa: N815 - libvirt's word


@pytest.mark.parametrize("situation", FAILURES)
def test_an_error_for_an_agent_is_translated(monkeypatch: pytest.MonkeyPatch, situation: str) -> None:
    """tests/e2e/test_fakes.py shows that libvirt gives these errors."""
    failure = FAILURES[situation]
    domain = FailingDomain(failure.code, failure.message, takes_s=0.6 if failure.waits else 0.0)
    assert error_of(monkeypatch, domain) is failure.error


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        (libvirt.VIR_ERR_NO_SUPPORT, "not supported by the driver", AgentAbsent),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "client socket is closed", AgentSilent),
        (libvirt.VIR_ERR_OPERATION_TIMEOUT, "cannot acquire state change lock", AgentSilent),
    ],
)
def test_so_are_errors_of_libvirt_itself(
    monkeypatch: pytest.MonkeyPatch, code: int, message: str, expected: type[AgentError]
) -> None:
    assert error_of(monkeypatch, FailingDomain(code, message)) is expected


def error_of(monkeypatch: pytest.MonkeyPatch, domain: FailingDomain) -> type[AgentError]:
    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", domain.fail)
    with pytest.raises(AgentError) as caught:
        LibvirtAgentChannel(libvirt, domain).command('{"execute": "guest-sync"}', 1)
    return caught.type


class Slow:
    """A connection whose lookups take until they are let go; everything else is the binding's."""

    def __init__(self, real: Any) -> None:
        self.real, self.is_called, self.goes_on = real, threading.Event(), threading.Event()

    def lookupByUUIDString(self, uuid: str) -> Any:  # noqa: N802
        self.is_called.set()
        assert self.goes_on.wait(20)
        return self.real.lookupByUUIDString(uuid)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_a_connection_is_not_freed_under_a_call_of_another_thread(
    connection: LibvirtConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt.so may crash then."""
    (running,) = connection.domains()
    slow = Slow(libvirt.open("test:///default"))
    monkeypatch.setattr(libvirt, "open", lambda _: slow)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(connection.domain, running.uuid)
        assert slow.is_called.wait(20)
        connection.close()
        assert slow.real._o is not None
        assert slow.real.isAlive()
        slow.goes_on.set()
        assert call.result(20) is not None
    with pytest.raises(ConnectionBroken):
        connection.domain(running.uuid)
    with pytest.raises(AgentSilent):
        connection.agent_channel(running.uuid)
    with pytest.raises(libvirt.libvirtError):
        slow.real.isAlive()
    connection.close()


class Counting(Slow):
    """A connection that notes how many threads are in a call of it."""

    def __init__(self, real: Any, barrier: threading.Barrier) -> None:
        super().__init__(real)
        self.barrier, self.inside, self.most = barrier, 0, 0

    def lookupByUUIDString(self, uuid: str) -> Any:  # noqa: N802
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.barrier.wait(20)
        self.inside -= 1
        return self.real.lookupByUUIDString(uuid)


def test_no_two_threads_use_one_connection(connection: LibvirtConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt.so writes to a stack that has ended (CVE-2024-4418). natd crashed when libvirtd ended slowly."""
    (running,) = connection.domains()
    barrier, real, opened = threading.Barrier(3), libvirt.open, [Counting(connection._connection, threading.Barrier(3))]

    def open_another(uri: str) -> Counting:
        opened.append(Counting(real(uri), barrier))
        return opened[-1]

    monkeypatch.setattr(libvirt, "open", open_another)
    connection._connection = opened[0]
    calls = (connection.domain, connection.agent_channel, connection.domain)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(call, running.uuid) for call in calls]:
            assert done.result(20) is not None
    assert [each.most for each in opened] == [0, 1, 1, 1]
    connection.close()


def test_a_driver_without_agents_has_none(connection: LibvirtConnection) -> None:
    channel = connection.agent_channel(DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f"))
    with pytest.raises(AgentAbsent):
        channel.command('{"execute": "guest-sync"}', 1)
    with pytest.raises(AgentAbsent):
        connection.agent_channel(DomainUUID("11111111-1111-1111-1111-111111111111"))

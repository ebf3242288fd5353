"""Which of the ports that a machine uses are told to the manager."""

from __future__ import annotations

from ipaddress import IPv4Address

from cpm.protocol.model import PortRange
from cpm.protocol.own_ports import MOST_ADDRESSES, MOST_RANGES
from natctl.core.own_ports import LASTING_S, OwnPorts
from natctl.model.own_ports import LocalSocket, OwnInterfaces, PortsInUse, SocketKind

A, B = IPv4Address("203.0.113.1"), IPv4Address("10.0.0.1")
EPHEMERAL = PortRange(32768, 60999)
LISTENING, BOUND, CONNECTED = SocketKind.LISTENING, SocketKind.BOUND, SocketKind.CONNECTED
VM_HOLDS_ALL = {A: (PortRange(1024, 32767), PortRange(61000, 65535))}


def local(kind: SocketKind, port: int, address: IPv4Address | None = None, cookie: int = 0) -> LocalSocket:
    return LocalSocket(kind, address, port, cookie or port)


def reading(
    *sockets: LocalSocket,
    translated: tuple[int, ...] = (),
    addresses: tuple[IPv4Address, ...] = (A,),
    picked: PortRange = EPHEMERAL,
) -> PortsInUse:
    interfaces = OwnInterfaces(addresses, {}, (EPHEMERAL,), (picked,))
    return PortsInUse(interfaces, frozenset(sockets), frozenset((A, port) for port in translated))


def told(own: OwnPorts, address: IPv4Address = A) -> list[str]:
    """Return what is told beside the ephemeral ports."""
    [of_address] = [each for each in own.told if each.address == address]
    assert [each.ports for each in of_address.ranges if each.use == "ephemeral"] == [EPHEMERAL]
    return [f"{each.use} {each.ports}" for each in of_address.ranges if each.use != "ephemeral"]


def test_a_socket_counts_at_its_address_or_at_all() -> None:
    own = OwnPorts()
    sockets = (local(LISTENING, 8080), local(LISTENING, 8081, A), local(BOUND, 8090, B))
    assert own.on_read(reading(*sockets, addresses=(A, B)), {}, 0.0)
    assert told(own, A) == ["listener 8080-8081"]
    assert told(own, B) == ["listener 8080-8080", "listener 8090-8090"]
    assert not own.on_read(reading(*sockets, addresses=(A, B)), {}, 5.0), "nothing changed"


def test_a_listener_that_opens_later_counts_at_once_also_on_a_vms_port() -> None:
    own = OwnPorts()
    own.on_read(reading(), VM_HOLDS_ALL, 0.0)
    assert own.on_read(reading(local(LISTENING, 8080)), VM_HOLDS_ALL, 5.0)
    assert told(own) == ["listener 8080-8080"]
    assert own.on_read(reading(), VM_HOLDS_ALL, 10.0), "the manager keeps it for a while"
    assert told(own) == []


def test_a_resolvers_sockets_do_not_count_and_a_service_does_when_it_lasts() -> None:
    own = OwnPorts()
    own.on_read(reading(), VM_HOLDS_ALL, 0.0)
    for turn in range(1, 20):
        at = 5.0 * turn
        queries = (local(BOUND, 2000 + turn), local(BOUND, 2001 + turn))
        service = local(BOUND, 5060, cookie=7)
        changed = own.on_read(reading(*queries, service), VM_HOLDS_ALL, at)
        assert changed is (at == 5.0 + LASTING_S)
    assert told(own) == ["listener 5060-5060"]


def test_what_is_there_at_first_counts_on_ports_that_no_vm_has() -> None:
    sockets = (local(BOUND, 5060), local(CONNECTED, 9000, A))
    own = OwnPorts()
    own.on_read(reading(*sockets, translated=(9001,)), {}, 0.0)
    assert told(own) == ["listener 5060-5060", "connection 9000-9001"]
    # With a VM on these ports, they are translated, or the VM's.
    restarted = OwnPorts()
    restarted.on_read(reading(*sockets, translated=(9001,)), VM_HOLDS_ALL, 0.0)
    assert told(restarted) == []


def test_connections_that_begin_later_count_unless_a_vm_has_the_port() -> None:
    own = OwnPorts()
    own.on_read(reading(), VM_HOLDS_ALL, 0.0)
    assert not own.on_read(reading(local(CONNECTED, 9002, A), translated=(9003,)), VM_HOLDS_ALL, 5.0)
    assert own.on_read(reading(local(CONNECTED, 9002, A), translated=(9003,)), {}, 10.0)
    assert told(own) == ["connection 9002-9002"]
    assert not own.on_read(reading(local(CONNECTED, 9002, A)), VM_HOLDS_ALL, 15.0), "it was the machine's before"
    own.on_read(reading(), VM_HOLDS_ALL, 20.0)
    assert not own.on_read(reading(local(CONNECTED, 9002, A)), VM_HOLDS_ALL, 25.0)


def test_where_the_kernel_picks_from_all_ports_only_what_was_there_before_counts() -> None:
    own, everything = OwnPorts(), PortRange(1024, 65535)
    before = (local(CONNECTED, 9000, A), local(BOUND, 9005))
    own.on_read(reading(*before, picked=everything), {}, 0.0)
    assert told(own) == ["connection 9000-9000", "listener 9005-9005"]
    for turn in range(1, 6):
        later = (local(CONNECTED, 9002, A), local(BOUND, 9003))
        assert not own.on_read(reading(*before, *later, picked=everything), {}, 5.0 * turn)
    own.on_read(reading(local(LISTENING, 9004), picked=everything), {}, 30.0)
    assert told(own) == ["listener 9004-9004"]


def test_accepted_connections_outlive_their_listener() -> None:
    own = OwnPorts()
    own.on_read(reading(), {}, 0.0)
    own.on_read(reading(local(LISTENING, 8080), local(CONNECTED, 8080, A, cookie=1)), {}, 5.0)
    assert told(own) == ["listener 8080-8080"]
    own.on_read(reading(local(CONNECTED, 8080, A, cookie=1)), {}, 10.0)
    assert told(own) == ["connection 8080-8080"]


def test_an_address_that_comes_later_is_new() -> None:
    own = OwnPorts()
    own.on_read(reading(local(BOUND, 5060), addresses=()), {}, 0.0)
    assert own.told == ()
    own.on_read(reading(local(BOUND, 5061)), {}, 5.0)
    assert told(own) == ["listener 5061-5061"]


def test_there_are_never_more_than_can_be_told() -> None:
    own = OwnPorts()
    listeners = [local(LISTENING, port) for port in (*range(2000, 4000, 4), *range(10000, 12000, 8))]
    addresses = tuple(A + number for number in range(MOST_ADDRESSES + 5))
    own.on_read(reading(*listeners, addresses=addresses), {}, 0.0)
    assert len(own.told) == MOST_ADDRESSES
    ranges = own.told[0].ranges
    assert len(ranges) == MOST_RANGES
    assert all(any(each.port in part.ports for part in ranges) for each in listeners)
    assert not any(5000 in part.ports or 9000 in part.ports or 20000 in part.ports for part in ranges)

"""Guests that ask for ports, on a whole site: real manager, ledger and nodes, faked kernels."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.core.port_mappings import AWAY_S
from cpm.protocol.messages import MapPorts, UnmapPorts
from cpm.protocol.model import DomainUUID, ForwardOrigin, ForwardProtocol, NodeName, PortRange, Wishes
from natctl.port_control.pcp import Result
from natctl.port_control.values import Reply
from tests.fakes.site import EXTERNAL, Site
from tests.unit.natctl.port_control.clients import asked, header, mapping, nat_pmp, option, port_set
from tests.unit.site.test_edge_service import wait
from tests.unit.site.test_order import EDGE1, HOST1, HOST2, OTHER, VM, settle

ON = Wishes(pcp=32)


def begun(wishes: Wishes = ON) -> Site:
    site = Site(hold_down_s=10.0)
    site.start_vm(HOST1, VM, wishes)
    site.run()
    return site


def ask(site: Site, data: bytes, host: NodeName = HOST1, uuid: DomainUUID = VM) -> None:
    node = site.machines[host].node
    assert node is not None
    index = site.machines[host].kernel.host[uuid].index
    node.port_control.on_asked(index, asked(data), site.now)
    site._carry_out(site.machines[host])


def replies(site: Site, host: NodeName = HOST1) -> list[bytes]:
    node = site.machines[host].node
    assert node is not None
    return [command.data for command in node.port_control.take() if isinstance(command, Reply)]


def answer(site: Site, data: bytes, host: NodeName = HOST1, uuid: DomainUUID = VM) -> bytes:
    """Ask, let the site act, and return the answer."""
    ask(site, data, host, uuid)
    site.run()
    (reply,) = replies(site, host)
    return reply


def external(reply: bytes) -> int:
    assert reply[3] == 0, Result(reply[3])
    return int.from_bytes(reply[42:44] if reply[0] else reply[10:12], "big")


def mapped(site: Site, uuid: DomainUUID = VM) -> dict[int, tuple[str, str]]:
    """Return the mappings that are wanted: protocol and state by external port."""
    assert site.manager is not None
    return {
        each.ports.first: (each.forward.protocol.value, each.state.value)
        for each in site.manager.fleet.forwards_of(uuid)
        if each.forward is not None and each.forward.is_wanted and each.forward.origin is ForwardOrigin.PCP
    }


def let_in(site: Site, host: NodeName = HOST1, uuid: DomainUUID = VM) -> set[int]:
    entry = site.machines[host].kernel.host.get(uuid)
    return set() if entry is None else {port for each in entry.intent.forwards for port in each.ports}


def test_the_answer_comes_when_edges_and_host_have_the_mapping_and_not_before() -> None:
    site = begun()
    ask(site, mapping(8080))
    reply = b""
    for _ in range(200):
        moved = False
        for name in site.machines:
            moved |= site.deliver_up(name) | site.deliver_down(name) | site.kernel_step(name)
        if got := replies(site):
            (reply,) = got
            break
        assert moved
    port = external(reply)
    assert port in let_in(site)
    at_edge = site.machines[EDGE1].kernel.edge[VM]
    assert any(port in each.ports for each in at_edge.ranges)
    assert reply[44:60] == bytes(10) + b"\xff\xff" + EXTERNAL.packed
    site.run()
    assert mapped(site) == {port: ("tcp", "active")}


def test_a_vm_without_the_wish_has_no_way_to_ask() -> None:
    site = begun(Wishes())
    ask(site, mapping(8080))
    site.run()
    assert replies(site) == [] and mapped(site) == {}
    assert not site.machines[HOST1].kernel.host[VM].intent.port_control


def test_what_is_deleted_is_let_in_no_more_and_its_port_becomes_free() -> None:
    site = begun()
    port = external(answer(site, mapping(8080)))
    answer(site, mapping(8080, lifetime_s=0))
    assert mapped(site) == {} and port not in let_in(site)
    settle(site)
    wait(site, 20)
    assert site.manager is not None and not site.manager.fleet.forwards_of(VM)


def test_lifetimes_end_where_nobody_renews() -> None:
    site = begun()
    answer(site, mapping(8080, lifetime_s=600))
    wait(site, 500)
    assert external(answer(site, mapping(8080, lifetime_s=600)))
    wait(site, 500)
    assert mapped(site)
    wait(site, 200)
    assert not mapped(site)


def test_a_natd_that_starts_keeps_what_there_is_and_clients_get_it_again() -> None:
    site = begun()
    port = external(answer(site, mapping(8080, lifetime_s=600)))
    site.kill_natd(HOST1)
    wait(site, 100)
    site.start_natd(HOST1)
    site.connect(HOST1)
    site.run()
    assert port in let_in(site)
    # The epoch began anew, and another nonce is as good as the former one.
    assert answer(site, header(0))[8:12] == bytes(4)
    assert external(answer(site, mapping(8080, nonce=bytes(12), lifetime_s=600))) == port


def test_what_nobody_asks_for_again_after_a_restart_of_natd_ends_by_the_manager() -> None:
    site = begun()
    answer(site, mapping(8080, lifetime_s=600))
    site.kill_natd(HOST1)
    site.start_natd(HOST1)
    site.connect(HOST1)
    wait(site, 900)
    assert mapped(site)
    wait(site, 400)
    assert not mapped(site)


def test_nothing_ends_while_the_host_cannot_be_heard() -> None:
    """Its guests may have renewed meanwhile."""
    site = begun()
    port = external(answer(site, mapping(8080, lifetime_s=600)))
    site.disconnect(HOST1)
    for _ in range(8):
        wait(site, 400)
        assert external(answer(site, mapping(8080, lifetime_s=600))) == port
    assert port in mapped(site)
    site.connect(HOST1)
    wait(site, AWAY_S + 10)
    assert port in mapped(site) and port in let_in(site)
    wait(site, 600)
    assert not mapped(site)


def test_a_manager_that_was_away_ends_nothing_that_was_renewed() -> None:
    site = begun()
    port = external(answer(site, mapping(8080, lifetime_s=600)))
    site.crash_manager()
    for _ in range(4):
        site.now += 400
        assert external(answer(site, mapping(8080, lifetime_s=600))) == port
    assert answer(site, mapping(9090))[3] == Result.NETWORK_FAILURE
    site.start_manager()
    for name in site.machines:
        site.connect(name)
    site.run()
    wait(site, 100)
    assert port in mapped(site) and port in let_in(site)


def test_the_wish_limits_how_many() -> None:
    site = begun(Wishes(pcp=2))
    answer(site, mapping(1))
    answer(site, mapping(2))
    assert answer(site, mapping(3))[3] == Result.USER_EX_QUOTA


def test_the_manager_believes_no_host_that_asks_for_more() -> None:
    site = begun(Wishes(pcp=2))
    message = MapPorts(VM, IPv4Address("192.168.122.7"), PortRange(1, 3), ForwardProtocol.TCP, 600)
    site.ask(lambda manager: manager.on_message(HOST1, message, site.now))
    assert mapped(site) == {}


def test_a_host_speaks_for_its_own_vms_only() -> None:
    site = begun()
    port = external(answer(site, mapping(8080)))
    guest = IPv4Address("192.168.122.7")
    for message in (
        MapPorts(VM, guest, PortRange(1, 1), ForwardProtocol.TCP, 600),
        UnmapPorts(VM, guest, 8080, ForwardProtocol.TCP),
        MapPorts(OTHER, guest, PortRange(1, 1), ForwardProtocol.TCP, 600),
    ):
        site.ask(lambda manager, message=message: manager.on_message(HOST2, message, site.now))  # type: ignore[misc]
    assert list(mapped(site)) == [port]


def test_a_wish_that_is_withdrawn_takes_the_mappings_with_it() -> None:
    site = begun(Wishes(weight=100))
    site.ask(lambda manager: manager.set_wishes(VM, ON))
    site.run()
    port = external(answer(site, mapping(8080)))
    site.ask(lambda manager: manager.set_wishes(VM, Wishes()))
    site.run()
    assert mapped(site) == {} and port not in let_in(site)


def test_a_port_that_somebody_has_is_no_error_unless_nothing_else_will_do() -> None:
    site = begun()
    assert site.manager is not None
    active = next(each for each in site.manager.fleet.of(VM)).ports.first
    assert external(answer(site, mapping(8080, external_port=active))) != active
    refused = answer(site, mapping(8081, external_port=active, options=option(2)))
    assert refused[3] == Result.CANNOT_PROVIDE_EXTERNAL
    assert external(answer(site, mapping(8082, external_port=50123, options=option(2)))) == 50123


@pytest.mark.parametrize("port", [1, 22, 443, 1023])
def test_no_guest_gets_a_port_below_1024(port: int) -> None:
    site = begun()
    assert external(answer(site, mapping(8080, external_port=port))) >= 1024
    assert answer(site, mapping(8081, external_port=port, options=option(2)))[3] == Result.CANNOT_PROVIDE_EXTERNAL


def test_tcp_and_udp_of_one_port_share_the_external_one() -> None:
    """RFC 6886 section 3.3: the companion port is the same client's."""
    site = begun()
    port = external(answer(site, nat_pmp(6881)))
    assert external(answer(site, nat_pmp(6881, opcode=1))) == port
    assert mapped(site) == {port: ("both", "active")}
    answer(site, nat_pmp(6881, lifetime_s=0))
    assert mapped(site) == {port: ("udp", "active")}
    answer(site, nat_pmp(6881, lifetime_s=0, opcode=1))
    assert mapped(site) == {}


def test_a_set_of_ports_keeps_its_parity() -> None:
    """RFC 7753."""
    site = begun()
    for first in (8080, 8181, 8282, 8383):
        reply = answer(site, mapping(first, options=port_set(4, first, parity=True)))
        assert external(reply) % 2 == first % 2 and reply[60:] == port_set(4, first, parity=True)
    assert len(let_in(site)) == 16


def test_mappings_go_with_the_run_of_their_vm() -> None:
    site = begun()
    port = external(answer(site, mapping(8080)))
    site.stop_vm(VM)
    settle(site)
    wait(site, 20)
    assert mapped(site) == {} and site.manager is not None
    assert not [each for each in site.manager.fleet.forwards_of(VM) if each.ports.first == port]


def test_mappings_go_with_their_vm_to_another_host() -> None:
    site = begun()
    port = external(answer(site, mapping(8080)))
    site.migrate(VM, HOST2)
    site.run()
    site.resume(VM, HOST2)
    site.left(VM, HOST1)
    site.run()
    assert port in let_in(site, HOST2)
    assert external(answer(site, mapping(8080), HOST2)) == port


def test_a_request_that_is_deleted_while_it_is_made_leaves_nothing() -> None:
    site = begun()
    ask(site, mapping(8080))
    ask(site, mapping(8080, lifetime_s=0))
    settle(site)
    assert mapped(site) == {} and not let_in(site)

"""Every kind of packet, in both directions, in each layout of host and edge (tests/netns/conftest.py)."""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest

from tests.netns.conftest import RANGE, Way
from tests.netns.topology import EXTERNAL, INTERNET, PATIENCE, checksum, echo_request, icmp_messages

pytestmark = [pytest.mark.netns, pytest.mark.per_kernel, pytest.mark.xdist_group("data-path")]

_IP_MTU_DISCOVER, _IP_PMTUDISC_DO, _IP_MTU = 10, 2, 14
_IP_RECVERR, _MSG_ERRQUEUE = 11, 0x2000


def _assert_own(peer: tuple[str, int]) -> None:
    assert peer[0] == str(EXTERNAL)
    assert peer[1] in RANGE


def _assert_stateless(way: Way) -> None:
    assert [edge.namespace.connections() for edge in way.stateless] == [0] * len(way.stateless)


def test_tcp(way: Way) -> None:
    with way.site.internet.listener(INTERNET, 8080) as listener, way.guest.namespace.tcp((INTERNET, 8080)) as client:
        server, peer = listener.accept()
        with server:
            _assert_own(peer)
            # More than any window or offload unit, both ways.
            for sender, receiver in ((client, server), (server, client)):
                receiver.settimeout(PATIENCE)
                _transfer(sender, receiver, 300_000)
    _assert_stateless(way)


def _transfer(sender: socket.socket, receiver: socket.socket, size: int) -> None:
    data = os.urandom(10_000)
    sent = b""
    got = b""
    while len(got) < size:
        if len(sent) < size:
            sender.sendall(data)
            sent += data
        got += receiver.recv(65536)
    assert got == sent


def test_udp_both_ways(way: Way) -> None:
    with way.site.internet.udp(INTERNET, 9000) as server, way.guest.namespace.udp() as client:
        client.sendto(b"ask", (INTERNET, 9000))
        data, peer = server.recvfrom(100)
        _assert_own(peer)
        assert data == b"ask"
        server.sendto(b"answer", peer)
        assert client.recvfrom(100) == (b"answer", (INTERNET, 9000))
    _assert_stateless(way)


def test_a_guest_that_binds_a_port_of_its_range_keeps_it(way: Way) -> None:
    with (
        way.site.internet.udp(INTERNET, 9001) as server,
        way.guest.namespace.udp(way.guest.address, RANGE.first + 7) as client,
    ):
        client.sendto(b"", (INTERNET, 9001))
        assert server.recvfrom(1)[1] == (str(EXTERNAL), RANGE.first + 7)


def test_sctp(way: Way) -> None:
    try:
        probe = way.guest.namespace.socket(socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    except OSError:
        _raw_sctp(way)
        return
    with probe, way.site.internet.socket(socket.SOCK_STREAM, socket.IPPROTO_SCTP, bind=(INTERNET, 8081)) as listener:
        listener.listen(1)
        probe.connect((INTERNET, 8081))
        server, peer = listener.accept()
        with server:
            _assert_own(peer)


def _raw_sctp(way: Way) -> None:
    """Without SCTP in the kernel: an INIT chunk by hand, as far as the other side's wire."""
    init = bytes.fromhex("0100 0014 00000001 00010000 0001 0001 00000001".replace(" ", ""))
    with (
        way.guest.namespace.socket(socket.SOCK_RAW, 132) as client,
        way.site.internet.socket(socket.SOCK_RAW, 132, bind=(INTERNET, 0)) as server,
    ):
        packet = (5555).to_bytes(2, "big") + (8081).to_bytes(2, "big") + bytes(4)
        client.sendto(packet + _crc32c(packet + bytes(4) + init).to_bytes(4, "little") + init, (INTERNET, 0))
        data, (source, _) = server.recvfrom(2000)
        sctp = data[(data[0] & 15) * 4 :]
        _assert_own((source, int.from_bytes(sctp[:2], "big")))
        assert int.from_bytes(sctp[8:12], "little") == _crc32c(sctp[:8] + bytes(4) + sctp[12:])


def _crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_echo_uses_an_identifier_of_the_range(way: Way) -> None:
    with way.site.internet.icmp() as server, way.guest.namespace.icmp() as client:
        client.sendto(echo_request(77), (INTERNET, 0))
        source, request = next(item for item in icmp_messages(server) if item[1][0] == 8)
        _assert_own((source, int.from_bytes(request[4:6], "big")))
        source, reply = next(item for item in icmp_messages(client) if item[1][0] == 0)
        assert source == INTERNET
        assert int.from_bytes(reply[4:6], "big") == 77
        assert checksum(reply) == 0
    _assert_stateless(way)


@pytest.mark.parametrize("sender", ["guest", "internet"])
def test_fragments(way: Way, sender: str) -> None:
    with way.site.internet.udp(INTERNET, 9002) as server, way.guest.namespace.udp() as client:
        client.sendto(b"open", (INTERNET, 9002))
        _, peer = server.recvfrom(100)
        data = os.urandom(3000)
        if sender == "guest":
            client.sendto(data, (INTERNET, 9002))
            assert server.recvfrom(4000) == (data, peer)
        else:
            server.sendto(data, peer)
            assert client.recvfrom(4000) == (data, (INTERNET, 9002))
    _assert_stateless(way)


def test_path_mtu_is_learned_by_the_guest(way: Way) -> None:
    with way.site.internet.udp(INTERNET, 9003), way.guest.namespace.udp() as client:
        client.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
        client.connect((INTERNET, 9003))
        client.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        client.send(bytes(1400))
        assert _error_of(client) == errno.EMSGSIZE
        assert client.getsockopt(socket.IPPROTO_IP, _IP_MTU) == 1300
    _assert_stateless(way)


def test_port_unreachable_from_outside_reaches_the_guest(way: Way) -> None:
    with way.guest.namespace.udp() as client:
        client.connect((INTERNET, 9999))
        client.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        client.send(b"nobody listens")
        assert _error_of(client) == errno.ECONNREFUSED


def test_error_about_an_echo_reaches_the_guest(way: Way) -> None:
    """The embedded query is told apart by its identifier: here time exceeded, by the router."""
    with way.guest.namespace.icmp() as client:
        # Machines of ours on the way: one or two; the router is the next.
        client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 2 if way.hosts[0] in way.edges else 3)
        client.sendto(echo_request(99), (INTERNET, 0))
        source, error = next(item for item in icmp_messages(client) if item[1][0] == 11)
        assert source == "198.51.100.1"
        assert checksum(error) == 0
        embedded = error[8:]
        assert socket.inet_ntoa(embedded[12:16]) == way.guest.address
        assert int.from_bytes(embedded[24:26], "big") == 99


def test_port_unreachable_from_the_guest_reaches_outside(way: Way) -> None:
    with way.site.internet.udp(INTERNET, 9004) as server, way.site.internet.icmp() as errors:
        with way.guest.namespace.udp() as client:
            client.sendto(b"open", (INTERNET, 9004))
            _, peer = server.recvfrom(100)
        # The guest has closed its port: its kernel answers with port unreachable.
        server.connect(peer)
        server.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        server.send(b"too late")
        assert _error_of(server) == errno.ECONNREFUSED
        source, error = next(item for item in icmp_messages(errors) if item[1][:2] == b"\3\3")
        assert source == str(EXTERNAL)
        assert checksum(error) == 0
        embedded = error[8:]
        assert socket.inet_ntoa(embedded[16:20]) == str(EXTERNAL)
        assert int.from_bytes(embedded[22:24], "big") == peer[1]
        assert checksum(embedded[:20]) == 0
    _assert_stateless(way)


def test_error_by_a_machine_on_the_way_shows_no_internal_address(way: Way) -> None:
    """Each machine of ours says time exceeded to the outside; what it embeds is what the outside sent."""
    with (
        way.site.internet.udp(INTERNET, 9005) as server,
        way.site.internet.icmp() as errors,
        way.guest.namespace.udp() as client,
    ):
        client.sendto(b"open", (INTERNET, 9005))
        _, peer = server.recvfrom(100)
        # The router takes the first hop.
        for ttl in range(2, 2 + len({*way.hosts, way.edges[-1]})):
            server.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            server.sendto(b"dies underway", peer)
            _, error = next(item for item in icmp_messages(errors) if item[1][0] == 11)
            assert checksum(error) == 0
            assert socket.inet_ntoa(error[24:28]) == str(EXTERNAL)
            assert int.from_bytes(error[30:32], "big") == peer[1]


def test_nothing_private_was_seen_outside(way: Way) -> None:
    """Runs last: the router counted what came from, or for, an address that has no business there."""
    rules = [item["rule"]["expr"] for item in way.site.router.ruleset() if "rule" in item]
    assert [part["counter"]["packets"] for rule in rules for part in rule if "counter" in part] == [0, 0]


def _error_of(client: socket.socket) -> int:
    """Wait for the error that an ICMP message brings, and return its number."""
    poll = select.poll()
    poll.register(client, 0)
    assert poll.poll(5000), "no ICMP error came"
    ancillary = client.recvmsg(2000, 512, _MSG_ERRQUEUE)[1]
    return int.from_bytes(ancillary[0][2][:4], "little")

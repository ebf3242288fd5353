"""
What a guest may rely on, and what not, by the RFCs on NAT: docs/explanation/nat-promises.md names these tests.

Tests whose names say ``not`` show what is not kept, so that the page cannot become false in either direction.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import FastPathUse
from tests.netns.conftest import LAYOUTS, RANGE, Way
from tests.netns.topology import (
    EXTERNAL,
    INTERNET,
    OTHER_EXTERNAL,
    PATIENCE,
    VM,
    Site,
    checksum,
    echo_request,
    icmp_messages,
    program,
)

pytestmark = [pytest.mark.netns, pytest.mark.xdist_group("promises")]

ELSEWHERE = "192.0.2.3"
"""A second address of the internet's machine."""
A, B = PortRange(20000, 20063), PortRange(30016, 30079)
_IP_RECVERR, _MSG_ERRQUEUE = 11, 0x2000


@pytest.fixture(scope="module", params=["separate", "both"])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """One VM, with host and edge on two machines and on one."""
    site = Site()
    try:
        site.internet.ip(f"addr add {ELSEWHERE}/24 dev eth0")
        yield LAYOUTS[request.param](site, FastPathUse.AUTO)
    finally:
        site.close()


# Mapping


def test_a_udp_socket_has_one_external_port_for_all_destinations(way: Way) -> None:
    places = [(INTERNET, 9000), (INTERNET, 9001), (ELSEWHERE, 9000)]
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(way.guest.namespace.udp())
        seen = set()
        for place in places:
            server = stack.enter_context(way.site.internet.udp(*place))
            client.sendto(b"?", place)
            seen.add(server.recvfrom(10)[1])
    assert len(seen) == 1


def test_a_tcp_port_has_one_external_port_for_all_destinations(way: Way) -> None:
    places = [(INTERNET, 8080), (INTERNET, 8081), (ELSEWHERE, 8080)]
    with contextlib.ExitStack() as stack:
        seen = set()
        for place in places:
            listener = stack.enter_context(way.site.internet.listener(*place))
            stack.enter_context(way.guest.namespace.tcp(place, source=(way.guest.address, 45001)))
            server, peer = listener.accept()
            stack.enter_context(server)
            seen.add(peer)
    assert len(seen) == 1


def test_an_identifier_of_echo_is_the_same_for_all_destinations(way: Way) -> None:
    with way.site.internet.icmp() as server, way.guest.namespace.icmp() as client:
        seen = set()
        for destination in (INTERNET, ELSEWHERE):
            client.sendto(echo_request(4711), (destination, 0))
            source, request = next(item for item in icmp_messages(server) if item[1][0] == 8)
            seen.add((source, request[4:6]))
    assert len(seen) == 1


def test_a_mapping_is_not_endpoint_independent_when_sockets_share_a_port(way: Way) -> None:
    """Two sockets may use one external port to different destinations, so that one of them gets a second port."""
    with (
        way.site.internet.udp(INTERNET, 9010) as first,
        way.site.internet.udp(INTERNET, 9011) as second,
        way.guest.namespace.udp() as left,
    ):
        left.sendto(b"left", (INTERNET, 9010))
        mapped = first.recvfrom(10)[1]
        with way.guest.namespace.udp(way.guest.address, mapped[1]) as right:
            right.sendto(b"right", (INTERNET, 9011))
            assert second.recvfrom(10) == (b"right", mapped)
            left.sendto(b"left", (INTERNET, 9011))
            data, other = second.recvfrom(10)
            assert (data, other[0]) == (b"left", str(EXTERNAL))
            assert other[1] in RANGE
            assert other != mapped


# Filtering


@pytest.mark.parametrize("stranger", [(INTERNET, 9021), (ELSEWHERE, 9020)], ids=["port", "address"])
def test_only_the_very_destination_may_answer_and_not_its_neighbour(way: Way, stranger: tuple[str, int]) -> None:
    with (
        way.site.internet.udp(INTERNET, 9020) as server,
        way.site.internet.udp(*stranger) as other,
        way.guest.namespace.udp() as client,
    ):
        client.sendto(b"?", (INTERNET, 9020))
        peer = server.recvfrom(10)[1]
        other.sendto(b"from a stranger", peer)
        server.sendto(b"from the server", peer)
        assert client.recvfrom(100) == (b"from the server", (INTERNET, 9020))


def test_a_mapping_is_for_one_protocol(way: Way) -> None:
    """What TCP has opened lets no UDP in, though addresses and ports are those of the connection."""
    place, here = (INTERNET, 8101), (way.guest.address, 45002)
    with (
        way.site.internet.listener(*place) as listener,
        way.guest.namespace.tcp(place, source=here),
        way.site.internet.udp(*place) as stranger,
        way.guest.namespace.udp(*here) as client,
    ):
        server, peer = listener.accept()
        with server:
            stranger.sendto(b"not asked for", peer)
            client.sendto(b"?", place)
            stranger.sendto(b"asked", stranger.recvfrom(10)[1])
            assert client.recvfrom(100)[0] == b"asked"


# Timers


def _entry(way: Way, protocol: str, port: int) -> list[str]:
    (line,) = way.hosts[0].namespace.run("conntrack", "-L", "-p", protocol, "--orig-port-dst", str(port)).splitlines()
    return line.split()


def _seconds(way: Way, port: int) -> int:
    """Return the seconds for which conntrack keeps a UDP flow without another packet."""
    return int(_entry(way, "udp", port)[2])


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_a_packet_of_either_direction_refreshes_a_mapping(way: Way, direction: str) -> None:
    port = 9030 + (direction == "inbound")
    with way.site.internet.udp(INTERNET, port) as server, way.guest.namespace.udp() as client:
        client.sendto(b"?", (INTERNET, port))
        peer = server.recvfrom(10)[1]
        server.sendto(b"!", peer)
        client.recvfrom(10)
        while (before := _seconds(way, port)) > 117:
            time.sleep(0.1)
        if direction == "outbound":
            client.sendto(b"?", (INTERNET, port))
            server.recvfrom(10)
        else:
            server.sendto(b"!", peer)
            client.recvfrom(10)
        assert _seconds(way, port) > before


def test_an_icmp_error_of_the_guest_refreshes_no_mapping(way: Way) -> None:
    with (
        way.site.internet.udp(INTERNET, 9035) as server,
        way.site.internet.icmp() as outside,
        way.guest.namespace.udp() as client,
        way.guest.namespace.icmp() as raw,
    ):
        client.sendto(b"?", (INTERNET, 9035))
        peer = server.recvfrom(10)[1]
        while (before := _seconds(way, 9035)) > 117:
            time.sleep(0.1)
        here = (way.guest.address, client.getsockname()[1])
        raw.sendto(_error_about((INTERNET, 9035), here, 3), (INTERNET, 0))
        assert next(icmp_messages(outside))[0] == peer[0]
        assert _seconds(way, 9035) <= before


# TCP


def _next_sequence(connection: socket.socket) -> int:
    """Return the sequence number of the next byte that a socket sends: what a perfect forger would know."""
    repair, queue, sequence = 19, 20, 21  # TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ of linux/tcp.h
    connection.setsockopt(socket.IPPROTO_TCP, repair, 1)
    connection.setsockopt(socket.IPPROTO_TCP, queue, 2)
    number: int = struct.unpack("=I", connection.getsockopt(socket.IPPROTO_TCP, sequence, 4))[0]
    connection.setsockopt(socket.IPPROTO_TCP, repair, -1)
    return number


def test_a_connection_goes_on_after_a_reset_that_only_conntrack_believed(way: Way) -> None:
    """The entry then waits ten seconds for the next packet, not for none, and each packet begins them anew."""
    place = (INTERNET, 8102)
    with (
        way.site.internet.listener(*place) as listener,
        way.guest.namespace.tcp(place) as client,
        way.site.internet.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as forger,
    ):
        server, peer = listener.accept()
        with server:
            server.sendall(b"before")
            assert client.recv(100) == b"before"
            drop = "add table ip deaf; add chain ip deaf input { type filter hook input priority 0; }"
            way.guest.namespace.run("nft", f"{drop}; add rule ip deaf input tcp flags & rst == rst drop")
            try:
                forger.sendto(_reset(place, peer, _next_sequence(server)), (peer[0], 0))
                end_at = time.monotonic() + PATIENCE
                while _entry(way, "tcp", 8102)[3] != "CLOSE" and time.monotonic() < end_at:
                    time.sleep(0.05)
                for said in (b"after", b"and again"):
                    assert _entry(way, "tcp", 8102)[3] == "CLOSE"
                    assert 0 < int(_entry(way, "tcp", 8102)[2]) <= 10
                    client.sendall(said)
                    assert server.recv(100) == said
                    server.sendall(said)
                    assert client.recv(100) == said
                assert server.getpeername() == peer
            finally:
                way.guest.namespace.run("nft", "delete table ip deaf")


def _reset(source: tuple[str, int], to: tuple[str, int], sequence: int) -> bytes:
    ends = socket.inet_aton(source[0]) + socket.inet_aton(to[0])
    segment = struct.pack("!HHIIBBHHH", source[1], to[1], sequence, 0, 5 << 4, 4, 0, 0, 0)
    pseudo = ends + struct.pack("!BBH", 0, socket.IPPROTO_TCP, 20)
    segment = segment[:16] + checksum(pseudo + segment).to_bytes(2, "big") + segment[18:]
    return struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, socket.IPPROTO_TCP, 0) + ends + segment


def test_both_ends_may_open_a_connection_at_once(way: Way) -> None:
    port = RANGE.first + 5
    with (
        way.site.internet.socket(socket.SOCK_STREAM, bind=(INTERNET, 7100)) as outside,
        way.guest.namespace.socket(socket.SOCK_STREAM, bind=(way.guest.address, port)) as inside,
    ):
        outside.setblocking(False)
        # Its SYN is dropped in silence: nobody has asked for it.
        assert outside.connect_ex((str(EXTERNAL), port)) == errno.EINPROGRESS
        inside.connect((INTERNET, 7100))
        assert select.select([], [outside], [], PATIENCE)[1]
        assert outside.getpeername() == (str(EXTERNAL), port)
        outside.setblocking(True)
        outside.sendall(b"from outside")
        assert inside.recv(100) == b"from outside"


def test_an_icmp_error_ends_no_tcp_connection(way: Way) -> None:
    with way.site.internet.listener(INTERNET, 8090) as listener, way.guest.namespace.tcp((INTERNET, 8090)) as client:
        server, peer = listener.accept()
        with server:
            # Told by the router that the time is exceeded; TCP sends again.
            client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 2 if way.hosts[0] in way.edges else 3)
            with way.guest.namespace.icmp() as errors:
                client.sendall(b"dies underway")
                assert next(item for item in icmp_messages(errors) if item[1][0] == 11)[0] == "198.51.100.1"
            client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 64)
            server.settimeout(PATIENCE)
            assert server.recv(100) == b"dies underway"
            assert server.getpeername() == peer


def test_an_icmp_error_ends_no_mapping_of_udp(way: Way) -> None:
    with way.guest.namespace.udp() as client:
        client.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        client.sendto(b"nobody listens", (INTERNET, 9040))
        assert _error_of(client) == errno.ECONNREFUSED
        assert _seconds(way, 9040) > 0
        with way.site.internet.udp(INTERNET, 9041) as server:
            client.sendto(b"goes on", (INTERNET, 9041))
            peer = server.recvfrom(10)[1]
        with way.site.internet.udp(INTERNET, 9040) as server:
            client.sendto(b"goes on", (INTERNET, 9040))
            assert server.recvfrom(10) == (b"goes on", peer)


# ICMP


def _error_about(
    source: tuple[str, int], to: tuple[str, int], code: int, *, options: bytes = b"", damage: int = 0
) -> bytes:
    """Return an error about a datagram, as a machine behind its receiver would send it."""
    length = 20 + len(options)
    ends = socket.inet_aton(source[0]), socket.inet_aton(to[0])
    head = struct.pack("!BBHHHBBH4s4s", 0x40 | length // 4, 0, length + 12, 1, 0, 60, 17, 0, *ends) + options
    head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    error = struct.pack("!BBHI", 3, code, 0, 0) + head + struct.pack("!HHHH", source[1], to[1], 12, 0)
    return error[:2] + (checksum(error) ^ damage).to_bytes(2, "big") + error[4:]


@pytest.mark.parametrize(
    ("options", "damage", "is_told"),
    [(b"", 0, True), (b"", 1, False), (b"\1\1\1\0", 0, False)],
    ids=["sound", "wrong-checksum", "not-with-ip-options"],
)
def test_which_errors_reach_the_guest(way: Way, options: bytes, damage: int, is_told: bool) -> None:
    with (
        way.site.internet.udp(INTERNET, 9050) as server,
        way.site.internet.icmp() as outside,
        way.guest.namespace.udp() as client,
        way.guest.namespace.icmp() as inside,
    ):
        client.sendto(b"?", (INTERNET, 9050))
        peer = server.recvfrom(10)[1]
        there = (INTERNET, 9050)
        outside.sendto(_error_about(peer, there, 13, options=options, damage=damage), (peer[0], 0))
        # A sound one takes the same way after it.
        outside.sendto(_error_about(peer, there, 3), (peer[0], 0))
        assert next(icmp_messages(inside))[1][:2] == bytes((3, 13 if is_told else 3))


# Hairpinning


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest) -> Iterator[tuple[VM, VM]]:
    """Two VMs of two hosts, behind one edge, with different external addresses."""
    site = Site()
    try:
        first, second, edge = site.host(21), site.host(22), site.edge(11)
        site.spread(edge)
        vms = VM.of(1, site.guest(first), A), VM.of(2, site.guest(second), B, OTHER_EXTERNAL)
        program([first, second, edge], list(vms), {0: (edge,), 1: (edge,)})
        # The edge does it alone.
        site.router.ip("link set eth0 down")
        yield vms
    finally:
        site.close()


def test_hairpinning_for_tcp_by_external_address_and_port(two: tuple[VM, VM]) -> None:
    left, right = two
    with (
        left.guest.namespace.socket(socket.SOCK_STREAM, bind=("10.10.0.5", A.first + 9)) as one,
        right.guest.namespace.socket(socket.SOCK_STREAM, bind=("10.10.0.5", B.first + 9)) as other,
    ):
        one.setblocking(False)
        assert one.connect_ex((str(OTHER_EXTERNAL), B.first + 9)) == errno.EINPROGRESS
        other.connect((str(EXTERNAL), A.first + 9))
        assert select.select([], [one], [], PATIENCE)[1]
        assert one.getpeername() == (str(OTHER_EXTERNAL), B.first + 9)
        assert other.getpeername() == (str(EXTERNAL), A.first + 9)


def test_an_icmp_error_between_vms_is_hairpinned(two: tuple[VM, VM]) -> None:
    left, right = two
    with left.guest.namespace.udp("10.10.0.5", A.first + 10) as one:
        with right.guest.namespace.udp("10.10.0.5", B.first + 10) as other:
            one.sendto(b"opens its own door", (str(OTHER_EXTERNAL), B.first + 10))
            other.sendto(b"!", (str(EXTERNAL), A.first + 10))
            assert one.recvfrom(10) == (b"!", (str(OTHER_EXTERNAL), B.first + 10))
        one.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        one.sendto(b"too late", (str(OTHER_EXTERNAL), B.first + 10))
        assert _error_of(one) == errno.ECONNREFUSED


def test_a_vm_does_not_reach_another_that_has_not_opened_its_door(two: tuple[VM, VM]) -> None:
    left, right = two
    with (
        left.guest.namespace.udp("10.10.0.5", A.first + 11) as one,
        right.guest.namespace.udp("10.10.0.5", B.first + 11) as other,
    ):
        one.sendto(b"unasked", (str(OTHER_EXTERNAL), B.first + 11))
        other.sendto(b"opens its door", (str(EXTERNAL), A.first + 11))
        one.recvfrom(100)
        one.sendto(b"asked", (str(OTHER_EXTERNAL), B.first + 11))
        assert other.recvfrom(100)[0] == b"asked"


# Fragments, helpers


@pytest.mark.parametrize("order", ["in-order", "last-first"])
def test_fragments_of_any_order_reach_the_guest(way: Way, order: str) -> None:
    port = 9060 + (order == "last-first")
    with (
        way.site.internet.udp(INTERNET, port) as server,
        way.site.internet.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as wire,
        way.guest.namespace.udp() as client,
    ):
        client.sendto(b"?", (INTERNET, port))
        peer = server.recvfrom(10)[1]
        payload = os.urandom(1600)
        datagram = struct.pack("!HHHH", port, peer[1], 8 + len(payload), 0) + payload
        pieces = [(start, datagram[start : start + 800]) for start in range(0, len(datagram), 800)]
        if order == "last-first":
            pieces.reverse()
        for start, piece in pieces:
            more = 0x2000 if start + len(piece) < len(datagram) else 0
            ends = socket.inet_aton(INTERNET), socket.inet_aton(peer[0])
            head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(piece), port, start // 8 | more, 60, 17, 0, *ends)
            wire.sendto(head + piece, (peer[0], 0))
        assert client.recvfrom(4000) == (payload, (INTERNET, port))


def test_no_rule_of_ours_assigns_a_helper(way: Way) -> None:
    """An application level gateway is a conntrack helper in Linux."""
    for node in {*way.hosts, *way.edges}:
        assert "helper" not in node.namespace.run("nft", "list", "ruleset")


def _error_of(client: socket.socket) -> int:
    """Wait for the error that an ICMP message brings, and return its number."""
    poll = select.poll()
    poll.register(client, 0)
    assert poll.poll(5000), "no ICMP error came"
    ancillary = client.recvmsg(2000, 512, _MSG_ERRQUEUE)[1]
    return int.from_bytes(ancillary[0][2][:4], "little")

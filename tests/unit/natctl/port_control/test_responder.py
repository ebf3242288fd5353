"""What is answered, dropped and mapped, by the sections of RFC 6887, RFC 6886 and RFC 7753."""

from __future__ import annotations

import itertools
import struct
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import DomainUUID
from natctl.model.port_control import BURST, PER_S
from natctl.port_control.guest import PATIENCE_S
from natctl.port_control.pcp import Result
from natctl.port_control.responder import HOST_BURST, Responder
from natctl.port_control.values import (
    Announce,
    Asked,
    FindPeer,
    Key,
    Made,
    Map,
    Reply,
    Unmap,
    Wanted,
)
from tests.unit.natctl.port_control.clients import (
    GUEST,
    MAPPED,
    NONCE,
    asked,
    header,
    mapping,
    nat_pmp,
    option,
    peering,
    port_set,
)

VM = DomainUUID("7b8c6c5e-0000-4000-8000-000000000001")
EXTERNAL = IPv4Address("203.0.113.5")
OTHER_NONCE = bytes(12)


class Site:
    """A responder, one VM, and a manager that does what it is told to do."""

    def __init__(self, limit: int = 8) -> None:
        self.now = 1000.0
        self.limit = limit
        self.made: dict[Key, Made] = {}
        self.responder = Responder()
        self.responder.on_connected(self.now)
        self.wanted: list[Wanted] = []
        self.unmapped: list[Key] = []
        self.announced: list[tuple[bytes, ...]] = []
        self.found: list[FindPeer] = []
        self.tell()
        self.take()

    def tell(self, external: IPv4Address | None = EXTERNAL) -> None:
        self.responder.on_vm(VM, self.limit, external, self.made.values(), self.now)

    def take(self) -> list[bytes]:
        replies = []
        for command in self.responder.take():
            if isinstance(command, Reply):
                assert command.domain == VM
                replies.append(command.data)
            elif isinstance(command, Map):
                self.wanted.append(command.wanted)
            elif isinstance(command, Unmap):
                self.unmapped.append(command.key)
                self.made.pop(command.key, None)
            elif isinstance(command, Announce):
                self.announced.append(command.datagrams)
            else:
                self.found.append(command)
        return replies

    def ask(self, data: bytes, source: IPv4Address = GUEST) -> list[bytes]:
        self.responder.on_asked(VM, asked(data, source), self.now)
        return self.take()

    def make(self, port: int = 40000) -> list[bytes]:
        """Do what was wanted last; the external ports begin at ``port``."""
        wanted = self.wanted[-1]
        self.made[wanted.key] = Made(wanted.key, wanted.size, EXTERNAL, port)
        self.tell()
        return self.take()

    def map(self, data: bytes, port: int = 40000) -> bytes:
        assert self.ask(data) == []
        (reply,) = self.make(port)
        return reply

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.responder.on_tick(self.now)


@pytest.fixture
def site() -> Site:
    return Site()


def result(replies: list[bytes]) -> Result:
    (reply,) = replies
    return Result(reply[3])


def lifetime(reply: bytes) -> int:
    return int.from_bytes(reply[4:8], "big")


def epoch(reply: bytes) -> int:
    return int.from_bytes(reply[8:12], "big")


def assigned(reply: bytes) -> tuple[int, IPv4Address]:
    assert reply[44:56] == MAPPED
    return int.from_bytes(reply[42:44], "big"), IPv4Address(reply[56:60])


class TestMap:
    """RFC 6887 section 11."""

    def test_is_answered_when_it_is_made_and_not_before(self, site: Site) -> None:
        assert site.ask(mapping(8080)) == []
        assert site.wanted == [Wanted(Key(VM, 6, GUEST, 8080), 1, 7200)]
        (reply,) = site.make(40123)
        assert result([reply]) == Result.SUCCESS
        assert lifetime(reply) == 3600 and assigned(reply) == (40123, EXTERNAL) and reply[24:36] == NONCE

    def test_suggestions_are_passed_on(self, site: Site) -> None:
        elsewhere = site.ask(mapping(8080, external_port=443, external="203.0.113.9", options=option(2)))
        assert result(elsewhere) == Result.CANNOT_PROVIDE_EXTERNAL
        site.ask(mapping(8080, external_port=443, external="203.0.113.5", options=option(2)))
        wanted = site.wanted[-1]
        assert (wanted.external_port, wanted.is_exact) == (443, True)

    def test_another_address_is_only_a_suggestion(self, site: Site) -> None:
        """Section 11.3: without PREFER_FAILURE something else is assigned."""
        reply = site.map(mapping(8080, external_port=443, external="203.0.113.9"), 40000)
        assert assigned(reply) == (40000, EXTERNAL)

    def test_sent_again_while_it_is_being_made(self, site: Site) -> None:
        """Section 8.1.1: clients repeat their requests."""
        site.ask(mapping(8080))
        assert site.ask(mapping(8080)) == [] and len(site.wanted) == 1
        assert len(site.make()) == 1

    def test_another_client_while_it_is_being_made(self, site: Site) -> None:
        site.ask(mapping(8080))
        assert site.ask(mapping(8080, nonce=OTHER_NONCE)) == [] and len(site.wanted) == 1

    @pytest.mark.parametrize(("wished", "granted"), [(1, 120), (119, 120), (3600, 3600), (2**32 - 1, 86400)])
    def test_lifetimes_have_bounds(self, site: Site, wished: int, granted: int) -> None:
        """Section 15."""
        assert lifetime(site.map(mapping(lifetime_s=wished))) == granted

    @pytest.mark.parametrize("protocol", [1, 33, 132, 255])
    def test_protocols_that_are_not_mapped(self, site: Site, protocol: int) -> None:
        assert result(site.ask(mapping(protocol=protocol))) == Result.UNSUPP_PROTOCOL

    def test_all_protocols_and_all_ports_belong_to_no_vm(self, site: Site) -> None:
        assert result(site.ask(mapping(0, protocol=0))) == Result.UNSUPP_PROTOCOL
        assert result(site.ask(mapping(0))) == Result.NOT_AUTHORIZED

    def test_renewal(self, site: Site) -> None:
        """Section 11.3: an existing mapping is answered with what it is, whatever is suggested."""
        site.map(mapping(8080))
        site.tick(1800)
        (reply,) = site.ask(mapping(8080, external_port=99))
        assert lifetime(reply) == 3600 and assigned(reply) == (40000, EXTERNAL)
        site.tick(3599)
        assert site.unmapped == []
        site.tick(1)
        site.take()
        assert site.unmapped == [Key(VM, 6, GUEST, 8080)]

    def test_the_manager_knows_of_every_promise_and_not_of_every_renewal(self, site: Site) -> None:
        """natd may restart: what a client was granted must not end before."""
        site.map(mapping(8080, lifetime_s=600))
        ends = site.now + site.wanted[-1].lifetime_s
        for _ in range(50):
            site.now += 100
            known = len(site.wanted)
            site.ask(mapping(8080, lifetime_s=600))
            if len(site.wanted) > known:
                ends = site.now + site.wanted[-1].lifetime_s
            assert ends >= site.now + 600
        assert len(site.wanted) == 1 + 5000 // 700
        site.ask(mapping(8080, lifetime_s=7200))
        assert (site.wanted[-1].key.port, site.wanted[-1].lifetime_s) == (8080, 14400)

    def test_what_was_renewed_while_the_manager_was_away_is_told_when_it_is_back(self, site: Site) -> None:
        site.map(mapping(8080, lifetime_s=600))
        site.responder.on_disconnected(site.now)
        site.now += 500
        assert result(site.ask(mapping(8080, lifetime_s=600))) == Result.SUCCESS
        site.wanted.clear()
        site.now += 100
        site.responder.on_connected(site.now)
        site.take()
        ((key, lifetime_s),) = [(wanted.key, wanted.lifetime_s) for wanted in site.wanted]
        assert key.port == 8080 and lifetime_s >= 500

    def test_another_nonce_is_another_client(self, site: Site) -> None:
        """Sections 11.3 and 18.1: refused for as long as the mapping lasts."""
        site.map(mapping(8080))
        site.tick(600)
        (reply,) = site.ask(mapping(8080, nonce=OTHER_NONCE))
        assert result([reply]) == Result.NOT_AUTHORIZED and lifetime(reply) == 3000

    def test_mappings_differ_by_protocol_address_and_port(self, site: Site) -> None:
        second = IPv4Address("192.168.122.8")
        site.map(mapping(8080), 40000)
        site.map(mapping(8080, protocol=17), 40001)
        site.map(mapping(8081), 40002)
        site.ask(mapping()[:8] + MAPPED + second.packed + mapping()[24:], second)
        site.make(40003)
        assert len(site.made) == 4

    def test_prefer_failure_against_a_mapping_that_is_there(self, site: Site) -> None:
        """Section 13.2."""
        site.map(mapping(8080), 40000)
        assert result(site.ask(mapping(external_port=41000, options=option(2)))) == Result.CANNOT_PROVIDE_EXTERNAL
        (reply,) = site.ask(mapping(external_port=40000, options=option(2)))
        assert result([reply]) == Result.SUCCESS and reply[60:] == option(2)


class TestWhatHinders:
    """RFC 6887 section 7.4: each for its reason."""

    def test_no_more_than_the_wish_allows(self) -> None:
        site = Site(limit=2)
        site.map(mapping(1), 40001)
        site.map(mapping(2), 40002)
        assert result(site.ask(mapping(3))) == Result.USER_EX_QUOTA
        assert result(site.ask(nat_pmp(3))) == Result(4)
        assert result(site.ask(mapping(1))) == Result.SUCCESS

    def test_those_under_way_count(self) -> None:
        site = Site(limit=1)
        site.ask(mapping(1))
        assert result(site.ask(mapping(2))) == Result.USER_EX_QUOTA

    def test_a_vm_without_ports(self, site: Site) -> None:
        site = Site()
        site.responder.on_gone(VM)
        site.tell(None)
        assert result(site.ask(mapping())) == Result.NETWORK_FAILURE

    def test_no_manager(self, site: Site) -> None:
        site.map(mapping(1))
        site.ask(mapping(2))
        site.responder.on_disconnected(site.now)
        assert result(site.take()) == Result.NETWORK_FAILURE
        assert result(site.ask(mapping(2))) == Result.NETWORK_FAILURE
        assert result(site.ask(mapping(1))) == Result.SUCCESS

    @pytest.mark.parametrize("why", [Result.NO_RESOURCES, Result.CANNOT_PROVIDE_EXTERNAL, Result.USER_EX_QUOTA])
    def test_what_the_manager_refuses(self, site: Site, why: Result) -> None:
        site.ask(mapping(8080))
        site.responder.on_refused(Key(VM, 6, GUEST, 8080), why, site.now)
        assert result(site.take()) == why

    def test_a_manager_that_does_not_answer(self, site: Site) -> None:
        site.ask(mapping(8080))
        site.tick(PATIENCE_S)
        assert site.take() == [] and site.unmapped == [Key(VM, 6, GUEST, 8080)]
        site.ask(mapping(8080))
        assert len(site.wanted) == 2

    def test_too_many_requests_are_dropped(self, site: Site) -> None:
        """Section 11.3: a server may discard them; clients send them again."""
        replies = [reply for _ in range(3 * BURST) for reply in site.ask(header(0))]
        assert len(replies) == site.responder.answered == BURST and site.responder.dropped == 2 * BURST
        site.now += 1
        assert len([reply for _ in range(BURST) for reply in site.ask(header(0))]) == PER_S

    def test_mappings_that_come_and_go_take_no_end_of_ports(self, site: Site) -> None:
        """A port rests for minutes when its mapping is deleted."""
        for number in range(60):
            site.now += 0.3
            if not site.ask(mapping(1000 + number)):
                site.make(40000)
                site.ask(mapping(1000 + number, lifetime_s=0))
        assert len(site.wanted) == 33
        assert result(site.ask(mapping(1))) == Result.NO_RESOURCES
        site.now += 10
        assert site.ask(mapping(1)) == []

    def test_all_vms_of_a_host_together_keep_the_manager_free(self) -> None:
        """Who is slowed down by the manager is the host, with all its VMs."""
        responder, now, begun = Responder(), 1000.0, 0
        responder.on_connected(now)
        for number in range(100):
            domain = DomainUUID(f"7b8c6c5e-0000-4000-8000-{number:012}")
            responder.on_vm(domain, 32, EXTERNAL, (), now)
            for port in range(1, 31):
                responder.on_asked(domain, asked(mapping(port)), now)
            begun += sum(isinstance(command, Map) for command in responder.take())
        assert begun == HOST_BURST
        responder.on_asked(domain, asked(mapping(100)), now + 5)
        assert any(isinstance(command, Map) for command in responder.take())

    def test_a_vm_that_may_not_ask(self, site: Site) -> None:
        site.map(mapping(8080))
        site.limit = 0
        site.tell()
        assert site.ask(mapping(8080)) == [] and site.unmapped == [Key(VM, 6, GUEST, 8080)]

    def test_bad_requests_are_answered_with_the_epoch(self, site: Site) -> None:
        site.now += 30
        (reply,) = site.ask(header(9))
        assert result([reply]) == Result.UNSUPP_OPCODE and epoch(reply) == 30
        assert site.ask(header(0x81)) == []


class TestDelete:
    """RFC 6887 section 15.1."""

    def test_one(self, site: Site) -> None:
        site.map(mapping(8080))
        (reply,) = site.ask(mapping(8080, lifetime_s=0))
        assert result([reply]) == Result.SUCCESS and lifetime(reply) == 0
        assert site.unmapped == [Key(VM, 6, GUEST, 8080)]

    def test_what_is_not_there_is_deleted(self, site: Site) -> None:
        assert result(site.ask(mapping(8080, lifetime_s=0))) == Result.SUCCESS and site.unmapped == []

    def test_of_another_client(self, site: Site) -> None:
        site.map(mapping(8080))
        (reply,) = site.ask(mapping(8080, lifetime_s=0, nonce=OTHER_NONCE))
        assert result([reply]) == Result.NOT_AUTHORIZED and lifetime(reply) == 3600 and site.unmapped == []

    def test_all_of_a_protocol_and_of_all(self, site: Site) -> None:
        site.map(mapping(1), 40001)
        site.map(mapping(2), 40002)
        site.map(mapping(2, protocol=17), 40003)
        assert result(site.ask(mapping(0, lifetime_s=0))) == Result.SUCCESS
        assert {key.protocol for key in site.made} == {17}
        assert result(site.ask(mapping(77, protocol=0, lifetime_s=0))) == Result.SUCCESS
        assert site.made == {}

    def test_one_that_is_being_made(self, site: Site) -> None:
        site.ask(mapping(8080))
        site.ask(mapping(8080, lifetime_s=0))
        assert site.unmapped == [Key(VM, 6, GUEST, 8080)]


class TestPortSet:
    """RFC 7753."""

    def test_ports_side_by_side(self, site: Site) -> None:
        site.ask(mapping(8080, options=port_set(4, parity=True)))
        assert (site.wanted[-1].size, site.wanted[-1].keeps_parity) == (4, True)
        (reply,) = site.make(40000)
        assert assigned(reply)[0] == 40000 and reply[60:] == port_set(4, parity=True)

    def test_fewer_than_asked_for(self, site: Site) -> None:
        """Section 4: the response says how many."""
        site.map(mapping(8082), 40010)
        site.ask(mapping(8080, options=port_set(100)))
        (reply,) = site.make(40000)
        assert reply[60:] == port_set(2)
        site.ask(mapping(65535, options=port_set(100, 65535)))
        assert site.wanted[-1].size == 1
        site.ask(mapping(9000, options=port_set(100, 9000)))
        assert site.wanted[-1].size == 8 - 4

    def test_all_or_nothing(self, site: Site) -> None:
        """Section 5.2: with PREFER_FAILURE."""
        both = option(2) + port_set(100)
        assert result(site.ask(mapping(external_port=40000, options=both))) == Result.CANNOT_PROVIDE_EXTERNAL

    def test_a_port_of_a_set(self, site: Site) -> None:
        site.map(mapping(8080, options=port_set(4)), 40000)
        (reply,) = site.ask(mapping(8082))
        assert assigned(reply)[0] == 40002 and len(site.wanted) == 1
        assert site.ask(mapping(8082, lifetime_s=0)) and site.made == {}

    def test_a_port_of_a_set_that_is_being_made(self, site: Site) -> None:
        site.ask(mapping(8080, options=port_set(4)))
        assert result(site.ask(mapping(8082))) == Result.NO_RESOURCES


class TestEpoch:
    """RFC 6887 section 8.5."""

    def test_counts_seconds(self, site: Site) -> None:
        site.now += 123.9
        assert epoch(site.ask(header(0))[0]) == 123

    def test_begins_anew_when_something_was_lost(self, site: Site) -> None:
        site.map(mapping(8080))
        site.now += 500
        site.made.clear()
        site.tell()
        assert epoch(site.ask(header(0))[0]) == 0
        assert site.ask(mapping(8080, external_port=40000)) == []
        assert site.wanted[-1].external_port == 40000

    def test_begins_anew_when_a_mapping_is_another_one(self, site: Site) -> None:
        site.map(mapping(8080), 40000)
        site.now += 500
        key = Key(VM, 6, GUEST, 8080)
        site.made[key] = Made(key, 1, EXTERNAL, 40009)
        site.tell()
        assert epoch(site.ask(header(0))[0]) == 0
        assert assigned(site.ask(mapping(8080))[0])[0] == 40009

    def test_goes_on_while_nothing_is_lost(self, site: Site) -> None:
        site.map(mapping(8080))
        site.now += 500
        site.tell()
        site.ask(mapping(8080, lifetime_s=0))
        assert epoch(site.ask(header(0))[0]) == 500

    def test_a_natd_that_starts(self) -> None:
        """It knows no nonces and no lifetimes: the manager ends what nobody asks for again."""
        site = Site()
        key = Key(VM, 6, GUEST, 8080)
        site.responder.on_gone(VM)
        site.made[key] = Made(key, 1, EXTERNAL, 40000)
        site.tell()
        site.tick(1e6)
        assert site.unmapped == []
        (reply,) = [data for data in site.ask(mapping(8080)) if data[1] == 0x81]
        assert assigned(reply)[0] == 40000 and site.announced
        assert site.wanted[-1].lifetime_s == 7200
        assert result(site.ask(mapping(8080, nonce=OTHER_NONCE))) == Result.NOT_AUTHORIZED


class TestAnnouncements:
    """RFC 6887 section 14.1, RFC 6886 section 3.2.1."""

    def test_ten_times_at_growing_intervals(self, site: Site) -> None:
        site.map(mapping(8080))
        site.made.clear()
        site.tell()
        at = []
        for _ in range(2000):
            before = len(site.announced)
            site.tick(0.125)
            site.take()
            at += [site.now] * (len(site.announced) - before)
        gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
        assert gaps == [0.25 * 2**number for number in range(9)]

    def test_are_of_both_protocols(self, site: Site) -> None:
        site.map(mapping(8080))
        site.tell(IPv4Address("203.0.113.6"))
        site.tick(0)
        site.take()
        ((of_pcp, of_nat_pmp),) = site.announced
        assert of_pcp[:2] == b"\2\x80" and of_nat_pmp[:2] == b"\0\x80" and of_nat_pmp[8:] == b"\xcb\0\x71\6"

    def test_nothing_without_a_reason(self, site: Site) -> None:
        site.map(mapping(8080))
        site.tick(100)
        site.take()
        assert site.announced == []


class TestNatPmp:
    """RFC 6886."""

    def test_address(self, site: Site) -> None:
        assert site.ask(b"\0\0") == [bytes((0, 128, 0, 0, 0, 0, 0, 0, 203, 0, 113, 5))]

    def test_no_address(self) -> None:
        site = Site()
        site.responder.on_gone(VM)
        site.tell(None)
        assert site.ask(b"\0\0") == [bytes((0, 128, 0, 3)) + bytes(8)]

    def test_map_renew_delete(self, site: Site) -> None:
        assert site.map(nat_pmp(22, 2222, 60)) == struct.pack("!BBHIHHI", 0, 130, 0, 0, 22, 40000, 60)
        assert site.ask(nat_pmp(22, 9, 7200)) == [struct.pack("!BBHIHHI", 0, 130, 0, 0, 22, 40000, 7200)]
        assert site.ask(nat_pmp(22, 0, 0)) == [struct.pack("!BBHIHHI", 0, 130, 0, 0, 22, 0, 0)]
        assert site.unmapped == [Key(VM, 6, GUEST, 22)]
        assert site.ask(nat_pmp(22, 0, 0)) == [struct.pack("!BBHIHHI", 0, 130, 0, 0, 22, 0, 0)]

    def test_delete_all(self, site: Site) -> None:
        """Section 3.4."""
        site.map(nat_pmp(22), 40000)
        site.map(nat_pmp(23), 40001)
        site.map(nat_pmp(53, opcode=1), 40002)
        site.ask(nat_pmp(0, 0, 0))
        assert {key.port for key in site.made} == {53}

    def test_no_port(self, site: Site) -> None:
        assert site.ask(nat_pmp(0))[0][3] == 2

    def test_deletes_nothing_of_pcp(self, site: Site) -> None:
        site.map(mapping(8080))
        assert site.ask(nat_pmp(8080, 0, 0))[0][3] == 2 and site.unmapped == []

    def test_pcp_takes_over(self, site: Site) -> None:
        """RFC 6887 appendix A: a client may learn PCP."""
        site.map(nat_pmp(8080))
        assert result(site.ask(mapping(8080))) == Result.SUCCESS
        assert result(site.ask(mapping(8080, nonce=OTHER_NONCE))) == Result.NOT_AUTHORIZED

    def test_does_not_shorten_what_a_pcp_client_was_promised(self, site: Site) -> None:
        site.map(mapping(8080, lifetime_s=7200))
        assert site.ask(nat_pmp(8080, 0, 120))[0][3] == 0
        site.tick(7199.0)
        site.take()
        assert site.unmapped == []
        site.tick(1.0)
        site.take()
        assert len(site.unmapped) == 1

    def test_errors(self, site: Site) -> None:
        assert site.ask(b"\0\7") == [bytes((0, 135, 0, 5, 0, 0, 0, 0))]
        site.responder.on_disconnected(site.now)
        assert site.ask(nat_pmp(22))[0][:4] == bytes((0, 130, 0, 3))


class TestPeer:
    """RFC 6887 section 12."""

    def find(self, site: Site, data: bytes) -> FindPeer:
        assert site.ask(data) == []
        return site.found[-1]

    def test_the_mapping_of_a_connection(self, site: Site) -> None:
        find = self.find(site, peering())
        site.responder.on_peer_found(find, (EXTERNAL, 41000, 170), site.now)
        (reply,) = site.take()
        assert assigned(reply) == (41000, EXTERNAL) and lifetime(reply) == 170 and len(reply) == 80

    def test_no_connection(self, site: Site) -> None:
        find = self.find(site, peering())
        site.responder.on_peer_found(find, None, site.now)
        assert result(site.take()) == Result.NO_RESOURCES

    def test_another_one_than_suggested(self, site: Site) -> None:
        """Section 12.1: PREFER_FAILURE is implied."""
        find = self.find(site, peering(external_port=41001))
        site.responder.on_peer_found(find, (EXTERNAL, 41000, 170), site.now)
        assert result(site.take()) == Result.CANNOT_PROVIDE_EXTERNAL

    def test_protocols_without_connections(self, site: Site) -> None:
        assert result(site.ask(peering(protocol=132))) == Result.UNSUPP_PROTOCOL


def test_a_vm_that_is_not_known_gets_no_answer() -> None:
    responder = Responder()
    responder.on_asked(VM, Asked(*asked(mapping())), 0.0)
    assert responder.take() == [] and responder.dropped == 1

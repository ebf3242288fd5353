from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol import codec
from cpm.protocol.messages import GuestState
from cpm.protocol.model import PortRange
from cpm.protocol.walltime import WallTime
from qga_agent.announcement import Announcement
from qga_agent.guest_agent import (
    MAX_ADDRESSES,
    MAX_FILE_BYTES,
    SNMP,
    SOCKSTAT,
    AgentRefused,
    AgentSilent,
    GuestFigures,
    InvalidReply,
    parse_addresses,
    parse_interfaces,
    parse_snmp,
    parse_sockstat,
    printable_line,
    read_figures,
    read_file,
    write_file,
)
from qga_agent.samples import InterfaceCounters
from qga_agent.visit_schedule import VisitSchedule
from qga_agent.visitor import visit_guest
from tests.fakes.guest import INTERFACES, SNMP_TEXT, SOCKSTAT_TEXT, UUID, FakeGuest


async def test_figures_are_interfaces_and_connections() -> None:
    guest = FakeGuest()
    counted = {"eth0": InterfaceCounters(40, 4000, 30, 3000)}
    assert await read_figures(guest) == GuestFigures(counted, 12, 9, (IPv4Address("10.10.0.5"),))
    assert guest.open_files == 0


async def test_disabled_commands_leave_figures_out() -> None:
    guest = FakeGuest()
    guest.disabled = {"guest-file-open"}
    figures = await read_figures(guest)
    assert (figures.connections, figures.established) == (None, None)
    assert figures.interfaces is not None
    assert figures.refusals == ("Command guest-file-open has been disabled",) * 2


async def test_a_guest_without_proc_reports_fewer_figures() -> None:
    guest = FakeGuest()
    del guest.files[SOCKSTAT], guest.files[SNMP]
    figures = await read_figures(guest)
    assert figures.interfaces is not None
    assert "No such file" in figures.refusals[0]


def _with_address(address: object) -> dict[str, object]:
    addresses = [{"ip-address-type": "ipv4", "ip-address": address}]
    return {"name": "eth0", "hardware-address": "52:54:00:00:00:01", "ip-addresses": addresses}


def test_a_guest_that_claims_addresses_without_end_is_cut_short() -> None:
    claimed = [_with_address(str(IPv4Address("10.0.0.0") + number)) for number in range(4000)]
    assert len(parse_addresses(claimed)) == MAX_ADDRESSES


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("guest-network-get-interfaces", {}),
        ("guest-network-get-interfaces", [{"name": "eth0"}] * 5000),
        ("guest-network-get-interfaces", [{"name": ""}]),
        (
            "guest-network-get-interfaces",
            [{"name": "eth0", "hardware-address": "52:54:00:00:00:01", "ip-addresses": 4}],
        ),
        ("guest-network-get-interfaces", [_with_address("10.10.0.5/24")]),
        ("guest-network-get-interfaces", [_with_address(168427525)]),
        ("guest-network-get-interfaces", [{"name": "e" * 300}]),
        ("guest-network-get-interfaces", [{"name": "eth0\x1b[2J"}]),
        ("guest-file-open", "7"),
        ("guest-file-open", True),
        ("guest-file-open", -1),
        ("guest-file-read", {"count": 3, "buf-b64": "AAAA"}),
        ("guest-file-read", {"count": 4, "buf-b64": "AAAA", "eof": True}),
        ("guest-file-read", {"count": 3, "buf-b64": "AA*A", "eof": True}),
        ("guest-file-read", {"count": 3, "buf-b64": "A" * 100_000, "eof": True}),
        ("guest-file-read", {"count": 10**30, "buf-b64": "AAAA", "eof": True}),
        ("guest-file-read", {"count": 3, "buf-b64": "AAAA", "eof": 1}),
        ("guest-file-read", []),
    ],
)
async def test_an_impossible_reply_is_invalid(command: str, answer: object) -> None:
    guest = FakeGuest()
    guest.override[command] = answer
    with pytest.raises(InvalidReply):
        await read_figures(guest)


@pytest.mark.parametrize("figure", ["rx-bytes", "tx-bytes", "rx-packets", "tx-packets"])
@pytest.mark.parametrize("value", [-1, 2**64, 1.0, True, "12", None, [], 10**400])
def test_counters_are_whole_numbers_of_64_bits(figure: str, value: object) -> None:
    reply = copy.deepcopy(INTERFACES)
    reply[1]["statistics"][figure] = value
    with pytest.raises(InvalidReply):
        parse_interfaces(reply)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"TCP: inuse", b"TCP: inuse -1 orphan", b"TCP: inuse 99999999999 x", b"TCP: inuse 9999999999 x",
        b"UDP: inuse 3", "TCP: inuse ٣ orphan".encode(), b"\xff" * 100,
    ],
)  # fmt: skip
def test_an_impossible_sockstat_is_invalid(content: bytes) -> None:
    with pytest.raises(InvalidReply):
        parse_sockstat(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        SNMP_TEXT.replace(b" 9 4211", b" 4211"),
        SNMP_TEXT.replace(b" 9 ", b" -9 "),
        SNMP_TEXT.replace(b" 9 ", b" 9999999999 "),
        SNMP_TEXT + SNMP_TEXT,
        SNMP_TEXT.replace(b"CurrEstab", b"Currestab"),
    ],
)
def test_an_impossible_snmp_is_invalid(content: bytes) -> None:
    with pytest.raises(InvalidReply):
        parse_snmp(content)


def test_genuine_sockstat_and_snmp_are_parsed() -> None:
    assert parse_sockstat(SOCKSTAT_TEXT) == 12
    assert parse_snmp(SNMP_TEXT) == 9


async def test_a_file_that_is_too_long_is_rejected() -> None:
    guest = FakeGuest()
    guest.files["/x"] = b"x" * MAX_FILE_BYTES
    with pytest.raises(InvalidReply, match="more than"):
        await read_file(guest, "/x")
    assert guest.open_files == 0


async def test_after_a_timeout_no_further_command_is_sent() -> None:
    guest = FakeGuest()
    guest.frozen = True
    with pytest.raises(AgentSilent):
        await read_figures(guest)
    assert guest.asked == []


async def test_a_write_refused_at_the_flush_is_refused_and_the_file_closed() -> None:
    guest = FakeGuest()
    with pytest.raises(AgentRefused, match="Invalid argument"):
        await write_file(guest, "/proc/sys/net/ipv4/ip_local_port_range", b"80 90\n")
    assert guest.open_files == 0


async def test_a_partial_write_is_an_invalid_reply() -> None:
    guest = FakeGuest()
    guest.override["guest-file-write"] = {"count": 1, "eof": False}
    with pytest.raises(InvalidReply):
        await write_file(guest, "/x", b"more than one")


def test_a_guests_words_become_one_short_printable_line() -> None:
    assert printable_line("a\nb\x1b[2J\ud800") == "a b [2J"
    assert len(printable_line("x" * 10_000)) < 130


# Random replies

WORDS = ("", "eth0", "AAAA", "52:54:00:00:00:01", "\x1b[2J", "\ud800", "TCP: inuse 1 ", "return", "error", "0" * 500)
NUMBERS = (0, 1, 3, -1, 2**31, 2**53, 2**63, 2**64 - 1, 2**64, 10**40, 0.5, float("inf"), float("nan"))


def nonsense(dice: random.Random, depth: int = 0) -> Any:
    """Return a JSON value."""
    kind = dice.randrange(7 if depth < 4 else 5)
    if kind == 5:
        return [nonsense(dice, depth + 1) for _ in range(dice.randrange(5))]
    if kind == 6:
        return {dice.choice(WORDS): nonsense(dice, depth + 1) for _ in range(dice.randrange(5))}
    return (None, dice.random() < 0.5, dice.choice(NUMBERS), dice.choice(WORDS), dice.randrange(2**65))[kind]


def mangled(dice: random.Random, genuine: Any) -> Any:
    """Return what an agent would say with a part of it replaced."""
    if dice.random() < 0.15:
        return nonsense(dice)
    if isinstance(genuine, dict):
        return {key: mangled(dice, value) for key, value in genuine.items() if dice.random() > 0.03}
    if isinstance(genuine, list):
        return [mangled(dice, value) for value in genuine] * dice.choice((1, 1, 1, 2))
    return genuine


class Liar(FakeGuest):
    """Answers like an agent, more or less."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self._dice = dice
        self.answered = 0

    def answer(self, request: Mapping[str, Any]) -> dict[str, object]:
        self.answered += 1
        try:
            reply = super().answer(request)
        except (TypeError, KeyError):  # our own nonsense came back as an argument
            return {"return": nonsense(self._dice)}
        if "error" in reply:
            return reply
        return {"return": mangled(self._dice, reply["return"]) if self._dice.random() < 0.4 else reply["return"]}


ANNOUNCEMENT = Announcement(IPv4Address("203.0.113.1"), PortRange(20000, 20511), local_port_range=True)


async def test_ten_thousand_replies_give_figures_or_the_state_nonsense() -> None:
    dice, answered, states = random.Random(7), 0, set()
    while answered < 10_000:
        guest = Liar(dice)
        outcome = await visit_guest(guest, ANNOUNCEMENT, "/run/virt-ports.json")
        answered += guest.answered
        guests = VisitSchedule(10.0)
        guests.on_vms({UUID: ANNOUNCEMENT}, 0.0)
        guests.start_due(5.0)
        guests.on_result(UUID, outcome, 5.0)
        view = guests.views(WallTime.of)[UUID]
        states.add(view.state)
        assert codec.encode(view)
        for figure in (view.connections, view.established, view.interfaces, view.rx_bytes, view.tx_bytes):
            assert figure is None or (type(figure) is int and 0 <= figure < 2**63)
        assert view.why.isprintable()
    assert states == {GuestState.ANSWERING, GuestState.NONSENSE}


@given(st.binary(max_size=200))
def test_any_content_of_the_files_is_a_figure_or_invalid(content: bytes) -> None:
    for parse, frame in ((parse_sockstat, b"TCP: inuse %b orphan"), (parse_snmp, SNMP_TEXT.replace(b" 9 ", b" %b "))):
        with contextlib.suppress(InvalidReply):
            assert 0 <= parse(frame % content) < 2**31

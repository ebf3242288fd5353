"""What the kernel's answers about the way of VMs' packets mean. The kernel itself: tests/netns/test_ways.py."""

from __future__ import annotations

import errno
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest

from natctl.model.entries import HostSettings, Path
from natctl.ruleset import way_check
from natctl.ruleset.way_check import Answer, Bridge

EDGE = IPv4Address("172.30.0.11")
BRIDGE = Bridge("virbr0", 3, IPv4Address("10.10.0.2"))
NAMES = {2: "eth0", 3: "virbr0", 9: "wg0"}
HOST = HostSettings(frozenset({"eth0"}))
TO_EDGES = Path(IPv4Network("100.64.0.0/10"), frozenset({EDGE}))
OWN_EDGE = Path(IPv4Network("100.64.0.0/10"))


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        (TO_EDGES, Answer(2, EDGE), ""),
        (OWN_EDGE, Answer(2, IPv4Address("198.51.100.1")), ""),
        (OWN_EDGE, Answer(2), ""),
        (TO_EDGES, Answer(2, IPv4Address("172.30.0.1")), "leave by eth0 via 172.30.0.1, not to an edge"),
        (TO_EDGES, Answer(9), "leave by wg0, not to an edge"),
        (TO_EDGES, Answer(9, EDGE), "leave by wg0, which is not in host.uplinks (eth0)"),
        (OWN_EDGE, Answer(9), "leave by wg0, which is not in host.uplinks (eth0)"),
        (OWN_EDGE, Answer(77), "leave by an unknown interface"),
        (OWN_EDGE, Answer(error=errno.ENETUNREACH), "go nowhere (ENETUNREACH)"),
        (OWN_EDGE, Answer(error=errno.EXDEV), "are dropped by the bridge's reverse path filter"),
    ],
)
def test_outwards(path: Path, answer: Answer, words: str) -> None:
    said = way_check.outward_problem(answer, BRIDGE, HOST, path, NAMES)
    assert said.startswith(words)
    assert bool(said) == bool(words)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(3), ""),
        (Answer(9), "get no answers: what comes in at eth0 goes to wg0"),
        (Answer(error=errno.EHOSTUNREACH), "get no answers: what comes in at eth0 goes nowhere (EHOSTUNREACH)"),
        (Answer(error=errno.EXDEV), "get no answers: the reverse path filter of eth0 drops them"),
    ],
)
def test_inwards(answer: Answer, words: str) -> None:
    said = way_check.inward_problem(answer, BRIDGE, NAMES, 2)
    assert said.startswith(words)
    assert bool(said) == bool(words)


@pytest.mark.parametrize(
    ("own", "guest"),
    [
        ([], None),
        (["10.10.0.1/24"], "10.10.0.2"),
        (["10.10.0.2/24", "10.10.0.1/24"], "10.10.0.3"),
        (["10.10.0.1/32", "192.168.122.1/30"], "192.168.122.2"),
        (["10.10.0.0/31"], None),
    ],
)
def test_an_address_that_a_guest_could_have(own: list[str], guest: str | None) -> None:
    found = way_check.guest_address([IPv4Interface(text) for text in own])
    assert found == (IPv4Address(guest) if guest else None)


@pytest.mark.parametrize(
    ("everywhere", "here", "value"),
    [(0, 1, 2), (1, 0, 2), (1, 1, 2), (0, 2, 0), (0, 0, None), (2, 0, None), (2, 2, None), (2, 1, None), (1, 2, None)],
)
def test_loosening_a_filter(everywhere: int, here: int, value: int | None) -> None:
    assert way_check.passing_rp_filter(everywhere, here) == value


def test_sentences_name_vms_only_where_others_are_well() -> None:
    problems = [("virbr0", f"web {number}", "go nowhere") for number in range(7)] + [("virbr1", "db", "go nowhere")]
    assert list(way_check.sentences(problems, {"virbr0": 9, "virbr1": 1})) == [
        "packets of 7 VMs on virbr0 (web 0, web 1, web 2, web 3, web 4) go nowhere",
        "packets of VMs on virbr1 go nowhere",
    ]

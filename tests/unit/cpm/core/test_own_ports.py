"""Which ports are kept for edges, for how long, and what makes no sense."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.core.own_ports import KEPT_S, MOST_GONE, check, kept_after, kept_still, reason
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import NodeName, PortRange
from cpm.protocol.own_ports import MOST_RANGES, KeptPorts, OwnAddress, OwnRange, OwnUse

EDGE = NodeName("edge1")
A, B = IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")


def own(*parts: str, address: IPv4Address = A, use: OwnUse = OwnUse.LISTENER) -> OwnAddress:
    return OwnAddress(address, tuple(OwnRange(PortRange.parse(part), use) for part in parts))


def ports(kept: list[KeptPorts]) -> dict[str, float | None]:
    return {f"{each.address} {each.ports}": each.gone for each in kept}


def test_what_is_no_longer_named_is_kept_for_an_hour() -> None:
    first = kept_after((), EDGE, [own("8080", "32768-60999")], 10.0)
    assert ports(first) == {f"{A} 8080-8080": None, f"{A} 32768-60999": None}
    then = kept_after(first, EDGE, [own("32768-60999")], 20.0)
    assert ports(then) == {f"{A} 8080-8080": 20.0, f"{A} 32768-60999": None}
    again = kept_after(then, EDGE, [own("32768-60999")], 50.0)
    assert again == then, "it counts from when it was not named any more"
    assert kept_still(again, 19.0 + KEPT_S) == again
    assert ports(kept_still(again, 20.0 + KEPT_S)) == {f"{A} 32768-60999": None}
    assert ports(kept_after(again, EDGE, [own("32768-60999")], 20.0 + KEPT_S)) == {f"{A} 32768-60999": None}


def test_a_listener_that_opens_again_is_as_if_it_had_never_closed() -> None:
    first = kept_after((), EDGE, [own("8080")], 10.0)
    assert kept_after(kept_after(first, EDGE, [own()], 20.0), EDGE, [own("8080")], 30.0) == first


def test_only_the_rest_of_a_range_is_gone() -> None:
    first = kept_after((), EDGE, [own("32768-60999"), own("8080", address=B)], 10.0)
    then = kept_after(first, EDGE, [own("40000-50000")], 20.0)
    expected = {f"{A} 32768-39999": 20.0, f"{A} 40000-50000": None, f"{A} 50001-60999": 20.0, f"{B} 8080-8080": 20.0}
    assert ports(then) == expected


def test_an_edge_that_names_ever_other_ports_does_not_keep_the_whole_pool() -> None:
    kept: list[KeptPorts] = []
    for turn in range(8):
        numbers = range(1024 + turn, 65536, 64)
        kept = kept_after(kept, EDGE, [own(*map(str, numbers[:MOST_RANGES]))], 10.0 * turn)
    assert len(kept) == MOST_RANGES + MOST_GONE
    assert min(each.gone for each in kept if each.gone is not None) == 40.0, "the oldest are free"


@pytest.mark.parametrize("told", [[own("1-2"), own("3-4")], [own("5", "4")], [own("4-5", "5-6")]])
def test_nonsense_is_refused(told: list[OwnAddress]) -> None:
    with pytest.raises(InvalidRequest, match="own ports"):
        check(told)
    check([own("4", "5-6"), own("4", address=B), own(address=IPv4Address("192.0.2.1"))])


def test_the_reason_names_port_and_machine() -> None:
    assert reason(kept_after((), EDGE, [own("8080", "9000-9001")], 1.0)) == "port 8080 is the machine's own (edge1)"
    assert reason(kept_after((), EDGE, [own("9000-9001")], 1.0)) == "ports 9000-9001 are the machine's own (edge1)"
    assert reason(()) == ""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.cli import addresses
from cpm.protocol.model import PortRange

PUBLIC = st.integers(int(IPv4Address("1.0.0.0")), int(IPv4Address("126.255.0.0"))).map(IPv4Address)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["203.0.113.1"], ["203.0.113.1"]),
        (["203.0.113.1-203.0.113.3"], ["203.0.113.1", "203.0.113.2", "203.0.113.3"]),
        (["203.0.113.0/31"], ["203.0.113.0", "203.0.113.1"]),
        (["203.0.113.9/32"], ["203.0.113.9"]),
        (["203.0.113.2", "203.0.113.1-203.0.113.2"], ["203.0.113.2", "203.0.113.1"]),
        (["10.0.0.1"], ["10.0.0.1"]),
    ],
)
def test_addresses_ranges_and_networks_are_parsed(words: list[str], found: list[str]) -> None:
    assert addresses.parse(words) == tuple(map(IPv4Address, found))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("", "not an IPv4 address, range or network: ''; write 203.0.113.1"),
        ("203.0.113", "not an IPv4 address, range or network"),
        ("203.0.113.256", "not an IPv4 address, range or network"),
        ("example.org", "not an IPv4 address, range or network"),
        ("203.0.113.1-", "not an IPv4 address, range or network"),
        ("203.0.113.1-4", "not an IPv4 address, range or network"),
        ("203.0.113.0/33", "not an IPv4 address, range or network"),
        ("203.0.113.0/", "not an IPv4 address, range or network"),
        ("2001:db8::1", "only IPv4 addresses are shared"),
        ("203.0.113.4-203.0.113.1", "write 203.0.113.1-203.0.113.4"),
        ("203.0.113.5/29", "203.0.113.5/29 is an address within a network; write 203.0.113.0/29"),
        ("224.0.0.1", "224.0.0.1 is multicast and can be no external address; write 203.0.113.1"),
        ("127.0.0.1", "is loopback"),
        ("0.0.0.0", "means this host"),
        ("169.254.0.1", "is link-local"),
        ("255.255.255.255", "is reserved"),
        ("223.255.255.255-224.0.0.1", "224.0.0.0 is multicast"),
        ("203.0.0.0/16", "203.0.0.0/16: more than 1024 addresses at once"),
        ("0.0.0.0/0", "more than 1024 addresses at once"),
    ],
)
def test_invalid_addresses_are_refused_with_a_remedy(word: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        addresses.parse([word])
    assert message in str(refused.value)


def test_the_limit_applies_to_all_words_together() -> None:
    assert len(addresses.parse(["198.51.100.0/24", "203.0.113.0/24", "192.0.2.0/24", "198.18.0.0/24"])) == 1024
    with pytest.raises(ValueError, match="more than 1024"):
        addresses.parse(["198.18.0.0/22", "203.0.113.1"])


@given(PUBLIC, st.integers(0, 1023))
def test_a_range_has_every_address_between_its_ends(first: IPv4Address, more: int) -> None:
    found = addresses.parse([f"{first}-{first + more}"])
    assert (found[0], found[-1], len(found)) == (first, first + more, more + 1)


@given(PUBLIC, st.integers(22, 32))
def test_a_network_has_its_first_and_last_address(address: IPv4Address, prefix: int) -> None:
    network = IPv4Network((int(address), prefix), strict=False)
    assert addresses.parse([str(network)]) == tuple(network)


@given(st.text(max_size=25) | st.from_regex(r"[-0-9./: ]{1,30}"))
def test_any_text_is_parsed_or_refused(word: str) -> None:
    try:
        found = addresses.parse([word])
    except ValueError:
        return
    assert 0 < len(found) <= 1024
    assert not any(address.is_multicast or address.is_loopback or address.is_unspecified for address in found)


def test_reserved_ports_are_joined_and_in_order() -> None:
    assert addresses.parse_reserved("8000-8100, 5060,8101") == (PortRange(5060, 5060), PortRange(8000, 8101))


@pytest.mark.parametrize("text", ["", " , ", "x", "1-x", "9-1", "70000", "1-2-3"])
def test_invalid_reserved_ports_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"for example|FIRST-LAST within|write 1-9"):
        addresses.parse_reserved(text)

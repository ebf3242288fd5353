"""Reading lists of the kernel's: what was encoded comes back, and nonsense is an error or nothing."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natctl.netlink.message import MalformedMessage, attribute, attribute_map, attribute_payloads, nested
from natctl.netlink.nftables import encode
from natctl.netlink.nftables.elements import packed_element
from natctl.netlink.nftables.read import counted_in, decode_ct_timeout, decode_element, decode_hook
from natctl.ruleset.plan import AddChain, AddCtTimeout
from natctl.ruleset.values import Chain, CtTimeout, Element, Family, Hook, Limit
from tests.unit.natctl.netlink.nftables.generated import elements, limits

BEHIND_HEADERS = 20


@given(elements())
def test_an_element_is_read_as_it_was_packed(element: Element) -> None:
    (item,) = attribute_payloads(packed_element(element))
    assert decode_element(item) == (element, None)


@given(limits())
def test_an_element_with_a_limit_is_read_as_it_was_packed(limit: Limit) -> None:
    element = Element(b"mark", userdata=b"web", limit=limit)
    (item,) = attribute_payloads(packed_element(element))
    # Its counter, or none, since the kernel counts connections instead.
    assert decode_element(item) == (element, 0 if limit.most is None else None)


def test_an_element_that_goes_to_a_chain_or_defers_is_read_as_it_was_packed() -> None:
    for element in (Element(b"vnet0".ljust(16, b"\0"), chain="vm-1"), Element(b"mark", defer_after=192)):
        (item,) = attribute_payloads(packed_element(element))
        assert decode_element(item) == (element, None)


@pytest.mark.parametrize("hook", [None, Hook("nat", 4, 90), Hook("filter", 0, -300)])
def test_a_hook_is_read_as_it_was_packed(hook: Hook | None) -> None:
    _, request, _ = encode.transaction([AddChain(Family.IPV4, Chain("c", hook, ()))])
    assert decode_hook(attribute_map(request.data, BEHIND_HEADERS)) == hook


def test_an_object_of_timeouts_is_read_as_it_was_packed() -> None:
    timeouts = CtTimeout(6, (240, 240, 7440, 240))
    _, request, _ = encode.transaction([AddCtTimeout((Family.IPV4, "managed-tcp"), timeouts)])
    assert decode_ct_timeout(attribute_map(request.data, BEHIND_HEADERS)) == timeouts


def test_an_object_of_another_kind_is_none_of_ours() -> None:
    assert decode_ct_timeout({3: b"\0\0\0\1"}) is None


def counting(key: bytes, packets: int, octets: int, comment: bytes = b"") -> bytes:
    """Return an element that counts, as the kernel lists it."""
    counted = nested(2, attribute(1, octets.to_bytes(8, "big")), attribute(2, packets.to_bytes(8, "big")))
    parts = [nested(1, attribute(1, key)), nested(2, attribute(1, octets.to_bytes(8, "big")))]
    parts += [nested(7, attribute(1, b"counter\0"), counted), *([attribute(6, comment)] if comment else [])]
    return nested(1, *parts)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.binary(min_size=4, max_size=9), st.integers(0, 2**64 - 1), st.binary(max_size=60)),
            elements().map(packed_element),
        )
    )
)
def test_counters_of_a_list_are_those_of_its_elements(made: list[tuple[bytes, int, bytes] | bytes]) -> None:
    items = b"".join(
        item if isinstance(item, bytes) else counting(item[0], item[1], item[1] // 3, item[2]) for item in made
    )
    decoded = [decode_element(item) for item in attribute_payloads(items)]
    assert list(counted_in(items)) == [(element.key, packets) for element, packets in decoded if packets is not None]


def test_an_element_without_a_key_is_an_error() -> None:
    with pytest.raises(MalformedMessage):
        decode_element(attribute(6, b"comment"))


@given(st.dictionaries(st.integers(0, 20), st.binary(max_size=60)), st.binary(max_size=100))
def test_nonsense_is_an_error_or_nothing(parts: dict[int, bytes], item: bytes) -> None:
    packed = b"".join(attribute(kind, payload) for kind, payload in parts.items())
    for data in (item, packed):
        with contextlib.suppress(MalformedMessage):
            decode_element(data)
    with contextlib.suppress(MalformedMessage):
        decode_hook(parts)
    with contextlib.suppress(MalformedMessage):
        decode_ct_timeout({**parts, 3: b"\0\0\0\7"})


KEY = attribute(1, attribute(1, b"key!"))


@pytest.mark.parametrize("item", [
    KEY + b"\7",
    KEY + attribute(2, attribute(1, b"data"))[:-2],
    KEY + attribute(2, b"\x20\0\1\0data"),
    KEY + attribute(10, b"\x20\0\1\0end!"),
    KEY + attribute(7, attribute(1, b"counter\0") + attribute(2, attribute(2, b"1234"))),
])  # fmt: skip
def test_an_element_that_is_cut_off_anywhere_is_an_error(item: bytes) -> None:
    """Without the part that is missing it would be another element: one without data, for example."""
    with pytest.raises(MalformedMessage):
        decode_element(item)

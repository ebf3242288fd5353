"""The syntax of wishes, and that an invalid one does not affect the others."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core.wishes import Defaults, resolve
from cpm.protocol import codec
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.messages import Attach, Present
from cpm.protocol.model import UNLIMITED, DomainUUID, ForwardProtocol, PortRange, WishedForward, Wishes
from cpm.protocol.wishes import parse, parse_strictly


def test_valid_wishes_are_parsed() -> None:
    raw = {"floor": "256", "cap": " 4096 ", "weight": "200", "policy": "spec", "drain-limit": "600"}
    assert parse(raw) == Wishes(floor=256, cap=4096, weight=200, policy="spec", drain_limit_s=600.0)
    assert parse({"drain-limit": "none"}) == Wishes(drain_limit_s=UNLIMITED)
    assert parse({}) == Wishes()


@pytest.mark.parametrize(
    ("key", "text", "because"),
    [
        ("floor", "many", "floor 'many': use a whole number"),
        ("floor", "-1", "use a whole number"),
        ("cap", "9" * 5000, "..."),
        ("weight", "1e3", "use a whole number"),
        ("policy", "", "not the name of a policy"),
        ("drain-limit", "0", "use seconds above 0, up to 1e+09, or none"),
        ("filtering", "full cone", "use address-and-port-dependent or endpoint-independent"),
        ("drain-limit", "inf", "use seconds above 0, up to 1e+09, or none"),
        (
            "drain_limit",
            "5",
            "there is no setting 'drain_limit'; use floor, cap, weight, policy, drain-limit, connections",
        ),
    ],
)
def test_an_invalid_wish_is_reported_and_the_others_hold(key: str, text: str, because: str) -> None:
    wishes = parse({key: text, "floor" if key != "floor" else "cap": "128"})
    assert because in wishes.nonsense[0]
    assert len(wishes.nonsense[0]) < 200
    assert 128 in (wishes.floor, wishes.cap)
    assert resolve(wishes, Wishes(), Defaults(policy="spec"), ["spec"]).ignored == (f"metadata: {wishes.nonsense[0]}",)
    with pytest.raises(InvalidRequest):
        parse_strictly({key: text})


@given(st.dictionaries(st.text(), st.text()))
def test_any_attributes_can_be_parsed(raw: dict[str, str]) -> None:
    parse(raw)


def test_wishes_are_encoded_and_messages_without_them_are_accepted() -> None:
    wishes = Wishes(floor=256, nonsense=("no",))
    attach = Attach(DomainUUID("u"), "web", wishes=wishes)
    assert codec.decode_node_message(codec.encode(attach)) == attach
    old = codec.decode_node_message(b'{"type":"present","domains":[{"domain":"u","name":"web"}]}')
    assert isinstance(old, Present)
    assert old.domains[0].wishes is None


def test_forwards_are_parsed() -> None:
    raw = {"port": "8000-8010", "to": "9000-9010", "protocol": "both", "address": "203.0.113.1", "guest": "10.0.0.5"}
    found = parse({}, [raw | {"keep": "no"}, {"port": "22"}, {"to": "80"}])
    assert found.forwards == (
        WishedForward(
            ports=PortRange(8000, 8010),
            to=PortRange(9000, 9010),
            protocol=ForwardProtocol.BOTH,
            address=IPv4Address("203.0.113.1"),
            guest=IPv4Address("10.0.0.5"),
            is_kept=False,
        ),
        WishedForward(ports=PortRange(22, 22), to=PortRange(22, 22)),
        WishedForward(to=PortRange(80, 80)),
    )
    assert found.nonsense == ()


@pytest.mark.parametrize(
    ("raw", "because"),
    [
        ({}, "it has neither port nor to"),
        ({"port": "22x"}, "not a port range"),
        ({"port": "1-2", "to": "3"}, "port has 2 ports and to has 1"),
        ({"port": "22", "protocol": "sctp"}, "use protocol tcp, udp or both"),
        ({"port": "22", "keep": "maybe"}, "keep yes or no"),
        ({"port": "22", "guest": "router"}, "not an IPv4 address"),
        ({"port": "22", "colour": "red"}, "there is no attribute 'colour'; use port, to, protocol"),
    ],
)
def test_a_forward_that_makes_no_sense_affects_no_other(raw: dict[str, str], because: str) -> None:
    found = parse({"floor": "64"}, [raw, {"port": "22"}])
    assert (found.floor, len(found.forwards)) == (64, 1)
    [why] = found.nonsense
    assert because in why


@given(st.lists(st.dictionaries(st.text(max_size=9), st.text(max_size=9)), max_size=400))
def test_any_number_of_forwards_makes_a_message_within_its_bounds(raw: list[dict[str, str]]) -> None:
    attach = Attach(DomainUUID("u"), "a", wishes=parse({}, raw))
    assert codec.decode_node_message(codec.encode(attach)) == attach

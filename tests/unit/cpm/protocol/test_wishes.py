"""The syntax of wishes, and that an invalid one does not affect the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core.wishes import Defaults, resolve
from cpm.protocol import codec
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.messages import Attach, Present
from cpm.protocol.model import UNLIMITED, DomainUUID, Wishes
from cpm.protocol.wishes import parse, parse_strictly


def test_valid_wishes_are_parsed() -> None:
    raw = {"floor": "256", "cap": " 4096 ", "weight": "200", "policy": "spec", "drain-limit": "600"}
    assert parse(raw) == Wishes(floor=256, cap=4096, weight=200, policy="spec", drain_limit_s=600.0)
    assert parse({"drain-limit": "none"}) == Wishes(drain_limit_s=UNLIMITED)
    assert parse({}) == Wishes()


@pytest.mark.parametrize(
    ("key", "text", "because"),
    [
        ("floor", "many", "floor 'many': it is not a whole number"),
        ("floor", "-1", "not a whole number"),
        ("cap", "9" * 5000, "..."),
        ("weight", "1e3", "not a whole number"),
        ("policy", "", "not the name of a policy"),
        ("drain-limit", "0", "use seconds above 0, up to 1e+09, or none"),
        ("filtering", "full cone", "use address-and-port-dependent or endpoint-independent"),
        ("drain-limit", "inf", "use seconds above 0, up to 1e+09, or none"),
        (
            "drain_limit",
            "5",
            "'drain_limit' is none of floor, cap, weight, policy, drain-limit, connections, connection-rate, filtering",
        ),
    ],
)
def test_an_invalid_wish_is_reported_and_the_others_hold(key: str, text: str, because: str) -> None:
    wishes = parse({key: text, "floor" if key != "floor" else "cap": "128"})
    assert because in wishes.nonsense[0]
    assert len(wishes.nonsense[0]) < 120
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

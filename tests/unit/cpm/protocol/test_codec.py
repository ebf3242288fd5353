"""Decoding messages: values, or an error that names the place."""

from __future__ import annotations

import json
from ipaddress import IPv4Network

import pytest

from cpm.api.requests import PoolRequest
from cpm.protocol import codec
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.messages import PathState, Snapshot
from cpm.protocol.timeouts import Timeouts

HELLO = {
    "type": "hello", "protocol": 1, "node": "n", "roles": ["host"], "underlay": "172.30.0.99",
    "version": "0", "epoch": 0, "domains": [],
}  # fmt: skip


@pytest.mark.parametrize("wrong", [7, None, [], {}, "172.30.0", True])
def test_a_wrong_address_is_an_error_that_names_its_place(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match=r"\$\.underlay"):
        codec.decode_node_message(json.dumps(HELLO | {"underlay": wrong}))
    with pytest.raises(InvalidRequest, match=r"\$\.addresses\[0\]"):
        codec.decode(PoolRequest, json.dumps({"addresses": [wrong]}).encode())


def test_an_encoded_message_decodes_to_itself() -> None:
    assert codec.decode_node_message(
        codec.encode(codec.decode_node_message(json.dumps(HELLO)))
    ) == codec.decode_node_message(json.dumps(HELLO))


def test_timeouts_are_encoded_with_the_path() -> None:
    snapshot = Snapshot(1, 1, PathState(IPv4Network("100.64.0.0/10"), timeouts=Timeouts(udp_s=300)))
    assert codec.decode_manager_message(codec.encode(snapshot)) == snapshot


@pytest.mark.parametrize(("given", "understood"), [
    ({}, None),
    ({"timeouts": None}, None),
    ({"timeouts": {"udp_s": 300}}, Timeouts(udp_s=300)),
    ({"timeouts": {"udp_s": 300, "sctp_s": 600}}, Timeouts(udp_s=300)),
])  # fmt: skip
def test_the_path_of_an_older_or_newer_manager_is_accepted(
    given: dict[str, object], understood: Timeouts | None
) -> None:
    path = {"internal_pool": "100.64.0.0/10", "edges": [], "externals": []} | given
    message = codec.decode_manager_message(json.dumps({"type": "snapshot", "epoch": 1, "generation": 1, "path": path}))
    assert isinstance(message, Snapshot)
    assert message.path.timeouts == understood


@pytest.mark.parametrize("text", ["", "nonsense", "[" * 100_000, "{}", '{"type":"hello"}', '{"type":7}'])
def test_what_is_no_message_is_refused_with_a_remedy(text: str) -> None:
    for read in (codec.decode_node_message, codec.decode_manager_message):
        with pytest.raises(InvalidRequest, match="both sides must run the same version"):
            read(text)

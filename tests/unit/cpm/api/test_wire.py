"""What is on the wire becomes values, or an error that names the place."""

from __future__ import annotations

import json

import pytest

from cpm.api import wire
from cpm.api.views import PoolRequest
from cpm.errors import InvalidRequest

HELLO = {
    "type": "hello", "protocol": 1, "node": "n", "roles": ["host"], "underlay": "172.30.0.99",
    "version": "0", "epoch": 0, "domains": [],
}  # fmt: skip


@pytest.mark.parametrize("wrong", [7, None, [], {}, "172.30.0", True])
def test_a_wrong_address_is_an_error_that_names_its_place(wrong: object) -> None:
    with pytest.raises(InvalidRequest, match=r"\$\.underlay"):
        wire.node_message(json.dumps(HELLO | {"underlay": wrong}))
    with pytest.raises(InvalidRequest, match=r"\$\.addresses\[0\]"):
        wire.decode(PoolRequest, json.dumps({"addresses": [wrong]}).encode())


def test_what_is_written_is_read() -> None:
    assert wire.node_message(wire.encode(wire.node_message(json.dumps(HELLO)))) == wire.node_message(json.dumps(HELLO))


@pytest.mark.parametrize("text", ["", "nonsense", "[" * 100_000, "{}", '{"type":"hello"}', '{"type":7}'])
def test_no_message(text: str) -> None:
    for read in (wire.node_message, wire.manager_message):
        with pytest.raises(InvalidRequest, match="both sides must run the same version"):
            read(text)

"""The declarations: paths and queries, and that each operation has one handler with its arguments."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address
from typing import Any

import pytest

from cpm import commands, queries, serving
from cpm.api import handlers
from cpm.api.handlers import Kind
from cpm.api.operations import HISTORY, LIST_VMS, OPERATIONS, RESIZE, WHOIS, Operation
from cpm.api.parameters import Parameter
from cpm.core.manager import Manager

ASK = Operation("GET", "/v1/x/{name}", lambda: str, "", (Parameter("name", ""),))


def test_arguments_are_quoted_in_the_path() -> None:
    assert HISTORY.target({"name": "a/b?c#d e"}) == "/v1/domains/a%2Fb%3Fc%23d%20e/history"


def test_arguments_are_encoded_in_the_query() -> None:
    assert LIST_VMS.target({"all": False}) == "/v1/domains"
    assert LIST_VMS.target({"all": True}) == "/v1/domains?all=1"
    asked = WHOIS.target({"address": IPv4Address("203.0.113.1"), "port": 0, "at": None, "protocol": "udp"})
    assert asked == "/v1/whois?address=203.0.113.1&port=0&protocol=udp"


def test_routes_are_declared_once() -> None:
    assert len({str(operation) for operation in OPERATIONS}) == len(OPERATIONS) > 15


def test_each_operation_has_a_handler_of_its_kind() -> None:
    found = handlers.load((queries, commands, serving))
    assert set(found) >= set(OPERATIONS)
    for operation in OPERATIONS:
        kind = found[operation].kind
        assert (kind is Kind.STREAM) == operation.streams
        assert (kind is Kind.CHANGE) == (operation.method != "GET")
        assert found[operation].names - kind.value == operation.arguments


def _whole(name: str) -> str:
    return name


def _lacking() -> str:
    return ""


def _too_many(manager: Manager, name: str, other: str) -> str:
    return f"{manager}{name}{other}"


async def _lines(name: str) -> AsyncIterator[str]:
    yield name


@pytest.mark.parametrize(
    ("register", "function"),
    [
        (handlers.query, _lacking),
        (handlers.query, _too_many),
        (handlers.stream, _lines),
    ],
)
def test_a_handler_whose_arguments_do_not_fit_cannot_be_registered(
    register: Callable[[Operation[Any]], Callable[[Any], Any]], function: Callable[..., Any]
) -> None:
    with pytest.raises(TypeError):
        register(ASK)(function)


def test_a_second_handler_is_refused() -> None:
    handlers.load((queries, commands, serving))
    with pytest.raises(TypeError):
        handlers.query(RESIZE)(lambda name, body: name)

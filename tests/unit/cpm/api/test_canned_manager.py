"""The fake manager behaves as cpmd does: the same calls to both have the same outcome for a client."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import socket
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any, NamedTuple

import pytest

from cpm.api.client import Client, RemoteError
from cpm.api.operations import (
    ADD_TO_POOL,
    EVENTS,
    HISTORY,
    LIST_NODES,
    LIST_POOL,
    LIST_VMS,
    MEASUREMENTS,
    REMOVE_FROM_POOL,
    RESIZE,
    SET_WISHES,
    SHOW_VM,
    UNFENCE,
    WHOIS,
    Operation,
)
from cpm.api.requests import PoolRemoval, PoolRequest, ResizeRequest, WishesRequest
from cpm.protocol.messages import Attach
from cpm.protocol.model import DomainUUID
from tests.fakes import canned_manager, cpmd
from tests.fakes.canned_manager import CannedManager, lines, refusal, view

WEB = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")
EXTERNAL = IPv4Address("203.0.113.1")


class Call(NamedTuple):
    """A call of the client; of a followed stream, the first two lines are read."""

    operation: Operation[Any]
    arguments: dict[str, Any]
    body: object | None = None

    @property
    def key(self) -> str:
        return f"{self.operation.method} {self.operation.target(self.arguments)}"


CALLS = [
    Call(LIST_VMS, {"all": True}),
    Call(SHOW_VM, {"name": "web1"}),
    Call(SHOW_VM, {"name": "a/b?c#d é"}),
    Call(SET_WISHES, {"name": "web1"}, WishesRequest(floor=9, cap=8)),
    Call(SET_WISHES, {"name": "web1"}, WishesRequest(weight=7)),
    Call(RESIZE, {"name": "web2"}, ResizeRequest(512)),
    Call(HISTORY, {"name": "web1", "limit": 0}),
    Call(WHOIS, {"address": EXTERNAL, "port": 1024}),
    Call(WHOIS, {"address": EXTERNAL, "port": 65535}),
    Call(ADD_TO_POOL, {}, PoolRequest((IPv4Address("203.0.113.7"),))),
    Call(REMOVE_FROM_POOL, {}, PoolRemoval((IPv4Address("203.0.113.7"),))),
    Call(REMOVE_FROM_POOL, {}, PoolRemoval((EXTERNAL,))),
    Call(LIST_POOL, {}),
    Call(LIST_NODES, {}),
    Call(UNFENCE, {"name": "host9"}),
    Call(EVENTS, {"limit": 1}),
    Call(EVENTS, {"limit": 0}),
    Call(EVENTS, {"after": "x"}),
    Call(EVENTS, {"after": 0, "follow": True}),
    Call(MEASUREMENTS, {}),
]


class Outcome(NamedTuple):
    """The result for a client, and the head of the answer as received over the socket."""

    value: object
    refusal: tuple[str, str] | None
    head: tuple[int, str | None, bool]


def outcome(path: str, call: Call) -> Outcome:
    value, refused = None, None
    client = Client(path)
    try:
        if call.operation.streams:
            arguments = dict(call.arguments)
            follow = arguments.pop("follow", False)
            with contextlib.closing(client.stream(call.operation, follow=follow, **arguments)) as values:  # type: ignore[type-var]
                value = list(itertools.islice(values, 2) if follow else values)
        else:
            value = client.call(call.operation, call.body, **call.arguments)
    except RemoteError as error:
        refused = (error.code, error.message)
    return Outcome(value, refused, head(path, call))


def head(path: str, call: Call) -> tuple[int, str | None, bool]:
    """Send a request that changes nothing; return status, type and whether the answer is chunked."""
    if call.operation.method != "GET":
        return (0, None, False)
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
    try:
        connection.request("GET", call.operation.target(call.arguments))
        response = connection.getresponse()
        return (response.status, response.getheader("Content-Type"), response.getheader("Content-Length") is None)
    finally:
        connection.close()


def outcomes(path: str) -> list[Outcome]:
    return [outcome(path, call) for call in CALLS]


async def real_outcomes() -> list[Outcome]:
    async with cpmd.running() as site, site.node("host1", "172.30.0.11") as node:
        await site.ask("POST", "/v1/pool", b'{"addresses":["203.0.113.1"]}')
        await site.settle()
        await node.say(Attach(WEB, "web1"))
        while '"active"' not in (await site.ask("GET", f"/v1/domains/{WEB}")).body:
            await asyncio.sleep(0.002)
        await site.settle()
        return await asyncio.to_thread(outcomes, site.path)


def teach(fake: CannedManager, call: Call, real: Outcome) -> None:
    """Make the fake answer as the manager did."""
    answer: Callable[[canned_manager.Handler], None]
    if real.refusal is not None:
        answer = refusal(real.head[0] or 409, *real.refusal)
    elif call.operation.streams:
        assert isinstance(real.value, list)
        answer = lines(real.value)
    else:
        answer = view(real.value)
    fake.on(call.key, answer)


async def test_the_fake_and_the_manager_look_the_same_to_a_client() -> None:
    real = await real_outcomes()
    assert [one.refusal and one.refusal[0] for one in real] == [
        None, None, "not-found", "invalid-request", None, "not-found", "invalid-request", None, "not-found", None, None,
        "address-in-use", None, None, "not-found", None, None, "invalid-request", None, "invalid-request",
    ]  # fmt: skip
    with canned_manager.running() as fake:
        for call, one in zip(CALLS, real, strict=True):
            teach(fake, call, one)
            assert await asyncio.to_thread(outcome, fake.path, call) == one, call.key


async def test_the_fake_refuses_an_unknown_path_as_the_manager_does() -> None:
    async with cpmd.running() as site:
        answer = await site.ask("GET", "/v1/nothing")
    with canned_manager.running() as fake:
        call = Call(Operation("GET", "/v1/nothing", lambda: str, ""), {})
        refused = await asyncio.to_thread(outcome, fake.path, call)
    assert refused.head == (answer.status, answer.content_type, False)
    assert refused.refusal is not None
    assert refused.refusal[0] == "not-found"


async def test_measurements_can_only_be_followed() -> None:
    async with cpmd.running() as site:
        with pytest.raises(RemoteError, match="ask with follow=1"):
            await asyncio.to_thread(next, Client(site.path).stream(MEASUREMENTS))

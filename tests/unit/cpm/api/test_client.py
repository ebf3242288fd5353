from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from cpm.api.client import Client, RemoteError
from cpm.api.operations import EVENTS, FENCE, STATUS, Operation
from cpm.api.parameters import Flag, Parameter
from cpm.api.unix_http import Exchange
from cpm.api.views import EventView, StatusView
from cpm.protocol.errors import Unreachable, VirtPortsError
from cpm.protocol.model import DomainUUID, NodeName
from cpm.protocol.walltime import UtcSeconds
from tests.fakes import canned_manager
from tests.fakes.canned_manager import CannedManager, garbage, hang_up, lines, raw, refusal

VIEW = StatusView("0.1.0", 1, UtcSeconds(0.0), 0, 0, 0, "ledger.db")

ASK = Operation("GET", "/v1/status", lambda: StatusView, "", tuple(Parameter(name, "") for name in "abcd"))
CHANGE = Operation("POST", "/v1/x", lambda: StatusView, "", body=lambda: StatusView)
DO = Operation("POST", "/v1/x", lambda: StatusView, "")
REMOVE = Operation("DELETE", "/v1/x/{name}", lambda: StatusView, "", (Parameter("name", ""), Flag("all", "")))


def event(seq: int) -> EventView:
    return EventView(
        seq, UtcSeconds(0.0), "active", "a", DomainUUID("u"), NodeName("n"), IPv4Address("203.0.113.1"), 1024, 1087
    )


@pytest.fixture
def manager() -> Iterator[CannedManager]:
    with canned_manager.running() as fake:
        yield fake


@pytest.fixture
def client(manager: CannedManager) -> Client:
    return Client(manager.path, timeout_s=30.0)


def test_an_answer_is_decoded(manager: CannedManager, client: Client) -> None:
    manager.on("GET /v1/status?a=1&b=x+y", VIEW)
    assert client.call(ASK, a=True, b="x y", c=None, d=False) == VIEW


def test_a_change_sends_its_body(manager: CannedManager, client: Client) -> None:
    manager.on("POST /v1/x", VIEW)
    manager.on("DELETE /v1/x/y?all=1", VIEW)
    assert client.call(CHANGE, VIEW) == VIEW
    assert client.call(DO) == VIEW
    assert client.call(REMOVE, name="y", all=True) == VIEW
    assert [len(body) > 0 for _, body in manager.asked] == [True, False, False]


def test_undeclared_arguments_are_not_sent(manager: CannedManager, client: Client) -> None:
    with pytest.raises(TypeError, match=r"DELETE /v1/x/\{name\} takes \['all', 'name'\], not \['everything', 'name'\]"):
        client.call(REMOVE, name="y", everything=True)
    with pytest.raises(TypeError):
        client.call(REMOVE)
    with pytest.raises(TypeError):
        client.call(CHANGE)
    with pytest.raises(TypeError):
        client.call(DO, VIEW)
    assert manager.asked == []


def test_a_refusal_keeps_code_and_sentence(manager: CannedManager, client: Client) -> None:
    manager.on("GET /v1/status", refusal(409, "ambiguous", "2 VMs are named 'a'"))
    with pytest.raises(RemoteError) as refused:
        client.call(STATUS)
    assert (refused.value.code, str(refused.value)) == ("ambiguous", "2 VMs are named 'a'")
    assert isinstance(refused.value, VirtPortsError)
    assert VirtPortsError.code == RemoteError.code == "error"  # the class is untouched


def test_an_answer_that_cannot_be_decoded_is_an_internal_error(manager: CannedManager, client: Client) -> None:
    manager.on("GET /v1/status", raw(200, b'{"version": "9"}'))
    with pytest.raises(RemoteError, match="must run the same version") as refused:
        client.call(STATUS)
    assert refused.value.code == "internal"


def test_a_stream_yields_lines_before_it_ends(manager: CannedManager, client: Client) -> None:
    taken = threading.Event()
    manager.on("GET /v1/events?after=3&follow=1", lines([event(4), event(5)], then=lambda: taken.wait(60)))
    stream = client.stream(EVENTS, after=3, follow=True)
    assert [next(stream).seq, next(stream).seq] == [4, 5]
    taken.set()
    with pytest.raises(Unreachable, match="the manager ended the stream"):
        next(stream)


def test_a_stream_that_is_not_followed_ends(manager: CannedManager, client: Client) -> None:
    manager.on("GET /v1/events", lines([event(4), event(5)]))
    assert [each.seq for each in client.stream(EVENTS)] == [4, 5]


def test_a_refused_stream_raises_the_error_of_the_manager(manager: CannedManager, client: Client) -> None:
    manager.on("GET /v1/events?after=x", refusal(400, "invalid-request", "after is not a number"))
    with pytest.raises(RemoteError, match="after is not a number"):
        next(client.stream(EVENTS, after="x"))


def test_a_followed_stream_that_ends_is_unreachable(manager: CannedManager, client: Client) -> None:
    def cut(handler: canned_manager.Handler) -> None:
        lines([event(4)], then=lambda: handler.connection.shutdown(socket.SHUT_RDWR))(handler)

    manager.on("GET /v1/events?follow=1", cut)
    stream = client.stream(EVENTS, follow=True)
    assert next(stream).seq == 4
    with pytest.raises(Unreachable, match=r"the manager (closed the connection|ended the stream)"):
        next(stream)


@pytest.mark.parametrize(
    ("answer", "detail"),
    [(hang_up, "the manager closed the connection"), (garbage, "the peer does not speak HTTP")],
)
def test_a_peer_that_is_no_manager_is_unreachable(
    manager: CannedManager, client: Client, answer: canned_manager.Answer, detail: str
) -> None:
    manager.on("GET /v1/status", answer)
    with pytest.raises(Unreachable, match=detail):
        client.call(STATUS)


def test_a_truncated_answer_is_unreachable(manager: CannedManager, client: Client) -> None:
    def short(handler: canned_manager.Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.close_connection = True

    manager.on("GET /v1/status", short)
    with pytest.raises(Unreachable, match="the manager closed the connection"):
        client.call(STATUS)


def test_a_timeout_is_unreachable(manager: CannedManager) -> None:
    waiting = threading.Event()
    manager.on("GET /v1/status", lambda _: waiting.wait(60))
    with pytest.raises(Unreachable, match="no answer in time; see `journalctl -u cpmd`"):
        Client(manager.path, timeout_s=0.05).call(STATUS)
    waiting.set()


def test_a_change_without_an_answer_may_be_made(manager: CannedManager) -> None:
    waiting = threading.Event()
    manager.on("POST /v1/nodes/edge1/fence", lambda _: waiting.wait(60))
    with pytest.raises(Unreachable, match="no answer in time; the change may be made all the same, `virt-ports audit`"):
        Client(manager.path, timeout_s=0.05).call(FENCE, name="edge1")
    waiting.set()
    with pytest.raises(Unreachable) as refused:
        Client(f"{manager.path}.none").call(FENCE, name="edge1")
    assert "may be made" not in str(refused.value), "nothing was sent"


def test_a_missing_socket_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no such socket; run this on the manager"):
        Client(str(tmp_path / "x")).call(STATUS)
    with pytest.raises(Unreachable, match="name another socket with --socket or VIRT_PORTS_SOCKET"):
        Client("/" + "x" * 200).call(STATUS)


def test_a_socket_without_listener_is_unreachable(manager: CannedManager, tmp_path: Path) -> None:
    path = Path(manager.path).with_name("dead")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(Unreachable, match="no process listens there; run this on the manager"):
        Client(str(path)).call(STATUS)


def test_a_socket_without_permission_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may open every socket, so the kernel's answer is made up."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Exchange, "request", refuse)
    with pytest.raises(Unreachable, match=r"permission denied; run this as root or .* see `ls -l /s`"):
        Client("/s").call(STATUS)

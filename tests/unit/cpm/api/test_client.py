from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from cpm.api.client import Client, RemoteError, path_of
from cpm.api.views import EventView, StatusView
from cpm.protocol.errors import Unreachable, VirtPortsError
from cpm.protocol.model import DomainUUID, NodeName
from tests.fakes import canned_manager
from tests.fakes.canned_manager import CannedManager, garbage, hang_up, lines, raw, refusal

STATUS = StatusView("0.1.0", 1, 0.0, 0, 0, 0, "ledger.db")


def event(seq: int) -> EventView:
    return EventView(seq, 0.0, "active", "a", DomainUUID("u"), NodeName("n"), IPv4Address("203.0.113.1"), 1024, 1087)


@pytest.fixture
def manager() -> Iterator[CannedManager]:
    with canned_manager.running() as fake:
        yield fake


@pytest.fixture
def client(manager: CannedManager) -> Client:
    return Client(manager.path, timeout_s=30.0)


def test_get_decodes(manager: CannedManager, client: Client) -> None:
    manager.on("GET /v1/status?a=1&b=x+y", STATUS)
    assert client.get(StatusView, "/v1/status", {"a": True, "b": "x y", "c": None, "d": False}) == STATUS


def test_post_and_delete(manager: CannedManager, client: Client) -> None:
    manager.on("POST /v1/x", STATUS)
    manager.on("DELETE /v1/x", STATUS)
    assert client.post(StatusView, "/v1/x", STATUS) == STATUS
    assert client.post(StatusView, "/v1/x") == STATUS
    assert client.delete(StatusView, "/v1/x") == STATUS
    assert [len(body) > 0 for _, body in manager.asked] == [True, False, False]


def test_a_refusal_keeps_code_and_sentence(manager: CannedManager, client: Client) -> None:
    manager.on("GET /v1/status", refusal(409, "ambiguous", "2 VMs are named 'a'"))
    with pytest.raises(RemoteError) as refused:
        client.get(StatusView, "/v1/status")
    assert (refused.value.code, str(refused.value)) == ("ambiguous", "2 VMs are named 'a'")
    assert isinstance(refused.value, VirtPortsError)
    assert VirtPortsError.code == RemoteError.code == "error"  # the class is untouched


def test_an_answer_of_another_version(manager: CannedManager, client: Client) -> None:
    manager.on("GET /v1/status", raw(200, b'{"version": "9"}'))
    with pytest.raises(RemoteError, match="must run the same version") as refused:
        client.get(StatusView, "/v1/status")
    assert refused.value.code == "internal"


def test_stream_yields_before_the_end(manager: CannedManager, client: Client) -> None:
    taken = threading.Event()
    manager.on("GET /v1/events?after=3&follow=1", lines([event(4), event(5)], then=lambda: taken.wait(60)))
    stream = client.stream(EventView, "/v1/events", {"after": 3}, follow=True)
    assert [next(stream).seq, next(stream).seq] == [4, 5]
    taken.set()
    with pytest.raises(Unreachable, match="the manager ended the stream"):
        next(stream)


def test_stream_without_following_ends(manager: CannedManager, client: Client) -> None:
    manager.on("GET /v1/events", lines([event(4), event(5)]))
    assert [each.seq for each in client.stream(EventView, "/v1/events")] == [4, 5]


def test_stream_refused(manager: CannedManager, client: Client) -> None:
    manager.on("GET /v1/events?after=x", refusal(400, "invalid-request", "after is not a number"))
    with pytest.raises(RemoteError, match="after is not a number"):
        next(client.stream(EventView, "/v1/events", {"after": "x"}))


def test_stream_cut(manager: CannedManager, client: Client) -> None:
    def cut(handler: canned_manager.Handler) -> None:
        lines([event(4)], then=lambda: handler.connection.shutdown(socket.SHUT_RDWR))(handler)

    manager.on("GET /v1/events?follow=1", cut)
    stream = client.stream(EventView, "/v1/events", follow=True)
    assert next(stream).seq == 4
    with pytest.raises(Unreachable, match=r"the manager (closed the connection|ended the stream)"):
        next(stream)


@pytest.mark.parametrize(
    ("answer", "detail"),
    [(hang_up, "the manager closed the connection"), (garbage, "what answers does not speak HTTP")],
)
def test_a_bad_partner(manager: CannedManager, client: Client, answer: canned_manager.Answer, detail: str) -> None:
    manager.on("GET /v1/status", answer)
    with pytest.raises(Unreachable, match=detail):
        client.get(StatusView, "/v1/status")


def test_an_answer_cut_short(manager: CannedManager, client: Client) -> None:
    def short(handler: canned_manager.Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.close_connection = True

    manager.on("GET /v1/status", short)
    with pytest.raises(Unreachable, match="the manager closed the connection"):
        client.get(StatusView, "/v1/status")


def test_no_answer_in_time(manager: CannedManager) -> None:
    waiting = threading.Event()
    manager.on("GET /v1/status", lambda _: waiting.wait(60))
    with pytest.raises(Unreachable, match="no answer in time; see `journalctl -u cpmd`"):
        Client(manager.path, timeout_s=0.05).get(StatusView, "/v1/status")
    waiting.set()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no such socket; is cpmd running"):
        Client(str(tmp_path / "x")).get(StatusView, "/v1/status")
    with pytest.raises(Unreachable, match="name its socket with --socket or VIRT_PORTS_SOCKET"):
        Client("/" + "x" * 200).get(StatusView, "/v1/status")


def test_nobody_listens(manager: CannedManager, tmp_path: Path) -> None:
    path = Path(manager.path).with_name("dead")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(Unreachable, match="nobody listens there; is cpmd running"):
        Client(str(path)).get(StatusView, "/v1/status")


def test_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may open every socket, so the kernel's answer is made up."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cpm.api.client._UnixConnection.connect", refuse)
    with pytest.raises(Unreachable, match=r"permission denied; run this as root or .* see `ls -l /s`"):
        Client("/s").get(StatusView, "/v1/status")


def test_paths() -> None:
    assert path_of("domains", "a/b?c#d e", "history") == "/v1/domains/a%2Fb%3Fc%23d%20e/history"

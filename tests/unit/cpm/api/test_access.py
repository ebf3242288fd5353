"""Who may ask, change something or be a node, with real sockets and the kernel's word on who is at their other end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cpm.api import server
from cpm.api.access import Access, Peer, group_number
from cpm.core.changes import NoteAct
from cpm.ledger import applying
from cpm.protocol.errors import ConfigError, Forbidden
from tests.fakes import cpmd

NOBODY, ADMINS, OTHERS = 65534, 54321, 54322
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user connects")
ADD = ("POST", "/v1/pool", b'{"addresses":["203.0.113.1"]}')


@contextlib.contextmanager
def acting_as(uid: int, *groups: int) -> Iterator[None]:
    """Have the kernel say that this process is another user's."""
    before = os.getgroups()
    os.setgroups(groups)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setgroups(before)


def connected(path: Path, uid: int, *groups: int) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if uid == os.geteuid() and not groups:
        connection.connect(str(path))
    else:
        with acting_as(uid, *groups):
            connection.connect(str(path))
    connection.settimeout(60)
    return connection


def answer(connection: socket.socket, method: str, target: str, body: bytes | None = None) -> tuple[int, str]:
    client = http.client.HTTPConnection("localhost")
    client.sock = connection
    client.request(method, target, body)
    response = client.getresponse()
    text = response.read().decode()
    client.close()
    return response.status, text


@pytest.fixture
async def site() -> AsyncIterator[cpmd.Site]:
    """A manager whose sockets everybody can open: only what the kernel says of the peer decides."""
    async with cpmd.running(read_socket=True) as site:
        site.directory.chmod(0o755)
        for name in ("cpmd.sock", "read.sock"):
            (site.directory / name).chmod(0o666)
        yield site


async def ask(site: cpmd.Site, name: str, request: tuple[str, str, bytes | None], uid: int, *groups: int) -> int:
    connection = connected(site.directory / name, uid, *groups)
    status, text = await asyncio.to_thread(answer, connection, *request)
    assert status != 403 or json.loads(text)["code"] == "forbidden"
    return status


SESSION = ("GET", "/v1/session", None)
LIST = ("GET", "/v1/domains", None)


@ROOT_ONLY
async def test_another_user_may_ask_but_change_nothing_and_be_no_node(site: cpmd.Site) -> None:
    assert await ask(site, "cpmd.sock", LIST, NOBODY) == 200
    assert await ask(site, "cpmd.sock", ADD, NOBODY) == 403
    assert await ask(site, "cpmd.sock", SESSION, NOBODY) == 403
    assert json.loads((await site.ask("GET", "/v1/pool")).body) == []
    assert await ask(site, "cpmd.sock", ADD, 0) == 200
    assert len(json.loads((await site.ask("GET", "/v1/pool")).body)) == 1


async def test_on_the_socket_for_reading_not_even_root_may_change_anything(site: cpmd.Site) -> None:
    me = os.geteuid()
    assert await ask(site, "read.sock", LIST, me) == 200
    assert await ask(site, "read.sock", ADD, me) == 403
    assert await ask(site, "read.sock", ("DELETE", "/v1/nodes/edge1/fence", None), me) == 403
    assert await ask(site, "read.sock", SESSION, me) == 403


async def test_the_sockets_are_for_owner_and_group() -> None:
    async with cpmd.running(read_socket=True) as site:
        for name in ("cpmd.sock", "read.sock"):
            assert (site.directory / name).stat().st_mode & 0o777 == 0o660


@ROOT_ONLY
def test_the_kernel_says_which_user_and_groups_connected(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        tmp_path.chmod(0o755)
        (tmp_path / "s").chmod(0o666)
        for folder in list(tmp_path.parents)[:3]:
            folder.chmod(folder.stat().st_mode | 0o011)
        listener.listen()
        with connected(tmp_path / "s", NOBODY, ADMINS, OTHERS), listener.accept()[0] as accepted:
            peer = Peer.of(accepted)
    assert (peer.pid, peer.uid) == (os.getpid(), NOBODY)
    assert {ADMINS, OTHERS} <= peer.groups
    assert peer.user == "nobody"


@pytest.mark.parametrize("uid", [0, os.geteuid()])
def test_root_and_the_managers_own_user_may_do_everything(uid: int) -> None:
    peer = Peer(1, uid, frozenset())
    Access().check_change(peer)
    Access().check_node(peer)


def test_members_of_the_administrators_group_may_change_something_but_are_no_nodes() -> None:
    access = Access(ADMINS)
    access.check_change(Peer(1, NOBODY, frozenset({ADMINS, OTHERS})))
    for peer in (Peer(1, NOBODY, frozenset({OTHERS})), Peer(1, NOBODY, frozenset())):
        with pytest.raises(Forbidden, match="user 65534 may ask, but not change anything; run this as root"):
            access.check_change(peer)
    with pytest.raises(Forbidden, match="cannot be a node"):
        access.check_node(Peer(1, NOBODY, frozenset({ADMINS})))


def test_a_user_without_a_name_is_a_number() -> None:
    assert Peer(1, 3_999_999_999, frozenset()).user == "3999999999"


def test_a_group_that_is_missing_is_an_error_of_the_settings() -> None:
    assert group_number("cpmd.toml", "") is None
    assert group_number("cpmd.toml", "root") == 0
    with pytest.raises(ConfigError, match=r"listen.admin_group: there is no group 'no-such-group'"):
        group_number("cpmd.toml", "no-such-group")


async def audit(site: cpmd.Site) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = json.loads((await site.ask("GET", "/v1/audit")).body)
    return entries


@ROOT_ONLY
async def test_a_change_is_recorded_with_the_one_who_made_it() -> None:
    async with cpmd.running(admin_group="nogroup") as site:
        site.directory.chmod(0o755)
        (site.directory / "cpmd.sock").chmod(0o666)
        group = group_number("", "nogroup")
        assert group is not None
        assert await ask(site, "cpmd.sock", ADD, NOBODY, group) == 200
        assert await ask(site, "cpmd.sock", ("DELETE", "/v1/nodes/edge1/fence", None), NOBODY, group) == 404
        assert await ask(site, "cpmd.sock", LIST, NOBODY, group) == 200
        assert [{**entry, "at": 0} for entry in await audit(site)] == [
            {
                "seq": 1, "at": 0, "user": "nobody", "uid": NOBODY, "pid": os.getpid(), "request": "POST /v1/pool",
                "body": '{"addresses":["203.0.113.1"],"reserved":null,"pool":null}',
            }
        ]  # fmt: skip


async def test_a_long_request_is_cut_in_the_record() -> None:
    async with cpmd.running() as site:
        addresses = [f"203.0.113.{number}" for number in range(1, 255)]
        await site.ask("POST", "/v1/pool", json.dumps({"addresses": addresses}).encode())
        [entry] = await audit(site)
    assert str(entry["body"]).startswith('{"addresses":["203.0.113.1",')
    assert len(str(entry["body"])) == 1025


async def test_a_change_and_its_record_are_made_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cpmd.running() as site:

        def refuse(*_: object) -> None:
            raise sqlite3.IntegrityError("no")

        monkeypatch.setitem(applying._APPLY, NoteAct, refuse)
        assert (await site.ask(*ADD)).status != 200
        assert json.loads((await site.ask("GET", "/v1/pool")).body) == []
        monkeypatch.undo()


async def test_only_the_newest_changes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applying, "ACTS_KEPT", 3)
    async with cpmd.running() as site:
        for _ in range(5):
            await site.ask(*ADD)
        assert [entry["seq"] for entry in await audit(site)] == [3, 4, 5]


async def test_one_user_has_a_limited_number_of_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those whose client is gone end by themselves, also without news."""
    monkeypatch.setattr(server, "MOST_OF_USER", 3)
    monkeypatch.setattr(server, "GONE_S", 0.01)
    async with cpmd.running() as site:
        started = [asyncio.Event() for _ in range(3)]
        streams = [asyncio.create_task(site.lines("/v1/events?follow=1", 1, each)) for each in started]
        for each in started:
            await asyncio.wait_for(each.wait(), 60)
        refused = await site.ask("GET", "/v1/status")
        assert (refused.status, json.loads(refused.body)["code"]) == (503, "busy")
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        while (await site.ask("GET", "/v1/status")).status != 200:
            await asyncio.sleep(0.002)

"""A site whose certificates are renewed: cpmd and a node's session go on, and whoever comes next sees the new ones."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import socket
import ssl
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import aiohttp
import pytest

from cpm import settings
from cpm.api import session
from cpm.daemon import Cpmd
from cpm.install.pki import Authority
from cpm.protocol.messages import PROTOCOL, Hello, ManagerMessage, Welcome
from cpm.protocol.model import NodeName, Role
from cpm.service.certificates import Files, LiveContext
from tests.fakes.cpmd import _approve, _short_directory

NOW = time.time()
DAY = 86400
NODE, ADDRESS = NodeName("host1"), IPv4Address("172.30.0.11")


class Node:
    """Says hello on each connection, and counts how they begin and end."""

    def __init__(self, url: str, live: LiveContext) -> None:
        self.session = session.Session(url, self, lambda: live.context, lambda: 0.0)
        self.began = 0
        self.ended: list[str] = []
        self.welcome = asyncio.Event()

    def on_connected(self) -> None:
        self.began += 1
        self.session.send(Hello(PROTOCOL, NODE, frozenset({Role.HOST}), ADDRESS, "0", 0, ()))

    def on_message(self, message: ManagerMessage) -> None:
        if isinstance(message, Welcome):
            self.welcome.set()

    def on_disconnected(self, reason: str) -> None:
        self.ended.append(reason)


async def seen_end(port: int, context: ssl.SSLContext) -> float:
    """Return when the certificate ends that a new connection gets to see."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    certificate = writer.get_extra_info("peercert")
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return float(ssl.cert_time_to_seconds(certificate["notAfter"]))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture
def folder() -> Iterator[Path]:
    with _short_directory() as path:
        yield path


@pytest.mark.parametrize("is_asked", [True, False], ids=["by SIGHUP", "by itself"])
async def test_a_site_is_renewed_and_no_session_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, is_asked: bool
) -> None:
    monkeypatch.setattr("cpm.service.certificates.FOLLOW_S", 3600.0 if is_asked else 0.05)
    authority = Authority(folder)
    authority.create(NOW - 200 * DAY)
    for name in ("127.0.0.1", NODE):
        authority.issue(name, NOW - 100 * DAY)
    port = free_port()
    listen = settings.ListenSettings(
        socket=str(folder / "s"), address=f"127.0.0.1:{port}", certificate=str(folder / "127.0.0.1.pem"),
        key=str(folder / "127.0.0.1.key"), ca=str(folder / "ca.pem"),
    )  # fmt: skip
    ledger = settings.LedgerSettings(path=str(folder / "ledger.db"))
    (folder / "cpmd.toml").write_text("")
    cpmd = Cpmd(settings.Settings(listen=listen, ledger=ledger), folder / "cpmd.toml")
    await cpmd.start()
    files = Files(str(folder / f"{NODE}.pem"), str(folder / f"{NODE}.key"), str(folder / "ca.pem"))
    build = functools.partial(session.tls_context, files.certificate, files.key, str(folder / "ca.pem"))
    live = LiveContext("manager", files, build, is_server=False)
    node = Node(f"https://127.0.0.1:{port}", live)
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(listen.socket)) as http:
        await _approve(http, NODE, str(ADDRESS), frozenset({Role.HOST}))
    running = asyncio.create_task(node.session.run())
    async with asyncio.timeout(60):
        await node.welcome.wait()
    before = await seen_end(port, live.context)

    for name in ("127.0.0.1", NODE):
        authority.renew(name, NOW)
    live.refresh()
    if is_asked:
        cpmd.on_hangup()
    async with asyncio.timeout(60):
        while await seen_end(port, live.context) == before:
            await asyncio.sleep(0.05)
    assert round(await seen_end(port, live.context) - before) == 100 * DAY
    assert (node.began, node.ended) == (1, []), "the session goes on"
    metrics = "".join(cpmd._metrics(cpmd._about))
    (shown,) = re.findall(r'^virt_ports_certificate_end_timestamp_seconds\{of="listen"\} (\S+)$', metrics, re.M)
    assert float(shown) == before + 100 * DAY
    assert 'virt_ports_certificate_end_timestamp_seconds{of="listen-ca"}' in metrics
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await cpmd.stop()

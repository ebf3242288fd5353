"""Renewed certificates are shown to who comes next, and nobody who is connected notices."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from cpm.api import server, session
from cpm.install.pki import DAYS, Authority
from cpm.service import certificates
from cpm.service.certificates import Files, LiveContext, end_of, handshake

NOW = time.time()
DAY = 86400
MANAGER, NODE = "127.0.0.1", "host1"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return new_authority(tmp_path / "pki")


def new_authority(folder: Path) -> Authority:
    """Make one that issued its certificates a hundred days ago."""
    authority = Authority(folder)
    authority.create(NOW - 200 * DAY)
    for name in (MANAGER, NODE):
        authority.issue(name, NOW - 100 * DAY)
    return authority


def files_of(folder: Path, name: str) -> Files:
    return Files(str(folder / f"{name}.pem"), str(folder / f"{name}.key"), str(folder / "ca.pem"))


def of_manager(folder: Path) -> LiveContext:
    files = files_of(folder, MANAGER)
    return LiveContext(
        "listen",
        files,
        functools.partial(server.tls_context, files.certificate, files.key, files.ca or ""),
        is_server=True,
    )


def of_node(folder: Path, name: str = NODE) -> LiveContext:
    files = files_of(folder, name)
    return LiveContext(
        "manager",
        files,
        functools.partial(session.tls_context, files.certificate, files.key, files.ca or ""),
        is_server=False,
    )


@contextlib.asynccontextmanager
async def echoing(context: ssl.SSLContext) -> AsyncIterator[int]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while text := await reader.readline():
                writer.write(text)
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0, ssl=context) as listening:
        yield listening.sockets[0].getsockname()[1]


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @property
    def sees(self) -> float:
        """When the certificate of the server ends."""
        certificate = self._writer.get_extra_info("peercert")
        return float(ssl.cert_time_to_seconds(certificate["notAfter"]))

    async def is_answered(self) -> bool:
        self._writer.write(b"x\n")
        try:
            return await asyncio.wait_for(self._reader.readline(), 30) == b"x\n"
        except (OSError, asyncio.IncompleteReadError):
            return False

    def close(self) -> None:
        self._writer.close()


async def connect(port: int, context: ssl.SSLContext) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", port, ssl=context))


def test_a_listener_shows_a_renewed_certificate_and_ends_no_connection(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "pki"

    async def story() -> None:
        live, node = of_manager(folder), of_node(folder)
        before = live.ends["listen"]
        async with echoing(live.for_listener()) as port:
            early = await connect(port, node.context)
            assert await early.is_answered()
            authority.renew(MANAGER, NOW)
            live.refresh()
            late = await connect(port, node.context)
            assert live.ends["listen"] == late.sees == before + 100 * DAY
            assert early.sees == before
            assert await early.is_answered()
            assert await late.is_answered()
            for each in (early, late):
                each.close()

    # As the daemons do.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story())


async def test_a_listener_believes_a_new_authority_and_no_longer_the_former_one(
    authority: Authority, tmp_path: Path
) -> None:
    folder, other = tmp_path / "pki", tmp_path / "other"
    new_authority(other)
    shutil.copytree(folder, tmp_path / "former")
    live, former = of_manager(folder), of_node(folder).context
    async with echoing(live.for_listener()) as port:
        early = await connect(port, former)
        assert await early.is_answered()
        shutil.copytree(other, folder, dirs_exist_ok=True)
        live.refresh()
        late = await connect(port, of_node(folder).context)
        assert await late.is_answered()
        assert await early.is_answered()
        # It has a certificate of the former authority, and believes the new one.
        stale = session.tls_context(
            str(tmp_path / "former" / f"{NODE}.pem"), str(tmp_path / "former" / f"{NODE}.key"), str(folder / "ca.pem")
        )
        refused = await connect(port, stale)
        assert not await refused.is_answered()
        for each in (early, late, refused):
            each.close()


async def test_while_authorities_change_both_can_be_believed(authority: Authority, tmp_path: Path) -> None:
    folder, other = tmp_path / "pki", tmp_path / "other"
    new_authority(other)
    live = of_manager(folder)
    both = (folder / "ca.pem").read_bytes() + (other / "ca.pem").read_bytes()
    (folder / "ca.pem").write_bytes(both)
    (other / "ca.pem").write_bytes(both)
    live.refresh()
    for each in (folder, other):
        handshake(live.context, of_node(each).context)


def test_a_node_shows_a_renewed_certificate(authority: Authority, tmp_path: Path) -> None:
    live = of_node(tmp_path / "pki")
    authority.renew(NODE, NOW)
    live.refresh()
    shown = handshake(of_manager(tmp_path / "pki").context, live.context)
    assert ssl.cert_time_to_seconds(shown["notAfter"]) == int(NOW) + DAYS * DAY


def test_files_that_do_not_belong_together_are_not_taken_until_they_do(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody copies them one after the other."""
    folder, other = tmp_path / "pki", tmp_path / "other"
    new_authority(other).renew(MANAGER, NOW - 50 * DAY)
    live = of_manager(folder)
    before = live.ends["listen"]
    shutil.copy(other / f"{MANAGER}.pem", folder)
    for _ in range(3):
        live.refresh()
    assert live.ends["listen"] == before
    assert [record.message for record in caplog.records if "the key is not that of the certificate" in record.message]
    assert len(caplog.records) == 1, "said once"
    assert "put a certificate, its key and its CA into" in caplog.text
    handshake(live.context, of_node(folder).context)
    for name in (f"{MANAGER}.key", "ca.pem"):
        shutil.copy(other / name, folder)
    live.refresh()
    assert live.ends["listen"] == before + 50 * DAY


@pytest.mark.parametrize("name", ["127.0.0.1.pem", "127.0.0.1.key", "ca.pem"])
def test_a_file_that_vanishes_changes_nothing(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    live = of_manager(tmp_path / "pki")
    (tmp_path / "pki" / name).unlink()
    live.refresh()
    handshake(live.context, client(tmp_path))
    assert "No such file or directory" in caplog.text


def client(tmp_path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(tmp_path / "pki" / f"{NODE}.pem", tmp_path / "pki" / f"{NODE}.key")
    return context


async def test_they_are_followed_by_themselves(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "FOLLOW_S", 0.01)
    live = of_manager(tmp_path / "pki")
    before = live.ends["listen"]
    following = asyncio.create_task(certificates.follow([live]))
    authority.renew(MANAGER, NOW)
    async with asyncio.timeout(60):
        while live.ends["listen"] == before:
            await asyncio.sleep(0.01)
    following.cancel()


@pytest.mark.parametrize("is_server", [True, False])
@pytest.mark.parametrize("since_days", [0, DAYS + 1, -3])
def test_the_end_of_a_certificate_is_known_whatever_the_time(
    authority: Authority, tmp_path: Path, since_days: int, *, is_server: bool
) -> None:
    issued = authority.issue("host2", NOW - since_days * DAY)
    assert end_of(str(issued.certificate), str(issued.key), is_server=is_server) == issued.ends


def test_the_ends_of_all_have_the_names_of_their_tables(authority: Authority, tmp_path: Path) -> None:
    found = dict(certificates.ends([of_manager(tmp_path / "pki"), of_node(tmp_path / "pki")]))
    assert set(found) == {("listen",), ("listen-ca",), ("manager",), ("manager-ca",)}
    assert found["listen-ca",] == authority.issued()[-1].ends

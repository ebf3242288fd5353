"""The address for Prometheus: what it answers, and what slow, greedy and strange clients get. Real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import trustme

from cpm.api import bounded_listener, scraping
from cpm.api.scraping import Scraping
from cpm.protocol.errors import ConfigError
from cpm.service.metrics.process import process_metrics
from cpm.service.metrics.settings import MetricsListen as Listen
from cpm.service.metrics.settings import split_address
from tests.promtool import check_metrics

TEXT = "# HELP virt_ports_x A thing.\n# TYPE virt_ports_x gauge\nvirt_ports_x 1\n"


def pieces() -> Iterator[str]:
    yield ""
    yield from TEXT.splitlines(keepends=True)


@contextlib.asynccontextmanager
async def serving(listen: Listen, make: scraping.Pieces = pieces) -> AsyncIterator[tuple[str, int]]:
    served = Scraping("cpmd.toml", listen, make)
    task = asyncio.create_task(served.run())
    try:
        async with asyncio.timeout(30):
            while served.address is None:
                await asyncio.sleep(0.005)
        yield served.address
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def ask(address: tuple[str, int], method: str = "GET", path: str = "/metrics") -> tuple[int, str, str]:
    async with (
        aiohttp.ClientSession() as http,
        http.request(method, f"http://{address[0]}:{address[1]}{path}") as answer,
    ):
        return answer.status, answer.headers.get("Content-Type", ""), await answer.text()


ANYWHERE = Listen(address="127.0.0.1:0")


async def test_it_answers_in_prometheus_text_format_and_ends_the_connection() -> None:
    async with serving(ANYWHERE) as address:
        assert await ask(address) == (200, "text/plain; version=0.0.4; charset=utf-8", TEXT)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert TEXT.splitlines()[2].encode() in await asyncio.wait_for(reader.read(), 30)
        writer.close()


@pytest.mark.parametrize(("method", "path", "status"), [
    ("POST", "/metrics", 405), ("DELETE", "/metrics", 405), ("GET", "/v1/domains", 404), ("POST", "/v1/pool", 404),
    ("GET", "/v1/session", 404), ("HEAD", "/metrics", 405),
])  # fmt: skip
async def test_there_is_nothing_else(method: str, path: str, status: int) -> None:
    async with serving(ANYWHERE) as address:
        assert (await ask(address, method, path))[0] == status


async def test_an_address_in_use_is_said_and_taken_once_it_is_free(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_listener, "AGAIN_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        served = Scraping("natd.toml", Listen(address=f"127.0.0.1:{port}"), pieces)
        task = asyncio.create_task(served.run())
        while not caplog.records:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert len(caplog.records) == 1, "said once"
        assert f"127.0.0.1:{port}" in caplog.text
        assert "[metrics] of natd.toml" in caplog.text
        assert not task.done()
    async with asyncio.timeout(30):
        while served.address is None:
            await asyncio.sleep(0.01)
    assert (await ask(served.address))[0] == 200
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_connections_beyond_the_limit_are_closed_at_once() -> None:
    async with serving(ANYWHERE) as address:
        held = [await asyncio.open_connection(*address) for _ in range(scraping.MOST_CONNECTIONS)]
        await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_connection(*address)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        for _, each in held:
            each.close()
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    if (await ask(address))[0] == 200:
                        break
                await asyncio.sleep(0.01)


async def test_who_says_nothing_or_reads_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_listener, "CONNECTION_S", 0.3)
    made = 0

    def endless() -> Iterator[str]:
        nonlocal made
        while True:
            made += 1
            yield "x" * 65536

    async with serving(ANYWHERE, endless) as address:
        silent, silent_writer = await asyncio.open_connection(*address)
        _, deaf_writer = await asyncio.open_connection(*address)
        deaf_writer.transport.pause_reading()  # type: ignore[attr-defined]
        deaf_writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(silent.read(), 30) == b""
        await asyncio.sleep(0.5)
        stopped_at = made
        await asyncio.sleep(0.2)
        assert made == stopped_at, "nothing is made for a client that was cut off"
        assert made * 65536 < 64 * 1024 * 1024, "what is made waits until it is read"
        silent_writer.close()
        deaf_writer.close()


async def test_others_have_their_turn_while_a_long_answer_is_made() -> None:
    def long() -> Iterator[str]:
        for _ in range(100):
            until = time.perf_counter() + 0.001
            while time.perf_counter() < until:
                pass
            yield "x\n"

    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with serving(ANYWHERE, long) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readline()
        counting = asyncio.create_task(count())
        await reader.read()
        counting.cancel()
        writer.close()
    assert turns > 10


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


async def test_tls_admits_only_clients_with_a_certificate_of_the_ca(authority: trustme.CA, tmp_path: Path) -> None:
    issued, stranger = authority.issue_cert("localhost"), trustme.CA()
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    files = {"certificate": "cert.pem", "key": "key.pem", "client_ca": "ca.pem"}
    listen = Listen(address="127.0.0.1:0", **{key: str(tmp_path / name) for key, name in files.items()})

    def client(by: trustme.CA | None) -> ssl.SSLContext:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if by is not None:
            by.issue_cert("prometheus").configure_cert(context)
        return context

    async with serving(listen) as (_, port), aiohttp.ClientSession() as http:
        url = f"https://localhost:{port}/metrics"
        async with http.get(url, ssl=client(authority)) as answer:
            assert await answer.text() == TEXT
        for refused in (client(None), client(stranger)):
            with pytest.raises((aiohttp.ClientError, ConnectionError)):
                await http.get(url, ssl=refused)
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await http.get(f"http://localhost:{port}/metrics")


async def asked_with(address: tuple[str, int], authorization: str | None) -> int:
    headers = {"Authorization": authorization} if authorization is not None else {}
    url = f"http://{address[0]}:{address[1]}/metrics"
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as answer:
        text = await answer.text()
        assert (text == TEXT) == (answer.status == 200)
        assert answer.status == 200 or answer.headers["WWW-Authenticate"] == "Bearer"
        return answer.status


async def test_only_who_shows_the_token_may_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "token").write_text("s3cret-one\n")
    async with serving(Listen(address="127.0.0.1:0", token_file=str(tmp_path / "token"))) as address:
        assert await asked_with(address, "Bearer s3cret-one") == 200
        assert await asked_with(address, "bearer  s3cret-one ") == 200
        for wrong in (
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer s3cret",
            "Basic s3cret-one",
            "s3cret-one",
            "Bearer é\udc80",
        ):
            assert await asked_with(address, wrong) == 401, wrong
        (tmp_path / "token").write_text("another\n")
        assert await asked_with(address, "Bearer s3cret-one") == 401, "it was renewed"
        assert await asked_with(address, "Bearer another") == 200
        assert not caplog.records
        for text in ("", "\n", "two\nlines\x00"):
            (tmp_path / "token").write_text(text)
            for shown in ("Bearer ", "Bearer another", f"Bearer {text.strip()[:3]}"):
                assert await asked_with(address, shown) == 401, "no token lets nobody in"
        (tmp_path / "token").unlink()
        assert await asked_with(address, "Bearer ") == 401
        assert "nobody can read metrics" in caplog.text
        assert "another" not in caplog.text


def test_a_certificate_that_cannot_be_read_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Scraping("cpmd.toml", Listen("127.0.0.1:0", str(tmp_path / "no.pem"), str(tmp_path / "no.key")), pieces)


@pytest.mark.parametrize(
    ("listen", "key"),
    [
        (Listen(address="127.0.0.1"), "metrics.address"),
        (Listen(address="9417"), "metrics.address"),
        (Listen(address="127.0.0.1:99999"), "metrics.address"),
        (Listen(certificate="c"), "metrics.key"),
        (Listen(key="c"), "metrics.key"),
        (Listen(client_ca="c"), "metrics.client_ca"),
        (Listen(token_file="token"), "metrics.token_file"),
    ],
)
def test_settings_that_make_no_sense_are_refused(listen: Listen, key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        listen.check("cpmd.toml")
    assert raised.value.key == key


def test_an_address_of_version_6_is_in_brackets() -> None:
    assert split_address("cpmd.toml", "metrics.address", "[::1]:9417") == ("::1", 9417)


def test_the_metrics_of_the_process_have_the_usual_names() -> None:
    text = process_metrics()
    assert check_metrics(text) == ""
    assert "process_cpu_seconds_total" in text


async def test_who_does_not_even_greet_counts_too(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs a file descriptor, of which the manager's nodes need one each."""
    monkeypatch.setattr(bounded_listener, "HANDSHAKE_S", 0.5, raising=False)
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    listen = Listen(address="127.0.0.1:0", certificate=str(tmp_path / "cert.pem"), key=str(tmp_path / "key.pem"))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    async with serving(listen) as (host, port):
        silent = [await asyncio.open_connection(host, port) for _ in range(4 * scraping.MOST_CONNECTIONS)]
        ends = [asyncio.create_task(reader.read()) for reader, _ in silent]
        await asyncio.sleep(0.2)
        assert sum(not end.done() for end in ends) <= scraping.MOST_CONNECTIONS
        async with asyncio.timeout(30):
            await asyncio.gather(*ends, return_exceptions=True)  # the others once their time is over
        async with aiohttp.ClientSession() as http, http.get(f"https://localhost:{port}/metrics", ssl=trust) as answer:
            assert await answer.text() == TEXT
        for _, each in silent:
            each.close()


async def test_a_name_that_is_none_is_an_address_that_cannot_be_used(caplog: pytest.LogCaptureFixture) -> None:
    task = asyncio.create_task(Scraping("cpmd.toml", Listen(address="a..b:9417"), pieces).run())
    async with asyncio.timeout(30):
        while not caplog.records:
            await asyncio.sleep(0.01)
    assert not task.done(), "its end would be that of cpmd"
    assert "no metrics on a..b:9417" in caplog.text
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

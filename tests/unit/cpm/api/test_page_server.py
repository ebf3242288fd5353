"""The page's address: who may read, by which name, what else there is not, and what each answer forbids browsers."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import aiohttp
import pytest
import trustme

from cpm.api import bounded_listener
from cpm.api.page_server import HEADERS, MOST_CONNECTIONS, File, PageServer, is_known_host
from cpm.protocol.errors import NotFound
from cpm.service.metrics.settings import Listen

PLAIN = Listen(address="127.0.0.1:0")


class Pages:
    """A first page, one that fails, and one that is not there."""

    files: ClassVar = {"page.css": File("text/css", b"a{}")}
    names = ("", "vm", "broken")

    def __init__(self) -> None:
        self.at_once = self.most_at_once = 0

    async def page(self, name: str, query: Mapping[str, str]) -> Iterator[str]:
        if name == "vm":
            raise NotFound("VM", query.get("id", ""), "see the list")
        if name == "broken":
            raise RuntimeError("a bug")
        return self._pieces()

    def _pieces(self) -> Iterator[str]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        for _ in range(2000):
            yield "<p>ports"
        self.at_once -= 1

    def problem(self, title: str, text: str) -> Iterator[str]:
        yield f"<title>{title}</title>{text}"


@contextlib.asynccontextmanager
async def serving(pages: Pages, names: tuple[str, ...] = (), listen: Listen = PLAIN) -> AsyncIterator[str]:
    server = PageServer(listen, names, pages)
    task = asyncio.create_task(server.run())
    try:
        async with asyncio.timeout(30):
            while server.address is None:
                await asyncio.sleep(0.005)
        yield "http://{}:{}/".format(*server.address)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_every_answer_forbids_what_pages_may_not_do(http: aiohttp.ClientSession) -> None:
    async with serving(Pages()) as url:
        for path, status in (("", 200), ("page.css", 200), ("vm?id=x", 404), ("nothing", 404), ("broken", 500)):
            async with http.get(url + path) as answer:
                assert answer.status == status, path
                assert HEADERS.items() <= dict(answer.headers).items()
                assert answer.headers["Connection"] == "close"
                kept = answer.headers["Cache-Control"]
                assert kept == ("no-store" if path != "page.css" else "private, max-age=31536000, immutable")
                assert answer.headers["Content-Type"].endswith("; charset=utf-8")
                assert "Access-Control-Allow-Origin" not in answer.headers
                assert "a bug" not in await answer.text()
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"])
@pytest.mark.parametrize("path", ["", "vm", "page.css"])
async def test_there_is_nothing_but_get(http: aiohttp.ClientSession, method: str, path: str) -> None:
    async with serving(Pages()) as url, http.request(method, url + path) as answer:
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET"
        assert answer.headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize("path", ["v1/status", "v1/domains", "v1/pool", "v1/session", "metrics", "../page.css"])
async def test_operators_requests_are_not_served(http: aiohttp.ClientSession, path: str) -> None:
    async with serving(Pages()) as url:
        for method in ("GET", "POST", "PATCH"):
            async with http.request(method, url + path) as answer:
                assert answer.status in (404, 405) or path.endswith("page.css")


@pytest.mark.parametrize(("host", "is_known"), [
    ("127.0.0.1:7480", True), ("127.0.0.1", True), ("[::1]:7480", True), ("[::1]", True), ("localhost:8080", True),
    ("LOCALHOST", True), ("status.example.net", True), ("Status.Example.NET:443", True), ("192.0.2.7", True),
    ("evil.example", False), ("evil.example:7480", False), ("", False), ("localhost.evil.example", False),
    ("127.0.0.1.evil.example:7480", False), ("status.example.net.evil.example", False), ("2130706433:7480", False),
    ("localhost:7480@evil.example", False), ("[::1", False), ("127.0.0.1:", False), ("\N{KELVIN SIGN}", False),
])  # fmt: skip
def test_only_addresses_and_names_in_the_settings_are_known(host: str, is_known: bool) -> None:
    assert is_known_host(host, frozenset({"status.example.net"})) == is_known


async def test_a_name_that_was_pointed_here_gets_nothing(http: aiohttp.ClientSession) -> None:
    async with serving(Pages(), ("Status.example.net",)) as url:
        async with http.get(url, headers={"Host": "evil.example:7480"}) as answer:
            assert answer.status == 421
            text = await answer.text()
            assert "[page]" in text
            assert "<p>ports" not in text
        async with http.get(url + "page.css", headers={"Host": "evil.example"}) as answer:
            assert answer.status == 421
        async with http.get(url, headers={"Host": "status.example.net"}) as answer:
            assert answer.status == 200


async def test_one_page_is_made_at_a_time(http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_listener, "STEP_S", 0.0)
    pages = Pages()
    async with serving(pages) as url:

        async def read() -> int:
            async with http.get(url) as answer:
                return len(await answer.read())

        assert set(await asyncio.gather(*(read() for _ in range(8)))) == {2000 * len("<p>ports")}
    assert pages.most_at_once == 1


async def test_connections_beyond_the_limit_are_closed_at_once() -> None:
    async with serving(Pages()) as url:
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(MOST_CONNECTIONS)]
        await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 30) == b""
        for each in (writer, *(other for _, other in held)):
            each.close()


@pytest.mark.parametrize("asks_for_certificates", [False, True])
async def test_it_speaks_https_and_admits_whom_the_settings_say(tmp_path: Path, *, asks_for_certificates: bool) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    client_ca = str(tmp_path / "ca.pem") if asks_for_certificates else None
    listen = Listen("127.0.0.1:0", str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"), client_ca)

    def browser(by: trustme.CA | None) -> ssl.SSLContext:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if by is not None:
            by.issue_cert("browser").configure_cert(context)
        return context

    async with serving(Pages(), listen=listen) as url, aiohttp.ClientSession() as http:
        secure = url.replace("http://127.0.0.1", "https://localhost")
        async with http.get(secure, ssl=browser(authority)) as answer:
            assert (answer.status, await answer.text()) == (200, "<p>ports" * 2000)
            assert HEADERS.items() <= dict(answer.headers).items()
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await http.get(url)
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await http.get(secure)  # by the CAs of the system
        for other in (browser(None), browser(stranger)):
            if asks_for_certificates:
                with pytest.raises((aiohttp.ClientError, ConnectionError)):
                    await http.get(secure, ssl=other)
            else:
                async with http.get(secure, ssl=other) as answer:
                    assert answer.status == 200


def test_a_certificate_that_cannot_be_read_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        PageServer(Listen("127.0.0.1:0", str(tmp_path / "no.pem"), str(tmp_path / "no.key")), (), Pages())

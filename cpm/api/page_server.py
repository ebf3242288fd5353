"""
Serves the status page to browsers, on a TCP address of its own: ``GET`` only, and nothing that changes anything.

Whoever reaches the address may read; the machine, a proxy or a certificate decides who that is. What is decided here is
which web sites of others may read through somebody's browser: none. A site whose name was pointed at our address (DNS
rebinding) is refused by its ``Host`` header; no other origin gets to see an answer, and none may frame it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Final, NamedTuple, Protocol

from aiohttp import web

from cpm.api.bounded_listener import BoundedListener, steps
from cpm.api.disconnects import Handler, ignore_disconnects
from cpm.protocol.errors import VirtPortsError
from cpm.service.metrics.settings import Listen

log = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 32
"""Connections at once; a further one is closed. A browser opens up to six."""

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Server": "cpmd",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
"""Of every answer."""

KEPT: Final = "private, max-age=31536000, immutable"
NOT_KEPT: Final = "no-store"


class File(NamedTuple):
    """Something that is the same for everybody."""

    content_type: str
    body: bytes


class Pages(Protocol):
    """Makes the pages."""

    @property
    def files(self) -> Mapping[str, File]:
        """What the pages refer to, by name."""

    @property
    def names(self) -> Collection[str]:
        """The names of the pages; the empty one is the first."""

    async def page(self, name: str, query: Mapping[str, str]) -> Iterator[str]:
        """
        Return the HTML of a page in small pieces.

        :raise VirtPortsError: When it does not exist, or what it is about.
        """

    def problem(self, title: str, text: str) -> Iterator[str]:
        """Return a page that says why there is no other."""


class PageServer(BoundedListener):
    """
    Serves the pages on one address.

    :param listen: Where.
    :param names: Names, besides addresses and ``localhost``, by which browsers may call it.
    :param pages: Makes them.
    :raise OSError: When the certificate cannot be read or used.
    """

    def __init__(self, listen: Listen, names: Collection[str], pages: Pages) -> None:
        super().__init__("cpmd.toml", "page", listen, MOST_CONNECTIONS, self._app)
        self._hosts = frozenset(name.casefold() for name in names)
        self._pages = pages
        self._making = asyncio.Lock()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=1024, middlewares=[ignore_disconnects, self._guard])
        for name in self._pages.names:
            app.router.add_get(f"/{name}", self._page, allow_head=False)
        for name in self._pages.files:
            app.router.add_get(f"/{name}", self._file, allow_head=False)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer errors with a page, and everything with the same headers and the end of the connection."""
        response: web.StreamResponse
        if not is_known_host(request.headers.get("Host", ""), self._hosts):
            text = (
                "This name is not known here. If it is the right one, add it to names in [page] of cpmd.toml and "
                "restart cpmd; IP addresses and localhost need not be added."
            )
            response = await self._problem(421, "Unknown name", text)
        else:
            try:
                response = await handler(request)
            except VirtPortsError as error:
                response = await self._problem(
                    error.http_status, "Not found" if error.http_status == 404 else "That failed", str(error)
                )
            except web.HTTPMethodNotAllowed as error:
                response = await self._problem(error.status, "Read-only", "Pages here can only be read, by GET.")
                response.headers["Allow"] = "GET"
            except web.HTTPException as error:
                response = await self._problem(error.status, error.reason, "There is no such page.")
            except Exception:
                log.exception("page %s failed", request.path)
                text = "cpmd could not make this page; its log has the reason: journalctl -u cpmd"
                response = await self._problem(500, "That failed", text)
        response.force_close()
        response.headers.update(HEADERS)
        return response

    async def _page(self, request: web.Request) -> web.StreamResponse:
        # One page is made at a time, so that many readers take no more turns from the manager than one.
        async with self._making:
            body = await steps(await self._pages.page(request.path.removeprefix("/"), request.query))
        return _html(body)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        file = self._pages.files[request.path.removeprefix("/")]
        headers = {"Cache-Control": KEPT}
        return web.Response(body=file.body, content_type=file.content_type, charset="utf-8", headers=headers)

    async def _problem(self, status: int, title: str, text: str) -> web.StreamResponse:
        return _html(await steps(self._pages.problem(title, text)), status)


def _html(body: bytes, status: int = 200) -> web.Response:
    headers = {"Cache-Control": NOT_KEPT}
    return web.Response(body=body, status=status, content_type="text/html", charset="utf-8", headers=headers)


def is_known_host(host: str, names: Collection[str]) -> bool:
    """
    Return whether a browser may call us by this ``Host``: an address, ``localhost``, or one of the names.

    A page of another site whose name was pointed at us after it was loaded sends that name.
    """
    name, colon, port = host.casefold().rpartition(":")
    if not colon or not port.isdecimal():
        name = host.casefold()
    if name == "localhost" or name in names:
        return True
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
        return True
    return False

"""Serves metrics to Prometheus, on a TCP address of its own: reads only, and nothing but ``/metrics``."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

from aiohttp import web

from cpm.api.bounded_listener import STEP_S, BoundedListener
from cpm.api.disconnects import ignore_disconnects
from cpm.service import tokens
from cpm.service.metrics.settings import MetricsListen
from cpm.service.metrics.values import CONTENT_TYPE

log = logging.getLogger(__name__)

PATH: Final = "/metrics"

MOST_CONNECTIONS: Final = 16
"""Connections at once; a further one is closed. A site has two Prometheus servers, and somebody with a browser."""

STEP_BYTES: Final = 64 * 1024
"""Characters of an answer after which they are sent: encoding and sending megabytes takes long, too."""

Pieces = Callable[[], Iterator[str]]
"""Returns the text in small pieces."""


async def send(
    request: web.Request, content_type: str, pieces: Iterator[str], *, is_last: bool = False
) -> web.StreamResponse:
    """
    Answer with a text that is made while it is sent; others have their turn every
    :data:`~cpm.api.bounded_listener.STEP_S` seconds and :data:`STEP_BYTES` characters.

    :param is_last: The connection ends after it.
    :raise ConnectionError: When the client is gone.
    """
    response = web.StreamResponse(headers={"Content-Type": content_type})
    if is_last:
        response.force_close()
    await response.prepare(request)
    made: list[str] = []
    size, until = 0, time.perf_counter() + STEP_S
    for piece in pieces:
        made.append(piece)
        size += len(piece)
        if size >= STEP_BYTES or time.perf_counter() >= until:
            if size:
                await response.write("".join(made).encode())
            made.clear()
            await asyncio.sleep(0)
            size, until = 0, time.perf_counter() + STEP_S
    if size:
        await response.write("".join(made).encode())
    await response.write_eof()
    return response


class Scraping(BoundedListener):
    """
    Serves metrics on one address.

    :param daemon: The program's settings file, for messages: ``cpmd.toml``.
    :param listen: Where.
    :param pieces: Makes the text.
    :raise OSError: When the certificate cannot be read or used.
    """

    def __init__(self, daemon: str, listen: MetricsListen, pieces: Pieces) -> None:
        super().__init__(daemon, "metrics", listen, MOST_CONNECTIONS, self._app)
        self._pieces = pieces
        self._token_file = listen.token_file
        self._said = ""

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=1024, middlewares=[ignore_disconnects])
        app.router.add_get(PATH, self._answer, allow_head=False)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if not self._may_read(request.headers.get("Authorization", "")):
            refused = web.Response(status=401, text="a token is needed\n", headers={"WWW-Authenticate": "Bearer"})
            refused.force_close()
            return refused
        return await send(request, CONTENT_TYPE, self._pieces(), is_last=True)

    def _may_read(self, shown: str) -> bool:
        """Return whether a reader shows the token. A token that cannot be read lets nobody in."""
        if self._token_file is None:
            return True
        try:
            token = tokens.read(self._token_file)
        except OSError as error:
            if (text := error.strerror or str(error)) != self._said:
                self._said = text
                log.error("nobody can read metrics: %s; see token_file in [metrics]", text)
            return False
        self._said = ""
        scheme, _, credentials = shown.partition(" ")
        # In the same time however much of it is right.
        is_right = hmac.compare_digest(credentials.strip().encode("utf-8", "replace"), token.encode())
        return scheme.lower() == "bearer" and is_right

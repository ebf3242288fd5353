"""Serves metrics to Prometheus, on a TCP address of its own: reads only, and nothing but ``/metrics``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Final

from aiohttp import web

from cpm.api.bounded_listener import STEP_S, BoundedListener
from cpm.api.disconnects import ignore_disconnects
from cpm.service.metrics.settings import Listen
from cpm.service.metrics.values import CONTENT_TYPE

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

    def __init__(self, daemon: str, listen: Listen, pieces: Pieces) -> None:
        super().__init__(daemon, "metrics", listen, MOST_CONNECTIONS, self._app)
        self._pieces = pieces

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=1024, middlewares=[ignore_disconnects])
        app.router.add_get(PATH, self._answer, allow_head=False)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        return await send(request, CONTENT_TYPE, self._pieces(), is_last=True)

"""
Clients and nodes that vanish before they have their answer: that is no error, and there is nobody to tell.

aiohttp logs whatever a handler raises with a traceback, and a lost connection reaches a handler as an exception. So
each application has this middleware.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_CLIENT_CLOSED_REQUEST: Final = 499
"""Of an answer that nobody gets; the number is nginx's."""


def is_connected(request: web.Request) -> bool:
    """Return whether the client of a request is still there, as far as is known."""
    return request.transport is not None and not request.transport.is_closing()


@web.middleware
async def ignore_disconnects(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Serve a request. When its client vanishes meanwhile, that costs one line at level debug."""
    try:
        return await handler(request)
    except OSError as error:
        if is_connected(request):
            raise
        log.debug("%s %s: the client is gone: %s", request.method, request.path, error)
        # aiohttp needs an answer, and finds that it cannot be written.
        return web.Response(status=_CLIENT_CLOSED_REQUEST)

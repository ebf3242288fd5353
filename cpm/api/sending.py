"""
Sends answers to clients that may not read them.

An answer is in memory until its client has taken it, so the time for that is limited, whatever the client does; and
one user has a limited number of requests (:data:`cpm.api.server.MOST_OF_USER`). Whole connections are limited in the
same way by :mod:`cpm.api.bounded_listener`.

Tested in ``tests/unit/cpm/api/test_sending.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from aiohttp import web

SEND_S: Final = 30.0
"""Seconds in which a client has to take a whole answer."""

STALL_S: Final = 300.0
"""Seconds in which the client of a stream has to take a line: it may be shown in a pager."""

_T = TypeVar("_T")


async def within(request: web.Request, limit_s: float, sending: Coroutine[Any, Any, _T]) -> _T:
    """
    Send, or end the connection when that takes too long.

    :raise ConnectionError: When the client is gone, or has not taken what is sent in time.
    """
    transport = request.transport
    if transport is not None:
        # What was written counts as sent once the kernel has all of it.
        transport.set_write_buffer_limits(high=0)
    try:
        async with asyncio.timeout(limit_s):
            return await sending
    except TimeoutError:
        if transport is not None:
            transport.abort()
        raise ConnectionResetError(f"it has not taken its answer within {limit_s:g} s") from None


async def whole(request: web.Request, response: web.Response) -> web.StreamResponse:
    """Send an answer; aiohttp itself would do so after the handler, and wait for ever."""
    await response.prepare(request)
    await response.write_eof()
    return response

"""
Posts entries of the journal to an operator's HTTP server.

Tested in ``tests/unit/cpm/serving/test_event_export.py``.
"""

from __future__ import annotations

import ssl
from typing import Final

import aiohttp

from cpm.service import tokens

LIMIT_S: Final = 10.0
"""Seconds in which the server has to answer."""


class Webhook:
    """
    Posts to one URL. Redirects are not followed: they would send the token elsewhere.

    :param token_file: Read for each post, so that a token can be renewed; empty: none.
    :param ca: PEM file; empty: the CAs of the system.
    """

    def __init__(self, url: str, token_file: str = "", ca: str = "") -> None:
        self._url = url
        self._token_file = token_file
        self._ca = ca
        self._session: aiohttp.ClientSession | None = None

    async def post(self, body: bytes, key: str) -> None:
        """
        Post a document of JSON.

        :param key: The same when it is posted again (header ``Idempotency-Key``).
        :raise OSError: When it was not taken: there is no server, no answer in time, or one that is not 2xx. Also when
            the token or the CA cannot be read.
        """
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        if self._token_file:
            headers["Authorization"] = f"Bearer {tokens.read(self._token_file)}"
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LIMIT_S))
        try:
            tls = ssl.create_default_context(cafile=self._ca) if self._ca else True
            post = self._session.post(self._url, data=body, headers=headers, allow_redirects=False, ssl=tls)
            async with post as answer:
                if not 200 <= answer.status < 300:
                    raise OSError(0, f"the server answers {answer.status}")
        except aiohttp.InvalidURL as error:
            # Its text has the whole URL, in which there may be a password.
            raise OSError(0, "the URL is none; correct [events] webhook") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise OSError(0, str(error) or type(error).__name__) from error
        except TimeoutError as error:
            raise OSError(0, f"no answer within {LIMIT_S:g} s") from error

    async def close(self) -> None:
        """End its connections."""
        if self._session is not None:
            await self._session.close()

"""How the server ends sessions and streams."""

from __future__ import annotations

import json

import aiohttp
import pytest

from cpm.protocol.messages import Attach
from cpm.protocol.model import DomainUUID
from tests.fakes import cpmd

WEB = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")


@pytest.mark.parametrize("pad", range(4))
async def test_a_reason_fits_a_close_frame_and_ends_in_a_whole_character(pad: int) -> None:
    """A node may have any name; the error repeats what it sent."""
    kind = "x" * pad + "\N{EURO SIGN}" * 100
    async with cpmd.running() as site, site.session() as session:
        await session.send_str(json.dumps({"type": kind}))
        frame = await session.receive()
    assert (frame.type, frame.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.POLICY_VIOLATION)
    assert frame.extra is not None
    assert 120 < len(frame.extra.encode()) <= 123
    assert frame.extra.endswith("\N{EURO SIGN}")


async def test_a_client_that_disconnects_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with cpmd.running() as site:
        assert (await site.lines("/v1/events?follow=1", 0)).status == 200
        async with site.node("host1", "172.30.0.11") as node:
            await site.ask("POST", "/v1/pool", b'{"addresses":["203.0.113.1"]}')
            await node.say(Attach(WEB, "web1"))
            await site.settle()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []

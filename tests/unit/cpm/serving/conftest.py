"""A site of one machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from cpm.core.membership import ApprovalRequest
from cpm.protocol.messages import (
    Attach,
)
from cpm.protocol.model import AllocationState, Role
from tests.unit.cpm.serving.sites import EXTERNAL, HOST1, WEB, Site

_State = AllocationState


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    """A site with a VM."""
    site = Site(tmp_path / "ledger.db", monkeypatch)
    running = asyncio.create_task(site.loop.run())
    await site.add(EXTERNAL)
    approval = ApprovalRequest(roles=frozenset(Role), underlay=IPv4Address("172.30.0.11"))
    await site.loop.do(lambda manager, now: manager.membership.approve(HOST1, approval, now))
    await site.connect()
    await site.say(Attach(WEB, "web"))
    assert site.states() == {_State.ACTIVE}
    yield site
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    site.ledger.close()

"""
A QEMU guest agent (qemu-ga 7.2 in a Linux guest) as both adapters reach it.

Each check is called with an agent during a visit and asserts. They use only what is also there in a guest of the lab.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pytest

from qga_agent.announcement import LOCAL_PORT_RANGE
from qga_agent.guest_agent import (
    SNMP,
    SOCKSTAT,
    Agent,
    AgentRefused,
    parse_interfaces,
    parse_snmp,
    parse_sockstat,
    read_file,
    write_file,
)

FILE = "/run/vp-conformance"
MISSING = "/run/vp-conformance-missing"
STATISTICS = {
    "rx-packets", "rx-bytes", "rx-errs", "rx-dropped", "tx-packets", "tx-bytes", "tx-errs", "tx-dropped",
}  # fmt: skip


async def sync_returns_its_number(agent: Agent) -> None:
    assert await agent.execute("guest-sync", {"id": 4711}) == 4711


async def interfaces_with_an_address_have_counters(agent: Agent) -> None:
    reply: Any = await agent.execute("guest-network-get-interfaces")
    counted = {interface["name"]: interface["statistics"] for interface in reply if "statistics" in interface}
    assert {"lo", "eth0"} <= set(counted) == {each["name"] for each in reply if each.get("ip-addresses")}
    for statistics in counted.values():
        assert set(statistics) == STATISTICS
        assert all(type(counter) is int for counter in statistics.values())
    assert set(parse_interfaces(reply)) == set(counted) - {"lo"}


async def figures_of_proc_are_read(agent: Agent) -> None:
    assert parse_sockstat(await read_file(agent, SOCKSTAT)) >= 0
    assert parse_snmp(await read_file(agent, SNMP)) >= 0


async def a_read_says_whether_it_met_the_end(agent: Agent) -> None:
    await write_file(agent, FILE, b"0123456789")
    async with _opened(agent, FILE, "r") as handle:
        assert await _read(agent, handle, 4) == (b"0123", False)
        assert await _read(agent, handle, 6) == (b"456789", False), "the end is met by reading beyond it"
        assert await _read(agent, handle, 1) == (b"", True)
    async with _opened(agent, FILE, "r") as handle:
        assert await _read(agent, handle, 11) == (b"0123456789", True)


async def mode_w_creates_and_truncates(agent: Agent) -> None:
    await write_file(agent, FILE, b"a long first content")
    await write_file(agent, FILE, b"short")
    assert await read_file(agent, FILE) == b"short"
    async with _opened(agent, FILE, "w"):
        assert await read_file(agent, FILE) == b""


async def mode_r_plus_overwrites_in_place(agent: Agent) -> None:
    await write_file(agent, FILE, b"0123456789")
    async with _opened(agent, FILE, "r+"):
        assert await read_file(agent, FILE) == b"0123456789"
    await write_file(agent, FILE, b"abc", "r+")
    assert await read_file(agent, FILE) == b"abc3456789"


async def a_write_takes_effect_at_flush_or_close(agent: Agent) -> None:
    await write_file(agent, FILE, b"before")
    async with _opened(agent, FILE, "r+") as handle:
        assert await _write(agent, handle, b"flush!") == {"count": 6, "eof": False}
        assert await read_file(agent, FILE) == b"before"
        await agent.execute("guest-file-flush", {"handle": handle})
        assert await read_file(agent, FILE) == b"flush!"
        await _write(agent, handle, b" and close")
        assert await read_file(agent, FILE) == b"flush!"
    assert await read_file(agent, FILE) == b"flush! and close"


async def a_missing_file_is_refused(agent: Agent) -> None:
    for mode in ("r", "r+"):
        with pytest.raises(AgentRefused):
            await agent.execute("guest-file-open", {"path": MISSING, "mode": mode})


async def an_unknown_handle_is_refused(agent: Agent) -> None:
    async with _opened(agent, SOCKSTAT, "r") as handle:
        pass
    for command, arguments in (
        ("guest-file-read", {"count": 1}),
        ("guest-file-write", {"buf-b64": ""}),
        ("guest-file-flush", {}),
        ("guest-file-close", {}),
    ):
        with pytest.raises(AgentRefused):
            await agent.execute(command, {"handle": handle, **arguments})


async def an_unknown_command_is_refused_and_the_visit_goes_on(agent: Agent) -> None:
    with pytest.raises(AgentRefused):
        await agent.execute("guest-vp-conformance")
    assert await agent.execute("guest-sync", {"id": 1}) == 1


async def the_local_port_range_is_a_pair_and_takes_one(agent: Agent) -> None:
    before = await read_file(agent, LOCAL_PORT_RANGE, 64)
    assert len(before.split()) == 2
    try:
        await write_file(agent, LOCAL_PORT_RANGE, b"40000 50000\n")
        assert await read_file(agent, LOCAL_PORT_RANGE, 64) == b"40000\t50000\n"
    finally:
        await write_file(agent, LOCAL_PORT_RANGE, before)


async def an_impossible_local_port_range_is_refused_at_the_flush(agent: Agent) -> None:
    before = await read_file(agent, LOCAL_PORT_RANGE, 64)
    for content in (b"80 90\n", b"50000 40000\n", b"40000 70000\n"):
        handle = await agent.execute("guest-file-open", {"path": LOCAL_PORT_RANGE, "mode": "w"})
        assert (await _write(agent, handle, content))["count"] == len(content)
        with pytest.raises(AgentRefused):
            await agent.execute("guest-file-flush", {"handle": handle})
        with contextlib.suppress(AgentRefused):
            await agent.execute("guest-file-close", {"handle": handle})
    assert await read_file(agent, LOCAL_PORT_RANGE, 64) == before


CHECKS: tuple[Callable[[Agent], Awaitable[None]], ...] = (
    sync_returns_its_number,
    interfaces_with_an_address_have_counters,
    figures_of_proc_are_read,
    a_read_says_whether_it_met_the_end,
    mode_w_creates_and_truncates,
    mode_r_plus_overwrites_in_place,
    a_write_takes_effect_at_flush_or_close,
    a_missing_file_is_refused,
    an_unknown_handle_is_refused,
    an_unknown_command_is_refused_and_the_visit_goes_on,
    the_local_port_range_is_a_pair_and_takes_one,
    an_impossible_local_port_range_is_refused_at_the_flush,
)


@contextlib.asynccontextmanager
async def _opened(agent: Agent, path: str, mode: str) -> AsyncIterator[object]:
    handle = await agent.execute("guest-file-open", {"path": path, "mode": mode})
    assert type(handle) is int
    yield handle
    await agent.execute("guest-file-close", {"handle": handle})


async def _read(agent: Agent, handle: object, count: int) -> tuple[bytes, bool]:
    reply: Any = await agent.execute("guest-file-read", {"handle": handle, "count": count})
    content = base64.b64decode(reply["buf-b64"])
    assert reply["count"] == len(content)
    return content, reply["eof"]


async def _write(agent: Agent, handle: object, content: bytes) -> Mapping[str, object]:
    buffer = base64.b64encode(content).decode()
    reply: Any = await agent.execute("guest-file-write", {"handle": handle, "buf-b64": buffer})
    return dict(reply)
